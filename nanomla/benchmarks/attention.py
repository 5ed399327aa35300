"""
Time the attention of one decode step alone: a query token for each of B sequences against what one
layer's cache holds, by every candidate of the table below, in µs and in % of the copy bandwidth
that this process measures. This is the part of a step that grows with the context.

Inputs are real caches (nanomla/inference/cache.py): pages in random order, a length for each
sequence, random tokens. Bytes are those of the cached tokens in the format they are cached in.
Calls go round over copies of the inputs that together are four times an L2 of 60 MB and more, so
that no call finds its tokens there. On a GPU a round is one CUDA graph: the time is the kernels',
not Python's. Each candidate's result is compared with an fp32 reference first. One that is wrong,
does not run or runs out of memory is reported with the reason.

Legend: B sequences, H query heads, K key/value heads, D width of a head, N slots of a sequence,
R latent, P k_pe.
"""

import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from nanomla.benchmarks.plan import DecodePlan
from nanomla.core import devices
from nanomla.core.checks import split_list
from nanomla.core.configurator import UserError
from nanomla.core.cuda_graph import GraphedStep
from nanomla.core.files import ResultsTable, write_file
from nanomla.core.timing import (
    attempt,
    copy_bandwidth,
    free_memory,
    median_and_range,
    repeated_seconds,
    seconds,
)
from nanomla.inference import attention_kernel
from nanomla.inference.backends import flex_blocks
from nanomla.inference.cache import Cache, Store
from nanomla.inference.quantize import BITS, FULL, dequantise, quantise

COLD_BYTES = 4 * 60e6  # of inputs in rotation on a GPU: four times the L2 of an H200
TOLERANCE = 0.05  # largest error in 16-bit storage, as a share of the reference's largest value
WARMUP = 3  # rounds
LONGEST = 0.3  # seconds between two looks at the clock: slow candidates go fewer rounds


# -------------------------------------------------------------------------------------------------
# inputs


@dataclass(frozen=True)
class AttentionShape:
    """
    What one layer caches of a token, and what reads it.

    name: '12:4:64' (heads:key/value heads:width) or '16:512+64' (heads:latent+k_pe)
    widths: name -> width in the cache; head_dim: width of a head, 0 for a latent
    """

    name: str
    heads: int
    widths: dict[str, int]
    head_dim: int = 0

    @property
    def latent(self) -> bool:
        return self.head_dim == 0

    @property
    def q_width(self) -> int:
        return sum(self.widths.values()) if self.latent else self.head_dim


def read_shape(name: str) -> AttentionShape:
    """Return the shape of that name. UserError for a name that is none."""
    try:
        heads, *rest = name.split(':')
        heads = int(heads)
        if len(rest) == 1:
            R, P = map(int, rest[0].split('+'))
            shape = AttentionShape(name, heads, dict(c_kv=R, k_pe=P))
        else:
            K, D = map(int, rest)
            shape = AttentionShape(name, heads, dict(k=K * D, v=K * D), D)
            if heads % K:
                raise ValueError
        if min(heads, *shape.widths.values()) < 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"--attention_shapes: '{name}' is none: write heads:key/value heads:width like "
            '12:4:64, or for MLA heads:latent+k_pe like 16:512+64'
        ) from None
    return shape


def read_shapes(text: str) -> list[AttentionShape]:
    """Return the shapes of --attention_shapes."""
    return [read_shape(name) for name in split_list(text)]


@dataclass(frozen=True)
class Case:
    """What the candidates are compared at. lengths: cached tokens of each of the B sequences"""

    shape: AttentionShape
    lengths: list[int]
    size: int  # room of a sequence
    layout: str
    dtype: str
    page_size: int


class AttentionInputs:
    """
    The cache of one layer that holds a case's sequences, and a query for it.

    q: (B, H, 1, width of a query); mask: (B, 1, 1, N), None where every slot is in use
    seen: what the query of sequence 0 should see, name -> (N, width) in fp32
    """

    def __init__(self, case: Case, full: torch.dtype, device: torch.device, seed: int):
        self.case, self.shape = case, case.shape
        B = len(case.lengths)
        self.cache = Cache(
            [case.shape.widths],
            B,
            case.size,
            layout=case.layout,
            dtype=case.dtype,
            page_size=case.page_size,
            full=full,
            device=device,
        )
        if self.cache.pages:
            random.Random(seed).shuffle(self.cache.pages.free)
        self.cache.plan(case.lengths)  # takes the pages
        self.cache.lengths.copy_(torch.tensor(case.lengths))
        self.mask = None
        if min(case.lengths) < case.size:
            slot = torch.arange(case.size, device=device)
            self.mask = (slot < self.cache.lengths[:, None])[:, None, None]
        generator = torch.Generator(device).manual_seed(seed)
        q_shape = (B, case.shape.heads, 1, case.shape.q_width)
        self.q = torch.randn(q_shape, device=device, dtype=full, generator=generator)
        self.scale = case.shape.q_width**-0.5
        self.seen = {}
        for name, store in self.cache.layers[0].stores.items():
            for b, length in enumerate(case.lengths):
                x_shape = (length, store.width)
                x = torch.randn(x_shape, device=device, dtype=full, generator=generator)
                written = self.write(store, b, x)
                if b == 0:
                    self.seen[name] = written

    @property
    def stores(self) -> list[Store]:
        return self.cache.stores

    def write(self, store: Store, b: int, x: torch.Tensor) -> torch.Tensor:
        """Write all tokens x (N, C) of sequence b. Return what a query should see, in fp32."""
        slots = self.slots(b)
        parts = quantise(x, store.bits) if store.bits else [x]
        for buffer, part in zip(store.data, parts):
            buffer[slots] = part.to(buffer.dtype)
        if store.bits:
            seen = dequantise(*parts, store.width, store.bits)
        else:
            seen = store.data[0][slots].float()
        if store.recent is not None:
            window = self.cache.window
            last = torch.arange(max(0, len(x) - window), len(x), device=x.device)
            store.recent[b * window + last % window] = x[last]
            seen[last] = x[last].float()
        return seen

    def slots(self, b: int) -> torch.Tensor:
        """Return where in the buffers each token of sequence b is."""
        cache = self.cache
        position = torch.arange(self.case.lengths[b], device=cache.device)
        if not cache.pages:
            return b * cache.size + position
        page = cache.block_table[b, position // cache.page_size].long()
        return page * cache.page_size + position % cache.page_size

    @property
    def nbytes(self) -> int:
        """
        Bytes that a step has to read: of every cached token once, those of the window in full
        precision.
        """
        total = 0
        for store in self.stores:
            per_slot = sum(buffer.nbytes for buffer in store.data) // self.cache.slots
            in_full = store.width * self.cache.full.itemsize
            window = 0 if store.recent is None else self.cache.window
            for length in self.case.lengths:
                recent = min(window, length)
                total += (length - recent) * per_slot + recent * in_full
        return total

    def reference(self) -> torch.Tensor:
        """Return softmax(scale q kᵀ) v of sequence 0 in fp32, (H, width of v)."""
        q = self.q[0, :, 0].float()
        if self.shape.latent:
            c_kv, k_pe = self.seen.values()
            k = torch.cat([c_kv, k_pe], dim=-1)
            return (q @ k.T * self.scale).softmax(-1) @ c_kv
        k, v = (self.repeated_heads(x) for x in self.seen.values())
        pattern = (torch.einsum('hd,nhd->hn', q, k) * self.scale).softmax(-1)
        return torch.einsum('hn,nhd->hd', pattern, v)

    def repeated_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K * D) -> (N, H, D): a key/value head for every query head."""
        x = x.unflatten(-1, (-1, self.shape.head_dim))
        return x.repeat_interleave(self.shape.heads // x.size(1), dim=1)


# -------------------------------------------------------------------------------------------------
# candidates: each takes AttentionInputs and returns the function to time, with result
# (B, H, 1, width of v)


def as_heads(inputs: AttentionInputs, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    Return buffers (B, N, width) as k and v (B, K, N, D), or for MLA as [c_kv | k_pe] and c_kv
    (B, 1, N, ...), as model_mla.py hands them to its kernel.
    """
    if inputs.shape.latent:
        return [torch.cat(buffers, dim=-1)[:, None], buffers[0][:, None]]
    return [x.unflatten(-1, (-1, inputs.shape.head_dim)).transpose(1, 2) for x in buffers]


def sdpa(inputs: AttentionInputs, buffers: list[torch.Tensor]) -> torch.Tensor:
    """SDPA over buffers (B, N, width)."""
    k, v = as_heads(inputs, buffers)
    return F.scaled_dot_product_attention(
        inputs.q,
        k,
        v,
        attn_mask=inputs.mask,
        scale=inputs.scale,
        enable_gqa=inputs.shape.heads != k.size(1),
    )


def sdpa_dense(inputs: AttentionInputs) -> Callable:
    rows = (inputs.cache.rows, -1)
    buffers = [store.data[0].unflatten(0, rows) for store in inputs.stores]
    return lambda: sdpa(inputs, buffers)


def sdpa_gathered(inputs: AttentionInputs) -> Callable:
    """Copy pages into rows in the step: the cost of a kernel that knows no pages."""
    cache = inputs.cache
    pages = [store.data[0].unflatten(0, (-1, cache.page_size)) for store in inputs.stores]

    def run():
        buffers = [page[cache.block_table].flatten(1, 2)[:, : cache.size] for page in pages]
        return sdpa(inputs, buffers)

    return run


def sdpa_dequantised(inputs: AttentionInputs) -> Callable:
    """Write out the whole cache at full precision in the step: a kernel that knows no codes."""
    cache = inputs.cache
    rows, window = (cache.rows, -1), cache.window
    slot = torch.arange(cache.size, device=cache.device)
    is_recent = (slot >= cache.lengths[:, None] - window)[..., None]
    row = torch.arange(cache.rows, device=cache.device)[:, None]
    in_window = row * window + slot % max(1, window)

    def read(store):
        if not store.bits:
            return store.data[0].unflatten(0, rows)
        buffer = dequantise(*store.data, store.width, store.bits).to(inputs.q.dtype)
        buffer = buffer.unflatten(0, rows)
        if store.recent is None:
            return buffer
        return torch.where(is_recent, store.recent[in_window], buffer)

    return lambda: sdpa(inputs, [read(store) for store in inputs.stores])


@lru_cache
def compiled_flex(shape: tuple) -> Callable:
    """Compile FlexAttention for each shape: beyond eight recompilations torch gives up silently."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_paged(inputs: AttentionInputs) -> Callable:
    """
    FlexAttention that finds its pages itself: keys and values are the whole buffers, one row for
    all sequences, and the block mask of a sequence lists its pages. Only the last page is masked
    inside. MLA's [c_kv | k_pe] has to be one tensor here: it is joined outside of the time.
    """
    cache = inputs.cache
    blocks = flex_blocks(cache, cache.lengths)
    k, v = as_heads(inputs, [store.data[0][None] for store in inputs.stores])
    if inputs.q.is_cuda:
        flex = compiled_flex((inputs.shape.name, cache.page_size, cache.rows, cache.slots))
        if inputs.shape.latent:
            v = k[..., : v.size(-1)]  # read once; a CPU refuses keys and values that share storage
    else:
        from torch.nn.attention.flex_attention import flex_attention as flex

        # Nothing is compiled for a CPU, and that is meant.
        warnings.filterwarnings('ignore', 'flex_attention called without')
    return lambda: flex(
        inputs.q,
        k,
        v,
        block_mask=blocks,
        scale=inputs.scale,
        enable_gqa=inputs.shape.heads != k.size(1),
    )


def reason_for_no_triton(inputs: AttentionInputs) -> str:
    """Say why attention_kernel.py cannot read these inputs; '' if it can."""
    first = inputs.stores[0]
    return attention_kernel.reason_not_to_run(
        inputs.q.device,
        inputs.q.dtype if first.bits else first.data[0].dtype,
        inputs.shape.head_dim or first.width,
        first.bits,
        first.group,
        inputs.shape.latent,
    )


def triton(inputs: AttentionInputs) -> Callable:
    """This project's kernel; UserError with its reason where it cannot run."""
    reason = reason_for_no_triton(inputs)
    if reason:
        raise UserError(reason)
    cache, latent = inputs.cache, inputs.shape.latent
    first, second = inputs.stores
    q, q_pe = inputs.q[:, :, 0].contiguous(), None
    if latent:
        q, q_pe = (part.contiguous() for part in q.split([first.width, second.width], dim=-1))

    def run():
        y = attention_kernel.decode_attention(
            q,
            first.kernel_buffers,
            v=None if latent else second.kernel_buffers,
            q_pe=q_pe,
            k_pe=second.data[0] if latent else None,
            lengths=cache.lengths,
            scale=inputs.scale,
            size=cache.size,
            block_table=cache.block_table,
            page_size=cache.page_size,
            bits=first.bits,
            group=first.group,
            window=cache.window,
        )
        return y[:, :, None]

    return run


@dataclass
class Candidate:
    """A way to compute decode attention. make: AttentionInputs -> the function to time"""

    name: str
    layouts: tuple[str, ...]  # of the caches that it reads
    dtypes: tuple[str, ...]
    make: Callable[[AttentionInputs], Callable]

    def reads(self, case: Case) -> bool:
        return case.layout in self.layouts and case.dtype in self.dtypes


CANDIDATES = [
    Candidate('Triton', ('dense', 'paged'), (*FULL, *BITS), triton),
    Candidate('SDPA', ('dense',), (*FULL,), sdpa_dense),
    Candidate('SDPA, pages gathered', ('paged',), (*FULL,), sdpa_gathered),
    Candidate('FlexAttention, page table', ('paged',), (*FULL,), flex_paged),
    Candidate('SDPA, dequantised', ('dense',), (*BITS,), sdpa_dequantised),
]


def choose_candidates(text: str) -> list[Candidate]:
    """
    Return the candidates whose names hold one of the words in a list like 'triton,sdpa'; all of
    them for ''. UserError for a word that no name holds.
    """
    words = split_list(text.lower()) or ['']
    for word in words:
        if not any(word in candidate.name.lower() for candidate in CANDIDATES):
            known = ' | '.join(candidate.name for candidate in CANDIDATES)
            raise UserError(f"--candidates={text}: '{word}' is part of no name: there are {known}")
    chosen = []
    for candidate in CANDIDATES:
        if any(word in candidate.name.lower() for word in words):
            chosen.append(candidate)
    return chosen


# -------------------------------------------------------------------------------------------------
# time


@torch.no_grad()
def time_candidate(candidate: Candidate, inputs: list[AttentionInputs], plan: DecodePlan) -> dict:
    """
    Return entries of a row: the error against the reference, and the µs of a call, as up to
    timed_steps rounds over all of the inputs take. `wrong` says why there is no time.
    """
    calls = [candidate.make(one) for one in inputs]
    reference = inputs[0].reference()
    difference = (calls[0]()[0, :, 0].float() - reference).abs().max()
    error = (difference / reference.abs().max()).item()
    if not error < TOLERANCE:  # also for nan
        return dict(error=error, wrong=f'wrong: {100 * error:.1f} % off the fp32 reference')

    def run_round():
        for call in calls:
            call()

    if plan.device.type == 'cuda':
        run_round = GraphedStep(run_round, warmup=WARMUP)
    for _ in range(WARMUP + 1):  # the last one records the graph
        run_round()
    rounds = [seconds(plan.device, run_round) for _ in range(WARMUP)]
    steps = max(1, min(plan.steps, int(LONGEST / rounds[-1])))
    times = repeated_seconds(plan.device, lambda i: run_round(), steps, plan.repeats)
    times = [time / len(calls) for time in times]
    return median_and_range('kernel_us', times, 1e6) | dict(error=error, timed_steps=steps)


def try_candidate(candidate: Candidate, inputs: list[AttentionInputs], plan: DecodePlan) -> dict:
    """Return time_candidate's entries, or the reason why there are none."""
    try:
        result = attempt(lambda: time_candidate(candidate, inputs, plan), plan.device)
    except Exception as error:  # compilers and kernels have errors of their own
        result = dict(reason=' '.join(f'{type(error).__name__}: {error}'.split())[:200])
    free_memory(plan.device)
    wrong = result.pop('wrong', '')
    return result | dict(reason=wrong or result['reason'])


def tune(inputs: list[AttentionInputs], plan: DecodePlan, report: Callable) -> None:
    """
    Try the variants of the Triton kernel at the shape of `inputs`, and write the fastest that is
    right into nanomla/inference/tiles.json.
    """
    if reason_for_no_triton(inputs[0]):
        return
    shape, size = inputs[0].shape, inputs[0].cache.size
    first = inputs[0].stores[0]
    C = shape.head_dim or first.width
    heads = shape.heads if shape.latent else shape.heads * C // first.width  # that share k and v
    P = shape.q_width - C
    key = attention_kernel.shape_key(heads, C, P, shape.latent, first.bits, size)
    tiles = attention_kernel.tiles_of_shapes()  # what the kernel looks its tiles up in
    if inputs[0].cache.pages and key in tiles:  # the same for both layouts
        return
    candidate = Candidate('Triton', (), (), triton)
    times = {}
    for variant in attention_kernel.variants(C, shape.latent, first.bits, size):
        tiles[key] = variant
        result = try_candidate(candidate, inputs, plan)
        outcome = result['reason']
        if not outcome:
            times[tuple(variant)] = result['kernel_us']
            outcome = f'{result["kernel_us"]:.1f} µs'
        report(f'  {key}: {variant} {outcome}')
    if times:
        tiles[key] = list(min(times, key=times.get))
    else:
        del tiles[key]
    lines = [f'  {json.dumps(name)}: {json.dumps(tile)}' for name, tile in sorted(tiles.items())]
    file = Path(attention_kernel.__file__).with_name('tiles.json')
    write_file(file, '{\n' + ',\n'.join(lines) + '\n}\n')


# -------------------------------------------------------------------------------------------------
# rows


def measure_attention(
    plan: DecodePlan,
    shapes: list[AttentionShape],
    candidates: list[Candidate],
    rows: ResultsTable,
    report: Callable = print,
) -> None:
    """Add and report a row for each candidate at each case that `rows` does not hold yet."""
    bandwidth = copy_bandwidth(plan.device, plan.repeats)
    report(f'{devices.describe(plan.device)}: a copy runs at {bandwidth / 1e9:,.1f} GB/s')
    for shape in shapes:
        for case in cases(plan, shape):
            key = row_key(plan, case)
            missing = []
            for candidate in candidates:
                found = rows.find(**key, candidate=candidate.name, device=rows.facts['device'])
                if candidate.reads(case) and found is None:
                    missing.append(candidate)
            if missing:
                compare(plan, case, missing, rows, bandwidth, report)


def cases(plan: DecodePlan, shape: AttentionShape) -> Iterator[Case]:
    """Yield all cases of a shape: batch size, context, layout and dtype of the cache."""
    own_dtype = str(plan.dtype).removeprefix('torch.')
    dtypes = [own_dtype if name == 'auto' else name for name in plan.cache_dtypes]
    for batch in plan.batch_sizes:
        for context in plan.contexts:
            lengths = sequence_lengths(batch, context, plan.settings['ragged'])
            for layout in plan.cached_layouts:
                for dtype in dict.fromkeys(dtypes):
                    yield Case(shape, lengths, context, layout, dtype, plan.page_size)


def sequence_lengths(batch: int, context: int, ragged: bool) -> list[int]:
    """Return the lengths of the sequences: `context`, or between a half of it and all of it."""
    if not ragged:
        return [context] * batch
    draw = random.Random(0)
    return [draw.randint((1 + context) // 2, context) for _ in range(batch)]


def row_key(plan: DecodePlan, case: Case) -> dict:
    """Return the entries by which the rows of a case are found again."""
    return dict(
        what='attention',
        shape=case.shape.name,
        cache=case.layout,
        cache_dtype=case.dtype,
        page_size=case.page_size if case.layout == 'paged' else None,
        batch=len(case.lengths),
        context=case.size,
        ragged=plan.settings['ragged'],
    )


def make_inputs(plan: DecodePlan, case: Case) -> list[AttentionInputs]:
    """Return so many copies of the inputs, each with its own numbers, that none stays in the L2."""
    inputs = []
    nbytes = 0
    enough = COLD_BYTES if plan.device.type == 'cuda' else 0
    while len(inputs) < 2 or nbytes < enough:
        inputs.append(AttentionInputs(case, plan.dtype, plan.device, seed=len(inputs)))
        nbytes += inputs[-1].nbytes
    return inputs


def compare(
    plan: DecodePlan,
    case: Case,
    candidates: list[Candidate],
    rows: ResultsTable,
    bandwidth: float,
    report: Callable,
) -> None:
    """Add and report a row for each of the candidates at one case."""
    made = attempt(lambda: dict(inputs=make_inputs(plan, case)), plan.device)
    inputs = made.pop('inputs', [])
    if inputs:
        made |= dict(bytes=inputs[0].nbytes, copies=len(inputs))
        if plan.settings['tune'] and any(one.make is triton for one in candidates):
            tune(inputs, plan, report)
    for candidate in candidates:
        result = dict(made)
        if inputs:
            result |= try_candidate(candidate, inputs, plan)
        if 'kernel_us' in result:
            speed = result['bytes'] / (result['kernel_us'] * 1e-6)
            result['bandwidth_percent'] = 100 * speed / bandwidth
        key = row_key(plan, case)
        row = rows.add(**key, bandwidth=bandwidth, candidate=candidate.name, **result)
        report(row_text(row))
    inputs.clear()
    free_memory(plan.device)


def row_text(row: dict) -> str:
    """Return the line that reports a row."""
    cache = f'{row["cache"]} {row["cache_dtype"]}'
    where = (
        f'{row["shape"]:<10} {row["batch"]:>3} x {row["context"]:<6} {cache:<15} '
        f'{row["candidate"]:<26}'
    )
    if row['reason']:
        return f'{where} {row["reason"]}'
    return (
        f'{where} {row["kernel_us"]:>10,.1f} µs '
        f'({row["kernel_us_least"]:,.1f} to {row["kernel_us_most"]:,.1f}), '
        f'{row["bandwidth_percent"]:5.1f} % of the copy bandwidth'
    )
