"""Generation at the edges of its options."""

import pytest
import torch

from nanomla.inference.cache import Cache, OutOfPages
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


def texts_of(model, prompts, cache, max_new_tokens):
    """Return what `serve` writes after each prompt, and how many texts were in progress at most."""
    texts, most = [[] for _ in prompts], 0

    def on_token(i, token):
        nonlocal most
        texts[i].append(token)
        most = max(most, sum(0 < len(text) < max_new_tokens for text in texts))
        return False

    ended = list(serve(model, prompts, cache, max_new_tokens, on_token, temperature=0.8))
    assert sorted(ended) == list(range(len(prompts)))
    return texts, most


@pytest.mark.parametrize('pages, together', [(2, 1), (3, 1), (5, 2), (0, 4)])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_prompts_wait_for_pages_and_come_out_as_with_pages_for_all(kind, pages, together, tiny):
    """Pages for one text at a time are enough, and one never takes those of another."""
    model = tiny(kind, block_size=64)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6] * 13, [5, 3, 5], [8, 9, 7, 9, 3, 2]]
    options = dict(rows=4, size=40, layout='paged', page_size=16, kernel='torch')
    texts, most = texts_of(model, prompts, Cache.of(model, pages=pages, **options), 20)
    assert most <= together
    assert texts == texts_of(model, prompts, Cache.of(model, **options), 20)[0]


def test_a_text_that_needs_more_pages_than_there_are_is_refused_at_once(tiny):
    model = tiny('mla', block_size=64)
    cache = Cache.of(model, 2, 64, layout='paged', page_size=16, pages=2, kernel='torch')
    with pytest.raises(OutOfPages, match='out of pages: 3 needed, 2'):
        list(serve(model, [[1, 2, 3]], cache, 40, lambda i, token: 1 / 0))
