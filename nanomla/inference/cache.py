"""
What decoding remembers. A cache is a layout times a storage times what an attention leaves behind:

    layout    dense: `size` places for each of `slots` sequences; or paged: pages of `page_size` places that
              sequences take as they grow, share with their copies and give back
    storage   float32, bfloat16, float16: every token as it is; int8, int4: all of it in groups of channels,
              and the last `window` tokens of a sequence at full precision as well (KIVI, Liu et al. 2024)
    tokens    whatever `attention.cache_dims()` names: k and v (MHA, GQA, MQA), c_kv and k_pe (MLA)

Bytes, with `places` = slots · size, or pages · page_size, and b bytes an element of the full precision:

    nbytes = sum over layers and names of  places · per_place + kept,
    per_place = width · b                                        kept = 0
    int8, int4: ceil(width · bits / 8) + 4 · width / group       kept = slots · window · width · b

The 4 bytes of a group are its scale and its zero in fp16; group is the largest divisor of width up to 64.
The window is no longer than `size`. k_pe is never quantised: a rotated key of all heads is small, and it is what position hangs on. Bookkeeping
(16 bytes a slot, 4 a page) is not counted.

One step has two halves. `plan` is the host's: it knows every length, takes pages, copies a shared page
before it is written, and raises what can go wrong before anything has changed. What the model then runs,
`begin`, `Layer.extend` and `end`, is the device's: static buffers and lengths that live there, no page
taken, nothing read back. With static=True shapes do not depend on lengths either, so that such a step can
be captured in a CUDA graph and replayed after each `plan`.

Legend: B sequences of a step, T new tokens of each, N places a step reads, W window, C width of a name.
"""

from types import SimpleNamespace

import torch

from nanomla.core.configurator import UserError
from nanomla.inference.quantize import BITS, FULL, NEVER_QUANTISED, dequantise, group_of, quantise

LAYOUTS, PAGE_SIZES = ('dense', 'paged'), (16, 64, 128)
KERNELS = ('auto', 'triton', 'torch', 'flex', 'flashinfer', 'flashmla')


class OutOfPages(UserError):
    """`needed` pages were asked for and only `free` are left; nothing has changed."""

    def __init__(self, needed, free):
        super().__init__(
            f'out of pages: {needed} needed, {free} free: end a sequence, or make the cache with more pages'
        )
        self.needed, self.free = needed, free


# ---------------------------------------------------------------------------------------------------
# storage


class Store:
    """One name of one layer: `places` (places, ...) in one buffer, or in two (codes, scales) and `recent` (slots · W, C)."""

    def __init__(self, cache, width, bits, dtype):
        self.cache, self.width, self.bits = cache, width, bits

        def buffer(rows, columns, dtype):
            return torch.zeros(rows, columns, dtype=dtype, device=cache.device)

        self.recent = None
        if bits:
            self.places = [
                buffer(cache.places, -(-width * bits // 8), torch.uint8),
                buffer(cache.places, 2 * width // group_of(width), torch.float16),
            ]
            if cache.window:
                self.recent = buffer(cache.slots * cache.window, width, cache.full)
        else:
            self.places = [buffer(cache.places, width, dtype)]

    @property
    def buffers(self):
        return self.places + ([] if self.recent is None else [self.recent])

    def keep(self, x):
        """Writes the new tokens x (B, T, C) to their places."""
        now, flat = self.cache.target, x.flatten(0, 1)
        kept = flat if now.source is None else flat[now.source]
        for buffer, part in zip(self.places, quantise(kept, self.bits) if self.bits else [kept]):
            buffer[now.to] = part.to(buffer.dtype)
        if self.recent is not None:
            self.recent[now.to_recent] = flat[now.source_of_recent].to(self.recent.dtype)

    def extend(self, x):
        """Keeps the new tokens x (B, T, C) and returns what their queries see (B, N, C), zeros where there is no token."""
        now, before = self.cache.view, self.recent_rows() if self.recent is not None else None
        self.keep(x)
        parts = [self.cache.read(buffer) for buffer in self.places]
        if not self.bits:
            seen = parts[0].to(x.dtype)
        else:
            seen = dequantise(*parts, self.width, self.bits).to(x.dtype)
            recent = (
                x if before is None else torch.cat([before, x.to(before.dtype)], dim=1).to(x.dtype)
            )
            recent = recent.gather(1, now.place_in_recent[..., None].expand(-1, -1, self.width))
            seen = torch.where(now.is_recent[..., None], recent, seen)
        return torch.where(now.held[..., None], seen, 0)

    def recent_rows(self):
        """A copy of this pass's sequences' rings, (B, W, C)."""
        recent, rows = self.recent.unflatten(0, (self.cache.slots, -1)), self.cache.now.rows
        return recent.clone() if rows is None else recent[rows]

    @property
    def held(self):
        """Codes, scales and window, as a kernel reads them; None for what there is not."""
        return *self.places, *[None] * (2 - len(self.places)), self.recent


class Layer:
    """The cache of one layer, as its attention sees it."""

    def __init__(self, cache, stores):
        self.cache, self.stores, self.joint = cache, stores, None

    def join(self):
        """MLA's two stores become columns of one buffer `joint` (places, R + P), which some kernels want."""
        c_kv, k_pe = self.stores.values()
        self.joint = torch.cat([c_kv.places[0], k_pe.places[0]], dim=-1)
        c_kv.places, k_pe.places = (
            [part] for part in self.joint.split([c_kv.width, k_pe.width], dim=-1)
        )

    @property
    def fresh(self):
        """Whether the sequences of this pass held nothing before it: then they see its own tokens and no others."""
        return self.cache.now.fresh

    def keep(self, **new):
        """Takes what new tokens leave behind, name=(B, T, C)."""
        assert new.keys() == self.stores.keys(), (
            f'this cache holds {list(self.stores)}, not {list(new)}'
        )
        cache, now = self.cache, self.cache.now
        if cache.kernel == 'triton' and self.serves(now.position.size(1)):
            from nanomla.inference.attention_kernel import keep

            keep(
                [
                    (x, store.held, store.bits, group_of(store.width))
                    for store, x in zip(self.stores.values(), new.values())
                    if store.width
                ],
                now.lengths,
                now.counts,
                cache.size,
                cache.table,
                cache.page_size,
                now.rows,
                cache.window,
            )
        else:
            for name, x in new.items():
                self.stores[name].keep(x)

    def settle(self, q, rope, turns, norm=None, **new):
        """
        `keep` for one token of each sequence, name=(B, C), which RoPE and norm do not have behind them yet, and its query (B, C); as
        decode_kernels.keep has it. Returns the query.
        """
        from nanomla.inference.attention_kernel import keep

        cache, now = self.cache, self.cache.now
        names = [name for name in new if self.stores[name].width]
        new = [
            (new[name], (store := self.stores[name]).held, store.bits, group_of(store.width))
            for name in names
        ]
        return keep(
            new,
            now.lengths,
            now.counts,
            cache.size,
            cache.table,
            cache.page_size,
            now.rows,
            cache.window,
            q if q.size(-1) else None,
            rope,
            turns,
            norm if hasattr(norm, 'weight') else None,
        )

    def extend(self, **new):
        """
        `keep`, and returns all that is held, each (B, N, C) in the order of the names, and mask (B, 1, T, N):
        which place each query may see.

        A quantised cache shows the tokens of this very call in full precision, and so many before them as make W.
        """
        assert new.keys() == self.stores.keys(), (
            f'this cache holds {list(self.stores)}, not {list(new)}'
        )
        return [self.stores[name].extend(x) for name, x in new.items()], self.cache.view.mask

    def serves(self, T):
        """Whether `attend` can take T new tokens of a sequence; where not, there is `extend`."""
        return T == 1 and (
            self.cache.kernel == 'triton'
            or self.cache.kernel != 'torch'
            and self.cache.now.rows is None
        )

    def attend(self, q, scale, q_pe=None):
        """
        softmax(scale q kᵀ) v over all that is held, the kept tokens too: q (B, H, 1, C) -> (B, H, 1, C). With q_pe (B, H, 1, P)
        the stores are MLA's: keys are [c_kv | k_pe], values c_kv. A kernel reads the places as they are (decode_kernels.py, decode_libraries.py).
        """
        if self.cache.kernel != 'triton':
            from nanomla.inference.backends import attend

            return attend(self.cache.kernel, self, q, scale, q_pe)
        from nanomla.inference.attention_kernel import decode

        cache, stores = self.cache, list(self.stores.values())
        latent = 'c_kv' in self.stores
        first = stores[0]
        y = decode(
            q[:, :, 0].contiguous(),
            first.held,
            None if latent else stores[1].held,
            cache.now.lengths,
            scale,
            cache.size,
            None if q_pe is None else q_pe[:, :, 0].contiguous(),
            stores[1].places[0] if q_pe is not None else None,
            cache.table,
            cache.page_size,
            cache.now.rows,
            first.bits,
            group_of(first.width),
            cache.window,
        )
        return y[:, :, None]


# ---------------------------------------------------------------------------------------------------
# layout


class Pages:
    """Which pages are free, and how many sequences hold each of the others."""

    def __init__(self, count):
        self.free, self.holders = list(range(count))[::-1], [0] * count

    def take(self, n):
        """n free pages, all or none."""
        if n > len(self.free):
            raise OutOfPages(n, len(self.free))
        taken = [self.free.pop() for _ in range(n)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages):
        for page in pages:
            self.holders[page] += 1

    def give_back(self, pages):
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)


class Cache:
    """
    dims: one dict name -> width for each layer; slots: sequences at a time; size: tokens of each.

    dtype 'auto' is `full`, the full precision of k_pe and of the window. pages=0: enough for all slots. static: shapes
    for a CUDA graph. kernel: who attends for a single new token: triton (decode_kernels.py), torch, or one of decode_libraries.py;
    auto is triton where it can run, else torch. heads: key/value heads, where there is no latent. fuse: with triton, blocks by step_kernels.py.
    UserError for a layout, dtype, kernel, page size or width of window that is not known, and a kernel that cannot read this cache.
    """

    def __init__(
        self,
        dims,
        slots,
        size,
        layout='dense',
        dtype='auto',
        page_size=64,
        pages=0,
        window=128,
        full=torch.float32,
        device='cpu',
        static=False,
        kernel='auto',
        heads=1,
        fuse=True,
    ):
        known = ['auto', *FULL, *BITS]
        if layout not in LAYOUTS:
            raise UserError(f"cache='{layout}' is not known: use {' or '.join(LAYOUTS)}")
        if dtype not in known:
            raise UserError(f"cache_dtype='{dtype}' is not known: use {', '.join(known)}")
        if layout == 'paged' and page_size not in PAGE_SIZES:
            raise UserError(
                f'page_size={page_size} is not supported: use {", ".join(map(str, PAGE_SIZES))}'
            )
        if slots < 1 or size < 1 or window < 0 or pages < 0:
            raise UserError(
                f'a cache needs room: slots={slots} and size={size} must be at least 1, window={window} and pages={pages} at least 0'
            )
        self.slots, self.size, self.layout, self.window = slots, size, layout, min(window, size)
        self.full, self.device, self.fuse = full, torch.device(device), fuse
        self.dtype = next(name for name in FULL if FULL[name] == full) if dtype == 'auto' else dtype
        self.page_size = page_size if layout == 'paged' else size
        self.pages = self.table = None
        self.places = slots * size
        if layout == 'paged':
            self.pages = Pages(pages or slots * -(-size // page_size))
            self.places = len(self.pages.holders) * page_size
            self.held_by = [[] for _ in range(slots)]  # pages of each sequence, in its order
            self.table_here = torch.zeros(slots, -(-size // page_size), dtype=torch.int32)
            self.table = self.table_here.to(self.device, copy=True)
        self.used = [0] * slots  # the host's copy of `lengths`
        self.lengths = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.counts = torch.ones(slots, dtype=torch.long, device=self.device)
        self.steps = torch.arange(size, device=self.device)
        self.steps_of_slots = torch.arange(slots, device=self.device)
        self.steps_of_page = torch.arange(self.page_size, device=self.device)
        self.counts_here = [1] * slots
        self.layers = []
        for widths in dims:
            bits = {
                name: 0 if name in NEVER_QUANTISED else BITS.get(self.dtype, 0) for name in widths
            }
            self.layers.append(
                Layer(
                    self,
                    {
                        name: Store(self, width, bits[name], FULL.get(self.dtype, full))
                        for name, width in widths.items()
                    },
                )
            )
        self.planned = self.now = self.aimed = self.looked = None
        self.kernel = self.pick_kernel(kernel, heads)
        self.static = static and self.kernel != 'flashinfer'
        if self.kernel in ('flex', 'flashmla'):
            for layer in self.layers:
                if 'c_kv' in layer.stores:
                    layer.join()

    def pick_kernel(self, kernel, heads):
        if kernel not in KERNELS:
            raise UserError(f"decode_kernel='{kernel}' is not known: use {', '.join(KERNELS)}")
        if kernel in ('auto', 'triton'):
            reason = self.reason_for_torch(heads)
        else:
            from nanomla.inference.backends import reason_not_to_run

            reason = '' if kernel == 'torch' else reason_not_to_run(kernel, self)
        if reason and kernel != 'auto':
            raise UserError(
                f'--decode_kernel={kernel} cannot run: {reason}. Use --decode_kernel=auto'
            )
        return ('torch' if reason else 'triton') if kernel == 'auto' else kernel

    def reason_for_torch(self, heads):
        """Why decode_kernels.py cannot serve this cache, '' if it can. heads: key/value heads of an attention that has no latent."""
        from nanomla.inference.attention_kernel import reason_not_to_run

        for layer in self.layers:
            names, first = list(layer.stores), next(iter(layer.stores.values()))
            if 'c_kv' not in names and first.width % heads:
                return f'{first.width} channels are not {heads} heads'
            width = first.width if 'c_kv' in names else first.width // heads
            if reason := reason_not_to_run(
                self.device,
                first.places[0].dtype if not first.bits else self.full,
                width,
                first.bits,
                group_of(first.width),
                'c_kv' in names,
            ):
                return reason
        return ''

    @classmethod
    def of(cls, model, slots, size, **how):
        """A cache for `model`, on its device and with its dtype as full precision."""
        dims = [block.attn.cache_dims() for block in model.transformer.h]
        return cls(
            dims,
            slots,
            size,
            full=model.stream,
            device=model.lm_head.weight.device,
            heads=model.config.n_kv_head,
            **how,
        )

    @property
    def stores(self):
        return [store for layer in self.layers for store in layer.stores.values()]

    @property
    def nbytes(self):
        """Bytes of all buffers that hold tokens: the formula above."""
        return sum(buffer.nbytes for store in self.stores for buffer in store.buffers)

    @property
    def window_bytes(self):
        """Those of them that hold the windows of full precision of a quantised cache."""
        return sum(store.recent.nbytes for store in self.stores if store.recent is not None)

    @property
    def bytes_per_token(self):
        """Bytes of all layers for one token, when every place is in use."""
        return self.nbytes / self.places

    # -----------------------------------------------------------------------------------------------
    # the host's half

    def plan(self, counts, rows=None):
        """
        The next forward pass brings `counts` new tokens (one number, or one for each) for the sequences in
        `rows` (all slots if None). What is behind a sequence's count in that pass is padding.

        UserError when a sequence would outgrow the cache, OutOfPages; then nothing has changed.
        """
        among = range(self.slots) if rows is None else list(rows)
        counts = [counts] * len(among) if isinstance(counts, int) else list(counts)
        assert len(counts) == len(among) == len(set(among)) and max(counts) > 0 and min(counts) >= 0
        for row, count in zip(among, counts):
            if self.used[row] + count > self.size:
                raise UserError(
                    f'the cache is too small: it holds {self.size} tokens of a sequence and {self.used[row] + count} are needed'
                )
        if self.pages:
            self._take_pages(among, counts)
        fresh = not any(self.used[row] for row in among)
        for row, count in zip(among, counts):
            self.used[row] += count
        ragged = len(set(counts)) > 1
        given = (
            torch.tensor(counts).to(self.device, non_blocking=True) if rows is not None else None
        )
        if rows is None and counts != self.counts_here:
            self.counts.copy_(torch.tensor(counts), non_blocking=True)
            self.counts_here = counts
        reach = (
            self.size
            if self.static
            else min(self.size, -(-max(self.used[row] for row in among) // 64) * 64)
        )
        where = None if rows is None else torch.tensor(among).to(self.device, non_blocking=True)
        self.planned = where, given, ragged or self.static, reach, max(counts), fresh

    def _take_pages(self, among, counts):
        """Pages for new tokens, and an own copy of each page that is shared and will be written."""
        holders, copies, wanted = (
            {},
            [],
            [],
        )  # holders: as they will be once the copies before have been made
        for row, count in zip(among, counts):
            pages = self.held_by[row]
            last = self.used[row] // self.page_size  # the page that the next token goes to
            if count and last < len(pages):
                page = pages[last]
                if holders.setdefault(page, self.pages.holders[page]) > 1:
                    holders[page] -= 1
                    copies.append((row, last, page))
            wanted.append(max(0, -(-(self.used[row] + count) // self.page_size) - len(pages)))
        if not copies and not any(wanted):
            return
        taken = self.pages.take(len(copies) + sum(wanted))
        if copies:
            old, new = [page for _, _, page in copies], [taken.pop() for _ in copies]
            for (row, last, page), own in zip(copies, new):
                self.held_by[row][last] = own
                self.table_here[row, last] = own
            self.pages.give_back(old)
            for store in self.stores:
                for buffer in store.places:
                    paged = buffer.unflatten(0, (-1, self.page_size))
                    paged[new] = paged[old]
        for row, n in zip(among, wanted):
            for _ in range(n):
                self.held_by[row].append(taken.pop())
                self.table_here[row, len(self.held_by[row]) - 1] = self.held_by[row][-1]
        self.table.copy_(self.table_here, non_blocking=True)

    def free(self, row):
        """The sequence in `row` ends: its pages go back, its place is empty."""
        if self.pages:
            self.pages.give_back(self.held_by[row])
            self.held_by[row] = []
        self.used[row] = 0
        self.lengths[row] = 0

    def fork(self, source, target):
        """The sequence in `target` becomes a copy of that in `source`: paged, it shares its pages until one of the two writes."""
        assert source != target
        self.free(target)
        self.used[target] = self.used[source]
        self.lengths[target] = self.lengths[source]
        if self.pages:
            self.held_by[target] = list(self.held_by[source])
            self.pages.share(self.held_by[target])
            self.table_here[target] = self.table_here[source]
            self.table.copy_(self.table_here, non_blocking=True)
        for store in self.stores:
            own = [] if store.recent is None else [store.recent]
            for buffer in own if self.pages else store.buffers:
                rows = buffer.unflatten(0, (self.slots, -1))
                rows[target] = rows[source]

    # -----------------------------------------------------------------------------------------------
    # the device's half

    def begin(self, T):
        """
        Starts a forward pass of T tokens a sequence; a pass that nobody planned is one of T tokens for all
        slots. Returns their positions (B, T), 0 for padding.
        """
        if self.planned is None:
            self.plan(T)
        (rows, counts, ragged, reach, most, fresh), self.planned = self.planned, None
        assert T == most, f'{most} tokens were planned, not {T}'
        now = self.now = (
            SimpleNamespace()
        )  # what this pass has in common in all layers: where its tokens go, what they see
        now.rows, now.reach, now.fresh = rows, reach, fresh
        now.counts = self.counts if rows is None else counts
        now.start = start = self.lengths if rows is None else self.lengths[rows]
        now.lengths = start + now.counts
        now.position = position = start[:, None] + self.steps[:T]
        now.ragged = ragged
        if ragged:
            now.real = self.steps[:T] < now.counts[:, None]
            now.position = position = torch.where(now.real, position, 0)
        self.aimed = self.looked = None
        return position

    @property
    def target(self):
        """Where the tokens of this pass go, worked out once for all layers."""
        if self.aimed is None:
            self.aimed = aim = SimpleNamespace(source=None)
            now, W, position = self.now, self.window, self.now.position
            row = (self.steps_of_slots if now.rows is None else now.rows)[:, None]
            aim.to = row * self.size + position
            if self.pages:
                aim.to = (
                    self.table[row, position // self.page_size].long() * self.page_size
                    + position % self.page_size
                )
            if now.ragged:
                aim.source, aim.to = self._instead_of(now.real, aim.to)
            aim.to = aim.to.flatten()
            if self.dtype in BITS and W:
                new = self.steps[: position.size(1)]
                staying = (new < now.counts[:, None]) & (new >= now.counts[:, None] - W)
                aim.source_of_recent, aim.to_recent = self._instead_of(
                    staying, row * W + position % W
                )
        return self.aimed

    @property
    def view(self):
        """What the queries of this pass see of all places, worked out once for all layers: only `Layer.extend` needs it."""
        if self.looked is None:
            self.looked = look = SimpleNamespace()
            now, W, T = self.now, self.window, self.now.position.size(1)
            place, start = self.steps[: now.reach], now.start[:, None]
            if self.pages:
                table = (self.table if now.rows is None else self.table[now.rows])[
                    :, : -(-now.reach // self.page_size)
                ].long() * self.page_size
                look.addresses = (table[..., None] + self.steps_of_page).flatten(1)[:, : now.reach]
            look.held = place < now.lengths[:, None]
            look.mask = (place <= now.position[..., None])[:, None]
            if self.dtype in BITS:
                look.is_recent = place >= torch.minimum(start, now.lengths[:, None] - W)
                look.place_in_recent = torch.where(
                    place < start, place % max(W, 1), W + place - start
                ).clamp(0, W + T - 1)
        return self.looked

    @staticmethod
    def _instead_of(kept, to):
        """
        kept, to (B, T) -> which token goes where (B T,), (B T,): those not kept do again what the first that
        is kept does, so that one write of a fixed size serves every mixture of lengths.
        """
        kept, to = kept.flatten(), to.flatten()
        own = torch.arange(len(kept), device=kept.device)
        source = torch.where(kept, own, kept.int().argmax())
        return source, to[source]

    def read(self, buffer):
        """The places of this pass's sequences in a buffer (places, C) -> (B, N, C); what is not held is arbitrary."""
        now = self.now
        if self.pages:
            return buffer[self.view.addresses]
        rows = buffer.unflatten(0, (self.slots, self.size))[:, : now.reach]
        return rows if now.rows is None else rows[now.rows]

    def end(self):
        """The pass is through all layers: its tokens are part of the sequences."""
        if self.now.rows is None:
            self.lengths += self.now.counts
        else:
            self.lengths.index_add_(0, self.now.rows, self.now.counts)
