"""
Batches of a dataset. A batch is a function of (seed, step, micro-step, rank) and of nothing else:
two models trained with the same seed read the same text, a resumed run goes on where it was, and 2
ranks with 1 micro-step read what 1 rank with 2 micro-steps reads.

Legend: B sequences, T tokens in a sequence.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanomla.core.configurator import UserError
from nanomla.core.token_files import read_meta, read_split

RESIDENT_TOKENS = 2**28  # splits up to this many tokens live on the device (1 GiB as int32)


def window_starts(
    seed: int, step: int, number: int, possible_starts: int, batch_size: int
) -> torch.Tensor:
    """
    Return where the windows of micro-batch `number` of a step begin: int64 (B,), each from 0 to
    possible_starts - 1.
    """
    rng = np.random.default_rng((seed, step, number))
    return torch.from_numpy(rng.integers(0, possible_starts, batch_size))


class Dataset:
    """
    Batches of one dataset for one rank: x and y (B, T), int64 on `device`, y one token ahead.

    Small splits are copied to the device once and windows are cut out there; larger ones stay in
    their file and each batch travels. Either way the windows are the same. UserError for a split
    that is too short, or holds tokens that its vocabulary lacks.
    """

    def __init__(
        self,
        folder: str | Path,
        block_size: int,
        seed: int = 0,
        device: str | torch.device = 'cpu',
        rank: int = 0,
        world: int = 1,
    ):
        self.folder = Path(folder)
        self.block_size = block_size
        self.seed = seed
        self.device = torch.device(device)
        self.rank, self.world = rank, world
        self.meta = read_meta(folder)
        self.tokens, self.resident = {}, {}
        for split in ('train', 'val'):
            path = self.folder / f'{split}.bin'
            ids = self.tokens[split] = read_split(self.folder, split, self.meta)
            if len(ids) <= block_size:
                raise UserError(
                    f'{path} has {len(ids)} tokens, too few for one block of {block_size}: '
                    'use a longer text or a smaller --block_size'
                )
            if len(ids) <= RESIDENT_TOKENS:
                largest, vocab_size = int(ids.max()), self.meta['vocab_size']
                if largest >= vocab_size:
                    raise UserError(
                        f'{path} holds token {largest}, but its vocabulary has {vocab_size}: '
                        'run the prepare.py of this dataset again'
                    )
                self.resident[split] = torch.from_numpy(ids.astype(np.int32)).to(self.device)
        self.window = torch.arange(block_size + 1, device=self.device)

    def starts(self, step: int, micro: int, batch_size: int) -> torch.Tensor:
        """Return where the windows of a training batch begin: int64 (B,) on the CPU."""
        possible_starts = len(self.tokens['train']) - self.block_size
        number = micro * self.world + self.rank
        return window_starts(self.seed, step, number, possible_starts, batch_size)

    def cut(self, split: str, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the windows that begin at `starts` (B,): x, y, each (B, T)."""
        if split in self.resident:
            starts = starts.to(self.device, non_blocking=True)
            windows = self.resident[split][starts[:, None] + self.window].long()
        else:
            ids, length = self.tokens[split], self.block_size + 1
            rows = np.stack([ids[start : start + length] for start in starts.tolist()])
            windows = self.to_device(torch.from_numpy(rows.astype(np.int64)))
        return windows[:, :-1], windows[:, 1:]

    def to_device(self, batch: torch.Tensor) -> torch.Tensor:
        """Bring a tensor of the CPU to the device, without waiting for it."""
        if self.device.type == 'cuda':
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def train_batch(self, step: int, micro: int, batch_size: int):
        return self.cut('train', self.starts(step, micro, batch_size))

    def val_batches(
        self, batch_size: int, most: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        Yield this rank's share of the validation split, each target exactly once: x, y (B, T),
        where y is -1 wherever a target was counted before or the batch is only filled up.

        With `most` > 0 and more windows than that, `most` evenly spaced ones stand for all.
        """
        T, n = self.block_size, len(self.tokens['val'])
        starts = np.arange(0, n - 1, T)
        if most and len(starts) > most:
            last = len(starts) - 2  # the very last window may be short
            starts = starts[np.linspace(0, last, most).astype(int)]
        real = len(starts)
        together = batch_size * self.world
        starts = np.concatenate([starts, np.zeros(-real % together, starts.dtype)])
        for first in range(self.rank * batch_size, len(starts), together):
            begin = torch.from_numpy(starts[first : first + batch_size])
            inside = begin.clamp(max=n - 1 - T)  # a short window moves back into the split
            x, y = self.cut('val', inside)
            counted = (begin - inside)[:, None] > torch.arange(T)
            filled_up = torch.arange(first, first + batch_size) >= real
            counted |= filled_up[:, None]
            yield x, y.masked_fill(counted.to(self.device), -1)
