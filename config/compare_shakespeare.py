"""
MHA with RoPE, MQA, GQA, a plain GPT and MLA from 1/2 to 1/8 of the cache on Shakespeare.

    python compare.py config/compare_shakespeare.py

The recipe is that of train_shakespeare_modern.py. MHA caches 768 values a token and layer, MLA its
latent and its RoPE key. Contenders are trained in their order. On a GPU they have 10.7M parameters
and take 4 seconds a run when a dozen share it; on a CPU there are MHA, GPT and MLA at 1/4 of the
cache, with 0.8M parameters and 27 runs: some ten minutes on two cores.
"""

out_dir = 'out-compare-shakespeare'
title = 'Shakespeare: MHA, MQA, GPT and MLA at equal parameters'

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    # 1/4 of the cache
    mla128_64=dict(
        label='MLA 128 + 64',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    mha_plain=dict(label='MHA + RoPE, no QK-norm', qk_norm=False),
    mla128_64_plain=dict(
        label='MLA 128 + 64, no QK-norm',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        qk_norm=False,
    ),
    # 1/6 of the cache
    mla64_64=dict(
        label='MLA 64 + 64',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    mqa=dict(label='MQA', n_kv_head=1),  # 1/6
    # 1/2 of the cache
    mla320_64=dict(
        label='MLA 320 + 64',
        attention='mla',
        kv_lora_rank=320,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    # as nanoGPT trains it
    gpt=dict(
        label='GPT',
        pos='learned',
        norm='layernorm',
        act='gelu',
        qk_norm=False,
        zero_init=False,
        optimizer='adamw',
        schedule='cosine',
        dropout=[0.05, 0.1],
        learning_rate=[1.5e-3, 3e-3],
    ),
    # 1/8 of the cache
    mla64_32=dict(
        label='MLA 64 + 32',
        attention='mla',
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
    ),
    # 1/3 of the cache
    gqa=dict(label='GQA, 2 groups', n_kv_head=2),
)
seeds = [1, 2, 3, 4, 5]
tune = dict(dropout=[0.05, 0.1], muon_lr=[0.015, 0.025])

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
# The text is short and would be learned by heart: small batches and few passes over it.
batch_size = 32
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
pos = 'rope'
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
tie_weights = False
zero_init = True

optimizer = 'muon'
learning_rate = 1e-3  # of AdamW: embedding, head and norms
weight_decay = 0.2
max_iters = 900
eval_interval = 180
log_interval = 90
schedule = 'wsd'
warmup_iters = 20
cooldown = 0.9  # the last 90 % of the steps decay to zero
ema_decay = 0.99
min_lr = 0.0
cuda_graph = True  # a step takes 5 ms: replay it without Python in between

on_cpu = dict(
    title='Shakespeare on a CPU: MHA, GPT and MLA at equal parameters',
    contenders=dict(
        mha=dict(label='MHA + RoPE'),
        gpt=dict(
            label='GPT',
            pos='learned',
            norm='layernorm',
            act='gelu',
            qk_norm=False,
            zero_init=False,
            optimizer='adamw',
            schedule='cosine',
            learning_rate=[2e-3, 4e-3, 8e-3],
        ),
        mla=dict(
            label='MLA 48 + 16',
            attention='mla',
            kv_lora_rank=48,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
        ),
        mla32_32=dict(
            label='MLA 32 + 32',
            attention='mla',
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=32,  # see study_mla.py
            latent_init='orthogonal',
            muon_up=0.25,
        ),
    ),
    seeds=[1, 2, 3],
    tune=dict(muon_lr=[0.005, 0.01, 0.02, 0.04]),
    cuda_graph=False,
    compile=False,
    dtype='fast',
    kernel='eager',
    batch_size=32,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    tie_weights=True,
    dropout=0.0,
    dropout_in='residual',
    learning_rate=5e-3,
    weight_decay=0.1,
    warmup_iters=10,
    max_iters=200,
    eval_interval=40,
    log_interval=10,
    cooldown=0.6,
    ema_decay=0.0,
)
