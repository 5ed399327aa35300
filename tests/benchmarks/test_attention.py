"""One layer's decode attention: candidates against the reference, bytes, rows."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.benchmarks import attention

CPU = torch.device('cpu')
ON_CPU = [candidate for candidate in attention.CANDIDATES if candidate.name != 'Triton']


def inputs_of(shape, lengths=(40, 23, 64), size=64, layout='dense', dtype='float32', page_size=16):
    case = attention.Case(
        attention.read_shape(shape), list(lengths), size, layout, dtype, page_size
    )
    return attention.AttentionInputs(case, torch.float32, CPU, seed=0)


@pytest.mark.parametrize('shape', ['4:4:8', '4:2:8', '4:1:8', '3:16+4'])
@pytest.mark.parametrize('candidate', ON_CPU, ids=lambda candidate: candidate.name)
@settings(max_examples=2, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    page_size=st.sampled_from([16, 64]),
    data=st.data(),
)
def test_candidates_are_the_reference(candidate, shape, lengths, page_size, data):
    dtypes = [name for name in candidate.dtypes if name not in ('bfloat16', 'float16')]
    layout = data.draw(st.sampled_from(candidate.layouts))
    dtype = data.draw(st.sampled_from(dtypes))
    inputs = inputs_of(shape, lengths, 64, layout, dtype, page_size)
    result = candidate.make(inputs)()
    assert result.shape[:3] == (len(lengths), inputs.shape.heads, 1)
    torch.testing.assert_close(result[0, :, 0], inputs.reference(), rtol=1e-4, atol=1e-5)


def test_the_reference_is_attention():
    inputs = inputs_of('4:2:8')
    k, v = (x.unflatten(-1, (2, 8)).transpose(0, 1) for x in inputs.seen.values())
    expected = torch.nn.functional.scaled_dot_product_attention(inputs.q[0], k, v, enable_gqa=True)
    torch.testing.assert_close(inputs.reference(), expected[:, 0], rtol=1e-5, atol=1e-6)


def test_pages_are_shuffled_and_lengths_real():
    inputs = inputs_of('4:4:8', layout='paged')
    pages = [page for of_row in inputs.cache.pages_of_row for page in of_row]
    assert len(pages) == len(set(pages)) == 3 + 2 + 4
    assert pages != sorted(pages)
    assert inputs.cache.lengths.tolist() == [40, 23, 64]


@pytest.mark.parametrize(
    'shape, dtype, lengths, expected',
    [
        ('4:2:8', 'float32', (40, 23, 64), 127 * 2 * 16 * 4),
        ('4:2:8', 'bfloat16', (40, 23, 64), 127 * 2 * 16 * 2),
        ('4:16+4', 'float32', (40, 23, 64), 127 * 20 * 4),
        # all within the window: full precision
        ('4:16+4', 'int8', (40, 23, 64), 127 * (16 * 4 + 4 * 4)),
        ('4:64+4', 'int4', [150], (150 - 128) * (32 + 4) + 128 * 64 * 4 + 150 * 4 * 4),
    ],
)
def test_bytes_are_those_of_the_cached_tokens(shape, dtype, lengths, expected):
    size = 160 if dtype == 'int4' else 64
    assert inputs_of(shape, lengths, size, dtype=dtype).nbytes == expected


def test_every_candidate_is_a_row(bench, rows_of, monkeypatch, capsys):
    monkeypatch.setattr(attention, 'copy_bandwidth', lambda device, repeats: 1e9)
    small = dict(contexts='32', batch_sizes='2', repeats=1, timed_steps=1)
    shapes = dict(attention_shapes='2:1:8,2:16+4', cache_dtypes='auto,int8', ragged=True)
    assert bench(attention_only=True, **small, **shapes) == 0
    rows = rows_of('attention')
    names = {candidate.name for candidate in attention.CANDIDATES}
    assert {row['candidate'] for row in rows} == names
    for row in rows:
        if row['candidate'] == 'Triton':
            assert row['reason'] == 'Triton and a CUDA GPU are needed'
            continue
        assert row['reason'] == ''
        assert row['error'] < 1e-3
        assert row['copies'] == 2
        assert row['kernel_us_least'] <= row['kernel_us'] <= row['kernel_us_most']
        speed = row['bytes'] / row['kernel_us'] * 1e6
        assert row['bandwidth_percent'] == pytest.approx(100 * speed / row['bandwidth'])
    out, err = capsys.readouterr()
    assert err == ''
    assert 'a copy runs at' in out
    assert Path('out-bench/attention.csv').exists()


def test_candidates_are_chosen_by_words_of_their_names():
    chosen = attention.choose_candidates('Triton,gathered')
    assert [candidate.name for candidate in chosen] == ['Triton', 'SDPA, pages gathered']
    assert attention.choose_candidates('') == attention.CANDIDATES


def test_a_candidate_that_is_wrong_or_fails_is_reported(bench, rows_of, monkeypatch):
    def zeros(inputs):
        return lambda: torch.zeros_like(inputs.q)

    def nan(inputs):
        return lambda: inputs.q * math.nan

    def broken(inputs):
        raise ZeroDivisionError('no such\nkernel')

    makers = dict(zeros=zeros, nan=nan, broken=broken, right=attention.sdpa_dense)
    candidates = [
        attention.Candidate(name, ('dense',), ('float32',), make) for name, make in makers.items()
    ]
    monkeypatch.setattr(attention, 'CANDIDATES', candidates)
    small = dict(attention_shapes='2:2:8', contexts='16', batch_sizes='1')
    assert bench(attention_only=True, **small) == 0
    rows = {row['candidate']: row for row in rows_of('attention')}
    assert rows['zeros']['reason'] == 'wrong: 100.0 % off the fp32 reference'
    assert 'kernel_us' not in rows['zeros']
    assert rows['nan']['reason'].startswith('wrong: nan')
    assert rows['broken']['reason'] == 'ZeroDivisionError: no such kernel'
    assert rows['right']['reason'] == ''
    assert rows['right']['kernel_us'] > 0


@pytest.mark.gpu
def test_on_a_gpu(bench, rows_of):
    settings = dict(
        device='cuda',
        attention_only=True,
        contexts='1024',
        batch_sizes='8',
        cache_dtypes='auto,int8,int4',
        attention_shapes='12:12:64,12:4:64,16:256+32',
    )
    assert bench(**settings) == 0
    rows = rows_of('attention')
    assert not [row for row in rows if row['reason'].startswith('wrong')]
    ran = {row['candidate'] for row in rows if row['reason'] == ''}
    assert ran >= {'SDPA', 'SDPA, pages gathered', 'Triton'}
