"""
Two whole layers: MLA with RoPE and a latent of 32, and the MLPs.

    python train.py config/induction.py config/induction_full_mla.py
"""

out_dir = 'out-induction-full-mla'
mlp = True
attention = 'mla'
kv_lora_rank = 32
qk_nope_head_dim = 8
qk_rope_head_dim = 8
