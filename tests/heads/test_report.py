"""The report on heads: its warnings, names, tables and log."""

import csv
import io
import json

import handmade
import pytest
import torch

from nanomla.core.configurator import UserError
from nanomla.core.files import csv_table, jsonl
from nanomla.heads import report, study
from nanomla.heads.report import ReportSettings, examine
from nanomla.heads.study import Run
from nanomla.heads.subject import prefixes_of

MADE = dict(command='python find_induction_heads.py', commit='0000000', date='2025-01-31')


@pytest.fixture(scope='module')
def entry():
    """A `models` entry of heads by hand, with held-out text; read only."""
    text = torch.randint(1, handmade.V, (400,), generator=torch.Generator().manual_seed(0))
    subject = handmade.subject_of(handmade.by_hand('mla'), held_out=text)
    return examine(subject, ReportSettings(texts=8))


def report_of(*models, checkpoints=()):
    return dict(models=list(models), checkpoints=list(checkpoints), made=MADE)


def rows_of(rows):
    """Return rows as a reader of their CSV sees them."""
    return list(csv.DictReader(io.StringIO(csv_table(rows))))


# -------------------------------------------------------------------------------------------------
# warnings


def test_a_model_that_continues_repeats_without_an_induction_head_is_warned_of():
    subject = handmade.subject_of(handmade.by_hand('mha'))
    # So high a threshold that the one induction head does not pass.
    found = examine(subject, ReportSettings(texts=8, threshold=0.99, ablations='none'))
    (warning,) = found['warnings']
    assert 'says induction' in warning
    assert f'{found["repeat_loss"]:.3f} nats' in warning
    printed = ' '.join(' '.join(report.findings(found)).split())
    assert 'WARNING: the loss on repeated random tokens says induction' in printed


def test_a_model_with_an_induction_head_is_not_warned_of():
    found = examine(
        handmade.subject_of(handmade.by_hand('mha')), ReportSettings(texts=8, ablations='none')
    )
    assert found['warnings'] == []


def test_a_model_that_does_not_continue_repeats_is_not_warned_of():
    # It carries tokens five positions on, so that the second layer copies the wrong one.
    subject = handmade.subject_of(handmade.by_hand('mha', offset=5))
    found = examine(subject, ReportSettings(texts=8, ablations='none'))
    assert 'induction' not in [head['label'] for head in found['scores']]
    assert found['warnings'] == []


def test_a_warning_says_on_which_text(entry):
    heads = [head | dict(on_text=dict(label='')) for head in entry['scores']]
    losses = dict(repeat_loss=0.1, control_loss=7.0, text_repeat_loss=0.2, text_control_loss=5.0)
    (warning,) = report.loss_warnings(dict(scores=heads) | losses)
    assert 'repeated held-out text' in warning


def test_what_is_printed_fits_120_columns(entry):
    lines = report.findings(entry | dict(warnings=['a long sentence ' * 20]))
    assert max(len(line) for line in lines) <= 120


def test_costs_are_printed_in_words(entry):
    printed = '\n'.join(report.cost_lines(entry['group_ablation']))
    assert 'without the 1 induction head ' in printed
    assert 'without the 1 previous-token head' in printed
    assert '_' not in printed
    assert f'{entry["group_ablation"]["induction_zero"]:+.3f}' in printed


# -------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    'folders, names',
    [
        (['a/run', 'b/run'], ['a/run', 'b/run']),
        (['x/a/run', 'y/a/run', 'other'], ['x/a/run', 'y/a/run', 'other']),
        (['run', 'a'], ['run', 'a']),
        (['run', 'run'], ['run', 'run']),
    ],
)
def test_folders_of_one_name_get_their_parents_in_front(folders, names, tmp_path):
    paths = [tmp_path / folder for folder in folders]
    prefixes = prefixes_of(paths)
    assert [prefixes[path] + path.name for path in paths] == names


def test_a_folder_in_another_one_of_its_name_is_told_apart(tmp_path):
    outer, inner = tmp_path / 'run', tmp_path / 'run' / 'run'
    prefixes = prefixes_of([outer, inner])
    assert prefixes[outer] + outer.name != prefixes[inner] + inner.name


def test_models_and_runs_of_one_folder_keep_one_name(tmp_path):
    subjects = []
    runs = [Run(tmp_path / 'a/run'), Run(tmp_path / 'b/run')]
    study.tell_apart(subjects, runs)
    assert [run.name for run in runs] == ['a/run', 'b/run']


def test_two_variants_of_one_name_are_refused():
    with pytest.raises(UserError, match='two entries are called mla'):
        study.study_runs('out', ['a/induction_mla.py', 'b/mla.py'], seeds=2)


def test_every_row_says_of_which_model_it_is(entry):
    other = entry | dict(name='b/run', source='b/run')
    models = [entry | dict(name='a/run', source='a/run'), other]
    for rows in (report.head_rows(models), report.composition_rows(models)):
        rows = rows_of(rows)
        assert {row['source'] for row in rows} == {'a/run', 'b/run'}
        assert {row['model'] for row in rows} == {'a/run', 'b/run'}
        assert {row['kind'] for row in rows} == {'MLA'}


def test_every_row_of_a_checkpoint_says_of_which_run_it_is():
    run = dict(name='a/run', kind='MLA', source='x/a/run', step=[0, 1], icl=[0.1, 0.2])
    (first, _) = rows_of(report.checkpoint_rows([run]))
    assert first == dict(model='a/run', kind='MLA', source='x/a/run', step='0', icl='0.1')


# -------------------------------------------------------------------------------------------------
# the log


def test_a_report_comes_back_out_of_its_log(entry, tmp_path):
    run = dict(name='by-hand', kind='MLA', step=[0], tokens=[0], scores=[[[0.0]]])
    run |= dict(max_induction=[0.1], repeat_loss=[1.0], icl=[0.0])
    written = report_of(entry, checkpoints=[run])
    (tmp_path / 'heads.jsonl').write_text(jsonl(report.log_rows(written)))
    found = report.read_report(tmp_path / 'heads.jsonl')
    assert found['made'] == MADE
    assert found['models'][0]['scores'] == json.loads(json.dumps(entry['scores']))
    assert found['checkpoints'][0]['tokens'] == [0]
    assert 'patterns_u8' not in found['models'][0]
    assert report.missing_scores(found) == []


def test_a_log_of_several_calls_holds_them_one_after_the_other(tmp_path):
    rows = [dict(event='settings', config={})]  # of a training run
    rows.append(dict(event='train', step=1))
    for commit in ('aaaaaaa', 'bbbbbbb'):
        rows.append(dict(event='settings', made=MADE | dict(commit=commit), device='GPU'))
        run = dict(name=commit, step=[0], tokens=[0], max_induction=[0.1], repeat_loss=[1.0])
        rows.append(dict(event='checkpoints', icl=[0.0]) | run)
        rows.append(dict(event='model', name=commit, kind='MHA', heads=[dict(layer=0, head=0)]))
        latents = dict(components_for_90_percent=[1], likeness=[[1.0]])
        rows.append(dict(part='latents', name=commit) | latents)
    path = tmp_path / 'log.jsonl'
    path.write_text(jsonl(rows))
    found = report.read_report(path, call=2)
    assert found['made'] == MADE | dict(commit='bbbbbbb', device='GPU')
    (run,), (model,) = found['checkpoints'], found['models']
    assert run['name'] == model['name'] == 'bbbbbbb'
    assert run['kind'] == 'MHA'  # an older log has it only with the model
    assert model['latents']['likeness'] == [[1.0]]
    (line,) = report.missing_scores(found)
    assert line == 'no map of bbbbbbb: the log holds 1 of its heads, not all'
    with pytest.raises(UserError, match='holds 2 calls .* and --call=3 is none of them'):
        report.read_report(path, call=3)


def test_what_is_no_log_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot read the log'):
        report.read_report(tmp_path / 'nothing.jsonl')
    path = tmp_path / 'log.jsonl'
    path.write_text('not JSON\n')
    with pytest.raises(UserError, match='log.jsonl:1: not a JSON object'):
        report.read_report(path)
    path.write_text(jsonl([dict(event='settings', config={})]))
    with pytest.raises(UserError, match='holds 0 calls'):
        report.read_report(path)
    run = dict(name='a', step=[0], tokens=[0], max_induction=[0.1], repeat_loss=[1.0], icl=[0.0])
    path.write_text(jsonl([dict(event='settings', made=MADE), dict(event='run', name='a')]))
    with pytest.raises(UserError, match='a row of the event run has no step'):
        report.read_report(path)
    path.write_text(jsonl([dict(event='settings', made=MADE), dict(event='run') | run]))
    with pytest.raises(UserError, match='does not say which attention the run a has'):
        report.read_report(path)
