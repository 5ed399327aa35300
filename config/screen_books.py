"""
Which shapes of MLA deserve seeds in compare_books? One run each on seed 1000, its grid's, with rates written out.

    python compare.py config/compare_books.py config/screen_books.py

No result by itself: seeds differ by 0.002. `latent` is qk_norm_latent: queries normed as they meet the cache. Up to an eighth
of MHA's cache (128 of 1024 values a token and layer) unless the label says 192 or 160.
"""
out_dir = 'out-screen-books'
title = 'Books, bytes, 30M parameters: shapes of MLA, one seed'
control = 'mha_02'

contenders = dict(
    mha_02=dict(label='MHA + RoPE, 0.02', muon_lr=0.02),
    lat96_01=dict(label='96 + 32, content 64, latent, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm_latent=True, muon_lr=0.01),
    lat64_01=dict(label='64 + 64, content 32, latent, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    m64_005=dict(label='64 + 64, content 32, 0.005', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.005),
    mqa_01=dict(label='MQA, 0.01', n_kv_head=1, muon_lr=0.01),
    lat96_02=dict(label='96 + 32, content 64, latent, 0.02', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm_latent=True, muon_lr=0.02),
    lat96h12_01=dict(label='96 + 32, content 64, 12 heads, latent, 0.01', attention='mla', n_head=12, head_dim=64, kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm_latent=True, muon_lr=0.01),
    n96_01=dict(label='96 + 32, content 64, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, muon_lr=0.01),
    m64h12_01=dict(label='64 + 64, content 32, 12 heads, 0.01', attention='mla', n_head=12, head_dim=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64,
                   muon_lr=0.01),
    lat96h16_01=dict(label='96 + 32, content 32, 16 heads, latent, 0.01', attention='mla', n_head=16, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32,
                     v_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    lat112_01=dict(label='112 + 16, content 64, latent, 0.01', attention='mla', kv_lora_rank=112, qk_nope_head_dim=64, qk_rope_head_dim=16, qk_norm_latent=True, muon_lr=0.01),
    mha_005=dict(label='MHA + RoPE, 0.005', muon_lr=0.005),
    plain96_01=dict(label='96 + 32, content 64, no QK-norm, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, qk_norm=False, muon_lr=0.01),
    lat192_01=dict(label='192 + 64, content 64, latent, 0.01', attention='mla', kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    mqa_02=dict(label='MQA, 0.02', n_kv_head=1, muon_lr=0.02),
    lat64h12_01=dict(label='64 + 64, content 32, 12 heads, latent, 0.01', attention='mla', n_head=12, head_dim=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    lat96v96_01=dict(label='96 + 32, content 64, values of 96, latent, 0.01', attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=96,
                     qk_norm_latent=True, muon_lr=0.01),
    lat192h12_01=dict(label='192 + 64, content 64, 12 heads, latent, 0.01', attention='mla', n_head=12, head_dim=64, kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=64, qk_norm_latent=True, muon_lr=0.01),
    m64_0025=dict(label='64 + 64, content 32, 0.0025', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.0025),
    lat96gpt2_01=dict(label="96 + 32, content 64, latent starts at GPT-2's 0.02, latent, 0.01", attention='mla', kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32,
                      qk_norm_latent=True, latent_init='gpt2', muon_lr=0.01),
    mha_01=dict(label='MHA + RoPE, 0.01', muon_lr=0.01),
    mha_04=dict(label='MHA + RoPE, 0.04', muon_lr=0.04),
    m64_01=dict(label='64 + 64, content 32, 0.01', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.01),
    m64_02=dict(label='64 + 64, content 32, 0.02', attention='mla', kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.02),
    m192_01=dict(label='192 + 64, content 32, 0.01', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.01),
    m192_02=dict(label='192 + 64, content 32, 0.02', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.02),
    m192_04=dict(label='192 + 64, content 32, 0.04', attention='mla', kv_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=64, muon_lr=0.04))
seeds = [1000]
tune_seed = 0
tune = {}
