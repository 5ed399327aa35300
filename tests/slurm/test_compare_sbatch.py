"""
slurm/compare.sbatch without SLURM: a scontrol that only writes down how it is called.

A compare.py without torch does as compare.py: asked to stop it saves and ends with exit code
75.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, wait_for_end, wait_for_files

from nanomla.comparison.runs import STOPPED

SCRIPT = ROOT / 'slurm' / 'compare.sbatch'
pytestmark = pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')

COMPARE = """
import os, signal, sys, time
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
open('ready', 'w').write(' '.join(sys.argv[1:]))
until = time.time() + (0.1 if sys.argv[-1].startswith('ends') else 300)
while time.time() < until and not asked:
    time.sleep(0.01)
time.sleep(0.2)  # saving takes its time
open('asked', 'w').write(' '.join(asked))
sys.exit(75 if asked and sys.argv[-1] != 'completes' else int(sys.argv[-1].partition('=')[2] or 0))
"""


@pytest.fixture
def task(tmp_path):
    """task(*arguments, **environment) -> a started task in tmp_path."""
    commands, started = tmp_path / 'bin', []
    commands.mkdir()
    (commands / 'scontrol').write_text('#!/bin/sh\necho "$@" >> scontrol\n')
    (commands / 'python').write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    (tmp_path / 'compare.py').write_text(COMPARE)

    def start(*arguments, cwd=tmp_path, **environment):
        own = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')} | dict(
            SLURM_JOB_ID='4713', SLURM_ARRAY_JOB_ID='4711', SLURM_ARRAY_TASK_ID='2'
        )
        started.append(
            subprocess.Popen(
                ['bash', SCRIPT, *arguments],
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=own | environment | dict(PATH=f'{commands}:{os.environ["PATH"]}'),
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_when_the_time_is_up_a_task_goes_back_into_the_queue(task, tmp_path):
    process = task('config/x.py', '--out_dir=y')
    wait_for_files(tmp_path, 'ready', 1)
    process.send_signal(signal.SIGUSR1)
    code, out, err = wait_for_end(process)
    assert (code, err) == (0, '') and 'the time is up' in out.splitlines()[-1]
    assert (tmp_path / 'ready').read_text() == 'config/x.py --out_dir=y'
    assert (tmp_path / 'asked').read_text() == 'SIGUSR1'
    assert (tmp_path / 'scontrol').read_text() == 'requeue 4711_2\n'


def test_outside_of_an_array_it_is_the_job(task, tmp_path):
    process = task(SLURM_ARRAY_JOB_ID='', SLURM_ARRAY_TASK_ID='')
    wait_for_files(tmp_path, 'ready', 1)
    process.send_signal(signal.SIGUSR1)
    assert wait_for_end(process)[0] == 0
    assert (tmp_path / 'scontrol').read_text() == 'requeue 4713\n'


@pytest.mark.parametrize(
    'last, code', [('ends=0', 0), ('ends=1', 1), ('ends=2', 2), (f'ends={STOPPED}', STOPPED)]
)
def test_its_exit_code_is_that_of_the_comparison(last, code, task, tmp_path):
    assert wait_for_end(task(last))[0] == code
    assert not (tmp_path / 'scontrol').exists()  # it had time left


def test_a_task_that_completes_in_the_last_minutes_stays_ended(task, tmp_path):
    process = task('completes')
    wait_for_files(tmp_path, 'ready', 1)
    process.send_signal(signal.SIGUSR1)
    assert wait_for_end(process)[0] == 0
    assert (tmp_path / 'asked').read_text() == 'SIGUSR1'
    assert not (tmp_path / 'scontrol').exists()


def test_a_cancelled_task_saves_and_stays_away(task, tmp_path):
    process = task()
    wait_for_files(tmp_path, 'ready', 1)
    process.terminate()
    assert wait_for_end(process)[0] == STOPPED
    assert (tmp_path / 'asked').read_text() == 'SIGTERM'
    assert not (tmp_path / 'scontrol').exists()


def test_it_is_submitted_from_the_repository(task, tmp_path):
    code, out, err = wait_for_end(task(cwd=tmp_path / 'bin'))
    assert code == 2
    assert err.startswith('error: there is no compare.py in ') and err.count('\n') == 1


def test_what_sbatch_reads():
    subprocess.run(['bash', '-n', SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith('#SBATCH ')]
    first_command = next(number for number, line in enumerate(lines) if line and line[0] != '#')
    assert lines[0] == '#!/bin/bash' and max(directives) < first_command
    assert {
        '#SBATCH --signal=B:USR1@180',
        '#SBATCH --requeue',
        '#SBATCH --array=0-7',
        '#SBATCH --gpus-per-node=1',
    } < set(lines)
