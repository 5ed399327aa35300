"""
Start train.py as a process: its command line, its environment, the file that gets its output.

    run_train(['config/x.py', '--seed=1', '--out_dir=out/a'])   # waits; UserError where it fails

    with open_output(folder, words) as output:
        process = start_train(words, output)                    # a subprocess.Popen, does not wait
    ...
    failure_reason(last_output(folder), process.returncode)     # one line

Nothing here imports torch, so that a script can start runs without waiting for it.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from nanomla.core.configurator import UserError
from nanomla.core.files import ROOT, STARTED_BY_A_SCRIPT, appending, end_as, writing

PROMPT = '$ python train.py '  # begins an attempt in output.txt
FAILURE_LENGTH = 300  # letters of a reason
STOPPED = 75  # exit code of a script that was stopped and can go on later (EX_TEMPFAIL)


# -------------------------------------------------------------------------------------------------
# the command line and the process


def as_words(settings: dict) -> list[str]:
    """Return the settings as arguments of train.py, one --key=value each."""
    return [f'--{key}={value}' for key, value in settings.items()]


def train_command(words: Iterable[str], repository: str | os.PathLike = ROOT) -> list[str]:
    """Return the command that runs the train.py of `repository`, ours or a peer's."""
    return [sys.executable, str(Path(repository) / 'train.py'), *words]


def train_environment(changes: dict | None = None) -> dict:
    """Return the environment of a run: ours with `changes`."""
    # Where Python is when a SIGSEGV, SIGABRT or their like ends it goes to standard error.
    return os.environ | {'PYTHONFAULTHANDLER': '1', STARTED_BY_A_SCRIPT: '1'} | (changes or {})


def run_train(
    words: Iterable[str],
    repository: str | os.PathLike = ROOT,
    cwd: str | os.PathLike | None = None,
    show: bool = False,
) -> str:
    """
    Run a train.py until it ends and return what it printed.

    repository: the folder of the train.py. cwd: where it runs; None is the current folder.
    show: let it print to the terminal; what is returned is empty then.
    UserError, with the command and the reason, when it fails; what was shown has them already, and
    a SystemExit ends this script, too.
    """
    command = train_command(words, repository)
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if show:
        output = {}
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=train_environment(),
        stdin=subprocess.DEVNULL,
        text=True,
        errors='replace',
        **output,
    )
    if ended.returncode:
        if show:
            end_as(ended.returncode)
        reason = failure_reason(ended.stdout, ended.returncode)
        raise UserError(f'python {shlex.join(command[1:])} failed: {reason}')
    return ended.stdout or ''


def start_train(
    words: Iterable[str],
    output: TextIO,
    environment: dict | None = None,
    repository: str | os.PathLike = ROOT,
) -> subprocess.Popen:
    """
    Start train.py in a session of its own, out of reach of Ctrl-C; it prints to `output`.

    environment: what changes in ours.
    """
    return subprocess.Popen(
        train_command(words, repository),
        env=train_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


# -------------------------------------------------------------------------------------------------
# processes of one run


def share_batch(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """
    Return batch_size and gradient_accumulation_steps that the processes of a run can share.

    These are the ones asked for where the second is a multiple of the processes. Otherwise the
    micro-batches get smaller, and there are more of them: a step has the same number of sequences.
    UserError where these cannot be divided.
    """
    if accumulation % processes == 0:
        return batch_size, accumulation
    sequences = batch_size * accumulation
    if sequences % processes:
        raise UserError(
            f'{processes} processes cannot share a step of {sequences} sequences (batch_size='
            f'{batch_size} x gradient_accumulation_steps={accumulation}): make it a multiple'
        )
    share = sequences // processes
    fitting = [size for size in range(1, min(batch_size, share) + 1) if share % size == 0]
    return fitting[-1], sequences // fitting[-1]


def resume_command(out_dir: str) -> str:
    """Return the command that goes on with a run as it was started: alone or by torchrun."""
    script = shlex.join(['train.py', f'--out_dir={out_dir}', '--init_from=resume'])
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return f'python {script}'
    nodes = int(os.environ.get('GROUP_WORLD_SIZE', 1))
    words = ['torchrun', f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", 1)}']
    if nodes == 1:
        words.insert(1, '--standalone')
    else:
        words[1:1] = [f'--nnodes={nodes}', '--rdzv_backend=c10d']
        words.append(f'--rdzv_endpoint={os.environ["MASTER_ADDR"]}:29400')
    if attempts_allowed():
        words.append(f'--max_restarts={os.environ["TORCHELASTIC_MAX_RESTARTS"]}')
    return f'{shlex.join(words)} {script}'


def attempts_allowed() -> bool:
    """Return whether torchrun --max_restarts would start this process again after a failure."""
    return int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) > 0


def stopped_code() -> int:
    """
    Return the exit code of a train.py that was stopped and saved.

    torchrun --max_restarts takes every code but 0 for a failure, and would start it again.
    """
    return 0 if attempts_allowed() else STOPPED


# -------------------------------------------------------------------------------------------------
# what it printed


def open_output(folder: str | os.PathLike, words: Iterable[str]) -> TextIO:
    """Open FOLDER/output.txt to append, and write the command, which begins an attempt."""
    path = Path(folder) / 'output.txt'
    output = appending(path)
    with writing(path):
        output.write(f'{PROMPT}{shlex.join(words)}\n')
        output.flush()
    return output


def last_output(folder: str | os.PathLike) -> str:
    """Return what the last attempt in FOLDER/output.txt printed."""
    text = (Path(folder) / 'output.txt').read_text(encoding='utf-8', errors='replace')
    attempt = text.rpartition(PROMPT)[2]
    return attempt.partition('\n')[2]


def failure_reason(text: str, code: int) -> str:
    """
    Return why a train.py that printed `text` ended with `code`, in one line.

    That is its error message, or the exception below its last traceback (its text may have several
    lines, and a process may print more while it ends), or the last line.
    """
    if code < 0:
        return f'killed by {signal.Signals(-code).name}'
    lines = text.strip().splitlines()
    reason = _last_message(lines) or _last_exception(lines)
    if not reason and lines:
        reason = lines[-1]
    return reason[:FAILURE_LENGTH] or f'exit code {code}'


def _last_message(lines: list[str]) -> str:
    for line in reversed(lines):
        if line.startswith('error: '):
            return line.removeprefix('error: ')
    return ''


def _last_exception(lines: list[str]) -> str:
    traces = [
        number
        for number, line in enumerate(lines)
        if line.startswith('Traceback (most recent call last)')
    ]
    if not traces:
        return ''
    for line in lines[traces[-1] + 1 :]:
        if line and not line[0].isspace():  # the frames are indented
            return line
    return ''
