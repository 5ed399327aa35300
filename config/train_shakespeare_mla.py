"""
A baby GPT with Multi-head Latent Attention on Shakespeare, character by character.

The recipe is modern: RoPE, RMSNorm, QK-norm, ReLU², zero-initialised projections, Muon, and a
linear cooldown.

    python train.py config/train_shakespeare_mla.py

A token takes 128 + 32 values in the cache of a layer; an MHA of this shape would take 768.
"""

out_dir = 'out-shakespeare-mla'
eval_interval = 100
eval_iters = 200
log_interval = 10
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-mla'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
# The text is short and would be learned by heart: small batches and few passes over it.
batch_size = 32
block_size = 256  # characters of context

attention = 'mla'
n_layer = 6
n_head = 6
n_embd = 384
kv_lora_rank = 128
qk_nope_head_dim = 32
qk_rope_head_dim = 32
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
tie_weights = False
zero_init = True
dropout = 0.1
dropout_in = 'residual'

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

# a laptop's share: 0.8M parameters, 64 characters of context, averaged weights; in bf16 the eager
# kernel is the fast one on a CPU
on_cpu = dict(
    cuda_graph=False,
    compile=False,
    dtype='fast',
    kernel='eager',
    batch_size=32,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    tie_weights=True,
    dropout=0.0,
    muon_lr=0.02,
    learning_rate=5e-3,
    warmup_iters=10,
    max_iters=1300,
    cooldown=0.7,
    ema_decay=0.98,
    weight_decay=0.1,
    eval_interval=75,
)
