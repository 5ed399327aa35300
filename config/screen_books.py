"""
Which shapes and settings of MLA deserve seeds in compare_books? One run each on seed 1000, its grid's, with rates written out.

    python compare.py config/compare_books.py config/screen_books.py

No result by itself: seeds differ by 0.002. N + P is kv_lora_rank + qk_rope_head_dim; `content` is qk_nope_head_dim, `small start`
latent_init='gpt2', `latent` qk_norm_latent, `scale` softmax_scale (else 1 / 8 for MHA and MQA). Up to an eighth of MHA's
cache (128 of 1024 values a token and layer) unless the label says more than 64 + 64.
"""
out_dir = 'out-screen-books'
title = 'Books, bytes, 30M parameters: shapes of MLA, one seed'
control = 'mha_02'

contenders = dict(
    mha_02=dict(label='MHA + RoPE, 0.02', muon_lr=0.02),
    # small start, and what goes with it
    g0_02=dict(label='64 + 64, content 0, small start, 0.02', attention='mla', kv_lora_rank=64, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    g32_02=dict(label='64 + 64, content 32, small start, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    mha_s25_02=dict(label='MHA + RoPE, scale 0.25, 0.02', softmax_scale=0.25, muon_lr=0.02),
    g32_s25_02=dict(label='64 + 64, content 32, small start, scale 0.25, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                    latent_init='gpt2', softmax_scale=0.25, muon_lr=0.02),
    g0_01=dict(label='64 + 64, content 0, small start, 0.01', attention='mla', kv_lora_rank=64, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.01),
    g32_01=dict(label='64 + 64, content 32, small start, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.01),
    g0_s25_02=dict(label='64 + 64, content 0, small start, scale 0.25, 0.02', attention='mla', kv_lora_rank=64, qk_rope_head_dim=64,
                   latent_init='gpt2', softmax_scale=0.25, muon_lr=0.02),
    mqa_s25_02=dict(label='MQA, scale 0.25, 0.02', n_kv_head=1, softmax_scale=0.25, muon_lr=0.02),
    glat64_02=dict(label='64 + 64, content 32, small start, latent, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                   latent_init='gpt2', qk_norm_latent=True, muon_lr=0.02),
    glat64_s18_02=dict(label='64 + 64, content 32, small start, latent, scale 0.177, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                       latent_init='gpt2', qk_norm_latent=True, softmax_scale=0.177, muon_lr=0.02),
    g192_02=dict(label='192 + 64, content 32, small start, 0.02', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    gplain64_01=dict(label='64 + 64, content 32, small start, no QK-norm, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                     latent_init='gpt2', qk_norm=False, muon_lr=0.01),
    g192_s25_02=dict(label='192 + 64, content 32, small start, scale 0.25, 0.02', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64,
                     latent_init='gpt2', softmax_scale=0.25, muon_lr=0.02),
    mha_plain_01=dict(label='MHA + RoPE, no QK-norm, 0.01', qk_norm=False, muon_lr=0.01),
    gnolat_02=dict(label='64 + 64, content 32, small start, no latent norm, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                   latent_init='gpt2', latent_norm=False, muon_lr=0.02),
    g32_s25_01=dict(label='64 + 64, content 32, small start, scale 0.25, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                    latent_init='gpt2', softmax_scale=0.25, muon_lr=0.01),
    mha_s25_01=dict(label='MHA + RoPE, scale 0.25, 0.01', softmax_scale=0.25, muon_lr=0.01),
    g448_02=dict(label='448 + 64, content 64, small start, 0.02', attention='mla', kv_lora_rank=448, qk_nope_head_dim=64, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    glat192_02=dict(label='192 + 64, content 64, small start, latent, 0.02', attention='mla', kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=64,
                    latent_init='gpt2', qk_norm_latent=True, muon_lr=0.02),
    g32h12_02=dict(label='64 + 64, content 32, 12 heads, small start, 0.02', attention='mla', n_head=12, head_dim=64, kv_lora_rank=64, qk_nope_head_dim=32,
                   qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    gplain64_02=dict(label='64 + 64, content 32, small start, no QK-norm, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                     latent_init='gpt2', qk_norm=False, muon_lr=0.02),
    mha_plain_02=dict(label='MHA + RoPE, no QK-norm, 0.02', qk_norm=False, muon_lr=0.02),
    g192_01=dict(label='192 + 64, content 32, small start, 0.01', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.01),
    g192h12_02=dict(label='192 + 64, content 32, 12 heads, small start, 0.02', attention='mla', n_head=12, head_dim=64, kv_lora_rank=192, qk_nope_head_dim=32,
                    qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    g448_s25_02=dict(label='448 + 64, content 64, small start, scale 0.25, 0.02', attention='mla', kv_lora_rank=448, qk_nope_head_dim=64, qk_rope_head_dim=64,
                     latent_init='gpt2', softmax_scale=0.25, muon_lr=0.02),
    g48_80_02=dict(label='48 + 80, content 16, small start, 0.02', attention='mla', kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=80, v_head_dim=64,
                   latent_init='gpt2', muon_lr=0.02),
    g448h12_02=dict(label='448 + 64, content 32, 12 heads, small start, 0.02', attention='mla', n_head=12, head_dim=64, kv_lora_rank=448, qk_nope_head_dim=32,
                    qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.02),
    gnoboth_01=dict(label='64 + 64, content 32, small start, neither norm, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                    latent_init='gpt2', qk_norm=False, latent_norm=False, muon_lr=0.01),
    gwhole_02=dict(label='64 + 64, content 32, small start, Muon on stacked matrices, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                   latent_init='gpt2', muon_split=False, muon_lr=0.02),
    n0_01=dict(label='64 + 64, content 0, 0.01', attention='mla', kv_lora_rank=64, qk_rope_head_dim=64, muon_lr=0.01),
    plain64_01=dict(label='64 + 64, content 32, no QK-norm, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, qk_norm=False, muon_lr=0.01),
    plain96_005=dict(label='96 + 32, content 64, no QK-norm, 0.005', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm=False, muon_lr=0.005),
    g0_04=dict(label='64 + 64, content 0, small start, 0.04', attention='mla', kv_lora_rank=64, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.04),
    g32_04=dict(label='64 + 64, content 32, small start, 0.04', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.04),
    mha_s25_04=dict(label='MHA + RoPE, scale 0.25, 0.04', softmax_scale=0.25, muon_lr=0.04),
    g448_01=dict(label='448 + 64, content 64, small start, 0.01', attention='mla', kv_lora_rank=448, qk_nope_head_dim=64, qk_rope_head_dim=64, latent_init='gpt2', muon_lr=0.01),
    g0_s25_01=dict(label='64 + 64, content 0, small start, scale 0.25, 0.01', attention='mla', kv_lora_rank=64, qk_rope_head_dim=64,
                   latent_init='gpt2', softmax_scale=0.25, muon_lr=0.01),
    g192_s25_01=dict(label='192 + 64, content 32, small start, scale 0.25, 0.01', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64,
                     latent_init='gpt2', softmax_scale=0.25, muon_lr=0.01),
    # before that: the latent started by fan-in
    lat64_01=dict(label='64 + 64, content 32, latent, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    lat96_01=dict(label='96 + 32, content 64, latent, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm_latent=True, muon_lr=0.01),
    lat96_02=dict(label='96 + 32, content 64, latent, 0.02', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm_latent=True, muon_lr=0.02),
    lat96h12_01=dict(label='96 + 32, content 64, 12 heads, latent, 0.01', attention='mla', n_head=12, head_dim=64, kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm_latent=True, muon_lr=0.01),
    lat96h16_01=dict(label='96 + 32, content 32, 16 heads, latent, 0.01', attention='mla', n_head=16, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32,
                     v_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    lat112_01=dict(label='112 + 16, content 64, latent, 0.01', attention='mla', kv_lora_rank=112, qk_nope_head_dim=64, qk_rope_head_dim=16, qk_norm_latent=True, muon_lr=0.01),
    lat192_01=dict(label='192 + 64, content 64, latent, 0.01', attention='mla', kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    m64_005=dict(label='64 + 64, content 32, 0.005', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.005),
    m64_01=dict(label='64 + 64, content 32, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.01),
    m64_02=dict(label='64 + 64, content 32, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.02),
    m64h12_01=dict(label='64 + 64, content 32, 12 heads, 0.01', attention='mla', n_head=12, head_dim=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                   muon_lr=0.01),
    n96_01=dict(label='96 + 32, content 64, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, muon_lr=0.01),
    plain96_01=dict(label='96 + 32, content 64, no QK-norm, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm=False, muon_lr=0.01),
    m192_01=dict(label='192 + 64, content 32, 0.01', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.01),
    m192_02=dict(label='192 + 64, content 32, 0.02', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.02),
    m192_04=dict(label='192 + 64, content 32, 0.04', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.04),
    mqa_01=dict(label='MQA, 0.01', n_kv_head=1, muon_lr=0.01),
    mqa_02=dict(label='MQA, 0.02', n_kv_head=1, muon_lr=0.02),
    mha_005=dict(label='MHA + RoPE, 0.005', muon_lr=0.005),
    mha_01=dict(label='MHA + RoPE, 0.01', muon_lr=0.01),
    mha_04=dict(label='MHA + RoPE, 0.04', muon_lr=0.04))
seeds = [1000]
tune_seed = 0
tune = {}
