"""Low-rank factors of keys and values: what becomes the latent of MLA."""

import torch

SMALL = 1024  # matrices up to this width are decomposed wholly and in float64 on a CPU


def upright(vectors):
    """
    Eigenvectors (n, r), each turned so that its largest entry is real and positive. Any sign or phase would do, and each device has
    its own, but the channels of a latent share groups of a quantised cache, whose rounding depends on them.
    """
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * (largest.conj() / largest.abs())


def top_eigen(a, r):
    """The r largest eigenvalues, falling, and eigenvectors (n, r) of a symmetric positive matrix; large ones on a CPU by subspace iteration."""
    n = len(a)
    if n <= SMALL or a.is_cuda or r > 0.7 * n:
        values, vectors = torch.linalg.eigh(a)
        return values.flip(0)[:r].clamp(min=0), upright(vectors.flip(1)[:, :r])
    basis = torch.randn(
        n, min(n, r + 64), dtype=a.dtype, generator=torch.Generator().manual_seed(0)
    ).to(a.device)
    for _ in range(4):
        basis = torch.linalg.qr(a @ (a @ basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ a @ basis)
    return values.flip(0)[:r].clamp(min=0), upright((basis @ vectors.flip(1))[:, :r])


def factor(m, r, root=None):
    """
    m (rows, C) ≈ up (rows, r) · down (r, C) with the least E |(m - up down) x|², where E[x xᵀ] = root rootᵀ (the identity if
    None), and the singular values s (r,) of m root. Both carry √s, so latents, like weights, are evenly scaled.
    """
    seen = m if root is None else m @ root
    if r >= min(m.shape) and max(m.shape) > SMALL and not m.is_cuda:  # nothing is left out
        rows, C = m.shape
        s = seen.norm(dim=0 if C <= rows else 1)
        return (
            (m, torch.eye(C, dtype=m.dtype), s)
            if C <= rows
            else (torch.eye(rows, dtype=m.dtype), m, s)
        )
    values, y = top_eigen(seen.T @ seen, min(r, *m.shape))
    s = values.sqrt()
    half = s.clamp(min=1e-6 * s.max().item() + 1e-30).sqrt()
    down = (
        y.T if root is None else torch.linalg.solve_triangular(root, y.T, upper=False, left=False)
    )  # yᵀ root⁻¹
    return seen @ y / half, down * half[:, None], s


def root_of(cov):
    """Lower triangular: root rootᵀ = cov, which is made a little larger, so that it has one."""
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    for jitter in (1e-6, 1e-4, 1e-2):  # the first one, unless rounding has left no more
        root, failed = torch.linalg.cholesky_ex(
            cov + (jitter * cov.diagonal().mean() + 1e-30) * eye
        )
        if not failed:
            break
    return root


def latent_factors(k, v, cov, r, low_rank):
    """
    k_nope ≈ up_k down, v ≈ up_v down for the weights k (K, N, C) and v (K, D, C): down (r, C), up_k (K, N, r), up_v (K, D, r)
    and the singular values (r,). cov (C, C) of the input, or None.

    split: k and v by themselves, half the rank each. joint: [k; v] at once (MHA2MLA, section 3.2). calibrated: the least error on
    inputs of this covariance. balanced: the same, of keys made as long as values, which else count for less (TransMLA, section 4.3).
    """
    (K, N, C), D = k.shape, v.size(1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    root = None if low_rank in ('split', 'joint') else root_of(cov)
    if low_rank == 'split':
        most_k, most_v = (min(w.shape) for w in (k, v))
        r_k = min(most_k, max(r // 2, r - most_v))
        pieces = [factor(w, rank) for w, rank in ((k, r_k), (v, r - r_k)) if rank]
        up, down, s = (
            torch.block_diag(*(up for up, _, _ in pieces)),
            torch.cat([down for _, down, _ in pieces]),
            torch.cat([s for *_, s in pieces]),
        )
        up = up if r_k else torch.cat([k.new_zeros(len(k), r), up])
    else:
        longer = (
            ((v @ cov * v).sum() / (k @ cov * k).sum().clamp(min=1e-30)).sqrt()
            if low_rank == 'balanced'
            else 1.0
        )
        up, down, s = factor(torch.cat([longer * k, v]), r, root)
        up = torch.cat([up[: K * N] / longer, up[K * N :]])
    return down, up[: K * N].reshape(K, N, len(down)), up[K * N :].reshape(K, D, len(down)), s


def share_out(spectra, total, step=8):
    """
    Ranks of all layers, `total` in sum: blocks of `step` singular values go to the layer where they carry the largest share
    of its energy. Every layer gets a block.
    """
    shares = [(s.double().cpu() ** 2 / (s.double().cpu() ** 2).sum()).split(step) for s in spectra]
    ranks = [len(blocks[0]) for blocks in shares]
    for gain, n, size in sorted(
        (
            (block.mean().item(), n, len(block))
            for n, blocks in enumerate(shares)
            for block in blocks[1:]
        ),
        reverse=True,
    ):
        if sum(ranks) + size <= total:
            ranks[n] += size
    return ranks


def kept_energy(whole, up_k, up_v, down, cov):
    """The share of E |[k_nope; v]|² that the latent carries, by the calibration text where there is one, else by the weights: 1 is all."""
    left = whole.to(down) - torch.cat([up_k.flatten(0, 1), up_v.flatten(0, 1)]) @ down
    power = [
        (w.to(down) @ cov[:-1, :-1] * w if cov is not None else w**2).sum().item()
        for w in (left, whole)
    ]
    return 1 - power[0] / max(power[1], 1e-30)
