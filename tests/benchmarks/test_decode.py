"""bench.py decode and its rooms: complete rows, bytes by the formula, ratios, crossings and fragmentation right, and what does not fit told."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import exit_code, words
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.benchmarks import attention as attention_meter
from nanomla.benchmarks import decode as decode_meter
from nanomla.benchmarks import figures as decode_figures
from nanomla.benchmarks import peers
from nanomla.benchmarks import text as text_meter
from nanomla.core import devices as machine
from nanomla.core import timing
from nanomla.core.configurator import UserError
from nanomla.inference.cache import Cache
from nanomla.inference.quantize import BITS, FULL

TINY = dict(
    device='cpu',
    n_layer=2,
    n_head=4,
    n_embd=32,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    vocabulary=100,
    warmup_steps=1,
    timed_steps=2,
    repeats=2,
    bias=False,
    contexts='16,32',
    batch_sizes='1,2',
)
PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: few')

    def generate(self, idx, n, temperature, top_k):
        assert (temperature, top_k) == (0.8, 200) and not torch.is_grad_enabled() and not self.training
        return torch.cat([idx, idx[:, :1].expand(-1, n)], dim=1)
"""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if 'draws' not in request.keywords:  # a picture takes a second
        monkeypatch.setattr(decode_figures, 'draw', lambda *_: None)
    monkeypatch.setattr(machine, 'commit', lambda: 'abc1234')
    monkeypatch.setitem(sys.modules, 'peer_model', None)


def bench(**settings):
    return exit_code('bench.py', ['decode', *words(TINY | settings)])


def rows_of(name='decode'):
    return [json.loads(line) for line in Path(f'out-bench/{name}.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------
# cells


@pytest.mark.draws
def test_every_cell_is_a_complete_row(capsys):
    assert bench(models='mha,gqa,mla:8+2', cache_dtypes='auto,int8', batch_sizes='2') == 0
    rows = rows_of()
    cells = [row for row in rows if row['what'] == 'cell']
    assert [(row['model'], row['cache'], row['cache_dtype'], row['context']) for row in cells] == [
        (model, *cache, context)
        for model in ('mha', 'gqa', 'mla:8+2')
        for cache in (
            ('none', 'none'),
            ('dense', 'auto'),
            ('dense', 'int8'),
            ('paged', 'auto'),
            ('paged', 'int8'),
        )
        for context in (16, 32)
    ]
    for row in cells:
        assert (
            row['reason'] == ''
            and row['commit'] == 'abc1234'
            and row['torch'] == torch.__version__
            and row['dtype'] == 'float32'
            and row['batch'] == 2
        )
        assert (
            row['step_us_least'] <= row['step_us'] <= row['step_us_most']
            and row['prefill_ms_least'] <= row['prefill_ms'] <= row['prefill_ms_most']
        )
        assert row['decode_tok_per_s'] == pytest.approx(2 / row['step_us'] * 1e6)
        assert row['prefill_tok_per_s'] == pytest.approx(
            2 * row['context'] / row['prefill_ms'] * 1e3
        )
        assert (
            row['peak_allocated'] > 0
            and row['parameters'] > 0
            and row['weight_bytes'] == 4 * row['parameters']
        )
        assert row['cache'] == 'none' or row['bytes_per_token'] == pytest.approx(
            row['bytes_per_token_formula']
        )
    by = {(row['model'], row['cache'], row['cache_dtype']): row for row in cells}
    assert [by[name, 'dense', 'auto']['bytes_per_token'] for name in ('mha', 'gqa', 'mla:8+2')] == [
        2 * 2 * 32 * 4,
        2 * 2 * 16 * 4,
        2 * (8 + 2) * 4,
    ]
    assert [by[name, 'none', 'none']['shape'] for name in ('mha', 'gqa', 'mla:8+2')] == [
        '4:4:8',
        '4:2:8',
        '4:8+2',
    ]
    assert by['mha', 'paged', 'auto']['cache_bytes'] == 2 * 64 * 512  # a page of 64 each
    with open('out-bench/decode.csv') as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and [row['step_us'] for row in table[:30]] == [
        str(row['step_us']) for row in cells
    ]
    for picture in ('latency', 'memory'):
        assert Path(f'out-bench/{picture}.png').read_bytes().startswith(b'\x89PNG')
    out, err = capsys.readouterr()
    assert (
        err == ''
        and '[30/30]' in out
        and 'with auto pages takes' in out
        and 'a dense auto cache' in out
        and '% lost' in out
    )
    assert [row['page_size'] for row in rows if row['what'] == 'fragmentation'] == [
        None,
        16,
        64,
        128,
    ]


def test_a_cell_decodes_as_many_tokens_as_it_says():
    told = []

    def tokens():
        for i in range(100):
            told.append(i)
            yield i

    times = decode_meter.timed_tokens(tokens(), torch.device('cpu'), warmup=3, steps=4, repeats=5)
    assert len(times) == 5 and len(told) == 1 + 3 + 4 * 5


def test_a_cell_ends_with_its_context_full(monkeypatch):
    """The last timed step of a cell writes the last place of its cache, and needs no more."""
    made = []
    of = Cache.of.__func__
    monkeypatch.setattr(
        Cache, 'of', classmethod(lambda cls, *a, **k: made.append(of(cls, *a, **k)) or made[-1])
    )
    assert bench(models='mla', caches='paged', contexts='20', batch_sizes='3') == 0
    assert made and made[0].used == [20, 20, 20]


def test_what_does_not_fit_is_a_row_and_the_others_go_on(capsys):
    assert bench(models='mha', caches='none,dense', contexts=f'16,{10**15}', batch_sizes='1') == 0
    cells = [row for row in rows_of() if row['what'] == 'cell']
    assert [row['reason'].partition(':')[0] for row in cells] == [
        '',
        'out of memory',
        '',
        'out of memory',
    ]
    assert 'step_us' in cells[2] and 'step_us' not in cells[3]
    out, err = capsys.readouterr()
    assert err == '' and out.count('out of memory') == 3  # and the contiguous buffers


def test_a_row_that_is_there_is_kept(monkeypatch, capsys):
    asked, measure = [], decode_meter.cell
    monkeypatch.setattr(
        decode_meter,
        'cell',
        lambda plan, model, *cell: asked.append(cell) or measure(plan, model, *cell),
    )
    small = dict(models='mha', caches='dense', batch_sizes='1')
    assert bench(**small, contexts='16') == 0 and bench(**small, contexts='16,32', keep=True) == 0
    assert (
        asked == [('dense', 'auto', 1, 16), ('dense', 'auto', 1, 32)]
        and '(kept)' in capsys.readouterr().out
    )
    assert [row['context'] for row in rows_of() if row['what'] == 'cell'] == [16, 32]
    assert bench(**small, contexts='16') == 0 and len(asked) == 3  # without --keep all is new


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def wrong():
        raise RuntimeError('shapes differ')

    with pytest.raises(RuntimeError, match='shapes differ'):
        timing.attempt(wrong, torch.device('cpu'))


def test_a_checkpoint_is_measured_as_it_is(tiny, capsys):
    from nanomla.checkpoints import native as checkpoint

    model = tiny('mla', block_size=24, vocab_size=100)
    checkpoint.save(
        'run/ckpt.pt',
        dict(kind='mla', model=model.state_dict(), model_args=checkpoint.model_args(model)),
    )
    assert bench(models='run', batch_sizes='1', caches='dense') == 0
    cells = [row for row in rows_of() if row['what'] == 'cell']
    assert [row['shape'] for row in cells] == ['4:12+4'] * 2 and [
        row['reason'] for row in cells
    ] == ['', 'the context is beyond block_size=24']


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(['k', 'v', 'c_kv', 'k_pe']), st.integers(1, 100), min_size=1
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 5),
    st.integers(1, 140),
    st.sampled_from(['dense', 'paged']),
    st.sampled_from([*FULL, *BITS]),
    st.sampled_from([16, 64, 128]),
    st.sampled_from(list(FULL.values())),
)
def test_the_formula_is_what_the_buffers_take(dims, slots, size, layout, dtype, page_size, full):
    cache = Cache(dims, slots, size, layout=layout, dtype=dtype, page_size=page_size, full=full)
    assert (
        decode_meter.formula_bytes(dims, slots, size, layout, dtype, page_size, full.itemsize)
        == cache.nbytes
    )


# ---------------------------------------------------------------------------------------------------
# what the cells say


@pytest.mark.parametrize(
    'plain, cached, found',
    [
        ({64: 1, 256: 4}, {64: 2, 256: 2}, ('from', 128)),  # log-log lines meet in the middle
        ({64: 3, 256: 4}, {64: 2, 256: 2}, ('always', 64)),
        ({64: 1, 256: 1}, {64: 2, 256: 2}, ('never', 256)),
        ({64: 1, 256: 2}, {64: 2, 256: 2}, ('never', 256)),  # as fast does not pay
        (
            {16: 4, 64: 1, 256: 4},
            {16: 2, 64: 2, 256: 2},
            ('from', 128),
        ),  # for good, not the first time
        (
            {32: 9, 64: 1, 256: 4, 512: 9},
            {64: 2, 256: 2, 1024: 2},
            ('from', 128),
        ),  # common lengths alone
    ],
    ids=str,
)
def test_where_a_cache_begins_to_pay(plain, cached, found):
    word, length = decode_meter.crossing(plain, cached)
    assert (word, length) == (found[0], pytest.approx(found[1]))


def test_no_common_length_says_nothing():
    assert decode_meter.crossing({}, {64: 1}) is None


def test_answers_from_hand_made_cells():
    def row(cache, context, us, reason=''):
        return dict(
            what='cell',
            model='mla',
            batch=8,
            cache=cache,
            cache_dtype='none' if cache == 'none' else 'int4',
            context=context,
            step_us=us,
            reason=reason,
        )

    rows = [
        row('none', 64, 1),
        row('none', 256, 4),
        row('dense', 64, 2),
        row('dense', 256, 2),
        row('paged', 64, 3),
        row('paged', 256, 2.5),
        row('none', 512, 0, 'out of memory'),
        row('dense', 512, 1e9, 'out of memory'),
    ]
    assert decode_meter.answers(rows) == [
        'mla, batch 8: a dense int4 cache pays from 128 tokens on',
        'mla, batch 8: a paged int4 cache pays from 169 tokens on',
        'mla, batch 8: a step with int4 pages takes 1.50 x dense at 64, 1.25 x dense at 256',
    ]


def test_fragmentation_of_a_batch_made_by_hand():
    dims, lengths = [dict(k=4, v=4)], [1, 16, 17]  # 32 bytes a token
    rows = decode_meter.fragmentation(dims, lengths, 64, torch.float32, torch.device('cpu'))
    assert [row['allocated_bytes'] for row in rows] == [
        32 * n for n in (3 * 64, 4 * 16, 3 * 64, 3 * 128)
    ]
    assert {row['used_bytes'] for row in rows} == {32 * 34}
    assert [row['lost_percent'] for row in rows] == pytest.approx(
        [100 * (1 - 34 / n) for n in (192, 64, 192, 384)]
    )
    assert [row['saved_percent'] for row in rows] == pytest.approx(
        [0, 100 * (1 - 64 / 192), 0, -100]
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 10000), st.integers())
def test_mixed_lengths_stay_inside(batch, longest, seed):
    lengths = decode_meter.mixed_lengths(batch, longest, seed)
    assert (
        len(lengths) == batch
        and 1 <= min(lengths)
        and max(lengths) <= longest
        and lengths == decode_meter.mixed_lengths(batch, longest, seed)
    )


# ---------------------------------------------------------------------------------------------------
# whole texts


def test_ratios_are_those_of_the_times():
    assert text_meter.ratio([10, 12, 11], [1, 0.5, 2]) == dict(
        ratio=11, ratio_least=5, ratio_most=24
    )


def test_whole_texts_beside_nanogpt(monkeypatch, capsys):
    Path('peer').mkdir()
    Path('peer/model.py').write_text(PEER)
    clock = iter(
        [30.0, 40.0, 20.0, *[9.0, 2.0, 1.0, 4.0]]
    )  # the peer; then the warm-up and three times of ours
    monkeypatch.setattr(timing, 'seconds', lambda device, run: (run(), next(clock))[1])
    assert (
        bench(
            peer='peer',
            batch_sizes='2',
            caches='dense',
            new_tokens=10,
            prompt_tokens=3,
            peer_new_tokens=5,
            peer_repeats=3,
            repeats=3,
        )
        == 0
    )
    theirs, ours = rows_of('texts')
    assert (theirs['model'], theirs['new_tokens'], theirs['step_us']) == (
        'nanoGPT',
        5,
        6e6,
    ) and theirs['tok_per_s'] == pytest.approx(2 / 6)
    assert (
        ours['model'],
        ours['against'],
        ours['new_tokens'],
        ours['step_us'],
        ours['step_us_most'],
    ) == ('mha', 'nanoGPT', 10, 2e5, 4e5)
    assert [ours[key] for key in ('ratio', 'ratio_least', 'ratio_most')] == pytest.approx(
        [6 / 0.2, 4 / 0.4, 8 / 0.1]
    )
    assert ours['sampling'] == dict(temperature=0.8, top_k=200)
    out = capsys.readouterr().out
    assert '30.0 x nanoGPT (10.0 to 80.0)' in out and 'number of parameters' not in out


@pytest.mark.slow
def test_transformers_writes_exactly_what_was_asked():
    pytest.importorskip('transformers')
    who, generate = peers.generator(
        'transformers',
        dict(block_size=32, n_layer=1, n_head=2, n_embd=16),
        64,
        torch.device('cpu'),
        torch.float32,
    )
    idx = torch.randint(64, (3, 4))
    longer = generate(idx, 20)
    assert who == 'transformers' and longer.shape == (3, 24) and longer[:, :4].equal(idx)


# ---------------------------------------------------------------------------------------------------
# attention alone


def held(
    shape, lengths=(40, 23, 64), size=64, layout='dense', dtype='float32', page_size=16, seed=0
):
    return attention_meter.Held(
        shape,
        list(lengths),
        size,
        layout,
        dtype,
        page_size,
        torch.float32,
        torch.device('cpu'),
        seed,
    )


@pytest.mark.parametrize('shape', ['4:4:8', '4:2:8', '4:1:8', '3:16+4'])
@pytest.mark.parametrize(
    'candidate', [c for c in attention_meter.CANDIDATES if c.name != 'Triton'], ids=lambda c: c.name
)
@settings(max_examples=2, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    page_size=st.sampled_from([16, 64]),
    data=st.data(),
)
def test_candidates_are_the_reference(candidate, shape, lengths, page_size, data):
    layout, dtype = (
        data.draw(st.sampled_from(candidate.layouts)),
        data.draw(
            st.sampled_from([d for d in candidate.dtypes if d not in ('bfloat16', 'float16')])
        ),
    )
    inputs = held(shape, lengths, 64, layout, dtype, page_size)
    result = candidate.make(inputs)()
    assert result.shape[:3] == (len(lengths), inputs.H, 1)
    torch.testing.assert_close(result[0, :, 0], inputs.reference(), rtol=1e-4, atol=1e-5)


def test_the_reference_is_attention():
    inputs = held('4:2:8')
    k, v = (
        x.unflatten(-1, (2, 8)).transpose(0, 1).repeat_interleave(2, dim=0)
        for x in inputs.first.values()
    )
    expected = torch.nn.functional.scaled_dot_product_attention(inputs.q[0], k, v)
    torch.testing.assert_close(inputs.reference(), expected[:, 0], rtol=1e-5, atol=1e-6)


def test_pages_are_shuffled_and_lengths_real():
    inputs = held('4:4:8', layout='paged')
    pages = [page for pages in inputs.cache.pages_of_row for page in pages]
    assert (
        len(pages) == 3 + 2 + 4 == len(set(pages))
        and pages != sorted(pages)
        and inputs.cache.lengths.tolist() == [40, 23, 64]
    )


@pytest.mark.parametrize(
    'shape, dtype, expected',
    [
        ('4:2:8', 'float32', 127 * 2 * 16 * 4),
        ('4:2:8', 'bfloat16', 127 * 2 * 16 * 2),
        ('4:16+4', 'float32', 127 * 20 * 4),
        ('4:16+4', 'int8', 127 * (16 * 4 + 4 * 4)),  # all within the window: full precision
        ('4:64+4', 'int4', (150 - 128) * (32 + 4) + 128 * 64 * 4 + 150 * 4 * 4),
    ],
)
def test_bytes_are_those_of_the_tokens_that_are_held(shape, dtype, expected):
    inputs = held(shape, [150], 160, dtype=dtype) if dtype == 'int4' else held(shape, dtype=dtype)
    assert inputs.nbytes == expected


def test_attention_rows(monkeypatch, capsys):
    monkeypatch.setattr(attention_meter, 'copy_bandwidth', lambda device, repeats: 1e9)
    assert (
        bench(
            attention_only=True,
            contexts='32',
            batch_sizes='2',
            repeats=1,
            timed_steps=1,
            attention_shapes='2:1:8,2:16+4',
            cache_dtypes='auto,int8',
            ragged=True,
        )
        == 0
    )
    rows = rows_of('attention')
    assert {row['candidate'] for row in rows} == {c.name for c in attention_meter.CANDIDATES}
    for row in rows:
        if row['candidate'] == 'Triton':
            assert row['reason'] == 'Triton and a CUDA GPU are needed'
        else:
            assert (
                row['reason'] == ''
                and row['error'] < 1e-3
                and row['copies'] == 2
                and row['kernel_us_least'] <= row['kernel_us'] <= row['kernel_us_most']
            )
            assert row['bandwidth_percent'] == pytest.approx(
                100 * row['bytes'] / row['kernel_us'] * 1e6 / row['bandwidth']
            )
    out, err = capsys.readouterr()
    assert err == '' and 'a copy runs at' in out and Path('out-bench/attention.csv').exists()


def test_candidates_are_chosen_by_words_of_their_names():
    assert [c.name for c in attention_meter.named('Triton,gathered')] == [
        'Triton',
        'SDPA, pages gathered',
    ]
    assert attention_meter.named('') == attention_meter.CANDIDATES


def test_a_candidate_that_is_wrong_or_fails_is_a_row(monkeypatch):
    def broken(inputs):
        raise ZeroDivisionError('no such\nkernel')

    made = [
        attention_meter.Candidate(name, ('kv',), ('dense',), ('float32',), make)
        for name, make in (
            ('zeros', lambda inputs: lambda: torch.zeros_like(inputs.q)),
            ('nan', lambda inputs: lambda: inputs.q * math.nan),
            ('broken', broken),
            ('right', attention_meter.sdpa_dense),
        )
    ]
    monkeypatch.setattr(attention_meter, 'CANDIDATES', made)
    assert bench(attention_only=True, attention_shapes='2:2:8', contexts='16', batch_sizes='1') == 0
    zeros, nan, broken_row, right = rows_of('attention')
    assert (
        zeros['reason'] == 'wrong: 100.0 % off the fp32 reference'
        and 'kernel_us' not in zeros
        and nan['reason'].startswith('wrong: nan')
    )
    assert (
        broken_row['reason'] == 'ZeroDivisionError: no such kernel'
        and right['reason'] == ''
        and right['kernel_us'] > 0
    )


# ---------------------------------------------------------------------------------------------------
# labels, and what is wrong


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.001, 0.2))
def test_labels_keep_their_order_and_their_distance(heights, apart):
    placed = decode_figures.spaced(heights, apart)
    room = min(apart, 1 / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    assert all(placed[b] - placed[a] >= room - 1e-9 for a, b in zip(order, order[1:])) and all(
        -1e-9 <= at <= 1 + 1e-9 for at in placed
    )
    if all(heights[b] - heights[a] >= room for a, b in zip(order, order[1:])):
        assert placed == pytest.approx(heights)


def test_lines_that_meet_share_a_label():
    ends = {
        ('mha', 'dense'): 0.5,
        ('mha', 'paged'): 0.51,
        ('mla', 'dense'): 0.1,
        ('mla', 'paged'): 0.3,
        ('mha', 'none'): 0.9,
        ('mla', 'none'): 0.91,
    }
    assert [
        (label['model'], label['caches']) for label in decode_figures.labels_of(ends, 0.04)
    ] == [('', ['none']), ('mha', ['dense', 'paged']), ('mla', ['dense']), ('mla', ['paged'])]


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(models='mha,rnn'), "--models=mha,rnn: 'rnn' is not known: use mha, gqa"),
        (dict(models='gqa:3'), "'gqa:3' with n_head=4"),
        (dict(models='mla:64'), "'mla:64': write gqa:4"),
        (dict(models='mha:2'), "'mha:2': write gqa:4"),
        (
            dict(caches='dense,ring'),
            "--caches=dense,ring: 'ring' is not known: use none, dense, paged",
        ),
        (dict(cache_dtypes='int2'), "--cache_dtypes=int2: 'int2' is not known"),
        (dict(contexts='5'), 'the cache is too small'),
        (dict(contexts='64,x'), '--contexts=64,x: write whole numbers'),
        (dict(batch_sizes='0'), '--batch_sizes=0: write whole numbers'),
        (dict(page_size=32), 'page_size=32 is not supported: use 16, 64, 128'),
        (dict(peer='nowhere'), '--peer=nowhere is no checkout of nanoGPT'),
        (dict(peer='transformers,nowhere'), '--peer=nowhere is no checkout of nanoGPT'),
        (dict(peer='transformers', caches='none'), '--peer times whole texts decoded with a cache'),
        (dict(peer='transformers', new_tokens=2000), 'are beyond block_size=1024'),
        (dict(new_tokens=0), 'new_tokens=0 must be at least 1'),
        (
            dict(attention_only=True, candidates='sdpa,cudnn'),
            "--candidates=sdpa,cudnn: 'cudnn' is part of no name",
        ),
        (
            dict(attention_only=True, attention_shapes='12:64'),
            "--attention_shapes: '12:64' is none",
        ),
        (
            dict(attention_only=True, attention_shapes='12:5:64'),
            "--attention_shapes: '12:5:64' is none",
        ),
        (dict(warmup_steps=-1), 'warmup_steps=-1 must be at least 0'),
        (dict(out_dir='file/x'), '--out_dir=file/x cannot be made'),
        (dict(keep=True, out_dir='bad'), 'holds no rows of JSON'),
    ],
    ids=lambda value: ' '.join(map(str, value.values())) if isinstance(value, dict) else '',
)
def test_what_is_wrong_is_told_in_one_line(given, message, capsys):
    Path('file').write_text('')
    Path('bad').mkdir()
    Path('bad/decode.jsonl').write_text('no json\n')
    assert bench(**given) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and err.count('\n') == 1, err[-2000:]
    assert not Path('out-bench').exists()


def test_transformers_that_is_missing_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert (
        bench(peer='transformers') == 2
        and 'transformers, which is not installed: pip install' in capsys.readouterr().err
    )


def test_the_shapes_of_models():
    plan = decode_meter.Plan.__new__(decode_meter.Plan)
    plan.config = dict(models='', n_head=12)
    assert plan.describe('gqa') == ('mha', dict(n_kv_head=4)) and plan.describe('gqa:6') == (
        'mha',
        dict(n_kv_head=6),
    )
    assert plan.describe('mqa') == ('mha', dict(n_kv_head=1)) and plan.describe('mla:256+32') == (
        'mla',
        dict(n_kv_head=0, kv_lora_rank=256, qk_rope_head_dim=32),
    )
    plan.config = dict(models='gqa', n_head=2)
    with pytest.raises(UserError, match='GQA has fewer'):
        plan.describe('gqa')


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    big = dict(device='cuda', n_embd=256, kv_lora_rank=128, qk_rope_head_dim=32, contexts='64,256')
    assert bench(**big, cache_dtypes='auto,int8') == 0
    for row in rows_of()[:-4]:
        assert (
            row['reason'] == ''
            and row['step_us'] > 0
            and row['peak_reserved']
            >= row['peak_allocated']
            >= row['step_peak_allocated']
            > row['allocated_before']
        )
    assert (
        bench(
            **big | dict(contexts='1024', batch_sizes='8'),
            attention_only=True,
            cache_dtypes='auto,int8,int4',
            attention_shapes='12:12:64,12:4:64,16:256+32',
        )
        == 0
    )
    rows = rows_of('attention')
    assert not [row for row in rows if row['reason'].startswith('wrong')] and {
        row['candidate'] for row in rows if row['reason'] == ''
    } >= {'SDPA', 'SDPA, pages gathered', 'Triton'}
