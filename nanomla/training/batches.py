"""Batches of a dataset: a function of (seed, step, micro-step, rank)."""

from pathlib import Path

import numpy as np
import torch

from nanomla.core.configurator import UserError
from nanomla.core.token_files import read_meta, read_tokens

RESIDENT_TOKENS = 2**28  # splits up to this many tokens live on the device (1 GiB as int32)


class Dataset:
    """
    Batches of one dataset for one rank: x (B, T) and y (B, T), int64 on `device`, y one token ahead.

    Small splits are copied to the device once and windows are cut out there; larger ones stay in
    their file and each batch travels. Either way the windows are the same.
    """

    def __init__(self, folder, block_size, seed=0, device='cpu', rank=0, world=1):
        self.folder, self.block_size, self.seed = Path(folder), block_size, seed
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.meta = read_meta(folder)
        self.tokens, self.resident = {}, {}
        for split in ('train', 'val'):
            ids = self.tokens[split] = read_tokens(self.folder / f'{split}.bin', self.meta['dtype'])
            if len(ids) <= block_size:
                raise UserError(
                    f'{self.folder}/{split}.bin has {len(ids)} tokens, too few for one block of {block_size}: '
                    'use a longer text or a smaller --block_size'
                )
            if len(ids) <= RESIDENT_TOKENS:
                if (top := int(ids.max())) >= self.meta['vocab_size']:
                    raise UserError(
                        f'{self.folder}/{split}.bin holds token {top}, but its vocabulary has '
                        f'{self.meta["vocab_size"]}: run the prepare.py of this dataset again'
                    )
                self.resident[split] = torch.from_numpy(ids.astype(np.int32)).to(self.device)
        self.window = torch.arange(block_size + 1, device=self.device)

    def starts(self, step, micro, batch_size):
        """Where the windows of a training batch begin: int64 (B,) on the CPU."""
        rng = np.random.default_rng((self.seed, step, micro * self.world + self.rank))
        return torch.from_numpy(
            rng.integers(0, len(self.tokens['train']) - self.block_size, batch_size)
        )

    def cut(self, split, starts):
        """The windows that begin at `starts` (B,): x, y, each (B, T)."""
        if split in self.resident:
            starts = starts.to(self.device, non_blocking=True)
            windows = self.resident[split][starts[:, None] + self.window].long()
        else:
            ids, length = self.tokens[split], self.block_size + 1
            windows = torch.from_numpy(
                np.stack([ids[i : i + length] for i in starts.tolist()]).astype(np.int64)
            )
            if self.device.type == 'cuda':
                windows = windows.pin_memory().to(self.device, non_blocking=True)
            else:
                windows = windows.to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def train_batch(self, step, micro, batch_size):
        return self.cut('train', self.starts(step, micro, batch_size))

    def val_batches(self, batch_size, most=0):
        """
        This rank's share of the validation split, each target exactly once: yields x, y (B, T), where
        y is -1 wherever a target was counted before or the batch is only filled up.
        With `most` > 0 and more windows than that, `most` evenly spaced ones stand for all.
        """
        T, n = self.block_size, len(self.tokens['val'])
        starts = np.arange(0, n - 1, T)
        if most and len(starts) > most:
            starts = starts[
                np.linspace(0, len(starts) - 2, most).astype(int)
            ]  # the last one may be short
        share = batch_size * self.world
        real = len(starts)
        starts = np.concatenate([starts, np.zeros(-real % share, starts.dtype)])
        for at in range(self.rank * batch_size, len(starts), share):
            begin = torch.from_numpy(starts[at : at + batch_size])
            inside = begin.clamp(
                max=n - 1 - T
            )  # the last window moves back to stay inside the split
            x, y = self.cut('val', inside)
            counted = (begin - inside)[:, None] > torch.arange(T)
            counted |= (torch.arange(at, at + batch_size) >= real)[:, None]
            yield x, y.masked_fill(counted.to(self.device), -1)
