"""The numbers of a comparison, against published tables and by their meaning; the table's text."""

import math
import re
import statistics

import pytest
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from made_up_results import made_up

from nanomla.comparison.table import (
    CONTENDER,
    HEAD,
    RUN,
    SCORED_RUN,
    front,
    interval,
    read,
    report,
    rows,
    t_quantile,
    table,
)
from nanomla.core.configurator import UserError
from nanomla.core.files import jsonl

LOGS = ROOT / 'assets' / 'logs'


def in_one_line(text):
    return ' '.join(text.split())


def table_lines(text):
    return [line for line in text.splitlines() if line.startswith('|')]


# -------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize(
    'freedom, at_90, at_95, at_99',
    [
        (1, 3.078, 12.706, 63.657),
        (2, 1.886, 4.303, 9.925),
        (3, 1.638, 3.182, 5.841),
        (4, 1.533, 2.776, 4.604),
        (5, 1.476, 2.571, 4.032),
        (9, 1.383, 2.262, 3.250),
        (30, 1.310, 2.042, 2.750),
        (120, 1.289, 1.980, 2.617),
    ],
)
def test_quantiles_of_student_are_those_of_the_printed_tables(freedom, at_90, at_95, at_99):
    quantiles = [round(t_quantile(p, freedom), 3) for p in (0.9, 0.975, 0.995)]
    assert quantiles == pytest.approx([at_90, at_95, at_99], abs=1.1e-3)


def test_an_interval_is_paired():
    ours, theirs = [1.50, 1.70, 1.60], [1.52, 1.71, 1.63]
    mean, half = interval([a - b for a, b in zip(ours, theirs)])
    assert mean == pytest.approx(-0.02)
    assert half == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert interval([0.25]) == (0.25, None)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 4, dtype=torch.float64, generator=generator) * 3 + 1
    intervals = [interval(row) for row in draws.tolist()]
    inside = statistics.fmean(abs(mean - 1) <= half for mean, half in intervals)
    assert 0.93 < inside < 0.97


ROWS = st.lists(
    st.builds(
        lambda cache, loss: dict(cache_bytes=cache, val_loss=loss),
        st.integers(1, 6),
        st.one_of(st.none(), st.integers(1, 6)),
    ),
    max_size=12,
)


@given(ROWS)
def test_the_front_is_what_nothing_beats(found):
    found = [row | dict(name=number) for number, row in enumerate(found)]
    on_front = front(found)

    def beats(a, b):
        smaller = a['cache_bytes'] <= b['cache_bytes'] and a['val_loss'] <= b['val_loss']
        same = (a['cache_bytes'], a['val_loss']) == (b['cache_bytes'], b['val_loss'])
        return smaller and not same

    known = [row for row in found if row['val_loss'] is not None]
    for row in known:
        assert (row['name'] in on_front) == (not any(beats(other, row) for other in known))
        beaten_by_front = any(beats(found[name], row) for name in on_front)
        assert row['name'] in on_front or beaten_by_front
    assert set(on_front) <= {row['name'] for row in known}


def test_contenders_are_compared_over_the_seeds_that_both_have():
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, None, 1.4], bad=[None] * 3))
    mha, mla, bad = rows(results)
    assert mha['val_loss'] == pytest.approx(1.6) and mha['sd'] == pytest.approx(0.1)
    assert mha['control'] and mha['difference'] is None
    assert mha['tok_per_s'] == 2000 and mha['peak_memory'] == 3 * 2**20
    assert mla['seeds'] == 2 and mla['cache_ratio'] == 0.5
    assert mla['difference'] == pytest.approx(-0.15)
    assert mla['half'] == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert mla['percent'] == pytest.approx(-100 * 0.15 / 1.55)
    assert bad['val_loss'] is None and bad['error'] == 'the loss is nan'


def test_speeds_of_runs_that_shared_a_device_are_not_reported():
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    for run in results.runs_of('mla'):
        run['shared'] = True
    mha, mla = rows(results)
    assert mha['tok_per_s'] and mla['tok_per_s'] is None and mla['peak_memory'] is None
    assert 'speeds and memory are not reported' in in_one_line(table(results))


def test_the_largest_logit_of_all_seeds_is_a_column_where_it_was_logged():
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    assert 'logit' not in table(results)
    for run, logit in zip(results.runs_of('mla'), [31.2, 130.4, 7.0]):
        run['max_logit'] = logit
    assert [row['max_logit'] for row in rows(results)] == [None, 130.4]
    text = table(results)
    assert '| largest logit |' in text and '| 130 |' in text


# -------------------------------------------------------------------------------------------------
# the table


def test_a_table_names_failed_runs_and_the_seeds_that_are_there():
    text = table(made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, None, 1.4], bad=[None] * 3)))
    assert '| BAD | 1,000 (+0.00 %) | 128 (1/4) | failed: the loss is nan |' in text
    assert '(2 of 3 seeds)' in text
    assert 'commit abc1234 · seeds 1, 2, 3' in text
    assert text.count('- mla, seed 2') == 1 and text.count('- bad, seed') == 3


def test_contenders_that_a_stop_has_kept_waiting_are_left_out():
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6], late=[], bad=[None] * 3))
    text = table(results)
    assert 'Not trained yet: LATE.' in in_one_line(text)
    assert '| LATE' not in text and '| BAD | 1,000 (+0.00 %)' in text
    del results.contenders['late']
    without = table(results)
    assert table_lines(text) == table_lines(without)
    assert 'Not trained yet' not in without
    assert list(made_up(dict(mha=[], mla=[])).reached().contenders) == ['mha']


def test_a_table_names_grids_of_words():
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    results.contenders['mla'] |= dict(
        grid=dict(dropout_in=['all', 'residual'], qk_norm=[True, False], learning_rate=[1e-3]),
        tuned=dict(dropout_in='residual', qk_norm=False, learning_rate=1e-3),
    )
    text = in_one_line(table(results))
    assert 'dropout_in of all, residual; qk_norm of True, False; learning_rate of 0.001.' in text
    assert '| residual, False, 0.001 |' in text


def test_what_is_printed_fits_a_terminal_and_has_every_cell_of_the_table():
    results = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, None, 1.4], bad=[None] * 3))
    results.contenders['bad']['error'] = 'n_embd does not fit, ' * 10
    results.contenders['mla'] |= dict(
        label='MLA with a long name, of which there are some',
        differs={f'setting_{number}': number for number in range(20)},
        decode=dict(sample='a word ' * 40, tok_per_s=None),
    )
    text = report(results)
    assert max(map(len, text.splitlines())) <= 120
    header, _, *lines = table_lines(table(results))
    for line in [header, *lines]:
        for cell in line.strip('| ').split(' | '):
            assert cell in in_one_line(text)


# -------------------------------------------------------------------------------------------------
# committed logs and the pages that show them


def pages():
    """Return the text of README.md and of docs/."""
    paths = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
    return '\n\n'.join(path.read_text() for path in paths)


COMMITTED = [
    path
    for path in sorted(LOGS.glob('compare*.jsonl')) + sorted(LOGS.glob('study*.jsonl'))
    if '"comparison"' in path.read_text()[:40]
]


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: path.stem)
def test_tables_of_the_pages_are_those_of_the_committed_logs(path):
    results, text = read(path), pages()
    assert [line for line in table_lines(table(results)) if line not in text] == []
    assert path.name in text
    assert all(commit in text for commit in results.head['commit'].split(', '))
    commands = [run['command'] for run in results.runs if 'command' in run]
    assert len(set(commands)) == len(commands)
    assert not any('/work' in command for command in commands)


def test_losses_of_the_screening_are_those_of_its_log():
    results = read(LOGS / 'shapes_pilot.jsonl')
    shown = pages().partition('| latent + RoPE key |')[2].partition('\n\n')[0]
    losses = set(re.findall(r'1\.4\d{3}', shown))
    tried = []
    for run in results.runs:
        if run['tuned']['dropout'] == 0.1 and run['tuned'].get('dropout_in', 'all') == 'all':
            tried.append(run)
    assert len(losses) == 10
    assert losses <= {f'{run["val_loss"]:.4f}' for run in tried}
    assert {run['seed'] for run in tried} == {results.head['tune_seed']}


def test_losses_of_the_screening_on_books_are_those_of_its_log():
    results = read(LOGS / 'screen_books.jsonl')
    shown = pages().partition('| | rate: val loss |')[2].partition('\n\n')[0]
    logged = set()
    for run in results.runs:
        rate = results.contenders[run['contender']]['settings']['muon_lr']
        logged.add((f'{rate:g}', f'{run["val_loss"]:.4f}'))
    best = min(run['val_loss'] for run in results.runs)
    assert {run['seed'] for run in results.runs} == {1000}
    lines = shown.splitlines()[2:]
    assert len(lines) == 29
    for number, line in enumerate(lines):
        tried = re.findall(r'(0\.\d+): (1\.\d{4})', line)  # (rate, loss)
        assert set(tried) <= logged
        if number > 0:  # the first one is what the others are compared with
            percent = float(re.search(r'([+]\d\.\d\d) %', line)[1])
            least = min(float(loss) for _, loss in tried)
            assert abs(percent - 100 * (least / best - 1)) < 0.011


# -------------------------------------------------------------------------------------------------
# files of another form


def lines_of(results):
    contenders = [dict(event='contender') | about for about in results.contenders.values()]
    return [results.head, *contenders, *results.runs]


DAMAGES = [
    (0, dict(seeds='123')),
    (0, dict(seeds=['1'])),
    (0, dict(control='gone')),
    (0, dict(control=['mha'])),
    (0, dict(steps='many')),
    (0, dict(title=None)),
    (1, dict(label=5)),
    (1, dict(params='many')),
    (1, dict(cache_bytes=[512])),
    (1, dict(grid=dict(lr=1))),
    (1, dict(tuned='x')),
    (1, dict(decode=[1])),
    (1, dict(decode=dict(tok_per_s=5.0))),
    (1, dict(decode=dict(sample=['a']))),
    (3, dict(seed='1')),
    (3, dict(contender=['mha'])),
    (3, dict(val_loss='low')),
    (3, dict(eval_steps=7)),
    (3, dict(eval_steps=[1])),
    (3, dict(eval_losses=['a', 'b'])),
    (3, dict(tok_per_s='fast')),
    (3, dict(shared='no')),
    (3, dict(error=5)),
]


@pytest.mark.parametrize('number, change', DAMAGES, ids=str)
def test_a_results_file_with_wrong_types_is_one_line(number, change, tmp_path):
    lines = lines_of(made_up(dict(mha=[1.0, 1.1, 1.2], mla=[0.9, 1.0, 1.1])))
    path = tmp_path / 'results.jsonl'
    path.write_text(jsonl(lines))
    assert set(read(path).contenders) == {'mha', 'mla'}
    lines[number] = lines[number] | change
    path.write_text(jsonl(lines))
    with pytest.raises(UserError, match='results.jsonl is damaged') as error:
        read(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'number, needed',
    [(0, HEAD), (1, CONTENDER), (2, RUN | SCORED_RUN)],
    ids=['head', 'contender', 'run'],
)
def test_an_entry_that_is_missing_is_named(number, needed, tmp_path):
    lines = lines_of(made_up(dict(mha=[1.0, 1.1, 1.2])))
    path = tmp_path / 'results.jsonl'
    for name in set(needed) - {'val_loss'}:
        left = {key: value for key, value in lines[number].items() if key != name}
        path.write_text(jsonl([*lines[:number], left, *lines[number + 1 :]]))
        with pytest.raises(UserError, match=f"no entry '{name}'"):
            read(path)
