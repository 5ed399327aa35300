"""What holds for the attention of every file in attentions/, whatever its mathematics."""

import pytest
import torch
from helpers import ROOT

from attentions import BROKEN, MODELS
from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.inference import fused_step
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

ZOO = sorted(MODELS.keys() - {'mha', 'mla'})
LAYOUTS = {'dense': {}, 'paged': dict(layout='paged', page_size=16)}
RAGGED = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2]]

every_attention = pytest.mark.parametrize('kind', ZOO)
every_layout = pytest.mark.parametrize('layout', LAYOUTS)


def near(found, expected):
    """Assert that logits agree to 1e-5 of the largest."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f'off by {error:.1e}'


def greedy(model, prompts, n, **options):
    tokens = generate(model, prompts, n, temperature=0, **options)
    return torch.stack(list(tokens), dim=1).tolist()


def test_every_file_loads():
    assert not BROKEN
    assert ZOO


@every_attention
@torch.no_grad()
def test_no_token_sees_a_later_one(kind, tiny, tokens):
    model, idx = tiny(kind), tokens(20)
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 40
    # not bit for bit: the rows that an expert multiplies at a time are those of all tokens
    torch.testing.assert_close(model(changed)[:, :12], model(idx)[:, :12], rtol=0, atol=2e-6)
    assert not torch.equal(model(changed)[:, 12:], model(idx)[:, 12:])


@every_attention
@every_layout
@pytest.mark.parametrize(
    'chunks', [[20], [1] * 20, [7, 1, 9, 3]], ids=['at_once', 'token_by_token', 'in_chunks']
)
@torch.no_grad()
def test_logits_are_those_without_a_cache(kind, layout, chunks, tiny, tokens):
    model, idx = tiny(kind), tokens(20)
    cache = Cache.of(model, 2, 24, **LAYOUTS[layout])
    logits = torch.cat([model(part, context=cache) for part in idx.split(chunks, dim=1)], dim=1)
    near(logits, model(idx))


@every_attention
@every_layout
@torch.no_grad()
def test_ragged_prompts_decode_as_each_alone(kind, layout, tiny):
    model = tiny(kind)
    alone = [greedy(model, torch.tensor([text]), 7)[0] for text in RAGGED]
    cache = Cache.of(model, 5, 24, **LAYOUTS[layout])
    assert greedy(model, RAGGED, 7, cache=cache, rows=[4, 0, 2], prefill_chunk=4) == alone


@every_attention
@torch.no_grad()
def test_a_quantised_cache_comes_near(kind, tiny, tokens):
    model, idx = tiny(kind), tokens(20)
    cache = Cache.of(model, 2, 24, dtype='int8', window=4)
    logits = torch.cat([model(part, context=cache) for part in idx.split(5, dim=1)], dim=1)
    error = (logits - model(idx)).abs().max() / model(idx).abs().max()
    assert error < 0.05


@every_attention
def test_a_token_takes_the_bytes_that_it_is_said_to_take(kind, tiny):
    model = tiny(kind)
    cache = Cache.of(model, 3, 24)
    assert cache.nbytes == 3 * 24 * model.cache_bytes_per_token(bytes_per_element=4)


@every_attention
def test_all_weights_get_gradients(kind, tiny, tokens):
    model = tiny(kind).train()
    model(tokens(20), tokens(20)).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@every_attention
@torch.no_grad()
def test_a_checkpoint_comes_back(kind, tiny, tokens, tmp_path):
    model = tiny(kind)
    content = dict(kind=kind, model_args=native.model_args(model), model=model.state_dict(), step=1)
    native.save(tmp_path / 'ckpt.pt', content)
    back = load_model(tmp_path).model.eval()
    assert type(back) is type(model)
    assert torch.equal(back(tokens(13)), model(tokens(13)))


@every_attention
def test_it_has_a_name_of_its_own(kind):
    others = {model.Config.label for name, model in MODELS.items() if name != kind}
    assert MODELS[kind].Config.label not in others


# moe.py, for one, has MLA's attention and brings other parts of a block.
@pytest.mark.parametrize('kind', [k for k in ZOO if MODELS[k].Attention.__module__.endswith(k)])
def test_the_file_of_an_attention_is_short(kind):
    lines = (ROOT / 'attentions' / f'{kind}.py').read_text().splitlines()
    assert len(lines) <= 120


@pytest.mark.gpu
@every_attention
@every_layout
@torch.no_grad()
def test_on_a_gpu_a_recorded_step_is_the_plain_path(kind, layout, tiny, tokens):
    model, idx = tiny(kind).cuda(), tokens(20).cuda()
    plain = Cache.of(model, 2, 24, kernel='torch', **LAYOUTS[layout])
    recorded = Cache.of(model, 2, 24, static=True, **LAYOUTS[layout])
    assert greedy(model, idx, 4, cache=recorded) == greedy(model, idx, 4, cache=plain)


@pytest.mark.gpu
@every_attention
@every_layout
@torch.no_grad()
def test_on_a_gpu_a_step_in_16_bits_is_the_plain_path(kind, layout, tiny, tokens):
    model, idx = tiny(kind).to('cuda', torch.bfloat16), tokens(20).cuda()
    model.stream = torch.bfloat16
    logits = []
    for kernel in ('torch', 'auto'):
        cache = Cache.of(model, 2, 24, static=True, kernel=kernel, **LAYOUTS[layout])
        model(idx[:, :-1], context=cache)
        cache.plan(1)
        logits.append(model.lm_head(fused_step.hidden(model, idx[:, -1:], cache)).float())
    plain, fast = logits
    assert (fast - plain).abs().max() < 0.03 * plain.abs().max()
