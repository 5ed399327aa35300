"""Runs of train.py that share a machine and a folder: locks, restarts, reasons, environments."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, wait_for_files, wait_until

from nanomla.comparison import runs, workers
from nanomla.comparison.runs import RUN_LOCK, Run, RunQueue, judge, run_environments
from nanomla.core.configurator import UserError
from nanomla.core.files import lock
from nanomla.training.launch import (
    PROMPT,
    failure_reason,
    last_output,
    open_output,
    run_train,
)
from nanomla.training.run.folder import failed_in_use, folder_in_use, lock_run_folder

HOLD_LOCK = """
import sys, time
from nanomla.training.run.folder import lock_run_folder
held = lock_run_folder(sys.argv[1])
open(sys.argv[1] + '/held', 'w').close()
time.sleep(600)
"""


def holder(folder):
    """Start a process that holds the lock of a folder, as a train.py does."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD_LOCK, str(folder)], env=os.environ | dict(PYTHONPATH=str(ROOT))
    )
    wait_for_files(folder, 'held', 1)
    return process


def kill(process):
    process.kill()
    process.wait()


# -------------------------------------------------------------------------------------------------
# locks


def test_a_second_train_py_in_a_folder_ends_with_one_line(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError) as error:
        lock_run_folder(tmp_path)
    assert failed_in_use(str(error.value), 2) and str(tmp_path) in str(error.value)
    kill(process)
    lock_run_folder(tmp_path).release()


def test_a_folder_is_in_use_until_its_train_py_ends(tmp_path):
    process = holder(tmp_path)
    assert folder_in_use(tmp_path)
    kill(process)
    wait_until(lambda: not folder_in_use(tmp_path))


class CountingQueue(RunQueue):
    """Begins no process: counts what it would begin, and stops looking after some rounds."""

    rounds = 0

    def progress(self, running):
        self.rounds += 1
        if self.rounds == 3:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_whose_watcher_is_gone_is_left_to_its_own_train_py(tmp_path):
    process = holder(tmp_path)
    run = Run('mla', 'seed', 1, tmp_path, ['--a=1'])
    assert CountingQueue([run], [{}]).train() == 'SIGTERM'
    kill(process)
    assert run.outcome == '' and not (tmp_path / 'output.txt').exists()


def test_a_run_that_another_process_watches_is_left_to_it(tmp_path):
    run = Run('mla', 'seed', 1, tmp_path, ['--a=1'])
    with lock(tmp_path, RUN_LOCK):
        assert CountingQueue([run], [{}]).train() == 'SIGTERM'
        assert RunQueue([run], [{}]).train(wait=False) == ''
    assert run.outcome == '' and not (tmp_path / 'output.txt').exists()


def test_a_train_py_that_came_second_has_not_failed(tmp_path):
    run = Run('mla', 'seed', 1, tmp_path, ['--a=1'])
    process = holder(tmp_path)
    with pytest.raises(UserError) as error:
        lock_run_folder(tmp_path)
    kill(process)
    with open_output(tmp_path, run.words) as output:
        output.write(f'error: {error.value}\n')
    assert judge(run, 2, stopping=False) is False
    assert run.state() == 'new' and not (tmp_path / 'error.txt').exists()


# -------------------------------------------------------------------------------------------------
# why a run failed


def test_why_a_run_failed_is_the_last_message_of_its_last_attempt(tmp_path):
    for printed in ('error: too old\n', 'step 1\nerror: out of memory\nbye\n'):
        with open_output(tmp_path, ['--a=1 2']) as output:
            output.write(printed)
    assert (tmp_path / 'output.txt').read_text().count(f"{PROMPT}'--a=1 2'\n") == 2
    assert failure_reason(last_output(tmp_path), 2) == 'out of memory'
    assert failure_reason(last_output(tmp_path), -9) == 'killed by SIGKILL'
    with open_output(tmp_path, []) as output:
        output.write('Traceback (most recent call last):\n  File "x"\nKeyError: 3\nbye\n')
    assert failure_reason(last_output(tmp_path), 1) == 'KeyError: 3'
    open_output(tmp_path, []).close()
    assert failure_reason(last_output(tmp_path), 3) == 'exit code 3'
    assert failure_reason('step 1\nstep 2\n', 3) == 'step 2'


def test_a_script_that_starts_a_run_gets_its_message_in_one_line():
    with pytest.raises(UserError, match="train.py --nope=1 failed: --nope=1: unknown setting 'no"):
        run_train(['--nope=1'])


# -------------------------------------------------------------------------------------------------
# restarts

BROKEN_DEVICE = """
import atexit, json, os, pathlib, sys
for word in sys.argv:
    if word.startswith('--out_dir='):
        out = pathlib.Path(word.removeprefix('--out_dir='))
print('step 1')
atexit.register(os.write, 2, b'lost sys.stderr\\n')
if 'always' in out.name or not (out / 'tried').exists():
    (out / 'tried').touch()
    raise RuntimeError('CUDA error: unspecified launch failure\\nConsider CUDA_LAUNCH_BLOCKING=1')
(out / 'log.jsonl').write_text(json.dumps(dict(event='end', why='max_iters reached')))
"""
COPIED = ('comparison/workers.py', 'training/launch.py', 'core/configurator.py', 'core/files.py')


@pytest.mark.parametrize('in_process', [False, True])
def test_a_run_whose_device_failed_goes_on_in_a_new_process(
    in_process, tmp_path, monkeypatch, forked_python
):
    for name in COPIED:
        path = tmp_path / 'nanomla' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / 'nanomla' / name).read_text())
    (tmp_path / 'train.py').write_text(BROKEN_DEVICE)
    monkeypatch.setattr(workers, 'ROOT', tmp_path)
    monkeypatch.setattr(runs, 'RESTARTS', 1)
    once = Run('mla', 'seed', 0, tmp_path / 'once', ['--a=1'])
    always = Run('mla', 'seed', 1, tmp_path / 'always', ['--a=1'])
    reported = []

    class Queue(RunQueue):
        def report(self, run):
            reported.append((run.seed, run.outcome))

    assert Queue([once, always], [{}], in_process).train() == ''
    assert reported == [(0, ''), (0, 'done'), (1, ''), (1, 'failed')]
    assert always.error() == 'RuntimeError: CUDA error: unspecified launch failure, 2 times'
    printed = [(run.folder / 'output.txt').read_text() for run in (once, always)]
    first, second = printed[0].split(PROMPT)[1:]
    assert '--cuda_graph=False' not in first.splitlines()[0]
    assert '--cuda_graph=False' in second.splitlines()[0]
    assert all(text.count('step 1') == 2 for text in printed)
    # What a worker prints when it ends is of no run.
    assert any('lost sys.stderr' in text for text in printed) == (not in_process)


def test_a_run_is_known_by_its_command(tmp_path):
    run = Run('mla', 'seed', 1, tmp_path, ['--a=1', '--b=2'])
    run.check_settings()
    run.write_facts(dict(shared=False))
    run.check_settings()
    assert json.loads((tmp_path / 'run.json').read_text())['words'] == run.words
    with pytest.raises(UserError, match='was trained with other settings .--b=3, --b=2.'):
        run.check_settings(['--a=1', '--b=3'])
    run.check_settings(['--a=1', '--b=3'], ignore=['b'])


# -------------------------------------------------------------------------------------------------
# where runs are trained


def test_each_run_has_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    # Not for all tests: CUDA has read it by then, and what counts GPUs reads it again.
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert run_environments(torch.device('cpu'), 1) == [{}]
    monkeypatch.delenv('OMP_NUM_THREADS')
    share = dict(OMP_NUM_THREADS='4', TORCHINDUCTOR_COMPILE_THREADS='4')
    assert run_environments(torch.device('cpu'), 2) == [share, share]

    def gpus(jobs):
        environments = run_environments(torch.device('cuda'), jobs)
        return [environment['CUDA_VISIBLE_DEVICES'] for environment in environments]

    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert gpus(jobs=2) == ['0', '1', '0', '1']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,GPU-7')
    assert gpus(jobs=1) == ['5', 'GPU-7']
    assert run_environments(torch.device('cuda', 1), 1) == [{}]
