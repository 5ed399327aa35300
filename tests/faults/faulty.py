"""
Break things on purpose: scripts in forks that are killed at any call that changes files, changed
and missing bytes, and inputs that hypothesis makes up.

A script passes when it ends within SECONDS of its process's time, without a traceback and without a
signal, and leaves nothing outside its output folder.
"""

import builtins
import io
import os
import random
import re
import resource
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from forked import end_of
from helpers import ROOT

SECONDS = 8  # of processor time: more is a hang
PATIENCE = 300  # seconds that a script may wait for what never comes
MEMORY = 16 * 2**30  # bytes of addresses that a script may use
KILLED = 137
# Calls that change what is on the disk.
CALLS = ('replace', 'rename', 'mkdir', 'unlink', 'remove', 'rmdir', 'fsync', 'truncate', 'link')


@dataclass
class Ended:
    """How a script ended: its exit code (negative: a signal), what it printed, its calls."""

    code: int
    output: str
    calls: int = 0

    def check(self) -> 'Ended':
        """Assert that it ended as a script should."""
        assert self.code != -signal.SIGPROF, f'it hangs: {self.output[-500:]}'
        assert self.code in (0, 1, 2, KILLED), f'exit code {self.code}: {self.output[-2000:]}'
        assert 'Traceback' not in self.output, self.output[-3000:]
        if self.code in (1, 2):
            assert 'error: ' in self.output or 'failed' in self.output, self.output[-2000:]
        return self


class CountedCalls:
    """Count the calls that change files, before and after each, and end the process at one."""

    def __init__(self, kill_at: int = 0):
        self.number, self.kill_at = 0, kill_at

    def tick(self) -> None:
        self.number += 1
        if self.number == self.kill_at:
            os._exit(KILLED)

    def around(self, call: Callable) -> Callable:
        def counted(*args, **options):
            self.tick()
            result = call(*args, **options)
            self.tick()
            return result

        return counted

    def around_open(self, call: Callable) -> Callable:
        def counted(file, mode='r', *args, **options):
            if not set(mode) & set('wxa+') or isinstance(file, int):
                return call(file, mode, *args, **options)
            self.tick()
            opened = call(file, mode, *args, **options)
            self.tick()
            return opened

        return counted

    def around_os_open(self, call: Callable) -> Callable:
        counted = self.around(call)

        def counted_where_it_writes(path, flags, *args, **options):
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            return (counted if writes else call)(path, flags, *args, **options)

        return counted_where_it_writes

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.around(getattr(os, name)))
        os.open = self.around_os_open(os.open)
        builtins.open = io.open = self.around_open(builtins.open)


def run_forked(
    script: str, arguments: list[str], folder: Path, kill_at: int = 0, prepare: Callable = None
) -> Ended:
    """
    Run a script in a fork of this process, with `folder` as its current one.

    kill_at: the number of the call at which the process ends at once; 0 for none. prepare: called
    in the fork before the script.
    """
    with tempfile.TemporaryDirectory() as aside:
        output, count = Path(aside) / 'output', Path(aside) / 'calls'
        child = os.fork()
        if not child:
            run_here(script, arguments, folder, kill_at, prepare, output, count)
        _, status = os.waitpid(child, 0)
        calls = int(count.read_text()) if count.exists() else 0
        text = output.read_text(errors='replace')
        return Ended(os.waitstatus_to_exitcode(status), text, calls)


def run_here(script, arguments, folder, kill_at, prepare, output, count) -> None:
    """Run a script in this process, which ends with it."""
    code = 99
    try:
        opened = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        open_before = builtins.open
        sys.stdout = open_before(1, 'w', closefd=False)
        sys.stderr = open_before(2, 'w', closefd=False)
        sys.excepthook = sys.__excepthook__
        torch.set_num_threads(1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(PATIENCE)
        os.chdir(folder)
        if prepare is not None:
            prepare()
        calls = CountedCalls(kill_at)
        calls.install()
        sys.argv = [script, *arguments]
        code = end_of(lambda: runpy.run_path(str(ROOT / script), run_name='__main__'))
        with open_before(count, 'w') as file:
            file.write(str(calls.number))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# -------------------------------------------------------------------------------------------------
# bytes


def damages(size: int, number: int, rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """Yield (what, place, bits): a changed byte, or a file that ends at a place."""
    for _ in range(number):
        place = rng.choice([rng.randrange(size), rng.randrange(min(200, size)), size - 1])
        if rng.random() < 0.3:
            yield 'cut', place, 0
        else:
            yield 'flip', place, rng.randrange(1, 256)


def damaged(whole: bytes, what: str, place: int, bits: int) -> bytes:
    if what == 'cut':
        return whole[:place]
    broken = bytearray(whole)
    broken[place] ^= bits
    return bytes(broken)


# -------------------------------------------------------------------------------------------------
# what is left


def tree(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the content of every file below a folder, those below `without` left out."""
    found = {}
    for path in sorted(Path(folder).rglob('*')):
        name = path.relative_to(folder).as_posix()
        top = re.sub(r'\.\d+\.partial$', '', name.split('/')[0])  # as a kill leaves it
        if path.is_file() and top not in without:
            found[name] = path.read_bytes()
    return found


@contextmanager
def nothing_else_changes(folder: Path, *outputs: str) -> Iterator[None]:
    """Assert that below `folder` only the `outputs` change."""
    before = tree(folder, outputs)
    yield
    after = tree(folder, outputs)
    assert after == before, f'changed: {sorted(dict(after.items() ^ before.items()))}'
