"""
Which pairs of dimensions keep RoPE when a model is converted to MLA, and become k_pe.

Pair j of a head is the dimensions (j, j + F), here one complex number. RoPE multiplies it at
position t by exp(i θ_j t), which commutes with every complex mixture of pairs of frequency j.

Legend: H query heads, K kv heads, D their width, F = D / 2 pairs and frequencies of a head, pair 0
the fastest; p pairs that keep RoPE; N, P the widths of q_nope and q_pe; C̃ = C + 1, as the matrices
have their bias as a last column (source.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model import GPTConfig
from model_mla import MultiHeadLatentAttention
from nanomla.conversion.calibration import Moments
from nanomla.conversion.low_rank import TINY, fix_phases
from nanomla.conversion.settings import ConversionSettings
from nanomla.conversion.source import with_bias


@dataclass
class RopeSplit:
    """
    Queries and keys of one layer, divided into a part with RoPE and one without.

    q_nope (H, N, C̃), q_pe (H, P, C̃), k_nope (K, N, C̃), k_pe (P, C̃); frequencies (P / 2,) says
    which of the source's F frequencies each pair of k_pe has.
    """

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    k_nope: torch.Tensor
    k_pe: torch.Tensor
    frequencies: torch.Tensor


def split_without_rope(q: torch.Tensor, k: torch.Tensor) -> RopeSplit:
    """Return the split of queries q (H, D, C̃) and keys k (K, D, C̃) of which no pair keeps RoPE."""
    return RopeSplit(
        q_nope=q,
        q_pe=q[:, :0],
        k_nope=k,
        k_pe=q.new_zeros(0, q.size(-1)),
        frequencies=torch.zeros(0, dtype=torch.long),
    )


def split_of_latent(
    attention: MultiHeadLatentAttention, dtype: torch.dtype
) -> tuple[RopeSplit, torch.Tensor]:
    """
    Return the split of a converted attention, as it was made or healed, and its values (H, D, C̃).

    Each of its query heads has keys and values of its own, K = H.
    """
    H = attention.n_head
    down, k_pe = with_bias(attention.kv_a_proj_with_mqa, dtype).split(attention.a_widths)
    w_uk, w_uv = (weight.detach() for weight in attention.up_projections(dtype))
    if attention.q_lora_rank:
        up = with_bias(attention.q_b_proj, dtype)
        q = up[:, :-1] @ with_bias(attention.q_a_proj, dtype)
        q[:, -1] += up[:, -1]
    else:
        q = with_bias(attention.q_proj, dtype)
    C = q.size(1)
    q_nope, q_pe = (part.reshape(H, -1, C) for part in q.split(attention.q_widths))
    return RopeSplit(q_nope, q_pe, w_uk @ down, k_pe, attention.rope_pairs), w_uv @ down


# -------------------------------------------------------------------------------------------------
# frequencies


def pick_frequencies(n: int, p: int, rope: str) -> list[int]:
    """Return p of n frequencies in order, 0 the fastest (MHA2MLA, section 3.1)."""
    if rope == 'high':
        return list(range(p))
    if rope == 'low':
        return list(range(n - p, n))
    return [i * n // p for i in range(p)]  # uniform


def pairs_by_settings(config: GPTConfig, settings: ConversionSettings) -> list[int] | None:
    """
    Return for each pair of k_pe the source's pair whose frequency it has, for settings that
    `for_source` has filled in; None where these depend on text or weights, or where pairs share a
    frequency.
    """
    by_frequency = settings.rope in ('high', 'low', 'uniform') and settings.fold == 1
    one_each = settings.shared or config.n_kv_head == 1
    count = config.head_dim // 2
    if not (by_frequency and one_each and settings.rope_pairs <= count):
        return None
    return pick_frequencies(count, settings.rope_pairs, settings.rope)


def frequency_weights(config: GPTConfig, rope: str, window: int) -> torch.Tensor:
    """
    Return how much each of the F frequencies counts, beside the power of its pairs.

    2-norm: all alike. turn: by what a pair loses without RoPE, the mean of 1 - cos(θ t) over a
    window; a slow pair hardly rotates within it, and loses almost nothing.
    """
    D = config.head_dim
    if rope == '2-norm':
        return torch.ones(D // 2, dtype=torch.float64)
    exponents = -torch.arange(0, D, 2, dtype=torch.float64) / D
    theta = config.rope_theta**exponents
    if config.rope_frequencies:
        theta = torch.tensor(config.rope_frequencies, dtype=torch.float64)
    angles = torch.arange(window)[:, None] * theta / config.rope_scaling
    return (1 - angles.cos()).mean(0)


def as_complex(w: torch.Tensor) -> torch.Tensor:
    """Return the rows (..., 2 n, C̃) of n pairs as complex numbers (..., n, C̃)."""
    return torch.complex(*w.chunk(2, dim=-2))


def as_real(z: torch.Tensor) -> torch.Tensor:
    """Undo `as_complex`."""
    return torch.cat([z.real, z.imag], dim=-2)


# -------------------------------------------------------------------------------------------------
# own pairs of each kv head (MHA2MLA)


def own_pairs(
    config: GPTConfig, settings: ConversionSettings, moments: list[Moments] | None
) -> list[torch.Tensor]:
    """
    Return for each layer the pairs of each kv head that keep RoPE, (K, p) in order.

    high, low and uniform are the same in all layers. 2-norm takes those of the largest mean |q| ·
    mean |k| (MHA2MLA, section 3.1), turn weighs these by `frequency_weights`.
    """
    F, K, p = config.head_dim // 2, config.n_kv_head, settings.rope_pairs
    if p == F:
        return [torch.tensor([list(range(F))] * K, dtype=torch.long)] * config.n_layer
    if settings.rope in ('high', 'low', 'uniform'):
        picked = pick_frequencies(F, p, settings.rope)
        return [torch.tensor([picked] * K, dtype=torch.long)] * config.n_layer
    weights = frequency_weights(config, settings.rope, moments[0].window)
    layers = []
    for layer in moments:
        q_norms = layer.q_norms.unflatten(0, (K, -1)).sum(1)  # of the queries that meet each key
        score = layer.k_norms * q_norms * weights.to(layer.k_norms)
        layers.append(score.topk(p).indices.sort().values)
    return layers


def split_own_pairs(q: torch.Tensor, k: torch.Tensor, pairs: torch.Tensor) -> RopeSplit:
    """
    Split queries q (H, D, C̃) and keys k (K, D, C̃), of which `pairs` (K, p) keep RoPE.

    k_pe holds the pairs of all kv heads side by side, P = 2 K p. A query is zero in the slots of
    other kv heads.
    """
    K, p = pairs.shape
    H, F = len(q), q.size(1) // 2
    group = torch.arange(H, device=q.device) // (H // K)  # the kv head of each query head
    keeps = torch.zeros(K, F, dtype=torch.bool, device=q.device).scatter(1, pairs, True)
    others = (~keeps).nonzero()[:, 1].view(K, -1)
    zq, zk = as_complex(q), as_complex(k)
    q_head = torch.arange(H, device=q.device)[:, None]
    k_head = torch.arange(K, device=q.device)[:, None]
    q_pe = zq.new_zeros(H, K, p, zq.size(-1))
    q_pe[q_head[:, 0], group] = zq[q_head, pairs[group]]
    return RopeSplit(
        q_nope=as_real(zq[q_head, others[group]]),
        q_pe=as_real(q_pe.flatten(1, 2)),
        k_nope=as_real(zk[k_head, others]),
        k_pe=as_real(zk[k_head, pairs].flatten(0, 1)),
        frequencies=pairs.flatten(),
    )


# -------------------------------------------------------------------------------------------------
# components that all kv heads share (TransMLA)


@dataclass
class Components:
    """
    The principal components of the kv heads' pairs of one or some neighbouring frequencies.

    frequencies (f,); power (K f,), falling. analysis (m, K f) and synthesis (K f, m):
    component = analysis · pairs and pairs = synthesis · components.
    """

    frequencies: torch.Tensor
    power: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor


def principal_components(
    q: torch.Tensor, k: torch.Tensor, cov: torch.Tensor | None, settings: ConversionSettings
) -> Iterator[Components]:
    """
    Yield the components of each run of settings.fold neighbouring frequencies, treated as one
    (FreqFold).

    q (H, D, C̃), k (K, D, C̃) of one layer; cov (C̃, C̃) of its input, None for the weights alone.
    The components are those of the keys; with components='scores' each pair is weighted by the
    power of the queries that it meets. real: rotate heads by real matrices only. RoRoPE has real
    ones of the keys alone (TransMLA, section 4.2); complex ones are all that commutes with RoPE.
    """
    K = len(k)
    zq, zk = as_complex(q), as_complex(k)
    zq_cov, zk_cov = zq, zk
    if cov is not None:
        zq_cov, zk_cov = as_complex(q @ cov), as_complex(k @ cov)
    for frequencies in torch.arange(zk.size(1), device=k.device).split(settings.fold):
        key_cov = zk_cov[:, frequencies].flatten(0, 1) @ zk[:, frequencies].flatten(0, 1).mH
        query_power = (zq_cov[:, frequencies] * zq[:, frequencies].conj()).sum(-1).real
        weight = query_power.unflatten(0, (K, -1)).sum(1).flatten()
        if settings.components == 'keys':
            weight = torch.ones_like(weight)
        weight = (weight + 1e-6 * weight.mean() + TINY).sqrt()
        mixed = key_cov.real if settings.real else key_cov
        values, vectors = torch.linalg.eigh(weight[:, None] * mixed * weight)
        vectors = fix_phases(vectors.flip(1)).to(key_cov.dtype)
        yield Components(
            frequencies,
            power=values.flip(0).clamp(min=0),
            analysis=vectors.mH * weight,
            synthesis=vectors / weight[:, None],
        )


def choose_components(
    config: GPTConfig,
    settings: ConversionSettings,
    layers: list[list[Components]],
    window: int,
) -> list[tuple[int, int]]:
    """
    Return the components that keep RoPE as (run of frequencies, number of the component).

    They are the same in all of `layers`. 2-norm and turn take those of the largest power, as a
    share of their layer's; turn weights them by `frequency_weights`. The others take the first
    component of some runs, then the second ones, and so on.
    """
    if settings.rope in ('2-norm', 'turn'):
        chosen = strongest_components(config, settings, layers, window)
    else:
        chosen = first_components(settings, layers[0])
    return sorted(chosen, key=lambda place: (place[1], place[0]))


def strongest_components(
    config: GPTConfig,
    settings: ConversionSettings,
    layers: list[list[Components]],
    window: int,
) -> list[tuple[int, int]]:
    weights = frequency_weights(config, settings.rope, window).split(settings.fold)
    share = 0.0  # (runs, components): summed over the layers
    for runs in layers:
        total = sum(run.power.sum().item() for run in runs)
        power = [run.power.cpu() * weight.mean() for run, weight in zip(runs, weights)]
        share = share + torch.nn.utils.rnn.pad_sequence(power, batch_first=True) / total
    best = share.flatten().topk(settings.rope_pairs).indices.tolist()
    return [divmod(i, share.size(1)) for i in best]


def first_components(settings: ConversionSettings, runs: list[Components]) -> list[tuple[int, int]]:
    chosen, number = [], 0
    while len(chosen) < settings.rope_pairs:
        candidates = [r for r, run in enumerate(runs) if len(run.power) > number]
        count = min(settings.rope_pairs - len(chosen), len(candidates))
        picked = pick_frequencies(len(candidates), count, settings.rope)
        chosen += [(candidates[i], number) for i in picked]
        number += 1
    return chosen


def split_shared_components(
    q: torch.Tensor, k: torch.Tensor, runs: list[Components], chosen: list[tuple[int, int]]
) -> RopeSplit:
    """
    Split queries q (H, D, C̃) and keys k (K, D, C̃), of which the `chosen` components keep RoPE.

    P = 2 len(chosen), N = D: k_nope is what the components leave of the keys, q_nope the query as
    it was. N = 0 where every component is chosen.
    """
    H, K = len(q), len(k)
    zq, zk = as_complex(q), as_complex(k)
    rest = zk.clone()
    q_pe, k_pe, frequencies = [], [], []
    for r, number in chosen:
        run = runs[r]
        component = run.analysis[number] @ zk[:, run.frequencies].flatten(0, 1)
        synthesis = run.synthesis[:, number].view(K, len(run.frequencies))
        rest[:, run.frequencies] -= synthesis[..., None] * component
        of_query_heads = synthesis.conj().repeat_interleave(H // K, dim=0)
        q_pe.append(torch.einsum('hf,hfc->hc', of_query_heads, zq[:, run.frequencies]))
        k_pe.append(component)
        # A folded run gets the one of its frequencies that has most of the component.
        strength = [(column.abs() ** 2).sum() for column in synthesis.T]
        frequencies.append(run.frequencies[run.power.new_tensor(strength).argmax()])
    nope = q.size(1)
    if len(chosen) == zk.size(0) * zk.size(1):
        nope = 0
    return RopeSplit(
        q_nope=q[:, :nope],
        q_pe=as_real(torch.stack(q_pe, dim=1)),
        k_nope=as_real(rest)[:, :nope],
        k_pe=as_real(torch.stack(k_pe)),
        frequencies=torch.stack(frequencies),
    )
