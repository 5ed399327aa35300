"""
Race nanoGPT's train.py and then ours to a validation loss on tiny Shakespeare, each as a person
would start it, in a process of its own.

Seconds of training are steps times the time of a step, without start-up and evaluations, for both.
The peer runs in a copy of its checkout: nothing is written into the checkout itself.
"""

import json
import pickle
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanomla.benchmarks.training import Benchmark, write_row
from nanomla.core.configurator import UserError
from nanomla.core.files import copy_file, write_file
from nanomla.core.token_files import find, prepare_if_missing, read_meta
from nanomla.training.launch import run_train

DATASET = 'shakespeare_char'
PEER_CONFIG = 'config/train_shakespeare_char.py'
# From nanoGPT's README: its recipe for a GPU, cut to 2,000 steps (it overfits from 1,750 on), and
# the one for a CPU.
PEER_ON_GPU = ['--max_iters=2000']
PEER_ON_CPU = [
    '--device=cpu',
    '--compile=False',
    '--eval_iters=20',
    '--log_interval=1',
    '--block_size=64',
    '--batch_size=12',
    '--n_layer=4',
    '--n_head=4',
    '--n_embd=128',
    '--max_iters=2000',
    '--lr_decay_iters=2000',
    '--dropout=0.0',
]
# Settings of bench.py that our train.py does not have.
NOT_OURS = ('--peer', '--goal', '--results')


def race(bench: Benchmark, arguments: list[str]) -> None:
    """
    Train nanoGPT, then ours, print when each reached --goal, and write a row for each.

    arguments: config files and settings of this run, which train.py gets except for the race's own
    """
    race_nanogpt(bench)
    words = [word for word in arguments if not word.startswith(NOT_OURS)]
    race_ours(bench, words)


# -------------------------------------------------------------------------------------------------
# nanoGPT


def race_nanogpt(bench: Benchmark) -> None:
    goal = bench.settings['goal']
    recipe = bench.settings['peer_args'].split()
    if not recipe:
        recipe = PEER_ON_CPU if bench.device.type == 'cpu' else PEER_ON_GPU
    with tempfile.TemporaryDirectory() as folder:
        checkout = copied_checkout(bench.settings['peer'], folder)
        begin = time.perf_counter()
        output = run_train([PEER_CONFIG, *recipe], repository=checkout, cwd=checkout)
        process_seconds = time.perf_counter() - begin
    run = read_output(output)
    best_step, best = min(run.losses.items(), key=lambda step_and_loss: step_and_loss[1])
    reached = [step for step, loss in run.losses.items() if loss <= goal]
    step = reached[0] if reached else best_step
    seconds = step * run.step_ms / 1e3
    print(
        f'nanoGPT: val {run.losses[step]:.4f} at step {step} after {seconds:.1f} s of training '
        f'({run.step_ms:.2f} ms a step)\n  best val {best:.4f} at step {best_step}; '
        f'the whole process took {process_seconds:.1f} s',
        flush=True,
    )
    row = dict(
        what='race, nanoGPT',
        args=' '.join(recipe),
        goal=goal,
        reached_step=step if reached else None,
        best=best,
        best_step=best_step,
        train_seconds=seconds,
        process_seconds=process_seconds,
    )
    write_row(bench, row)


def copied_checkout(peer: str, folder: str) -> Path:
    """Copy nanoGPT's code and give it tiny Shakespeare as our dataset has it. Return the copy."""
    prepare_if_missing(DATASET)
    ours = find(DATASET)
    if not (ours / 'input.txt').exists():
        raise UserError(f'a race needs tiny Shakespeare: {ours / "input.txt"} is missing')
    checkout = Path(folder, 'nanoGPT')
    theirs = checkout / 'data' / DATASET
    for file in [*Path(peer).glob('*.py'), *Path(peer, 'config').glob('*.py')]:
        copy_file(file, checkout / file.relative_to(peer))
    for split in ('train.bin', 'val.bin'):
        copy_file(ours / split, theirs / split)
    meta = read_meta(ours)
    vocabulary = dict(
        vocab_size=meta['vocab_size'],
        stoi={character: i for i, character in enumerate(meta['chars'])},
        itos=dict(enumerate(meta['chars'])),
    )
    write_file(theirs / 'meta.pkl', pickle.dumps(vocabulary))
    return checkout


@dataclass
class NanoGPTRun:
    """What nanoGPT's train.py printed. step_ms: the median; losses: step -> validation loss"""

    step_ms: float
    losses: dict[int, float]


def read_output(output: str) -> NanoGPTRun:
    """Read the output of nanoGPT's train.py. UserError where it has no steps or no losses."""
    # The time of a step that evaluates, too, is an outlier: the median leaves it out.
    times = re.findall(r'^iter \d+: loss .*?, time ([\d.]+)ms', output, re.MULTILINE)
    losses = {}
    evaluation = re.compile(r'^step (\d+): train loss [\d.]+, val loss ([\d.]+)', re.MULTILINE)
    for step, loss in evaluation.findall(output):
        losses[int(step)] = float(loss)
    if not times or not losses:
        raise UserError("the peer's train.py printed no steps or no validation losses")
    return NanoGPTRun(statistics.median(map(float, times)), losses)


# -------------------------------------------------------------------------------------------------
# ours


def race_ours(bench: Benchmark, words: list[str]) -> None:
    goal = bench.settings['goal']
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, 'run')
        begin = time.perf_counter()
        run_train([*words, f'--out_dir={out}', '--init_from=scratch'], show=True)
        process_seconds = time.perf_counter() - begin
        log = (out / 'log.jsonl').read_text(encoding='utf-8')
    events = [json.loads(line) for line in log.splitlines()]
    evals = [event for event in events if event['event'] == 'eval']
    best = min(evals, key=lambda event: event['val_loss'])
    reached = [event for event in evals if event['val_loss'] <= goal]
    at = reached[0] if reached else best
    seconds = at['tokens'] / speed_until(at['step'], events)
    print(
        f'nanoMLA: val {at["val_loss"]:.4f} at step {at["step"]} after {seconds:.1f} s of '
        f'training, {at["seconds"]:.1f} s since its start\n  best val {best["val_loss"]:.4f}; '
        f'the whole process took {process_seconds:.1f} s'
    )
    row = dict(
        what='race, nanoMLA',
        args=' '.join(words),
        goal=goal,
        reached_step=at['step'] if reached else None,
        best=best['val_loss'],
        best_step=best['step'],
        train_seconds=seconds,
        seconds=at['seconds'],
        process_seconds=process_seconds,
    )
    write_row(bench, row)


def speed_until(step: int, events: list[dict]) -> float:
    """Return the tokens a second that the last training event up to `step` has."""
    speeds = [
        event['tok_per_s']
        for event in events
        if event['event'] == 'train' and event['step'] <= step
    ]
    return speeds[-1]
