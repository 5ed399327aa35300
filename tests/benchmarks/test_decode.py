"""Decode steps: complete rows, bytes by the formula, crossings, fragmentation, lack of memory."""

import csv
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.benchmarks import decode
from nanomla.checkpoints import native
from nanomla.core import timing
from nanomla.inference.cache import Cache, CacheOptions
from nanomla.inference.quantize import BITS, FULL

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch, request):
    if 'draws' not in request.keywords:  # a picture takes a second
        from nanomla.benchmarks import figures

        monkeypatch.setattr(figures, 'draw_steps', lambda *_: None)


def cells_of(rows):
    return [row for row in rows if row['what'] == 'cell']


# -------------------------------------------------------------------------------------------------
# rows


@pytest.mark.draws
def test_every_configuration_is_a_complete_row(bench, rows_of, capsys):
    assert bench(models='mha,gqa,mla:8+2', cache_dtypes='auto,int8', batch_sizes='2') == 0
    rows = rows_of()
    cells = cells_of(rows)
    expected = []
    caches = ['none none', 'dense auto', 'dense int8', 'paged auto', 'paged int8']
    for model in ('mha', 'gqa', 'mla:8+2'):
        for cache in caches:
            expected += [(model, *cache.split(), 16), (model, *cache.split(), 32)]
    names = ('model', 'cache', 'cache_dtype', 'context')
    assert [tuple(row[name] for name in names) for row in cells] == expected
    for row in cells:
        check_row(row)
    by = {(row['model'], row['cache'], row['cache_dtype']): row for row in cells}
    in_fp32 = {'mha': 2 * 2 * 32 * 4, 'gqa': 2 * 2 * 16 * 4, 'mla:8+2': 2 * (8 + 2) * 4}
    shapes = {'mha': '4:4:8', 'gqa': '4:2:8', 'mla:8+2': '4:8+2'}
    for model in shapes:
        assert by[model, 'dense', 'auto']['bytes_per_token'] == in_fp32[model]
        assert by[model, 'none', 'none']['shape'] == shapes[model]
    assert by['mha', 'paged', 'auto']['cache_bytes'] == 2 * 64 * 512  # a page of 64 each
    with open('out-bench/decode.csv') as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert [row['step_us'] for row in table[:30]] == [str(row['step_us']) for row in cells]
    for picture in ('latency', 'memory'):
        assert Path(f'out-bench/{picture}.png').read_bytes().startswith(b'\x89PNG')
    pages = [row['page_size'] for row in rows if row['what'] == 'fragmentation']
    assert pages == [None, 16, 64, 128]
    out, err = capsys.readouterr()
    assert err == ''
    for text in ('[30/30]', 'with auto pages takes', 'a dense auto cache', '% lost'):
        assert text in out


def check_row(row):
    assert row['reason'] == ''
    assert row['commit'] == 'abc1234'
    assert row['torch'] == torch.__version__
    assert row['dtype'] == 'float32'
    assert row['batch'] == 2
    assert row['step_us_least'] <= row['step_us'] <= row['step_us_most']
    assert row['prefill_ms_least'] <= row['prefill_ms'] <= row['prefill_ms_most']
    assert row['decode_tok_per_s'] == pytest.approx(2 / row['step_us'] * 1e6)
    prefilled = 2 * row['context']
    assert row['prefill_tok_per_s'] == pytest.approx(prefilled / row['prefill_ms'] * 1e3)
    assert row['peak_allocated'] > 0
    assert row['parameters'] > 0
    assert row['weight_bytes'] == 4 * row['parameters']
    if row['cache'] != 'none':
        assert row['bytes_per_token'] == pytest.approx(row['bytes_per_token_formula'])


def test_as_many_tokens_are_decoded_as_it_says():
    decoded = []

    def tokens():
        for i in range(100):
            decoded.append(i)
            yield i

    work = decode.Work(prefill=None, tokens=tokens(), chunk=0, warmup=3, steps=4)
    times = decode.time_tokens(CPU, work, repeats=5)
    assert len(times) == 5
    assert len(decoded) == 1 + 3 + 4 * 5


def test_the_context_is_full_in_the_end(bench, monkeypatch):
    """The last timed step writes the last slot of its cache, and needs no more."""
    made = []
    of = Cache.of.__func__

    def remember(cls, *arguments, **options):
        made.append(of(cls, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(Cache, 'of', classmethod(remember))
    assert bench(models='mla', caches='paged', contexts='20', batch_sizes='3') == 0
    assert made[0].used == [20, 20, 20]


def test_what_runs_out_of_memory_is_reported_and_the_others_go_on(bench, rows_of, capsys):
    assert bench(models='mha', caches='none,dense', contexts=f'16,{10**15}', batch_sizes='1') == 0
    cells = cells_of(rows_of())
    reasons = [row['reason'].partition(':')[0] for row in cells]
    assert reasons == ['', 'out of memory', '', 'out of memory']
    assert 'step_us' in cells[2]
    assert 'step_us' not in cells[3]
    out, err = capsys.readouterr()
    assert err == ''
    assert out.count('out of memory') == 3  # and the contiguous buffers


def test_a_row_that_is_there_is_kept(bench, rows_of, monkeypatch, capsys):
    measured, measure = [], decode.time_configuration

    def remember(plan, model, configuration):
        measured.append(configuration)
        return measure(plan, model, configuration)

    monkeypatch.setattr(decode, 'time_configuration', remember)
    small = dict(models='mha', caches='dense', batch_sizes='1')
    assert bench(**small, contexts='16') == 0
    assert bench(**small, contexts='16,32', keep=True) == 0
    assert measured == [
        decode.Configuration('mha', 'dense', 'auto', 1, 16),
        decode.Configuration('mha', 'dense', 'auto', 1, 32),
    ]
    assert '(kept)' in capsys.readouterr().out
    assert [row['context'] for row in cells_of(rows_of())] == [16, 32]
    assert bench(**small, contexts='16') == 0
    assert len(measured) == 3  # without --keep all is measured anew


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def wrong():
        raise RuntimeError('shapes differ')

    with pytest.raises(RuntimeError, match='shapes differ'):
        timing.attempt(wrong, CPU)


def test_a_checkpoint_is_measured_as_it_is(bench, rows_of, tiny):
    model = tiny('mla', block_size=24, vocab_size=100)
    checkpoint = dict(kind='mla', model=model.state_dict(), model_args=native.model_args(model))
    native.save('run/ckpt.pt', checkpoint)
    assert bench(models='run', batch_sizes='1', caches='dense') == 0
    cells = cells_of(rows_of())
    assert [row['shape'] for row in cells] == ['4:12+4'] * 2
    reasons = [row['reason'] for row in cells]
    assert reasons == ['', 'the context is beyond block_size=24']


LAYERS = st.lists(
    st.dictionaries(st.sampled_from(['k', 'v', 'c_kv', 'k_pe']), st.integers(1, 100), min_size=1),
    min_size=1,
    max_size=3,
)
OPTIONS = st.builds(
    CacheOptions,
    layout=st.sampled_from(['dense', 'paged']),
    dtype=st.sampled_from(['auto', *FULL, *BITS]),
    page_size=st.sampled_from([16, 64, 128]),
    window=st.sampled_from([0, 7, 128]),
)


@settings(max_examples=25, deadline=None)
@given(LAYERS, st.integers(1, 5), st.integers(1, 140), st.sampled_from([*FULL.values()]), OPTIONS)
def test_the_formula_is_what_the_buffers_take(dims, rows, size, full, options):
    cache = Cache(dims, rows, size, full, **vars(options))
    assert decode.formula_bytes(dims, rows, size, full, options) == cache.nbytes


# -------------------------------------------------------------------------------------------------
# what the rows say


@pytest.mark.parametrize(
    'plain, cached, found',
    [
        ({64: 1, 256: 4}, {64: 2, 256: 2}, ('from', 128)),  # log-log lines meet in the middle
        ({64: 3, 256: 4}, {64: 2, 256: 2}, ('always', 64)),
        ({64: 1, 256: 1}, {64: 2, 256: 2}, ('never', 256)),
        ({64: 1, 256: 2}, {64: 2, 256: 2}, ('never', 256)),  # as fast does not pay
        # for good, not the first time
        ({16: 4, 64: 1, 256: 4}, {16: 2, 64: 2, 256: 2}, ('from', 128)),
        # common lengths alone
        ({32: 9, 64: 1, 256: 4, 512: 9}, {64: 2, 256: 2, 1024: 2}, ('from', 128)),
    ],
    ids=str,
)
def test_where_a_cache_begins_to_pay(plain, cached, found):
    word, length = decode.crossing(plain, cached)
    assert word == found[0]
    assert length == pytest.approx(found[1])


def test_no_common_length_says_nothing():
    assert decode.crossing({}, {64: 1}) is None


def test_the_summary_of_rows_made_by_hand():
    def row(cache, context, us, reason='', kernel=None):
        return dict(
            what='cell',
            model='mla',
            batch=8,
            cache=cache,
            cache_dtype='none' if cache == 'none' else 'int4',
            context=context,
            step_us=us,
            reason=reason,
            decode_kernel=kernel,
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
        row('paged', 256, 5, kernel='flex'),
    ]
    assert decode.summary(rows) == [
        'mla, batch 8: a dense int4 cache pays from 128 tokens on',
        'mla, batch 8: a paged int4 cache pays from 169 tokens on',
        'mla, batch 8: a step with int4 pages takes 1.50 x dense at 64, 1.25 x dense at 256',
        'mla, batch 8: a paged int4 (flex) cache does not pay up to 256 tokens',
    ]


def test_fragmentation_of_a_batch_made_by_hand():
    dims, lengths = [dict(k=4, v=4)], [1, 16, 17]  # 32 bytes a token
    rows = decode.fragmentation(dims, lengths, 64, torch.float32, CPU)
    slots = [3 * 64, 4 * 16, 3 * 64, 3 * 128]
    assert [row['allocated_bytes'] for row in rows] == [32 * n for n in slots]
    assert {row['used_bytes'] for row in rows} == {32 * 34}
    lost = [100 * (1 - 34 / n) for n in slots]
    assert [row['lost_percent'] for row in rows] == pytest.approx(lost)
    saved = [100 * (1 - n / 192) for n in slots]
    assert [row['saved_percent'] for row in rows] == pytest.approx(saved)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 10000), st.integers())
def test_mixed_lengths_stay_inside(batch, longest, seed):
    lengths = decode.mixed_lengths(batch, longest, seed)
    assert len(lengths) == batch
    assert min(lengths) >= 1
    assert max(lengths) <= longest
    assert lengths == decode.mixed_lengths(batch, longest, seed)


def test_a_profile_names_the_operations_of_a_step(bench, capsys):
    assert bench(models='mla', caches='dense', batch_sizes='2', contexts='16', profile=True) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith('operations take '))
    shares = [
        line for line in lines[first + 1 :] if re.fullmatch(r' +[\d.]+% .* µs .* x  .*', line)
    ]
    assert any('mm' in line for line in shares)
    assert sum(float(line.split('%')[0]) for line in shares) < 101


@pytest.mark.gpu
def test_on_a_gpu(bench, rows_of):
    big = dict(device='cuda', n_embd=256, kv_lora_rank=128, qk_rope_head_dim=32, contexts='64,256')
    assert bench(**big, cache_dtypes='auto,int8') == 0
    for row in cells_of(rows_of()):
        assert row['reason'] == ''
        assert row['step_us'] > 0
        assert row['peak_reserved'] >= row['peak_allocated'] >= row['step_peak_allocated']
        assert row['step_peak_allocated'] > row['allocated_before']
