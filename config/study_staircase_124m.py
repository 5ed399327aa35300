"""
From MHA to MLA a step at a time, as study_staircase.py, at 124M parameters and in GPT-2's tokens.

    python data/text/prepare.py books.txt.xz --tokenizer=gpt2 --out=data/books_gpt2
    python compare.py config/study_gates.py config/study_staircase_124m.py --in_process=True \
        --decode_tokens=0

Text, model and training are those of study_gates.py. MHA caches 1536 values a token and layer, all
from `sliced` on 192. The last step is the output gate, which MHA gains from.
"""

out_dir = 'out-study-staircase-124m'
title = 'From MHA to MLA, books by BPE, 124M parameters'

contenders = dict(
    mha=dict(label='MHA + RoPE', muon_lr=[0.02, 0.04, 0.08]),
    # the latent is all of the residual stream: keys and values as MHA's, but one rotated key
    shared=dict(
        label='one rotated key',
        attention='sliced',
        kv_lora_rank=768,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    sliced=dict(
        label='sliced latent',
        attention='sliced',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    frozen=dict(
        label='frozen latent',
        attention='frozen',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    learned=dict(
        label='learned latent',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
    ),
    slower=dict(
        label='orthogonal, slower Muon',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
    ),
    # and QK-norm of the whole query: MLA 128 + 64 of compare_124m.py
    whole=dict(
        label='MLA 128 + 64',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
        qk_norm_latent=True,
    ),
    gated_mla=dict(
        label='Gated MLA 128 + 64',
        attention='gated_mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
        qk_norm_latent=True,
    ),
    mqa=dict(label='MQA', n_head=8, n_kv_head=1, head_dim=96),
)
