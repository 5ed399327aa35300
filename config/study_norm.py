"""
Do the latent's RMS norm and the norm of queries and keys matter?

    python compare.py config/compare_shakespeare.py config/study_norm.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/norm.jsonl'
figure = 'out-study/norm.png'
title = 'Latent norm and QK-norm (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    mha_plain=dict(label='MHA + RoPE, no QK-norm', qk_norm=False),
    mla=dict(label='MLA, both norms', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    latent_norm=dict(label='MLA, latent norm only', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, qk_norm=False),
    qk_norm=dict(label='MLA, QK-norm only', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, latent_norm=False),
    no_norm=dict(label='MLA, no norm', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, qk_norm=False, latent_norm=False))
