"""
Should Muon take stacked matrices (W^Q | W^K | W^V, W^DKV | W^KR, W^UK | W^UV) apart before it orthogonalises them?

    python compare.py config/compare_shakespeare.py config/study_muon.py --jobs=12 --in_process=True

Recipe and control are those of compare_shakespeare.py. The studies keep their runs in one folder, so contenders
of the same name are trained once for all of them.
"""
out_dir = 'out-study'
results = 'out-study/muon.jsonl'
figure = 'out-study/muon.png'
title = 'Muon: stacked matrices apart or whole (Shakespeare)'
seeds = [1, 2, 3, 4, 5]

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    mha_whole=dict(label='MHA + RoPE, whole', muon_split=False),
    mla=dict(label='MLA, apart', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32),
    mla_whole=dict(label='MLA, whole', attention='mla', kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, muon_split=False))
