"""The table of an evaluation: the number that stands for each task, and the file of results."""

import json

import pytest

from nanomla.core.configurator import UserError
from nanomla.evals import scoreboard


def record(task, **result):
    return dict(
        task=task,
        result=result,
        model='m',
        label='m',
        cache='none',
        cache_bytes={},
        dequantised=0,
        kind='mla',
        params=1,
        dtype='float32',
    )


@pytest.mark.parametrize(
    'task, metrics, name, value',
    [
        ('piqa', dict(acc=0.6, acc_stderr=0.1, acc_norm=0.7), 'piqa acc_norm', 0.7),
        ('mmlu', {'mmlu acc': 0.25, 'mmlu acc_stderr': 0.1, 'mmlu_law acc': 0.5}, 'mmlu acc', 0.25),
        ('tag', {'a score': 1.0, 'b score': 0.5, 'a score_stderr': 9.0}, 'tag score (mean)', 0.75),
        ('my/own.yaml', dict(f1=0.5, f1_stderr=0.1), 'own f1', 0.5),
        ('longbench', {'longbench score': 0.3, 'longbench_x score': 0.1}, 'longbench score', 0.3),
    ],
)
def test_the_number_that_stands_for_a_task(task, metrics, name, value):
    found = scoreboard.headline(record(task, metrics=metrics))
    assert found[:2] == (name, pytest.approx(value))
    (row,) = scoreboard.rows([record(task, metrics=metrics)])
    assert row[name] == pytest.approx(value)
    assert name.replace('_', ' ') in scoreboard.table([row])


@pytest.mark.parametrize(
    'metrics, more_is_better',
    [(dict(f1=0.5), True), (dict(word_perplexity=20.0), False), (dict(bits_per_byte=1.0), False)],
)
def test_whether_more_is_better(metrics, more_is_better):
    assert scoreboard.headline(record('x', metrics=metrics)).more_is_better == more_is_better


def test_a_task_without_a_metric_is_in_the_table():
    (row,) = scoreboard.rows([record('x', metrics={})])
    assert 'x no metric' in row


def keyed(key, n=0):
    """Return a record as it stands in the file of results."""
    return record('perplexity', perplexity=9.0) | dict(key=key, n=n, commit='abc', device='CPU')


@pytest.mark.parametrize(
    'change',
    [
        dict(key=5),
        dict(task=None),
        dict(result=7),
        dict(result=dict(perplexity='low')),
        dict(task='needle', result=dict(cells=[7], pairwise=1.0)),
        dict(task='needle', result=dict(cells=[dict(length=8)], pairwise=1.0)),
        dict(task='piqa', result=dict(metrics=dict(acc='high'))),
        dict(cache=''),
        dict(cache_bytes=[1]),
        dict(params='many'),
        dict(commit=['abc']),
    ],
    ids=str,
)
def test_a_record_of_another_form_is_measured_again(change, tmp_path):
    path = tmp_path / 'results.jsonl'
    path.write_text(json.dumps(keyed('a') | change) + '\n' + json.dumps(keyed('b')) + '\n[1]\n7\n')
    assert list(scoreboard.read(path)) == ['b']


def test_the_later_of_two_results_counts_and_half_a_line_does_not(tmp_path):
    path = tmp_path / 'results.jsonl'
    assert scoreboard.read(path) == {}
    first, second, third = (keyed(key, n) for key, n in (('a', 1), ('a', 2), ('c', 3)))
    scoreboard.add(path, first)
    with open(path, 'a') as file:
        file.write('{"key": "b", "n')
    scoreboard.add(path, second)
    scoreboard.add(path, third)
    assert scoreboard.read(path) == dict(a=second, c=third)
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])['n'] for i in (0, 1, 2)] == [1, 2, 3]


def test_results_of_another_script_are_refused(tmp_path):
    path = tmp_path / 'results.jsonl'
    path.write_text('{"event": "comparison", "title": "MLA and MHA"}\n')
    with pytest.raises(UserError, match='results of another script: name another --out_dir'):
        scoreboard.read(path)


def test_formats_that_lie_on_each_other_share_a_name():
    caches = ['dense int8 window 64', 'paged int8 window 128', 'dense int4 window 64']
    assert scoreboard.format_names(caches) == 'int8, int4 w 64 to 128'
    assert scoreboard.format_names(['dense auto']) == 'auto'
