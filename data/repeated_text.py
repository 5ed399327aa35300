"""Random texts that say everything twice: what data/repeats and data/repeats_fixed are made of."""

import hashlib

import numpy as np

from nanomla.core.configurator import UserError
from nanomla.core.token_files import TokenWriter

ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-' + ''.join(
    map(chr, range(0x3B1, 0x3CA))
)


def write(folder, documents, symbols, shortest, longest, seed):
    """
    train.bin with `documents` lines, val.bin with a tenth as many, and meta.json in `folder`. A line is a newline (id 0),
    L different symbols (ids 1 to `symbols`) in random order, and the same L again. L is drawn anew for each, from `shortest`
    to `longest`, both included. UserError where the numbers do not fit each other. Returns the meta.
    """
    if not 2 <= symbols <= len(ALPHABET):
        raise UserError(f'symbols={symbols} must be from 2 to {len(ALPHABET)}')
    if not 1 <= shortest <= longest <= symbols:
        raise UserError(
            f'shortest={shortest} and longest={longest}: L must be from 1 to the {symbols} symbols, as none comes twice in it'
        )
    if documents < 1 or seed < 0:
        raise UserError(f'documents={documents} must be at least 1, and seed={seed} at least 0')
    chars, digest = (
        ''.join(sorted('\n' + ALPHABET[:symbols])),
        hashlib.sha256(),
    )  # the newline comes first
    length = f'{shortest} to {longest}' if longest > shortest else f'{longest}'
    with TokenWriter(folder, len(chars)) as files:
        for part, (split, count) in enumerate(
            (('train', documents), ('val', max(1, documents // 10)))
        ):
            for at in range(0, count, 10000):
                rng, n = np.random.default_rng((seed, part, at)), min(10000, count - at)
                lengths = rng.integers(shortest, longest + 1, n)
                shuffled = (
                    rng.random((n, symbols), dtype=np.float32).argsort(axis=1) + 1
                )  # the first L of a shuffle are all different
                ids = np.concatenate(
                    [np.concatenate([[0], row[:L], row[:L]]) for row, L in zip(shuffled, lengths)]
                ).astype(np.uint16)
                digest.update(ids.tobytes())
                files.add(split, ids)
        return files.publish(
            dict(
                tokenizer='char',
                chars=chars,
                sha256=digest.hexdigest(),
                source=f'random texts of {length} different symbols out of {symbols}, each said twice (seed {seed})',
            )
        )
