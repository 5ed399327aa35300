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
from nanomla.core.files import ROOT, STARTED_BY_A_SCRIPT, FolderLock, lock, writing

PROMPT = '$ python train.py '  # begins an attempt in output.txt
IN_USE = 'is in use by another train.py'
FAILURE_LENGTH = 300  # letters of a reason
LOCKS_OF_THIS_PROCESS: dict[Path, FolderLock] = {}  # by the run's folder


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
    UserError, with the command and the reason, when it fails.
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
        reason = 'its message is above'
        if not show:
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
# one run in a folder at a time


def lock_run_folder(folder: str | os.PathLike) -> FolderLock:
    """
    Hold FOLDER/lock while a run trains there. UserError when another train.py does.

    A kill releases the lock, too, and a process trains one run at a time: where it holds the lock
    already, that is the lock of a run of its own that has failed. `failed_in_use` recognises the
    message in the output of a run.
    """
    path = Path(folder).resolve()
    if path in LOCKS_OF_THIS_PROCESS:
        LOCKS_OF_THIS_PROCESS.pop(path).release()
    held = lock(folder)
    if held is None:
        raise UserError(f'--out_dir={folder} {IN_USE}: wait for its end, or name another folder')
    LOCKS_OF_THIS_PROCESS[path] = held
    return held


def folder_in_use(folder: str | os.PathLike) -> bool:
    """Tell whether a train.py holds FOLDER/lock at this moment."""
    held = lock(folder)
    if held is None:
        return True
    held.release()
    return False


def failed_in_use(reason: str, code: int) -> bool:
    """Tell whether a train.py ended because another one trains in its folder."""
    return code == 2 and IN_USE in reason


# -------------------------------------------------------------------------------------------------
# what it printed


def open_output(folder: str | os.PathLike, words: Iterable[str]) -> TextIO:
    """Open FOLDER/output.txt to append, and write the command, which begins an attempt."""
    path = Path(folder) / 'output.txt'
    with writing(path):
        output = open(path, 'a', encoding='utf-8')
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
