"""
MLA without RoPE, its positions learned, which take twice the steps.

    python train.py config/induction.py config/induction_mla_nope.py
"""

out_dir = 'out-induction-mla-nope'
attention = 'mla'
pos = 'learned'
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 0
max_iters = 2400
