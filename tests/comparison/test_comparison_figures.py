"""The pictures of a comparison: drawn of whatever there is, and readable."""

from pathlib import Path

import pytest
from made_up_results import made_up
from matplotlib.figure import Figure

from nanomla.comparison.figures import colors, draw, draw_front, name_points, outliers, pareto
from nanomla.comparison.table import front, rows
from nanomla.core import figures


def test_what_lies_far_above_the_others_is_not_drawn_to_scale():
    def far(*losses):
        return outliers([dict(name=str(i), val_loss=loss) for i, loss in enumerate(losses)])

    assert far(1.40, 1.593, 1.41, None, 1.43, 1.42, 1.7) == {'1', '6'}
    assert far(1.40, 1.5, 1.41, 1.43, 1.42) == set()
    assert far(1.40, 1.9, 1.41) == set()
    assert far(1.4, 1.4, 1.4, 1.4, 1.5) == set()


MANY = {'mha': [1.5] * 3} | {f'mla{i}': [1.51 + i / 100] * 3 for i in range(9)}


@pytest.mark.parametrize(
    'losses',
    [
        dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]),
        dict(mha=[1.5, None, None], mla=[None] * 3),
        dict(mha=[None] * 3),
        dict(mha=[], mla=[]),
        MANY,
        {f'mla{i}': [1.5 + i * i / 100] * 3 for i in range(14)},
    ],
    ids=['two', 'one seed', 'none', 'stopped', 'ten', 'fourteen'],
)
def test_a_figure_is_drawn_of_whatever_there_is(losses, tmp_path):
    results = made_up(losses)
    draw(results, tmp_path / 'a.png')
    draw_front([results], tmp_path / 'front.png')
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b'\x89PNG')


def test_comparisons_are_drawn_together(tmp_path):
    unfinished = made_up(dict(mha=[1.5, None, None], mla=[None] * 3, other=[]))
    draw_front([unfinished, made_up(MANY)], tmp_path / 'several.png')
    assert (tmp_path / 'several.png').read_bytes().startswith(b'\x89PNG')


def test_a_legend_names_contenders_without_a_speed_too(monkeypatch):
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    for run in results.runs:
        run['tok_per_s'] = 1000
        run['shared'] = run['contender'] == 'mla'
    labels = []

    def keep_labels(fig, *_, **__):
        for ax in fig.axes:
            if ax.get_legend():
                labels.append([text.get_text() for text in ax.get_legend().get_texts()])

    monkeypatch.setattr(figures, 'save', keep_labels)
    draw(results, Path('a.png'))
    assert ['MHA', 'MLA'] in labels


@pytest.mark.parametrize('number', [6, 30])
def test_names_of_points_cover_no_point_and_are_left_out_where_there_are_too_many(number):
    results = made_up({f'mla{i}': [1.5 + 0.001 * (i % 5)] * 3 for i in range(number)})
    for i, about in enumerate(results.contenders.values()):
        about['cache_bytes'] = int(1024 * 1.33 ** (i % 6))
    found, paint = rows(results), colors(results.contenders)
    fig = Figure(figsize=(11, 5))
    ax = fig.add_subplot()
    pareto(ax, found, paint)
    name_points(ax, found, paint, 4)
    fig.canvas.draw()
    expected = {
        row['label']
        for row in found
        if number == 6 or row['control'] or row['name'] in front(found)
    }
    assert {text.get_text() for text in ax.texts} == expected
    if number == 6:
        boxes = [text.get_window_extent() for text in ax.texts]
        for row in found:
            x, y = ax.transData.transform((row['cache_bytes'], row['val_loss']))
            assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)
