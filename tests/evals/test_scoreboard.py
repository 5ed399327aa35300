"""The table of an evaluation: the number that stands for each task, and the file of results."""

import json

import pytest

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


def test_the_later_of_two_results_counts_and_half_a_line_does_not(tmp_path):
    path = tmp_path / 'results.jsonl'
    assert scoreboard.read(path) == {}
    scoreboard.add(path, dict(key='a', n=1))
    with open(path, 'a') as file:
        file.write('{"key": "b", "n')
    scoreboard.add(path, dict(key='a', n=2))
    scoreboard.add(path, dict(key='c', n=3))
    assert scoreboard.read(path) == {'a': dict(key='a', n=2), 'c': dict(key='c', n=3)}
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])['n'] for i in (0, 2, 3)] == [1, 2, 3]


def test_formats_that_lie_on_each_other_share_a_name():
    caches = ['dense int8 window 64', 'paged int8 window 128', 'dense int4 window 64']
    assert scoreboard.format_names(caches) == 'int8, int4 w 64 to 128'
    assert scoreboard.format_names(['dense auto']) == 'auto'
