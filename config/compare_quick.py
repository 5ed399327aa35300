"""
The quick start: a GPT and an MLA model of the same size on tiny Shakespeare, side by side.

    python compare.py config/compare_quick.py

It prints parameters, cache, losses and a sample of each, and draws them. There is one seed and
nothing is tuned, so it shows the two and proves nothing; compare_shakespeare.py is the study. The
GPT has RoPE and MLA's recipe: the attention alone is different. MLA caches a quarter of what the
GPT caches. A CPU trains 0.8M parameters, a GPU 10.7M.
"""

out_dir = 'out-compare-quick'
title = 'Quick start: a GPT and MLA on tiny Shakespeare'

contenders = dict(
    gpt=dict(label='GPT (MHA)'),
    mla=dict(
        label='MLA 128 + 64',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',  # see study_mla.py
        muon_up=0.25,
    ),
)
seeds = [1]
in_process = True  # Python starts once for both

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
pos = 'rope'
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
tie_weights = False
zero_init = True
dropout = 0.1
dropout_in = 'residual'

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 1e-3  # of AdamW: embedding, head and norms
weight_decay = 0.2
max_iters = 900
eval_interval = 100
log_interval = 10
schedule = 'wsd'
warmup_iters = 20
cooldown = 0.9  # the last 90 % of the steps decay to zero
ema_decay = 0.99
min_lr = 0.0
cuda_graph = True  # a step takes 5 ms: replay it without Python in between

on_cpu = dict(
    contenders=dict(
        gpt=dict(label='GPT (MHA)'),
        mla=dict(
            label='MLA 32 + 32',
            attention='mla',
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=32,
            latent_init='orthogonal',
            muon_up=0.25,
        ),
    ),
    cuda_graph=False,
    compile=False,
    dtype='fast',
    kernel='eager',
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    tie_weights=True,
    dropout=0.0,
    learning_rate=5e-3,
    weight_decay=0.1,
    warmup_iters=10,
    max_iters=500,
    cooldown=0.7,
    ema_decay=0.98,
)
