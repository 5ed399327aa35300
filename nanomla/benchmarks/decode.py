"""
Time prefill and decode steps of models with and without a cache, and count bytes.

A configuration is a model, a cache and its dtype, a batch size and a context. Its sequences hold
`context` tokens when the last timed step is over: their prompts are as much shorter as tokens are
decoded. Prefill is timed on all of the context. Each configuration is a row of a ResultsTable, and
one that runs out of memory is reported with the reason.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model import GPT
from nanomla.benchmarks.plan import (
    PROFILED_LINES,
    PROFILED_STEPS,
    UNCACHED_STEPS,
    DecodePlan,
    build_model,
    make_cache,
)
from nanomla.core import devices
from nanomla.core.configurator import UserError
from nanomla.core.files import ResultsTable
from nanomla.core.timing import (
    attempt,
    free_memory,
    median_and_range,
    peaks,
    repeated_seconds,
    reset_peak_memory,
    seconds,
    synchronize,
)
from nanomla.inference.cache import PAGE_SIZES, Cache, CacheOptions
from nanomla.inference.generate import generate, prefill
from nanomla.inference.quantize import BITS, FULL, NEVER_QUANTISED, group_of

# Tokens of all prompts in one pass where --prefill_chunk does not say it: a pass has a mask of
# T x N a sequence.
PREFILL_TOKENS = 32768

LayerDims = list[dict[str, int]]  # for each layer what a token caches: name -> width


def facts(device: torch.device, dtype: torch.dtype) -> dict:
    """Return what every row says of where it was measured."""
    return dict(
        device=devices.describe(device),
        dtype=str(dtype).removeprefix('torch.'),
        torch=torch.__version__,
        commit=devices.commit(),
        date=time.strftime('%Y-%m-%d'),
    )


def layer_dims(model: GPT) -> LayerDims:
    return [block.attn.cache_dims() for block in model.transformer.h]


def formula_bytes(
    dims: LayerDims, rows: int, size: int, full: torch.dtype, options: CacheOptions
) -> int:
    """
    Return the bytes of a cache of `rows` sequences of `size` tokens by the formula of
    nanomla/inference/cache.py, from numbers alone. full: the full precision of its model
    """
    slots = rows * size
    if options.layout == 'paged':
        slots = rows * math.ceil(size / options.page_size) * options.page_size
    window = min(options.window, size)
    total = 0
    for widths in dims:
        for name, width in widths.items():
            if options.dtype in BITS and name not in NEVER_QUANTISED:
                codes = math.ceil(width * BITS[options.dtype] / 8)
                scales = 4 * width // group_of(width)
                total += slots * (codes + scales) + rows * window * width * full.itemsize
            else:
                total += slots * width * FULL.get(options.dtype, full).itemsize
    return total


# -------------------------------------------------------------------------------------------------
# decode steps


@dataclass(frozen=True)
class Configuration:
    """One row of the table. layout: 'none', 'dense' or 'paged'; dtype: 'none' without a cache."""

    model: str
    layout: str
    dtype: str
    batch: int
    context: int

    def key(self, plan: DecodePlan) -> dict:
        """Return the entries by which its row is found again."""
        paged = self.layout == 'paged'
        key = dict(
            what='cell',
            model=self.model,
            cache=self.layout,
            cache_dtype=self.dtype,
            page_size=plan.page_size if paged else None,
            batch=self.batch,
            context=self.context,
        )
        if self.layout != 'none':
            key['decode_kernel'] = plan.settings['decode_kernel']
        return key


def configurations(plan: DecodePlan, model: str) -> Iterator[Configuration]:
    """Yield all configurations of one of the plan's models."""
    for layout in plan.caches:
        dtypes = ['none'] if layout == 'none' else plan.cache_dtypes
        for dtype in dtypes:
            for batch in plan.batch_sizes:
                for context in plan.contexts:
                    yield Configuration(model, layout, dtype, batch, context)


def measure_steps(plan: DecodePlan, rows: ResultsTable, report: Callable = print) -> None:
    """Measure every configuration that `rows` does not hold yet and report a line for each."""
    by_model = {name: list(configurations(plan, name)) for name in plan.models}
    total = sum(map(len, by_model.values()))
    done = 0
    for name, chosen in by_model.items():
        model = None  # built when a configuration needs it
        for configuration in chosen:
            done += 1
            key = configuration.key(plan)
            row = rows.find(**key, device=rows.facts['device'])
            if row is not None:
                report(f'[{done}/{total}] {row_text(row)}  (kept)')
                continue
            if model is None:
                model = build_model(plan, name)
            row = rows.add(**key, **measure_configuration(plan, model, configuration))
            report(f'[{done}/{total}] {row_text(row)}')
        del model
        free_memory(plan.device)


def measure_configuration(plan: DecodePlan, model: GPT, configuration: Configuration) -> dict:
    """Return the figures of one configuration, or the reason why there are none."""
    about = dict(
        shape=model.config.shape,
        parameters=model.num_params(),
        weight_bytes=sum(p.nbytes for p in model.parameters()),
    )
    return about | attempt(lambda: time_configuration(plan, model, configuration), plan.device)


@dataclass
class Work:
    """
    What one configuration runs.

    prefill: runs the whole context once
    tokens: a generator that decodes; its first token is a prefill of the prompts
    chunk: tokens of each sequence in one pass of the prefill
    warmup, steps: tokens before the clock starts, and between two looks at it
    """

    prefill: Callable
    tokens: Iterator
    chunk: int
    warmup: int
    steps: int


def uncached_work(plan: DecodePlan, model: GPT, idx: torch.Tensor) -> Work:
    """Every step runs the whole text, idx (B, context) in the end, again."""
    new = plan.decoded_tokens('none')
    return Work(
        prefill=lambda: model.lm_head(model.hidden(idx)[:, -1]),
        tokens=generate(model, idx[:, :-new], new + 1, temperature=0),
        chunk=idx.size(1),
        warmup=0,
        steps=UNCACHED_STEPS,
    )


def cached_work(plan: DecodePlan, model: GPT, idx: torch.Tensor, cache: Cache) -> Work:
    """Every step runs one token of each sequence of idx (B, context)."""
    batch, context = idx.shape
    chunk = plan.settings['prefill_chunk'] or max(64, PREFILL_TOKENS // batch)
    chunk = min(context, chunk)
    texts = idx.tolist()
    new = plan.decoded_tokens(cache.layout)
    prompts = [text[:-new] for text in texts]
    return Work(
        prefill=lambda: model.lm_head(prefill(model, texts, cache, chunk=chunk)),
        tokens=generate(model, prompts, new + 1, cache=cache, prefill_chunk=chunk, temperature=0),
        chunk=chunk,
        warmup=plan.warmup,
        steps=plan.steps,
    )


@torch.no_grad()
def time_configuration(plan: DecodePlan, model: GPT, configuration: Configuration) -> dict:
    """Return bytes, and times of prefill and of decode steps. Raises what does not fit."""
    device, batch, context = plan.device, configuration.batch, configuration.context
    block_size = model.config.block_size
    if context > block_size:
        raise UserError(f'the context is beyond block_size={block_size}')
    allocated_before = reset_peak_memory(device)
    cache, row = None, {}
    if configuration.layout != 'none':
        cache = make_cache(plan, model, configuration.layout, configuration.dtype, batch, context)
        row = cache_columns(model, cache)
    idx = torch.randint(model.config.vocab_size, (batch, context), device=device)
    if cache is None:
        work = uncached_work(plan, model, idx)
    else:
        work = cached_work(plan, model, idx, cache)

    times = []
    for _ in range(1 + plan.repeats):
        empty(cache)
        times.append(seconds(device, work.prefill))
    empty(cache)
    times = times[1:]  # the first is the warm-up
    row |= dict(
        prefill_tok_per_s=batch * context / statistics.median(times), prefill_chunk=work.chunk
    )
    row |= median_and_range('prefill_ms', times, 1e3)
    prefill_peaks = peaks(device)
    row |= prefill_peaks

    times = time_tokens(device, work, plan.repeats)
    row |= dict(
        decode_tok_per_s=batch / statistics.median(times),
        timed_steps=work.steps,
        repeats=plan.repeats,
    )
    row |= median_and_range('step_us', times, 1e6)
    if plan.settings['profile'] and cache is not None:
        print('\n'.join(profile_lines(device, work)), flush=True)
    step_peaks = peaks(device)
    row |= larger(prefill_peaks, step_peaks)
    row['step_peak_allocated'] = None
    if device.type == 'cuda':
        row['step_peak_allocated'] = step_peaks['peak_allocated']
    row['allocated_before'] = allocated_before
    return row


def cache_columns(model: GPT, cache: Cache) -> dict:
    formula = formula_bytes(layer_dims(model), cache.rows, cache.size, cache.full, cache.options)
    return dict(
        decode_kernel_ran=cache.kernel,
        cache_bytes=cache.nbytes,
        bytes_per_token=cache.nbytes / cache.slots,
        bytes_per_token_formula=formula / cache.slots,
    )


def empty(cache: Cache | None) -> None:
    """End all sequences of a cache."""
    if cache is not None:
        for row in range(cache.rows):
            cache.free(row)


def time_tokens(device: torch.device, work: Work, repeats: int) -> list[float]:
    """Return `repeats` times the seconds of a token, after the prefill and the warm-up."""
    for _ in range(1 + work.warmup):
        next(work.tokens)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    return repeated_seconds(device, lambda i: next(work.tokens), work.steps, repeats)


def profile_lines(device: torch.device, work: Work) -> list[str]:
    """Return the longest kernels (on a CPU: operations) of a decode step, a line each."""
    from torch.profiler import ProfilerActivity, profile

    activity, time = ProfilerActivity.CPU, 'self_cpu_time_total'
    if device.type == 'cuda':
        activity, time = ProfilerActivity.CUDA, 'self_device_time_total'
    with profile(activities=[activity]) as profiler:
        for _ in range(PROFILED_STEPS):
            next(work.tokens)
        synchronize(device)
    events = profiler.key_averages()
    total = max(sum(getattr(event, time) for event in events), 1e-9)
    what = 'kernels' if device.type == 'cuda' else 'operations'
    took_all = f'{total / PROFILED_STEPS:,.0f} µs a step under the profiler'
    lines = [f'{what} take {took_all}, without the gaps between them']
    for event in sorted(events, key=lambda event: -getattr(event, time))[:PROFILED_LINES]:
        took = getattr(event, time)
        calls = event.count / PROFILED_STEPS
        lines.append(
            f'  {took / total:6.1%} {took / PROFILED_STEPS:10,.1f} µs {calls:5.0f} x  '
            f'{event.key[:70]}'
        )
    return lines


def larger(first: dict, second: dict) -> dict:
    """Return the larger of two values for each name; None where there are none."""
    both = {}
    for name, value in first.items():
        both[name] = None if value is None else max(value, second[name])
    return both


def row_text(row: dict) -> str:
    """Return the line that reports a configuration."""
    cache = row['cache']
    if cache != 'none':
        cache = f'{cache} {row["cache_dtype"]}'
    where = f'{row["model"]:<5} {cache:<14} {row["batch"]:>3} x {row["context"]:<6}'
    if row['reason']:
        return f'{where} {row["reason"]}'
    peak = row['peak_allocated'] / 2**20
    parts = [
        f'{where} {row["step_us"]:>10,.0f} µs a step '
        f'({row["step_us_least"]:,.0f} to {row["step_us_most"]:,.0f})',
        f'decode {row["decode_tok_per_s"]:>9,.0f} tok/s',
        f'prefill {row["prefill_tok_per_s"]:>11,.0f} tok/s',
        f'peak {peak:>8,.0f} MiB',
    ]
    if 'bytes_per_token' in row:
        parts.append(f'{row["bytes_per_token"]:,.0f} B a token')
    return '  '.join(parts)


# -------------------------------------------------------------------------------------------------
# what the rows say about caches and pages

PAYS = {
    'from': 'pays from {:,.0f} tokens on',
    'always': 'pays at every length from {:,} tokens on',
    'never': 'does not pay up to {:,} tokens',
}


def crossing(plain: dict[int, float], cached: dict[int, float]) -> tuple[str, float] | None:
    """
    Return from which length on a cache pays; plain and cached are {length: time}.

    ('from', length): the cached line goes below the plain one for good there, by straight lines
    between the lengths on log-log paper. ('always', least length), ('never', greatest length).
    None without a common length.
    """
    lengths = sorted(plain.keys() & cached.keys())
    if not lengths:
        return None
    gain = [math.log(plain[length] / cached[length]) for length in lengths]
    if gain[-1] <= 0:
        return 'never', lengths[-1]
    losses = [i for i, value in enumerate(gain) if value <= 0]
    if not losses:
        return 'always', lengths[0]
    last = losses[-1]
    share = gain[last] / (gain[last] - gain[last + 1])
    return 'from', lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def summary(rows: list[dict]) -> list[str]:
    """Return what the measured steps say about caches and pages, as lines of text."""
    measured = [row for row in rows if row['what'] == 'cell' and not row['reason']]
    groups = {}  # (model, batch) -> (cache, dtype, kernel) -> context -> µs of a step
    for row in measured:
        times = groups.setdefault((row['model'], row['batch']), {})
        line = (row['cache'], row['cache_dtype'], row.get('decode_kernel'))
        times.setdefault(line, {})[row['context']] = row['step_us']
    lines = []
    for (model, batch), times in groups.items():
        uncached = times.get(('none', 'none', None), {})
        for (cache, dtype, kernel), by_context in times.items():
            stored = dtype
            if kernel not in (None, 'auto'):
                stored += f' ({kernel})'
            texts = []
            if cache != 'none':
                texts.append(gain_text(f'{cache} {stored}', uncached, by_context))
            if cache == 'paged':
                dense = times.get(('dense', dtype, kernel), {})
                texts.append(paging_text(stored, dense, by_context))
            lines += [f'{model}, batch {batch}: {text}' for text in texts if text]
    return lines


def gain_text(cache: str, plain: dict, cached: dict) -> str:
    """Return from which length on this cache pays, '' where it is not known."""
    found = crossing(plain, cached)
    if found is None:
        return ''
    word, length = found
    return f'a {cache} cache {PAYS[word].format(length)}'


def paging_text(stored: str, dense: dict, paged: dict) -> str:
    """Return how much longer a step over pages takes than a dense one, '' where not known."""
    common = sorted(dense.keys() & paged.keys())
    if not common:
        return ''
    ratios = [f'{paged[length] / dense[length]:.2f} x dense at {length:,}' for length in common]
    return f'a step with {stored} pages takes {", ".join(ratios)}'


# -------------------------------------------------------------------------------------------------
# fragmentation


def mixed_lengths(batch: int, longest: int, seed: int = 0) -> list[int]:
    """Return lengths from 1 to `longest`, even on a logarithmic scale: most texts are short."""
    draw = random.Random(seed)
    lengths = []
    for _ in range(batch):
        length = math.exp(draw.uniform(0, math.log(longest + 1)))
        lengths.append(min(longest, int(length)))
    return lengths


def fragmentation(
    dims: LayerDims, lengths: list[int], size: int, full: torch.dtype, device: torch.device
) -> list[dict]:
    """
    Return how much of a cache sequences of these lengths leave unused, with room for `size` tokens
    each: a row for a dense cache and one for each page size, from real caches with exactly the
    pages that the sequences take.

    used_bytes are those of their tokens; lost_percent of allocated_bytes are not used;
    saved_percent is against the dense cache.
    """
    dense = dict(layout='dense')
    found = [unused_bytes(Cache(dims, len(lengths), size, full, device, **dense), lengths)]
    for page_size in PAGE_SIZES:
        free_memory(device)
        pages = sum(math.ceil(length / page_size) for length in lengths)
        paged = dict(layout='paged', page_size=page_size, pages=pages)
        cache = Cache(dims, len(lengths), size, full, device, **paged)
        found.append(unused_bytes(cache, lengths))
        assert not cache.pages.free
    for row in found:
        share = row['allocated_bytes'] / found[0]['allocated_bytes']
        row['saved_percent'] = 100 * (1 - share)
    return found


def unused_bytes(cache: Cache, lengths: list[int]) -> dict:
    cache.plan(lengths)  # takes the pages
    used = round(sum(cache.used) * cache.bytes_per_token)
    return dict(
        cache=cache.layout,
        page_size=cache.page_size if cache.pages else None,
        allocated_bytes=cache.nbytes,
        used_bytes=used,
        lost_percent=100 * (1 - used / cache.nbytes),
    )


def measure_fragmentation(plan: DecodePlan, rows: ResultsTable, report: Callable = print) -> None:
    """Add a table for the first of the models, the largest batch and the longest context."""
    name, batch, size = plan.models[0], plan.batch_sizes[-1], plan.contexts[-1]
    lengths = mixed_lengths(batch, size)
    mean = statistics.mean(lengths)
    dims = layer_dims(build_model(plan, name))
    key = dict(what='fragmentation', model=name, batch=batch, context=size)
    result = attempt(
        lambda: dict(found=fragmentation(dims, lengths, size, plan.dtype, plan.device)),
        plan.device,
    )
    if result['reason']:
        rows.add(**key, **result)
        report(f'fragmentation: {result["reason"]}')
        return
    report(
        f'{name}, {batch} sequences of 1 to {size:,} tokens (mean {mean:,.0f}, even on a '
        f'logarithmic scale), room for {size:,} each:'
    )
    for found in result['found']:
        old = rows.find(**key, page_size=found['page_size'])
        if old is not None:
            rows.remove(old)
        row = rows.add(**key, **found, mean_length=mean, reason='')
        report(fragmentation_text(row))


def fragmentation_text(row: dict) -> str:
    size = 'contiguous'
    if row['page_size']:
        size = f'page size {row["page_size"]}'
    allocated, used = row['allocated_bytes'] / 2**20, row['used_bytes'] / 2**20
    return (
        f'  {row["cache"]:<5} {size:<13} {allocated:>9,.1f} MiB allocated, {used:,.1f} used: '
        f'{row["lost_percent"]:.1f} % lost, {row["saved_percent"]:.1f} % less than contiguous'
    )
