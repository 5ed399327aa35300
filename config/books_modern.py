"""
The size, text and batches of books_gpt2.py by the recipe of train_gpt2_modern.py.

It takes less than a third of the steps.

    python data/text/prepare.py books.txt.xz --tokenizer=gpt2
    python train.py config/books_modern.py --fp8_head=True   # on a Hopper GPU or a newer one
"""

out_dir = 'out-books-modern'
dataset = 'text'

gradient_accumulation_steps = 1
batch_size = 32
block_size = 1024

pos = 'rope'
norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
zero_init = True

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3  # of AdamW: embedding, head and norms
weight_decay = 0.1
max_iters = 600
schedule = 'wsd'
warmup_iters = 20
cooldown = 0.7
min_lr = 0.0

eval_interval = 150
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
    dtype='fast',
    kernel='eager',
    max_iters=150,
    warmup_iters=10,
    eval_interval=50,
    eval_iters=20,
)
