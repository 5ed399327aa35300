"""
RoPE as a config.json asks for it, computed once: the frequency of each pair and a few numbers.

Kinds: default, linear (Chen et al. 2023), dynamic (NTK by length), yarn (Peng et al. 2023), llama3
(Llama 3.1) and longrope (Ding et al. 2024). Those whose frequencies change with the length of the
text are exact up to a length, `longest`.

Legend: F pairs that RoPE turns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanomla.core.configurator import UserError


@dataclass(frozen=True)
class Rope:
    """
    theta, scaling: the fields rope_theta and rope_scaling of a config
    frequencies (F,): of each pair, () where theta and scaling say all
    factor: what queries and keys are multiplied by
    longest: tokens of a text up to which this holds, 0 for any
    """

    theta: float
    scaling: float = 1.0
    frequencies: tuple[float, ...] = ()
    factor: float = 1.0
    longest: int = 0

    def all_frequencies(self, width: int) -> tuple[float, ...]:
        """Return the frequencies of all pairs of `width` channels, whatever says them."""
        return self.frequencies or numbers(base_frequencies(self.theta, width))


def rope_of(shape: dict, width: int) -> Rope:
    """
    Return the RoPE of a config.json for heads of which `width` channels are rotated.

    UserError for a kind or an entry that is not known; KeyError where an entry is missing.
    """
    entries = rope_entries(shape)
    kind = entries.pop('rope_type')
    theta = float(entries.pop('rope_theta'))
    if kind not in KINDS:
        raise UserError(f"RoPE of type '{kind}' (known are {', '.join(KINDS)})")
    make, known = KINDS[kind]
    for key, value in entries.items():
        off = (None, 1) if key == 'partial_rotary_factor' else (None,)
        if key not in known and value not in off:
            raise UserError(f'{key}={value} in RoPE')
    entries['max_position_embeddings'] = int(shape.get('max_position_embeddings', 2048))
    return make(Rope(theta), entries, base_frequencies(theta, width))


def rope_entries(shape: dict) -> dict:
    """Return the entries of RoPE, whatever their spelling, with rope_type and rope_theta."""
    entries = shape.get('rope_scaling') or shape.get('rope_parameters') or {}  # old and new
    entries = dict(entries)
    old_type = entries.pop('type', 'default')
    entries.setdefault('rope_type', old_type)
    if entries['rope_type'] == 'su':  # Phi-3's first name of it
        entries['rope_type'] = 'longrope'
    theta = entries.get('rope_theta') or shape.get('rope_theta') or 10000.0
    entries['rope_theta'] = theta
    if 'original_max_position_embeddings' in shape:
        original = shape['original_max_position_embeddings']
        entries.setdefault('original_max_position_embeddings', original)
    return entries


def base_frequencies(theta: float, width: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, width, 2, device='cpu').float() / width)


def frequency(theta: float, pair: int, width: int) -> float:
    """Return the frequency of one pair of `width` channels, in Python's 64 bits."""
    return theta ** (-2 * pair / width)


def numbers(frequencies: torch.Tensor) -> tuple[float, ...]:
    return tuple(frequencies.tolist())


def original_length(entries: dict) -> int:
    """Return the length of the texts that the model was made for before its RoPE was stretched."""
    original = entries.get('original_max_position_embeddings')
    return int(original or entries['max_position_embeddings'])


# -------------------------------------------------------------------------------------------------
# kinds


def default(rope: Rope, entries: dict, base: torch.Tensor) -> Rope:
    return rope


def linear(rope: Rope, entries: dict, base: torch.Tensor) -> Rope:
    return replace(rope, scaling=float(entries['factor']))


def dynamic(rope: Rope, entries: dict, base: torch.Tensor) -> Rope:
    """Longer texts than the model was made for would change the frequencies of all tokens."""
    return replace(rope, longest=entries['max_position_embeddings'])


def llama3(rope: Rope, entries: dict, base: torch.Tensor) -> Rope:
    """Slow pairs are slowed down by `factor`, fast ones are left alone, others lie between."""
    low, high = float(entries['low_freq_factor']), float(entries['high_freq_factor'])
    turns = original_length(entries) * base / (2 * math.pi)  # of a pair in the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    slowed = base / float(entries['factor'])
    return replace(rope, frequencies=numbers(kept * base + (1 - kept) * slowed))


def yarn(rope: Rope, entries: dict, base: torch.Tensor) -> Rope:
    """Between the pairs that turn beta_fast and beta_slow times, a ramp over their numbers."""
    original = original_length(entries)
    factor = float(entries.get('factor') or entries['max_position_embeddings'] / original)

    def pair_that_turns(times: float) -> float:
        ratio = original / (times * 2 * math.pi)
        return len(base) * math.log(ratio) / math.log(rope.theta)

    first = pair_that_turns(float(entries.get('beta_fast') or 32))
    last = pair_that_turns(float(entries.get('beta_slow') or 1))
    if entries.get('truncate', True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(base) - 1)
    if first == last:
        last += 0.001
    slowed = ((torch.arange(len(base), device='cpu') - first) / (last - first)).clamp(0, 1)
    frequencies = slowed * base / factor + (1 - slowed) * base
    return replace(rope, frequencies=numbers(frequencies), factor=yarn_factor(entries, factor))


def yarn_factor(entries: dict, factor: float) -> float:
    if entries.get('attention_factor') is not None:
        return float(entries['attention_factor'])
    mscale, all_dim = entries.get('mscale'), entries.get('mscale_all_dim')
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return what YaRN multiplies queries and keys by (Peng et al. 2023, equation 22)."""
    if factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def longrope(rope: Rope, entries: dict, base: torch.Tensor) -> Rope:
    """A factor for each pair; texts beyond the original length would get others."""
    original = original_length(entries)
    short, long = list(entries['short_factor']), list(entries['long_factor'])
    if len(short) != len(base):
        raise UserError(f'short_factor of RoPE has {len(short)} numbers for {len(base)} pairs')
    factor = float(entries.get('factor') or entries['max_position_embeddings'] / original)
    attention = entries.get('attention_factor')
    if attention is None:
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        rope,
        frequencies=numbers(base / torch.tensor(short, dtype=torch.float32, device='cpu')),
        factor=float(attention),
        longest=0 if short == long else original,
    )


ORIGINAL = 'original_max_position_embeddings'
YARN_KEYS = {'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'attention_factor', 'truncate'}
LLAMA3_KEYS = {'low_freq_factor', 'high_freq_factor'}
LONGROPE_KEYS = {'short_factor', 'long_factor', 'attention_factor'}
# kind -> what makes it of its entries, and which those are
KINDS: dict[str, tuple[Callable[[Rope, dict, torch.Tensor], Rope], set[str]]] = dict(
    default=(default, {ORIGINAL}),
    linear=(linear, {'factor', ORIGINAL}),
    dynamic=(dynamic, {'factor'}),
    yarn=(yarn, {'factor', ORIGINAL} | YARN_KEYS),
    llama3=(llama3, {'factor', ORIGINAL} | LLAMA3_KEYS),
    longrope=(longrope, {'factor', ORIGINAL} | LONGROPE_KEYS),
)
