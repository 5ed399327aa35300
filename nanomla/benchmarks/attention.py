"""
The attention of one decode step, alone: a query token for each of B sequences against what one layer's cache
holds, by every candidate of the table below, in microseconds and in % of the copy bandwidth that this process
measures. This is the part of a step that grows with the context.

Inputs are real caches (cache.py): pages in random order, a length for each sequence, random tokens. Bytes are those
of the tokens that are held, in the format they are held in. Calls go round over copies of the inputs that together
are four times an L2 of 60 MB and more, so that none finds its tokens there. On a GPU a round is one CUDA graph:
time is the kernels', not Python's. Each candidate's result is held against an fp32 reference first, and one that
is wrong, does not run or does not fit is a row with its reason.

Legend: B sequences, H query heads, K key/value heads, D width of a head, N places of a sequence, R latent, P k_pe.
"""

import itertools
import json
import math
import random
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from nanomla.benchmarks.decode import numbers, read_shape
from nanomla.core import devices as machine
from nanomla.core import timing
from nanomla.core.configurator import UserError
from nanomla.core.timing import attempt, free_memory, median_and_range
from nanomla.inference import attention_kernel as decode_kernels
from nanomla.inference.backends import flex_blocks
from nanomla.inference.cache import Cache
from nanomla.inference.quantize import BITS, FULL, dequantise, group_of, quantise

COLD_BYTES = 4 * 60e6  # of inputs in rotation on a GPU: four times the L2 of an H200
TOLERANCE = (
    0.05  # largest error of a result in bf16 storage, as a share of the reference's largest value
)
WARMUP = 3  # rounds
LONGEST = (
    0.3  # seconds between two looks at the clock: slow candidates go fewer rounds than timed_steps
)


# ---------------------------------------------------------------------------------------------------
# inputs


class Held:
    """What one layer remembers of B sequences, in a real cache, and a query for it."""

    def __init__(self, shape, lengths, size, layout, dtype, page_size, full, device, seed):
        self.shape, self.kind, self.H, self.widths, self.per_head = shape, *read_shape(shape)
        B, here = len(lengths), torch.Generator(device).manual_seed(seed)
        self.cache = cache = Cache(
            [self.widths],
            B,
            size,
            layout=layout,
            dtype=dtype,
            page_size=page_size,
            full=full,
            device=device,
        )
        if layout == 'paged':
            random.Random(seed).shuffle(cache.pages.free)
        cache.plan(lengths)  # takes the pages
        cache.lengths.copy_(torch.tensor(lengths))
        self.lengths, self.page_size = lengths, cache.page_size
        self.equal = min(lengths) == max(lengths) == size
        self.mask = (
            None
            if self.equal
            else (torch.arange(size, device=device) < cache.lengths[:, None])[:, None, None]
        )  # (B, 1, 1, N)
        q_width = self.per_head if self.kind == 'kv' else sum(self.widths.values())
        self.q = torch.randn(B, self.H, 1, q_width, device=device, dtype=full, generator=here)
        self.scale = q_width**-0.5
        self.stores = cache.layers[0].stores
        self.first = {}  # what the query of sequence 0 should see, name -> (N, width) in fp32
        for name, store in self.stores.items():
            for b, length in enumerate(lengths):
                x = torch.randn(length, store.width, device=device, dtype=full, generator=here)
                parts, at = quantise(x, store.bits) if store.bits else [x], self.addresses(b)
                for buffer, part in zip(store.data, parts):
                    buffer[at] = part.to(buffer.dtype)
                places = torch.arange(max(0, length - cache.window), length, device=device)
                if store.recent is not None:
                    store.recent[b * cache.window + places % cache.window] = x[places]
                if b == 0:
                    seen = (
                        dequantise(*parts, store.width, store.bits)
                        if store.bits
                        else store.data[0][at].float()
                    )
                    if store.recent is not None:
                        seen[places] = x[places].float()
                    self.first[name] = seen

    def addresses(self, b):
        """The place in the buffers of each token of sequence b."""
        place = torch.arange(self.lengths[b], device=self.q.device)
        if self.cache.layout == 'dense':
            return b * self.cache.size + place
        return (
            self.cache.block_table[b, place // self.page_size].long() * self.page_size
            + place % self.page_size
        )

    @property
    def nbytes(self):
        """Bytes that a step has to read: of every token that is held, once; the last ones (the window) in full precision."""
        total = 0
        for store in self.stores.values():
            per_place = sum(buffer.nbytes for buffer in store.data) // self.cache.slots
            recent = [
                0 if store.recent is None else min(self.cache.window, length)
                for length in self.lengths
            ]
            total += sum(
                (length - w) * per_place + w * store.width * self.cache.full.itemsize
                for length, w in zip(self.lengths, recent)
            )
        return total

    def reference(self):
        """softmax(scale q kᵀ) v of sequence 0 in fp32, (H, width of v)."""
        q = self.q[0, :, 0].float()
        if self.kind == 'kv':
            k, v = (
                x.unflatten(-1, (-1, self.per_head)).repeat_interleave(
                    self.H * self.per_head // x.size(-1), dim=1
                )
                for x in self.first.values()
            )
            return torch.einsum(
                'hn,nhd->hd', (torch.einsum('hd,nhd->hn', q, k) * self.scale).softmax(-1), v
            )
        return (q @ torch.cat(list(self.first.values()), dim=-1).T * self.scale).softmax(
            -1
        ) @ self.first['c_kv']


# ---------------------------------------------------------------------------------------------------
# candidates: each takes a Held and returns the function that is timed; its result is (B, H, 1, width of v)


def heads(held, buffers):
    """Buffers (B, N, width) as k and v (B, K, N, D), or for MLA [c_kv | k_pe] and c_kv (B, 1, N, ...), as model_mla.py hands them over."""
    if held.kind == 'kv':
        return [x.unflatten(-1, (-1, held.per_head)).transpose(1, 2) for x in buffers]
    return torch.cat(buffers, dim=-1)[:, None], buffers[0][:, None]


def sdpa(held, k, v):
    return F.scaled_dot_product_attention(
        held.q, k, v, attn_mask=held.mask, scale=held.scale, enable_gqa=held.H != k.size(1)
    )


def sdpa_dense(held):
    rows = [store.data[0].unflatten(0, (held.cache.rows, -1)) for store in held.stores.values()]
    return lambda: sdpa(held, *heads(held, rows))


def sdpa_gathered(held):
    """Pages copied into a row first, in the step: what a cache costs whose kernel knows no pages."""
    pages = [store.data[0].unflatten(0, (-1, held.page_size)) for store in held.stores.values()]
    return lambda: sdpa(
        held, *heads(held, [p[held.cache.block_table].flatten(1, 2)[:, : held.cache.size] for p in pages])
    )


def sdpa_dequantised(held):
    """The whole cache written out at full precision first, in the step: what a quantised cache costs whose kernel knows no codes."""
    cache, full, stores = held.cache, held.q.dtype, list(held.stores.values())
    place = torch.arange(cache.size, device=held.q.device)
    is_recent = (place >= cache.lengths[:, None] - cache.window)[..., None]
    from_recent = torch.arange(cache.rows, device=held.q.device)[
        :, None
    ] * cache.window + place % max(1, cache.window)

    def rows(store):
        seen = (
            dequantise(*store.data, store.width, store.bits).to(full)
            if store.bits
            else store.data[0]
        )
        seen = seen.unflatten(0, (cache.rows, -1))
        return (
            seen
            if store.recent is None
            else torch.where(is_recent, store.recent[from_recent], seen)
        )

    return lambda: sdpa(held, *heads(held, [rows(store) for store in stores]))


@lru_cache
def compiled_flex(
    shape,
):  # one for each shape: beyond eight recompilations torch falls back without a word
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_paged(held):
    """
    FlexAttention that finds its pages itself: keys and values are the whole buffers, one row for all sequences,
    and the block mask of a sequence lists its pages. Only the last page is masked inside. MLA's [c_kv | k_pe] has
    to be one tensor here: it is joined ahead, not in the time.
    """
    from torch.nn.attention.flex_attention import flex_attention

    cache, page, blocks = held.cache, held.page_size, flex_blocks(held.cache, held.cache.lengths)
    buffers = [store.data[0] for store in held.stores.values()]
    if held.kind == 'kv':
        k, v = (
            x.unflatten(-1, (-1, held.per_head)).transpose(0, 1)[None] for x in buffers
        )  # (1, K, places, D)
    else:
        k = torch.cat(buffers, dim=-1)[None, None]
        v = k[..., : buffers[0].size(-1)]
        v = v if held.q.is_cuda else v.clone()  # a CPU refuses keys and values that share storage
    if not held.q.is_cuda:
        warnings.filterwarnings(
            'ignore', 'flex_attention called without'
        )  # on a CPU that is meant: nothing is compiled for it
    flex = (
        compiled_flex((held.shape, page, len(held.lengths), cache.slots))
        if held.q.is_cuda
        else flex_attention
    )
    return lambda: flex(
        held.q, k, v, block_mask=blocks, scale=held.scale, enable_gqa=held.H != k.size(1)
    )


def triton(held):
    """The project's own kernel on the buffers where they lie; UserError with its reason where it cannot run."""
    cache, (first, second) = held.cache, held.stores.values()
    C = first.width if held.kind == 'latent' else held.per_head
    if reason := decode_kernels.reason_not_to_run(
        held.q.device,
        held.q.dtype if first.bits else first.data[0].dtype,
        C,
        first.bits,
        group_of(first.width),
        held.kind == 'latent',
    ):
        raise UserError(reason)
    k, v = (
        (*store.data, *[None] * (2 - len(store.data)), store.recent)
        for store in (first, second)
    )
    q, q_pe = (
        part.contiguous() for part in held.q[:, :, 0].split([C, held.q.size(-1) - C], dim=-1)
    )
    how = dict(table=cache.block_table, page_size=cache.page_size) if cache.pages else {}
    how |= (
        dict(bits=first.bits, group=group_of(first.width), window=cache.window)
        if first.bits
        else {}
    )
    how |= dict(q_pe=q_pe, pe=second.data[0]) if held.kind == 'latent' else {}
    return lambda: decode_kernels.decode(
        q, k, None if held.kind == 'latent' else v, cache.lengths, held.scale, cache.size, **how
    )[:, :, None]


@dataclass
class Candidate:
    name: str
    kinds: tuple  # of attention: 'kv' (MHA, GQA, MQA), 'latent' (MLA)
    layouts: tuple  # of the cache
    dtypes: tuple  # of the cache
    make: Callable  # a Held -> the function to time


CANDIDATES = [
    Candidate('Triton', ('kv', 'latent'), ('dense', 'paged'), (*FULL, *BITS), triton),
    Candidate('SDPA', ('kv', 'latent'), ('dense',), (*FULL,), sdpa_dense),
    Candidate('SDPA, pages gathered', ('kv', 'latent'), ('paged',), (*FULL,), sdpa_gathered),
    Candidate('FlexAttention, page table', ('kv', 'latent'), ('paged',), (*FULL,), flex_paged),
    Candidate('SDPA, dequantised', ('kv', 'latent'), ('dense',), (*BITS,), sdpa_dequantised),
]


# ---------------------------------------------------------------------------------------------------
# time


def copy_bandwidth(device, repeats):
    """Bytes a second that a large copy reads and writes, both counted: what the memory can do today."""
    on_gpu = device.type == 'cuda'
    source, calls = (
        torch.ones(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device),
        10 if on_gpu else 1,
    )
    target = torch.empty_like(source)
    times = [
        timing.seconds(device, lambda: [target.copy_(source) for _ in range(calls)]) / calls
        for _ in range(WARMUP + repeats)
    ]
    return 2 * source.nbytes / statistics.median(times[WARMUP:])


def in_graph(calls):
    """A function that replays all of `calls` as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARMUP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


@torch.no_grad()
def time_candidate(candidate, inputs, plan):
    """Row entries of one candidate on all copies of the inputs: µs a call, as up to timed_steps rounds over them take, with median_and_range, and its error against the reference."""
    calls = [candidate.make(held) for held in inputs]
    reference = inputs[0].reference()
    error = ((calls[0]()[0, :, 0].float() - reference).abs().max() / reference.abs().max()).item()
    if not error < TOLERANCE:  # also for nan
        return dict(error=error, wrong=f'wrong: {100 * error:.1f} % off the fp32 reference')
    if plan.device.type == 'cuda':
        one_round = in_graph(calls)
    else:

        def one_round():
            for call in calls:
                call()

    one = [timing.seconds(plan.device, one_round) for _ in range(WARMUP)][-1]
    steps = max(1, min(plan.steps, int(LONGEST / one)))
    times = [
        timing.seconds(plan.device, lambda: [one_round() for _ in range(steps)])
        / (steps * len(calls))
        for _ in range(plan.repeats)
    ]
    return median_and_range('kernel_us', times, 1e6) | dict(error=error, timed_steps=steps)


def try_candidate(candidate, inputs, plan):
    """The same, where whatever a kernel refuses with is the row's reason."""
    try:
        result = attempt(lambda: time_candidate(candidate, inputs, plan), plan.device)
    except Exception as error:  # compilers and kernels have errors of their own
        result = dict(reason=' '.join(f'{type(error).__name__}: {error}'.split())[:200])
    free_memory(plan.device)
    return result | dict(reason=result.pop('wrong', '') or result['reason'])


def tune(candidate, inputs, plan, tell):
    """Tries the variants of the Triton kernel at the shape of `inputs`, and leaves the fastest that is right in decode_tiles.json."""
    held = inputs[0]
    first = next(iter(held.stores.values()))
    latent = held.kind == 'latent'
    C = first.width if latent else held.per_head
    if candidate is None or decode_kernels.reason_not_to_run(
        held.q.device, held.q.dtype, C, first.bits, group_of(first.width), latent
    ):
        return
    tiles, size = decode_kernels.tiles_of_shapes(), held.cache.size
    key = decode_kernels.shape_key(
        held.H if latent else held.H * C // first.width,
        C,
        held.q.size(-1) - C,
        latent,
        first.bits,
        size,
    )
    if held.cache.pages and key in tiles:  # the same for both layouts
        return
    times = {}
    for variant in decode_kernels.variants(C, latent, first.bits, size):
        tiles[key] = variant
        result = try_candidate(candidate, inputs, plan)
        times[tuple(variant)] = result.get('kernel_us', math.inf)
        tell(f'  {key}: {variant} {result["reason"] or format(result["kernel_us"], ".1f") + " µs"}')
    tiles[key] = list(min(times, key=times.get))
    if math.isinf(min(times.values())):
        del tiles[key]
    file = Path(decode_kernels.__file__).with_name('tiles.json')
    partial = file.with_name(file.name + '.partial')
    partial.write_text(
        '{\n'
        + ',\n'.join(f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in sorted(tiles.items()))
        + '\n}\n'
    )
    partial.replace(file)


def named(words):
    """The candidates whose names hold one of the words in 'triton,sdpa'; all for ''. UserError for a word that none holds."""
    for word in words.lower().split(','):
        if not any(word in c.name.lower() for c in CANDIDATES):
            raise UserError(
                f"--candidates={words}: '{word}' is part of no name: there are {' | '.join(c.name for c in CANDIDATES)}"
            )
    return [
        c for c in CANDIDATES if any(word in c.name.lower() for word in words.lower().split(','))
    ]


def measure(plan, candidates, rows, tell=print):
    """Rows of each of `candidates` that can run each of --attention_shapes, at each cache, dtype, batch and context of a decode_meter.Plan."""
    config, device, cpu = plan.config, plan.device, plan.device.type == 'cpu'
    batches, contexts = (
        numbers(config, 'batch_sizes', '4' if cpu else '64'),
        numbers(config, 'contexts', '256' if cpu else '8192'),
    )
    auto = str(plan.dtype)[6:]
    bandwidth = copy_bandwidth(device, plan.repeats)
    tell(f'{machine.describe(device)}: a copy runs at {bandwidth / 1e9:,.1f} GB/s')
    cases = itertools.product(
        plan.shapes,
        batches,
        contexts,
        [name for name in plan.caches if name != 'none'],
        dict.fromkeys(auto if name == 'auto' else name for name in plan.cache_dtypes),
    )
    for shape, batch, context, layout, dtype in cases:
        able = [
            c
            for c in candidates
            if plan.shapes[shape][0] in c.kinds and layout in c.layouts and dtype in c.dtypes
        ]
        key = dict(
            what='attention',
            shape=shape,
            cache=layout,
            cache_dtype=dtype,
            page_size=plan.page_size if layout == 'paged' else None,
            batch=batch,
            context=context,
            ragged=config['ragged'],
        )
        able = [
            c for c in able if not rows.find(**key, candidate=c.name, device=rows.facts['device'])
        ]
        if able:
            compare(able, key | dict(bandwidth=bandwidth), plan, rows, tell)


def compare(able, key, plan, rows, tell):
    """One row for each of the candidates `able` at the shape, cache, batch and context of `key`."""
    draw, context, device, config, inputs = (
        random.Random(0),
        key['context'],
        plan.device,
        plan.config,
        [],
    )
    lengths = [
        draw.randint((1 + context) // 2, context) if key['ragged'] else context
        for _ in range(key['batch'])
    ]

    def make():
        while (
            not inputs
            or len(inputs) < 2
            or device.type == 'cuda'
            and sum(held.nbytes for held in inputs) < COLD_BYTES
        ):
            inputs.append(
                Held(
                    key['shape'],
                    lengths,
                    context,
                    key['cache'],
                    key['cache_dtype'],
                    plan.page_size,
                    plan.dtype,
                    device,
                    seed=len(inputs),
                )
            )
        return dict(bytes=inputs[0].nbytes, copies=len(inputs))

    made = attempt(make, device)
    if config['tune'] and not made['reason']:
        tune(next((c for c in able if c.make is triton), None), inputs, plan, tell)
    for candidate in able:
        result = made if made['reason'] else made | try_candidate(candidate, inputs, plan)
        if 'kernel_us' in result:
            result['bandwidth_percent'] = (
                100 * result['bytes'] / (result['kernel_us'] * 1e-6) / key['bandwidth']
            )
        row = rows.add(**key, candidate=candidate.name, **result)
        tell(
            f'{row["shape"]:<10} {row["batch"]:>3} x {row["context"]:<6} {row["cache"] + " " + row["cache_dtype"]:<15} {candidate.name:<26} '
            + (
                row['reason']
                or f'{row["kernel_us"]:>10,.1f} µs ({row["kernel_us_least"]:,.1f} to {row["kernel_us_most"]:,.1f}), {row["bandwidth_percent"]:5.1f} % of the copy bandwidth'
            )
        )
    inputs.clear()
    free_memory(device)
