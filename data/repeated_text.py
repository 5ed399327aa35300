"""Random texts in which everything stands twice, of which data/repeats* are made."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np

from nanomla.core.configurator import UserError
from nanomla.core.token_files import TokenWriter

GREEK = ''.join(chr(point) for point in range(0x3B1, 0x3CA))
ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-' + GREEK
AT_ONCE = 10000  # documents drawn by one generator


@dataclass
class RepeatedText:
    """
    Lines that copy themselves: a newline, L different symbols in random order, the same L again.

    L is drawn anew for each line. The newline is token 0, the symbols are 1 to `symbols`.
    UserError where the numbers do not fit one another.
    """

    documents: int  # lines to train on; a tenth as many validate
    symbols: int
    shortest: int  # least L
    longest: int  # most L
    seed: int

    def __post_init__(self):
        if not 2 <= self.symbols <= len(ALPHABET):
            raise UserError(f'symbols={self.symbols} must be from 2 to {len(ALPHABET)}')
        if not 1 <= self.shortest <= self.longest <= self.symbols:
            raise UserError(
                f'shortest={self.shortest} and longest={self.longest}: L must be from 1 to the '
                f'{self.symbols} symbols, as none comes twice in it'
            )
        if self.documents < 1 or self.seed < 0:
            raise UserError(
                f'documents={self.documents} must be at least 1, and seed={self.seed} at least 0'
            )

    def write(self, folder: str | os.PathLike) -> dict:
        """Write train.bin, val.bin and meta.json into `folder` and return the meta."""
        chars = ''.join(sorted('\n' + ALPHABET[: self.symbols]))  # the newline comes first
        digest = hashlib.sha256()
        counts = dict(train=self.documents, val=max(1, self.documents // 10))
        with TokenWriter(folder, len(chars)) as files:
            for part, (split, count) in enumerate(counts.items()):
                for begin in range(0, count, AT_ONCE):
                    rng = np.random.default_rng((self.seed, part, begin))
                    ids = self.draw(rng, min(AT_ONCE, count - begin))
                    digest.update(ids.tobytes())
                    files.add(split, ids)
            return files.publish(
                dict(
                    tokenizer='char',
                    chars=chars,
                    sha256=digest.hexdigest(),
                    source=self.description(),
                )
            )

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return the ids of `count` lines, one after the other."""
        lengths = rng.integers(self.shortest, self.longest + 1, count)
        # The first L symbols of a shuffle are all different.
        shuffled = rng.random((count, self.symbols), dtype=np.float32).argsort(axis=1) + 1
        parts = []
        for row, length in zip(shuffled, lengths):
            parts += [[0], row[:length], row[:length]]
        return np.concatenate(parts).astype(np.uint16)

    def description(self) -> str:
        length = f'{self.longest}'
        if self.longest > self.shortest:
            length = f'{self.shortest} to {self.longest}'
        return (
            f'random texts of {length} different symbols out of {self.symbols}, each repeated '
            f'(seed {self.seed})'
        )
