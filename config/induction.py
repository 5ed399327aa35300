"""
Induction in two layers of attention, on repeated random texts: what all induction_*.py share.

    python train.py config/induction.py config/induction_mla.py
    python find_induction_heads.py --sweep=out-induction-mla

The other induction_*.py hold what is different there: attention, positions, layers, or the texts.
"""

out_dir = 'out-induction'
dataset = 'repeats'
eval_interval = 300
eval_iters = 20
log_interval = 10
keep_checkpoints = 24
sample_tokens = 0

gradient_accumulation_steps = 1
batch_size = 64
block_size = 64  # tokens: one or two texts and pieces of others

n_layer = 2
n_head = 4
n_embd = 64
mlp = False
pos = 'rope'
bias = True
init = 'fan_in'
kernel = 'eager'  # so small that the plain kernel is the fast one

optimizer = 'muon'
muon_lr = 0.015
learning_rate = 3e-3  # of AdamW: embedding, head and norms
weight_decay = 0.01
max_iters = 1200
warmup_iters = 20
min_lr = 0.0
cuda_graph = True

on_cpu = dict(cuda_graph=False, compile=False)
