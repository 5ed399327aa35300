"""
MLA with RoPE and a narrow latent of 8.

    python train.py config/induction.py config/induction_mla_narrow.py
"""

out_dir = 'out-induction-mla-narrow'
attention = 'mla'
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 8
