"""conversion.py and calibration.py: exact where nothing is left out, RoPE masked as asked, each factorisation best by its own measure."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_py
from nanomla.checkpoints import export, load
from nanomla.checkpoints import hf as deepseek
from nanomla.checkpoints import native as checkpoint
from nanomla.conversion import calibration, low_rank, rope_pairs
from nanomla.conversion import convert as conversion
from nanomla.conversion.convert import HEADS, LOW_RANKS, ROPES, convert
from nanomla.core.configurator import UserError
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44, norm_eps=1e-5)
SOURCES = dict(
    gpt2=dict(act='gelu_tanh'),
    nanogpt=dict(bias=False),
    mha=LLAMA,
    gqa=LLAMA | dict(n_kv_head=2, rope_scaling=4.0),
    mqa=LLAMA | dict(n_kv_head=1, head_dim=12),
    biases=LLAMA | dict(bias=True, n_kv_head=2, tie_weights=False),
    nope=LLAMA | dict(pos='none', bias=True),
)


@pytest.fixture
def source(tiny, tokens):
    """source(name, **settings) -> model and its Moments."""

    def make(name='mha', **changes):
        model = tiny('mha', **SOURCES[name] | changes)
        return model, calibration.measure(model, tokens(24, B=30))

    return make


def close(a, b, idx, atol=1e-5):
    torch.testing.assert_close(a(idx), b(idx), rtol=0, atol=atol)


def refused(match, call, *args, **more):
    with pytest.raises(UserError, match=match) as error:
        call(*args, **more)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------
# exact


@pytest.mark.parametrize('name', SOURCES)
@pytest.mark.parametrize('low_rank', LOW_RANKS)
@pytest.mark.parametrize(
    'how',
    [
        dict(),
        dict(rope_heads='shared', q_lora_rank=32),
        dict(rotate=True),
        dict(rope_heads='shared', real=True, ranks='spectrum'),
    ],
    ids=str,
)
def test_with_all_pairs_and_the_full_rank_nothing_changes(name, low_rank, how, source, tokens):
    model, moments = source(name)
    if model.config.pos != 'rope':
        how = {key: value for key, value in how.items() if key not in ('rope_heads', 'real')}
    mla, layers = convert(
        model,
        moments if low_rank in LOW_RANKS[2:] else None,
        low_rank=low_rank,
        **dict(rope_heads='own') | how,
    )
    close(mla, model, tokens(24))
    assert all(layer['energy'] == pytest.approx(1, abs=1e-9) for layer in layers)
    for block in mla.transformer.h:
        block.attn.absorb = True
    close(mla, model, tokens(24))
    if low_rank == 'joint':
        C, K, D = model.config.n_embd, model.config.n_kv_head, model.config.head_dim
        assert mla.config.kv_lora_rank <= min(C, 2 * K * D)


def test_joint_rank_of_mha_is_lossless_at_d_model(source, tokens):
    model, _ = source('gpt2')
    mla, _ = convert(model, low_rank='joint', kv_lora_rank=32)
    assert mla.config.kv_lora_rank == model.config.n_embd == 32
    close(mla, model, tokens(24))
    refused(
        'kv_lora_rank=33 is above the full rank', convert, model, low_rank='joint', kv_lora_rank=33
    )


@pytest.mark.parametrize(
    'how', [dict(low_rank='joint'), dict(low_rank='joint', rope_heads='shared', q_lora_rank=32)]
)
def test_in_float32_where_matrices_are_large(how, source, tokens, monkeypatch):
    monkeypatch.setattr(low_rank, 'SMALL', 8)
    for name in ('mha', 'gqa'):
        model, _ = source(name)
        close(convert(model, None, rope='uniform', **how)[0], model, tokens(24), atol=3e-5)


# ---------------------------------------------------------------------------------------------------
# RoPE on some pairs


def masked_rotate(kept):
    """model.rotate for one layer that turns only pairs `kept` (heads, F); a head of q reads the row of its kv head."""

    def rotate(x, rope):
        cos, sin = rope
        mask = kept.repeat_interleave(x.size(2) // len(kept), dim=0)
        return model_py_rotate(x, (torch.where(mask, cos, 1.0), torch.where(mask, sin, 0.0)))

    return rotate


model_py_rotate = model_py.rotate


@pytest.mark.parametrize('name', ['mha', 'gqa', 'mqa', 'biases'])
@pytest.mark.parametrize('rope', ROPES)
@pytest.mark.parametrize('p', [1, 3])
def test_partial_rope_is_the_source_with_its_rope_masked(
    name, rope, p, source, tokens, monkeypatch
):
    model, moments = source(name)
    mla, _ = convert(model, moments, rope=rope, rope_pairs=p, rope_heads='own')
    F, K = model.config.head_dim // 2, model.config.n_kv_head
    masks = []
    for m, block in zip(moments, mla.transformer.h):
        if rope in ('2-norm', 'turn'):
            lost = [
                1.0
                if rope == '2-norm'
                else sum(
                    1 - math.cos(t * 10000 ** (-j / F) / model.config.rope_scaling)
                    for t in range(24)
                )
                for j in range(F)
            ]
            power = [
                [
                    (
                        lost[j]
                        * m.k_norms[k, j]
                        * sum(m.q_norms[h, j] for h in range(4) if h * K // 4 == k)
                    ).item()
                    for j in range(F)
                ]
                for k in range(K)
            ]
            kept = [sorted(sorted(range(F), key=lambda j: -row[j])[:p]) for row in power]
        else:
            kept = [
                dict(
                    high=list(range(p)),
                    low=list(range(F - p, F)),
                    uniform=[i * F // p for i in range(p)],
                )[rope]
            ] * K
        assert block.attn.rope_pairs.tolist() == sum(kept, [])
        masks.append(torch.tensor([[j in row for j in range(F)] for row in kept]))
    assert (
        mla.config.qk_rope_head_dim == 2 * p * K
        and mla.transformer.h[0].attn.cache_dims()['k_pe'] == 2 * p * K
    )
    expected, idx = [], tokens(24)
    x, tables = model.embed(idx)
    for block, kept in zip(model.transformer.h, masks):
        monkeypatch.setattr(model_py, 'rotate', masked_rotate(kept))
        x = block(x, tables)
    monkeypatch.undo()
    expected = model.lm_head(model.transformer.ln_f(x))
    torch.testing.assert_close(mla(idx), expected, rtol=0, atol=1e-5)
    assert (mla(idx) - model(idx)).abs().max() > 1e-3


def test_norms_of_pairs_are_means_over_tokens(source, tokens):
    model, moments = source('gqa')
    seen = []
    hook = model.transformer.h[0].attn.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model(tokens(24, B=30))
    hook.remove()
    x = seen[0].double().flatten(0, 1)
    q, k, _ = (x @ model.transformer.h[0].attn.c_attn.weight.double().T).split([32, 16, 16], dim=-1)
    for norms, t in (
        (moments[0].q_norms, q.view(-1, 4, 8)),
        (moments[0].k_norms, k.view(-1, 2, 8)),
    ):
        torch.testing.assert_close(
            norms, (t[..., :4] ** 2 + t[..., 4:] ** 2).sqrt().mean(0), rtol=1e-5, atol=0
        )
    torch.testing.assert_close(moments[0].cov[:32, :32], x.T @ x / len(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(moments[0].cov[32, :32], x.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['mha', 'gqa', 'biases'])
def test_shared_components_hold_the_most_that_can_be_shared(name, source, tokens):
    """Of each frequency, the m first components carry the largest m eigenvalues; complex mixtures never carry less than real ones."""
    model, moments = source(name)
    layers = [conversion.layer_weights(block.attn, torch.float64) for block in model.transformer.h]
    for (q, k, _), m in zip(layers, moments):
        both = [
            list(rope_pairs.principal_components(q, k, m.cov, 1, real)) for real in (False, True)
        ]
        for (_, by_complex, there, back), (_, by_real, *_) in zip(*both):
            assert (
                by_complex.cumsum(0) >= by_real.cumsum(0) - 1e-9
            ).all() and by_complex.sum().item() == pytest.approx(by_real.sum().item())
            torch.testing.assert_close(back @ there, torch.eye(len(there), dtype=there.dtype))
    p = 3
    mla, _ = convert(model, moments, rope_pairs=p, rope_heads='shared', rope='2-norm')
    assert (
        mla.config.qk_rope_head_dim == 2 * p
        and mla.config.qk_nope_head_dim == model.config.head_dim
    )
    assert {tuple(block.attn.rope_pairs.tolist()) for block in mla.transformer.h} == {
        tuple(mla.transformer.h[0].attn.rope_pairs.tolist())
    }
    mla, _ = convert(model, moments, rope_pairs=4, rope_heads='shared', rope='uniform')
    assert mla.transformer.h[0].attn.rope_pairs.tolist() == [
        0,
        1,
        2,
        3,
    ]  # RoRoPE: the first component of each frequency


def test_the_first_component_is_shared_without_loss_where_heads_are_alike(source, tokens):
    """Kv heads whose keys differ by a complex factor a frequency are one key: one component of each frequency is all of them; real rotations do not see it."""
    model, _ = source('gqa')
    for block in model.transformer.h:
        w = block.attn.c_attn.weight.data
        key = (
            torch.complex(w[32:36], w[36:40])
            * torch.polar(torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([0.3, 1.2, 2.0, -1.0]))[
                :, None
            ]
        )
        w[40:44], w[44:48] = key.real, key.imag
    moments = calibration.measure(model, tokens(24, B=30))
    close(
        convert(model, moments, rope_heads='shared', rope='uniform', rope_pairs=4)[0],
        model,
        tokens(24),
        atol=1e-4,
    )
    off = convert(model, moments, rope_heads='shared', rope='uniform', rope_pairs=4, real=True)[0](
        tokens(24)
    ) - model(tokens(24))
    assert off.abs().max() > 1e-2


def test_folded_frequencies(source, tokens):
    model, moments = source('mha')
    mla, _ = convert(model, moments, rope_heads='shared', rope_pairs=4, fold=2)
    assert set(mla.transformer.h[0].attn.rope_pairs.tolist()) <= {0, 1, 2, 3}
    model, moments = source(
        'mha', rope_theta=1.0
    )  # all frequencies are one: folding them loses nothing, and one pair holds more
    close(convert(model, moments, rope_heads='shared', fold=4)[0], model, tokens(24))
    kept = [
        (
            convert(model, moments, rope_heads='shared', rope_pairs=8, fold=fold)[0](tokens(24))
            - model(tokens(24))
        )
        .square()
        .mean()
        for fold in (1, 4)
    ]
    assert kept[1] < kept[0]


# ---------------------------------------------------------------------------------------------------
# low rank


def error(w, up, down, root):
    return ((w - up @ down) @ root).square().sum().item()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    C=st.integers(1, 12),
    r=st.integers(1, 12),
    seed=st.integers(0, 99),
    seen=st.booleans(),
)
def test_factors_are_the_best_of_their_rank(rows, C, r, seed, seen):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, C, dtype=torch.float64, generator=g)
    x = torch.randn(40, C, dtype=torch.float64, generator=g) * torch.logspace(
        0, -1, C, dtype=torch.float64
    )
    root = low_rank.root_of(x.T @ x / 40) if seen else None
    up, down, s = low_rank.factor(w, r, root)
    root = torch.eye(C, dtype=torch.float64) if root is None else root
    best = torch.linalg.svdvals(w @ root)
    assert len(s) == min(r, rows, C)
    torch.testing.assert_close(s, best[:r], rtol=1e-5, atol=1e-6)
    assert error(w, up, down, root) == pytest.approx(
        (best[r:] ** 2).sum().item(), rel=1e-4, abs=1e-9
    )
    torch.testing.assert_close(up.square().sum(0), s, rtol=1e-4, atol=1e-5)  # √s on either side
    torch.testing.assert_close((down @ root).square().sum(1), s, rtol=1e-4, atol=1e-5)


def test_large_matrices_by_subspace_iteration():
    """Against the whole decomposition, on a falling spectrum: the r largest, by less than a quarter of the work."""
    g = torch.Generator().manual_seed(0)
    n, r = 1100, 60
    u = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
    values = torch.arange(1, n + 1).float() ** -1.0
    found, vectors = low_rank.top_eigen((u * values) @ u.T, r)
    torch.testing.assert_close(found, values[:r], rtol=1e-3, atol=0)
    assert (u[:, :r].T @ vectors).square().sum() > 0.99 * r


def test_each_factorisation_is_best_by_its_own_measure(source):
    model, moments = source('gqa')
    _, k, v = conversion.layer_weights(model.transformer.h[0].attn, torch.float64)
    cov, k, v = moments[0].cov[:-1, :-1], k[..., :-1], v[..., :-1]
    seen, plain = low_rank.root_of(cov), torch.eye(32, dtype=torch.float64)
    longer = (
        torch.einsum('kdc,ce,kde->', v, cov, v) / torch.einsum('kdc,ce,kde->', k, cov, k)
    ).sqrt()
    measures = dict(joint=(1, plain), calibrated=(1, seen), balanced=(longer, seen))
    found = {how: low_rank.latent_factors(k, v, cov, 9, how)[:3] for how in LOW_RANKS}
    for measure, (scale, root) in measures.items():
        losses = {
            how: sum(
                (weight * (w - up @ down) @ root).square().sum().item()
                for weight, w, up in ((scale, k, up_k), (1, v, up_v))
            )
            for how, (down, up_k, up_v) in found.items()
        }
        assert min(losses, key=losses.get) == measure and losses[measure] < 0.999 * max(
            losses.values()
        ), (measure, losses)


def test_split_halves_the_rank_as_far_as_it_goes(source):
    model, _ = source('gqa')
    _, k, v = conversion.layer_weights(model.transformer.h[0].attn, torch.float64)
    for k_width, rank, halves in (
        (8, 10, (5, 5)),
        (1, 10, (2, 8)),
        (0, 10, (0, 10)),
        (8, 31, (15, 16)),
        (8, 32, (16, 16)),
    ):
        down, up_k, up_v, s = low_rank.latent_factors(
            k[:, :k_width, :-1], v[..., :-1], None, rank, 'split'
        )
        assert down.shape == (rank, 32) and up_k.shape == (2, k_width, rank) and len(s) == rank
        assert [int((up.abs().sum((0, 1)) > 0).sum()) for up in (up_k, up_v)] == list(halves)


@pytest.mark.parametrize('low_rank', LOW_RANKS)
def test_error_falls_with_rank(low_rank, source, tokens):
    model, moments = source('mha')
    errors, energies = [], []
    for rank in (4, 8, 16, 24, 32):
        mla, layers = convert(model, moments, rank, rope_pairs=2, rope='high', low_rank=low_rank)
        errors.append((mla(tokens(24)) - model(tokens(24))).square().mean().item())
        energies.append(sum(layer['energy'] for layer in layers))
    assert (
        energies == sorted(energies) and energies[-1] > 1.5 * energies[0] and errors[0] > errors[2]
    )


def test_a_rotation_changes_nothing_but_int4(source, tokens):
    model, moments = source('mha')
    a, b = (convert(model, moments, 16, rope_pairs=1, rotate=rotate)[0] for rotate in (False, True))
    close(a, b, tokens(24))
    assert not torch.allclose(
        *(m.transformer.h[0].attn.kv_b_proj.weight for m in (a, b)), atol=1e-3
    )


@pytest.mark.parametrize(
    'how',
    [
        dict(low_rank='joint'),
        dict(low_rank='split'),
        dict(rope_heads='own', rope='2-norm', low_rank='joint'),
    ],
    ids=str,
)
def test_signs_of_components_are_not_left_to_chance(how, source):
    """The channels of the residual stream in another order: eigenvectors that LAPACK, left alone, gives other signs and phases, which int4 would see."""
    model, moments = source('gqa')
    order = torch.randperm(model.config.n_embd, generator=torch.Generator().manual_seed(3))
    found = [convert(model, moments, 12, 3, **how)[0]]
    wide = torch.cat([order, torch.tensor([len(order)])])
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.copy_(block.attn.c_attn.weight[:, order].clone())
    found.append(
        convert(
            model,
            [calibration.Moments(m.cov[wide][:, wide], m.q_norms, m.k_norms) for m in moments],
            12,
            3,
            **how,
        )[0]
    )
    for a, b in zip(*(mla.transformer.h for mla in found)):
        assert torch.allclose(a.attn.kv_b_proj.weight, b.attn.kv_b_proj.weight, atol=1e-5)
        assert torch.allclose(
            a.attn.kv_a_proj_with_mqa.weight[:, order], b.attn.kv_a_proj_with_mqa.weight, atol=1e-5
        )
    vectors = torch.linalg.qr(
        torch.randn(6, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    ).Q
    assert torch.allclose(
        low_rank.upright(vectors),
        low_rank.upright(vectors * torch.polar(torch.ones(6), torch.arange(6.0))),
    ), 'phases'
    assert torch.allclose(
        low_rank.upright(vectors).mH @ low_rank.upright(vectors),
        torch.eye(6, dtype=torch.complex128),
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(total=st.integers(20, 200), seed=st.integers(0, 99), full=st.integers(9, 60))
def test_a_budget_is_shared_out(total, seed, full):
    g = torch.Generator().manual_seed(seed)
    spectra = [
        torch.rand(full, generator=g).sort(descending=True).values ** (n + 1) for n in range(2)
    ]
    ranks = low_rank.share_out(spectra, total)
    assert sum(ranks) <= max(total, 16) and all(0 < rank <= full for rank in ranks)
    assert sum(ranks) == min(2 * full, total) or sum(ranks) > min(2 * full, total) - 16


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    saving=st.floats(0, 0.99),
    K=st.sampled_from([1, 2, 4]),
    F=st.integers(2, 32),
    heads=st.sampled_from(HEADS),
    pos=st.sampled_from(['rope', 'learned']),
)
def test_what_is_left_by_a_saving(saving, K, F, heads, pos):
    """Never more than was asked for, and at most 8 numbers less unless nothing is lost."""
    c = model_py.GPTConfig(n_head=4, n_embd=8 * F, n_kv_head=K, pos=pos)
    pairs, rank = conversion.for_saving(c, saving, heads, 'joint')
    pe, left = 2 * pairs * (K if heads == 'own' else 1), (1 - saving) * 2 * K * 2 * F
    assert rank + pe <= left + 1e-6 or rank < 1
    assert rank + pe > left - 9 or rank >= conversion.full_rank(c, pairs, heads) - 8
    if rank >= 1:
        conversion.check(c, True, rank, pairs, 'turn', heads, 1, 'joint', 'equal', 0)


def test_ranks_by_layer(source, tokens, tmp_path):
    model, moments = source('mha')
    with torch.no_grad():  # the first layer's keys and values need little
        w = model.transformer.h[0].attn.c_attn.weight
        w[32:] = w[32:, :3] @ torch.randn(3, 32)
    moments = calibration.measure(model, tokens(24, B=30))
    mla, layers = convert(model, moments, 16, ranks='spectrum', rope_pairs=0, low_rank='calibrated')
    ranks = [block.attn.cache_dims()['c_kv'] for block in mla.transformer.h]
    assert (
        ranks == [layer['rank'] for layer in layers] == list(mla.config.kv_lora_ranks) == [8, 24]
        and mla.config.kv_lora_rank == 24
    )
    assert layers[0]['energy'] == pytest.approx(1, abs=1e-6)
    checkpoint.save(
        tmp_path / 'ckpt.pt',
        dict(kind='mla', model_args=checkpoint.model_args(mla), model=mla.state_dict()),
    )
    close(load.load_model(tmp_path).model.eval(), mla, tokens(24), atol=0)


# ---------------------------------------------------------------------------------------------------
# what comes out is a model like others


@pytest.mark.parametrize('name', ['gpt2', 'mha', 'gqa'])
@pytest.mark.parametrize('heads', HEADS)
def test_caches_hold_what_was_promised(name, heads, source, tokens):
    """L × (rope + rank) × bytes after generation, and the text of the naive form."""
    model, moments = source(name)
    rope = model.config.pos == 'rope'
    mla, layers = convert(model, moments, 10, rope_pairs=1 if rope else 0, rope_heads=heads)
    pe = 0 if not rope else 2 * (model.config.n_kv_head if heads == 'own' else 1)
    prompt = tokens(24)[:, :5]
    plain = torch.stack(list(generate(mla, prompt, 12, temperature=0)))
    for layout in ('dense', 'paged'):
        cache = Cache.of(mla, 2, 24, layout=layout, page_size=16)
        assert torch.equal(
            torch.stack(list(generate(mla, prompt, 12, temperature=0, cache=cache))), plain
        )
        assert cache.nbytes == 2 * (10 + pe) * 4 * cache.slots
    cache = Cache.of(mla, 2, 24, dtype='int4')
    assert len(list(generate(mla, prompt, 12, temperature=0, cache=cache))) == 12
    mla, layers = convert(
        model, moments, 12, rope_pairs=1 if rope else 0, rope_heads=heads, ranks='spectrum'
    )
    cache = Cache.of(mla, 2, 24)
    assert torch.equal(
        torch.stack(list(generate(mla, prompt, 12, temperature=0, cache=cache))),
        torch.stack(list(generate(mla, prompt, 12, temperature=0))),
    )
    assert cache.nbytes == sum(layer['rank'] + pe for layer in layers) * 4 * cache.slots


def test_perplexity_through_a_cache_is_that_without(source, tokens):
    model, moments = source('gqa')
    mla, _ = convert(model, moments, 12, rope_pairs=2)
    windows = tokens(22, B=5)
    expected = torch.nn.functional.cross_entropy(
        mla(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
    ).item()
    assert calibration.mean_loss(mla, windows, 2) == pytest.approx(expected, rel=1e-6)
    through = {
        dtype: calibration.mean_loss(
            mla,
            windows,
            2,
            lambda slots, size: Cache.of(mla, slots, size, dtype=dtype, window=4),
            chunk=4,
        )
        for dtype in ('float32', 'int8', 'int4')
    }
    assert through['float32'] == pytest.approx(expected, abs=1e-5) and through[
        'int8'
    ] == pytest.approx(expected, abs=0.02)
    assert abs(through['int4'] - expected) > abs(through['int8'] - expected)


EXPORTS = [
    dict(rope_heads='own'),
    dict(rope_heads='own', rope='uniform', rope_pairs=2, kv_lora_rank=8),
    dict(rope_heads='own', rope='2-norm', rope_pairs=1, kv_lora_rank=8, q_lora_rank=11),
    dict(rope_heads='shared', rope_pairs=3, kv_lora_rank=7, ranks='spectrum'),
    dict(rope_heads='shared', rope_pairs=4, rope='uniform', kv_lora_rank=7, rotate=True),
]


@pytest.mark.parametrize('name', ['mha', 'gqa', 'mqa'])
@pytest.mark.parametrize('how', EXPORTS, ids=str)
def test_exports_load_in_stock_transformers(name, how, source, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model, moments = source(name, head_dim=8)
    mla, _ = convert(model, moments, **how)
    export.export(mla, tmp_path / 'out')
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == 'DeepseekV3ForCausalLM'
    idx = tokens(24)
    torch.testing.assert_close(theirs.eval()(idx).logits, mla(idx), rtol=0, atol=1e-4)
    text = torch.stack(list(generate(mla, idx[:, :4], 15, temperature=0)), dim=1)
    assert torch.equal(theirs.generate(idx[:, :4], max_new_tokens=15, do_sample=False)[:, 4:], text)
    usual = theirs.config.rope_parameters['rope_type'] != 'longrope'
    assert usual == (
        how.get('rope') == 'uniform'
        and (name == 'mqa' or how.get('rope_heads') == 'shared')
        or name == 'mqa'
        and len(how) == 1
    )
    if usual:  # an ordinary DeepSeek-V3 that comes in again
        close(deepseek.load(tmp_path / 'out')[0].eval(), mla, idx, atol=1e-4)
    else:
        refused("RoPE of type 'longrope'", deepseek.load, tmp_path / 'out')
    assert (
        theirs.config.qk_rope_head_dim == mla.config.qk_rope_head_dim or how.get('rope') == '2-norm'
    )


def test_exports_that_have_no_place_there(source, tmp_path):
    for name, how, word in (
        ('gpt2', {}, 'pos=learned'),
        ('biases', {}, 'bias=True'),
        ('mha', dict(rope_pairs=0), 'pos=none'),
    ):
        refused(word, export.export, convert(*source(name), **how)[0], tmp_path / 'out')
    mla = convert(*source('mha'))[0]
    refused('float16', export.export, mla.half(), tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_bf16_exports_stay_close(source, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    mla = convert(*source('gqa'), rope_pairs=2, kv_lora_rank=12)[0].to(torch.bfloat16)
    export.export(mla, tmp_path / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=torch.float32).eval()
    ours, theirs = mla.float()(tokens(24)), theirs(tokens(24)).logits
    assert (ours - theirs).square().mean().sqrt() < 0.02 * ours.std()


# ---------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    'name, how, match',
    [
        (
            'mha',
            dict(rope_pairs=5, rope_heads='own'),
            'rope_pairs=5: the source has 4 pairs in a head; use 0 to 4',
        ),
        ('mha', dict(rope_pairs=-2), 'rope_pairs=-2'),
        ('gqa', dict(rope_pairs=9, rope_heads='shared'), '8 pairs in all kv heads together'),
        ('gpt2', dict(rope_pairs=1), 'pos=learned, which has no RoPE'),
        (
            'mha',
            dict(kv_lora_rank=33),
            'kv_lora_rank=33 is above the full rank of keys and values, 32',
        ),
        ('mha', dict(kv_lora_rank=-1), 'kv_lora_rank=-1'),
        ('mha', dict(q_lora_rank=33), 'q_lora_rank=33'),
        ('mha', dict(fold=2, rope_heads='own'), 'fold=2'),
        ('mha', dict(fold=0, rope_heads='shared'), 'fold=0'),
        (
            'mha',
            dict(rope='middle'),
            "rope='middle' is not known: use high, low, uniform, 2-norm, turn",
        ),
        ('mha', dict(low_rank='svd'), "low_rank='svd'"),
        ('mha', dict(ranks='best'), "ranks='best'"),
        ('mha', dict(rope_heads='all'), "rope_heads='all'"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(name, how, match, source):
    refused(match, convert, *source(name), **how)


def test_sources_that_cannot_be_converted_are_refused(tiny):
    refused('QK-norm', convert, tiny('mha', **LLAMA | dict(qk_norm=True)), low_rank='joint')
    refused('is an MLA model already', convert, tiny('mla'), low_rank='joint')
    refused('needs calibration text', convert, tiny('mha', **LLAMA), low_rank='balanced')
    refused(
        'needs calibration text',
        convert,
        tiny('mha', **LLAMA),
        low_rank='joint',
        rope_pairs=1,
        rope_heads='own',
    )
    convert(tiny('mha', **LLAMA), low_rank='joint', rope_pairs=1)
    convert(tiny('mha', **LLAMA), low_rank='joint', rope_pairs=1, rope='high')


def test_texts_too_short_are_refused(tmp_path):
    refused(
        'calibration: 50 tokens are too few: at least 65',
        calibration.windows_of,
        torch.arange(50).numpy(),
        1000,
        16,
        65,
    )
    refused('tokens are too few', calibration.windows_of, torch.arange(10).numpy(), 1000, 16)
    assert calibration.windows_of(torch.arange(100).numpy(), 40, 16).tolist() == [
        list(range(16)),
        list(range(84, 100)),
    ]
    (tmp_path / 'x.txt').write_text('abc' * 10)
    tokens, held_out, _ = calibration.tokens_of(
        str(tmp_path / 'x.txt'), 3, dict(tokenizer='char', chars='abc')
    )
    assert len(tokens) == 27 and held_out.tolist() == [0, 1, 2]
    refused(
        'never seen',
        calibration.tokens_of,
        str(tmp_path / 'x.txt'),
        2,
        dict(tokenizer='char', chars='ab'),
    )
    refused(
        'does not say what its 77 tokens are',
        calibration.tokens_of,
        str(tmp_path / 'x.txt'),
        77,
    )
    refused('no such file, and no dataset', calibration.tokens_of, 'nowhere', 77)
    assert calibration.perplexity(math.log(5)) == pytest.approx(5)
