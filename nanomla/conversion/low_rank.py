"""
Low-rank factors of keys and values: what becomes the latent of MLA.

Legend: K kv heads, N and D the widths of k_nope and v in a head, C channels, R the rank of the
latent.
"""

from dataclasses import dataclass

import torch

SMALL = 1024  # wider matrices are decomposed only in part, and in fp32 as a rule, on a CPU
OVERSAMPLING = 64  # columns of a subspace beyond those that are asked for
SUBSPACE_ITERATIONS = 4
RANK_BLOCK = 8  # singular values that `share_out` gives to a layer at a time
TINY = 1e-30  # keeps a quotient of zeros finite


@dataclass
class LatentFactors:
    """
    k_nope ≈ up_k · down and v ≈ up_v · down, in the words of MLA W^UK, W^UV and W^DKV.

    down (R, C), up_k (K, N, R), up_v (K, D, R); singular_values (R,), falling except for 'split'.
    """

    down: torch.Tensor
    up_k: torch.Tensor
    up_v: torch.Tensor
    singular_values: torch.Tensor

    def cut(self, rank: int) -> 'LatentFactors':
        """Return the first `rank` channels of the latent."""
        return LatentFactors(
            self.down[:rank],
            self.up_k[..., :rank],
            self.up_v[..., :rank],
            self.singular_values[:rank],
        )

    def rotated(self, generator: torch.Generator) -> 'LatentFactors':
        """
        Return the same functions with the latent rotated at random.

        No channel stands out then, which helps a cache that quantises groups of channels.
        """
        size = len(self.down)
        gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
        rotation = torch.linalg.qr(gaussian).Q.to(self.down)
        return LatentFactors(
            rotation @ self.down,
            self.up_k @ rotation.T,
            self.up_v @ rotation.T,
            self.singular_values,
        )


# -------------------------------------------------------------------------------------------------
# linear algebra


def fix_phases(vectors: torch.Tensor) -> torch.Tensor:
    """
    Return eigenvectors (n, r) whose largest entries are real and positive.

    Any sign or phase is right, and each device has its own. But the channels of a latent share
    groups of a quantised cache, whose rounding depends on them.
    """
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * (largest.conj() / largest.abs())


def top_eigen(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the r largest eigenvalues, falling, and eigenvectors (n, r) of a positive matrix (n, n).

    Large matrices on a CPU go through a subspace iteration (Halko et al. 2011, algorithm 4.4).
    """
    n = len(matrix)
    if n <= SMALL or matrix.is_cuda or r > 0.7 * n:
        values, vectors = torch.linalg.eigh(matrix)
        vectors = vectors.flip(1)[:, :r]
    else:
        generator = torch.Generator().manual_seed(0)
        columns = min(n, r + OVERSAMPLING)
        basis = torch.randn(n, columns, dtype=matrix.dtype, generator=generator).to(matrix.device)
        for _ in range(SUBSPACE_ITERATIONS):
            basis = torch.linalg.qr(matrix @ (matrix @ basis)).Q
        values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
        vectors = (basis @ vectors.flip(1))[:, :r]
    return values.flip(0)[:r].clamp(min=0), fix_phases(vectors)


def root_of(cov: torch.Tensor) -> torch.Tensor:
    """
    Return a lower triangular root with root · rootᵀ = cov, a little enlarged so that there is one.
    """
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    for jitter in (1e-6, 1e-4, 1e-2):  # the first, unless rounding has left no positive matrix
        enlarged = cov + (jitter * cov.diagonal().mean() + TINY) * eye
        root, failed = torch.linalg.cholesky_ex(enlarged)
        if not failed:
            break
    return root


def factor(
    matrix: torch.Tensor, r: int, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Factor a matrix (rows, C) into up (rows, r) · down (r, C) with the least squared error.

    The error is E |(matrix - up · down) x|² over inputs x.
    root: root · rootᵀ = E[x xᵀ]; None is the identity. The solution is the truncated SVD of
    matrix · root (ASVD, SVD-LLM). Returns up, down and the singular values s (r,). Both factors
    carry √s, so that latents, like weights, have one scale.
    """
    weighted = matrix
    if root is not None:
        weighted = matrix @ root
    nothing_left_out = r >= min(matrix.shape)
    if nothing_left_out and max(matrix.shape) > SMALL and not matrix.is_cuda:
        return exact_factors(matrix, weighted)

    values, vectors = top_eigen(weighted.T @ weighted, min(r, *matrix.shape))
    s = values.sqrt()
    half = s.clamp(min=1e-6 * s.max().item() + TINY).sqrt()
    down = vectors.T
    if root is not None:  # vectorsᵀ · root⁻¹
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return weighted @ vectors / half, down * half[:, None], s


def exact_factors(
    matrix: torch.Tensor, weighted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor a large matrix into itself and the identity, which saves its decomposition."""
    rows, C = matrix.shape
    if C <= rows:
        return matrix, torch.eye(C, dtype=matrix.dtype), weighted.norm(dim=0)
    return torch.eye(rows, dtype=matrix.dtype), matrix, weighted.norm(dim=1)


# -------------------------------------------------------------------------------------------------
# one latent for keys and values


def latent_factors(
    k: torch.Tensor, v: torch.Tensor, cov: torch.Tensor | None, r: int, low_rank: str
) -> LatentFactors:
    """
    Return the factors of rank r for the weights k (K, N, C) and v (K, D, C).

    cov (C, C) is that of the input, or None. low_rank is one of
    split: k and v by themselves, half the rank each;
    joint: [k; v] at once (MHA2MLA, section 3.2);
    calibrated: the least error on inputs of this covariance;
    balanced: the same, after the keys were made as long as the values, since they would count for
    more or less otherwise (TransMLA, section 4.3).
    """
    K, N, D = len(k), k.size(1), v.size(1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    if low_rank == 'split':
        up, down, s = split_factors(k, v, r)
    elif low_rank == 'joint':
        up, down, s = factor(torch.cat([k, v]), r)
    else:
        longer = 1.0
        if low_rank == 'balanced':
            longer = (power(v, cov) / power(k, cov).clamp(min=TINY)).sqrt()
        up, down, s = factor(torch.cat([longer * k, v]), r, root_of(cov))
        up = torch.cat([up[: K * N] / longer, up[K * N :]])
    up_k = up[: K * N].reshape(K, N, len(down))
    up_v = up[K * N :].reshape(K, D, len(down))
    return LatentFactors(down, up_k, up_v, s)


@dataclass
class AttentionMetrics:
    """
    What errors of keys and values do to the output of an attention, to first order.

    key (K, N, N): an error δ of k_nope costs δᵀ key δ. It moves a logit by scale · q · δ, and the
    output by that times the spread of the values that the query chooses from:
    Σ over the query heads of scale² · value_spread · E[q qᵀ].
    value (K, D, D): an error δ of v costs δᵀ value δ, Σ over the query heads of W^Oᵀ W^O.
    cov (C, C): of the input, where each token counts half by itself and half by the attention that
    it receives. The first token takes most of that in many models, and is one of hundreds.
    """

    key: torch.Tensor
    value: torch.Tensor
    cov: torch.Tensor


def attention_factors(
    k: torch.Tensor, v: torch.Tensor, metrics: AttentionMetrics, r: int
) -> LatentFactors:
    """Return the factors of k (K, N, C) and v (K, D, C) whose errors cost an attention least."""
    K, N, D = len(k), k.size(1), v.size(1)
    key_root, value_root = root_of_metric(metrics.key), root_of_metric(metrics.value)
    weighted = torch.cat([(key_root @ k).flatten(0, 1), (value_root @ v).flatten(0, 1)])
    up, down, s = factor(weighted, r, root_of(metrics.cov))
    up_k = torch.linalg.solve(key_root, up[: K * N].reshape(K, N, len(down)))
    up_v = torch.linalg.solve(value_root, up[K * N :].reshape(K, D, len(down)))
    return LatentFactors(down, up_k, up_v, s)


def root_of_metric(metric: torch.Tensor) -> torch.Tensor:
    """Return symmetric roots of metrics (K, n, n), a little enlarged so that they have inverses."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=0)
    values = values + 1e-6 * values.mean(-1, keepdim=True) + TINY
    return vectors * values.sqrt()[:, None] @ vectors.mT


def split_factors(
    k: torch.Tensor, v: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor k (rows, C) and v by themselves, half of r each as far as their ranks go."""
    most_k, most_v = min(k.shape), min(v.shape)
    r_k = min(most_k, max(r // 2, r - most_v))
    up_v, down_v, s_v = factor(v, r - r_k)
    if r_k == 0:
        return torch.cat([k.new_zeros(len(k), r), up_v]), down_v, s_v
    up_k, down_k, s_k = factor(k, r_k)
    return torch.block_diag(up_k, up_v), torch.cat([down_k, down_v]), torch.cat([s_k, s_v])


def power(weights: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    """Return E |weights · x|² for weights (rows, C) and inputs x of E[x xᵀ] = cov."""
    return (weights @ cov * weights).sum()


def kept_energy(weights: torch.Tensor, factors: LatentFactors, cov: torch.Tensor | None) -> float:
    """
    Return the share of E |weights · x|² that the latent keeps; 1 is all.

    weights (K (N + D), C) are those of k_nope and v; cov (C, C), None for the weights' own norm.
    """
    up = torch.cat([factors.up_k.flatten(0, 1), factors.up_v.flatten(0, 1)])
    lost = weights.to(factors.down) - up @ factors.down
    if cov is None:
        lost_power, whole_power = (lost**2).sum(), (weights**2).sum()
    else:
        lost_power, whole_power = power(lost, cov), power(weights.to(factors.down), cov)
    return 1 - lost_power.item() / max(whole_power.item(), TINY)


def share_out(spectra: list[torch.Tensor], total: int, step: int = RANK_BLOCK) -> list[int]:
    """
    Share `total` ranks out among layers by their singular values.

    A block of `step` values goes to the layer where it carries the largest share of the layer's
    energy. Every layer gets a block.
    """
    ranks, candidates = [], []  # candidates: (share a rank, layer, size) of each further block
    for layer, spectrum in enumerate(spectra):
        energy = spectrum.double().cpu() ** 2
        first, *others = (energy / energy.sum()).split(step)
        ranks.append(len(first))
        candidates += [(block.mean().item(), layer, len(block)) for block in others]
    for _, layer, size in sorted(candidates, reverse=True):
        if sum(ranks) + size <= total:
            ranks[layer] += size
    return ranks


def share_out_by_residual(spectra: list[torch.Tensor], total: int) -> list[int]:
    """
    Share `total` ranks out among L layers as CARE does (Zhou et al. 2026, adjusted-rank schedule).

    One rank at a time goes to the layer l with rank r of the largest share of what is left there,

        σ²_{r+1} / Σ_{j>r} σ²_j · sqrt((L - l) / mean of L - l) / sqrt(r / least)

    where earlier layers count for more and wide ones for less. Every layer gets `least`, half of
    the mean.
    """
    L, least = len(spectra), max(1, total // len(spectra) // 2)
    ranks = [min(least, len(spectrum)) for spectrum in spectra]
    energies = [spectrum.double().cpu() ** 2 for spectrum in spectra]
    left = [energy.flip(0).cumsum(0).flip(0).clamp(min=TINY) for energy in energies]  # Σ_{j>r}

    def gain(layer: int) -> float:
        r = ranks[layer]
        if r >= len(energies[layer]):
            return -1.0
        depth = ((L - layer) / ((L + 1) / 2)) ** 0.5
        return (energies[layer][r] / left[layer][r]).item() * depth / (r / least) ** 0.5

    gains = [gain(layer) for layer in range(L)]
    for _ in range(total - sum(ranks)):
        best = max(range(L), key=gains.__getitem__)
        if gains[best] < 0:
            break
        ranks[best] += 1
        gains[best] = gain(best)
    return ranks
