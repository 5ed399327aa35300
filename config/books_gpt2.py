"""
GPT-2 124M by nanoGPT's recipe on 100 MB of books: what books_modern.py races against.

The schedule is cut to 2,000 steps.

    python data/text/prepare.py books.txt.xz --tokenizer=gpt2
    python train.py config/books_gpt2.py
"""

out_dir = 'out-books-gpt2'
dataset = 'text'

gradient_accumulation_steps = 1
batch_size = 32  # 32 x 1024 tokens a step: 65M tokens in all, three passes
block_size = 1024

max_iters = 2000
lr_decay_iters = 2000
warmup_iters = 100
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1

eval_interval = 200
eval_iters = 64
log_interval = 20
sample_tokens = 100

# a laptop tries the recipe on a small model
on_cpu = dict(
    compile=False,
    batch_size=8,
    block_size=128,
    n_layer=4,
    n_head=4,
    n_embd=128,
    max_iters=500,
    lr_decay_iters=500,
    warmup_iters=20,
    eval_interval=100,
    eval_iters=20,
)
