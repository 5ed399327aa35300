"""
What heads can do by their weights alone: the circuits of Elhage et al. (2021), norms folded in.

With row vectors a head moves x W_V W_O (its OV circuit) from where x W_Q W_Kᵀ xᵀ (its QK circuit) is large:

    MHA, GQA, MQA   W_V, W_K, W_Q as they stand; the gain of the norm before them multiplies their rows
    MLA             W_V = W^DKV diag(g) W^UV, W_K = W^DKV diag(g) W^UK, W_Q = W^UQ (or W^DQ diag(g') W^UQ),
                    g the gain of the latent's norm. The RoPE term W^QR, W^KR stays apart.

What weights cannot know is left out: the scale that a norm divides by, biases, and the turns of RoPE (an MHA's QK
circuit is that of distance 0). LayerNorm's centring is a projection and is folded in.

Legend: C channels, H heads, D head dim, V vocabulary, N layers.
"""

import torch

from model import rope_tables
from model_mla import MultiHeadLatentAttention


def gain(norm):
    """The gain of a norm as a vector; None for none (nn.Identity)."""
    return getattr(norm, 'weight', None)


def centred(norm, w):
    """Columns of w (..., C, D) as a LayerNorm's input sees them: without their mean over C. RMSNorm has no centring."""
    return w if norm.rms else w - w.mean(-2, keepdim=True)


@torch.no_grad()
def of(block):
    """
    The circuits of a layer: q, k (H, C, Dq), v (H, C, D), o (H, D, C) in fp32, norms folded in; and of MLA with
    RoPE q_pe and k_pe (H, C, P), else None.
    """
    attention, norm = block.attn, block.ln_1
    H = attention.n_head

    def heads(weight):  # (heads * D, C) -> (heads, C, D)
        return (
            weight.float().unflatten(0, (H, -1)).mT
            if weight.size(0)
            else weight.new_zeros(H, weight.size(1), 0).float()
        )

    o = attention.c_proj.weight.float().T.unflatten(0, (H, -1))
    pe = {}
    if isinstance(attention, MultiHeadLatentAttention):

        def through(low, norm):  # W^D diag(g), (C, R)
            return low.float().T * (1 if gain(norm) is None else gain(norm).float())

        w_dkv, w_kr = attention.kv_a_proj_with_mqa.weight.split(attention.a_widths)
        w_uk, w_uv = attention.kv_b_proj.weight.split(attention.b_widths)
        down = through(w_dkv, attention.kv_a_layernorm)
        if hasattr(attention, 'q_a_proj'):
            q, q_pe = (
                through(attention.q_a_proj.weight, attention.q_a_layernorm) @ heads(w)
                for w in attention.q_b_proj.weight.split(attention.q_widths)
            )
        else:
            q, q_pe = (heads(w) for w in attention.q_proj.weight.split(attention.q_widths))
        k, v = down @ heads(w_uk), down @ heads(w_uv)
        if attention.pe:
            pe = dict(q_pe=q_pe, k_pe=w_kr.float().T.expand(H, -1, -1))
    else:
        q, k, v = (
            w.float().unflatten(0, (-1, attention.v_dim)).mT
            for w in attention.c_attn.weight.split(attention.widths)
        )
        k, v = (w.repeat_interleave(H // w.size(0), dim=0) for w in (k, v))
    g = gain(norm).float()[:, None]
    read = {name: centred(norm, w * g) for name, w in dict(q=q, k=k, v=v, **pe).items()}
    return read | dict(o=o) | ({} if pe else dict(q_pe=None, k_pe=None))


@torch.no_grad()
def copying(model):
    """
    How much each head's full OV circuit W_E W_V W_O W_U copies: Σ Re λ / Σ |λ| over its eigenvalues, (N, H). 1 raises what it
    attends to, -1 lowers it. The V x V matrix is never made: its eigenvalues are those of the D x D product taken in another order.
    """
    t = model.transformer
    w_e, w_u = t.wte.weight.float(), model.lm_head.weight.float()  # (V, C) both
    w_u = w_u * gain(t.ln_f).float()
    w_u = w_u if t.ln_f.rms else w_u - w_u.mean(-1, keepdim=True)
    crossed = w_u.T @ w_e  # (C, C)
    scores = []
    for block in t.h:
        c = of(block)
        values = torch.linalg.eigvals((c['o'] @ crossed @ c['v']).cpu())
        scores.append(values.real.sum(-1) / values.abs().sum(-1).clamp(min=1e-20))
    return torch.stack(scores)


@torch.no_grad()
def effective_copying(model, ids):
    """
    As `copying`, but with what the head really reads in the place of W_E W_V, (N, H): its value of each token of the texts ids (B, T),
    on average over the token's places but a text's first, less the mean over tokens. Layers before may have turned a token's vector round, above all where embedding
    and head are tied: W_E W_U then makes a token foretell itself, and early heads that look at it write its opposite. Then copying
    takes a negative OV circuit, and `copying` is near -1 (the "effective embedding" of McDougall et al. 2023 is after the same).
    """
    t, values, rope = (
        model.transformer,
        {},
        rope_tables(model.config, torch.arange(ids.size(1), device=ids.device)),
    )

    def see(layer, attention, x):
        v = attention.qkv(x, rope)[2].float()
        values[layer] = (
            v.repeat_interleave(attention.n_head // v.size(1), dim=1)
            .transpose(1, 2)[:, 1:]
            .flatten(0, 1)
        )  # (B (T - 1), H, D)

    hooks = [
        block.attn.register_forward_pre_hook(
            lambda attention, given, layer=layer: see(layer, attention, given[0])
        )
        for layer, block in enumerate(t.h)
    ]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    tokens, which, counts = ids[:, 1:].flatten().unique(return_inverse=True, return_counts=True)
    w_u = model.lm_head.weight.float()[tokens] * gain(t.ln_f).float()
    w_u = w_u - w_u.mean(0)  # what all logits share changes no probability
    w_u = w_u if t.ln_f.rms else w_u - w_u.mean(-1, keepdim=True)
    scores = []
    for layer, block in enumerate(t.h):
        mean = (
            torch.zeros(len(tokens), *values[layer].shape[1:], device=ids.device).index_add(
                0, which, values[layer]
            )
            / counts[:, None, None]
        )
        read = (mean - mean.mean(0)).transpose(0, 1)  # (H, V, D)
        o = block.attn.c_proj.weight.float().T.unflatten(0, (block.attn.n_head, -1))
        found = torch.linalg.eigvals(
            (o.double() @ (w_u.double().T @ read.double())).cpu()
        )  # few tokens leave many eigenvalues zero
        scores.append(found.real.sum(-1) / found.abs().sum(-1).clamp(min=1e-20))
    return torch.stack(scores).float()


def norm_of_product(left, middle, right):
    """Frobenius norm of left middle rightᵀ without making it: left (..., C, a), middle (..., a, b), right (..., C, b)."""
    return (
        ((left.mT @ left) @ middle @ (right.mT @ right) * middle).sum((-2, -1)).clamp(min=0).sqrt()
    )


def strengths(early, late):
    """|late's circuit after early's| / (|late| |early|) by Frobenius norms, {kind: (H, H)} with [early's head, late's]."""
    v, o = early['v'][:, None], early['o'][:, None]  # OV = v o, C x C
    size = {
        name: norm_of_product(late[a], torch.eye(late[a].size(-1), device=v.device), late[b])
        for name, (a, b) in dict(QK=('q', 'k'), OV=('v', 'oT')).items()
    }
    early_size = norm_of_product(early['v'], torch.eye(v.size(-1), device=v.device), early['oT'])[
        :, None
    ]
    return {
        kind: norm_of_product(v, o @ late[reads][None], late[other][None])
        / (early_size * size[of_whom]).clamp(min=1e-20)
        for kind, (reads, other, of_whom) in dict(
            Q=('q', 'k', 'QK'), K=('k', 'q', 'QK'), V=('v', 'oT', 'OV')
        ).items()
    }


@torch.no_grad()
def composition(model):
    """
    Q-, K- and V-composition of every pair of heads in different layers (Elhage et al. 2021), as a list of
    {from: [layer, head], to: [layer, head], kind, value}: |late W_QK after early W_OV| over the product of their norms, less
    what two random heads of these shapes have. MLA composes by its content circuit; RoPE's own term is not counted.
    """
    layers = [of(block) for block in model.transformer.h]
    layers = [c | dict(oT=c['o'].mT) for c in layers]
    generator = torch.Generator().manual_seed(0)
    one, two = (
        {
            name: torch.randn(layers[0][name].shape, generator=generator)
            for name in ('q', 'k', 'v', 'oT')
        }
        for _ in range(2)
    )
    chance = strengths(one | dict(o=one['oT'].mT), two)
    chance = {kind: value.mean().item() for kind, value in chance.items()}
    found = []
    for b, late in enumerate(layers):
        for a, early in enumerate(layers[:b]):
            for kind, values in strengths(early, late).items():
                found += [
                    {
                        'from': [a, i],
                        'to': [b, j],
                        'kind': kind,
                        'value': round(value - chance[kind], 5),
                    }
                    for i, row in enumerate(values.tolist())
                    for j, value in enumerate(row)
                ]
    return found


@torch.no_grad()
def split_logits(model, ids, heads):
    """
    MLA's two parts of a logit for a text ids (T,): content (q_nope · k_nope) and RoPE (q_pe · k_pe), both scaled, each
    (len(heads), T, T) for `heads` [(layer, head), ...]; their sum is what the softmax gets. None where nothing is rotated.
    """
    if not getattr(model.transformer.h[0].attn, 'pe', 0):
        return None
    parts = {}

    def see(attention, given):
        x, rope = given[:2]
        q_nope, q_pe = attention.query(x, rope)
        c_kv, k_pe = attention.latent(x, rope)
        k_nope, _ = attention.heads(attention.kv_b_proj(c_kv), attention.b_widths)
        parts[attention] = (
            torch.einsum('qhn,khn->hqk', q_nope[0], k_nope[0]) * attention.scale,
            torch.einsum('qhp,kp->hqk', q_pe[0], k_pe[0]) * attention.scale,
        )

    blocks = model.transformer.h
    hooks = [
        blocks[layer].attn.register_forward_pre_hook(see) for layer in {layer for layer, _ in heads}
    ]
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        torch.stack([parts[blocks[layer].attn][part][head] for layer, head in heads])
        for part in (0, 1)
    )
