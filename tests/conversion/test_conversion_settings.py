"""ConversionSettings: what cannot be asked is refused, and a saving is kept to."""

import pytest
from converting import LLAMA, assert_refused, converted
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPTConfig
from nanomla.conversion.settings import (
    CHOICES,
    ConversionSettings,
    full_rank,
    most_rope_pairs,
    pair_width,
    pe_width,
    settings_for_saving,
    split_cache,
    with_ordinary_frequencies,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(saving=st.floats(0.1, 0.95), K=st.sampled_from([1, 2, 3, 8]), F=st.integers(2, 128))
def test_a_saving_keeps_its_word_in_an_export_too(saving, K, F):
    """There the number of pairs divides those of a head, and the latent gets the rest."""
    config = GPTConfig(n_head=K, n_embd=2 * K * F, n_kv_head=K, pos='rope')
    wanted = ConversionSettings(rope='uniform', low_rank='joint')
    if split_cache(config, saving, wanted)[1] < 1:
        return
    wanted = settings_for_saving(config, saving, wanted)
    got = with_ordinary_frequencies(config, saving, wanted)
    all_pairs = got.rope_pairs == most_rope_pairs(config, got)
    assert all_pairs or F % got.rope_pairs == 0
    if got.kv_lora_rank < full_rank(config, got):
        left = (1 - saving) * 4 * K * F
        used = got.kv_lora_rank + 2 * got.rope_pairs
        assert left - max(1, 0.01 * 4 * K * F) <= used <= left + 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    saving=st.floats(0, 0.99),
    K=st.sampled_from([1, 2, 3, 4, 8]),
    F=st.integers(2, 128),
    heads=st.sampled_from(CHOICES['rope_heads']),
    pos=st.sampled_from(['rope', 'learned']),
)
def test_a_saving_keeps_its_word_within_a_percent(saving, K, F, heads, pos):
    """
    What is left is never more than was asked for, and less by at most a percent of the source's
    cache or by one number; more is saved only where the rank is full.
    """
    config = GPTConfig(n_head=K, n_embd=2 * K * F, n_kv_head=K, pos=pos)
    wanted = ConversionSettings(rope_heads=heads, low_rank='joint')
    pairs, rank = split_cache(config, saving, wanted)
    left = (1 - saving) * 2 * K * 2 * F
    filled_in = ConversionSettings(rope_heads=heads, low_rank='joint', rope_pairs=pairs)
    pe = pe_width(config, filled_in)
    assert pe == 2 * pairs * (K if heads == 'own' else 1)
    if rank < 1:
        assert_refused('leaves no room for a latent', settings_for_saving, config, saving, wanted)
        return
    assert rank + pe <= left + 1e-6
    if rank == full_rank(config, filled_in):
        # Pairs take what the rank does not need, in whole pairs.
        more_pairs = pairs < most_rope_pairs(config, filled_in)
        assert not more_pairs or rank + pe > left - pair_width(config, filled_in) - 1
    else:
        assert rank + pe >= left - max(1, 0.01 * 4 * K * F)
    fitting = settings_for_saving(config, saving, wanted)
    assert (fitting.rope_pairs, fitting.kv_lora_rank) == (pairs, rank)
    assert fitting.for_source(config, calibrated=True) == fitting


@pytest.mark.parametrize(
    'name, how, match',
    [
        (
            'mha',
            dict(rope_pairs=5, rope_heads='own'),
            'rope_pairs=5: the source has 4 pairs in a head; use 0 to 4',
        ),
        ('mha', dict(rope_pairs=-2), 'rope_pairs=-2'),
        ('gqa', dict(rope_pairs=9, rope_heads='shared'), '8 pairs in all kv heads together'),
        ('gpt2', dict(rope_pairs=1), 'pos=learned, which has no RoPE'),
        (
            'mha',
            dict(kv_lora_rank=33),
            'kv_lora_rank=33 is above the full rank of keys and values, 32',
        ),
        ('mha', dict(kv_lora_rank=-1), 'kv_lora_rank=-1'),
        ('mha', dict(q_lora_rank=33), 'q_lora_rank=33'),
        ('mha', dict(q_lora_rank=-1), 'q_lora_rank=-1'),
        ('mha', dict(fold=2, rope_heads='own'), 'fold=2'),
        ('mha', dict(fold=0, rope_heads='shared'), 'fold=0'),
        (
            'mha',
            dict(rope='middle'),
            "rope='middle' is not known: use high, low, uniform, 2-norm, turn",
        ),
        ('mha', dict(low_rank='svd'), "low_rank='svd'"),
        ('mha', dict(ranks='best'), "ranks='best'"),
        ('mha', dict(rope_heads='all'), "rope_heads='all'"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(name, how, match, source):
    assert_refused(match, converted, *source(name), **how)


def test_what_looks_at_activations_needs_calibration_text(tiny):
    model, why = tiny('mha', **LLAMA), 'needs calibration text'
    assert_refused(why, converted, model, low_rank='balanced')
    assert_refused(why, converted, model, low_rank='joint', rope_pairs=1, rope_heads='own')
    converted(model, low_rank='joint', rope_pairs=1)
    converted(model, low_rank='joint', rope_pairs=1, rope='high')
