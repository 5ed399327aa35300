"""The pictures of a comparison: drawn of whatever there is, and readable."""

import itertools
from pathlib import Path

import pytest
from made_up_results import made_up
from matplotlib.figure import Figure

from nanomla.comparison.figures import (
    CacheGroups,
    Picture,
    colors,
    draw,
    draw_front,
    name_points,
    number_sides,
    outliers,
    pareto,
    spread,
)
from nanomla.comparison.table import rows
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
        {f'mla{i}': [None] * 3 for i in range(14)},
    ],
    ids=['two', 'one seed', 'none', 'stopped', 'ten', 'fourteen', 'fourteen without losses'],
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


def panel(results, **options):
    """Return the axes of the losses over the cache, with names, and the rows."""
    found, paint = rows(results), colors(results.contenders)
    ax = Figure(figsize=(11, 5)).add_subplot()
    pareto(ax, found, paint, **options)
    if not options.get('compact'):  # a narrow panel has no names
        name_points(ax, found, paint, 4)
    ax.figure.canvas.draw()
    return ax, found


def of_caches(sizes):
    results = made_up({f'mla{i}': [1.5 + 0.001 * (i % 5)] * 3 for i in range(len(sizes))})
    for size, about in zip(sizes, results.contenders.values()):
        about['cache_bytes'] = size
    return results


def test_names_of_points_cover_no_point():
    ax, found = panel(of_caches([int(1024 * 1.33**i) for i in range(6)]))
    assert {text.get_text() for text in ax.texts} == {row['label'] for row in found}
    boxes = [text.get_window_extent() for text in ax.texts]
    for row in found:
        x, y = ax.transData.transform((row['cache_bytes'], row['val_loss']))
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)


def test_too_many_points_for_names_have_numbers_and_a_list():
    ax, found = panel(of_caches([1024] * 12 + [1152, 8192]))
    by_loss = sorted(found, key=lambda row: row['val_loss'])
    assert [text.get_text() for text in ax.texts] == [str(i) for i in range(1, 15)]
    listed = [text.get_text() for text in ax.get_legend().get_texts()]
    assert listed == [f'{i}  {row["label"]}' for i, row in enumerate(by_loss, 1)]
    list_begin = ax.get_legend().get_window_extent().x0
    assert all(text.get_window_extent().x1 < list_begin for text in ax.texts)
    for one, other in itertools.combinations(ax.texts, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())


def test_a_number_stands_where_it_covers_no_interval():
    def row(name, loss, sd):
        return dict(name=name, cache_bytes=1024, val_loss=loss, sd=sd, seeds=3)

    # Above the first the second one's interval begins, and below the second the first one's ends.
    known = [row('a', 1.0, 0.1), row('b', 1.5, 0.1)]
    assert number_sides(known, CacheGroups(known, set(), 6), (0, 4), 4) == dict(a=-1, b=1)


@pytest.mark.parametrize('number', [6, 14])
def test_points_of_one_cache_stand_beside_each_other(number):
    ax, found = panel(of_caches([1024] * number + [8192]), compact=number == 6)
    x = [ax.transData.transform(bar.lines[0].get_xydata()[0])[0] for bar in ax.containers]
    assert len(x) == len(found) == number + 1
    size = ax.containers[0].lines[0].get_markersize() * ax.figure.dpi / 72
    for one, other in itertools.pairwise(sorted(x)):
        assert other - one > size
    assert ax.bbox.x0 + size < min(x) and max(x) < ax.bbox.x1 - size


@pytest.mark.parametrize('compact', [False, True])
@pytest.mark.parametrize('sizes', [(3072, 4608, 36864), [int(512 * 1.3**i) for i in range(14)]])
def test_ticks_of_caches_do_not_touch(sizes, compact):
    ax, _ = panel(of_caches(sizes), compact=compact)
    ax.set_position([0.1, 0.2, (3.2 if compact else 7.4) / 11, 0.7])
    ax.figure.canvas.draw()
    labels = ax.get_xticklabels()
    assert len(labels) >= 3
    lower = [label.get_text().startswith('\n') for label in labels]
    for (one, first), (other, second) in itertools.combinations(zip(labels, lower), 2):
        if first == second:
            assert not one.get_window_extent().overlaps(other.get_window_extent())


def drawn(results, monkeypatch) -> Figure:
    kept = []
    monkeypatch.setattr(figures, 'save', lambda fig, *_, **__: kept.append(fig))
    draw(results, Path('a.png'))
    kept[0].canvas.draw()
    return kept[0]


def test_the_legend_of_the_front_does_not_touch_the_title(monkeypatch):
    fig = drawn(made_up(dict(mha=[1.5, 1.51, 1.52], mla=[1.54, 1.55, 1.56])), monkeypatch)
    (ax,) = [ax for ax in fig.axes if ax.get_title(loc='left').startswith('loss over cache')]
    legend, title = ax.get_legend(), ax._left_title
    assert not legend.get_window_extent().overlaps(title.get_window_extent())


def test_every_curve_of_many_has_a_label_at_its_end(monkeypatch):
    losses = {f'mla{i}': [1.5 + i / 1000] * 3 for i in range(14)} | dict(far=[2.0] * 3)
    ax = drawn(made_up(losses), monkeypatch).axes[0]
    labels = [text.get_text() for text in ax.texts]
    assert labels == [f'MLA{i}' for i in range(14)] + ['FAR: above, 2.000 at the end']
    boxes = [text.get_window_extent() for text in ax.texts]
    for below, above in itertools.pairwise(boxes):
        assert (below.y0 + below.y1) / 2 < above.y0


def test_labels_stand_as_near_as_there_is_room():
    assert spread([0.2, 0.5, 0.8], 0, 1) == [0.2, 0.5, 0.8]
    gap = 1 / 19
    assert spread([0.5, 0.5, 0.9], 0, 1) == pytest.approx([0.5 - gap / 2, 0.5 + gap / 2, 0.9])
    assert spread([0, 0, 1, 1], 0, 1) == pytest.approx(
        [gap / 2, 3 * gap / 2, 1 - 3 * gap / 2, 1 - gap / 2]
    )
    assert spread([], 0, 1) == []


def test_a_text_of_ones_own_is_named_by_its_file():
    note = Picture(made_up(dict(mha=[1.5] * 3), source='books.txt (your own text)')).note()
    assert note.startswith('books.txt · 100 steps')
