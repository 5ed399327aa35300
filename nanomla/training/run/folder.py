"""
The folder of a run: one run at a time, whether to go on with it, and where an earlier one goes.

    out_dir/                a run; lock is held while it trains
    out_dir/previous/ID/    an earlier one, whole

A run has an id, made when it begins, which stands in the first line of its log.jsonl and in each of
its checkpoints. A start that does not resume moves what an earlier run has written to previous/ID:
file by file into previous/ID.moving, last.pt at the end, and the rename of that folder completes
it. Where a kill cut that short, the next start moves the files back, or completes it. Nothing is
deleted, and what no run writes (notes, a comparison's files) stays where it is.

Nothing here imports torch.
"""

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nanomla.core.configurator import UserError
from nanomla.core.files import FolderLock, lock, sync_folder, writing
from nanomla.training.launch import attempts_allowed

IN_USE = 'is in use by another train.py'
LOCKS_OF_THIS_PROCESS: dict[Path, FolderLock] = {}  # by the run's folder

# What a run writes, in the order in which it is moved; step-*.pt and a tokenizer come before.
OUTPUTS = ('curve.png', 'ckpt.pt', 'log.jsonl', 'last.pt')
STEP_FILE = re.compile(r'step-\d{6,}\.pt')
MOVING = '.moving'
# Settings that name the folder and the start are of the command, not of the run.
NOT_OF_A_RUN = ('out_dir', 'init_from', 'eval_only')
# What last.pt holds, and other checkpoints do not.
RESUMABLE = {'optimizers', 'scaler', 'average', 'best_val_loss', 'best_step', 'seconds'}


@dataclass
class RunState:
    """Which run it is and how far it has come. Every checkpoint holds these entries."""

    run_id: str
    step: int = 0
    tokens: int = 0
    best_val_loss: float = float('inf')
    best_step: int = 0
    evaluated_step: int = 0  # the last step whose evaluation is in the log
    seconds: float = 0.0  # of wall time, in all its processes
    train_seconds: float = 0.0  # of these, spent on steps whose speed was measured

    @classmethod
    def of(cls, checkpoint: dict, tokens_per_step: int) -> 'RunState':
        """
        Return the state in a last.pt. UserError where it holds only weights.

        tokens_per_step: for one that was written before runs counted their tokens
        """
        if not checkpoint.keys() >= RESUMABLE:
            path = checkpoint['path']
            raise UserError(
                f'{path} holds no state to resume, only weights: '
                f'go on from them with --init_from={path}'
            )
        step = checkpoint['step']
        state = cls(
            run_id=checkpoint.get('run_id') or new_run_id(),
            tokens=step * tokens_per_step,
            evaluated_step=step,
        )
        for name in vars(state).keys() & checkpoint.keys():
            setattr(state, name, checkpoint[name])
        return state


def new_run_id() -> str:
    """Return an id for a run that begins: the time, so that ids sort, and a random end."""
    return f'{time.strftime("%Y%m%d-%H%M%S")}-{secrets.token_hex(3)}'


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
    """Return whether a train.py holds FOLDER/lock at this moment."""
    held = lock(folder)
    if held is None:
        return True
    held.release()
    return False


def failed_in_use(reason: str, code: int) -> bool:
    """Return whether a train.py ended because another one trains in its folder."""
    return code == 2 and IN_USE in reason


# -------------------------------------------------------------------------------------------------
# where a run begins


def launch_id() -> str:
    """Return what the attempts of one torchrun, or of one SLURM job, have in common; '' without."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', '')
    if name == 'none':  # torchrun's default; all attempts are children of the same torchrun
        return f'{socket.gethostname()}:{os.getppid()}'
    return name


def is_later_attempt() -> bool:
    """Return whether torchrun or SLURM has started this launch before."""
    counts = ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)


def resumes(init_from: str, given: Collection[str], last: Path, launch_of_last: str) -> bool:
    """
    Decide whether a start goes on with the state in `last`, an out_dir/last.pt.

    'resume' does, and 'auto' where the file is there. 'auto' is also the default where torchrun may
    start the run again. With another --init_from a later attempt of the launch that saved it does.
    UserError where there is nothing to resume.

    given: names of the settings that a person set; launch_of_last: the entry 'launch' of the file
    """
    if init_from == 'resume':
        if not os.path.exists(last):
            raise UserError(
                f'there is nothing to resume: {last} is missing; '
                'train with --init_from=scratch first'
            )
        return True
    if init_from == 'auto' or ('init_from' not in given and attempts_allowed()):
        return os.path.exists(last)
    return is_later_attempt() and launch_id() != '' and launch_of_last == launch_id()


def check_one_run(out: Path, run_id: str) -> None:
    """Raise a UserError where the log in a folder is of another run than the state to resume."""
    found = first_line(out / 'log.jsonl').get('run_id', run_id)
    if found != run_id:
        raise UserError(
            f'{out}/last.pt is of run {run_id}, {out}/log.jsonl of run {found}: '
            'move one of them away'
        )


# -------------------------------------------------------------------------------------------------
# an earlier run


def first_line(log: Path) -> dict:
    """Return the first line of a log.jsonl, {} where there is none."""
    try:
        with open(log, 'rb') as file:
            line = json.loads(file.readline(2**20))
    except (OSError, ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def outputs_in(out: Path, also: Collection[str] = ()) -> list[Path]:
    """Return the files of a folder that a run has written, last.pt at the end."""
    names = sorted(name for name in os.listdir(out) if STEP_FILE.fullmatch(name))
    settings = first_line(out / 'log.jsonl')
    copied = settings.get('copied', [])
    if isinstance(copied, list):
        names += [name for name in also if name in copied]
    return [out / name for name in [*names, *OUTPUTS] if os.path.lexists(out / name)]


def set_aside(out: Path, also: Collection[str] = ()) -> Path | None:
    """
    Move the run in folder `out`, whole, to a folder of its own in out/previous, and return that.

    None where no run has written anything there. also: names of files that a run may have copied
    there; its log says which it has.
    """
    files = outputs_in(out, also)
    if not files:
        return None
    name = name_of_run(out, files)
    previous = out / 'previous'
    target, number = previous / name, 1
    while os.path.lexists(target):
        number += 1
        target = previous / f'{name}-{number}'
    moving = target.with_name(target.name + MOVING)
    moving.mkdir(parents=True, exist_ok=True)
    for file in files:
        os.rename(file, moving / file.name)
    os.rename(moving, target)
    sync_folder(previous)
    sync_folder(out)
    return target


def name_of_run(out: Path, files: list[Path]) -> str:
    """Return the id of a run, or for one of before there were ids the time of its last change."""
    run_id = first_line(out / 'log.jsonl').get('run_id')
    if isinstance(run_id, str) and re.fullmatch(r'[0-9A-Za-z-]{1,64}', run_id):
        return run_id
    newest = max(file.lstat().st_mtime for file in files)
    return time.strftime('%Y%m%d-%H%M%S', time.localtime(newest))


def finish_move(out: Path) -> None:
    """Undo a move to out/previous that was cut short, or complete it where all files were moved."""
    with writing(out):
        for moving in sorted((out / 'previous').glob(f'*{MOVING}')):
            moved = [file for file in moving.iterdir() if not os.path.lexists(out / file.name)]
            if outputs_in(out) and len(moved) == len(os.listdir(moving)):
                for file in moved:
                    os.rename(file, out / file.name)
                moving.rmdir()
            else:
                os.rename(moving, moving.with_name(moving.name.removesuffix(MOVING)))
