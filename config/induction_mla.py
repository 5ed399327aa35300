"""
MLA with RoPE and a latent of 32.

    python train.py config/induction.py config/induction_mla.py
"""

out_dir = 'out-induction-mla'
attention = 'mla'
kv_lora_rank = 32
qk_nope_head_dim = 8
qk_rope_head_dim = 8
