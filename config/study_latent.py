"""
How small may the latent be? MHA leaves 768 values a token and layer, GQA and MQA 256 and 128, MLA the latent and 32 more.

    python compare.py config/compare_shakespeare.py config/study_latent.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/latent.jsonl'
figure = 'out-study/latent.png'
title = 'Width of the latent (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    gqa=dict(label='GQA, 2 groups', n_kv_head=2),
    mqa=dict(label='MQA', n_kv_head=1),
    r32=dict(label='MLA 32 + 32', attention='mla', kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32),
    r64=dict(label='MLA 64 + 32', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32),
    r96=dict(label='MLA 96 + 32', attention='mla', kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32),
    mla=dict(label='MLA 128 + 32', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    r160=dict(label='MLA 160 + 32', attention='mla', kv_lora_rank=160, qk_nope_head_dim=32, qk_rope_head_dim=32),
    r256=dict(label='MLA 256 + 32', attention='mla', kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=32))
