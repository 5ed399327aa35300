"""
MHA with RoPE, the fair control of MLA.

    python train.py config/induction.py config/induction_mha_rope.py
"""

out_dir = 'out-induction-mha-rope'
