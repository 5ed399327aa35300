"""
nanoGPT's baby GPT at its own size (10.7M), trained by a modern recipe instead of its own.

RoPE, RMSNorm, QK-norm, ReLU², zero-initialised projections, Muon, a long linear cooldown and
averaged weights.

    python train.py config/train_shakespeare_modern.py

More steps and more dropout go lower still:

    python train.py config/train_shakespeare_modern.py --max_iters=2000 --dropout=0.2
"""

out_dir = 'out-shakespeare-modern'
eval_interval = 100
eval_iters = 200
log_interval = 10
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-modern'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
# The text is short and would be learned by heart: small batches and few passes over it.
batch_size = 32
block_size = 256  # characters of context

pos = 'rope'
n_layer = 6
n_head = 6
n_embd = 384
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
tie_weights = False
zero_init = True
dropout = 0.15

optimizer = 'muon'
muon_lr = 0.03
learning_rate = 1e-3  # of AdamW: embedding, head and norms
weight_decay = 0.2
max_iters = 900
schedule = 'wsd'
warmup_iters = 20
cooldown = 0.9  # the last 90 % of the steps decay to zero
ema_decay = 0.99
min_lr = 0.0
cuda_graph = True  # a step takes 5 ms: replay it without Python in between

# a laptop's share, as in train_shakespeare_mla.py
on_cpu = dict(
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
    muon_lr=0.02,
    learning_rate=0.005,
    warmup_iters=10,
    max_iters=1300,
    cooldown=0.7,
    ema_decay=0.98,
    weight_decay=0.1,
    eval_interval=75,
)
