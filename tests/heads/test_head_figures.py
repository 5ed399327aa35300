"""Figures of heads, drawn from a report or from its log."""

import json

import handmade
import pytest
import torch

from nanomla.core.files import ROOT, jsonl
from nanomla.heads import figures, report
from nanomla.heads.report import ReportSettings, examine

pytest.importorskip('matplotlib')
MADE = dict(command='python find_induction_heads.py', commit='0000000', date='2025-01-31')
LOGS = ROOT / 'assets/logs'


@pytest.fixture(scope='module')
def written():
    """A report with maps, curves and latents, as heads.jsonl holds it; read only."""
    text = torch.randint(1, handmade.V, (400,), generator=torch.Generator().manual_seed(0))
    subject = handmade.subject_of(handmade.by_hand('mla'), held_out=text)
    model = examine(subject, ReportSettings(texts=8, ablations='none'))
    model['latents'] = dict(
        variance=[[0.5, 1.0], [0.8, 1.0]],
        components_for_90_percent=[2, 2],
        likeness=[[1.0, 0.3], [0.3, 1.0]],
    )
    return dict(models=[model], checkpoints=[run('by-hand', 'MLA')], made=MADE)


def run(name, kind, **more):
    """A `checkpoints` entry with everything that its curves show."""
    series = dict.fromkeys(
        ('max_induction', 'max_previous', 'max_text', 'repeat_loss', 'control_loss'),
        [0.1, 0.4, 0.9],
    )
    series |= dict(text_repeat_loss=[3.0, 2.0, 1.0], text_control_loss=[3.0, 3.0, 3.0])
    series |= dict(step=[0, 10, 100], tokens=[0, 160, 1600], icl=[0.0, -0.1, -0.2])
    series |= dict(induction_heads=[0, 0, 1], text_heads=[0, 1, 1])
    return dict(name=name, kind=kind) | series | more


def figures_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob('*.png')}


def test_a_log_draws_the_figures_of_its_report(written, tmp_path):
    """Bit for bit: the log holds all that the figures show."""
    first, again = tmp_path / 'first', tmp_path / 'again'
    figures.draw_report(first, json.loads(json.dumps(written)))
    (tmp_path / 'heads.jsonl').write_text(jsonl(report.log_rows(written)))
    figures.draw_report(again, report.read_report(tmp_path / 'heads.jsonl'))
    assert set(figures_in(first)) == {'training.png', 'heads.png', 'latents.png'}
    assert figures_in(first) == figures_in(again)


def test_what_a_log_lacks_is_left_out(written, tmp_path):
    """An older log: some heads of a model, and no shares of its latents' variance."""
    model = {key: value for key, value in written['models'][0].items() if key != 'scores'}
    latents = {key: value for key, value in model['latents'].items() if key != 'variance'}
    older = written | dict(models=[model | dict(heads=[], latents=latents)])
    assert report.missing_scores(older) == [
        'no map of by-hand: the log holds 0 of its heads, not all'
    ]
    figures.draw_report(tmp_path, older)
    assert set(figures_in(tmp_path)) == {'training.png', 'latents.png'}


@pytest.mark.parametrize('layers', [2, 30])
def test_the_largest_score_can_be_read_in_a_map_of_many_layers(layers):
    from matplotlib.figure import Figure

    scores = []
    for layer in range(layers):
        induction = dict(score=layer / 100, control=0, gap=0)
        scores.append(dict(induction=induction, previous=dict(score=0), effective_copying=0))
    ax = Figure().subplots()
    figures.mark_largest(ax, dict(scores=scores, heads=1, layers=layers), 'induction', 2.4)
    (text,) = ax.texts
    assert text.get_text() == f'{(layers - 1) / 100:.2f}' and text.get_fontsize() >= 6


def test_seeds_of_a_study_are_drawn_as_a_study(tmp_path):
    runs = [run(f'mla-{seed}', 'MLA', variant='mla') for seed in (1, 2)]
    (path,) = figures.draw_report(tmp_path, dict(models=[], checkpoints=runs, made=MADE))
    assert path.name == 'study.png'


def test_runs_of_two_kinds_have_two_colours():
    looks = figures.looks_of([run('a/run', 'MHA'), run('b/run', 'MLA')])
    assert looks['a/run'].color == figures.kind_color('mha')
    assert looks['b/run'].color == figures.kind_color('mla')


def boxes_of(fig):
    """Return the box of a figure's legend and those of its axes and lines of text, in pixels."""
    fig.canvas.draw()
    (legend,) = fig.legends
    visible = [ax for ax in fig.axes if ax.get_visible()]
    others = [mark.get_window_extent() for mark in [*visible, *fig.texts]]
    return legend.get_window_extent(), others


@pytest.mark.parametrize(
    'names', [['mha', 'mla'], [f'a run with a long name {i}' for i in range(9)]]
)
def test_the_legend_of_curves_stands_outside_the_axes(names, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(figures.figures, 'save', lambda fig, *_, **__: saved.append(boxes_of(fig)))
    runs = [run(name, 'MLA') for name in names]
    figures.draw_training(runs, tmp_path / 'training.png', 'footer', 'title')
    ((legend, others),) = saved
    assert len(others) > 3
    for box in others:
        assert not legend.overlaps(box)


@pytest.mark.parametrize('log, call', [('induction_study', 1), ('induction_books', 3)])
def test_the_committed_figures_can_be_drawn_again(log, call):
    """Their logs hold what the curves show; see docs/induction_heads.md."""
    found = report.read_report(LOGS / f'{log}.jsonl', call)
    for entry in found['checkpoints']:
        assert len(entry['tokens']) == len(entry['max_induction']) == len(entry['repeat_loss'])
        assert entry['kind'] in ('MHA', 'MLA')


def test_the_committed_figure_of_latents_can_be_drawn_again():
    found = report.read_report(LOGS / 'induction_books.jsonl', 3)
    (latents,) = [model['latents'] for model in found['models'] if 'latents' in model]
    assert len(latents['components_for_90_percent']) == len(latents['likeness']) == 12
