"""The picture of a conversion: a bar for each model that was kept, layers counted from 0."""

from types import SimpleNamespace

import pytest

from nanomla.conversion.report import Report, Row, draw_report
from nanomla.core import figures


@pytest.mark.draws
def test_a_fit_that_was_undone_has_no_bar_and_layers_count_from_0(monkeypatch):
    rows = [
        Row('MHA (the source)', 256, 1.0, 2.7, color='mha'),
        Row('fit undone: calibrate on more text', 64, 9.0, 8103.0, color=''),
        Row('MLA, rank 8 + 8 (attention)', 64, 1.1, 3.0, saved=0.75, color='mla'),
    ]
    layers = [dict(energy=0.9, rank=8), dict(energy=0.8, rank=8), dict(energy=0.7, rank=8)]
    settings = SimpleNamespace(low_rank='attention', rope='turn', rope_heads='shared')
    drawn = []
    monkeypatch.setattr(figures, 'save', lambda fig, *_: drawn.append(fig))
    draw_report(Report('src', settings, rows=rows, layers=layers), 'a.png', 'facts')
    left, right = drawn[0].axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ['MHA\n(the source)', 'MLA, rank 8 + 8\n(attention)']
    assert len(left.patches) == 2
    assert list(right.lines[0].get_xdata()) == [0, 1, 2]
