"""A converted model as a source: RoPE on some pairs at full rank first, then the rank cut."""

import pytest
import torch
from converting import assert_refused, assert_same_logits, converted

from nanomla.conversion.calibration import measure
from nanomla.conversion.layerwise import LayerwiseSettings, fit_layers
from nanomla.conversion.settings import ConversionSettings, is_lossless, settings_for_saving

PARTIAL = dict(rope_pairs=3, rope='uniform', low_rank='joint')


def healed(mla, tokens):
    """Return a conversion whose weights have moved, and its Moments: no two heads share a key."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in mla.transformer.h:
            for p in block.attn.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return mla, measure(mla, tokens(24, B=30))


@pytest.mark.parametrize('first', [PARTIAL, PARTIAL | dict(rope_heads='own'), dict(rope_pairs=0)])
@pytest.mark.parametrize('name', ['gqa', 'biases'])
@pytest.mark.parametrize('low_rank', ['joint', 'balanced', 'attention'])
def test_cutting_nothing_is_the_healed_model(low_rank, name, first, source, tokens):
    model, moments = source(name)
    mla, moments = healed(converted(model, moments, **dict(low_rank='joint') | first)[0], tokens)
    again, report = converted(mla, moments, low_rank=low_rank)
    assert again.config == mla.config
    assert_same_logits(again, mla, tokens(24), atol=5e-5)
    for old, new in zip(mla.transformer.h, again.transformer.h):
        assert torch.equal(old.attn.rope_pairs, new.attn.rope_pairs)
    assert all(layer['energy'] == pytest.approx(1, abs=1e-6) for layer in report)


@pytest.mark.parametrize('name', ['mha', 'gqa', 'mqa', 'biases'])
@pytest.mark.parametrize('low_rank', ['joint', 'attention'])
def test_two_steps_without_healing_are_the_one_step(low_rank, name, source, tokens):
    """By the same moments, as far as roots of them are exact."""
    model, moments = source(name)
    rank = 9
    how = PARTIAL | dict(low_rank=low_rank)
    once, _ = converted(model, moments, **how, kv_lora_rank=rank)
    partial, _ = converted(model, moments, **how)
    twice, _ = converted(partial, moments, low_rank=low_rank, kv_lora_rank=rank)
    assert twice.config == once.config
    assert twice.transformer.h[0].attn.cache_dims() == dict(c_kv=rank, k_pe=6)
    assert_same_logits(twice, once, tokens(24), atol=1e-3)
    partial_logits = partial(tokens(24))
    assert not torch.allclose(twice(tokens(24)), partial_logits, atol=1e-2)


def test_a_latent_of_the_query_stays(source, tokens):
    model, moments = source('gqa')
    mla, _ = healed(converted(model, moments, **PARTIAL, q_lora_rank=20)[0], tokens)
    again, _ = converted(mla, low_rank='joint')
    assert again.config.q_lora_rank == 20
    assert_same_logits(again, mla, tokens(24), atol=5e-5)


def test_layers_of_different_ranks_keep_theirs_and_get_others(source, tokens):
    model, moments = source('mha')
    how = dict(rope_pairs=3, low_rank='balanced', kv_lora_rank=20, ranks='spectrum')
    mla, moments = healed(converted(model, moments, **how)[0], tokens)
    ranks = mla.config.kv_lora_ranks
    assert len(set(ranks)) > 1
    again, _ = converted(mla, moments, low_rank='balanced')
    assert again.config.kv_lora_ranks == ranks
    assert_same_logits(again, mla, tokens(24), atol=5e-5)
    cut, _ = converted(mla, moments, low_rank='balanced', kv_lora_rank=min(ranks) - 1)
    assert cut.config.kv_lora_ranks == ()


def test_the_cut_is_fitted_layer_by_layer(source, tokens):
    model, moments = source('gqa')
    mla, moments = healed(converted(model, moments, **PARTIAL)[0], tokens)
    cut, _ = converted(mla, moments, kv_lora_rank=10)
    idx = tokens(24)
    before = (cut(idx) - mla(idx)).square().mean()
    fit_layers(mla, cut, tokens(24, B=30), LayerwiseSettings(steps=0))
    assert (cut(idx) - mla(idx)).square().mean() < before


def test_widths(source, tokens):
    model, moments = source('gqa')  # 2 kv heads of 8, keys and values: 32 numbers
    mla, _ = converted(model, moments, **PARTIAL)
    config = mla.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (26, 6)
    half = settings_for_saving(config, 0.5, ConversionSettings())
    assert (half.kv_lora_rank, half.rope_pairs) == (10, 3)
    everything = ConversionSettings().for_source(config, calibrated=True)
    assert is_lossless(config, everything)
    assert not is_lossless(config, half.for_source(config, calibrated=True))
    why = 'kv_lora_rank=27 is above the full rank of keys and values, 26'
    assert_refused(why, converted, mla, low_rank='joint', kv_lora_rank=27)
    assert_refused('share one latent', converted, mla, low_rank='split')
    assert_refused('no room for a latent', settings_for_saving, config, 0.9, ConversionSettings())
