"""
Many runs of train.py, each in a folder of its own: which are complete, who trains which, and on what.

A run is known by its command line. Its folder says all about it, so nothing is lost with the process
that started it: `run.json` what was asked for, `log.jsonl` and `last.pt` how far it came, `output.txt`
what train.py said, `error.txt` why it failed. A lock on `lock` tells every process that looks, on this
machine or another one with the same file system, that a run is being trained; the lock is train.py's as
well and ends with it, however it ends.
"""

import contextlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanomla.core.configurator import UserError
from nanomla.core.files import write_file, writing

HERE = Path(__file__).resolve().parents[2]
PROMPT = '$ python train.py '
TRACE = dict(
    PYTHONFAULTHANDLER='1'
)  # where Python is when SIGSEGV, SIGABRT or their like end it goes to standard error, which is output.txt
DEATHS = 2  # so often a run goes on after its process was killed by a signal, or its device failed
BROKEN = 'CUDA error:'  # what a device says then; whatever the process asks of it from then on fails, too
STOPPED = 75  # exit code of a script that was told to stop and can go on later (EX_TEMPFAIL)


@dataclass
class Run:
    """One run of train.py. `words` is its command line without out_dir and init_from, or None until all of `needs` are over."""

    contender: str
    role: str  # tune | seed
    seed: int
    folder: Path
    words: list = None
    needs: list = field(default_factory=list)
    tuned: dict = field(default_factory=dict)  # the settings that were chosen, or are being tried
    over: str = ''  # '', done or failed: never looked up again
    deaths: int = (
        0  # of processes that trained it, by a signal that nobody here sent or with their device
    )
    fault: str = ''  # why what is asked for now cannot begin, whatever its folder holds

    @property
    def name(self):
        return f'{self.contender}, ' + (
            f'seed {self.seed}'
            if self.role == 'seed'
            else 'trying ' + ', '.join(f'{key}={value}' for key, value in self.tuned.items())
        )

    def state(self):
        """'done' (the log has its end), 'failed', 'part' (some of it is saved) or 'new'."""
        if not self.over:
            last = self.last_event()
            if (self.folder / 'error.txt').exists():
                self.over = 'failed'
            elif last.get('event') == 'end' and not last['why'].startswith('stopped'):
                self.over = 'done'
        return self.over or ('part' if (self.folder / 'last.pt').exists() else 'new')

    def last_event(self):
        """The last whole line of the log, {} where there is none."""
        try:
            with open(self.folder / 'log.jsonl', 'rb') as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().splitlines(keepends=True)
        except OSError:
            return {}
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    return event
        return {}

    def error(self):
        try:
            return self.fault or (self.folder / 'error.txt').read_text().strip()
        except OSError:
            return ''

    def changed(self, words, but=()):
        """Those of `words` and of the command line of the run in the folder that are not in both, without settings in `but`. UserError when it does not say."""
        try:
            old = json.loads((self.folder / 'run.json').read_text())['words']
        except (OSError, ValueError, KeyError):
            if self.last_event().get('event') == 'end':
                raise UserError(
                    f'{self.folder} holds a complete run but no run.json that says of what: bring it there, or remove that folder'
                ) from None
            return []
        return [
            word
            for word in [*words, *old]
            if (word in words) != (word in old) and word[2:].partition('=')[0] not in but
        ]

    def checked(self, words=None, but=()):
        """This run; UserError when the folder holds one with other settings than `words`, its own if they are known. Those in `but` do not count."""
        words = words or self.words
        if changed := words and self.changed(words, but):
            raise UserError(
                f'{self.folder} was trained with other settings ({", ".join(changed[:4])}): '
                'name another --out_dir, or remove that folder'
            )
        return self

    def choose(self, words, tuned):
        """
        Settle on `words`, of which `tuned` were chosen from a grid. Where the folder holds a run with another choice, of a grid that
        was smaller then, that one stays as it is, and this one gets a folder beside it.
        """
        self.words, self.tuned = words, tuned
        if self.changed(words) and not self.changed(words, tuned):
            self.folder = self.folder.with_name(
                ','.join([self.folder.name, *(f'{key}={value}' for key, value in tuned.items())])
            )


def lock(folder, wait=False):
    """A file that keeps everybody else out of `folder` while it is open (by this process or one that inherits it); None when somebody has it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / 'lock', 'a')
    try:
        import fcntl
    except ImportError:  # Windows: nobody else may look
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except BlockingIOError:
        file.close()
    except OSError as error:
        raise UserError(
            f'{folder} is on a file system without locks ({error.strerror}): name an --out_dir on another one'
        ) from None


# ---------------------------------------------------------------------------------------------------
# one run


def arguments(run):
    again = ['--cuda_graph=False'] * (
        run.deaths > 0
    )  # the same steps; what has killed processes so far did it in a replayed graph
    return [*run.words, f'--out_dir={run.folder}', *again] + ['--init_from=resume'] * (
        (run.folder / 'last.pt').exists()
    )


def open_output(folder, words):
    """output.txt, after what earlier attempts have said, and behind a line that begins a new one."""
    output = open(folder / 'output.txt', 'a')
    output.write(f'{PROMPT}{shlex.join(words)}\n')
    output.flush()
    return output


def reason(folder, code):
    """
    Why a train.py failed, in one line: its message, the exception behind its last trace (an exception may have more lines,
    and a process may say more as it ends), or the last thing it said.
    """
    said = (folder / 'output.txt').read_text(errors='replace').rpartition(PROMPT)[
        2
    ].strip().splitlines()[1:] or ['']
    told = next(
        (line.removeprefix('error: ') for line in reversed(said) if line.startswith('error: ')), ''
    )
    traced = next(
        (
            i
            for i in range(len(said) - 1, -1, -1)
            if said[i].startswith('Traceback (most recent call last)')
        ),
        len(said),
    )
    raised = next((line for line in said[traced + 1 :] if line and not line[0].isspace()), '')
    return (
        f'killed by {signal.Signals(-code).name}'
        if code < 0
        else (told or raised or said[-1])[:300] or f'exit code {code}'
    )


class Process:
    """A train.py of its own, on the devices of `environment`."""

    def __init__(self, environment):
        self.environment = environment

    def start(self, run, held):
        words = arguments(run)
        with open_output(run.folder, words) as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / 'train.py'), *words],
                env=os.environ | TRACE | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[held.fileno()] if os.name == 'posix' else (),
            )

    def poll(self):
        return self.process.poll()

    def stop(self):
        self.process.terminate()

    def close(self):
        pass


class Worker:
    """A process that trains run after run: Python, torch and the device start once, and a model that it knows is compiled already."""

    BUSY = 'busy'

    def __init__(self, environment):
        self.environment, self.process = environment, None

    def start(self, run, held):
        held.close()  # the worker takes it
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, '-c', 'from nanomla.comparison import runs; runs.work()'],
                cwd=HERE,
                env=os.environ | TRACE | self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            os.set_blocking(self.process.stdout.fileno(), False)
        task = dict(
            folder=str(run.folder.resolve()),
            words=arguments(run),
            like=run.contender,
            cwd=os.getcwd(),
        )
        with contextlib.suppress(BrokenPipeError):  # it has died: poll tells
            self.process.stdin.write((json.dumps(task) + '\n').encode())
            self.process.stdin.flush()

    def poll(self):
        """The exit code that a train.py of its own would have had, 'busy' when another process trains it, None while it runs."""
        line = self.process.stdout.readline()
        code = json.loads(line) if line else self.process.poll()
        if code not in (
            None,
            0,
            self.BUSY,
        ):  # what failed there may have spoilt the device for others
            self.close()
        return code

    def stop(self):
        self.process.terminate()

    def close(self):
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.terminate()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def work():
    """The worker's side: tasks as JSON lines on standard input, exit codes on standard output."""
    import gc
    import traceback

    replies, own, like = os.fdopen(os.dup(1), 'w'), os.dup(2), None
    sys.path[0] = str(HERE)  # where -c looks is the folder that it stands in
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    for line in sys.stdin:
        task = json.loads(line)
        os.chdir(task['cwd'])
        held, code = lock(Path(task['folder'])), Worker.BUSY
        if held:
            with held, open_output(Path(task['folder']), task['words']) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout = sys.stderr = output
                import torch

                if (
                    like != task['like'] and 'torch._dynamo' in sys.modules
                ):  # what was compiled is of no more use
                    torch._dynamo.reset()
                like = task['like']
                if torch.cuda.is_initialized():
                    torch.cuda.reset_peak_memory_stats()
                sys.argv, code = ['train.py', *task['words']], 0
                try:
                    runpy.run_path(str(HERE / 'train.py'), run_name='__main__')
                except SystemExit as error:
                    code = (
                        error.code
                        if isinstance(error.code, int)
                        else 0
                        if error.code is None
                        else 1
                    )
                    print(error.code if isinstance(error.code, str) else '', file=output)
                except UserError as error:
                    code = 2
                    print(f'error: {error}', file=output)
                except Exception:
                    code = 1
                    traceback.print_exc(file=output)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                gc.collect()
                with contextlib.suppress(RuntimeError if code else ()):  # a device that has failed
                    if torch.cuda.is_initialized():
                        torch.cuda.empty_cache()
                sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
                for number in (
                    1,
                    2,
                ):  # what this process says from now on, when it ends above all, is not of that run
                    os.dup2(own, number)
        replies.write(json.dumps(code) + '\n')
        replies.flush()


# ---------------------------------------------------------------------------------------------------
# all of them


def slots(device, jobs):
    """
    What the environment of each train.py says, for as many as may run at a time: `jobs` on each GPU that is
    visible, or on the one that --device names, or on the CPU, whose cores they then share.
    """
    if device.type == 'cuda' and device.index is None:
        import torch

        names = os.environ.get('CUDA_VISIBLE_DEVICES')
        gpus = names.split(',') if names else [str(i) for i in range(torch.cuda.device_count())]
        return [
            dict(CUDA_VISIBLE_DEVICES=gpu) | shares(jobs * len(gpus))
            for _ in range(jobs)
            for gpu in gpus
        ]
    return [shares(jobs)] * jobs


def shares(processes):
    """Each process's share of the cores, for those that would take them all."""
    cores = str(max(1, (os.cpu_count() or 1) // processes))
    return {
        name: cores
        for name in ('OMP_NUM_THREADS', 'TORCHINDUCTOR_COMPILE_THREADS')
        if processes > 1 and name not in os.environ
    }


class Stop:
    """Remembers SIGINT, SIGTERM and SIGUSR1 while it is entered; a second SIGINT is Python's own again."""

    def __init__(self, minutes):
        self.why, self.until = '', time.monotonic() + 60 * minutes if minutes else None

    def __enter__(self):
        self.old = {}
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
            if hasattr(signal, name):
                number = getattr(signal, name)
                self.old[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number, frame):
        self.why = signal.Signals(number).name
        signal.signal(signal.SIGINT, self.old[signal.SIGINT])

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def asked(self):
        if not self.why and self.until and time.monotonic() > self.until:
            self.why = 'max_minutes'
        return self.why


def train(runs, prepare, environments, in_process, note, tell, look, minutes=0, wait=True):
    """
    Train all of `runs` that are not over, in their order, one on each of `environments` at a time.

    prepare(run): gives a run whose needs are over its words, or raises UserError, which fails it
    note: a dict that goes to run.json beside the words
    tell(run): called once for each run that is over, and when one goes on after its process was killed
    look(running): called several times a second with the runs under way here
    wait: also for runs that other processes are training
    Returns '' when there is nothing left to do, else why it was stopped; what was under way is saved then.
    """
    idle = [(Worker if in_process else Process)(environment) for environment in environments]
    active, told, due = [], set(), 0
    with Stop(minutes) as stop:
        try:
            while True:
                for entry in list(active):
                    run, process, held = entry
                    if (code := process.poll()) is not None:
                        if finish(run, code, stop.why):
                            tell(run)
                        held.close()
                        active.remove(entry)
                        idle.insert(0, process)  # it is next: what it has compiled is there
                        due = 0
                if asked := stop.asked():
                    if not active:
                        return asked
                    for run, process, _ in active:
                        if (id(run), 'stop') not in told:
                            told.add((id(run), 'stop'))
                            process.stop()
                elif time.monotonic() >= due:
                    due = time.monotonic() + 2
                    for run in runs:
                        if (
                            not run.over
                            and all(need.over for need in run.needs)
                            and all(run is not other for other, _, _ in active)
                        ):
                            held = take(run, prepare, bool(idle))
                            if held:
                                write_file(
                                    run.folder / 'run.json',
                                    json.dumps(
                                        note
                                        | dict(
                                            words=run.words,
                                            contender=run.contender,
                                            role=run.role,
                                            seed=run.seed,
                                            tuned=run.tuned,
                                        )
                                    ),
                                )
                                process = idle.pop(0)
                                process.start(run, held)
                                active.append((run, process, held))
                        if run.over and id(run) not in told:
                            told.add(id(run))
                            tell(run)
                    left = [run for run in runs if not run.over]
                    if not active and (
                        not left
                        or not wait
                        and all(need.over for run in left for need in run.needs)
                    ):
                        return ''
                look([run for run, _, _ in active])
                time.sleep(0.1)
        finally:
            for _, process, _ in active:
                process.stop()
            for process in idle + [process for _, process, _ in active]:
                process.close()


def take(run, prepare, free):
    """The lock of a run whose turn it is, if there is a `free` place for it; None when it is over or somebody else trains it."""
    try:
        prepare(run)
        run.checked()
    except UserError as error:
        run.over, run.fault = (
            'failed',
            str(error),
        )  # known again at once when it is asked for again: nothing to keep, least of all beside a run that is complete
        return None
    if run.state() in ('done', 'failed') or not free or not (held := lock(run.folder)):
        return None
    if run.state() in ('done', 'failed'):  # by somebody else, since
        held.close()
        return None
    return held


def finish(run, code, stopping):
    """
    After a train.py has ended with `code`: a run that is not done, and was not told to stop, has failed. One whose process
    was killed, or whose device failed, goes on in a new one, from its last checkpoint, DEATHS times: True then.
    """
    if code == Worker.BUSY or run.state() == 'done':
        return False
    if code == 0 and run.last_event().get('why', '').startswith('stopped'):
        return False  # by a signal or its own max_minutes: it goes on from there
    if stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 130):
        return False  # before it could save: it begins again
    why = reason(run.folder, code)
    died = code < 0 or BROKEN in why
    if died and run.deaths < DEATHS:
        run.deaths += 1
        return True
    write_file(
        run.folder / 'error.txt', why + (f', {run.deaths + 1} times' if run.deaths and died else '')
    )
    return False
