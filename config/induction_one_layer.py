"""
One layer of attention, which cannot find what follows an earlier token: the negative control.

    python train.py config/induction.py config/induction_one_layer.py
"""

out_dir = 'out-induction-one-layer'
n_layer = 1
