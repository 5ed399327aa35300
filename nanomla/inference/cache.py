"""
Caches for decoding. A cache is a layout times a storage times what an attention caches of a token:

    layout    dense: room for `size` tokens in each of `rows` rows, a sequence a row; or paged:
              pages of `page_size` slots, which sequences take as they grow and share with copies
    storage   float32, bfloat16, float16: every token as it is; int8, int4: all tokens in groups of
              channels, and the last `window` of a sequence at full precision as well (KIVI, Liu
              et al. 2024); where the first tokens show channels of very different size, these
              are brought to one size, channel by channel (quantize.ChannelRanges)
    tokens    whatever `attention.cache_dims()` names: k and v (MHA, GQA, MQA), c_kv and k_pe (MLA)

Bytes, with slots = rows · size, or pages · page_size, and b bytes an element of the full precision:

    nbytes = sum over layers and names of  slots · per_slot + window_bytes

                   per_slot                                      window_bytes
    floats         width · b                                     0
    int8, int4     ceil(width · bits / 8) + 4 · width / group    rows · window · width · b

The 4 bytes of a group are its scale and its zero in fp16; group is the largest divisor of width up
to 64. The window is no longer than `size`. k_pe is never quantised: one rotated key for all heads
is small, and positions depend on it. Bookkeeping (16 bytes a row, 4 a page) is not counted.

One step has two halves. `plan` is the host's: it knows every length, takes pages, copies a shared
page before it is written, and raises what can go wrong before anything has changed. What the model
then runs, `begin`, `CacheLayer.append` and `end`, is the device's: static buffers and lengths that
live there, no page taken, nothing read back. With static=True shapes do not depend on lengths
either, so that such a step can be recorded as a CUDA graph and replayed after each `plan`.

Legend: B sequences of a pass, T new tokens of each, N slots that a pass reads, W window, C width.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from model import GPT, Context
from nanomla.core.checks import check_choice
from nanomla.core.configurator import UserError
from nanomla.inference import attention_kernel, backends
from nanomla.inference.quantize import (
    BITS,
    FULL,
    NEVER_QUANTISED,
    ChannelRanges,
    dequantise,
    group_of,
    quantise,
)

LAYOUTS = ('dense', 'paged')
PAGE_SIZES = (16, 64, 128)
KERNELS = ('auto', 'triton', 'torch', 'flex', 'flashinfer', 'flashmla')
READ_MULTIPLE = 64  # a pass that is not static reads so many slots, or a multiple


class OutOfPages(UserError):
    """`needed` pages were asked for and only `free` are left; nothing has changed."""

    def __init__(self, needed: int, free: int):
        super().__init__(
            f'out of pages: {needed} needed, {free} free: end a sequence, '
            'or make the cache with more pages'
        )
        self.needed = needed
        self.free = free


# -------------------------------------------------------------------------------------------------
# one forward pass


@dataclass
class Plan:
    """What the host knows of the next pass."""

    rows: torch.Tensor | None  # the rows that get tokens (B,); None = all, in order
    counts: torch.Tensor | None  # new tokens of each (B,); None = cache.counts
    ragged: bool  # whether counts may differ, so that some tokens are padding
    reach: int  # N: slots of a sequence that its queries may see
    T: int  # tokens of the longest
    fresh: bool  # whether all of the rows are empty before it


@dataclass
class WriteSlots:
    """Where the tokens of a pass go; token numbers and slots are flat, (B T,)."""

    slots: torch.Tensor
    tokens: torch.Tensor | None = None  # which token goes there; None = all, in order
    window_slots: torch.Tensor | None = None  # the same for the windows of full precision
    window_tokens: torch.Tensor | None = None


@dataclass
class ReadView:
    """What the queries of a pass see."""

    filled: torch.Tensor  # (B, N): whether there is a token
    mask: torch.Tensor  # (B, 1, T, N): whether a query may look
    slots: torch.Tensor | None  # paged: (B, N), where a sequence's tokens are
    recent: torch.Tensor | None = None  # quantised: (B, N), whether full precision is at hand
    recent_index: torch.Tensor | None = None  # quantised: (B, N), where in [window | new tokens]


class Pass:
    """What one forward pass has in common in all layers. Positions of padding are 0."""

    def __init__(self, cache: 'Cache', plan: Plan):
        self.cache = cache
        self.rows, self.reach, self.fresh = plan.rows, plan.reach, plan.fresh
        self.ragged = plan.ragged
        self.T = plan.T
        self.counts = cache.counts if plan.counts is None else plan.counts
        self.start = cache.lengths if plan.rows is None else cache.lengths[plan.rows]
        self.lengths = self.start + self.counts  # with the new tokens
        self.positions = self.start[:, None] + cache.steps[: plan.T]  # (B, T)
        if plan.ragged:
            self.real = cache.steps[: plan.T] < self.counts[:, None]
            self.positions = torch.where(self.real, self.positions, 0)
        self.backend_state = {}  # what a decode backend works out once for all layers

    @cached_property
    def row_numbers(self):
        """The row of each sequence, (B, 1)."""
        rows = self.cache.row_numbers if self.rows is None else self.rows
        return rows[:, None]

    @cached_property
    def write_slots(self) -> WriteSlots:
        """Where the new tokens go."""
        cache, W, positions = self.cache, self.cache.window, self.positions
        if cache.pages:
            page = cache.block_table[self.row_numbers, positions // cache.page_size].long()
            slots = page * cache.page_size + positions % cache.page_size
        else:
            slots = self.row_numbers * cache.size + positions
        write = WriteSlots(slots.flatten())
        if self.ragged:
            write.tokens, write.slots = repeat_first(self.real, slots)
        if cache.dtype in BITS and W:
            new = cache.steps[: self.T]
            stays = (new < self.counts[:, None]) & (new >= self.counts[:, None] - W)
            ring = self.row_numbers * W + positions % W
            write.window_tokens, write.window_slots = repeat_first(stays, ring)
        return write

    @cached_property
    def read_view(self) -> ReadView:
        """What the queries see of all slots: only CacheLayer.append needs it."""
        cache, W = self.cache, self.cache.window
        slot, start = cache.steps[: self.reach], self.start[:, None]
        slots = None
        if cache.pages:
            pages = math.ceil(self.reach / cache.page_size)
            table = cache.block_table if self.rows is None else cache.block_table[self.rows]
            first = table[:, :pages].long() * cache.page_size
            slots = (first[..., None] + cache.steps_of_page).flatten(1)[:, : self.reach]
        view = ReadView(
            filled=slot < self.lengths[:, None],
            mask=(slot <= self.positions[..., None])[:, None],
            slots=slots,
        )
        if cache.dtype in BITS:
            # CacheLayer.append looks for recent tokens in [window | new tokens], W + T of them. The
            # window is a ring: a slot before `start` is at its remainder by W. New ones follow.
            ring_or_new = torch.where(slot < start, slot % max(W, 1), W + slot - start)
            # In full precision are all new tokens, and the last W where the new ones are fewer.
            view.recent = slot >= torch.minimum(start, self.lengths[:, None] - W)
            view.recent_index = ring_or_new.clamp(0, W + self.T - 1)
        return view


def repeat_first(chosen, to):
    """
    Return which token goes where, (B T,) each, for chosen and to (B, T).

    A write has a fixed size, B T, whatever the lengths: in place of a token that is not chosen the
    first chosen one is written to its own slot once more.
    """
    chosen, to = chosen.flatten(), to.flatten()
    own = torch.arange(len(chosen), device=chosen.device)
    tokens = torch.where(chosen, own, chosen.int().argmax())
    return tokens, to[tokens]


# -------------------------------------------------------------------------------------------------
# storage


class Store:
    """
    One name of one layer. `data` holds the slots of all sequences in one buffer (slots, C), or in
    two, codes and scales; `recent` the window of a quantised store, (rows · W, C).
    """

    def __init__(self, cache: 'Cache', width: int, bits: int, dtype: torch.dtype):
        self.cache, self.width, self.bits = cache, width, bits
        self.group = group_of(width) if width else 1
        self.recent = None

        def buffer(slots, columns, dtype):
            return torch.zeros(slots, columns, dtype=dtype, device=cache.device)

        if bits == 0:
            self.data = [buffer(cache.slots, width, dtype)]
            return
        self.data = [
            buffer(cache.slots, math.ceil(width * bits / 8), torch.uint8),
            buffer(cache.slots, 2 * width // self.group, torch.float16),
        ]
        if cache.window:
            self.recent = buffer(cache.rows * cache.window, width, cache.full)

    @property
    def buffers(self) -> list[torch.Tensor]:
        return self.data if self.recent is None else [*self.data, self.recent]

    @property
    def kernel_buffers(self) -> tuple:
        """Codes (or values), scales and window for a kernel; None for what is not there."""
        if self.bits == 0:
            return self.data[0], None, self.recent
        return *self.data, self.recent

    def write(self, x) -> None:
        """Write the new tokens x (B, T, C) to their slots."""
        write, flat = self.cache.current.write_slots, x.flatten(0, 1)
        chosen = flat if write.tokens is None else flat[write.tokens]
        parts = quantise(chosen, self.bits) if self.bits else [chosen]
        for buffer, part in zip(self.data, parts):
            buffer[write.slots] = part.to(buffer.dtype)
        if self.recent is not None:
            self.recent[write.window_slots] = flat[write.window_tokens].to(self.recent.dtype)

    def append(self, x):
        """Write new tokens x (B, T, C); return all (B, N, C), zeros in slots without a token."""
        view = self.cache.current.read_view
        before = None
        if self.recent is not None:
            before = self.windows()  # a copy: the write goes over the oldest of the ring
        self.write(x)
        parts = [self.read(buffer) for buffer in self.data]
        if self.bits == 0:
            seen = parts[0].to(x.dtype)
        else:
            seen = dequantise(*parts, self.width, self.bits).to(x.dtype)
            recent = x
            if before is not None:
                recent = torch.cat([before, x.to(before.dtype)], dim=1).to(x.dtype)
            index = view.recent_index[..., None].expand(-1, -1, self.width)
            seen = torch.where(view.recent[..., None], recent.gather(1, index), seen)
        return torch.where(view.filled[..., None], seen, 0)

    def windows(self):
        """Return a copy of the windows of this pass's sequences, (B, W, C), as rings."""
        windows, rows = self.recent.unflatten(0, (self.cache.rows, -1)), self.cache.current.rows
        return windows.clone() if rows is None else windows[rows]

    def read(self, buffer):
        """Return this pass's sequences of a buffer (slots, C): (B, N, C), arbitrary where empty."""
        cache, current = self.cache, self.cache.current
        if cache.pages:
            return buffer[current.read_view.slots]
        by_row = buffer.unflatten(0, (cache.rows, cache.size))[:, : current.reach]
        return by_row if current.rows is None else by_row[current.rows]


class CacheLayer(Context):
    """The cache of one layer, as its attention sees it."""

    is_cache = True

    def __init__(self, cache: 'Cache', stores: dict[str, Store]):
        self.cache = cache
        self.stores = stores
        self.joint = None
        self.ranges: dict[str, ChannelRanges] = {}  # of stores with outlier channels
        # They are looked for once, in the first tokens.
        self.ranges_known = not any(store.bits for store in stores.values())

    def join(self) -> None:
        """Make MLA's stores columns of one buffer `joint` (slots, R + P), as some kernels want."""
        c_kv, k_pe = self.stores.values()
        self.joint = torch.cat([c_kv.data[0], k_pe.data[0]], dim=-1)
        latents, keys = self.joint.split([c_kv.width, k_pe.width], dim=-1)
        c_kv.data, k_pe.data = [latents], [keys]

    @property
    def fresh(self) -> bool:
        """Whether the sequences of this pass were empty: then their tokens see no others."""
        return self.cache.current.fresh

    def attend(self, attention, q, k, v):
        """Attend to all that is cached, the new keys and values k, v (B, K, T, D) among it."""
        new = dict(k=k.transpose(1, 2).flatten(2), v=v.transpose(1, 2).flatten(2))
        if self.fresh:
            self.write(**new)
            return attention.attend(q, k, v)
        if self.reads_in_place(q.size(2)) and attention.kernel != 'eager':
            self.write(**new)
            return self.attend_in_place(q, attention.scale)
        cached, mask = self.append(**new)
        k, v = (t.unflatten(-1, (k.size(1), -1)).transpose(1, 2) for t in cached)
        return attention.attend(q, k, v, mask)

    def write(self, **new) -> None:
        """Write what new tokens cache, name=(B, T, C)."""
        self.check_names(new)
        new = self.even(new)
        cache, current = self.cache, self.cache.current
        if cache.kernel == 'triton' and self.reads_in_place(current.T):
            attention_kernel.append_tokens(self.kernel_inputs(new), **self.kernel_options())
        else:
            for name, x in new.items():
                self.stores[name].write(x)

    def append(self, **new):
        """
        `write`, and return all that is cached, each (B, N, C) in the order of the names, and the
        mask (B, 1, T, N): which slot each query may see.

        A quantised cache shows all tokens of this call in full precision; where they are fewer than
        W, the ones before them as well, W in all.
        """
        self.check_names(new)
        new = self.even(new)
        cached = {name: self.stores[name].append(x) for name, x in new.items()}
        for name, ranges in self.ranges.items():
            cached[name] = ranges.undo(cached[name])
        return list(cached.values()), self.cache.current.read_view.mask

    def even(self, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bring the channels of a store to one size, where those of the first pass differ."""
        if not self.ranges_known:
            self.find_ranges(new)
        return new | {name: ranges.even(new[name]) for name, ranges in self.ranges.items()}

    def find_ranges(self, new: dict[str, torch.Tensor]) -> None:
        """Look for outlier channels in the tokens of the first pass."""
        self.ranges_known = True
        tokens = self.cache.current.write_slots.tokens
        for name, x in new.items():
            if not self.stores[name].bits:
                continue
            x = x.flatten(0, 1)
            ranges = ChannelRanges.of(x if tokens is None else x[tokens])
            if ranges:
                self.ranges[name] = ranges

    def rope_and_append(self, q, rope, rope_widths, norm=None, **new):
        """
        `write` one token of each sequence, name=(B, C), to which RoPE and `norm` were not applied
        yet, and return its query q (B, C) with RoPE: see attention_kernel.append_tokens.

        rope_widths: channels of a head that RoPE turns, of q, of the first and of the second name.
        """
        self.check_names(new)
        return attention_kernel.append_tokens(
            self.kernel_inputs(new),
            q=q if q.size(-1) else None,
            rope=rope,
            rope_widths=rope_widths,
            norm=norm,
            **self.kernel_options(),
        )

    def reads_in_place(self, T: int) -> bool:
        """Whether `attend_in_place` can take T new tokens of a sequence; `append` always can."""
        if T > 1 or self.cache.kernel == 'torch':
            return False
        # Ours finds the sequences of any rows; the libraries' kernels take all rows in their order.
        return self.cache.kernel == 'triton' or self.cache.current.rows is None

    def attend_in_place(self, q, scale: float, q_pe=None):
        """
        softmax(scale q kᵀ) v over all that is cached, by a kernel that reads the slots as they are:
        q (B, H, 1, C) -> (B, H, 1, C). With q_pe (B, H, 1, P) the stores are MLA's: keys are
        [c_kv | k_pe], values c_kv.
        """
        names = list(self.stores)
        keys, values = names[0], names[0] if self.cache.holds_latents else names[1]
        if keys in self.ranges:
            q = self.ranges[keys].of_query(q)
        if self.cache.kernel == 'triton':
            y = self.attend_by_triton(q, scale, q_pe)
        else:
            y = backends.attend(self.cache.kernel, self, q, scale, q_pe)
        if values in self.ranges:
            y = self.ranges[values].of_sum(y)
        return y

    def attend_by_triton(self, q, scale: float, q_pe):
        """`attend_in_place` by attention_kernel.py."""
        first, second = self.stores.values()
        latent = self.cache.holds_latents
        y = attention_kernel.decode_attention(
            q[:, :, 0].contiguous(),
            first.kernel_buffers,
            v=None if latent else second.kernel_buffers,
            q_pe=None if q_pe is None else q_pe[:, :, 0].contiguous(),
            k_pe=None if q_pe is None else second.data[0],
            lengths=self.cache.current.lengths,
            scale=scale,
            size=self.cache.size,
            block_table=self.cache.block_table,
            page_size=self.cache.page_size,
            rows=self.cache.current.rows,
            bits=first.bits,
            group=first.group,
            window=self.cache.window,
        )
        return y[:, :, None]

    def check_names(self, new) -> None:
        names = list(self.stores)
        assert list(new) == names, f'this cache holds {names}, not {list(new)}'

    def kernel_inputs(self, new) -> list:
        """Return the new tokens, buffers, bits and group of each store that has a width."""
        stores = [(self.stores[name], x) for name, x in new.items() if self.stores[name].width]
        return [(x, store.kernel_buffers, store.bits, store.group) for store, x in stores]

    def kernel_options(self) -> dict:
        cache, current = self.cache, self.cache.current
        return dict(
            lengths=current.lengths,
            counts=current.counts,
            size=cache.size,
            block_table=cache.block_table,
            page_size=cache.page_size,
            rows=current.rows,
            window=cache.window,
        )


# -------------------------------------------------------------------------------------------------
# layout


class PagePool:
    """Which pages are free, and how many sequences hold each of the others."""

    def __init__(self, count: int):
        self.count = count
        self.free = list(range(count))[::-1]
        self.holders = [0] * count

    def allocate(self, n: int) -> list[int]:
        """Return n free pages, all or none (OutOfPages)."""
        if n > len(self.free):
            raise OutOfPages(n, len(self.free))
        pages = [self.free.pop() for _ in range(n)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)


@dataclass
class CacheOptions:
    """
    How a cache is laid out and stored.

    dtype: 'auto' is the full precision; static: shapes for a CUDA graph; pages: 0 = enough for all
    rows; kernel: who attends for a single new token, triton (attention_kernel.py), torch, or one of
    backends.py; auto is triton where it can run, else torch. fuse: with triton, blocks by
    fused_step.py. UserError for what is not known.
    """

    layout: str = 'dense'
    dtype: str = 'auto'
    page_size: int = 64
    pages: int = 0
    window: int = 128
    static: bool = False
    kernel: str = 'auto'
    fuse: bool = True

    def __post_init__(self):
        check_choice('cache', self.layout, LAYOUTS)
        check_choice('cache_dtype', self.dtype, ['auto', *FULL, *BITS])
        check_choice('decode_kernel', self.kernel, KERNELS)
        if self.layout == 'paged':
            check_choice('page_size', self.page_size, PAGE_SIZES)
        if self.window < 0 or self.pages < 0:
            raise UserError(
                f'a cache needs room: window={self.window} and pages={self.pages} '
                'must be at least 0'
            )


class Cache(Context):
    """
    Room for `rows` sequences of `size` tokens. `layer_dims` holds for each layer name -> width,
    `full` is the full precision of k_pe and of the window, `heads` the key/value heads of an
    attention without a latent; more options are those of CacheOptions. UserError for options that
    are not known, and for a kernel that cannot read this cache.
    """

    def __init__(
        self, layer_dims, rows: int, size: int, full=torch.float32, device='cpu', heads=1, **options
    ):
        self.options = options = CacheOptions(**options)
        if rows < 1 or size < 1:
            raise UserError(f'a cache needs room: rows={rows} and size={size} must be at least 1')
        self.rows, self.size, self.full = rows, size, full
        self.device = torch.device(device)
        self.layout, self.fuse = options.layout, options.fuse
        self.window = min(options.window, size)
        self.dtype = options.dtype
        if options.dtype == 'auto':
            self.dtype = str(full).removeprefix('torch.')
        self.page_size = options.page_size if options.layout == 'paged' else size
        self.pages = self.block_table = None
        self.slots = rows * size
        if options.layout == 'paged':
            self.lay_out_pages(options.pages)
        self.used = [0] * rows  # tokens of each row as planned; `lengths` follows in `end`
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.counts = torch.ones(rows, dtype=torch.long, device=self.device)
        self.counts_on_host = [1] * rows
        self.steps = torch.arange(size, device=self.device)
        self.row_numbers = torch.arange(rows, device=self.device)
        self.steps_of_page = torch.arange(self.page_size, device=self.device)
        self.layers = [self.make_layer(dims) for dims in layer_dims]
        self.holds_latents = 'c_kv' in self.layers[0].stores  # MLA: keys are [c_kv | k_pe]
        self.next_plan: Plan | None = None
        self.current: Pass | None = None
        self.decode_step = None  # the last one-token step of nanomla/inference/generate.py
        self.backend_state = {}  # what a decode backend keeps from step to step
        self.kernel = self.pick_kernel(options.kernel, heads)
        self.static = options.static and self.kernel != 'flashinfer'
        if self.kernel in ('flex', 'flashmla') and self.holds_latents:
            for layer in self.layers:
                layer.join()

    @classmethod
    def of(cls, model: GPT, rows: int, size: int, **options) -> 'Cache':
        """Make a cache for `model`, on its device and with its dtype as full precision."""
        return cls(
            [block.attn.cache_dims() for block in model.transformer.h],
            rows,
            size,
            full=model.stream,
            device=model.lm_head.weight.device,
            heads=model.config.n_kv_head,
            **options,
        )

    def lay_out_pages(self, pages: int) -> None:
        pages_a_row = math.ceil(self.size / self.page_size)
        self.pages = PagePool(pages or self.rows * pages_a_row)
        self.slots = len(self.pages.holders) * self.page_size
        self.pages_of_row = [[] for _ in range(self.rows)]
        self.block_table_on_host = torch.zeros(self.rows, pages_a_row, dtype=torch.int32)
        self.block_table = self.block_table_on_host.to(self.device, copy=True)

    def make_layer(self, dims: dict[str, int]) -> CacheLayer:
        stores = {}
        for name, width in dims.items():
            bits = 0 if name in NEVER_QUANTISED else BITS.get(self.dtype, 0)
            stores[name] = Store(self, width, bits, FULL.get(self.dtype, self.full))
        return CacheLayer(self, stores)

    def pick_kernel(self, kernel: str, heads: int) -> str:
        if kernel == 'torch':
            return kernel
        if kernel in ('auto', 'triton'):
            reason = self.reason_for_torch(heads)
        else:
            reason = backends.reason_not_to_run(kernel, self)
        if kernel == 'auto':
            return 'torch' if reason else 'triton'
        if reason:
            raise UserError(
                f'--decode_kernel={kernel} cannot run: {reason}. Use --decode_kernel=auto'
            )
        return kernel

    def reason_for_torch(self, heads: int) -> str:
        """Say why attention_kernel.py cannot serve this cache; '' if it can."""
        for layer in self.layers:
            names, first = list(layer.stores), next(iter(layer.stores.values()))
            if names not in (['k', 'v'], ['c_kv', 'k_pe']):
                return f'it reads k and v, or c_kv and k_pe, not {" and ".join(names)}'
            width = first.width
            if not self.holds_latents:
                if width % heads:
                    return f'{width} channels are not {heads} heads'
                width //= heads
            dtype = self.full if first.bits else first.data[0].dtype
            reason = attention_kernel.reason_not_to_run(
                self.device, dtype, width, first.bits, first.group, self.holds_latents
            )
            if reason:
                return reason
        return ''

    def layer(self, n: int) -> CacheLayer:
        return self.layers[n]

    @property
    def stores(self) -> list[Store]:
        return [store for layer in self.layers for store in layer.stores.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers that hold tokens: the formula above."""
        return sum(buffer.nbytes for store in self.stores for buffer in store.buffers)

    @property
    def window_bytes(self) -> int:
        """Those of them that hold the windows of full precision of a quantised cache."""
        return sum(store.recent.nbytes for store in self.stores if store.recent is not None)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all layers for one token, when every slot is in use."""
        return self.nbytes / self.slots

    # ---------------------------------------------------------------------------------------------
    # the host's half

    def plan(self, counts: int | list[int], rows: list[int] | None = None) -> None:
        """
        Prepare the next forward pass: `counts` new tokens (one number, or one for each) for the
        sequences in `rows` (None: all). What is beyond a sequence's count in that pass is padding.

        UserError when a sequence would outgrow the cache, OutOfPages; then nothing has changed.
        """
        chosen = list(range(self.rows)) if rows is None else list(rows)
        counts = [counts] * len(chosen) if isinstance(counts, int) else list(counts)
        assert len(counts) == len(chosen) == len(set(chosen))
        assert max(counts) > 0 and min(counts) >= 0
        for row, count in zip(chosen, counts):
            needed = self.used[row] + count
            if needed > self.size:
                raise UserError(
                    f'the cache is too small: it holds {self.size} tokens of a sequence '
                    f'and {needed} are needed'
                )
        if self.pages:
            self.take_pages(chosen, counts)
        fresh = not any(self.used[row] for row in chosen)
        for row, count in zip(chosen, counts):
            self.used[row] += count
        reach = self.size
        if not self.static:
            longest = max(self.used[row] for row in chosen)
            reach = min(self.size, math.ceil(longest / READ_MULTIPLE) * READ_MULTIPLE)
        self.next_plan = Plan(
            rows=None if rows is None else self.to_device(chosen),
            counts=self.device_counts(counts, all_rows=rows is None),
            ragged=self.static or len(set(counts)) > 1,
            reach=reach,
            T=max(counts),
            fresh=fresh,
        )

    def to_device(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers).to(self.device, non_blocking=True)

    def device_counts(self, counts: list[int], all_rows: bool) -> torch.Tensor | None:
        """Bring counts to the device; for all rows into a buffer that stays where it is (None)."""
        if not all_rows:
            return self.to_device(counts)
        if counts != self.counts_on_host:
            self.counts.copy_(torch.tensor(counts), non_blocking=True)
            self.counts_on_host = counts
        return None

    def take_pages(self, rows: list[int], counts: list[int]) -> None:
        """Take pages for new tokens, and an own copy of each page that is shared and is written."""
        holders = {}  # of a page, after the copies noted so far
        copies, wanted = [], []
        for row, count in zip(rows, counts):
            pages = self.pages_of_row[row]
            last = self.used[row] // self.page_size  # the page that the next token goes to
            if count and last < len(pages):
                page = pages[last]
                if holders.setdefault(page, self.pages.holders[page]) > 1:
                    holders[page] -= 1
                    copies.append((row, last, page))
            needed = math.ceil((self.used[row] + count) / self.page_size)
            wanted.append(max(0, needed - len(pages)))
        if not copies and not any(wanted):
            return
        taken = self.pages.allocate(len(copies) + sum(wanted))
        if copies:
            self.copy_pages(copies, [taken.pop() for _ in copies])
        for row, n in zip(rows, wanted):
            for _ in range(n):
                page = taken.pop()
                self.block_table_on_host[row, len(self.pages_of_row[row])] = page
                self.pages_of_row[row].append(page)
        self.block_table.copy_(self.block_table_on_host, non_blocking=True)

    def copy_pages(self, copies: list[tuple[int, int, int]], new: list[int]) -> None:
        """Copy pages, (row, number in the row, page) each, to `new` ones and release the old."""
        old = [page for _, _, page in copies]
        for (row, number, _), own in zip(copies, new):
            self.pages_of_row[row][number] = own
            self.block_table_on_host[row, number] = own
        self.pages.release(old)
        for store in self.stores:
            for buffer in store.data:
                by_page = buffer.unflatten(0, (-1, self.page_size))
                by_page[new] = by_page[old]

    def free(self, row: int) -> None:
        """End the sequence in `row`: its pages go back, its row is empty."""
        if self.pages:
            self.pages.release(self.pages_of_row[row])
            self.pages_of_row[row] = []
        self.used[row] = 0
        self.lengths[row] = 0

    def fork(self, source: int, target: int) -> None:
        """
        Make the sequence in row `target` a copy of that in `source`; paged, it shares its pages
        until one of the two writes.
        """
        assert source != target
        self.free(target)
        self.used[target] = self.used[source]
        self.lengths[target] = self.lengths[source]
        if self.pages:
            self.pages_of_row[target] = list(self.pages_of_row[source])
            self.pages.share(self.pages_of_row[target])
            self.block_table_on_host[target] = self.block_table_on_host[source]
            self.block_table.copy_(self.block_table_on_host, non_blocking=True)
        for store in self.stores:
            buffers = [] if self.pages else list(store.data)
            if store.recent is not None:
                buffers.append(store.recent)
            for buffer in buffers:
                by_row = buffer.unflatten(0, (self.rows, -1))
                by_row[target] = by_row[source]

    # ---------------------------------------------------------------------------------------------
    # the device's half

    def begin(self, T: int) -> torch.Tensor:
        """
        Start a forward pass of T tokens a sequence and return their positions (B, T), 0 for
        padding. A pass that nobody planned is one of T tokens for all rows.
        """
        if self.next_plan is None:
            self.plan(T)
        plan, self.next_plan = self.next_plan, None
        assert T == plan.T, f'{plan.T} tokens were planned, not {T}'
        self.current = Pass(self, plan)
        return self.current.positions

    def end(self) -> None:
        """The pass is through all layers: its tokens are part of the sequences."""
        if self.current.rows is None:
            self.lengths += self.current.counts
        else:
            self.lengths.index_add_(0, self.current.rows, self.current.counts)
