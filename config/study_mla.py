"""
What is each part of MLA worth? MLA at a quarter of MHA's cache, with one thing changed at a time.

    python compare.py config/compare_shakespeare.py config/study_mla.py --jobs=12 --in_process=True

Shape and recipe are those of compare_shakespeare.py, in 450 steps, half as many, and with five
seeds. The control is MLA itself; all cache 192 values a token and layer, MHA 768. Where RoPE takes
less of a head, the rest of the head has no position, and the latent is wider.
"""

out_dir = 'out-study-mla'
title = 'What the parts of MLA are worth (Shakespeare)'
control = 'mla'

contenders = dict(
    # the width that compare_shakespeare.py gives it
    mla=dict(
        label='MLA 128 + 64',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        n_inner=1632,
    ),
    rope32=dict(
        label='RoPE in 32 of 96, latent 160',
        attention='mla',
        kv_lora_rank=160,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
    ),
    no_latent_norm=dict(
        label='no latent norm',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_norm=False,
    ),
    no_qk_norm=dict(
        label='no QK-norm',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        qk_norm=False,
    ),
    q_lora=dict(
        label='q latent of 128',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        q_lora_rank=128,
    ),
    init_gpt2=dict(
        label="latent starts at GPT-2's 0.02",
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='gpt2',
    ),
    orthogonal=dict(
        label='W^UK and W^UV start orthogonal',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
    ),
    slow_up=dict(
        label="a quarter of Muon's rate behind the latent",
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        muon_up=0.25,
    ),
    both=dict(
        label='orthogonal, and the quarter',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        latent_init='orthogonal',
        muon_up=0.25,
    ),
    qk_norm_latent=dict(
        label='QK-norm as queries meet the cache',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        qk_norm_latent=True,
    ),
    whole=dict(
        label='Muon on stacked matrices',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        muon_split=False,
    ),
    heads12=dict(
        label='12 heads',
        attention='mla',
        n_head=12,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=64,
    ),
    rope0=dict(
        label='no positions, latent 192',
        attention='mla',
        kv_lora_rank=192,
        qk_nope_head_dim=96,
        qk_rope_head_dim=0,
        pos='none',
    ),
    mha=dict(label='MHA + RoPE'),
    rope16=dict(
        label='RoPE in 16 of 96, latent 176',
        attention='mla',
        kv_lora_rank=176,
        qk_nope_head_dim=80,
        qk_rope_head_dim=16,
    ),
    v128=dict(
        label='values of 128',
        attention='mla',
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
)
seeds = [1, 2, 3, 4, 5]
tune = dict(muon_lr=[0.015, 0.02, 0.03])
dropout = 0.05
max_iters = 450
eval_interval = 150
log_interval = 50

on_cpu = dict(  # a smaller model, and only what shows in 200 steps
    contenders=dict(
        mla=dict(
            label='MLA 32 + 32',
            attention='mla',
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=32,
        ),
        rope16=dict(
            label='RoPE in 16 of 48, latent 48',
            attention='mla',
            kv_lora_rank=48,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
        ),
        no_latent_norm=dict(
            label='no latent norm',
            attention='mla',
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=32,
            latent_norm=False,
        ),
        rope0=dict(
            label='no positions, latent 64',
            attention='mla',
            kv_lora_rank=64,
            qk_nope_head_dim=48,
            qk_rope_head_dim=0,
            pos='none',
        ),
        mha=dict(label='MHA + RoPE'),
    ),
    tune=dict(muon_lr=[0.01, 0.02, 0.04]),
    seeds=[1, 2, 3],
    cuda_graph=False,
    compile=False,
    dtype='fast',
    kernel='eager',
    batch_size=32,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    tie_weights=True,
    dropout=0.0,
    dropout_in='residual',
    learning_rate=5e-3,
    weight_decay=0.1,
    warmup_iters=10,
    max_iters=200,
    eval_interval=40,
    log_interval=10,
    cooldown=0.6,
    ema_decay=0.0,
)
