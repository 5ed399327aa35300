"""Tiny models of transformers, a family each, with random weights, gains and biases."""

import torch

SHAPE = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type='llama3',
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(
    rope_type='yarn',
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4,
)
LONGROPE = dict(
    rope_type='longrope',
    rope_theta=1e4,
    short_factor=[1.0, 1.3, 1.7, 2.0],
    long_factor=[1.0, 2.0, 4.0, 9.0],
)
PARTIAL = LONGROPE | dict(
    partial_rotary_factor=0.75, short_factor=[1.0, 1.3, 1.7], long_factor=[1.0, 2.0, 4.0]
)
# name -> class in transformers, what its config has beside SHAPE
FAMILIES = dict(
    llama3=('Llama', dict(rope_parameters=LLAMA3)),
    yarn=('Llama', dict(rope_parameters=YARN)),
    yarn_mscale=('Llama', dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5))),
    dynamic=('Llama', dict(rope_parameters=dict(rope_type='dynamic', factor=4.0, rope_theta=1e4))),
    half_biased=('Llama', dict(attention_bias=True, tie_word_embeddings=True)),
    mistral=('Mistral', dict(sliding_window=64, head_dim=12)),
    qwen2=('Qwen2', dict(tie_word_embeddings=True)),
    qwen3=('Qwen3', dict(head_dim=12)),
    smollm3=('SmolLM3', dict(num_hidden_layers=4, rope_parameters=YARN)),
    smollm3_first=('SmolLM3', dict(no_rope_layers=[0, 1])),
    phi3=('Phi3', dict()),
    phi3_long=(
        'Phi3',
        dict(
            rope_parameters=LONGROPE,
            max_position_embeddings=128,
            original_max_position_embeddings=64,
        ),
    ),
    phi4_mini=(
        'Phi3',
        dict(
            rope_parameters=PARTIAL,
            max_position_embeddings=128,
            original_max_position_embeddings=64,
        ),
    ),
    olmo2=('Olmo2', dict()),
    granite=(
        'Granite',
        dict(
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            residual_multiplier=0.22,
            attention_multiplier=0.3,
            tie_word_embeddings=True,
        ),
    ),
    granite_untied=(
        'Granite',
        dict(embedding_multiplier=3.0, attention_multiplier=0.3, attention_bias=True),
    ),
)


def hf_family(folder, name, **changes):
    """Save a model of FAMILIES with random weights to `folder`, and return it."""
    import transformers

    kind, settings = FAMILIES[name]
    config = getattr(transformers, f'{kind}Config')(**(SHAPE | settings | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    return model


def assert_same_greedy_text(ours, theirs, prompt, count):
    """
    Assert that ours goes on after `prompt` (B, T) as theirs does: each of our tokens is the one
    that theirs would take after those before it.
    """
    text = prompt
    for _ in range(count):
        text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
    taken = theirs(text).logits.argmax(-1)
    T = prompt.size(1)
    assert torch.equal(text[:, T:], taken[:, T - 1 : -1])
