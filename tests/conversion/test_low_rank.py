"""Low rank: each factorisation is the best by its own measure, and none is left to chance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.conversion.low_rank import (
    AttentionMetrics,
    LatentFactors,
    attention_factors,
    factor,
    fix_phases,
    latent_factors,
    root_of,
    share_out,
    share_out_by_residual,
    top_eigen,
)
from nanomla.conversion.source import layer_weights

WITHOUT_METRICS = ('split', 'joint', 'calibrated', 'balanced')


def error(w, up, down, root):
    return ((w - up @ down) @ root).square().sum().item()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    C=st.integers(1, 12),
    r=st.integers(1, 12),
    seed=st.integers(0, 99),
    calibrated=st.booleans(),
)
def test_factors_are_the_best_of_their_rank(rows, C, r, seed, calibrated):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, C, dtype=torch.float64, generator=g)
    scales = torch.logspace(0, -1, C, dtype=torch.float64)
    x = torch.randn(40, C, dtype=torch.float64, generator=g) * scales
    root = root_of(x.T @ x / 40) if calibrated else None
    up, down, s = factor(w, r, root)
    if root is None:
        root = torch.eye(C, dtype=torch.float64)
    best = torch.linalg.svdvals(w @ root)
    assert len(s) == min(r, rows, C)
    torch.testing.assert_close(s, best[:r], rtol=1e-5, atol=1e-6)
    least = (best[r:] ** 2).sum().item()
    assert error(w, up, down, root) == pytest.approx(least, rel=1e-4, abs=1e-9)
    # √s on either side
    torch.testing.assert_close(up.square().sum(0), s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((down @ root).square().sum(1), s, rtol=1e-4, atol=1e-5)


def test_large_matrices_by_subspace_iteration():
    """The r largest of a falling spectrum, by less than a quarter of a whole decomposition."""
    g = torch.Generator().manual_seed(0)
    n, r = 1100, 60
    u = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
    values = torch.arange(1, n + 1).float() ** -1.0
    found, vectors = top_eigen((u * values) @ u.T, r)
    torch.testing.assert_close(found, values[:r], rtol=1e-3, atol=0)
    assert (u[:, :r].T @ vectors).square().sum() > 0.99 * r


def test_each_factorisation_is_best_by_its_own_measure(source):
    model, moments = source('gqa')
    _, k, v = layer_weights(model.transformer.h[0].attn, torch.float64)
    cov, k, v = moments[0].cov[:-1, :-1], k[..., :-1], v[..., :-1]
    root, plain = root_of(cov), torch.eye(32, dtype=torch.float64)
    longer = (
        torch.einsum('kdc,ce,kde->', v, cov, v) / torch.einsum('kdc,ce,kde->', k, cov, k)
    ).sqrt()
    measures = dict(joint=(1, plain), calibrated=(1, root), balanced=(longer, root))
    found = {name: latent_factors(k, v, cov, 9, name) for name in WITHOUT_METRICS}
    for measure, (key_scale, root) in measures.items():
        losses = {}
        for name, factors in found.items():
            key_loss = error(k, factors.up_k, factors.down, root)
            losses[name] = key_scale**2 * key_loss + error(v, factors.up_v, factors.down, root)
        assert min(losses, key=losses.get) == measure, losses
        assert losses[measure] < 0.999 * max(losses.values()), losses


def test_attention_factors_have_the_least_error_by_its_metrics(source):
    model, moments = source('gqa')
    _, k, v = layer_weights(model.transformer.h[0].attn, torch.float64)
    cov, k, v = moments[0].cov[:-1, :-1], k[..., :-1], v[..., :-1]
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, 8, 8, dtype=torch.float64, generator=g) for _ in range(2))
    metrics = AttentionMetrics(a @ a.mT, b @ b.mT, cov)

    def loss(factors):
        total = 0
        for w, up, metric in ((k, factors.up_k, metrics.key), (v, factors.up_v, metrics.value)):
            lost = w - up @ factors.down
            total += torch.einsum('kdc,kde,kef,cf->', lost, metric, lost, cov).item()
        return total

    found = attention_factors(k, v, metrics, 9)
    others = [loss(latent_factors(k, v, cov, 9, name)) for name in WITHOUT_METRICS]
    assert loss(found) < 0.99 * min(others)
    step = 1e-3 * torch.randn(9, 32, dtype=torch.float64, generator=g)
    for sign in (1, -1):  # a minimum: no step to another latent helps
        moved = LatentFactors(found.down + sign * step, found.up_k, found.up_v, None)
        assert loss(moved) > loss(found)
    full = attention_factors(k, v, metrics, 32)
    torch.testing.assert_close(full.up_k @ full.down, k, atol=1e-6, rtol=0)
    torch.testing.assert_close(full.up_v @ full.down, v, atol=1e-6, rtol=0)


def test_split_halves_the_rank_as_far_as_it_goes(source):
    model, _ = source('gqa')
    _, k, v = layer_weights(model.transformer.h[0].attn, torch.float64)
    for k_width, rank, halves in (
        (8, 10, (5, 5)),
        (1, 10, (2, 8)),
        (0, 10, (0, 10)),
        (8, 31, (15, 16)),
        (8, 32, (16, 16)),
    ):
        factors = latent_factors(k[:, :k_width, :-1], v[..., :-1], None, rank, 'split')
        assert factors.down.shape == (rank, 32)
        assert factors.up_k.shape == (2, k_width, rank)
        assert len(factors.singular_values) == rank
        used = [(up.abs().sum((0, 1)) > 0).sum() for up in (factors.up_k, factors.up_v)]
        assert tuple(map(int, used)) == halves


def test_phases_of_eigenvectors_are_fixed():
    g = torch.Generator().manual_seed(4)
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=torch.complex128, generator=g)).Q
    fixed = fix_phases(vectors)
    phases = torch.polar(torch.ones(6), torch.arange(6.0))
    assert torch.allclose(fixed, fix_phases(vectors * phases))
    assert torch.allclose(fixed.mH @ fixed, torch.eye(6, dtype=torch.complex128))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(total=st.integers(20, 200), seed=st.integers(0, 99), full=st.integers(9, 60))
def test_a_budget_is_shared_out(total, seed, full):
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(full, generator=g).sort(descending=True).values
    second = torch.rand(full, generator=g).sort(descending=True).values ** 2
    ranks = share_out([first, second], total)
    assert sum(ranks) <= max(total, 16)
    assert all(0 < rank <= full for rank in ranks)
    assert sum(ranks) == min(2 * full, total) or sum(ranks) > min(2 * full, total) - 16


def test_a_budget_is_shared_out_by_what_is_left():
    """CARE's schedule by hand, from one rank each; depths count sqrt(4/3) and sqrt(2/3)."""
    first, second = torch.tensor([3.0, 1, 1, 0]).sqrt(), torch.tensor([3.0, 1, 1, 1]).sqrt()
    for total, ranks in (
        (3, [2, 1]),  # 1/2 · 1.15 against 1/3 · 0.82
        (4, [3, 1]),  # 1/1 · 1.15 / sqrt(2) against 1/3 · 0.82
        (5, [3, 2]),  # nothing is left of the first
        (20, [4, 4]),
    ):
        assert share_out_by_residual([first, second], total) == ranks
