"""
slurm/train.sbatch without SLURM: shims stand in for its commands and for torchrun.

A train.py without torch keeps train.py's promise: when one of its processes gets SIGUSR1 they all
end with exit code 75, after the first has saved last.pt and logged that it was stopped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, wait_for_end, wait_for_files

SCRIPT = ROOT / 'slurm' / 'train.sbatch'
pytestmark = pytest.mark.skipif(
    not (shutil.which('bash') and shutil.which('pkill')), reason='needs bash and pkill'
)

SHIMS = dict(
    # One task a node. It starts with signals at their default, as slurmstepd starts it, whatever
    # srun ignores.
    srun="""
import os, signal, subprocess, sys
command, tasks = sys.argv[sys.argv.index('bash'):], []
for node in range(int(os.environ['SLURM_JOB_NUM_NODES'])):
    tasks.append(subprocess.Popen(command, env=os.environ | dict(SLURM_NODEID=str(node)),
                                  preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL)))
open('tasks', 'w').write(' '.join(str(task.pid) for task in tasks))
open('srun', 'w').write(' '.join(sys.argv[1:sys.argv.index('bash')]))
sys.exit(max(task.wait() for task in tasks))
""",
    # Signals the tasks, as proctrack/cgroup does, or all their descendants, too, as
    # proctrack/linuxproc does.
    scancel="""
import os, signal, subprocess, sys
assert sys.argv[1:] == ['--signal=USR1', '4711'], sys.argv
pids = open('tasks').read().split()
if os.environ['TRACKING'] == 'linuxproc':
    for pid in pids:
        pids += subprocess.run(['pgrep', '-P', pid], capture_output=True, text=True).stdout.split()
for pid in pids:
    os.kill(int(pid), signal.SIGUSR1)
""",
    scontrol="""
import os, sys
if sys.argv[1:3] == ['show', 'hostnames']:
    print('\\n'.join(f'node{n:02d}' for n in range(int(os.environ['SLURM_JOB_NUM_NODES']))))
elif sys.argv[1:] == ['show', 'node', 'node00']:
    print('NodeName=node00 Arch=x86_64\\n   NodeAddr=10.1.2.3 NodeHostName=node00 Version=23')
else:
    open('scontrol', 'a').write(' '.join(sys.argv[1:]))
""",
    # Like the real one: workers in sessions of their own, SIGTERM goes on to them, and it does not
    # know SIGUSR1.
    torchrun="""
import os, signal, subprocess, sys
at, node = sys.argv.index('train.py'), os.environ['SLURM_NODEID']
open('torchrun.' + node, 'w').write(' '.join(sys.argv[1:at]))
n = next(int(word.partition('=')[2]) for word in sys.argv if word.startswith('--nproc_per_node='))
workers = []
def end(number, frame):
    for worker in workers:
        worker.terminate()
signal.signal(signal.SIGTERM, end)
for rank in range(n):
    environment = os.environ | dict(LOCAL_RANK=str(rank))
    command = ['python', *sys.argv[at:]]
    workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
sys.exit(1 if any([worker.wait() for worker in workers]) else 0)  # whatever their codes
""",
)

TRAIN = """
out_dir = 'out'
init_from = 'scratch'  # scratch | auto | resume | gpt2
batch_size = 4
gradient_accumulation_steps = 2
ends = 'when asked'  # when asked | soon | badly | complete (in the moment it is asked)

from nanomla.core.configurator import configure
configure(globals())

import json, os, signal, sys, time
name, asked = os.environ['SLURM_NODEID'] + os.environ['LOCAL_RANK'], []

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
open('ready.' + name, 'w').close()
until = time.time() + (0 if ends == 'soon' else 300)
while time.time() < until and not os.path.exists('stop'):
    time.sleep(0.01)
    if asked:
        open('stop', 'w').close()  # this is how these processes agree
time.sleep(0.1)  # saving takes its time: asked again, it would be seen
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a Python that is ending has no handlers
open('asked.' + name, 'w').write(' '.join(asked))
if ends == 'badly':
    sys.exit(1)
if name == '00':
    os.makedirs(out_dir, exist_ok=True)
    open(out_dir + '/last.pt', 'w').write('saved')
    stopped = os.path.exists('stop') and ends != 'complete'
    why = 'stopped by a signal' if stopped else 'max_iters reached'
    end = dict(event='end', step=7, why=why, best_val_loss=1.5)
    open(out_dir + '/log.jsonl', 'a').write(json.dumps(end) + chr(10))
if os.path.exists('stop') and ends != 'complete':
    time.sleep(0.2)  # until the first has saved
    sys.exit(75)
"""


@pytest.fixture
def job(tmp_path):
    """
    job(*arguments, **environment) -> a started batch script in tmp_path.

    There the shims leave their files.
    """
    started = []
    commands = tmp_path / 'bin'
    commands.mkdir()
    for name, source in SHIMS.items():
        (commands / name).write_text(f'#!{sys.executable} -SE\n{source}')
    (commands / 'python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    (tmp_path / 'train.py').write_text(TRAIN)
    (tmp_path / 'nanomla').symlink_to(ROOT / 'nanomla')

    def start(*arguments, nodes=1, cwd=tmp_path, **environment):
        slurm = dict(
            SLURM_JOB_ID='4711',
            SLURM_JOB_NODELIST='node[00-07]',
            SLURM_JOB_NUM_NODES=str(nodes),
            SLURM_GPUS_ON_NODE='2',
            SLURM_CPUS_PER_TASK='3',
            TRACKING='cgroup',
        )
        own = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
        path = dict(PATH=f'{commands}:{os.environ["PATH"]}')
        process = subprocess.Popen(
            ['bash', SCRIPT, *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=own | slurm | environment | path,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def asked(folder):
    return [path.read_text() for path in sorted(folder.glob('asked.*'))]


@pytest.mark.parametrize('nodes, tracking', [(1, 'cgroup'), (2, 'cgroup'), (1, 'linuxproc')])
def test_when_the_time_is_up_it_saves_and_goes_back_into_the_queue(nodes, tracking, job, tmp_path):
    process = job('--out_dir=runs/x', nodes=nodes, TRACKING=tracking)
    wait_for_files(tmp_path, 'ready.*', 2 * nodes)
    process.send_signal(signal.SIGUSR1)
    code, out, err = wait_for_end(process)
    assert (code, err) == (0, ''), err
    if tracking == 'cgroup':
        assert sorted(asked(tmp_path)) == [''] * (2 * nodes - 1) + ['SIGUSR1']
    else:
        assert len(asked(tmp_path)) == 2 * nodes
    assert (tmp_path / 'runs/x/last.pt').read_text() == 'saved'
    assert (tmp_path / 'scontrol').read_text() == 'requeue 4711'
    assert 'runs/x/last.pt is saved' in out.splitlines()[-1]


@pytest.mark.parametrize('nodes, meeting', [(1, '127.0.0.1'), (3, '10.1.2.3')])
def test_the_nodes_meet_at_an_address_of_the_first_one(nodes, meeting, job, tmp_path):
    """Node names need not resolve: one node needs none, of several SLURM knows the address."""
    process = job('--ends=soon', '--gradient_accumulation_steps=6', nodes=nodes)
    assert wait_for_end(process)[0] == 0
    options = '--ntasks-per-node=1 --cpus-per-task=3 --kill-on-bad-exit=1'
    assert (tmp_path / 'srun').read_text() == options
    calls = [(tmp_path / f'torchrun.{node}').read_text().split() for node in range(nodes)]
    for node, call in enumerate(calls):
        assert f'--rdzv_conf=is_host={"true" if node == 0 else "false"}' in call
        assert {
            f'--nnodes={nodes}',
            '--nproc_per_node=2',
            '--rdzv_backend=c10d',
            f'--rdzv_endpoint={meeting}:24711',
            '--rdzv_id=4711',
        } < set(call)
    assert not (tmp_path / 'scontrol').exists()  # it came to its end by itself


def test_an_address_can_be_given(job, tmp_path):
    process = job('--ends=soon', nodes=2, MASTER_ADDR='127.0.0.9')
    assert wait_for_end(process)[0] == 0
    call = (tmp_path / 'torchrun.1').read_text().split()
    # the second is the one by which this node reaches the first
    assert '--rdzv_endpoint=127.0.0.9:24711' in call and '--local_addr=127.0.0.1' in call


def saved_run(folder, **settings):
    """A folder in which a job has saved a run."""
    folder.mkdir()
    (folder / 'last.pt').touch()
    line = dict(event='settings', config=settings) if settings else dict(event='end', why='failed')
    (folder / 'log.jsonl').write_text(json.dumps(line) + '\n')


@pytest.mark.parametrize('saved', [False, True])
@pytest.mark.parametrize('restarts', ['', '0', '1'])
def test_the_same_command_again_goes_on_with_what_is_there(restarts, saved, job, tmp_path):
    (tmp_path / 'own.py').write_text("out_dir = 'of the config'\n")
    if saved:
        saved_run(tmp_path / 'of the config')
    code, out, err = wait_for_end(job('own.py', '--ends=soon', SLURM_RESTART_COUNT=restarts))
    assert (code, err) == (0, '')
    assert out.splitlines()[0].endswith('train.py --init_from=auto own.py --ends=soon')


def test_a_run_of_another_model_is_not_begun_twice_in_a_folder(job, tmp_path):
    saved_run(tmp_path / 'out')
    code, out, err = wait_for_end(job('--init_from=gpt2', '--ends=soon'))
    assert code == 2 and err == (
        'error: --out_dir=out holds a run already: go on with it by --init_from=resume, or name '
        'another folder to begin from gpt2 again\n'
    )
    assert not (tmp_path / 'srun').exists()
    # Put back into the queue, it is the same job: train.py goes on with what that has saved.
    process = job('--init_from=gpt2', '--ends=soon', SLURM_RESTART_COUNT='1')
    assert wait_for_end(process)[0] == 0


def test_a_batch_that_cannot_be_shared_is_told_before_anything_starts(job, tmp_path):
    code, out, err = wait_for_end(job('--ends=soon', nodes=3))
    assert code == 2 and not (tmp_path / 'srun').exists()
    assert err == (
        'error: 6 processes cannot share a step of 8 sequences '
        '(batch_size=4 x gradient_accumulation_steps=2): make it a multiple\n'
    )
    saved_run(tmp_path / 'out', batch_size=6)  # which the run goes on with
    assert wait_for_end(job('--ends=soon', nodes=3))[0] == 0


def test_a_run_that_completes_in_the_last_minutes_stays_ended(job, tmp_path):
    process = job('--ends=complete')
    wait_for_files(tmp_path, 'ready.*', 2)
    process.send_signal(signal.SIGUSR1)
    assert wait_for_end(process)[0] == 0 and sorted(asked(tmp_path)) == ['', 'SIGUSR1']
    assert not (tmp_path / 'scontrol').exists()


def test_a_failed_run_stays_failed(job, tmp_path):
    process = job('--ends=badly')
    wait_for_files(tmp_path, 'ready.*', 2)
    process.send_signal(signal.SIGUSR1)
    assert wait_for_end(process)[0] == 1 and sorted(asked(tmp_path)) == ['', 'SIGUSR1']
    assert not (tmp_path / 'scontrol').exists()


def test_a_cancelled_run_is_told(job, tmp_path):
    process = job()
    wait_for_files(tmp_path, 'ready.*', 2)
    for pid in (tmp_path / 'tasks').read_text().split():
        os.kill(int(pid), signal.SIGTERM)  # as scancel does
    wait_for_end(process)
    assert asked(tmp_path) == ['SIGTERM', 'SIGTERM'] and (tmp_path / 'out/last.pt').exists()
    assert not (tmp_path / 'scontrol').exists()


WRONG_NAME = "error: --out_dri=x: unknown setting 'out_dri'; did you mean --out_dir?\n"


def test_what_is_wrong_is_told_before_anything_starts(job, tmp_path):
    code, out, err = wait_for_end(job('--out_dri=x'))
    assert (code, err) == (2, WRONG_NAME)
    code, out, err = wait_for_end(job(cwd=tmp_path / 'bin'))
    assert code == 2
    assert err.startswith('error: there is no train.py in ') and err.count('\n') == 1
    assert not (tmp_path / 'srun').exists()


def test_it_reads_the_real_settings(job, tmp_path):
    code, out, err = wait_for_end(job('--out_dri=x', cwd=ROOT))
    assert (code, err) == (2, WRONG_NAME)


def test_what_sbatch_reads():
    subprocess.run(['bash', '-n', SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith('#SBATCH ')]
    first_command = next(number for number, line in enumerate(lines) if line and line[0] != '#')
    # sbatch stops reading at the first command.
    assert lines[0] == '#!/bin/bash' and max(directives) < first_command
    assert {
        '#SBATCH --signal=B:USR1@180',
        '#SBATCH --requeue',
        '#SBATCH --ntasks-per-node=1',
    } < set(lines)
