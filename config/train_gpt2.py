"""
GPT-2 124M on OpenWebText, as nanoGPT trains it: about half a million tokens a step.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

out_dir = 'out-gpt2'
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
dataset = 'openwebtext'

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
)
