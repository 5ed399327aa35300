"""
Which MLA matches MHA with RoPE at 30M parameters, and at which cache size: books, byte by byte.

    python data/text/prepare.py books.txt.xz --tokenizer=bytes --out=data/books_bytes
    python compare.py config/compare_books.py

MHA caches 1024 values a token and layer. The MLAs start small and orthogonal, with Muon slower
after the latent. screen_books.py has what came before; its runs of MHA and MQA are points of their
grids. Contenders are trained in their order.
"""

out_dir = 'out-compare-books'
title = 'Books, bytes, 30M parameters'

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    # 1/8 of the cache
    mla64_64=dict(
        label='MLA 64 + 64',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        qk_norm_latent=True,
        muon_up=0.25,
    ),
    # 1/8 of the cache
    mla64_64_n0=dict(
        label='MLA 64 + 64, no content keys',
        attention='mla',
        kv_lora_rank=64,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        softmax_scale=0.25,
        muon_up=0.25,
    ),
    mqa=dict(label='MQA, scale 1/4', n_kv_head=1, softmax_scale=0.25),  # 1/8
    # 1/8 of the cache
    mla64_64_h12=dict(
        label='MLA 64 + 64, 12 heads',
        attention='mla',
        n_head=12,
        head_dim=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        qk_norm_latent=True,
        muon_up=0.25,
    ),
    # 3/2 of the cache: what more heads are worth without MLA
    mha_h12=dict(label='MHA + RoPE, 12 heads', n_head=12, head_dim=64),
    # 1/4 of the cache
    mla192_64=dict(
        label='MLA 192 + 64',
        attention='mla',
        kv_lora_rank=192,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        qk_norm_latent=True,
        muon_up=0.25,
    ),
)
seeds = [1, 2, 3, 4, 5, 6, 7, 8]  # runs differ by 0.002, contenders by less
tune = dict(muon_lr=[0.01, 0.02, 0.04])

dataset = 'books_bytes'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 512

n_layer = 9
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
max_iters = 500  # 64 x 512 bytes a step: 16 MB, a sixth of the books
eval_interval = 125
eval_iters = 16
log_interval = 50
schedule = 'wsd'
warmup_iters = 50
cooldown = 0.6
min_lr = 0.0
cuda_graph = True  # a step is short: replay it without Python in between

on_cpu = dict(cuda_graph=False, compile=False)
