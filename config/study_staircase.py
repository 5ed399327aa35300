"""
What is each part of MLA worth? From MHA to MLA a step at a time, and the zoo at MHA's eighth.

    python data/text/prepare.py books.txt.xz --tokenizer=bytes --out=data/books_bytes
    python compare.py config/study_staircase.py

MHA caches 1024 values a token and layer; all from `sliced` on cache 128 (TPA 144). Each step
changes one thing: all heads share one rotated key; what they read is a slice of the residual
stream; a random projection of it that stays; one that is learned; its orthogonal start; Muon slower
after it; QK-norm of a whole query as it meets the cache.
"""

out_dir = 'out-study-staircase'
title = 'From MHA to MLA, books in bytes, 12M parameters'

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    # the latent is all of the residual stream: keys and values as MHA's, but one rotated key
    shared=dict(
        label='one rotated key',
        attention='sliced',
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    sliced=dict(
        label='sliced latent',
        attention='sliced',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    frozen=dict(
        label='frozen latent',
        attention='frozen',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    learned=dict(
        label='learned latent',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    orthogonal=dict(
        label='... orthogonal start',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
    ),
    slower=dict(
        label='... Muon slower after it',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
    ),
    whole=dict(
        label='... QK-norm of the whole query',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
        qk_norm_latent=True,
    ),
    # the width of the rotated key, at the same cache
    narrow_key=dict(
        label='... and a rotated key of 32',
        attention='mla',
        kv_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        latent_init='orthogonal',
        muon_up=0.25,
        qk_norm_latent=True,
    ),
    # others at the same cache
    mqa=dict(label='MQA', n_kv_head=1),
    gla=dict(
        label='GLA, 2 latents',
        attention='gla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
        qk_norm_latent=True,
    ),
    gta=dict(label='GTA, 1 group of 84', attention='gta', n_kv_head=1, head_dim=84),
    tpa=dict(label='TPA, rank 1', attention='tpa', tpa_rank=1),
    mfa=dict(label='MFA, 16 heads', attention='mfa', n_head=16, head_dim=64),
    gated=dict(label='Gated MQA', attention='gated', n_kv_head=1),
)
seeds = [1, 2, 3, 4, 5, 6, 7, 8]  # runs differ by 0.002, contenders by less
tune = dict(muon_lr=[0.01, 0.02, 0.04])
tune_iters = 250  # the schedule in short
in_process = True  # nothing is compiled twice

dataset = 'books_bytes'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 512

n_layer = 4
n_head = 8
n_embd = 512
pos = 'rope'
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
tie_weights = False
zero_init = True

optimizer = 'muon'
learning_rate = 2e-3  # of AdamW: embedding, head and norms
weight_decay = 0.1
max_iters = 500  # 32 x 512 bytes a step: 8 MB
eval_interval = 250
eval_iters = 16
log_interval = 50
schedule = 'wsd'
warmup_iters = 50
cooldown = 0.6
min_lr = 0.0
cuda_graph = True  # a step is short: replay it without Python in between

on_cpu = dict(cuda_graph=False, compile=False)
