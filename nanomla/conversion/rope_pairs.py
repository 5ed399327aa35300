"""Which pairs of dimensions keep RoPE when a model is converted to MLA."""

import torch

from nanomla.conversion.low_rank import upright


def some_of(n, p, rope):
    """p of n frequencies in order, 0 being the fastest (MHA2MLA, section 3.1)."""
    return dict(high=range(p), low=range(n - p, n), uniform=[i * n // p for i in range(p)])[rope]


def turning(c, rope):
    """
    How much each of the F frequencies counts beside the power of its pairs. 2-norm: all the same. turn: by what becomes of a
    pair that turns no more, the mean of 1 - cos(θ t) over a block; the slow ones hardly turn, and lose nothing without RoPE.
    """
    if rope == '2-norm':
        return torch.ones(c.head_dim // 2, dtype=torch.float64)
    theta = (
        c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        / c.rope_scaling
    )
    return (1 - (torch.arange(c.block_size)[:, None] * theta).cos()).mean(0)


def own_pairs(c, moments, p, rope):
    """For each layer the p pairs of each kv head that keep RoPE, (K, p) in order. 2-norm: those of the largest mean |q| · mean |k|."""
    if rope in ('high', 'low', 'uniform') or p == c.head_dim // 2:
        return [
            torch.tensor(
                [
                    list(
                        some_of(
                            c.head_dim // 2, p, 'high' if rope not in ('low', 'uniform') else rope
                        )
                    )
                ]
                * c.n_kv_head,
                dtype=torch.long,
            )
        ] * c.n_layer
    return [
        (
            m.k_norms
            * m.q_norms.unflatten(0, (c.n_kv_head, -1)).sum(1)
            * turning(c, rope).to(m.k_norms)
        )
        .topk(p)
        .indices.sort()
        .values
        for m in moments
    ]


def with_own_pairs(q, k, pairs):
    """
    q (H, D, C̃), k (K, D, C̃), pairs (K, p) -> q_nope (H, N, C̃), q_pe (H, P, C̃), k_nope (K, N, C̃), k_pe (P, C̃) and
    the frequency of each of the P / 2 = K p pairs of k_pe. A query is zero in the slots of other heads.
    """
    K, p = pairs.shape
    group = torch.arange(len(q), device=q.device) // (len(q) // K)
    kept = torch.zeros(K, q.size(1) // 2, dtype=torch.bool, device=q.device).scatter(1, pairs, True)
    rest = (~kept).nonzero()[:, 1].view(K, -1)
    q, k = paired(q), paired(k)
    heads = torch.arange(len(q), device=q.device)[:, None]
    q_pe = q.new_zeros(len(q), K, p, q.size(-1))
    q_pe[heads[:, 0], group] = q[heads, pairs[group]]
    own = torch.arange(K, device=q.device)[:, None]
    return (
        unpaired(q[heads, rest[group]]),
        unpaired(q_pe.flatten(1, 2)),
        unpaired(k[own, rest]),
        unpaired(k[own, pairs].flatten(0, 1)),
        pairs.flatten(),
    )


def paired(w):
    """(..., 2n, C̃) -> (..., n, C̃) complex."""
    return torch.complex(*w.chunk(2, dim=-2))


def unpaired(z):
    return torch.cat([z.real, z.imag], dim=-2)


def principal_components(q, k, cov, fold, real):
    """
    The kv heads' pairs of one frequency (or of `fold` neighbouring ones, taken for one: FreqFold) as principal components of
    the keys, each pair weighed by the power of the queries that it meets. RoRoPE (TransMLA, section 4.2) turns heads by
    real rotations; complex ones find all that commutes with RoPE. Yields for each run of frequencies
    js (f,), power (K f,) falling, there (m, K f) and back (K f, m): component = there · pairs, pairs = back · components.
    """
    zq, zk, seen_q, seen_k = (
        paired(w) for w in (q, k, *((q, k) if cov is None else (q @ cov, k @ cov)))
    )
    for js in torch.arange(zk.size(1), device=k.device).split(fold):
        cov_z = seen_k[:, js].flatten(0, 1) @ zk[:, js].flatten(0, 1).mH
        power = (seen_q[:, js] * zq[:, js].conj()).sum(-1).real
        weight = power.unflatten(0, (len(k), -1)).sum(1).flatten()
        weight = (weight + 1e-6 * weight.mean() + 1e-30).sqrt()
        values, vectors = torch.linalg.eigh(
            weight[:, None] * (cov_z.real if real else cov_z) * weight
        )
        values, vectors = values.flip(0), upright(vectors.flip(1)).to(cov_z.dtype)
        yield js, values.clamp(min=0), vectors.mH * weight, vectors / weight[:, None]


def shared_components(c, layers, covs, p, rope, fold, real):
    """
    The p components that keep RoPE, the same of all layers (so that one table of frequencies serves them): a list of
    (run, m). 2-norm and turn: by their power, as a share of the layer's; otherwise the first ones of some runs, then the second ones ...
    """
    runs = [
        list(principal_components(q, k, cov, fold, real)) for (q, k, _), cov in zip(layers, covs)
    ]
    if rope in ('2-norm', 'turn'):
        counts = turning(c, rope).split(fold)
        share = sum(
            torch.nn.utils.rnn.pad_sequence(
                [values.cpu() * count.mean() for (_, values, *_), count in zip(run, counts)],
                batch_first=True,
            )
            / sum(values.sum().item() for _, values, *_ in run)
            for run in runs
        )
        chosen = [divmod(i, share.size(1)) for i in share.flatten().topk(p).indices.tolist()]
    else:
        chosen, m = [], 0
        while len(chosen) < p:
            with_m = [r for r, (_, values, *_) in enumerate(runs[0]) if len(values) > m]
            chosen += [
                (with_m[i], m)
                for i in some_of(len(with_m), min(p - len(chosen), len(with_m)), rope)
            ]
            m += 1
    return runs, sorted(chosen, key=lambda run_m: (run_m[1], run_m[0]))


def with_shared_components(q, k, runs, chosen):
    """As with_own_pairs, but k_pe holds the chosen components, and N = D: k_nope is what they leave of the keys, q_nope the query as it was."""
    zq, zk = paired(q), paired(k)
    left, group = zk.clone(), len(q) // len(k)
    q_pe, k_pe, frequencies = [], [], []
    for r, m in chosen:
        js, values, there, back = runs[r]
        y = there[m] @ zk[:, js].flatten(0, 1)
        back = back[:, m].view(len(k), len(js))
        left[:, js] -= back[..., None] * y
        q_pe.append(
            torch.einsum('hf,hfc->hc', back.conj().repeat_interleave(group, dim=0), zq[:, js])
        )
        k_pe.append(y)
        frequencies.append(
            js[values.new_tensor([(back[:, f].abs() ** 2).sum() for f in range(len(js))]).argmax()]
        )
    everything = len(chosen) == zk.size(0) * zk.size(1)
    nope = 0 if everything else q.size(1)
    return (
        q[:, :nope],
        unpaired(torch.stack(q_pe, dim=1)),
        unpaired(left)[:, :nope],
        unpaired(torch.stack(k_pe)),
        torch.stack(frequencies),
    )
