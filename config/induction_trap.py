"""
The trap: one layer on texts of one length. It learns to count places, which looks like an induction head until
something is put between the copies; find_induction_heads.py calls its heads positional.

    python train.py config/induction_trap.py
"""

out_dir = 'out-induction-trap'
dataset = 'repeats_fixed'
eval_interval = 250
eval_iters = 20
log_interval = 10
keep_checkpoints = 24
sample_tokens = 0

gradient_accumulation_steps = 1
batch_size = 64
block_size = 64  # tokens: one or two texts and pieces of others

n_layer = 1
n_head = 4
n_embd = 64
mlp = False
bias = True
init = 'fan_in'
kernel = 'eager'  # so small that the plain kernel is the fast one

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3  # of AdamW: embedding, head and norms
weight_decay = 0.01
max_iters = 300
warmup_iters = 20
min_lr = 0.0
cuda_graph = True

on_cpu = dict(cuda_graph=False, compile=False)
