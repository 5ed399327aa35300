"""
GPT-2 124M with Multi-head Latent Attention in the place of MHA: 122.7M parameters, and a cache of
512 + 32 values a token and layer instead of 1536.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_mla.py
"""

out_dir = 'out-gpt2-mla'
wandb_project = 'owt'
wandb_run_name = 'mla-124M'
dataset = 'openwebtext'

attention = 'mla'
n_head = 6
head_dim = 128  # q and k: 96 without position + 32 with RoPE; v: 128
kv_lora_rank = 512
qk_rope_head_dim = 32

batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16  # 16 micro-batches of 32 x 1024 tokens = 524,288 tokens a step

max_iters = 600000
lr_decay_iters = 600000  # 315 billion tokens
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1

eval_interval = 1000
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
    lr_decay_iters=2000,
    warmup_iters=50,
    eval_interval=200,
    eval_iters=20,
    head_dim=32,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
)
