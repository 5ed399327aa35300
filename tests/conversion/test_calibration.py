"""Calibration: moments are means over tokens; perplexity with and without a cache; text."""

import math

import numpy as np
import pytest
import torch
from converting import assert_refused, converted

from nanomla.conversion.calibration import (
    bytes_per_token,
    cached_loss,
    mean_loss,
    measure,
    perplexity,
    tokens_of,
    windows_of,
)
from nanomla.inference.cache import Cache


def test_norms_of_pairs_are_means_over_tokens(source, tokens):
    model, moments = source('gqa')
    attention, inputs = model.transformer.h[0].attn, []
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(tokens(24, B=30))
    hook.remove()
    x = inputs[0].double().flatten(0, 1)
    q, k, _ = (x @ attention.c_attn.weight.double().T).split([32, 16, 16], dim=-1)
    for norms, t in (
        (moments[0].q_norms, q.view(-1, 4, 8)),
        (moments[0].k_norms, k.view(-1, 2, 8)),
    ):
        expected = (t[..., :4] ** 2 + t[..., 4:] ** 2).sqrt().mean(0)
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
    cov = moments[0].cov
    torch.testing.assert_close(cov[:32, :32], x.T @ x / len(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(cov[32, :32], x.mean(0), rtol=0, atol=1e-5)


def test_moments_of_the_attention_are_those_of_its_patterns(source, tokens):
    model, moments = source('gqa')
    attention, idx = model.transformer.h[0].attn.double(), tokens(24, B=30)
    with torch.no_grad():
        x, rope = model.embed(idx)
        x = model.transformer.h[0].ln_1(x).double()
        q, k, v = attention.qkv(x, rope)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        logits = (q @ k.mT * attention.scale).masked_fill(torch.ones(24, 24).triu(1) > 0, -math.inf)
        pattern = logits.softmax(-1)
        attended = torch.einsum('bhts,bsc,bsd->cd', pattern, x, x) / (4 * idx.numel())
        of_heads = attention.c_proj.weight.unflatten(1, (4, 8))
        outputs = torch.einsum('bhsd,chd->bhsc', v, of_heads)
        second_moment = torch.einsum('bhts,bhsc->bht', pattern, outputs**2)
        spread = (second_moment - (pattern @ outputs).square().sum(-1)).mean((0, 2))
    found = moments[0].attended[:32, :32]
    torch.testing.assert_close(found, attended, rtol=0, atol=1e-5)
    torch.testing.assert_close(moments[0].value_spread, spread, rtol=1e-4, atol=1e-9)


def test_measuring_leaves_the_model_as_it_was(source, tokens):
    model, _ = source('mha')
    model.train()
    measure(model, tokens(24))
    assert model.training
    assert not any(block.attn._forward_pre_hooks for block in model.transformer.h)


def test_perplexity_through_a_cache_is_that_without(source, tokens):
    model, moments = source('gqa')
    mla, _ = converted(model, moments, kv_lora_rank=12, rope_pairs=2)
    windows = tokens(22, B=5)
    logits, targets = mla(windows[:, :-1]), windows[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert mean_loss(mla, windows, 2) == pytest.approx(expected, rel=1e-6)
    through = {}
    for dtype in ('float32', 'int8', 'int4'):

        def make_cache(rows, size, dtype=dtype):
            return Cache.of(mla, rows, size, dtype=dtype, window=4)

        through[dtype] = mean_loss(mla, windows, 2, make_cache, chunk=4)
    assert through['float32'] == pytest.approx(expected, abs=1e-5)
    assert through['int8'] == pytest.approx(expected, abs=0.02)
    assert abs(through['int4'] - expected) > abs(through['int8'] - expected)
    assert cached_loss(mla, windows, 'int8', 2) == pytest.approx(expected, abs=0.02)


def test_bytes_of_a_token_are_those_of_a_cache(source):
    model, moments = source('gqa')
    mla, _ = converted(model, moments, kv_lora_rank=12, rope_pairs=2)
    assert bytes_per_token(model) == 2 * 2 * (16 + 16)
    assert bytes_per_token(mla) == 2 * 2 * (12 + 4)


def test_texts_too_short_are_refused():
    ids = np.arange(100)
    why = 'calibration: 50 tokens are too few: at least 65'
    assert_refused(why, windows_of, ids[:50], 1000, 16, 65)
    assert_refused('tokens are too few', windows_of, ids[:10], 1000, 16)
    assert windows_of(ids, 40, 16).tolist() == [list(range(16)), list(range(84, 100))]


def test_a_text_file_is_read_in_the_tokens_of_the_model(tmp_path):
    file = tmp_path / 'x.txt'
    file.write_text('abc' * 10)
    tokens, held_out, source = tokens_of(str(file), 3, dict(tokenizer='char', chars='abc'))
    assert len(tokens) == 27
    assert held_out.tolist() == [0, 1, 2]
    assert source == str(file)
    narrow = dict(tokenizer='char', chars='ab')
    assert_refused('never seen', tokens_of, str(file), 2, narrow)
    assert_refused('does not say what its 77 tokens are', tokens_of, str(file), 77)
    assert_refused('no such file, and no dataset', tokens_of, 'nowhere', 77)
    file.write_bytes(b'\xff\xfe\xff')
    assert_refused('not UTF-8', tokens_of, str(file), 2, narrow)


def test_perplexity():
    assert perplexity(math.log(5)) == pytest.approx(5)
    assert math.isfinite(perplexity(1e9))
