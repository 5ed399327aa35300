"""The search for the split of a cache between pairs with RoPE and rank."""

import pytest
import torch
from converting import LLAMA, assert_refused, converted

from model import GPTConfig
from nanomla.conversion.layerwise import mean_error, search_split, streams_of
from nanomla.conversion.settings import (
    ConversionSettings,
    candidate_splits,
    pe_width,
    settings_for_saving,
)


@pytest.mark.parametrize('saving', [0.5, 0.6666, 0.875])
@pytest.mark.parametrize('heads', ['own', 'shared'])
def test_candidates_fill_one_cache(heads, saving):
    """The usual split comes first, and no other caches more numbers than may be left."""
    config = GPTConfig(n_head=9, n_kv_head=3, n_embd=576, pos='rope')
    settings = ConversionSettings(rope_heads=heads)
    found = candidate_splits(config, saving, settings)
    widths = [split.kv_lora_rank + pe_width(config, split) for split in found]
    assert found[0] == settings_for_saving(config, saving, settings)
    assert len(set(found)) == len(found) > 1
    assert max(widths) <= (1 - saving) * 384 + 0.1
    assert min(widths) >= (1 - saving) * 384 - 8


def test_the_split_of_the_least_error_is_first(source, tokens):
    """The error is that of the attentions' outputs, each on its source's inputs."""
    model, moments = source('gqa')
    idx = tokens(24, B=6)
    splits = search_split(model, 0.5, ConversionSettings(), moments, idx)
    assert len(splits) > 1
    assert [split.error for split in splits] == sorted(split.error for split in splits)
    best = splits[0]
    mla, _ = converted(model, moments, **vars(best.settings))
    config = mla.config
    assert best.name == f'{config.kv_lora_rank} + {config.qk_rope_head_dim}'

    errors = []
    x, rope = model.embed(idx)
    with torch.no_grad():
        for old, new in zip(model.transformer.h, mla.transformer.h):
            want, got = (block.attn(old.ln_1(x), rope) for block in (old, new))
            of_stream = x.square().mean(-1, keepdim=True)
            lost, whole = ((y**2 / of_stream).mean() for y in (got - want, want))
            errors.append(lost / whole)
            x = old(x, rope)
    assert best.error == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_nothing_is_lost_where_nothing_is_left_out(source, tokens):
    model, moments = source('gqa')
    mla, _ = converted(model, moments)
    assert mean_error(model, mla, *streams_of(model, tokens(24))) < 1e-8


def test_a_source_without_rope_is_refused():
    config = GPTConfig(**LLAMA | dict(pos='none'))
    assert_refused('needs a source with RoPE', candidate_splits, config, 0.5, ConversionSettings())
