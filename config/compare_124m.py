"""
Which MLA matches MHA with RoPE at 124M parameters, and at which cache size: books, GPT-2's tokens.

    python data/text/prepare.py books.txt.xz --tokenizer=gpt2 --out=data/books_gpt2
    python compare.py config/compare_124m.py
    sbatch --array=0-15 slurm/compare.sbatch config/compare_124m.py

MHA caches 1536 values a token and layer; MLA its latent and 64 more, and starts as in
compare_books.py. Contenders are trained in their order.
"""

out_dir = 'out-compare-124m'
title = 'Books, BPE, 124M parameters: MHA, GQA, MQA and MLA'

contenders = dict(
    mha=dict(label='MHA + RoPE', muon_lr=[0.01, 0.02, 0.04, 0.08]),
    # 1/8 of the cache
    mla128=dict(
        label='MLA 128 + 64',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        qk_norm_latent=True,
        muon_up=0.25,
    ),
    # 1/8 of the cache
    mla128_n0=dict(
        label='MLA 128 + 64, no content keys',
        attention='mla',
        kv_lora_rank=128,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        softmax_scale=0.25,
        muon_up=0.25,
    ),
    mqa=dict(label='MQA, scale 1/4', n_kv_head=1, softmax_scale=0.25),  # 1/12
    # 1/4 of the cache
    mla320=dict(
        label='MLA 320 + 64',
        attention='mla',
        kv_lora_rank=320,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        qk_norm_latent=True,
        muon_up=0.25,
    ),
    # 1/3 of the cache
    gqa=dict(label='GQA, 4 groups', n_kv_head=4, muon_lr=[0.01, 0.02, 0.04, 0.08]),
)
seeds = [1, 2, 3]
tune = dict(muon_lr=[0.005, 0.01, 0.02, 0.04])  # MHA and GQA want more

dataset = 'books_gpt2'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
pos = 'rope'
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
zero_init = True

optimizer = 'muon'
learning_rate = 1e-3  # of AdamW: embedding, head and norms
weight_decay = 0.1
max_iters = 600  # 32 x 1024 tokens a step: 20M tokens, of the books' 25M
eval_interval = 200
eval_iters = 32
log_interval = 50
schedule = 'wsd'
warmup_iters = 50
cooldown = 0.6
min_lr = 0.0

on_cpu = dict(cuda_graph=False, compile=False)
