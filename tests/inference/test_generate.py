"""Generation at the edges of its options."""

import pytest
import torch

from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate, serve


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_a_model_in_float64_decodes_from_a_cache_in_float64(kind, tiny, tokens):
    model = tiny(kind).double()
    model.stream = torch.float64
    cache = Cache.of(model, 2, 24)
    assert cache.dtype == 'float64' and cache.stores[0].data[0].dtype == torch.float64
    idx = tokens(13)
    with torch.no_grad():
        steps = [model(part, context=cache) for part in idx.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(idx), rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', ['int8', 'int4'])
def test_a_quantised_cache_of_a_model_in_float64_keeps_its_window_in_float64(dtype, tiny, tokens):
    model = tiny('mha').double()
    model.stream = torch.float64
    cache = Cache.of(model, 2, 24, dtype=dtype, window=24)
    idx = tokens(13)
    with torch.no_grad():
        steps = [model(part, context=cache) for part in idx.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(idx), rtol=0, atol=1e-12)


def test_no_new_tokens_end_every_prompt_at_once(tiny):
    model = tiny('mha')
    cache = Cache.of(model, 2, 24)
    prompts = [[1, 2], [3], [4, 5, 6]]
    assert list(serve(model, prompts, cache, 0, lambda i, token: 1 / 0)) == [0, 1, 2]
    assert list(generate(model, prompts[:2], 0, cache=cache)) == []
    assert list(generate(model, torch.tensor([[1, 2]]), 0)) == []
