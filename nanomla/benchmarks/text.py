"""
Time whole texts, ours beside the `generate` of other libraries (peers.py) in one process.

Rows hold seconds a token with their median and range, and the ratio of theirs to ours. The first
text of each is a warm-up and does not count; ours keeps its cache from text to text, as sample.py
does.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import GPT
from nanomla.benchmarks import peers
from nanomla.benchmarks.decode import empty
from nanomla.benchmarks.plan import DecodePlan, build_model, make_cache
from nanomla.core import timing
from nanomla.core.checks import split_list
from nanomla.core.configurator import UserError
from nanomla.core.files import ResultsTable
from nanomla.core.timing import attempt, free_memory, median_and_range, peaks, reset_peak_memory
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

WARMUP_TOKENS = 8  # of a peer's first text


@dataclass
class PeerTimes:
    """Seconds a token of a peer's texts."""

    peer: str
    batch: int
    seconds: list[float]


def ratios(theirs: list[float], ours: list[float]) -> dict:
    """
    Return theirs over ours, of seconds a token: ratio, ratio_least and ratio_most.

    The extremes pair the slowest of the one with the fastest of the other.
    """
    return dict(
        ratio=statistics.median(theirs) / statistics.median(ours),
        ratio_least=min(theirs) / max(ours),
        ratio_most=max(theirs) / min(ours),
    )


def measure_texts(plan: DecodePlan, rows: ResultsTable, report: Callable = print) -> None:
    """Time texts of each of --peer, then of each model and cache with that peer's sampling."""
    theirs = []
    for name in split_list(plan.settings['peer']):
        theirs += measure_peer(plan, name, rows, report)
        free_memory(plan.device)
    for name in plan.models:
        model = build_model(plan, name)
        for layout in plan.cached_layouts:
            for dtype in plan.cache_dtypes:
                for peer in theirs:
                    row = measure_ours(plan, model, (layout, dtype), peer)
                    row = rows.add(what='text', model=name, **row)
                    report(row_text(row))
        del model
        free_memory(plan.device)


def measure_peer(
    plan: DecodePlan, name: str, rows: ResultsTable, report: Callable
) -> list[PeerTimes]:
    """Time the texts of one of --peer at every batch size; add and report a row for each."""
    settings, device = plan.settings, plan.device
    new_tokens = settings['peer_new_tokens'] or settings['new_tokens']
    vocab_size = -(-settings['vocabulary'] // 64) * 64
    peer, continue_text = peers.generator(name, settings, vocab_size, device, plan.dtype)
    found = []
    for batch in plan.batch_sizes:
        idx = random_prompts(plan, batch)
        continue_text(idx, min(WARMUP_TOKENS, new_tokens))
        times = []
        for _ in range(settings['peer_repeats']):
            times.append(time_peer_text(continue_text, idx, new_tokens) / new_tokens)
        found.append(PeerTimes(peer, batch, times))
        row = rows.add(
            what='text',
            model=peer,
            batch=batch,
            prompt_tokens=settings['prompt_tokens'],
            new_tokens=new_tokens,
            repeats=settings['peer_repeats'],
            sampling=peers.SAMPLING[peer],
            tok_per_s=batch / statistics.median(times),
            reason='',
            **median_and_range('step_us', times, 1e6),
        )
        report(row_text(row))
    return found


def time_peer_text(continue_text: Callable, idx: torch.Tensor, new_tokens: int) -> float:
    """Return the seconds of continuing idx (B, T) by new_tokens."""

    def run():
        batch, length = idx.shape
        assert continue_text(idx, new_tokens).shape == (batch, length + new_tokens)

    return timing.seconds(idx.device, run)


def random_prompts(plan: DecodePlan, batch: int) -> torch.Tensor:
    shape = (batch, plan.settings['prompt_tokens'])
    return torch.randint(plan.settings['vocabulary'], shape, device=plan.device)


def measure_ours(plan: DecodePlan, model: GPT, cache: tuple[str, str], theirs: PeerTimes) -> dict:
    """Return the row of our texts beside a peer's. cache: its layout and dtype"""
    layout, dtype = cache
    row = dict(
        shape=model.config.shape,
        cache=layout,
        cache_dtype=dtype,
        batch=theirs.batch,
        prompt_tokens=plan.settings['prompt_tokens'],
        new_tokens=plan.settings['new_tokens'],
        repeats=plan.repeats,
        sampling=peers.SAMPLING[theirs.peer],
        against=theirs.peer,
    )
    return row | attempt(lambda: time_ours(plan, model, cache, theirs), plan.device)


def time_ours(plan: DecodePlan, model: GPT, cache: tuple[str, str], theirs: PeerTimes) -> dict:
    """Return the times of our texts as entries of a row. Raises what does not fit."""
    prompt_tokens, new_tokens = plan.settings['prompt_tokens'], plan.settings['new_tokens']
    size = prompt_tokens + new_tokens
    idx = random_prompts(plan, theirs.batch)
    if size > model.config.block_size:
        raise UserError(
            f'{prompt_tokens} + {new_tokens} tokens are beyond block_size={model.config.block_size}'
        )
    reset_peak_memory(plan.device)
    layout, dtype = cache
    cache = make_cache(plan, model, layout, dtype, theirs.batch, size)
    sampling = peers.SAMPLING[theirs.peer] | dict(vocab_size=plan.settings['vocabulary'])
    times = []
    for _ in range(1 + plan.repeats):
        times.append(time_text(model, cache, idx, new_tokens, sampling) / new_tokens)
    times = times[1:]  # the first is the warm-up
    row = dict(tok_per_s=theirs.batch / statistics.median(times))
    row |= median_and_range('step_us', times, 1e6)
    return row | ratios(theirs.seconds, times) | peaks(plan.device)


def time_text(
    model: GPT, cache: Cache, idx: torch.Tensor, new_tokens: int, sampling: dict
) -> float:
    """Return the seconds of continuing idx (B, T) by new_tokens, in a cache that is emptied."""
    empty(cache)
    tokens = generate(model, idx, new_tokens, cache=cache, **sampling)
    return timing.seconds(cache.device, lambda: torch.stack(list(tokens), dim=1))


def row_text(row: dict) -> str:
    """Return the line that reports a row."""
    name = row['model']
    if 'cache' in row:
        name += f', {row["cache"]} {row["cache_dtype"]}'
    if row['reason']:
        return f'{name}, batch {row["batch"]}: {row["reason"]}'
    text = (
        f'{name}, batch {row["batch"]}, {row["new_tokens"]} new tokens, {row["repeats"]} x: '
        f'{row["tok_per_s"]:,.0f} tok/s, {row["step_us"]:,.0f} µs a step '
        f'({row["step_us_least"]:,.0f} to {row["step_us_most"]:,.0f})'
    )
    if 'ratio' in row:
        text += (
            f', {row["ratio"]:.1f} x {row["against"]} '
            f'({row["ratio_least"]:.1f} to {row["ratio_most"]:.1f})'
        )
    return text
