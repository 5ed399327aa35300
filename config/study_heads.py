"""
How many heads, and how wide, over one latent of 128 + 32? More query and value heads cost no cache in MLA.

    python compare.py config/compare_shakespeare.py config/study_heads.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/heads.jsonl'
figure = 'out-study/heads.png'
title = 'Number and width of heads (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    h3=dict(label='3 × (96 + 32), v 128', attention='mla', n_head=3, kv_lora_rank=128, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=128),
    mla=dict(label='6 × (32 + 32), v 64', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    h6wide=dict(label='6 × (64 + 32), v 64', attention='mla', kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32),
    h12=dict(label='12 × (32 + 32), v 32', attention='mla', n_head=12, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32),
    h12wide=dict(label='12 × (32 + 32), v 64', attention='mla', n_head=12, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64))
