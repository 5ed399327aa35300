"""
MHA, GQA, MQA and MLA at four latent widths in the shape of Pythia-160M, 100M tokens.

This is litgpt's comparison (its pull request 1945) with what it left out: a control with RoPE,
equal parameters, tuned rates and several seeds.

    python data/text/prepare.py TinyStoriesV2-GPT4-train.txt --tokenizer=gpt2 --out=data/tinystories
    python compare.py config/compare_litgpt.py

Any text will do: --dataset=FOLDER.
"""

out_dir = 'out-compare-litgpt'
title = 'Pythia-160M shape: MHA, GQA, MQA and MLA at equal parameters'

contenders = dict(
    mha=dict(label='MHA + RoPE'),
    gqa=dict(label='GQA, 4 groups', n_kv_head=4),
    mqa=dict(label='MQA', n_kv_head=1),
    mla512=dict(
        label='MLA 512', attention='mla', kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=32
    ),
    mla256=dict(
        label='MLA 256', attention='mla', kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=32
    ),
    # 1/8 of MHA's cache
    mla160=dict(
        label='MLA 160', attention='mla', kv_lora_rank=160, qk_nope_head_dim=32, qk_rope_head_dim=32
    ),
    mla96=dict(
        label='MLA 96', attention='mla', kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32
    ),
    mla160_orthogonal=dict(
        label='MLA 160, orthogonal start',
        attention='mla',
        kv_lora_rank=160,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        latent_init='orthogonal',
    ),
)
seeds = [1, 2, 3]
tune = dict(learning_rate=[6e-4, 1.2e-3, 2.4e-3])
tune_iters = 305  # a fifth of the tokens

dataset = 'tinystories'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
pos = 'rope'
act = 'gelu'
bias = True
tie_weights = False

max_iters = 1526  # 64 x 1024 tokens a step: 100M tokens
eval_interval = 109
eval_iters = 16
warmup_iters = 100
weight_decay = 0.1
schedule = 'cosine'
min_lr = 6e-5

on_cpu = dict(cuda_graph=False, compile=False)
