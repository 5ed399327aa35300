"""
What text says of a model: the moments of what its attentions read and make, by which conversion.py decides
what to keep, and its perplexity, with or without a cache.

Legend: as in model.py, and M windows of T tokens; x̃ = [x, 1], the input of an attention with a one behind it, so
that a layer with a bias is one matrix [W | b] on x̃.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanomla.core import token_files as datasets
from nanomla.core import tokenizers
from nanomla.core.configurator import UserError


@dataclass
class Moments:
    """Of one layer, over the calibration tokens."""

    cov: torch.Tensor  # (C + 1, C + 1): E[x̃ x̃ᵀ], not centred; its last row is the mean
    q_norms: torch.Tensor  # (H, D / 2): mean norm of each pair (k, k + D/2) of each query head
    k_norms: torch.Tensor  # (K, D / 2): the same of each key head


@torch.no_grad()
def measure(model, windows, batch_size=8, tick=lambda: None):
    """The Moments of each layer of `model`, a GPT with MHA, GQA or MQA, over `windows` (M, T); tick() after each batch."""
    wide = torch.float32 if windows.device.type == 'mps' else torch.float64
    sums, hooks = [], []

    def watch(attn, sums):
        def see(module, args):
            x = args[0].flatten(0, 1)
            q, k, _ = (
                t.unflatten(-1, (-1, attn.v_dim))
                for t in attn.c_attn(x).float().split(attn.widths, dim=-1)
            )
            x = F.pad(
                x.to(wide), (0, 1), value=1.0
            )  # in float32 rounding alone would make cov indefinite
            new = [x.T @ x, *(t.unflatten(-1, (2, -1)).norm(dim=-2).sum(0) for t in (q, k))]
            sums[:] = [a + b.to(wide) for a, b in zip(sums or [0] * 3, new)]

        hooks.append(attn.register_forward_pre_hook(see))

    for block in model.transformer.h:
        sums.append([])
        watch(block.attn, sums[-1])
    training = model.training
    model.eval()
    try:
        for part in windows.split(batch_size):
            model.hidden(part)
            tick()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return [Moments(*(s / windows.numel() for s in layer)) for layer in sums]


@torch.no_grad()
def mean_loss(model, windows, batch_size=8, cache=None, chunk=64, tick=lambda: None):
    """
    Mean cross-entropy in nats of the last T of each of `windows` (M, T + 1), in fp32. With `cache`, a function of
    (slots, size) that makes one, the tokens go through it `chunk` at a time, as a decoder would see them.
    """
    training, total = model.training, 0.0
    model.eval()
    for part in windows.split(batch_size):
        idx, targets = part[:, :-1], part[:, 1:]
        if cache is None:
            x = model.hidden(idx)
        else:
            held = cache(len(part), idx.size(1))
            x = torch.cat([model.hidden(piece, held) for piece in idx.split(chunk, dim=1)], dim=1)
        for rows, y in zip(
            x.flatten(0, 1).split(4096), targets.flatten().split(4096)
        ):  # logits of many tokens are large
            total += F.cross_entropy(model.lm_head(rows).float(), y, reduction='sum').double()
        tick()
    model.train(training)
    return (total / windows[:, 1:].numel()).item()


def tokens_of(name, vocab_size, meta=None, tokenizer=None):
    """
    (tokens to calibrate on, held-out tokens, where they are from) as 1-D arrays: the train and val splits of a dataset
    (a folder, or a name in data/), or the first 90 % and the rest of a text file. The model that reads them has
    `vocab_size` tokens, which the dataset's `meta` or its own `tokenizer` tells. UserError when they are other tokens than the model's.
    """
    meta, codec = meta or {}, tokenizer
    if Path(name).is_file():
        if codec is None and not meta and vocab_size not in (50257, 50304):
            raise UserError(
                f'calibration={name}: the model does not say what its {vocab_size} tokens are; name a dataset of them'
            )
        codec = codec or tokenizers.Tokenizer(meta or dict(tokenizer='gpt2'))
        try:
            raw = Path(name).read_bytes()
            ids = (
                codec.encode_array(raw)
                if codec.name == 'bytes'
                else codec.encode(raw.decode('utf-8-sig'))
            )
        except (OSError, ValueError) as error:
            why = (
                error
                if isinstance(error, UserError)
                else getattr(error, 'strerror', None) or 'it is not UTF-8 text'
            )
            raise UserError(f'calibration={name}: {why}') from None
        ids = np.asarray(ids, np.int64)
        return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :], name
    folder = datasets.find(name)
    if not (folder / 'train.bin').exists():
        raise UserError(
            f'calibration={name}: there is no such file, and no dataset {folder} with train.bin: prepare it first, or name a text file'
        )
    theirs = datasets.read_meta(folder)
    if (
        any(meta.get(key, theirs.get(key)) != theirs.get(key) for key in ('tokenizer', 'chars'))
        or theirs['vocab_size'] > vocab_size
    ):
        raise UserError(
            f'calibration={name}: it has other tokens ({theirs["tokenizer"]}, {theirs["vocab_size"]}) than the model has'
        )
    train, val = (
        datasets.read_tokens(folder / f'{split}.bin', theirs['dtype']) for split in ('train', 'val')
    )
    return train, val, theirs['source']


def windows_of(ids, most, T, least=1, what='calibration'):
    """Up to most // T windows (M, T), evenly spaced over the 1-D array `ids`. UserError where they would be fewer than `least` tokens."""
    count = min(most, len(ids)) // T
    if count * T < max(least, T):
        raise UserError(
            f'{what}: {min(most, len(ids)):,} tokens are too few: at least {max(least, T):,} are needed (windows of {T}); '
            'name a longer text, or ask for more tokens'
        )
    starts = np.linspace(0, len(ids) - T, count).astype(np.int64)
    return torch.from_numpy(
        np.stack([np.asarray(ids[start : start + T], np.int64) for start in starts])
    )


def perplexity(nats):
    return math.exp(min(nats, 700.0))
