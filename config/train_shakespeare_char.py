"""A baby GPT on Shakespeare by characters: nanoGPT's recipe, for comparison with the MLA one."""

out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
cuda_graph = True  # a step is short: replay it without Python in between

# nanoGPT's own recipe for a laptop
on_cpu = dict(
    cuda_graph=False,
    compile=False,
    batch_size=12,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    max_iters=2000,
)
