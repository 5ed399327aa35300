"""
Induction on real text: GPT-2-size models on the same batches of books as GPT-2 tokens.

    python data/text/prepare.py books.txt.xz --tokenizer=gpt2
    python train.py config/induction_books.py config/induction_books_mha.py
    python train.py config/induction_books.py config/induction_books_mla.py
    python find_induction_heads.py --sweep=out-induction-books-mha,out-induction-books-mla \
        --often=1000 --copying=True --latents=True

On one H200 each takes four minutes. A CPU trains smaller models.
"""

out_dir = 'out-induction-books'
dataset = 'text'
eval_interval = 1700
eval_iters = 50
log_interval = 20
keep_checkpoints = 22
sample_tokens = 0
seed = 2

gradient_accumulation_steps = 1
batch_size = 8  # small, for many steps
block_size = 1024  # 8,192 tokens a step

norm = 'rmsnorm'
act = 'relu2'
qk_norm = True
zero_init = True

optimizer = 'muon'
muon_lr = 0.01
learning_rate = 1.5e-3  # of AdamW: embedding, head and norms
weight_decay = 0.1
max_iters = 8500  # 70M tokens, three passes over 100 MB of text
schedule = 'wsd'
warmup_iters = 100
cooldown = 0.2
min_lr = 0.0

cuda_graph = True  # at this batch a step is as long as the start of its kernels

# a small model of the same kind
on_cpu = dict(
    cuda_graph=False,
    compile=False,
    batch_size=8,
    block_size=128,
    n_layer=4,
    n_head=4,
    n_embd=128,
    max_iters=1700,
    eval_interval=170,
    eval_iters=20,
)
