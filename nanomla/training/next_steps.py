"""
The commands that a script prints at its end: what one would type next.

They run as they are printed, in the current folder. Nothing here imports torch.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nanomla.core.files import ROOT, STARTED_BY_A_SCRIPT, print_line

if TYPE_CHECKING:
    from model import GPT


def print_next_steps(*commands: list[str]) -> None:
    """
    Print the next commands, unless another script has started this one and goes on itself.

    A command is a list of words, the first a script of this repository: ['train.py',
    'config/heal_mla.py', '--init_from=out-mla'].
    """
    if os.environ.get(STARTED_BY_A_SCRIPT):
        return
    lines = ['next:']
    for words in commands:
        lines.append('  python ' + shlex.join(path_from_here(word) for word in words))
    print_line('\n'.join(lines))


def path_from_here(word: str) -> str:
    """Return a file of this repository as the current folder needs it, any other word as it is."""
    if Path.cwd() == ROOT or not (ROOT / word).is_file():
        return word
    return str(ROOT / word)


def dataset_option(folder: str) -> list[str]:
    """Return the option of train.py that names a dataset; none for '', the one of the config."""
    return [f'--dataset={folder}'] if folder else []


def print_after_training(settings: Mapping, model: 'GPT') -> None:
    """Print the next commands of a finished run. settings: train.py's."""
    out = settings['out_dir']
    sample = ['sample.py', f'--out_dir={out}']
    evaluate = ['eval.py', f'--models={out}', '--cache_dtype=auto,int8,int4', '--window=0']
    if settings['keep_checkpoints']:
        last = ['find_induction_heads.py', f'--sweep={out}']
    elif is_convertible(model):
        last = ['convert_mla.py', out, f'--out={out.rstrip("/")}-mla', '--saving=0.75']
    else:
        last = ['find_induction_heads.py', f'--out_dir={out}']
    print_next_steps(sample, evaluate, last)


def is_convertible(model: 'GPT') -> bool:
    """Return whether convert_mla.py takes the model: a plain GPT without QK-norm."""
    from model import GPT

    return type(model) is GPT and not model.config.qk_norm
