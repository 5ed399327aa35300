"""Caches give what a model without one computes, to the byte, and texts decode independently."""

import io
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import exit_code
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.checkpoints import native as checkpoint
from nanomla.checkpoints.native import MODELS
from nanomla.core.configurator import UserError
from nanomla.core.tokenizers import StreamDecoder
from nanomla.inference.cache import Cache, OutOfPages, PagePool
from nanomla.inference.generate import generate, prefill, serve
from nanomla.inference.quantize import dequantise, group_of, quantise

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    'gpt2': ('mha', {}),
    'llama': ('mha', dict(pos='rope', norm='rmsnorm', act='swiglu', bias=False, rope_scaling=2.0)),
    'gqa': ('mha', dict(pos='rope', n_kv_head=2, qk_norm=True)),
    'mqa': ('mha', dict(pos='none', n_kv_head=1, kernel='eager')),
    'mla': ('mla', {}),
    'mla_q_latent': ('mla', dict(q_lora_rank=9, qk_norm=True, qk_norm_latent=True, v_head_dim=6)),
    'mla_no_norm': ('mla', dict(latent_norm=False, absorb=True, kernel='eager')),
    'mla_early': (
        'mla',
        dict(qk_rope_head_dim=0, latent_norm=False, latent_init='gpt2', pos='learned'),
    ),
    'mla_nowhere': ('mla', dict(qk_rope_head_dim=0, pos='none', q_lora_rank=9)),
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)
LAYOUTS = {'dense': {}, 'paged': dict(layout='paged', page_size=16)}
every_layout = pytest.mark.parametrize('layout', LAYOUTS)
RAGGED = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2]]


@pytest.fixture(autouse=True)
def plain_steps():
    """One thread, which is quickest for models this small, and no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def worst_place(cache):
    """Pages in any order, and NaN wherever nothing is cached."""
    if cache.pages:
        order = torch.randperm(
            len(cache.pages.free), generator=torch.Generator().manual_seed(1)
        ).tolist()
        cache.pages.free = [cache.pages.free[i] for i in order]
    for store in cache.stores:
        for buffer in store.buffers:
            buffer.fill_(torch.nan if buffer.is_floating_point() else 255)
    return cache


def greedy(model, idx, n, **how):
    return torch.stack(list(generate(model, idx, n, temperature=0, **how)), dim=1).tolist()


# -------------------------------------------------------------------------------------------------
# nothing is lost


@every_layout
@every_variant
@pytest.mark.parametrize(
    'chunks', [[20], [1] * 20, [7, 1, 9, 3]], ids=['at_once', 'token_by_token', 'in_chunks']
)
def test_logits_are_those_without_a_cache(variant, layout, chunks, tiny, tokens):
    kind, shape = VARIANTS[variant]
    model, idx = tiny(kind, **shape), tokens(20)
    cache = worst_place(Cache.of(model, 2, 24, **LAYOUTS[layout]))
    logits = torch.cat([model(part, context=cache) for part in idx.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(idx), rtol=0, atol=1e-4)
    assert cache.used == cache.lengths.tolist() == [20, 20]


@every_layout
@every_variant
@pytest.mark.parametrize('chunk', [0, 4])
def test_ragged_prompts_decode_as_each_alone(variant, layout, chunk, tiny):
    kind, shape = VARIANTS[variant]
    model = tiny(kind, **shape)
    alone = [greedy(model, torch.tensor([text]), 7)[0] for text in RAGGED]
    cache = worst_place(Cache.of(model, 5, 24, **LAYOUTS[layout]))
    assert greedy(model, RAGGED, 7, cache=cache, rows=[4, 0, 2], prefill_chunk=chunk) == alone
    whole = worst_place(Cache.of(model, 3, 24, static=True, **LAYOUTS[layout]))
    assert greedy(model, RAGGED, 7, cache=whole, prefill_chunk=chunk) == alone


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@every_layout
def test_an_idle_slot_may_stand_in_a_step_of_all(kind, layout, tiny, tokens):
    model, idx = tiny(kind, pos='rope'), tokens(9, B=3)
    cache = worst_place(Cache.of(model, 3, 16, static=True, **LAYOUTS[layout]))
    for t in range(9):
        cache.plan([1, 0, 1])
        logits = model(idx[:, t : t + 1], context=cache)
    torch.testing.assert_close(logits[[0, 2], 0], model(idx)[[0, 2], -1], rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == cache.used == [9, 0, 9]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'int8', 'int4'])
@every_layout
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_other_storage_comes_near(kind, layout, dtype, tiny, tokens):
    model, idx = tiny(kind, pos='rope'), tokens(24, B=3)
    expected = model(idx)
    for window in (0, 5, 128):
        cache = worst_place(Cache.of(model, 3, 24, dtype=dtype, window=window, **LAYOUTS[layout]))
        logits = torch.cat([model(part, context=cache) for part in idx.split(3, dim=1)], dim=1)
        error = (logits - expected).norm() / expected.norm()
        assert error < dict(bfloat16=0.02, float16=0.003, int8=0.02, int4=0.2)[dtype]
        if window == 128 and dtype.startswith('int'):  # all of it is at full precision
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_a_model_in_bfloat16(tiny, tokens):
    model = tiny('mla').bfloat16()
    model.stream = torch.bfloat16
    cache = Cache.of(model, 2, 24)
    assert cache.dtype == 'bfloat16' and model(tokens(5), context=cache).dtype == torch.bfloat16


@every_layout
@pytest.mark.parametrize('dtype', ['float32', 'int4'])
def test_a_static_step_keeps_its_buffers_and_shapes(layout, dtype, tiny, tokens):
    """What a CUDA graph needs: the same storage in each step, no shape that follows lengths."""
    model = tiny('mla')
    cache = Cache.of(model, 2, 24, dtype=dtype, static=True, window=4, **LAYOUTS[layout])
    tensors = (
        [b for s in cache.stores for b in s.buffers]
        + [cache.lengths, cache.counts]
        + [cache.block_table] * (cache.block_table is not None)
    )
    before, shapes = [t.data_ptr() for t in tensors], set()
    for _ in range(20):
        model(tokens(1), context=cache)
        shapes.add(
            (
                cache.current.read_view.mask.shape,
                cache.current.write_slots.slots.shape,
                cache.current.read_view.filled.shape,
            )
        )
    assert before == [t.data_ptr() for t in tensors] and len(shapes) == 1


# -------------------------------------------------------------------------------------------------
# the window


def by_definition(model, text, n, window):
    """Greedy text with the rolling window that generate.py defines."""
    text, written, cached = text[-window:], [], 0
    for _ in range(n):
        if cached == window:
            text = text[-max(1, window // 2) :]
        token = model(torch.tensor([text]))[0, -1].argmax().item()
        cached = len(text)
        text = text + [token]
        written.append(token)
    return written


@pytest.mark.parametrize('layout, dtype', [('dense', 'float32'), ('paged', 'float32')])
@pytest.mark.parametrize(
    'kind, shape', [('mha', dict(pos='rope')), ('mla', {}), ('mha', dict(pos='none'))], ids=str
)
def test_a_text_rolls_beyond_the_window(kind, shape, layout, dtype, tiny, tokens):
    model = tiny(kind, **shape)
    prompts = RAGGED + [tokens(40, B=1)[0].tolist()]
    expected = [by_definition(model, text, 45, 24) for text in prompts]  # each rolls twice
    cache = Cache.of(model, 4, 24, dtype=dtype, **LAYOUTS[layout])
    assert greedy(model, prompts, 45, cache=cache) == expected
    small = Cache.of(model, 1, 10)
    assert greedy(model, RAGGED[:1], 40, cache=small) == [by_definition(model, RAGGED[0], 40, 10)]


def test_learned_positions_end(tiny):
    model = tiny()
    written = generate(model, [[1, 2, 3]], 99, temperature=0, cache=Cache.of(model, 1, 24))
    assert (
        len([next(written) for _ in range(22)]) == 22
    )  # 24 slots: the last token need not be cached
    with pytest.raises(
        UserError,
        match='the text outgrows block_size=24 and this model has learned positions: '
        'decode without a cache',
    ):
        next(written)
    with pytest.raises(
        UserError, match='the cache, which is too small: it holds 9 tokens of a sequence'
    ):
        list(generate(model, [[1, 2, 3]], 99, temperature=0, cache=Cache.of(model, 1, 9)))


# -------------------------------------------------------------------------------------------------
# quantised


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    scale=st.floats(1e-6, 1e3),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
def test_a_round_trip_is_off_by_half_a_step_at_most(width, bits, scale, shift, seed):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * scale + shift
    codes, scales = quantise(x, bits)
    assert codes.shape == (3, math.ceil(width * bits / 8)) and scales.shape == (
        3,
        2 * (width // group_of(width)),
    )
    steps = scales[:, ::2]
    error = (dequantise(codes, scales, width, bits) - x).abs().unflatten(-1, (-1, group_of(width)))
    assert (
        error <= steps.float()[..., None] / 2 + 1e-6 * x.abs().max()
    ).all()  # fp32's own rounding
    x = x.unflatten(-1, (-1, group_of(width)))
    spread = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    coarse = (
        spread * 1.01 + x.abs().amax(-1) * 2**-9 / (2**bits - 1) + 2**-13
    )  # no wider than fp16 needs
    assert (steps.float() <= coarse).all()


def test_groups():
    assert [group_of(width) for width in (1, 8, 64, 96, 128, 192, 512, 320, 97, 768)] == [
        1,
        8,
        64,
        48,
        64,
        64,
        64,
        64,
        1,
        64,
    ]


def test_k_pe_is_never_quantised(tiny, tokens):
    model = tiny('mla')
    cache, exact = Cache.of(model, 2, 24, dtype='int4', window=0), Cache.of(model, 2, 24)
    for c in (cache, exact):
        model(tokens(20), context=c)
    (k_pe,), (expected,) = (c.layers[0].stores['k_pe'].data for c in (cache, exact))
    assert (
        torch.equal(k_pe, expected) and cache.layers[0].stores['c_kv'].data[0].dtype == torch.uint8
    )


def bytes_by_hand(model, places, slots, dtype, window, full):
    total = 0
    for block in model.transformer.h:
        for name, width in block.attn.cache_dims().items():
            if dtype in ('int8', 'int4') and name != 'k_pe':
                group = max(g for g in range(1, 65) if width % g == 0)
                total += places * (width if dtype == 'int8' else (width + 1) // 2)
                total += places * width // group * 2 * 2 + slots * window * width * full
            else:
                total += (
                    places * width * {'float32': 4, 'bfloat16': 2, 'float16': 2}.get(dtype, full)
                )
    return total


@every_variant
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'int4'])
def test_nbytes_is_the_formula(variant, dtype, tiny):
    kind, shape = VARIANTS[variant]
    model = tiny(kind, **shape)
    for slots, size, window in ((1, 24, 0), (3, 100, 7), (2, 130, 128)):
        cache = Cache.of(model, slots, size, dtype=dtype, window=window)
        assert (
            cache.nbytes
            == bytes_by_hand(model, slots * size, slots, dtype, window, 4)
            == cache.bytes_per_token * slots * size
        )
        for page_size in (16, 64, 128):
            cache = Cache.of(
                model, slots, size, layout='paged', page_size=page_size, dtype=dtype, window=window
            )
            places = slots * math.ceil(size / page_size) * page_size
            assert cache.nbytes == bytes_by_hand(model, places, slots, dtype, window, 4)
        assert Cache.of(
            model, slots, size, layout='paged', pages=9, dtype=dtype, window=0
        ).nbytes == bytes_by_hand(model, 9 * 64, slots, dtype, 0, 4)


def test_the_figures_of_the_papers():
    """In groups of 64 an int8 takes 1.0625 bytes, an int4 0.5625; MLA 512 + 64 in bf16 1152."""
    dims = [dict(c_kv=512, k_pe=64)]
    assert Cache(dims, 1, 100, full=torch.bfloat16).bytes_per_token == 1152
    for dtype, each in (('int8', 1.0625), ('int4', 0.5625)):
        assert (
            Cache(dims, 1, 100, dtype=dtype, window=0, full=torch.bfloat16).bytes_per_token
            == 512 * each + 128
        )


@pytest.fixture(scope='module')
def trained():
    """Two small models, trained for seconds on Python's licence, and a part they have not seen."""
    import pydoc_data.topics

    text = pydoc_data.topics.topics['class'] + ''.join(list(pydoc_data.topics.topics.values())[:40])
    ids = torch.tensor(list(text.encode(errors='ignore')[:120_000])).clamp(max=127)
    models = {}
    with torch.enable_grad():
        for kind, shape in dict(
            mha=dict(pos='rope'), mla=dict(kv_lora_rank=64, qk_rope_head_dim=16)
        ).items():
            torch.manual_seed(0)
            model = models[kind] = MODELS[kind](
                MODELS[kind].Config(
                    block_size=128,
                    vocab_size=128,
                    n_layer=2,
                    n_head=2,
                    n_embd=64,
                    bias=False,
                    init='fan_in',
                    **shape,
                )
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for _ in range(70):
                starts = torch.randint(len(ids) - 20_129, (4,))
                batch = ids[starts[:, None] + torch.arange(129)]
                optimizer.zero_grad()
                model(batch[:, :-1], batch[:, 1:]).backward()
                optimizer.step()
            model.eval()
    return models, ids[-16 * 129 :].view(16, 129)


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_perplexity_of_quantised_caches(kind, trained):
    models, text = trained

    def perplexity(dtype, window):
        cache = Cache.of(models[kind], len(text), 128, dtype=dtype, window=window)
        logits = torch.cat(
            [models[kind](part, context=cache) for part in text[:, :-1].split(4, dim=1)], dim=1
        )
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).exp().item()

    exact = perplexity('float32', 0)
    assert exact < 30  # it has learned something (128 at the start)
    change = {
        (dtype, window): perplexity(dtype, window) / exact - 1
        for dtype in ('int8', 'int4')
        for window in (0, 32)
    }
    print(
        f'{kind}: perplexity {exact:.3f};',
        ', '.join(f'{dtype} window {window} {x:+.4%}' for (dtype, window), x in change.items()),
    )
    assert abs(change['int8', 0]) < 0.001 and abs(change['int8', 32]) < 0.001
    assert abs(change['int4', 32]) < 0.02


# -------------------------------------------------------------------------------------------------
# pages


def check(cache):
    """No page is lost or owned by chance."""
    holders = [0] * len(cache.pages.holders)
    for row, pages in enumerate(cache.pages_of_row):
        assert len(pages) == len(set(pages)) == math.ceil(cache.used[row] / cache.page_size)
        assert cache.block_table[row, : len(pages)].tolist() == pages
        for page in pages:
            holders[page] += 1
    assert holders == cache.pages.holders
    assert sorted(cache.pages.free) == [page for page, n in enumerate(holders) if n == 0]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(['plan', 'fork', 'free']),
            st.integers(0, 3),
            st.integers(0, 3),
            st.integers(0, 40),
            st.integers(0, 40),
        ),
        max_size=40,
    )
)
def test_pages_under_any_load(load):
    cache = Cache([dict(k=1)], 4, 96, layout='paged', page_size=16, pages=11)
    for what, a, b, n, m in load:
        state = [
            cache.used[:],
            [p[:] for p in cache.pages_of_row],
            cache.pages.free[:],
            cache.pages.holders[:],
            cache.block_table.clone(),
            cache.block_table_on_host.clone(),
        ]
        if what == 'free':
            cache.free(a)
        elif a != b and what == 'fork':
            cache.fork(a, b)
        elif a != b and n + m:
            try:
                cache.plan([n, m], [a, b])
                cache.begin(max(n, m))
                cache.end()
            except UserError as error:
                if isinstance(error, OutOfPages):
                    assert error.needed > error.free == len(cache.pages.free)
                assert state[:4] == [
                    cache.used,
                    cache.pages_of_row,
                    cache.pages.free,
                    cache.pages.holders,
                ]
                assert torch.equal(cache.block_table, state[4]) and torch.equal(
                    cache.block_table_on_host, state[5]
                )
        assert cache.lengths.tolist() == cache.used
        check(cache)
    for row in range(4):
        cache.free(row)
    assert len(cache.pages.free) == 11


def test_out_of_pages_says_how_many():
    pages = PagePool(3)
    pages.allocate(2)
    with pytest.raises(OutOfPages, match='out of pages: 2 needed, 1 free: end a sequence') as error:
        pages.allocate(2)
    assert (error.value.needed, error.value.free, pages.free) == (2, 1, [2])


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize(
    'layout, dtype',
    [('dense', 'float32'), ('paged', 'float32'), ('paged', 'int4'), ('dense', 'int8')],
)
def test_copies_share_a_prefix_and_nothing_else(kind, layout, dtype, tiny, tokens):
    model, prompt, ends = tiny(kind, pos='rope'), tokens(18, B=1), tokens(5, B=3)
    cache = worst_place(Cache.of(model, 4, 24, dtype=dtype, window=128, **LAYOUTS[layout]))
    prefill(model, prompt.tolist(), cache, [0])
    free = cache.pages and len(cache.pages.free)
    for row in (1, 2, 3):
        cache.fork(0, row)
    if cache.pages:
        assert (
            len(cache.pages.free) == free
            and len({tuple(pages) for pages in cache.pages_of_row}) == 1
        )
    for t in range(5):  # all three grow side by side, and slot 0 stays
        cache.plan(1, [1, 2, 3])
        logits = model(ends[:, t : t + 1], context=cache)
    if cache.pages:
        assert (
            len(cache.pages.free) == free - 3
        )  # the full page is still shared, the one that was begun is everyone's own
        assert (
            len({pages[0] for pages in cache.pages_of_row}) == 1
            and len({pages[1] for pages in cache.pages_of_row}) == 4
        )
        check(cache)
    expected = model(torch.cat([prompt.expand(3, -1), ends], dim=1))[:, -1]
    torch.testing.assert_close(logits[:, 0], expected, rtol=0, atol=1e-4)
    cache.plan(1, [0])
    torch.testing.assert_close(
        model(ends[:1, :1], context=cache)[0, 0],
        model(torch.cat([prompt, ends[:1, :1]], 1))[0, -1],
        rtol=0,
        atol=1e-4,
    )


# -------------------------------------------------------------------------------------------------
# many prompts


def served(model, prompts, n, slots, stops=(), **how):
    cache, written, order = (
        worst_place(Cache.of(model, slots, 24, **how)),
        [[] for _ in prompts],
        [],
    )

    def tell(i, token):
        written[i].append(token)
        return token in stops

    for i in serve(
        model, prompts, cache, n, tell, temperature=1.0, prefill_chunk=how.pop('prefill_chunk', 0)
    ):
        order.append(i)
    assert sorted(order) == list(range(len(prompts))) and cache.used == [0] * slots
    if cache.pages:
        check(cache)
    return written


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@every_layout
def test_continuous_batching_gives_each_prompt_its_own_text(kind, layout, tiny, tokens):
    model = tiny(kind, pos='rope')
    prompts = [tokens(3 + 5 * i % 19, B=1)[0].tolist() for i in range(7)]
    stops = {1, 2, 3, 4}
    alone = []
    for i, prompt in enumerate(prompts):
        generator, text = torch.Generator().manual_seed(i), []
        for token in generate(
            model, [prompt], 40, generator=generator, cache=Cache.of(model, 1, 24)
        ):
            text.append(token.item())
            if text[-1] in stops:
                break
        alone.append(text)
    assert len({len(text) for text in alone}) > 2
    for slots in (1, 3, 9):
        assert served(model, prompts, 40, slots, stops, **LAYOUTS[layout]) == alone


# -------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize(
    'stops, generated, written',
    [
        (['END'], 'the END of it', 'the '),
        (['END'], 'the EN', 'the EN'),
        (['END'], 'the EEND', 'the E'),
        (['\n\n'], 'a\nb\n\nc', 'a\nb'),
        (['bc', 'abcd'], 'xabcd', 'xa'),
        (['é'], 'caf\u00e9s', 'caf'),
        ([], 'all of it', 'all of it'),
        (['aab'], 'aaab', 'a'),
    ],
)
def test_stop_strings(stops, generated, written):
    decoder, heard = StreamDecoder(bytes, stops, ends={300}), ''
    for token in generated.encode():
        heard += decoder.add(token)
        assert written.startswith(heard) and not any(stop in heard for stop in stops)
    heard += decoder.finish()
    assert heard == written and decoder.stopped == (written != generated)


def test_the_end_of_a_text_is_not_written():
    decoder = StreamDecoder(bytes, ['xyz'], ends={300})
    assert (
        [decoder.add(token) for token in (*b'ax', 300, *b'b')] == ['a', '', 'x', '']
        and decoder.stopped
        and decoder.finish() == ''
    )


# -------------------------------------------------------------------------------------------------
# as a person runs it

CHARS = '\n abcdefghijklmnopqrstuvwxyz'


@pytest.fixture
def sample(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    for name, (kind, settings_) in dict(mla=('mla', {}), gpt2=('mha', {})).items():
        model = tiny(kind, vocab_size=len(CHARS), **settings_)
        checkpoint.save(
            f'{name}.pt',
            dict(
                kind=kind,
                model_args=checkpoint.model_args(model),
                model=model.state_dict(),
                step=7,
                best_val_loss=1.5,
                meta=dict(
                    tokenizer='char',
                    chars=CHARS,
                    vocab_size=len(CHARS),
                    source='A tale',
                    dtype='uint16',
                ),
                config={},
            ),
        )

    def run(*arguments):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'sample.py',
                '--device=cpu',
                '--init_from=mla.pt',
                '--num_samples=1',
                '--max_new_tokens=15',
                *arguments,
            ],
        )
        capsys.readouterr()
        with torch.enable_grad():
            runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        return capsys.readouterr()

    return run


def test_every_cache_writes_the_same(sample):
    plain, err = sample('--start=once', '--cache=none', '--num_samples=3')
    assert err.endswith('A tale\nno cache\n')
    for words in (
        ['--cache=dense'],
        ['--cache=paged'],
        ['--cache=paged', '--page_size=16', '--prefill_chunk=2'],
    ):
        out, err = sample('--start=once', '--num_samples=3', *words)
        assert out == plain and re.search(
            r'\n(dense|paged) float32 cache, 128 bytes a token\n$', err
        )  # 2 layers of (12 + 4) fp32
    for dtype, each in (('float16', 64), ('int8', None), ('int4', None)):
        out, err = sample('--start=once', f'--cache_dtype={dtype}')
        assert len(out) == 20 and (each is None or f'dense {dtype} cache, {each} bytes' in err)
    assert len(sample('--start=once', '--max_new_tokens=99')[0]) == 104  # rolls


def test_prompts_in_their_order(sample, monkeypatch):
    lines = ['once upon', 'a', '', 'the end of the tale that never ends at all', 'b']
    Path('p.txt').write_text('\n'.join(lines) + '\n')
    out, err = sample('--prompts=p.txt', '--batch_size=2', '--jsonl=True')
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer['prompt'] for answer in answers] == lines and all(
        len(answer['text']) == 15 for answer in answers
    )
    assert err.endswith('1 prompts have up to 42 tokens: only the last 24 are read (block_size)\n')
    assert sample('--prompts=p.txt', '--batch_size=16', '--cache=paged', '--jsonl=True')[0] == out
    shown = '---------------\n'.join(
        (line or '\n') + answer['text'] + '\n' for line, answer in zip(lines, answers)
    )
    assert sample('--prompts=p.txt')[0] == shown
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('\r\n'.join(lines).encode())))
    assert sample('--prompts=-')[0] == shown
    assert sample('--start=once upon')[0] == lines[0] + answers[0]['text'] + '\n'


def test_a_stop_ends_a_sample(sample):
    whole = sample('--start=once')[0].removesuffix('\n')
    stop = whole[9:11]
    cut = whole[: 4 + whole[4:].index(stop)]
    assert (
        sample('--start=once', f'--stop={stop}')[0]
        == sample('--start=once', f'--stop={json.dumps(["qqqq", stop])}')[0]
        == cut + '\n'
    )
    Path('p.txt').write_text('once')
    assert sample('--prompts=p.txt', f'--stop={stop}')[0] == cut + '\n'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--cache=big'], "--cache='big' is not known: use none, dense, paged"),
        (['--cache_dtype=int2'], "cache_dtype='int2' is not known: use auto, float32"),
        (['--cache=paged', '--page_size=17'], 'page_size=17 is not known: use 16, 64, 128'),
        (
            ['--decode_kernel=fast'],
            "decode_kernel='fast' is not known: use auto, triton, torch, flex, flashinfer, "
            'flashmla',
        ),
        (
            ['--decode_kernel=flex', '--cache_dtype=int8'],
            '--decode_kernel=flex cannot run: it reads caches of full precision, not int8. '
            'Use --decode_kernel=auto',
        ),
        (
            ['--decode_kernel=flashinfer'],
            '--decode_kernel=flashinfer cannot run: flashinfer is not installed '
            '(pip install flashinfer-python)',
        ),
        (
            ['--decode_kernel=flashmla', '--cache=paged'],
            '--decode_kernel=flashmla cannot run: flash_mla is not installed '
            '(see github.com/deepseek-ai/FlashMLA)',
        ),
        (
            ['--decode_kernel=triton', '--cache=paged'],
            '--decode_kernel=triton cannot run: Triton and a CUDA GPU are needed',
        ),
        (
            ['--decode_kernel=triton'],
            '--decode_kernel=triton cannot run: Triton and a CUDA GPU are needed',
        ),
        (['--batch_size=0'], 'batch_size=0 must be at least 1'),
        (['--prefill_chunk=-1'], 'prefill_chunk=-1 must be at least 0'),
        (['--prompts=none.txt'], '--prompts=none.txt cannot be read: No such file'),
        (['--prompts=empty.txt'], '--prompts=empty.txt holds no prompt'),
        (['--prompts=p.txt', '--start=a'], 'give one of --start and --prompts'),
        (
            ['--prompts=p.txt', '--cache=none'],
            '--prompts are decoded together, which needs a cache',
        ),
        (['--prompts=wrong.txt'], 'wrong.txt:2: the text has characters this model has never seen'),
        (['--stop=["a", ""]'], 'must be a text, or a JSON list of texts'),
        (
            ['--init_from=gpt2.pt', '--cache=dense', '--max_new_tokens=99', '--start=abc'],
            '--start: 3 tokens and max_new_tokens=99 outgrow block_size=24, where learned '
            'positions end: use --cache=none, or --max_new_tokens=22',
        ),
        (
            ['--init_from=gpt2.pt', '--prompts=p.txt', '--max_new_tokens=99'],
            'p.txt:2: 5 tokens and max_new_tokens=99 outgrow block_size=24',
        ),
    ],
)
def test_what_is_wrong_ends_in_one_line(arguments, message, sample):
    Path('empty.txt').touch()
    Path('p.txt').write_text('abc\nabcde\n')
    Path('wrong.txt').write_text('abc\n123\n')
    with pytest.raises(UserError) as error:
        sample(*arguments)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_learned_positions_fall_back_to_no_cache(sample):
    out, err = sample('--init_from=gpt2.pt', '--max_new_tokens=60', '--start=abc')
    assert len(out) == 64 and err.endswith(
        'no cache (the text may outgrow block_size=24, where learned positions end)\n'
    )


def test_the_window_of_a_quantised_cache_is_named(sample):
    _, err = sample('--cache_dtype=int8')
    assert re.search(
        r'\ndense int8 cache, [0-9,]+ bytes a token and [0-9,]+ KiB for the last \d+\n$', err
    )


def test_a_wrong_setting_ends_with_code_2(sample, capsys):
    code = exit_code('sample.py', ['--device=cpu', '--init_from=mla.pt', '--cache_dtype=int2'])
    out, err = capsys.readouterr()
    assert (code, out) == (2, '')
    assert re.fullmatch(r"error: cache_dtype='int2' is not known.*\n", err)


@pytest.mark.parametrize(
    'how, message',
    [
        (dict(layout='round'), "cache='round' is not known"),
        (dict(dtype='fp8'), "cache_dtype='fp8' is not known"),
        (dict(size=0), 'a cache needs room'),
        (dict(window=-1), 'a cache needs room'),
        (dict(rows=0), 'a cache needs room'),
    ],
)
def test_a_cache_that_cannot_be(how, message):
    with pytest.raises(UserError, match=message):
        Cache([dict(k=4)], **(dict(rows=1, size=8) | how))


def test_a_cache_that_is_too_small_stays_as_it_was(tiny, tokens):
    model, cache = tiny(pos='rope'), Cache([dict(k=32, v=32)] * 2, 2, 12)
    model(tokens(10), context=cache)
    with pytest.raises(
        UserError,
        match='the cache is too small: it holds 12 tokens of a sequence and 13 are needed',
    ):
        model(tokens(3), context=cache)
    assert cache.used == cache.lengths.tolist() == [10, 10]
    model(tokens(2), context=cache)
    with pytest.raises(
        UserError,
        match='the cache is too small: it holds 12 tokens of a sequence and 13 are needed',
    ):
        prefill(model, [[1] * 13], Cache([dict(k=32, v=32)] * 2, 2, 12))
