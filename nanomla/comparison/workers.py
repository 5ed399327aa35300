"""
The two ways to train a run: a train.py of its own, or a worker that trains run after run.

Both have start(run), poll(), stop() and close(). A worker saves the start of Python, torch and the
device, and does not compile a model again that it has just compiled. Its tasks are JSON lines on
its standard input, its answers, exit codes, JSON lines on its standard output.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TextIO

from nanomla.core.configurator import UserError
from nanomla.core.files import ROOT
from nanomla.training.launch import open_output, start_train, train_environment

# What train.py sets a handler for, and what a worker gives back its own after each run.
SIGNALS = (signal.SIGTERM, signal.SIGINT) + (
    (signal.SIGUSR1,) if hasattr(signal, 'SIGUSR1') else ()
)


class Task(Protocol):
    """What is needed of a run (runs.py) to train it."""

    folder: Path
    contender: str

    def arguments(self) -> list[str]: ...


class TrainProcess:
    """A train.py of its own for each run. environment: what changes in ours, such as its GPU."""

    def __init__(self, environment: dict):
        self.environment = environment

    def start(self, run: Task) -> None:
        words = run.arguments()
        with open_output(run.folder, words) as output:
            self.process = start_train(words, output, self.environment, ROOT)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()

    def close(self) -> None:
        pass


class TrainWorker:
    """A process that trains run after run. environment: what changes in ours."""

    def __init__(self, environment: dict):
        self.environment = environment
        self.process = None

    def start(self, run: Task) -> None:
        if self.process is None:
            self.process = self.start_worker()
        task = dict(
            folder=str(run.folder.resolve()),
            words=run.arguments(),
            contender=run.contender,
            cwd=os.getcwd(),
        )
        with contextlib.suppress(BrokenPipeError):  # it has died: poll finds out
            self.process.stdin.write((json.dumps(task) + '\n').encode())
            self.process.stdin.flush()

    def start_worker(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, '-c', 'from nanomla.comparison import workers; workers.serve()'],
            cwd=ROOT,
            env=train_environment(self.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def poll(self) -> int | None:
        """Return the exit code that a train.py of its own would have had, None while it runs."""
        line = self.process.stdout.readline()
        code = json.loads(line) if line else self.process.poll()
        if code:  # what failed may have left the device unusable for the next run
            self.close()
        return code

    def stop(self) -> None:
        self.process.terminate()

    def close(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
        self.process = None


# -------------------------------------------------------------------------------------------------
# inside the worker


def serve() -> None:
    """Train what standard input asks for, until it ends."""
    # Standard output is for the answers alone: a run prints to its output.txt.
    answers = os.fdopen(os.dup(1), 'w')
    sys.path[0] = str(ROOT)  # with -c it is the current folder, which changes below
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    contender = None
    for line in sys.stdin:
        task = json.loads(line)
        os.chdir(task['cwd'])
        with open_output(task['folder'], task['words']) as output, printing_to(output):
            forget_compiled = contender is not None and contender != task['contender']
            prepare_torch(forget_compiled)
            contender = task['contender']
            code = train_here(task['words'], output)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            clean_up(failed=code != 0)
        answers.write(json.dumps(code) + '\n')
        answers.flush()


@contextlib.contextmanager
def printing_to(output: TextIO) -> Iterator[None]:
    """Lead standard output and standard error, of Python and of libraries, to `output`."""
    original = os.dup(2)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    try:
        yield
    finally:
        # What this process prints from here on, above all when it ends, is not that run's.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.dup2(original, 1)
        os.dup2(original, 2)
        os.close(original)


def prepare_torch(forget_compiled: bool) -> None:
    """Drop the compiled code of another contender, and count the device's memory from zero."""
    import torch

    if forget_compiled and 'torch._dynamo' in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def train_here(words: list[str], output: TextIO) -> int:
    """Run train.py in this process and return the exit code that it would have had."""
    sys.argv = ['train.py', *words]
    try:
        runpy.run_path(str(Path(ROOT, 'train.py')), run_name='__main__')
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=output)
            return 1
        return error.code or 0
    except UserError as error:
        print(f'error: {error}', file=output)
        return error.exit_code
    except Exception:
        traceback.print_exc(file=output)
        return 1
    return 0


def clean_up(failed: bool) -> None:
    """Free the memory of a run, and with its globals the lock on its folder."""
    import torch

    gc.collect()
    try:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    except RuntimeError:  # expected of a device that has failed
        if not failed:
            raise
