"""
How much of a head of 64 should carry RoPE? All caches hold 160 values a token and layer: what RoPE takes, the latent gives.

    python compare.py config/compare_shakespeare.py config/study_rope.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/rope.jsonl'
figure = 'out-study/rope.png'
title = 'Share of RoPE at equal cache (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    rope0=dict(label='MLA, no positions', attention='mla', kv_lora_rank=160, qk_nope_head_dim=64, qk_rope_head_dim=0, pos='none'),
    learned=dict(label='MLA, learned positions', attention='mla', kv_lora_rank=160, qk_nope_head_dim=64, qk_rope_head_dim=0, pos='learned'),
    rope8=dict(label='MLA, RoPE in 8 of 64', attention='mla', kv_lora_rank=152, qk_nope_head_dim=56, qk_rope_head_dim=8),
    rope16=dict(label='MLA, RoPE in 16 of 64', attention='mla', kv_lora_rank=144, qk_nope_head_dim=48, qk_rope_head_dim=16),
    mla=dict(label='MLA, RoPE in 32 of 64', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    rope48=dict(label='MLA, RoPE in 48 of 64', attention='mla', kv_lora_rank=112, qk_nope_head_dim=16, qk_rope_head_dim=48),
    rope64=dict(label='MLA, RoPE in 64 of 96', attention='mla', kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=64))
