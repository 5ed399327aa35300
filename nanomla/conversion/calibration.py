"""
Measure a model on text: moments of its activations, its perplexity with or without a cache.

The moments decide what a conversion keeps (convert.py).

Legend: as in model.py, and M windows of T tokens; x̃ = [x, 1], the input of an attention with a one
after it, so that a layer with a bias is one matrix [W | b] on x̃, and C̃ = C + 1.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT, Attention
from nanomla.checkpoints.text import decode_file
from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.conversion.source import check_source
from nanomla.core import token_files
from nanomla.core.configurator import UserError
from nanomla.core.tokenizers import Tokenizer
from nanomla.inference.cache import Cache

GPT2_VOCABULARIES = (50257, 50304)  # as it is, and rounded up to a multiple of 64
LOSS_ROWS = 4096  # tokens whose logits are in memory at a time
PATTERN_SIZE = 2**24  # numbers of patterns in memory at a time
LARGEST_NATS = 700.0  # exp of more overflows


# -------------------------------------------------------------------------------------------------
# moments


@dataclass
class Moments:
    """
    Moments of one layer over the calibration tokens.

    cov (C̃, C̃): E[x̃ x̃ᵀ], not centred; its last row is the mean.
    q_norms (H, D / 2), k_norms (K, D / 2): mean norm of each pair (j, j + D / 2) of each head;
    empty for an MLA model.
    attended (C̃, C̃): E[x̃ x̃ᵀ] where a token counts by the attention that it receives.
    value_spread (H,): the variance of W^O v under a query's attention weights, mean over queries.
    window: T, the longest distance at which tokens were seen together.
    """

    cov: torch.Tensor
    q_norms: torch.Tensor
    k_norms: torch.Tensor
    attended: torch.Tensor
    value_spread: torch.Tensor
    window: int

    def to(self, device: torch.device | str) -> 'Moments':
        tensors = (self.cov, self.q_norms, self.k_norms, self.attended, self.value_spread)
        return Moments(*(tensor.to(device) for tensor in tensors), window=self.window)


class MomentSums:
    """Sums over tokens of one layer's moments; a hook that runs before its attention's forward."""

    def __init__(self, attention: Attention, dtype: torch.dtype):
        self.attention, self.dtype = attention, dtype
        self.sums = [0, 0, 0, 0, 0]

    def __call__(self, module, args) -> None:
        attention, (inputs, rope) = self.attention, args[:2]
        x = inputs.flatten(0, 1)
        norms = norms_of_pairs(attention, x)
        # In float32 rounding alone would leave cov no positive matrix.
        x = F.pad(x.to(self.dtype), (0, 1), value=1.0)
        new = [x.T @ x, *norms]
        new += attention_moments(attention, inputs, rope, self.dtype)
        self.sums = [total + part.to(self.dtype) for total, part in zip(self.sums, new)]

    def moments(self, tokens: int, window: int) -> Moments:
        return Moments(*(total / tokens for total in self.sums), window=window)


def norms_of_pairs(attention: Attention, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the sums of the pairs' norms over the inputs x (tokens, C), of queries and of keys."""
    if attention.latent is not None:  # its pairs are chosen already
        return [x.new_zeros(0), x.new_zeros(0)]
    parts = attention.c_attn(x).float().split(attention.widths, dim=-1)
    q, k, _ = (part.unflatten(-1, (-1, attention.v_dim)) for part in parts)
    return [pair_norms(q).sum(0), pair_norms(k).sum(0)]


def pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Return the norms (tokens, heads, D / 2) of the pairs of x (tokens, heads, D)."""
    return x.unflatten(-1, (2, -1)).norm(dim=-2)


def attention_moments(
    attention: Attention, inputs: torch.Tensor, rope, dtype: torch.dtype
) -> list[torch.Tensor]:
    """
    Return the sums over the tokens of inputs (B, T, C) that give `attended` and `value_spread`.

    The variance of W^O v is that of v under the metric W^Oᵀ W^O of its head.
    """
    metric = output_metric(attention).float()
    T, H = inputs.size(1), attention.n_head
    attended, spread = 0, 0
    for part in inputs.split(max(1, PATTERN_SIZE // (H * T * T))):
        q, k, v = (t.float() for t in attention.qkv(part, rope))
        group = q.size(1) // k.size(1)
        v = v.repeat_interleave(group, dim=1)
        pattern = causal_pattern(q, k.repeat_interleave(group, dim=1), attention.scale)
        received = pattern.mean(1).sum(1).flatten()  # by each token, over heads and queries
        x = F.pad(part.flatten(0, 1).to(dtype), (0, 1), value=1.0)
        attended = attended + x.T @ (received[:, None].to(dtype) * x)
        second_moment = (pattern @ squared_norm(v, metric)[..., None])[..., 0]
        variance = second_moment - squared_norm(pattern @ v, metric)
        spread = spread + variance.sum((0, 2))
    return [attended, spread.clamp(min=0)]


def output_metric(attention: Attention) -> torch.Tensor:
    """Return W^Oᵀ W^O (H, D, D) of each head."""
    of_heads = attention.c_proj.weight.detach().unflatten(1, (attention.n_head, -1))
    return torch.einsum('chd,che->hde', of_heads, of_heads)


def causal_pattern(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the pattern (B, H, T, T) of rotated q and k (B, H, T, D)."""
    T = q.size(2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT * scale).masked_fill(future, -torch.inf).softmax(-1)


def squared_norm(x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Return xᵀ metric x (B, H, T) for x (B, H, T, D) and metric (H, D, D)."""
    return (x @ metric * x).sum(-1)


@torch.no_grad()
def measure(
    model: GPT,
    windows: torch.Tensor,
    batch_size: int = 8,
    tick: Callable[[], object] = lambda: None,
) -> list[Moments]:
    """
    Return the Moments of each layer of `model` over `windows` (M, T); call tick after each batch.

    UserError for a model that cannot be converted.
    """
    check_source(model)
    dtype = torch.float32 if windows.device.type == 'mps' else torch.float64
    sums, hooks = [], []
    for block in model.transformer.h:
        sums.append(MomentSums(block.attn, dtype))
        hooks.append(block.attn.register_forward_pre_hook(sums[-1]))
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
    return [layer.moments(windows.numel(), windows.size(1)) for layer in sums]


# -------------------------------------------------------------------------------------------------
# perplexity


@torch.no_grad()
def mean_loss(
    model: GPT,
    windows: torch.Tensor,
    batch_size: int = 8,
    cache: Callable[[int, int], Cache] | None = None,
    chunk: int = 64,
    tick: Callable[[], object] = lambda: None,
) -> float:
    """
    Return the mean cross-entropy in nats of the last T tokens of each of `windows` (M, T + 1).

    Logits are fp32. cache(rows, size) makes a cache; the tokens then go through it `chunk` at a
    time, as in decoding. tick is called after each batch.
    """
    training, total = model.training, 0.0
    model.eval()
    for part in windows.split(batch_size):
        idx, targets = part[:, :-1], part[:, 1:]
        if cache is None:
            x = model.hidden(idx)
        else:
            context = cache(len(part), idx.size(1))
            pieces = [model.hidden(piece, context) for piece in idx.split(chunk, dim=1)]
            x = torch.cat(pieces, dim=1)
        rows = x.flatten(0, 1).split(LOSS_ROWS)
        for x, y in zip(rows, targets.flatten().split(LOSS_ROWS)):
            total += F.cross_entropy(model.lm_head(x).float(), y, reduction='sum').double()
        tick()
    model.train(training)
    return (total / windows[:, 1:].numel()).item()


def cached_loss(
    model: GPT,
    windows: torch.Tensor,
    dtype: str,
    batch_size: int = 8,
    tick: Callable[[], object] = lambda: None,
) -> float:
    """
    Return `mean_loss` through a cache of `dtype` (int8 or int4).

    Most of what a token reads has to be in that dtype: the window of full precision is short, and
    few tokens come at a time.
    """
    T = windows.size(1) - 1

    def make_cache(rows, size):
        return Cache.of(model, rows, size, dtype=dtype, window=min(128, T // 8))

    return mean_loss(model, windows, batch_size, make_cache, max(1, T // 16), tick)


def perplexity(nats: float) -> float:
    return math.exp(min(nats, LARGEST_NATS))


def bytes_per_token(model: GPT, dtype: str = 'bfloat16') -> float:
    """Return what one token takes in the caches of all layers, in bytes; k_pe is bf16 in any."""
    cache = Cache(
        [block.attn.cache_dims() for block in model.transformer.h],
        rows=1,
        size=256,
        dtype=dtype,
        window=0,
        full=torch.bfloat16,
        device=model.lm_head.weight.device,
        kernel='torch',
    )
    return cache.bytes_per_token


# -------------------------------------------------------------------------------------------------
# text


def tokens_of(
    name: str,
    vocab_size: int,
    meta: dict | None = None,
    tokenizer: HFTokenizer | None = None,
    option: str = '--calibration',
) -> tuple[np.ndarray, np.ndarray, str]:
    """
    Return tokens to calibrate on, held-out tokens, both 1-D, and where they are from.

    name: a dataset (a folder, or a name in data/), whose splits train and val they are, or a text
    file, of which they are the first 90 % and the rest. The model has `vocab_size` tokens, which
    the `meta` of its dataset or its own `tokenizer` describes. UserError, which names the `option`
    of a script that the text is from, when it cannot be read, or has other tokens than the model.
    """
    if os.path.isfile(name):
        ids = file_tokens(name, vocab_size, meta or {}, tokenizer, option)
        cut = len(ids) * 9 // 10
        return ids[:cut], ids[cut:], name
    if tokenizer is not None:
        meta = tokenizer.meta
    return dataset_tokens(name, vocab_size, meta or {}, option)


def file_tokens(
    name: str,
    vocab_size: int,
    meta: dict,
    tokenizer: HFTokenizer | None,
    option: str = '--calibration',
) -> np.ndarray:
    """Return the token ids of a text file."""
    if tokenizer is None and not meta and vocab_size not in GPT2_VOCABULARIES:
        raise UserError(
            f'{option}={name}: the model does not say what its {vocab_size} tokens are; name a '
            'dataset of them'
        )
    codec = tokenizer or Tokenizer(meta or dict(tokenizer='gpt2'))
    text = decode_file(name, codec.name == 'bytes', option)
    try:
        ids = codec.encode_array(text) if codec.name == 'bytes' else codec.encode(text)
    except UserError as error:
        raise UserError(f'{option}={name}: {error}') from None
    return np.asarray(ids, np.int64)


def dataset_tokens(
    name: str, vocab_size: int, meta: dict, option: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return both splits of a dataset as memmaps, and its source."""
    folder = token_files.find(name)
    if not os.path.exists(folder / 'train.bin'):
        raise UserError(
            f'{option}={name}: there is no such file, and no dataset {folder} with train.bin: '
            'prepare it first, or name a text file'
        )
    theirs = token_files.read_meta(folder)
    differs = 'tokenizer' in meta and not token_files.same_tokens(meta, theirs)
    if differs or theirs['vocab_size'] > vocab_size:
        raise UserError(
            f'{option}={name}: it has other tokens ({theirs["tokenizer"]}, '
            f'{theirs["vocab_size"]}) than the model has'
        )
    train = token_files.read_split(folder, 'train', theirs)
    val = token_files.read_split(folder, 'val', theirs)
    return train, val, theirs['source']


def windows_of(
    ids: np.ndarray, most: int, T: int, least: int = 1, what: str = 'calibration'
) -> torch.Tensor:
    """
    Return up to most // T windows (M, T), evenly spaced over the 1-D array `ids`.

    UserError, in which `what` names the text, where they have fewer than `least` tokens.
    """
    available = min(most, len(ids))
    count = available // T
    needed = max(least, T)
    if count * T < needed:
        raise UserError(
            f'{what}: {available:,} tokens are too few: at least {needed:,} are needed '
            f'(windows of {T}); name a longer text, or ask for more tokens'
        )
    starts = np.linspace(0, len(ids) - T, count).astype(np.int64)
    windows = [np.asarray(ids[start : start + T], np.int64) for start in starts]
    return torch.from_numpy(np.stack(windows))
