"""Keys with outlier channels in a quantised cache."""

import pytest
import torch

from nanomla.inference.cache import Cache

OUTLIERS = (3, 17)  # channels of each head


def model_with_outliers(tiny, size, varies):
    """
    Return a model whose keys have two channels `size` times the others in each head: by their bias,
    or (varies) by their weights, where those of the queries are as much smaller.
    """
    settings = dict(n_head=4, n_embd=128, n_layer=3, block_size=160, vocab_size=200, bias=True)
    model = tiny('mha', **settings)
    for block in model.transformer.h:
        q, k, _ = block.attn.c_attn.weight.data.chunk(3)
        _, k_bias, _ = block.attn.c_attn.bias.data.chunk(3)
        for channel in range(128):
            if channel % 32 not in OUTLIERS:
                continue
            if varies:
                k[channel] *= size
                q[channel] /= size
            else:
                k_bias[channel] += size
    return model


def agreement(model, idx, dtype, **options):
    """Return how often the likeliest token is that without a cache, read through one."""
    cache = Cache.of(model, len(idx), idx.size(1), dtype=dtype, window=0, kernel='torch', **options)
    logits = []
    for part in idx.split(16, dim=1):
        cache.plan(part.size(1))
        logits.append(model.lm_head(model.hidden(part, cache)))
    same = torch.cat(logits, dim=1).argmax(-1) == model(idx).argmax(-1)
    return same.float().mean().item()


@pytest.mark.parametrize('varies', [False, True])
@pytest.mark.parametrize('layout', ['dense', 'paged'])
@torch.no_grad()
def test_outlier_channels_cost_an_int4_cache_little(layout, varies, tiny, tokens):
    """As with keys quantised channel by channel; groups with an outlier would lose the others."""
    idx = tokens(160, V=200, B=4)
    even = agreement(model_with_outliers(tiny, 1, False), idx, 'int4', layout=layout)
    uneven = agreement(model_with_outliers(tiny, 60, varies), idx, 'int4', layout=layout)
    assert even > 0.8
    assert uneven > even - 0.08


@torch.no_grad()
def test_keys_of_one_size_are_stored_as_they_are(tiny, tokens):
    model = model_with_outliers(tiny, 1, False)
    cache = Cache.of(model, 1, 40, dtype='int4', kernel='torch')
    model.hidden(tokens(40, B=1), cache)
    assert all(layer.ranges is None for layer in cache.layers)
