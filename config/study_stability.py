"""
What keeps attention logits in bounds? MLA at a high rate of Muon, with one tool at a time.

    python compare.py config/study_stability.py
    python compare.py config/study_stability.py --muon_lr=0.02 --out_dir=out-study-stability-low

The control is Muon on each symbol, with nothing that bounds a logit. Muon makes every direction of
W^UQ and W^UK grow by the same amount, so with no QK-norm logits grow with the rate and the steps.
All rows have the same shape and see the same batches. Nothing is tuned: the rate is the question.
"""

out_dir = 'out-study-stability'
title = 'Attention logits at a high rate (Shakespeare)'
control = 'symbol'

contenders = dict(
    symbol=dict(label='Muon by symbol'),
    head=dict(label='Muon by head (GLM-5)', muon_heads=True),
    clip=dict(label='QK-Clip at 100 (Kimi K2)', qk_clip=100.0),
    qk_norm=dict(label='QK-norm', qk_norm=True),
    latent=dict(label='QK-norm as queries meet the cache', qk_norm=True, qk_norm_latent=True),
)
seeds = [1, 2, 3]
in_process = True  # nothing is compiled twice
decode_tokens = 0
log_max_logits = True

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

attention = 'mla'
n_layer = 6
n_head = 6
n_embd = 384
kv_lora_rank = 128
qk_nope_head_dim = 32
qk_rope_head_dim = 64
norm = 'rmsnorm'
act = 'relu2'
tie_weights = False
zero_init = True
dropout = 0.1
dropout_in = 'residual'

optimizer = 'muon'
muon_lr = 0.16  # eight times what config/compare_quick.py has
learning_rate = 1e-3  # of AdamW: embedding, head and norms
weight_decay = 0.0  # it bounds weights as well
max_iters = 900
eval_interval = 100
log_interval = 10
schedule = 'wsd'
warmup_iters = 20
cooldown = 0.5
min_lr = 0.0
cuda_graph = True  # a step is short: replay it without Python in between

on_cpu = dict(
    cuda_graph=False,
    compile=False,
    dtype='fast',
    kernel='eager',
    batch_size=16,
    block_size=64,
    n_layer=2,
    n_head=4,
    n_embd=128,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=32,
    tie_weights=True,
    dropout=0.0,
    learning_rate=5e-3,
    warmup_iters=10,
    max_iters=200,
    eval_interval=100,
    eval_iters=40,
)
