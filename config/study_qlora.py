"""
Does a latent for the queries help? The MLP gets the parameters that it saves.

    python compare.py config/compare_shakespeare.py config/study_qlora.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/qlora.jsonl'
figure = 'out-study/qlora.png'
title = 'Latent queries, q-LoRA (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    mla=dict(label='MLA, full-rank W^Q', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    q64=dict(label='MLA, q latent 64', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, q_lora_rank=64),
    q128=dict(label='MLA, q latent 128', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, q_lora_rank=128),
    q192=dict(label='MLA, q latent 192', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, q_lora_rank=192))
