"""
GPT-2's size (124M) by a modern recipe.

RoPE, RMSNorm, QK-norm, ReLU², zero-initialised projections, Muon, and a linear cooldown.
`--attention=mla` with the widths of train_gpt2_mla.py trains MLA by the same recipe.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py
"""

out_dir = 'out-gpt2-modern'
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-modern'
dataset = 'openwebtext'

batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16  # 16 micro-batches of 32 x 1024 tokens = 524,288 tokens a step

pos = 'rope'
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
zero_init = True

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 1e-3  # of AdamW: embedding, head and norms
weight_decay = 0.1
max_iters = 10000  # 5 billion tokens
schedule = 'wsd'
warmup_iters = 200
cooldown = 0.5
min_lr = 0.0

eval_interval = 500
eval_iters = 200
log_interval = 10

# a laptop tries the recipe on a small model
on_cpu = dict(
    compile=False,
    batch_size=8,
    block_size=128,
    n_layer=4,
    n_head=4,
    n_embd=128,
    gradient_accumulation_steps=1,
    max_iters=2000,
    warmup_iters=50,
    eval_interval=200,
    eval_iters=20,
    dtype='fast',
    kernel='eager',
)
