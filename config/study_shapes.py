"""
Which MLA is best at a quarter of MHA's cache, 192 values a token and layer? Wider RoPE, more or wider heads, without QK-norm.

    python compare.py config/compare_shakespeare.py config/study_shapes.py --jobs=12 --in_process=True

QK-norm without a gain bounds a logit: 8 in an MHA head of 64, but 4 for the 32 of 64 dimensions of MLA that know positions.
Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/shapes.jsonl'
figure = 'out-study/shapes.png'
title = "Shapes of MLA at a quarter of MHA's cache (Shakespeare)"
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    r160=dict(label='MLA 160 + 32', attention='mla', kv_lora_rank=160, qk_nope_head_dim=32, qk_rope_head_dim=32),
    mha_plain=dict(label='MHA + RoPE, no QK-norm', qk_norm=False),
    r160plain=dict(label='160 + 32, no QK-norm', attention='mla', kv_lora_rank=160, qk_nope_head_dim=32, qk_rope_head_dim=32, qk_norm=False),
    p64=dict(label='128 + 64', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=64),
    p64plain=dict(label='128 + 64, no QK-norm', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=64, qk_norm=False),
    p64n16=dict(label='128 + 64, 16 without position', attention='mla', kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=64),
    h12p64=dict(label='128 + 64, 12 heads', attention='mla', n_head=12, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=64))
