"""
MHA with learned positions, which take twice the steps.

    python train.py config/induction.py config/induction_mha.py
"""

out_dir = 'out-induction-mha'
pos = 'learned'
max_iters = 2400
