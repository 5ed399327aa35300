"""
Does a gate or the shape of the cache beat MHA? 124M parameters, books in GPT-2's tokens.

    python data/text/prepare.py books.txt.xz --tokenizer=gpt2 --out=data/books_gpt2
    python compare.py config/study_gates.py --in_process=True --decode_tokens=0

At 12M parameters MFA and gated MQA were better than MHA (study_staircase.py). Here MHA and the best
MLA of compare_124m.py have the gate as well; all but MHA cache an eighth: 192 values a token and
layer. Rates are chosen by runs in full: short ones choose too high a rate for small caches.
"""

out_dir = 'out-study-gates'
title = 'Gates and caches of one eighth, books by BPE, 124M'

contenders = dict(
    mha=dict(label='MHA + RoPE', muon_lr=[0.02, 0.04, 0.08]),
    gated=dict(label='Gated MHA', attention='gated', muon_lr=[0.02, 0.04, 0.08]),
    # caches of an eighth
    gated_mla=dict(
        label='Gated MLA, no content keys',
        attention='gated_mla',
        kv_lora_rank=128,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        softmax_scale=0.25,
        muon_up=0.25,
    ),
    mfa=dict(label='MFA, 16 heads', attention='mfa', n_head=16, head_dim=96),
    gated_mqa=dict(label='Gated MQA', attention='gated', n_head=8, n_kv_head=1, head_dim=96),
)
seeds = [1, 2, 3]
tune = dict(muon_lr=[0.01, 0.02, 0.04])  # MHA wants more

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
