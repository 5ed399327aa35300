"""A run's folder: its id, who goes on with it, and earlier runs that move whole or not at all."""

import json
import os
import re
from pathlib import Path

import pytest

from nanomla.core.configurator import UserError
from nanomla.training.run import folder as run_folder
from nanomla.training.run.folder import RunState

RUN_ID = '20260102-030405-abcdef'
OF_THE_RUN = ('ckpt.pt', 'last.pt', 'log.jsonl', 'curve.png', 'step-000000.pt', 'step-1000000.pt')
OF_A_PERSON = ('step-by-step-notes.pt', 'step-12.pt', 'run.json', 'output.txt', 'tokenizer.json')


def write_run(out, run_id=RUN_ID, names=OF_THE_RUN, **settings):
    out.mkdir(exist_ok=True)
    for name in names:
        (out / name).write_text(f'{name} of {run_id}')
    line = dict(event='settings', **settings)
    if run_id:
        line['run_id'] = run_id
    (out / 'log.jsonl').write_text(json.dumps(line) + '\n{"event": "tra')


def contents(folder):
    """name -> text of the files in a folder."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def out(tmp_path):
    out = tmp_path / 'out'
    write_run(out)
    for name in OF_A_PERSON:
        (out / name).write_text('mine')
    return out


# -------------------------------------------------------------------------------------------------
# earlier runs


def test_an_earlier_run_moves_whole_and_nothing_else_does(out):
    held = contents(out)
    assert run_folder.set_aside(out) == out / 'previous' / RUN_ID
    assert contents(out / 'previous' / RUN_ID) == {name: held[name] for name in OF_THE_RUN}
    assert contents(out) == dict.fromkeys(OF_A_PERSON, 'mine')
    assert run_folder.set_aside(out) is None


def test_two_runs_of_one_name_both_stay(out):
    run_folder.set_aside(out)
    first = contents(out / 'previous' / RUN_ID)
    write_run(out, names=('ckpt.pt',))
    assert run_folder.set_aside(out) == out / 'previous' / f'{RUN_ID}-2'
    assert contents(out / 'previous' / RUN_ID) == first
    assert contents(out / 'previous' / f'{RUN_ID}-2').keys() == {'ckpt.pt', 'log.jsonl'}


@pytest.mark.parametrize('run_id', ['', '../../elsewhere', 'a/b', 7, ['x']])
def test_a_run_without_a_usable_id_is_named_by_its_time(run_id, tmp_path):
    out = tmp_path / 'out'
    write_run(out, run_id, names=('ckpt.pt',))
    target = run_folder.set_aside(out)
    assert target.parent == out / 'previous'
    assert re.fullmatch(r'\d{8}-\d{6}', target.name)
    assert contents(target).keys() == {'ckpt.pt', 'log.jsonl'}


@pytest.mark.parametrize('content', [b'', b'{', b'[1]', b'\xff\xfe', b'[' * 100_000])
def test_a_damaged_log_is_moved_as_it_is(content, tmp_path):
    (tmp_path / 'log.jsonl').write_bytes(content)
    assert (run_folder.set_aside(tmp_path) / 'log.jsonl').read_bytes() == content


def test_a_tokenizer_moves_with_the_run_that_copied_it(tmp_path):
    out = tmp_path / 'out'
    names = ('tokenizer.json', 'tokenizer_config.json')
    write_run(out, copied=['tokenizer.json', '../elsewhere'])
    for name in names:
        (out / name).write_text(name)
    target = run_folder.set_aside(out, also=names)
    assert (target / 'tokenizer.json').exists()
    assert (out / 'tokenizer_config.json').exists()
    assert not (out / 'tokenizer.json').exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize('names', [OF_THE_RUN, ('ckpt.pt',), ()], ids=['saved', 'best', 'log'])
@pytest.mark.parametrize('kill', range(9))
def test_a_kill_while_it_moves_leaves_it_whole_after_the_next_start(
    kill, names, tmp_path, monkeypatch
):
    """Also where that start is killed at any of its steps, and so on."""
    out = tmp_path / 'out'
    write_run(out, names=names)
    held = contents(out)

    def attempt(action, step):
        """Do `action`, killed at its step-th change of the disk. Return whether it was."""
        with monkeypatch.context() as patch:
            for name in ('rename', 'mkdir', 'rmdir'):
                change = getattr(os, name)

                def killed(*arguments, change=change, **options):
                    nonlocal step
                    if step == 0:
                        raise Killed
                    step -= 1
                    return change(*arguments, **options)

                patch.setattr(os, name, killed)
            try:
                action(out)
            except Killed:
                return True
        return False

    attempt(run_folder.set_aside, kill)
    step = 0
    while attempt(run_folder.finish_move, step):
        step += 1
    assert not list(out.glob('previous/*.moving'))
    moved = out / 'previous' / RUN_ID
    whole = contents(moved) if moved.exists() else {}
    assert (contents(out), whole) in ((held, {}), ({}, held))


def test_a_move_that_cannot_be_undone_is_completed(out):
    """Nothing is written over what a person has put there meanwhile."""
    moving = out / 'previous' / 'x.moving'
    moving.mkdir(parents=True)
    (moving / 'ckpt.pt').write_text('earlier')
    run_folder.finish_move(out)
    assert (out / 'previous' / 'x' / 'ckpt.pt').read_text() == 'earlier'
    assert (out / 'ckpt.pt').read_text() == f'ckpt.pt of {RUN_ID}'


# -------------------------------------------------------------------------------------------------
# where a run begins


@pytest.fixture
def launched(monkeypatch):
    """launched(NAME=value, ...) sets the environment of a launch, of which nothing is left."""
    names = ('TORCHELASTIC_MAX_RESTARTS', 'TORCHELASTIC_RESTART_COUNT', 'TORCHELASTIC_RUN_ID')
    for name in (*names, 'SLURM_RESTART_COUNT'):
        monkeypatch.delenv(name, raising=False)

    def set_them(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_resume_needs_a_state_and_auto_takes_one_where_it_is(out, launched):
    last, nothing = out / 'last.pt', out / 'none' / 'last.pt'
    assert run_folder.resumes('resume', ['init_from'], last, '')
    with pytest.raises(UserError, match='there is nothing to resume: .*none/last.pt is missing'):
        run_folder.resumes('resume', ['init_from'], nothing, '')
    assert run_folder.resumes('auto', ['init_from'], last, '')
    assert not run_folder.resumes('auto', ['init_from'], nothing, '')
    assert not run_folder.resumes('scratch', [], last, '')
    assert not run_folder.resumes('gpt2', ['init_from'], last, '')


def test_where_torchrun_may_start_it_again_auto_is_the_default(out, launched):
    last = out / 'last.pt'
    launched(TORCHELASTIC_MAX_RESTARTS='0')  # torchrun's default
    assert not run_folder.resumes('scratch', [], last, '')
    launched(TORCHELASTIC_MAX_RESTARTS='2')
    assert run_folder.resumes('scratch', [], last, '')
    assert not run_folder.resumes('scratch', [], out / 'none', '')
    assert not run_folder.resumes('scratch', ['init_from'], last, '')  # asked for


@pytest.mark.parametrize('count', ['TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT'])
@pytest.mark.parametrize('init_from', ['scratch', 'gpt2'])
def test_a_later_attempt_goes_on_with_what_its_own_launch_saved(init_from, count, out, launched):
    last = out / 'last.pt'
    launched(TORCHELASTIC_RUN_ID='4711')
    assert not run_folder.resumes(init_from, ['init_from'], last, '4711')  # the first attempt
    launched(**{count: '1'})
    assert run_folder.resumes(init_from, ['init_from'], last, '4711')
    assert not run_folder.resumes(init_from, ['init_from'], last, '4710')  # of another launch
    assert not run_folder.resumes(init_from, ['init_from'], last, '')


def test_a_launch_without_a_name_is_known_by_its_torchrun(launched):
    assert run_folder.launch_id() == ''
    launched(TORCHELASTIC_RUN_ID='none')
    assert run_folder.launch_id().endswith(f':{os.getppid()}')


def test_a_state_and_a_log_of_two_runs_are_not_mixed(out):
    run_folder.check_one_run(out, RUN_ID)
    with pytest.raises(UserError, match=f'last.pt is of run other, .* of run {RUN_ID}'):
        run_folder.check_one_run(out, 'other')
    write_run(out, run_id='')  # of before there were ids
    run_folder.check_one_run(out, 'other')
    run_folder.check_one_run(out / 'none', 'other')


def test_ids_are_in_the_order_of_time_and_differ():
    one, two = run_folder.new_run_id(), run_folder.new_run_id()
    assert one != two
    assert re.fullmatch(r'\d{8}-\d{6}-[0-9a-f]{6}', one)


# -------------------------------------------------------------------------------------------------
# how far it has come

OLD = dict(optimizers=[], scaler={}, average=None, best_val_loss=2.5, best_step=6, seconds=1.5)


def test_a_state_of_before_runs_had_ids_gets_one_and_its_counts():
    state = RunState.of(OLD | dict(step=7, path='x/last.pt'), tokens_per_step=64)
    assert (state.step, state.tokens, state.evaluated_step) == (7, 448, 7)
    assert (state.best_val_loss, state.best_step, state.seconds) == (2.5, 6, 1.5)
    assert state.train_seconds == 0
    assert state.run_id


def test_a_state_goes_on_as_it_was_saved():
    saved = RunState(RUN_ID, 7, 999, 2.5, 6, 6, 1.5, 1.25)
    assert RunState.of(OLD | vars(saved) | dict(path='x'), tokens_per_step=64) == saved


def test_weights_alone_are_no_state():
    with pytest.raises(UserError, match='x/last.pt holds no state .* --init_from=x/last.pt'):
        RunState.of(dict(step=7, path=Path('x/last.pt')), 64)
