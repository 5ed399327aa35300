"""The conversion study: it can be imported, goes on where it was, and is drawn from its logs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, words

from nanomla.comparison import conversion_results
from nanomla.comparison.conversion_results import (
    DEFAULT,
    MHA2MLA,
    StudyResults,
    all_ways,
    default_way,
    factorisations,
    way_name,
)
from nanomla.core.configurator import UserError

MODULE = 'nanomla.comparison.conversion_study'
SENTENCE = 'to be or not to be that is the question whether tis nobler in the mind to suffer '


def study(monkeypatch, **settings):
    """Run the study in this process."""
    monkeypatch.setattr(sys, 'argv', [MODULE, *words(settings)])
    return runpy.run_module(MODULE, run_name='__main__')


def assert_refused(match, monkeypatch, **settings):
    with pytest.raises(UserError, match=match) as error:
        study(monkeypatch, **settings)
    assert '\n' not in str(error.value)


def write_rows(file, rows):
    Path(file).write_text(''.join(json.dumps(row) + '\n' for row in rows))


# -------------------------------------------------------------------------------------------------
# ways


def test_every_way_is_there_once_and_has_a_name_of_its_own():
    ways = all_ways(default_way())
    names = [way_name(way) for way in ways]
    assert len(set(names)) == len(names) == 18
    assert ways[:8] == factorisations(DEFAULT)
    assert way_name(MHA2MLA) == '2-norm, own, joint'


def test_the_order_of_settings_does_not_change_the_name_of_a_way():
    assert way_name(default_way(fold=2)) == 'turn, shared, balanced, fold=2'
    turned = dict(reversed(default_way(fold=2).items()))
    assert way_name(turned) == 'turn, shared, balanced, fold=2'


def test_the_other_ways_are_in_closed_form_where_the_default_is_fitted():
    fitted = default_way(fold=2, layer_steps=200)
    assert way_name(fitted) == 'turn, shared, attention, fold=2, by_layer=True, layer_steps=200'
    assert all_ways(fitted) == all_ways(default_way(fold=2))


# -------------------------------------------------------------------------------------------------
# results


def test_a_study_is_drawn_from_several_files(tmp_path, monkeypatch, capsys):
    """Seeds of other machines; what must hold is counted by seed, whatever is missing."""
    monkeypatch.chdir(tmp_path)
    joint = DEFAULT | dict(low_rank='joint')
    for seed, worse in ((1, 1.0), (2, 1.5)):

        def row(what, perplexity, seed=seed, **more):
            facts = dict(commit='x', device='y')
            return dict(kind='mha', seed=seed, what=what, perplexity=perplexity) | facts | more

        rows = [
            row('source', 2.0, steps=100),
            row('control', 1.99, steps=5),
            row('converted', 2.2, saving=0.5, way=MHA2MLA),
            row('converted', 2 + 0.04 * worse, saving=0.5, way=DEFAULT),
            row('healed', 2.01 * worse, saving=0.5, way=DEFAULT, steps=5),
            row('healed, int4', 2.02 * worse, saving=0.5, way=DEFAULT, steps=5),
        ]
        if seed == 2:
            rows.append(row('converted', 2.03, saving=0.25, way=DEFAULT))
            rows.append(row('converted', 2.1, saving=0.5, way=joint))
        write_rows(f'{seed}.jsonl', rows)
    study(monkeypatch, draw_only=True, results='1.jsonl,2.jsonl', picture='both.png')
    printed = capsys.readouterr().out
    assert Path('both.png').stat().st_size > 10_000
    assert '2.50 (2.00–3.00)' in printed
    assert 'as many steps: -0.50 (-0.50 to -0.50)' in printed
    assert 'perplexity falls with rank: 1 of 1' in printed
    assert (
        "of MHA2MLA's: 30.00 %; healed, above the source: 50.75 %; int4, above healed: 0.50 %"
        in printed
    )


@pytest.mark.parametrize(
    'log, settings, line',
    [
        ('conversion_seeds', {}, '0.86 (0.79–0.97)'),
        ('conversion_study', {}, 'MHA: source perplexity 2.7608 (1 seeds)'),
        ('conversion_gqa', dict(fold=2), '1.33 (1.05–1.51)'),
        ('conversion_gqa_600_fold2', dict(fold=2, layer_steps=600), '0.79 (0.78–0.81)'),
    ],
)
def test_committed_logs_are_drawn(log, settings, line, tmp_path, monkeypatch, capsys):
    picture = tmp_path / 'study.png'
    results = ROOT / 'assets' / 'logs' / f'{log}.jsonl'
    study(monkeypatch, draw_only=True, results=results, picture=picture, **settings)
    assert line in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


def test_results_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = dict(kind='mha', seed=1, what='source', perplexity=2.0, commit='x', device='CPU')
    write_rows('1.jsonl', [row])
    Path('broken.jsonl').write_text('{"kind": "mh\n')
    assert_refused('can only be drawn', monkeypatch, results='1.jsonl,2.jsonl')
    both = dict(draw_only=True, results='1.jsonl,3.jsonl')
    assert_refused('cannot read 3.jsonl', monkeypatch, **both)
    assert_refused('broken.jsonl:1', monkeypatch, draw_only=True, results='broken.jsonl')


def test_a_file_of_something_else_stays_as_it_is(tmp_path, monkeypatch):
    """Though a study that goes on cuts off a line without an end, as a kill leaves it."""
    monkeypatch.chdir(tmp_path)
    files = dict(notes='to do\nmore', row='{"model": "the source"', source='')
    row = dict(kind='mha', seed=1, what='source', perplexity=2.0, commit='x', device='CPU')
    files['source'] = json.dumps(row | dict(steps=50)) + '\n'
    matches = dict(
        notes='notes:1: not a JSON object',
        row='row:1: not a JSON object',
        source='source_steps=50',
    )
    for name, content in files.items():
        Path(name).write_text(content)
        assert_refused(matches[name], monkeypatch, results=name, text='book.txt', out='new')
        assert Path(name).read_text() == content
    assert not Path('new').exists()


def test_rows_are_appended_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_results, 'commit', lambda: 'x')
    monkeypatch.setattr(conversion_results, 'describe', lambda device: 'y')
    file = tmp_path / 'new' / 'results.jsonl'
    results = StudyResults([file], must_exist=False)
    row = dict(kind='mha', seed=1, saving=0.5, what='converted', way=DEFAULT)
    assert row not in results
    results.add(row | dict(perplexity=2.0), device=None)
    with open(file, 'a') as opened:
        opened.write('{"kind": "gqa", "see')  # as a kill leaves it
    assert row in StudyResults([file], must_exist=True)
    results.add(row | dict(perplexity=2.0, seed=2), device=None)
    assert len(StudyResults([file], must_exist=True).rows) == 2
    assert row | dict(way=MHA2MLA) not in results


# -------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    'settings, match',
    [
        (dict(heal_steps=500), 'more than a twentieth'),
        (dict(kinds='mha,mla'), "kinds='mla' is not known"),
        (dict(kinds=''), '--kinds is empty'),
        (dict(seeds='one'), 'seeds=one'),
        (dict(savings='1.5'), 'savings=1.5 must be'),
        (dict(heal_savings='0.5'), 'heal_savings=0.5 is not known'),
        (dict(), 'holds no tokens'),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(match, monkeypatch, device='cpu', **settings)
    assert os.listdir() == []


def test_importing_the_study_runs_nothing_and_help_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_module(MODULE)['Study'].__name__ == 'Study'
    assert os.listdir(tmp_path) == []
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    options = dict(capture_output=True, text=True, cwd=tmp_path, env=environment)
    # Python prints the names of the modules that it imports.
    command = [sys.executable, '-X', 'importtime', '-m', MODULE, '--help']
    ended = subprocess.run(command, **options)
    assert f'usage: python -m {MODULE}' in ended.stdout
    assert 'torch' not in ended.stderr


# -------------------------------------------------------------------------------------------------
# the whole study


@pytest.mark.slow
def test_the_study_goes_on_where_it_was(tmp_path):
    (tmp_path / 'text.txt').write_text(SENTENCE * 600)
    out = tmp_path / 'study'
    log = out / 'results.jsonl'
    settings = dict(
        text=tmp_path / 'text.txt',
        out=out,
        seeds=1,
        kinds='mha,gqa',
        savings=0.75,
        heal_savings=0.75,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        block_size=32,
        batch_size=4,
        source_steps=40,
        heal_steps=2,
        device='cpu',
        calibration_tokens=2000,
        eval_tokens=500,
    )

    def run(**changes):
        command = [sys.executable, '-m', MODULE, *words(settings | changes)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    missing = run(text=tmp_path / 'none.txt')
    assert missing.returncode == 2
    assert missing.stderr == f'error: cannot read {tmp_path}/none.txt: No such file or directory\n'
    first = run()
    assert first.returncode == 0, first.stderr
    assert 'MHA: source perplexity' in first.stdout
    assert (out / 'study.png').exists()
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines))
    rows = [json.loads(line) for line in lines]
    assert {row['kind'] for row in rows if row['what'] == 'control'} == {'mha', 'gqa'}

    # Killed in the middle of a line.
    log.write_text('\n'.join(lines[:-3]) + '\n{"kind": "mh')
    again = run()
    assert again.returncode == 0, again.stderr
    assert len(log.read_text().splitlines()) == len(lines)

    other = dict(kinds='mha', heal_muon_lr=0.01, fold=2, rope_pairs=1, compare=False)
    mixed = run(**other)
    assert mixed.returncode == 2
    assert 'healed with other settings' in mixed.stderr

    source = out / 'mha-1' / 'source' / 'ckpt.pt'
    trained = source.stat().st_mtime_ns
    apart = run(**other, results=tmp_path / 'other.jsonl')
    assert apart.returncode == 0, apart.stderr
    assert source.stat().st_mtime_ns == trained
    rows = [json.loads(line) for line in (tmp_path / 'other.jsonl').read_text().splitlines()]
    (healed,) = (row for row in rows if row['what'] == 'healed')
    assert healed['way'] == default_way(fold=2, rope_pairs=1)
    assert healed['healing']['muon_lr'] == 0.01
    assert next(row['rope'] for row in rows if row['what'] == 'converted') == 2
    assert not any(row['what'] == 'control' for row in rows)
