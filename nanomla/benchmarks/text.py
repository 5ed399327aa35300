"""
Whole texts, ours beside other people's `generate` (peers.py) in one process: seconds a token with median_and_range, and the ratio.
The first text of each is a warm-up and does not count; ours keeps its cache from text to text, as sample.py does.
"""

import statistics

import torch

from nanomla.benchmarks import peers
from nanomla.benchmarks.decode import shape_of
from nanomla.core import timing
from nanomla.core.configurator import UserError
from nanomla.core.timing import attempt, free_memory, median_and_range, peaks, reset_peak_memory
from nanomla.inference.generate import generate


def ratio(theirs, ours):
    """Theirs over ours, of seconds a token: {ratio, ratio_least, ratio_most}; the extremes pair the slowest of the one with the fastest of the other."""
    return dict(
        ratio=statistics.median(theirs) / statistics.median(ours),
        ratio_least=min(theirs) / max(ours),
        ratio_most=max(theirs) / min(ours),
    )


def texts(plan, rows, tell=print):
    """Seconds of whole texts: each of --peer, then each model and cache with that peer's sampling, and the ratio."""
    config, device = plan.config, plan.device
    n, theirs_n, prompt = (
        config['new_tokens'],
        config['peer_new_tokens'] or config['new_tokens'],
        config['prompt_tokens'],
    )
    vocab_size = -(-config['vocabulary'] // 64) * 64
    theirs = {}
    for name in config['peer'].split(','):
        who, run = peers.generator(name, config, vocab_size, device, plan.dtype)
        for batch in plan.batches:
            idx = torch.randint(config['vocabulary'], (batch, prompt), device=device)

            def whole():
                assert run(idx, theirs_n).shape == (batch, prompt + theirs_n)

            run(idx, min(8, theirs_n))
            theirs[who, batch] = [
                timing.seconds(device, whole) / theirs_n for _ in range(config['peer_repeats'])
            ]
            row = rows.add(
                what='text',
                model=who,
                batch=batch,
                prompt_tokens=prompt,
                new_tokens=theirs_n,
                repeats=config['peer_repeats'],
                sampling=peers.SAMPLING[who],
                tok_per_s=batch / statistics.median(theirs[who, batch]),
                reason='',
                **median_and_range('step_us', theirs[who, batch], 1e6),
            )
            tell(text_line(row))
        del run
        free_memory(device)
    for name in plan.models:
        model = plan.build(name)
        for cache in (cache for cache in plan.caches if cache != 'none'):
            for dtype in plan.cache_dtypes:
                for (who, batch), seconds in theirs.items():

                    def ours():
                        size, idx = (
                            prompt + n,
                            torch.randint(config['vocabulary'], (batch, prompt), device=device),
                        )
                        if size > model.config.block_size:
                            raise UserError(
                                f'{prompt} + {n} tokens are beyond block_size={model.config.block_size}'
                            )
                        reset_peak_memory(device)
                        held, times = plan.cache(model, cache, dtype, batch, size), []
                        for _ in range(1 + plan.repeats):
                            for slot in range(batch):
                                held.free(slot)
                            tokens = generate(
                                model,
                                idx,
                                n,
                                vocab_size=config['vocabulary'],
                                cache=held,
                                **peers.SAMPLING[who],
                            )
                            times.append(
                                timing.seconds(device, lambda: torch.stack(list(tokens), dim=1)) / n
                            )
                        return (
                            dict(tok_per_s=batch / statistics.median(times[1:]))
                            | median_and_range('step_us', times[1:], 1e6)
                            | ratio(seconds, times[1:])
                            | peaks(device)
                        )

                    row = rows.add(
                        what='text',
                        model=name,
                        shape=shape_of(model),
                        cache=cache,
                        cache_dtype=dtype,
                        batch=batch,
                        prompt_tokens=prompt,
                        new_tokens=n,
                        repeats=plan.repeats,
                        sampling=peers.SAMPLING[who],
                        against=who,
                        **attempt(ours, device),
                    )
                    tell(text_line(row))
        del model
        free_memory(device)


def text_line(row):
    who = row['model'] + (f', {row["cache"]} {row["cache_dtype"]}' if 'cache' in row else '')
    if row['reason']:
        return f'{who}, batch {row["batch"]}: {row["reason"]}'
    line = (
        f'{who}, batch {row["batch"]}, {row["new_tokens"]} new tokens, {row["repeats"]} x: {row["tok_per_s"]:,.0f} tok/s, '
        f'{row["step_us"]:,.0f} µs a step ({row["step_us_least"]:,.0f} to {row["step_us_most"]:,.0f})'
    )
    return line + (
        f', {row["ratio"]:.1f} x {row["against"]} ({row["ratio_least"]:.1f} to {row["ratio_most"]:.1f})'
        if 'ratio' in row
        else ''
    )
