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
import random
import statistics
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Callable

import torch
import torch.nn.functional as F

import kernels
import machine
from cache import BITS, FULL, Cache, dequantise, quantise
from configurator import UserError
from decode_meter import attempt, numbers, release, spread

COLD_BYTES = 4 * 60e6  # of inputs in rotation on a GPU: four times the L2 of an H200
TOLERANCE = 0.05       # largest error of a result in bf16 storage, as a share of the reference's largest value
WARMUP = 3             # rounds


# ---------------------------------------------------------------------------------------------------
# inputs

class Held:
    """What one layer remembers of B sequences, in a real cache, and a query for it."""

    def __init__(self, shape, lengths, size, layout, dtype, page_size, full, device, seed):
        self.shape, self.kind, self.H, self.widths, self.per_head = shape, *read_shape(shape)
        B, here = len(lengths), torch.Generator(device).manual_seed(seed)
        self.cache = cache = Cache([self.widths], B, size, layout=layout, dtype=dtype, page_size=page_size, full=full, device=device)
        if layout == 'paged':
            random.Random(seed).shuffle(cache.pages.free)
        cache.plan(lengths)  # takes the pages
        cache.lengths.copy_(torch.tensor(lengths))
        self.lengths, self.page_size = lengths, cache.page_size
        self.equal = min(lengths) == max(lengths) == size
        self.mask = None if self.equal else (torch.arange(size, device=device) < cache.lengths[:, None])[:, None, None]  # (B, 1, 1, N)
        q_width = self.per_head if self.kind == 'kv' else sum(self.widths.values())
        self.q = torch.randn(B, self.H, 1, q_width, device=device, dtype=full, generator=here)
        self.scale = q_width ** -0.5
        self.stores = cache.layers[0].stores
        self.first = {}  # what the query of sequence 0 should see, name -> (N, width) in fp32
        for name, store in self.stores.items():
            for b, length in enumerate(lengths):
                x = torch.randn(length, store.width, device=device, dtype=full, generator=here)
                parts, at = quantise(x, store.bits) if store.bits else [x], self.addresses(b)
                for buffer, part in zip(store.places, parts):
                    buffer[at] = part.to(buffer.dtype)
                seen = dequantise(*parts, store.width, store.bits) if store.bits else store.places[0][at].float()
                if store.recent is not None:
                    places = torch.arange(max(0, length - cache.window), length, device=device)
                    store.recent[b * cache.window + places % cache.window] = x[places]
                    seen[places] = x[places].float()
                if b == 0:
                    self.first[name] = seen

    def addresses(self, b):
        """The place in the buffers of each token of sequence b."""
        place = torch.arange(self.lengths[b], device=self.q.device)
        if self.cache.layout == 'dense':
            return b * self.cache.size + place
        return self.cache.table[b, place // self.page_size].long() * self.page_size + place % self.page_size

    @property
    def nbytes(self):
        """Bytes that a step has to read: of every token that is held, once; the last ones (the window) in full precision."""
        total = 0
        for store in self.stores.values():
            per_place = sum(buffer.nbytes for buffer in store.places) // self.cache.places
            recent = [0 if store.recent is None else min(self.cache.window, length) for length in self.lengths]
            total += sum((length - w) * per_place + w * store.width * self.cache.full.itemsize for length, w in zip(self.lengths, recent))
        return total

    def reference(self):
        """softmax(scale q kᵀ) v of sequence 0 in fp32, (H, width of v)."""
        q = self.q[0, :, 0].float()
        if self.kind == 'kv':
            k, v = (x.unflatten(-1, (-1, self.per_head)).repeat_interleave(self.H * self.per_head // x.size(-1), dim=1) for x in self.first.values())
            return torch.einsum('hn,nhd->hd', (torch.einsum('hd,nhd->hn', q, k) * self.scale).softmax(-1), v)
        return (q @ torch.cat(list(self.first.values()), dim=-1).T * self.scale).softmax(-1) @ self.first['c_kv']


def read_shape(shape):
    """(kind, H, widths, width of a head) of '12:4:64' (heads : key/value heads : width) or '16:512+64' (heads : latent + k_pe)."""
    try:
        H, *rest = shape.split(':')
        if len(rest) == 1:
            R, P = map(int, rest[0].split('+'))
            found = 'latent', int(H), dict(c_kv=R, k_pe=P), None
        else:
            K, D = map(int, rest)
            found = 'kv', int(H), dict(k=K * D, v=K * D), D
            if int(H) % K:
                raise ValueError
        if min(found[1], *found[2].values()) < 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--attention_shapes: '{shape}' is none: write heads:key/value heads:width like 12:4:64, or for MLA heads:latent+k_pe like 16:512+64") from None
    return found


# ---------------------------------------------------------------------------------------------------
# candidates: each takes a Held and returns the function that is timed; its result is (B, H, 1, width of v)

def heads(held, buffers):
    """Buffers (B, N, width) as k and v (B, K, N, D), or for MLA [c_kv | k_pe] and c_kv (B, 1, N, ...), as model_mla.py hands them over."""
    if held.kind == 'kv':
        return [x.unflatten(-1, (-1, held.per_head)).transpose(1, 2) for x in buffers]
    return torch.cat(buffers, dim=-1)[:, None], buffers[0][:, None]


def sdpa(held, k, v):
    return F.scaled_dot_product_attention(held.q, k, v, attn_mask=held.mask, scale=held.scale, enable_gqa=held.H != k.size(1))


def sdpa_dense(held):
    rows = [store.places[0].unflatten(0, (held.cache.slots, -1)) for store in held.stores.values()]
    return lambda: sdpa(held, *heads(held, rows))


def sdpa_gathered(held):
    """Pages copied into a row first, in the step: what a cache costs whose kernel knows no pages."""
    pages = [store.places[0].unflatten(0, (-1, held.page_size)) for store in held.stores.values()]
    return lambda: sdpa(held, *heads(held, [p[held.cache.table].flatten(1, 2)[:, :held.cache.size] for p in pages]))


def sdpa_dequantised(held):
    """The whole cache written out at full precision first, in the step: what a quantised cache costs whose kernel knows no codes."""
    cache, full, stores = held.cache, held.q.dtype, list(held.stores.values())
    place = torch.arange(cache.size, device=held.q.device)
    is_recent = (place >= cache.lengths[:, None] - cache.window)[..., None]
    from_recent = torch.arange(cache.slots, device=held.q.device)[:, None] * cache.window + place % max(1, cache.window)

    def rows(store):
        seen = dequantise(*store.places, store.width, store.bits).to(full) if store.bits else store.places[0]
        seen = seen.unflatten(0, (cache.slots, -1))
        return seen if store.recent is None else torch.where(is_recent, store.recent[from_recent], seen)
    return lambda: sdpa(held, *heads(held, [rows(store) for store in stores]))


@lru_cache
def compiled_flex(shape):  # one for each shape: beyond eight recompilations torch falls back without a word
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_paged(held):
    """
    FlexAttention that finds its pages itself: keys and values are the whole buffers, one row for all sequences,
    and the block mask of a sequence lists its pages. Only the last page is masked inside. MLA's [c_kv | k_pe] has
    to be one tensor here: it is joined ahead, not in the time.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    cache, page, lengths = held.cache, held.page_size, held.cache.lengths
    whole, partial_page = (lengths // page).int(), (lengths % page > 0).int()
    last = cache.table.gather(1, whole.long().clamp(max=cache.table.size(1) - 1)[:, None])
    order = torch.full((cache.slots, cache.places // page), cache.size, dtype=torch.int32, device=held.q.device)  # of each page in a sequence; not its own: beyond all
    for b, pages in enumerate(cache.held_by):
        order[b, pages] = torch.arange(len(pages), dtype=torch.int32, device=held.q.device)
    blocks = BlockMask.from_kv_blocks(partial_page[:, None, None], last.expand_as(cache.table)[:, None, None].contiguous(), whole[:, None, None],
                                      cache.table[:, None, None].contiguous(), BLOCK_SIZE=(128, page), seq_lengths=(1, cache.places), compute_q_blocks=False,
                                      mask_mod=lambda b, h, i, j: order[b, j // page] * page + j % page < lengths[b])
    buffers = [store.places[0] for store in held.stores.values()]
    if held.kind == 'kv':
        k, v = (x.unflatten(-1, (-1, held.per_head)).transpose(0, 1)[None] for x in buffers)  # (1, K, places, D)
    else:
        k = torch.cat(buffers, dim=-1)[None, None]
        v = k[..., :buffers[0].size(-1)]
        v = v if held.q.is_cuda else v.clone()  # a CPU refuses keys and values that share storage
    flex = compiled_flex((held.shape, page, len(held.lengths), cache.places)) if held.q.is_cuda else flex_attention
    return lambda: flex(held.q, k, v, block_mask=blocks, scale=held.scale, enable_gqa=held.H != k.size(1))


def latent_decode(held):
    """kernels.latent_decode on the cache's own buffers; quantised ones as [codes, scale, zero], with the recent window beside them."""
    cache, (c_kv, k_pe) = held.cache, held.stores.values()
    how = dict(table=cache.table, page_size=cache.page_size) if cache.pages else {}
    if c_kv.bits:
        return partial(kernels.latent_decode, held.q, c_kv.places, k_pe.places[0], cache.lengths, scale=held.scale, bits=c_kv.bits, recent=c_kv.recent, **how)
    return partial(kernels.latent_decode, held.q, c_kv.places[0], k_pe.places[0], cache.lengths, scale=held.scale, **how)


@dataclass
class Candidate:
    name: str
    kinds: tuple      # of attention: 'kv' (MHA, GQA, MQA), 'latent' (MLA)
    layouts: tuple    # of the cache
    dtypes: tuple     # of the cache
    make: Callable    # a Held -> the function to time
    needs: str = ''   # a function of kernels.py without which it is left out


CANDIDATES = [
    Candidate('SDPA', ('kv', 'latent'), ('dense',), (*FULL,), sdpa_dense),
    Candidate('SDPA, pages gathered', ('kv', 'latent'), ('paged',), (*FULL,), sdpa_gathered),
    Candidate('FlexAttention, page table', ('kv', 'latent'), ('paged',), (*FULL,), flex_paged),
    Candidate('SDPA, dequantised', ('kv', 'latent'), ('dense',), (*BITS,), sdpa_dequantised),
    Candidate('Triton', ('latent',), ('dense', 'paged'), (*FULL, *BITS), latent_decode, needs='latent_decode'),
]


# ---------------------------------------------------------------------------------------------------
# time

def copy_bandwidth(device, repeats):
    """Bytes a second that a large copy reads and writes, both counted: what the memory can do today."""
    source = torch.ones(2 ** 30 if device.type == 'cuda' else 2 ** 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [machine.seconds(device, lambda: [target.copy_(source) for _ in range(10)]) / 10 for _ in range(WARMUP + repeats)]
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
def time_candidate(candidate, inputs, device, rounds, repeats):
    """Row entries of one candidate on all copies of the inputs: µs a call with spread, and its error against the reference."""
    calls = [candidate.make(held) for held in inputs]
    reference = inputs[0].reference()
    error = ((calls[0]()[0, :, 0].float() - reference).abs().max() / reference.abs().max()).item()
    if not error < TOLERANCE:  # also for nan
        return dict(error=error, wrong=f'wrong: {100 * error:.1f} % off the fp32 reference')
    if device.type == 'cuda':
        one_round = in_graph(calls)
    else:
        def one_round():
            for call in calls:
                call()
    for _ in range(WARMUP):
        one_round()
    times = [machine.seconds(device, lambda: [one_round() for _ in range(rounds)]) / (rounds * len(calls)) for _ in range(repeats)]
    return spread('kernel_us', times, 1e6) | dict(error=error)


def try_candidate(candidate, inputs, device, rounds, repeats):
    """The same, where whatever a kernel refuses with is the row's reason."""
    try:
        result = attempt(lambda: time_candidate(candidate, inputs, device, rounds, repeats), device)
    except Exception as error:  # compilers and kernels have errors of their own
        result = dict(reason=' '.join(f'{type(error).__name__}: {error}'.split())[:200])
    release(device)
    return result | dict(reason=result.pop('wrong', '') or result['reason'])


def measure(config, device, rows, tell=print):
    """Rows of every candidate that can run each of --attention_shapes, at each cache, dtype, batch and context asked for."""
    full, cpu = machine.pick_dtype(config['dtype'], device), device.type == 'cpu'
    batches, contexts = numbers(config, 'batch_sizes', '4' if cpu else '64'), numbers(config, 'contexts', '256' if cpu else '8192')
    shapes = config['attention_shapes'].split(',')
    for shape in shapes:
        read_shape(shape)
    auto = next(name for name in FULL if FULL[name] == full)
    dtypes = dict.fromkeys(auto if name == 'auto' else name for name in config['cache_dtypes'].split(','))
    layouts = [name for name in config['caches'].split(',') if name != 'none']
    bandwidth = copy_bandwidth(device, config['repeats'])
    tell(f'{machine.describe(device)}: a copy runs at {bandwidth / 1e9:,.1f} GB/s')
    for shape in shapes:
        for batch in batches:
            for context in contexts:
                for layout in layouts:
                    for dtype in dtypes:
                        able = [c for c in CANDIDATES if read_shape(shape)[0] in c.kinds and layout in c.layouts and dtype in c.dtypes
                                and (not c.needs or hasattr(kernels, c.needs))]
                        if able:
                            key = dict(what='attention', shape=shape, cache=layout, cache_dtype=dtype, page_size=config['page_size'] if layout == 'paged' else None,
                                       batch=batch, context=context, bandwidth=bandwidth)
                            compare(able, key, config, full, device, rows, tell)


def compare(able, key, config, full, device, rows, tell):
    """One row for each of the candidates `able` at the shape, cache, batch and context of `key`."""
    draw, context, inputs = random.Random(0), key['context'], []
    lengths = [draw.randint(1 + context // 2, context) if config['ragged'] else context for _ in range(key['batch'])]

    def make():
        while not inputs or len(inputs) < 2 or device.type == 'cuda' and sum(held.nbytes for held in inputs) < COLD_BYTES:
            inputs.append(Held(key['shape'], lengths, context, key['cache'], key['cache_dtype'], config['page_size'], full, device, seed=len(inputs)))
        return dict(bytes=inputs[0].nbytes, copies=len(inputs))

    made = attempt(make, device)
    for candidate in able:
        result = made if made['reason'] else made | try_candidate(candidate, inputs, device, max(1, 20 // len(inputs)), config['repeats'])
        if 'kernel_us' in result:
            result['bandwidth_percent'] = 100 * result['bytes'] / (result['kernel_us'] * 1e-6) / key['bandwidth']
        row = rows.add(**key, candidate=candidate.name, ragged=config['ragged'], **result)
        tell(f"{row['shape']:<10} {row['batch']:>3} x {row['context']:<6} {row['cache'] + ' ' + row['cache_dtype']:<15} {candidate.name:<26} " + (
            row['reason'] or f"{row['kernel_us']:>10,.1f} µs ({row['kernel_us_least']:,.1f} to {row['kernel_us_most']:,.1f}), {row['bandwidth_percent']:5.1f} % of the copy bandwidth"))
    inputs.clear()
    release(device)
