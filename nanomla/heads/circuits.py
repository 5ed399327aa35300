"""
What heads can do by their weights alone: the circuits of Elhage et al. (2021), norms folded in.

With row vectors a head moves x W_V W_O (its OV circuit) from where x W_Q W_Kᵀ xᵀ (its QK circuit)
is large. An attention gives these matrices by `circuit_weights`; one that does not has no circuits.
The gain of the norm before them multiplies their rows, and LayerNorm's centring, a projection, is
folded in. MLA's RoPE term W^QR, W^KR stays apart from its content circuit.

What weights cannot know is left out: the scale that a norm divides by, biases, and the rotations of
RoPE (an MHA's QK circuit is that of distance 0).

Legend: B sequences, T tokens, C channels, H heads, D head dim, P width of RoPE's part, N layers, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model import GPT, Attention, Block, Norm, rope_tables
from nanomla.heads.patterns import hooks

TINY = 1e-20  # keeps ratios of zeros finite
DIGITS = 5


@dataclass
class Circuits:
    """
    The circuits of a layer's heads, in fp32, in the basis of the residual stream.

    q, k (H, C, Dq) and v (H, C, D) read from it, o (H, D, C) writes into it; q_pe, k_pe (H, C, P)
    are the RoPE term of MLA, None where there is none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_pe: torch.Tensor | None = None
    k_pe: torch.Tensor | None = None


def has_circuits(model: GPT) -> bool:
    """Return whether the attention of every layer gives its heads' matrices."""
    return all(block.attn.circuit_weights is not None for block in model.transformer.h)


@torch.no_grad()
def circuits_of(block: Block) -> Circuits:
    """Return the circuits of a block's attention with the norm before it folded in."""
    weights = block.attn.circuit_weights()
    gain = block.ln_1.weight.float()[:, None]
    folded = {}
    for name, weight in weights.items():
        folded[name] = weight
        if name != 'o':
            folded[name] = without_mean(block.ln_1, weight * gain)
    return Circuits(**folded)


def without_mean(norm: Norm, weight: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """Fold a LayerNorm's centring over the channels `dim` into a weight. RMSNorm has none."""
    if norm.rms:
        return weight
    return weight - weight.mean(dim, keepdim=True)


def output_weights(attention: Attention) -> torch.Tensor:
    """Return W^O of every head, (H, D, C), in fp32."""
    return attention.c_proj.weight.float().T.unflatten(0, (attention.n_head, -1))


# -------------------------------------------------------------------------------------------------
# copying


def positive_share(matrix: torch.Tensor) -> torch.Tensor:
    """Return Σ Re λ / Σ |λ| over the eigenvalues of square matrices (..., D, D)."""
    values = torch.linalg.eigvals(matrix.cpu())
    return values.real.sum(-1) / values.abs().sum(-1).clamp(min=TINY)


@torch.no_grad()
def copying(model: GPT) -> torch.Tensor:
    """
    Return how much each head's full OV circuit W_E W_V W_O W_U copies, (N, H): Σ Re λ / Σ |λ| over
    its eigenvalues. 1 makes likelier what the head attends to, -1 less likely.

    The V x V matrix is never made: its eigenvalues are those of the D x D product taken in another
    order.
    """
    t = model.transformer
    w_e = t.wte.weight.float()  # (V, C)
    w_u = without_mean(t.ln_f, model.lm_head.weight.float() * t.ln_f.weight.float(), dim=-1)
    across = w_u.T @ w_e  # (C, C)
    scores = []
    for block in t.h:
        layer = circuits_of(block)
        scores.append(positive_share(layer.o @ across @ layer.v))
    return torch.stack(scores)


@torch.no_grad()
def effective_copying(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """
    As `copying`, but with what the head really reads in the place of W_E W_V, (N, H).

    That is its value of each token of the texts ids (B, T), on average over the token's positions
    but a text's first, less the mean over tokens. Layers before may have reversed a token's vector,
    above all where embedding and head are tied: W_E W_U then makes a token predict itself, and
    early heads that attend to it write its opposite. Then copying takes a negative OV circuit, and
    `copying` is near -1 (compare the "effective embedding" of McDougall et al. 2023).
    """
    t = model.transformer
    values = values_read(model, ids)
    tokens, which, counts = ids[:, 1:].flatten().unique(return_inverse=True, return_counts=True)
    w_u = model.lm_head.weight.float()[tokens] * t.ln_f.weight.float()
    w_u = w_u - w_u.mean(0)  # what all logits share changes no probability
    w_u = without_mean(t.ln_f, w_u, dim=-1)
    scores = []
    for block, v in zip(t.h, values):
        sums = torch.zeros(len(tokens), *v.shape[1:], device=ids.device).index_add(0, which, v)
        mean = sums / counts[:, None, None]
        read = (mean - mean.mean(0)).transpose(0, 1)  # (H, V, D)
        # In fp64, as few tokens leave many eigenvalues zero.
        o = output_weights(block.attn).double()
        scores.append(positive_share(o @ (w_u.double().T @ read.double())))
    return torch.stack(scores).float()


def values_read(model: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return every layer's values (B (T - 1), H, D) of texts ids (B, T), without their first."""
    rope = rope_tables(model.config, torch.arange(ids.size(1), device=ids.device))
    values = []

    def read(attention, given):
        v = attention.qkv(given[0], rope)[2].float()
        v = v.repeat_interleave(attention.n_head // v.size(1), dim=1)
        values.append(v.transpose(1, 2)[:, 1:].flatten(0, 1))

    with hooks(block.attn.register_forward_pre_hook(read) for block in model.transformer.h):
        model.hidden(ids)
    return values


# -------------------------------------------------------------------------------------------------
# composition


def product_norm(left, middle, right) -> torch.Tensor:
    """
    Return the Frobenius norm of left middle rightᵀ without making it: left (..., C, a), middle
    (..., a, b), right (..., C, b).
    """
    squares = (left.mT @ left) @ middle @ (right.mT @ right) * middle
    return squares.sum((-2, -1)).clamp(min=0).sqrt()


def circuit_norm(left, right) -> torch.Tensor:
    """Return the Frobenius norm of left rightᵀ, both (H, C, D), of every head."""
    identity = torch.eye(left.size(-1), device=left.device)
    return product_norm(left, identity, right)


def composition_strengths(early: Circuits, late: Circuits) -> dict[str, torch.Tensor]:
    """
    Return |late's circuit after early's| / (|late| |early|) by Frobenius norms, kind -> (H, H) with
    [early's head, late's head].
    """
    early_v, early_o = early.v[:, None], early.o[:, None]  # OV = v o, C x C
    early_norm = circuit_norm(early.v, early.o.mT)[:, None]
    qk_norm = circuit_norm(late.q, late.k)
    ov_norm = circuit_norm(late.v, late.o.mT)

    def strength(reads, other, late_norm):
        through = product_norm(early_v, early_o @ reads[None], other[None])
        return through / (early_norm * late_norm).clamp(min=TINY)

    return dict(
        Q=strength(late.q, late.k, qk_norm),
        K=strength(late.k, late.q, qk_norm),
        V=strength(late.v, late.o.mT, ov_norm),
    )


def chance_strengths(like: Circuits) -> dict[str, float]:
    """Return the mean strength between random heads of the same shapes, by kind."""
    generator = torch.Generator().manual_seed(0)

    def random_heads():
        q = torch.randn(like.q.shape, generator=generator)
        k = torch.randn(like.k.shape, generator=generator)
        v = torch.randn(like.v.shape, generator=generator)
        o = torch.randn(like.o.mT.shape, generator=generator).mT
        return Circuits(q, k, v, o)

    strengths = composition_strengths(random_heads(), random_heads())
    return {kind: values.mean().item() for kind, values in strengths.items()}


@torch.no_grad()
def composition(model: GPT) -> list[dict]:
    """
    Return Q-, K- and V-composition of every pair of heads in different layers (Elhage et al. 2021).

    Each is {from: [layer, head], to: [layer, head], kind, value}; value is |late W_QK after early
    W_OV| over the product of their norms, less what two random heads of these shapes have. MLA
    composes by its content circuit; RoPE's own term is not counted.
    """
    layers = [circuits_of(block) for block in model.transformer.h]
    chance = chance_strengths(layers[0])
    pairs = []
    for late_layer, late in enumerate(layers):
        for early_layer, early in enumerate(layers[:late_layer]):
            for kind, values in composition_strengths(early, late).items():
                for i, j, value in entries(values):
                    pair = {'from': [early_layer, i], 'to': [late_layer, j], 'kind': kind}
                    pairs.append(pair | dict(value=round(value - chance[kind], DIGITS)))
    return pairs


def entries(matrix: torch.Tensor) -> Iterator[tuple[int, int, float]]:
    """Yield row, column and value of every entry of a matrix."""
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            yield i, j, value


# -------------------------------------------------------------------------------------------------
# the two parts of an MLA logit


@torch.no_grad()
def split_logits(
    model: GPT, ids: torch.Tensor, heads: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Split MLA's logits for a text ids (T,) into content (q_nope · k_nope) and RoPE (q_pe · k_pe).

    Both are scaled, (len(heads), T, T) for `heads` [(layer, head), ...], and their sum is what the
    softmax gets. None where an attention has no latent, or none of it is rotated.
    """
    blocks = model.transformer.h
    layers = sorted({layer for layer, _ in heads})
    if not all(rope_width(blocks[layer].attn) for layer in layers):
        return None
    parts = {}

    def split(attention, given):
        x, rope = given[:2]
        q, k, _ = attention.qkv(x, rope)
        P = rope_width(attention)  # q is [q_nope | q_pe], k is [k_nope | k_pe]
        content = q[0, ..., :-P] @ k[0, ..., :-P].mT
        by_rope = q[0, ..., -P:] @ k[0, ..., -P:].mT
        parts[attention] = content * attention.scale, by_rope * attention.scale

    with hooks(blocks[layer].attn.register_forward_pre_hook(split) for layer in layers):
        model.hidden(ids[None])
    content, by_rope = [], []
    for layer, head in heads:
        of_content, of_rope = parts[blocks[layer].attn]
        content.append(of_content[head])
        by_rope.append(of_rope[head])
    return torch.stack(content), torch.stack(by_rope)


def rope_width(attention: Attention) -> int:
    """Return the width of the rotated key that is cached beside a latent; 0 without one."""
    if attention.latent is None:
        return 0
    return attention.cache_dims().get('k_pe', 0)
