"""
The trap: one layer on texts of one length. It learns to count positions, which looks like an
induction head until something is put between the copies; find_induction_heads.py calls its heads
positional.

    python train.py config/induction.py config/induction_trap.py
"""

out_dir = 'out-induction-trap'
dataset = 'repeats_fixed'
n_layer = 1
pos = 'learned'
muon_lr = 0.02
eval_interval = 250
max_iters = 300
