"""
Many runs of train.py, each in a folder of its own: which are complete, who trains which, and where.

A run is known by its command line. Its folder holds everything about it, so nothing is lost with
the process that started it:

    run.json      what was asked for
    log.jsonl     how far it came; last.pt is the state at its last evaluation
    output.txt    what train.py printed
    error.txt     why it failed
    run.lock      held by the process that starts the run, watches it and judges how it ended
    lock          held by train.py while it trains

Processes on this machine, or on others with the same file system, share the runs by these locks.
Both locks end with their process, however it ends. Where the process that watched is gone and its
train.py still trains, the others wait for the end of that one.
"""

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanomla.comparison.workers import TrainProcess, TrainWorker
from nanomla.core.checks import TEXT, check_entries, list_of
from nanomla.core.configurator import UserError
from nanomla.core.files import FolderLock, lock, read_json, write_file
from nanomla.training.launch import STOPPED, failure_reason, last_output
from nanomla.training.run.folder import failed_in_use, folder_in_use

FACTS = dict(words=list_of(TEXT))  # what run.json must have
RUN_LOCK = 'run.lock'
RESTARTS = 2  # so often a run goes on after a signal killed its process, or its device failed
DEVICE_FAILED = 'CUDA error:'  # whatever the process asks of the device from then on fails, too
LOOK_EVERY = 2.0  # seconds between looks at the folders of all runs


@dataclass
class Run:
    """
    One run of train.py.

    words: its command line without out_dir and init_from; None until all of `needs` have ended.
    tuned: the settings that were chosen from a grid, or are being tried.
    """

    contender: str
    role: str  # tune | seed
    seed: int
    folder: Path
    words: list[str] | None = None
    needs: list['Run'] = field(default_factory=list)
    tuned: dict = field(default_factory=dict)
    outcome: str = ''  # '', done or failed; never looked up again
    restarts: int = 0  # after a signal that nobody here sent, or a failure of the device
    refusal: str = ''  # why it cannot begin as it is asked for, whatever its folder holds
    reported: bool = False

    @property
    def name(self) -> str:
        if self.role == 'seed':
            return f'{self.contender}, seed {self.seed}'
        return f'{self.contender}, trying ' + ', '.join(as_pairs(self.tuned))

    def state(self) -> str:
        """Return 'done' (the log is complete), 'failed', 'part' (some of it is saved) or 'new'."""
        if not self.outcome:
            last = self.last_event()
            if (self.folder / 'error.txt').exists():
                self.outcome = 'failed'
            elif last.get('event') == 'end' and not last['why'].startswith('stopped'):
                self.outcome = 'done'
        if self.outcome:
            return self.outcome
        return 'part' if (self.folder / 'last.pt').exists() else 'new'

    def last_event(self) -> dict:
        """Return the last whole line of the log, {} where there is none."""
        try:
            with open(self.folder / 'log.jsonl', 'rb') as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 4096))
                lines = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    return event
        return {}

    def error(self) -> str:
        """Return why the run failed, '' where it has not."""
        if self.refusal:
            return self.refusal
        try:
            return (self.folder / 'error.txt').read_text().strip()
        except OSError:
            return ''

    def arguments(self) -> list[str]:
        """Return the whole command line for the next attempt."""
        words = [*self.words, f'--out_dir={self.folder}']
        if self.restarts:
            # The steps are the same; the kills seen so far happened while a graph was replayed.
            words.append('--cuda_graph=False')
        if (self.folder / 'last.pt').exists():
            words.append('--init_from=resume')
        return words

    def write_facts(self, facts: dict) -> None:
        """Write run.json: what is asked for, with `facts`."""
        about = facts | dict(
            words=self.words,
            contender=self.contender,
            role=self.role,
            seed=self.seed,
            tuned=self.tuned,
        )
        write_file(self.folder / 'run.json', json.dumps(about))

    def facts(self) -> dict:
        """Return run.json. UserError where it is missing or damaged."""
        path = self.folder / 'run.json'
        try:
            facts = read_json(path)
            check_entries(facts, FACTS, needed=FACTS)
        except (OSError, ValueError) as error:
            raise UserError(f'{path} cannot be used ({error}): remove that folder') from None
        return facts

    def changed_words(self, words: list[str], ignore=()) -> list[str]:
        """
        Return the arguments in which `words` and the run in the folder differ.

        ignore: names of settings that do not count. UserError where the folder holds a complete run
        and does not say of what.
        """
        try:
            earlier = self.facts()['words']
        except UserError:
            if self.last_event().get('event') == 'end':
                raise UserError(
                    f'{self.folder} holds a complete run but no run.json that says of what: '
                    'bring it there, or remove that folder'
                ) from None
            return []
        differing = []
        for word in [*words, *earlier]:
            name = word.removeprefix('--').partition('=')[0]
            if (word in words) != (word in earlier) and name not in ignore:
                differing.append(word)
        return differing

    def check_settings(self, words: list[str] | None = None, ignore=()) -> None:
        """
        Raise a UserError where the folder holds a run with other settings.

        words: the settings to compare with, those of this run if None. ignore: names of settings
        that do not count.
        """
        words = words or self.words
        if words is None:
            return
        changed = self.changed_words(words, ignore)
        if changed:
            raise UserError(
                f'{self.folder} was trained with other settings ({", ".join(changed[:4])}): '
                'name another --out_dir, or remove that folder'
            )

    def set_command(self, words: list[str], tuned: dict) -> None:
        """
        Fix the command line, of which the settings `tuned` were chosen from a grid.

        A folder with a run of another choice, from a grid that was smaller then, stays as it is;
        this run gets a folder beside it.
        """
        self.words, self.tuned = words, tuned
        if self.changed_words(words) and not self.changed_words(words, ignore=tuned):
            self.folder = self.folder.with_name(','.join([self.folder.name, *as_pairs(tuned)]))


def as_pairs(settings: dict) -> list[str]:
    return [f'{key}={value}' for key, value in settings.items()]


# -------------------------------------------------------------------------------------------------
# where runs are trained


def run_environments(device, jobs: int) -> list[dict]:
    """
    Return the environment of each train.py, for as many as may run at a time.

    These are `jobs` on each visible GPU, or on the one that --device names, or on the CPU, whose
    cores they share then. device: a torch.device.
    """
    if device.type != 'cuda' or device.index is not None:
        return [core_shares(jobs)] * jobs
    import torch

    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible:
        gpus = visible.split(',')
    else:
        gpus = [str(number) for number in range(torch.cuda.device_count())]
    cores = core_shares(jobs * len(gpus))
    return [dict(CUDA_VISIBLE_DEVICES=gpu) | cores for gpu in gpus * jobs]


def core_shares(processes: int) -> dict:
    """Return the environment that gives each of several processes its share of the cores."""
    if processes == 1:
        return {}
    cores = str(max(1, (os.cpu_count() or 1) // processes))
    names = ('OMP_NUM_THREADS', 'TORCHINDUCTOR_COMPILE_THREADS')
    return {name: cores for name in names if name not in os.environ}


class StopRequest:
    """
    Remember SIGINT, SIGTERM and SIGUSR1 inside the `with`, and the limit of minutes (0: none).

    A second SIGINT is Python's own again.
    """

    def __init__(self, minutes: float):
        self.reason = ''
        self.deadline = time.monotonic() + 60 * minutes if minutes else None
        self.handlers = {}

    def __enter__(self) -> 'StopRequest':
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                self.handlers[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number, frame) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(signal.SIGINT, self.handlers[signal.SIGINT])

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def made(self) -> bool:
        """Return whether it is time to stop; `reason` says why."""
        if not self.reason and self.deadline and time.monotonic() > self.deadline:
            self.reason = 'max_minutes'
        return bool(self.reason)


# -------------------------------------------------------------------------------------------------
# training them all


@dataclass
class ActiveRun:
    """A run under way here, with the lock on its folder."""

    run: Run
    process: TrainProcess | TrainWorker
    held: FolderLock
    stopping: bool = False


class RunQueue:
    """
    Train runs in their order, one on each environment at a time.

    runs: the list, which may grow meanwhile. environments: see run_environments. in_process:
    workers train run after run, instead of a process for each. facts: more entries of run.json.

    A subclass overrides prepare, begins, report and progress.
    """

    def __init__(
        self,
        runs: list[Run],
        environments: list[dict],
        in_process: bool = False,
        facts: dict | None = None,
    ):
        self.runs = runs
        self.facts = facts or {}
        kind = TrainWorker if in_process else TrainProcess
        self.idle = [kind(environment) for environment in environments]
        self.active: list[ActiveRun] = []

    def prepare(self, run: Run) -> None:
        """Give a run whose needs have ended its words. A UserError fails the run."""

    def begins(self, run: Run) -> None:
        """Called when train.py is about to begin a run here, or to go on with it."""

    def report(self, run: Run) -> None:
        """Called once for each run that has ended, and when one goes on in a new process."""

    def progress(self, running: list[Run]) -> None:
        """Called several times a second with the runs that are under way here."""

    def train(self, max_minutes: float = 0.0, wait: bool = True) -> str:
        """
        Train all runs that have not ended.

        wait: also for those that other processes train. Returns '' when nothing is left to do, else
        why it was stopped; what was under way is saved then.
        """
        look_again = 0.0
        with StopRequest(max_minutes) as stop:
            try:
                while True:
                    if self.collect_ended(stopping=bool(stop.reason)):
                        look_again = 0.0
                    if stop.made():
                        if not self.active:
                            return stop.reason
                        self.stop_active()
                    elif time.monotonic() >= look_again:
                        look_again = time.monotonic() + LOOK_EVERY
                        self.start_ready()
                        if not self.active and self.nothing_left(wait):
                            return ''
                    self.progress([active.run for active in self.active])
                    time.sleep(0.1)
            finally:
                self.close()

    def collect_ended(self, stopping: bool) -> bool:
        """Judge the runs whose process has ended. Tell whether there was one."""
        any_ended = False
        for active in list(self.active):
            code = active.process.poll()
            if code is None:
                continue
            any_ended = True
            if judge(active.run, code, stopping):
                self.report(active.run)
            active.held.release()
            self.active.remove(active)
            self.idle.insert(0, active.process)  # it is next: what it has compiled is there
        return any_ended

    def stop_active(self) -> None:
        for active in self.active:
            if not active.stopping:
                active.stopping = True
                active.process.stop()

    def start_ready(self) -> None:
        """Start the runs whose turn it is, and report those that have ended, here or elsewhere."""
        for run in self.runs:
            under_way = any(run is active.run for active in self.active)
            ready = all(need.outcome for need in run.needs)
            if not run.outcome and ready and not under_way:
                self.start(run)
            if run.outcome and not run.reported:
                run.reported = True
                self.report(run)

    def start(self, run: Run) -> None:
        """Start a run, unless it has ended, or cannot begin, or somebody else trains it."""
        try:
            self.prepare(run)
            run.check_settings()
        except UserError as error:
            # Nothing is written, least of all beside a run that is complete: when the same is asked
            # for again, the reason is found again at once.
            run.outcome, run.refusal = 'failed', str(error)
            return
        if run.state() in ('done', 'failed') or not self.idle:
            return
        held = lock(run.folder, RUN_LOCK)
        if held is None:
            return
        # Another process may have trained it since, or a train.py may be left of one that is gone.
        if run.state() in ('done', 'failed') or folder_in_use(run.folder):
            held.release()
            return
        run.write_facts(self.facts)
        process = self.idle.pop(0)
        self.begins(run)
        process.start(run)
        self.active.append(ActiveRun(run, process, held))

    def nothing_left(self, wait: bool) -> bool:
        left = [run for run in self.runs if not run.outcome]
        if not left:
            return True
        if wait:
            return False
        # Others train all that is left, unless something waits for what they train.
        return all(need.outcome for run in left for need in run.needs)

    def close(self) -> None:
        for active in self.active:
            active.process.stop()
        for process in self.idle + [active.process for active in self.active]:
            process.close()


def judge(run: Run, code: int, stopping: bool) -> bool:
    """
    Decide what has become of a run whose train.py has ended with `code`.

    One that is not done, and was not told to stop, has failed. Where a signal killed the process,
    or the device failed, it goes on from its last checkpoint, RESTARTS times: True then.
    """
    if run.state() == 'done':
        return False
    if code in (0, STOPPED) and run.last_event().get('why', '').startswith('stopped'):
        return False  # by a signal or its own max_minutes: it goes on from there
    if stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 130):
        return False  # before it could save: it begins again
    reason = failure_reason(last_output(run.folder), code)
    if failed_in_use(reason, code):
        return False  # another train.py was faster: its end is waited for
    died = code < 0 or DEVICE_FAILED in reason
    if died and run.restarts < RESTARTS:
        run.restarts += 1
        return True
    if died and run.restarts:
        reason += f', {run.restarts + 1} times'
    write_file(run.folder / 'error.txt', reason)
    return False
