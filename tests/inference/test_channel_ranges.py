"""Keys, values and latents with outlier channels in a quantised cache."""

import pytest
import torch

from model import Attention
from nanomla.inference.cache import Cache
from nanomla.inference.quantize import ChannelRanges, dequantise, quantise

OUTLIERS = (3, 17)  # channels of each head, or of the latent
SHAPE = dict(n_head=4, n_embd=128, n_layer=3, block_size=160, vocab_size=200, bias=True)
LATENT = dict(kv_lora_rank=64, qk_rope_head_dim=8)


def keys_by_bias(attention, size):
    _, k, _ = attention.c_attn.bias.data.chunk(3)
    k.view(4, 32)[:, OUTLIERS] += size


def keys_by_weights(attention, size):
    """The queries are as much smaller."""
    q, k, _ = attention.c_attn.weight.data.chunk(3)
    k.view(4, 32, -1)[:, OUTLIERS] *= size
    q.view(4, 32, -1)[:, OUTLIERS] /= size


def values(attention, size):
    """What reads them is as much smaller."""
    _, _, v = attention.c_attn.weight.data.chunk(3)
    v.view(4, 32, -1)[:, OUTLIERS] *= size
    attention.c_proj.weight.data.view(-1, 4, 32)[..., OUTLIERS] /= size


def latents(attention, size):
    """Without a norm, as in a converted model."""
    attention.kv_a_proj_with_mqa.weight.data[OUTLIERS, :] *= size
    attention.kv_a_proj_with_mqa.bias.data[list(OUTLIERS)] *= size
    attention.kv_b_proj.weight.data[:, OUTLIERS] /= size


def normed_latents(attention, size):
    attention.kv_a_layernorm.weight.data[list(OUTLIERS)] *= size
    attention.kv_b_proj.weight.data[:, OUTLIERS] /= size


SETTINGS = {latents: LATENT | dict(latent_norm=False), normed_latents: LATENT}


def model_with_outliers(tiny, where, size, **settings):
    """Return a model in which two channels of a head or latent are `size` times as big."""
    kind = 'mla' if where in SETTINGS else 'mha'
    model = tiny(kind, **SHAPE | SETTINGS.get(where, {}) | settings)
    for block in model.transformer.h:
        where(block.attn, size)
    return model


def same_tokens(logits, others):
    return (logits.argmax(-1) == others.argmax(-1)).float().mean().item()


def agreement(model, idx, dtype, **options):
    """Return how often the likeliest token is that without a cache, read through one."""
    options = dict(window=0, kernel='torch') | options
    cache = Cache.of(model, len(idx), idx.size(1), dtype=dtype, **options)
    logits = []
    for part in idx.split(16, dim=1):
        cache.plan(part.size(1))
        logits.append(model.lm_head(model.hidden(part, cache)))
    return same_tokens(torch.cat(logits, dim=1), model(idx))


@pytest.mark.parametrize(
    'where, options',
    [
        (keys_by_bias, dict(dtype='int4')),
        (keys_by_weights, dict(dtype='int4', layout='paged')),
        (values, dict(dtype='int4')),
        (latents, dict(dtype='int4')),
        (latents, dict(dtype='int8', layout='paged')),
        (normed_latents, dict(dtype='int4')),
    ],
)
@torch.no_grad()
def test_outlier_channels_cost_a_quantised_cache_little(where, options, tiny, tokens):
    """As if quantised channel by channel; groups with an outlier would lose the others."""
    idx = tokens(160, V=200, B=4)
    even = agreement(model_with_outliers(tiny, where, 1), idx, **options)
    uneven = agreement(model_with_outliers(tiny, where, 60), idx, **options)
    assert even > 0.8
    assert uneven > even - 0.08


def quantise_keys(by_channel):
    """Return an `attend` with int4 keys, by channel over 32 tokens as in KIVI, or in groups."""

    def attend(self, q, k, v, mask=None):
        parts = k.transpose(1, 2).flatten(2).split(32, dim=1)
        if by_channel:
            parts = [part.mT for part in parts]
        parts = [dequantise(*quantise(part, 4), part.size(-1), 4) for part in parts]
        if by_channel:
            parts = [part.mT for part in parts]
        k = torch.cat(parts, dim=1).unflatten(-1, (k.size(1), -1)).transpose(1, 2)
        return plain_attend(self, q, k, v, mask)

    plain_attend = Attention.attend
    return attend


@torch.no_grad()
def test_rotated_outliers_cost_what_they_cost_by_channel(tiny, tokens, monkeypatch):
    """RoPE turns an outlier within its pair, so even KIVI's keys lose by it, and groups more."""
    idx = tokens(160, V=200, B=4)
    model = model_with_outliers(tiny, keys_by_bias, 60, pos='rope')
    plain = model(idx)
    ours = agreement(model, idx, 'int4')
    references = {}
    for by_channel in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(Attention, 'attend', quantise_keys(by_channel))
            references[by_channel] = same_tokens(model(idx), plain)
    assert ours > references[True] - 0.08
    assert ours > references[False] + 0.1


def uneven(tokens, channels):
    x = torch.randn(tokens, channels, dtype=torch.float64)
    x[:, 5] = 40 * x[:, 5] + 70
    return x


def test_queries_and_sums_take_up_the_sizes():
    """Attention over even keys and values is that over the keys and values themselves."""
    torch.manual_seed(0)
    H, K, D, N = 4, 2, 8, 30
    q, k, v = torch.randn(1, H, 3, D, dtype=torch.float64), uneven(N, K * D), uneven(N, K * D)
    ranges = [ChannelRanges.of(x) for x in (k, v)]

    def attend(q, k, v):
        k, v = (x.unflatten(-1, (K, D)).transpose(0, 1)[None] for x in (k, v))
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    of_keys, of_values = ranges
    got = attend(of_keys.of_query(q), of_keys.even(k), of_values.even(v))
    torch.testing.assert_close(of_values.of_sum(got), attend(q, k, v), rtol=1e-5, atol=1e-4)


def test_one_far_token_is_no_outlier_channel():
    """The token that most others attend to may be far from all of them."""
    torch.manual_seed(0)
    x = torch.randn(20, 64)
    x[0, 5] = 500
    assert ChannelRanges.of(x) is None


@torch.no_grad()
def test_channels_of_one_size_are_stored_as_they_are(tiny, tokens):
    for where in (keys_by_bias, latents):
        model = model_with_outliers(tiny, where, 1)
        cache = Cache.of(model, 1, 40, dtype='int4', kernel='torch')
        model.hidden(tokens(40, B=1), cache)
        assert not any(layer.ranges for layer in cache.layers)


@pytest.mark.gpu
@pytest.mark.parametrize('where', [keys_by_bias, values, latents])
@torch.no_grad()
def test_gpu_decodes_with_outliers_as_torch_does(where, tiny, tokens):
    model = model_with_outliers(tiny, where, 60, n_head=2).cuda().bfloat16()
    model.stream = torch.bfloat16
    idx, logits = tokens(80, V=200, B=2).cuda(), {}
    for kernel in ('torch', 'triton'):
        cache = Cache.of(model, 2, 80, dtype='int4', window=4, kernel=kernel)
        parts = [idx[:, :16], *idx[:, 16:].split(1, dim=1)]
        steps = [model.lm_head(model.hidden(part, cache)) for part in parts]
        assert all(layer.ranges for layer in cache.layers)
        logits[kernel] = torch.cat(steps, dim=1)
    assert same_tokens(logits['triton'], logits['torch']) > 0.85  # by chance a few near ties
