"""
How should the latent's two stacked matrices start: by fan-in, or at GPT-2's 0.02? With Muon and with AdamW.

    python compare.py config/compare_shakespeare.py config/study_init.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/init.jsonl'
figure = 'out-study/init.png'
title = 'Initialisation of the latent (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    mla=dict(label='MLA, fan-in', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    init_gpt2=dict(label='MLA, 0.02', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, latent_init='gpt2'),
    init_all=dict(label='MLA, all by fan-in', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, init='fan_in'),
    mha_adamw=dict(label='MHA + RoPE, AdamW', optimizer='adamw', learning_rate=[1e-3, 2e-3, 4e-3]),
    mla_adamw=dict(label='MLA, fan-in, AdamW', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, optimizer='adamw', learning_rate=[1e-3, 2e-3, 4e-3]),
    init_gpt2_adamw=dict(label='MLA, 0.02, AdamW', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, latent_init='gpt2', optimizer='adamw', learning_rate=[1e-3, 2e-3, 4e-3]))
