"""muon.py: one test for each thing it promises."""

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core.configurator import UserError
from nanomla.training.optim import (
    NEWTON_SCHULZ,
    MovingAverage,
    Muon,
    OptimizerSettings,
    load_moments,
    make_optimizers,
    orthogonalize,
    set_rate,
)


def matrix(rows, cols, low=0.05, seed=0):
    """A float64 matrix with known singular values from `low` to 1, and random vectors."""
    g = torch.Generator().manual_seed(seed)
    n = min(rows, cols)
    u, v = (
        torch.linalg.qr(torch.randn(size, n, generator=g, dtype=torch.float64)).Q
        for size in (rows, cols)
    )
    return u * torch.linspace(low, 1, n, dtype=torch.float64) @ v.T


def polynomial_of_singular_values(m, steps=5):
    """What Newton-Schulz does, by an SVD: x -> a x + b x³ + c x⁵ on singular values of m / |m|."""
    u, s, vt = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


SHAPES = [(24, 24), (16, 40), (40, 16), (1, 8), (8, 1), (33, 7)]


@pytest.mark.parametrize('rows, cols', SHAPES)
def test_singular_values_end_near_one(rows, cols):
    batch = torch.stack([matrix(rows, cols, seed=seed) for seed in range(4)])
    out = orthogonalize(batch)
    assert out.shape == batch.shape
    assert out.dtype == torch.float32
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.5
    assert values.max() < 1.5
    for given_, got in zip(batch, out):  # singular vectors stay: U Vᵀ within the same spread
        torch.testing.assert_close(
            got.double(), polynomial_of_singular_values(given_), rtol=0, atol=1e-4
        )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.floats(1e-3, 1e3))
def test_a_batch_is_orthogonalised_as_each_alone_whatever_its_size(rows, cols, n, size):
    batch = torch.stack(
        [matrix(rows, cols, low=0.2, seed=seed) * size ** (seed % 3 - 1) for seed in range(n)]
    )
    together, alone = orthogonalize(batch), torch.cat([orthogonalize(m[None]) for m in batch])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(together, orthogonalize(batch * size), rtol=0, atol=1e-3)


def test_zero_gradients_move_nothing():
    assert orthogonalize(torch.zeros(2, 6, 9)).eq(0).all()


# -------------------------------------------------------------------------------------------------


def params_and_grads(steps=4, shapes=SHAPES):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return params, [[torch.randn(shape) for shape in shapes] for _ in range(steps)]


def run(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_muon_moves_as_the_formula_says():
    params, grads = params_and_grads(shapes=[(12, 12), (12, 30), (30, 12)])
    expected, momenta = [p.detach().double().clone() for p in params], [0.0] * 3
    for step in grads:
        for n, g in enumerate(step):
            momenta[n] = 0.9 * momenta[n] + 0.1 * g.double()
            expected[n] *= 1 - 0.03 * 0.5
            move = polynomial_of_singular_values(0.1 * g.double() + 0.9 * momenta[n])
            expected[n] -= 0.03 * math.sqrt(max(1, g.size(0) / g.size(1))) * move
    moved = run(Muon(params, lr=0.03, momentum=0.9, weight_decay=0.5), params, grads)
    for p, e in zip(moved, expected):
        torch.testing.assert_close(p.double(), e, rtol=0, atol=2e-4)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon')
def test_muon_goes_where_torchs_goes():
    """Theirs iterates in bf16, so only directions and lengths can agree."""
    start, grads = params_and_grads(steps=1)
    ours, theirs = (copy.deepcopy(start) for _ in range(2))
    moved = run(Muon(ours, lr=0.02, momentum=0.95), ours, grads)
    expected = run(
        torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0), theirs, grads
    )
    for p, a, b in zip(start, moved, expected):
        a, b = (a - p).detach().flatten(), (b - p).detach().flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.99
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.05)


def test_stacked_matrices_move_as_if_apart():
    splits = [6, 10, 0, 4]
    whole = torch.nn.Parameter(torch.randn(20, 12))
    whole.splits = splits
    parts = [torch.nn.Parameter(t.detach().clone()) for t in whole.split(splits) if len(t)]
    other = torch.nn.Parameter(
        torch.randn(6, 12)
    )  # alike in shape, so it shares a batch with the first part
    grads = [torch.randn(20, 12) for _ in range(3)]
    run(Muon([whole, other], lr=0.1, weight_decay=0.1), [whole, other], [[g, g[:6]] for g in grads])
    run(
        Muon(parts, lr=0.1, weight_decay=0.1),
        parts,
        [[t for t in g.split(splits) if len(t)] for g in grads],
    )
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5)


def test_a_rate_may_be_a_tensor():
    start, grads = params_and_grads()
    plain, tensor = (copy.deepcopy(start) for _ in range(2))
    a = run(Muon(plain, lr=0.02, weight_decay=0.1), plain, grads)
    b = run(Muon(tensor, lr=torch.tensor(0.02), weight_decay=0.1), tensor, grads)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_parameters_without_gradient_stay():
    params, grads = params_and_grads(steps=1)
    optimizer = Muon(params, weight_decay=0.5)
    optimizer.step()
    params[0].grad = grads[0][0]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before)] == [False] + [True] * (
        len(params) - 1
    )


def test_muon_resumes_where_it_was_saved():
    start, grads = params_and_grads(steps=6)
    whole, halves = (copy.deepcopy(start) for _ in range(2))
    expected = run(Muon(whole, lr=0.02), whole, grads)
    first = Muon(halves, lr=0.02)
    run(first, halves, grads[:3])
    second = Muon(halves, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in zip(run(second, halves, grads[3:]), expected):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('which', ['adamw', 'muon'])
@pytest.mark.parametrize('tie', [True, False])
def test_optimizers_cover_every_parameter_once(kind, which, tie, tiny, tokens):
    model = tiny(kind, tie_weights=tie)
    made = make_optimizers(
        model,
        OptimizerSettings(
            which, learning_rate=1e-3, muon_lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)
        ),
    )
    covered = [id(p) for o in made for g in o.param_groups for p in g['params']]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    for o in made:
        for g in o.param_groups:
            assert g['lr'] == g['base_lr'] == (0.02 if isinstance(o, Muon) else 1e-3)
            for p in g['params']:
                assert g['weight_decay'] == (0.1 if p.ndim == 2 else 0.0)
                assert isinstance(o, Muon) == (
                    which == 'muon' and p.ndim == 2 and '.h.' in names[id(p)]
                )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(tokens(13), tokens(13).roll(-1)).backward()
    for o in made:
        o.step()
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_frozen_parameters_are_left_out(tiny):
    model = tiny()
    model.transformer.wpe.weight.requires_grad_(False)
    made = make_optimizers(model, OptimizerSettings('muon', 1e-3, 0.02, 0.1, (0.9, 0.95)))
    assert all(
        p is not model.transformer.wpe.weight
        for o in made
        for g in o.param_groups
        for p in g['params']
    )


def test_muon_may_be_alone(tiny):
    model = tiny('mla')
    for name, p in model.named_parameters():
        p.requires_grad_('kv_b_proj' in name)
    made = make_optimizers(model, OptimizerSettings('muon', 1e-3, 0.02, 0.0, (0.9, 0.95)))
    assert [type(o) for o in made] == [Muon]
    assert len(made[0].param_groups[0]['params']) == model.config.n_layer


@pytest.mark.parametrize('as_tensors', [False, True])
def test_set_rate_is_a_share_of_the_peak(as_tensors, tiny):
    made = make_optimizers(tiny(), OptimizerSettings('muon', 1e-3, 0.02, 0.1, (0.9, 0.95)))
    for o in made:
        for g in o.param_groups:
            g['lr'] = torch.tensor(g['lr']) if as_tensors else g['lr']
    kept = [g['lr'] for o in made for g in o.param_groups]
    for share in (0.5, 0.0, 1.0, 0.25):
        set_rate(made, share)
        for (g, peak), old in zip(
            [(g, 0.02 if isinstance(o, Muon) else 1e-3) for o in made for g in o.param_groups], kept
        ):
            # The tensor stays: a graph has read it.
            assert float(g['lr']) == pytest.approx(share * peak)
            assert not as_tensors or g['lr'] is old


@pytest.mark.gpu
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_tensor_rates_on_the_gpu_move_as_plain_ones(kind, tiny, tokens):
    moved, start = [], None
    for graph in (False, True):
        model = tiny(kind).cuda()
        start = [p.detach().clone() for p in model.parameters()]
        made = make_optimizers(
            model, OptimizerSettings('muon', 1e-3, 0.02, 0.1, (0.9, 0.95), graph=graph)
        )
        set_rate(made, 0.5)
        for _ in range(3):
            model(tokens(13).cuda(), tokens(13).roll(-1).cuda()).backward()
            for o in made:
                o.step()
                o.zero_grad()
        moved.append([p.detach().clone() for p in model.parameters()])
    for a, b, was in zip(
        *moved, start
    ):  # Muon's products are bf16: all that moves must agree, but not each element
        assert (a - b).norm() <= 0.05 * (a - was).norm()


# -------------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula(tiny):
    model = tiny()
    average, expected = (
        MovingAverage(model, 0.6),
        [p.detach().double().clone() for p in model.parameters()],
    )
    for step in range(12):
        for p, e in zip(model.parameters(), expected):
            p.data.normal_()
            decay = min(0.6, (1 + step) / (10 + step))
            e.mul_(decay).add_(p.detach().double(), alpha=1 - decay)
        average.update(step)
    for a, e in zip(average.average, expected):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=1e-6)


def test_swapped_in_restores_bit_for_bit(tiny, tokens):
    model = tiny()
    average = MovingAverage(model, 0.9)
    for p in model.parameters():
        p.data.normal_()
    average.update(0)
    own, ids = [p.detach().clone() for p in model.parameters()], [id(p) for p in model.parameters()]
    with pytest.raises(KeyError):  # even when an evaluation fails
        with average.swapped_in():
            for p, a in zip(model.parameters(), average.average):
                assert torch.equal(p, a)
            assert not torch.equal(model.lm_head.weight, own[0])
            raise KeyError
    for p, o in zip(model.parameters(), own):
        assert torch.equal(p, o)
    assert ids == [id(p) for p in model.parameters()]
    with average.swapped_in():
        pass
    for p, o in zip(model.parameters(), own):
        assert torch.equal(p, o)


def test_stacked_matrices_may_be_taken_whole():
    torch.manual_seed(0)
    stacked, update = torch.randn(24, 8), torch.randn(24, 8)
    moves = {}
    for split in (True, False):
        weight = torch.nn.Parameter(stacked.clone())
        weight.splits = [16, 8]
        weight.grad = update.clone()
        optimizer = Muon([weight], lr=1.0, momentum=0.0, split=split)
        optimizer.step()
        moves[split] = stacked - weight.detach()
    one = torch.nn.Parameter(stacked.clone())
    one.grad = update.clone()
    Muon([one], lr=1.0, momentum=0.0).step()
    assert torch.equal(moves[False], stacked - one.detach())
    assert not torch.allclose(moves[False], moves[True], atol=0.05)
    assert (
        torch.linalg.svdvals(moves[True][16:]) > 0.5
    ).all()  # each of its parts is orthogonal by itself


def test_the_setting_reaches_muon(tiny):
    for split in (True, False):
        assert (
            make_optimizers(
                tiny('mla'), OptimizerSettings('muon', 1e-3, 0.02, 0.1, (0.9, 0.95), split=split)
            )[1].split
            is split
        )


HEADS = {  # attention -> the shapes of what Muon per head orthogonalises in a layer of `tiny`
    'mha': {(8, 32): 12, (32, 32): 1},  # 4 heads of W^Q, W^K and W^V; W^O
    'gqa': {(8, 32): 8, (32, 32): 1},
    # W^UQ, W^QR; W^DKV, W^KR; W^UK, W^UV; W^O
    'mla': {(4, 32): 4 + 4 + 1, (12, 32): 1, (4, 12): 4, (8, 12): 4, (32, 32): 1},
}


@pytest.mark.parametrize('kind', HEADS)
def test_muon_per_head_orthogonalises_each_heads_rows_by_themselves(kind, tiny, tokens):
    torch.manual_seed(0)
    model = tiny('mha', n_kv_head=2) if kind == 'gqa' else tiny(kind)
    model(tokens(20), tokens(20)).backward()
    weights = [p for p in model.transformer.h[0].attn.parameters() if p.ndim == 2]
    before = [p.detach().clone() for p in weights]
    optimizer = Muon(weights, lr=1.0, momentum=0.0, heads=True)
    optimizer.step()
    found = Counter()
    for weight, old in zip(weights, before):
        rows = optimizer.rows_apart(weight)
        for moved, piece in zip((old - weight).split(rows), weight.grad.split(rows)):
            size = max(1, piece.size(0) / piece.size(1)) ** 0.5
            expected = size * polynomial_of_singular_values(piece)
            torch.testing.assert_close(moved.double(), expected, rtol=0, atol=2e-4)
            found[tuple(piece.shape)] += 1
    assert found == HEADS[kind]


@pytest.mark.parametrize('up', [0.25, 0.0])
def test_what_reads_a_latent_moves_by_a_share_of_the_rate(up, tiny, tokens):
    torch.manual_seed(0)
    whole, slow = [tiny('mla', q_lora_rank=12) for _ in range(2)]
    slow.load_state_dict(whole.state_dict())
    before = {n: p.detach().clone() for n, p in whole.named_parameters()}
    for model, share in ((whole, 1.0), (slow, up)):
        made = make_optimizers(
            model, OptimizerSettings('muon', 1e-3, 0.02, 0.1, (0.9, 0.95), up=share)
        )
        set_rate(made, 0.5)
        model(tokens(13), tokens(13).roll(-1)).backward()
        for o in made:
            o.step()
    for (name, fast), p in zip(whole.named_parameters(), slow.parameters()):
        behind = '.h.' in name and name.endswith(('q_b_proj.weight', 'kv_b_proj.weight'))
        torch.testing.assert_close(
            p - before[name], (up if behind else 1.0) * (fast - before[name]), rtol=1e-3, atol=1e-7
        )
    assert (
        len(
            make_optimizers(
                tiny('mha'), OptimizerSettings('muon', 1e-3, 0.02, 0.1, (0.9, 0.95), up=up)
            )[1].param_groups
        )
        == 1
    )


# -------------------------------------------------------------------------------------------------
# moments of a resumed run

SETTINGS = OptimizerSettings('adamw', 1e-3, 0.02, 0.1)


def trained(model, tokens, settings=SETTINGS, words=('',)):
    """Optimizers for the parameters of `model` with one of the words in their name, one step on."""
    for name, p in model.named_parameters():
        p.requires_grad_(any(word in name for word in words))
    made = make_optimizers(model, settings)
    model(tokens(13), tokens(13).roll(-1)).backward()
    for optimizer in made:
        optimizer.step()
        optimizer.zero_grad()
    return made


def states(made):
    """Parameter name -> what its optimizer remembers of it."""
    found = {}
    for optimizer in made:
        for group in optimizer.param_groups:
            for name, p in zip(group['param_names'], group['params']):
                found[name] = {key: value.clone() for key, value in optimizer.state[p].items()}
    return found


def same_states(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        for key in one[name]:
            assert torch.equal(one[name][key], other[name][key]), name
    return True


@pytest.mark.parametrize('named', [True, False], ids=['named', 'of before names'])
@pytest.mark.parametrize('which', ['adamw', 'muon'])
def test_moments_are_taken_over_and_options_are_not(which, named, tiny, tokens):
    model = tiny('mla')
    settings = OptimizerSettings(which, 1e-3, 0.02, 0.1)
    made = trained(model, tokens, settings)
    saved = [optimizer.state_dict() for optimizer in made]
    if not named:
        for old in saved:
            old['param_groups'] = [
                {k: v for k, v in group.items() if k != 'param_names'}
                for group in old['param_groups']
            ]
    again = make_optimizers(model, OptimizerSettings(which, 5e-3, 0.5, 0.0))
    load_moments(again, saved, 'last.pt')
    assert same_states(states(again), states(made))
    rates = {group['lr'] for optimizer in again for group in optimizer.param_groups}
    assert rates == ({5e-3, 0.5} if which == 'muon' else {5e-3})
    model(tokens(13), tokens(13).roll(-1)).backward()
    before = states(made)
    for optimizer in again:
        optimizer.step()
    assert same_states(states(made), before)  # copies: the file's tensors stay as they were


def test_moments_find_their_parameters_in_other_groups(tiny, tokens):
    """muon_up makes a group of its own of the matrices that read a latent."""
    model = tiny('mla')
    made = trained(model, tokens, OptimizerSettings('muon', 1e-3, 0.02, 0.1))
    again = make_optimizers(model, OptimizerSettings('muon', 1e-3, 0.02, 0.1, up=0.25))
    assert len(again[1].param_groups) == 2
    load_moments(again, [optimizer.state_dict() for optimizer in made], 'last.pt')
    assert same_states(states(again), states(made))


@pytest.mark.parametrize('named', [True, False], ids=['named', 'of before names'])
@pytest.mark.parametrize(
    'before, now',
    [
        (['attn.c_attn'], ['mlp.c_fc']),
        (['attn.c_attn'], ['attn.c_proj']),
        (['attn.c_attn'], ['attn.c_attn', 'mlp.c_fc']),
        (['attn.c_attn', 'mlp.c_fc'], ['mlp.c_fc']),
        ([''], ['attn']),
    ],
)
def test_other_parameters_are_refused_in_one_line(before, now, named, tiny, tokens):
    model = tiny()
    saved = [optimizer.state_dict() for optimizer in trained(model, tokens, words=before)]
    if not named:
        for group in saved[0]['param_groups']:
            del group['param_names']
    for name, p in model.named_parameters():
        p.requires_grad_(any(word in name for word in now))
    made = make_optimizers(model, SETTINGS)
    with pytest.raises(UserError, match='^last.pt was trained .* --init_from=last.pt$'):
        load_moments(made, saved, 'last.pt')
    assert not any(states(made).values())


def test_moments_of_another_optimizer_are_refused(tiny, tokens):
    model = tiny()
    words = ['attn.c_attn']  # which each of the two trains alone
    saved = [optimizer.state_dict() for optimizer in trained(model, tokens, words=words)]
    made = make_optimizers(model, OptimizerSettings('muon', 1e-3, 0.02, 0.1))
    with pytest.raises(UserError, match='with another optimizer of transformer.h.0.attn.c_attn'):
        load_moments(made, saved, 'last.pt')


def test_a_parameter_that_was_never_moved_has_nothing_to_take_over(tiny):
    model = tiny()
    made = make_optimizers(model, SETTINGS)
    load_moments(made, [optimizer.state_dict() for optimizer in made], 'last.pt')
    assert not any(states(made).values())
