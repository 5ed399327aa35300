"""Pictures: labels keep apart and share where lines meet; the committed logs still draw."""

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.benchmarks import figures
from nanomla.core.files import read_jsonl


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.001, 0.2))
def test_labels_keep_their_order_and_their_distance(heights, apart):
    placed = figures.spaced(heights, apart)
    room = min(apart, 1 / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    pairs = list(zip(order, order[1:]))
    assert all(placed[b] - placed[a] >= room - 1e-9 for a, b in pairs)
    assert all(-1e-9 <= at <= 1 + 1e-9 for at in placed)
    if all(heights[b] - heights[a] >= room for a, b in pairs):
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
    labels = figures.labels_of(ends, 0.04)
    assert [label.text for label in labels] == [
        'all, no cache',
        'MHA dense, paged',
        'MLA dense',
        'MLA paged',
    ]


@pytest.mark.parametrize('value, text', [(1536, '1.5 KiB'), (2**30, '1 GiB'), (12, '12 B')])
def test_bytes_in_words(value, text):
    assert figures.memory_text(value) == text


@pytest.mark.parametrize('value, text', [(2e6, '2 s'), (1500, '1.5 ms'), (20, '20 µs')])
def test_microseconds_in_words(value, text):
    assert figures.time_text(value) == text


def test_a_later_row_of_a_line_replaces_the_earlier():
    def row(processes, ms):
        return dict(
            model='MLA', processes=processes, micro_batches=1, ms=ms, config=dict(batch_size=2)
        )

    lines = figures.scaling_lines([row(2, 5.0), row(1, 3.0), row(2, 4.0)])
    assert {line: [one['ms'] for one in rows] for line, rows in lines.items()} == {
        ('MLA', 2, 1): [3.0, 4.0]
    }


@pytest.mark.full_size
def test_the_committed_scaling_log_draws_the_committed_picture(tmp_path):
    rows = read_jsonl(ROOT / 'assets/logs/h200_scale.jsonl')
    figures.draw_scaling(rows, tmp_path / 'scale.png')
    assert png_size(tmp_path / 'scale.png') == png_size(ROOT / 'assets/scale_h200.png')


@pytest.mark.full_size
def test_the_committed_decode_log_draws_the_committed_picture(tmp_path):
    rows = read_jsonl(ROOT / 'assets/logs/h200_decode_steps.jsonl')
    figures.draw_latency(rows, tmp_path / 'latency.png')
    figures.draw_memory(rows, tmp_path / 'memory.png')
    committed = png_size(ROOT / 'assets/decode_h200.png')
    assert png_size(tmp_path / 'latency.png') == committed
    assert png_size(tmp_path / 'memory.png') == committed


@pytest.mark.parametrize(
    'caches, note',
    [
        (['dense', 'paged'], 'solid: dense cache · dashed: paged cache'),
        (['none', 'dense'], 'solid: dense cache · dotted: no cache'),
    ],
)
def test_the_note_explains_the_lines_that_are_drawn(caches, note):
    rows = [dict(cache=cache, step_us=1.0) for cache in caches]
    rows.append(dict(cache='none', step_us=None))
    quantity = figures.Quantity('', '', lambda row: row['step_us'], str, 10)
    assert quantity.note(rows) == note


def test_rows_of_several_kernels_are_not_mixed_in_a_line():
    rows = [
        dict(cache='none', cache_dtype='none'),
        dict(cache='paged', cache_dtype='auto', decode_kernel='auto'),
        dict(cache='paged', cache_dtype='auto', decode_kernel='flex'),
        dict(cache='paged', cache_dtype='int8', decode_kernel='auto'),
    ]
    assert figures.comparable(rows) == (rows[:2], 'auto')
    assert figures.comparable(rows[:1]) == (rows[:1], 'none')


def png_size(path):
    """Return width and height as the header of a png has them."""
    header = path.read_bytes()[:24]
    assert header.startswith(b'\x89PNG')
    return header[16:]
