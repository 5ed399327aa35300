"""
What decoding costs: tokens a second, microseconds a step, bytes a token and peak memory of models with and
without a cache (`cells`), and what a batch of mixed lengths leaves unused in its buffers (`fragmentation`). Every figure is a row of `Rows`; bench.py prints and draws them.

A cell is a model, a cache, its dtype, a batch and a context. Its sequences hold `context` tokens when its last
timed step is over: their prompts are as much shorter as tokens are decoded. Prefill is timed on all of context.
A cell that does not fit is a row with its reason.
"""

import math
import random
import statistics
import time
from pathlib import Path

import torch

from nanomla.checkpoints import gpt2, load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import timing
from nanomla.core.configurator import UserError
from nanomla.core.timing import attempt, free_memory, median_and_range, peaks, reset_peak_memory
from nanomla.inference.cache import LAYOUTS, PAGE_SIZES, Cache
from nanomla.inference.generate import generate
from nanomla.inference.quantize import BITS, FULL, NEVER_QUANTISED, group_of

PREFILL_TOKENS = 32768  # in one pass, where --prefill_chunk does not say it: the mask of a pass is T x N a sequence
UNCACHED_STEPS = 1  # between two looks at the clock: each is a whole forward pass
KEYS = (
    'what',
    'model',
    'shape',
    'cache',
    'cache_dtype',
    'page_size',
    'batch',
    'context',
    'prompt_tokens',
    'new_tokens',
    'against',
    'candidate',
    'device',
)


# ---------------------------------------------------------------------------------------------------
# what to measure


def numbers(config, name, default):
    """A setting like '1,64' as a sorted list of ints from 1 on; `default` where it is ''."""
    text = config[name] or default
    try:
        found = sorted({int(part) for part in text.split(',')})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(
            f'--{name}={text}: write whole numbers from 1 on with commas between them, like {default}'
        )
    return found


def choices(config, name, known):
    found = config[name].split(',')
    for word in found:
        if word not in known:
            raise UserError(
                f"--{name}={config[name]}: '{word}' is not known: use {', '.join(known)}"
            )
    return found


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
        raise UserError(
            f"--attention_shapes: '{shape}' is none: write heads:key/value heads:width like 12:4:64, or for MLA heads:latent+k_pe like 16:512+64"
        ) from None
    return found


class Plan:
    """What bench.py's settings ask for. UserError, before anything is built, for what cannot be."""

    def __init__(self, config, device):
        cpu = device.type == 'cpu'
        self.config, self.device, self.dtype = (
            config,
            device,
            machine.pick_dtype(config['dtype'], device),
        )
        self.models = (
            'mha' if config['peer'] and 'models' not in config.given else config['models']
        ).split(',')
        self.caches = choices(config, 'caches', ('none', *LAYOUTS))
        self.cache_dtypes = choices(config, 'cache_dtypes', ('auto', *FULL, *BITS))
        self.batches = numbers(config, 'batch_sizes', '1,4' if cpu else '1,64')
        self.contexts = numbers(
            config, 'contexts', '128,256,512' if cpu else '128,256,512,1024,2048,4096,8192'
        )
        self.warmup, self.steps, self.repeats = (
            config['warmup_steps'],
            config['timed_steps'],
            config['repeats'],
        )
        self.page_size = config['page_size']
        if self.page_size not in PAGE_SIZES:
            raise UserError(
                f'page_size={self.page_size} is not supported: use {", ".join(map(str, PAGE_SIZES))}'
            )
        for name, least in dict(
            new_tokens=1,
            prompt_tokens=1,
            peer_repeats=1,
            peer_new_tokens=0,
            warmup_steps=0,
            prefill_chunk=0,
        ).items():
            if config[name] < least:
                raise UserError(f'{name}={config[name]} must be at least {least}')
        least = 1 + max(self.decoded(name) for name in self.caches)
        if not config['peer'] and not config['attention_only'] and self.contexts[0] < least:
            raise UserError(
                f'--contexts={",".join(map(str, self.contexts))}: the cache is too small: a context holds a prompt, warmup_steps={self.warmup} and repeats={self.repeats} '
                f'times timed_steps={self.steps} tokens, so it is at least {least}: raise it, or lower one of these'
            )
        if config['peer'] and not {*self.caches} - {'none'}:
            raise UserError(
                '--peer times whole texts decoded with a cache: use --caches=dense or paged'
            )
        if config['peer'] and config['prompt_tokens'] + config['new_tokens'] > config['block_size']:
            raise UserError(
                f'prompt_tokens={config["prompt_tokens"]} and new_tokens={config["new_tokens"]} are beyond block_size={config["block_size"]}: ask for fewer'
            )
        self.block_size = max(self.contexts[-1], config['block_size'])
        for name in self.models:
            self.describe(name)
        self.shapes = {shape: read_shape(shape) for shape in config['attention_shapes'].split(',')}

    def decoded(self, cache):
        """Tokens that one cell decodes."""
        return (
            self.warmup + self.steps * self.repeats
            if cache != 'none'
            else 1 + UNCACHED_STEPS * self.repeats
        )

    def describe(self, name):
        """(kind, settings) of one of --models, or None for a checkpoint."""
        head, _, widths = name.partition(':')
        if head not in ('mha', 'gqa', 'mqa', 'mla'):
            if head in gpt2.HUB or Path(name).exists() or name.startswith('random:'):
                return None
            raise UserError(
                f"--models={self.config['models']}: '{name}' is not known: use mha, gqa (or gqa:4 for 4 key/value heads), mqa, mla (or mla:256+32 "
                'for a latent of 256 and a rotated key of 32), or a checkpoint file or folder'
            )
        H, changed = self.config['n_head'], dict(n_kv_head=0)
        try:
            if head == 'mla' and widths:
                R, P = map(int, widths.split('+'))
                changed |= dict(kv_lora_rank=R, qk_rope_head_dim=P)
            elif head == 'gqa':
                K = (
                    int(widths)
                    if widths
                    else min(
                        (k for k in range(2, H) if H % k == 0),
                        key=lambda k: abs(k - H / 3),
                        default=0,
                    )
                )
                if not 1 < K < H or H % K:
                    raise UserError(
                        f"--models={self.config['models']}: '{name}' with n_head={H}: GQA has fewer key/value heads than heads and more than one, and divides them"
                    )
                changed |= dict(n_kv_head=K)
            elif widths:
                raise ValueError
            elif head == 'mqa':
                changed |= dict(n_kv_head=1)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"--models={self.config['models']}: '{name}': write gqa:4 for 4 key/value heads, mla:256+32 for a latent of 256 and a rotated key of 32"
            ) from None
        return ('mla' if head == 'mla' else 'mha'), changed

    def build(self, name):
        """
        A model on the device, in its dtype and in eval mode: a checkpoint, or the shape of the settings with random
        weights. For cells it has RoPE unless the settings say otherwise, because contexts go beyond GPT-2's.
        """
        config, described = self.config, self.describe(name)
        if described is None:
            model = load.load_model(name, dropout=0.0).model
        else:
            kind, changed = described
            settings = dict(config) | changed | dict(dropout=0.0)
            if not config['peer']:
                settings['block_size'] = self.block_size
                if 'pos' not in config.given:
                    settings['pos'] = 'rope'
            own = checkpoint.MODELS[kind].Config.keys()
            given = {
                key: where for key, where in config.given.items() if key in own
            }  # MLA's widths are for the MLA models among them
            torch.manual_seed(0)
            model = checkpoint.new_model(kind, settings, given, config['vocabulary'])
        model.stream = self.dtype
        return model.to(self.device, self.dtype).eval()

    def cache(self, model, layout, dtype, slots, size):
        return Cache.of(
            model,
            slots,
            size,
            layout=layout,
            dtype=dtype,
            page_size=self.page_size,
            static=self.device.type == 'cuda',
            kernel=self.config['decode_kernel'],
        )


def shape_of(model):
    """'12:12:64' heads : key/value heads : width of a head; MLA '12:512+32' heads : latent + rotated key."""
    c = model.config
    return (
        f'{c.n_head}:{c.kv_lora_rank}+{c.qk_rope_head_dim}'
        if checkpoint.kind_of(model) == 'mla'
        else f'{c.n_head}:{c.n_kv_head}:{c.head_dim}'
    )


def formula_bytes(dims, slots, size, layout, dtype, page_size, full, window=128):
    """
    Bytes of a cache by the README's formula, from numbers alone. dims: a dict name -> width for each layer;
    full: bytes of an element of the full precision; dtype: a float's name, int8 or int4.
    """
    places, window = (
        slots * size if layout == 'dense' else slots * math.ceil(size / page_size) * page_size,
        min(window, size),
    )
    total = 0
    for widths in dims:
        for name, width in widths.items():
            if dtype in BITS and name not in NEVER_QUANTISED:
                total += (
                    places * (math.ceil(width * BITS[dtype] / 8) + 4 * width // group_of(width))
                    + slots * window * width * full
                )
            else:
                total += places * width * (FULL[dtype].itemsize if dtype in FULL else full)
    return total


# ---------------------------------------------------------------------------------------------------
# cells


def timed_tokens(tokens, device, warmup, steps, repeats):
    """Seconds of one of the generator's tokens, `repeats` times over `steps` of them, after the first one (a prefill) and a warm-up."""
    for _ in range(1 + warmup):
        next(tokens)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    return [
        timing.seconds(device, lambda: [next(tokens) for _ in range(steps)]) / steps
        for _ in range(repeats)
    ]


@torch.no_grad()
def cell(plan, model, cache, dtype, batch, context):
    """The figures of one cell, as a dict of row entries. Raises what does not fit."""
    device, n = plan.device, plan.decoded(cache)
    if context > model.config.block_size:
        raise UserError(f'the context is beyond block_size={model.config.block_size}')
    before = reset_peak_memory(device)
    held, row = None, {}
    if cache != 'none':
        held = plan.cache(model, cache, dtype, batch, context)
        formula = formula_bytes(
            [block.attn.cache_dims() for block in model.transformer.h],
            batch,
            context,
            cache,
            held.dtype,
            plan.page_size,
            plan.dtype.itemsize,
        )
        row |= dict(
            decode_kernel_ran=held.kernel,
            cache_bytes=held.nbytes,
            bytes_per_token=held.nbytes / held.slots,
            bytes_per_token_formula=formula / held.slots,
        )
    idx = torch.randint(model.config.vocab_size, (batch, context), device=device)
    if held is None:
        chunk = context

        def prefill():
            return model.lm_head(model.hidden(idx)[:, -1])

        tokens, counts = (
            generate(model, idx[:, : context - n], n + 1, temperature=0),
            (0, UNCACHED_STEPS, plan.repeats),
        )
    else:
        chunk, texts = (
            min(context, plan.config['prefill_chunk'] or max(64, PREFILL_TOKENS // batch)),
            idx.tolist(),
        )

        def prefill():
            return model.lm_head(prefill(model, texts, held, chunk=chunk))

        tokens = generate(
            model,
            [text[: context - n] for text in texts],
            n + 1,
            temperature=0,
            cache=held,
            prefill_chunk=chunk,
        )
        counts = (plan.warmup, plan.steps, plan.repeats)

    times = []
    for i in range(1 + plan.repeats):
        for slot in range(batch if held else 0):
            held.free(slot)
        times.append(timing.seconds(device, prefill))
    times = times[1:]
    row |= dict(
        prefill_tok_per_s=batch * context / statistics.median(times), prefill_chunk=chunk
    ) | median_and_range('prefill_ms', times, 1e3)
    for slot in range(batch if held else 0):
        held.free(slot)
    row |= peaks(device)
    steps = timed_tokens(tokens, device, *counts)
    step_peak = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else None
    row |= dict(
        decode_tok_per_s=batch / statistics.median(steps),
        timed_steps=counts[1],
        repeats=plan.repeats,
    ) | median_and_range('step_us', steps, 1e6)
    whole = {
        key: max(value, row[key]) if value else value for key, value in peaks(device).items()
    }  # prefill and steps
    return row | whole | dict(step_peak_allocated=step_peak, allocated_before=before)


def cells(plan, rows, tell=print):
    """Measures every cell that `rows` does not hold yet; one line of `tell` for each."""
    kinds = [
        (cache, dtype)
        for cache in plan.caches
        for dtype in (plan.cache_dtypes if cache != 'none' else ['none'])
    ]
    total, i = len(plan.models) * len(kinds) * len(plan.batches) * len(plan.contexts), 0
    for name in plan.models:
        model, weights = None, 0
        for cache, dtype in kinds:
            for batch in plan.batches:
                for context in plan.contexts:
                    i += 1
                    key = dict(
                        what='cell',
                        model=name,
                        cache=cache,
                        cache_dtype=dtype,
                        page_size=plan.page_size if cache == 'paged' else None,
                        batch=batch,
                        context=context,
                    )
                    key |= (
                        dict(decode_kernel=plan.config['decode_kernel']) if cache != 'none' else {}
                    )
                    if row := rows.find(**key, device=rows.facts['device']):
                        tell(f'[{i}/{total}] {line_of(row)}  (kept)')
                        continue
                    if model is None:
                        model = plan.build(name)
                        weights = sum(p.nbytes for p in model.parameters())
                    row = key | dict(
                        shape=shape_of(model), parameters=model.num_params(), weight_bytes=weights
                    )
                    tell(
                        f'[{i}/{total}] '
                        + line_of(
                            rows.add(
                                **row
                                | attempt(
                                    lambda: cell(plan, model, cache, dtype, batch, context),
                                    plan.device,
                                )
                            )
                        )
                    )
        del model
        free_memory(plan.device)


def line_of(row):
    where = f'{row["model"]:<5} {row["cache"] + (" " + row["cache_dtype"] if row["cache"] != "none" else ""):<14} {row["batch"]:>3} x {row["context"]:<6}'
    if row['reason']:
        return f'{where} {row["reason"]}'
    return (
        f'{where} {row["step_us"]:>10,.0f} µs a step ({row["step_us_least"]:,.0f} to {row["step_us_most"]:,.0f})  decode {row["decode_tok_per_s"]:>9,.0f} tok/s  '
        f'prefill {row["prefill_tok_per_s"]:>11,.0f} tok/s  peak {row["peak_allocated"] / 2**20:>8,.0f} MiB'
        + (f'  {row["bytes_per_token"]:,.0f} B a token' if 'bytes_per_token' in row else '')
    )


# ---------------------------------------------------------------------------------------------------
# what the cells say


def crossing(plain, cached):
    """
    The length from which the cache pays: plain and cached are {length: time}. Returns (word, length): 'from' where the
    cached line goes below the plain one for good, by straight lines between the lengths on log-log paper; 'always' and
    the least length, 'never' and the greatest. None without a common length.
    """
    lengths = sorted(plain.keys() & cached.keys())
    if not lengths:
        return None
    gain = [math.log(plain[length] / cached[length]) for length in lengths]
    if gain[-1] <= 0:
        return 'never', lengths[-1]
    last = next((i for i in range(len(gain) - 1, -1, -1) if gain[i] <= 0), None)
    if last is None:
        return 'always', lengths[0]
    share = gain[last] / (gain[last] - gain[last + 1])
    return 'from', lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def answers(rows):
    """What the cells say about caches and pages, as lines of text."""
    good = [row for row in rows if row['what'] == 'cell' and not row['reason']]
    lines = []
    for name, batch in dict.fromkeys((row['model'], row['batch']) for row in good):
        times = {}
        for row in good:
            if (row['model'], row['batch']) == (name, batch):
                times.setdefault((row['cache'], row['cache_dtype']), {})[row['context']] = row[
                    'step_us'
                ]
        for (cache, dtype), points in times.items():
            found = crossing(times.get(('none', 'none'), {}), points) if cache != 'none' else None
            if found:
                said = dict(
                    zip(
                        ('from', 'always', 'never'),
                        (
                            'pays from {:,.0f} tokens on',
                            'pays at every length from {:,} tokens on',
                            'does not pay up to {:,} tokens',
                        ),
                    )
                )
                lines.append(
                    f'{name}, batch {batch}: a {cache} {dtype} cache '
                    + said[found[0]].format(found[1])
                )
            dense = times.get(('dense', dtype), {})
            if cache == 'paged' and (common := sorted(points.keys() & dense.keys())):
                lines.append(
                    f'{name}, batch {batch}: a step with {dtype} pages takes '
                    + ', '.join(
                        f'{points[length] / dense[length]:.2f} x dense at {length:,}'
                        for length in common
                    )
                )
    return lines


def mixed_lengths(batch, longest, seed=0):
    """`batch` lengths from 1 to `longest`, even on a logarithmic scale: many short texts, a few long ones."""
    draw = random.Random(seed)
    return [
        min(longest, int(math.exp(draw.uniform(0, math.log(longest + 1))))) for _ in range(batch)
    ]


def fragmentation(dims, lengths, size, full, device):
    """
    What a batch of mixed lengths leaves unused: a row for a dense cache and for each page size, from real caches that
    hold it, with exactly the pages that it takes. Bytes used are those of its tokens; lost_percent of what is
    allocated is not; saved_percent is against the dense cache.
    """
    found, dense = [], None
    for page_size in (0, *PAGE_SIZES):
        free_memory(device)
        how = (
            dict(
                layout='paged',
                page_size=page_size,
                pages=sum(-(-length // page_size) for length in lengths),
            )
            if page_size
            else dict(layout='dense')
        )
        cache = Cache(dims, len(lengths), size, full=full, device=device, **how)
        cache.plan(lengths)  # takes the pages
        assert not page_size or not cache.pages.free
        allocated, used = cache.nbytes, round(sum(cache.used) * cache.bytes_per_token)
        dense = dense or allocated
        found.append(
            dict(
                cache=cache.layout,
                page_size=page_size or None,
                allocated_bytes=allocated,
                used_bytes=used,
                lost_percent=100 * (1 - used / allocated),
                saved_percent=100 * (1 - allocated / dense),
            )
        )
    return found


def fragmentations(plan, rows, tell=print):
    """A table for the first of the models, the largest batch and the longest context."""
    name, batch, size = plan.models[0], plan.batches[-1], plan.contexts[-1]
    lengths, model = mixed_lengths(batch, size), plan.build(name)
    dims = [block.attn.cache_dims() for block in model.transformer.h]
    key = dict(what='fragmentation', model=name, batch=batch, context=size)
    result = attempt(
        lambda: dict(found=fragmentation(dims, lengths, size, plan.dtype, plan.device)), plan.device
    )
    if result['reason']:
        return tell(f'fragmentation: {rows.add(**key, **result)["reason"]}')
    tell(
        f'{name}, {batch} sequences of 1 to {size:,} tokens (mean {statistics.mean(lengths):,.0f}, even on a logarithmic scale), room for {size:,} each:'
    )
    for found in result['found']:
        if old := rows.find(**key, page_size=found['page_size']):
            rows.remove(old)
        row = rows.add(**key | found | dict(mean_length=statistics.mean(lengths), reason=''))
        tell(
            f'  {row["cache"]:<5} {"page size " + str(row["page_size"]) if row["page_size"] else "contiguous":<13} {row["allocated_bytes"] / 2**20:>9,.1f} MiB allocated, '
            f'{row["used_bytes"] / 2**20:,.1f} used: {row["lost_percent"]:.1f} % lost, {row["saved_percent"]:.1f} % less than contiguous'
        )


def facts(device, dtype):
    """What every row says of where it was measured."""
    return dict(
        device=machine.describe(device),
        dtype=str(dtype)[6:],
        torch=torch.__version__,
        commit=machine.commit(),
        date=time.strftime('%Y-%m-%d'),
    )
