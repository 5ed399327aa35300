"""
Two whole layers: MHA with RoPE, and the MLPs that the attention-only models leave out.

    python train.py config/induction.py config/induction_full_mha.py
"""

out_dir = 'out-induction-full-mha'
mlp = True
