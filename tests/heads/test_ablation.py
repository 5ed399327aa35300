"""What models lose without heads, against weights by hand and models without the head."""

import copy

import pytest
import torch
from handmade import by_hand, trial_of
from kinds import every_kind, shape_of

from model import Norm
from nanomla.heads import ablation, patterns

PREVIOUS, INDUCTION = [(0, 0)], [(1, 0)]
IDLE = [(0, 1), (0, 2), (1, 1)]


@pytest.fixture(scope='module', params=['mha', 'mla'])
def by_hand_ablation(request):
    """An Ablation of a model with one induction circuit, which nothing here changes."""
    model = by_hand(request.param)
    trial = trial_of(model, n=16)
    return ablation.Ablation(model, trial.repeated, trial.L)


def test_without_a_head_of_the_circuit_the_loss_rises(by_hand_ablation):
    assert by_hand_ablation.loss < 0.01
    for method in ('zero', 'mean'):
        assert by_hand_ablation.cost(INDUCTION, method) > 2, method
        assert by_hand_ablation.cost(PREVIOUS, method) > 2, method


def test_without_idle_heads_it_does_not(by_hand_ablation):
    assert by_hand_ablation.cost(IDLE) == pytest.approx(0, abs=1e-4)
    assert by_hand_ablation.cost([]) == 0


def test_the_previous_token_head_matters_for_where_others_look(by_hand_ablation):
    zero = by_hand_ablation.cost(PREVIOUS)
    assert by_hand_ablation.cost(PREVIOUS, 'pattern') < 0.1 * zero
    assert by_hand_ablation.cost(PREVIOUS, 'frozen') < 0.1 * zero


def test_nothing_comes_after_the_last_layer(by_hand_ablation):
    zero = by_hand_ablation.cost(INDUCTION)
    assert by_hand_ablation.cost(INDUCTION, 'pattern') == pytest.approx(zero, abs=1e-5)


def test_the_path_goes_by_the_keys(by_hand_ablation):
    assert by_hand_ablation.path(PREVIOUS, INDUCTION, 'K') > 2
    assert by_hand_ablation.path(PREVIOUS, INDUCTION, 'Q') == pytest.approx(0, abs=1e-3)
    assert by_hand_ablation.path(PREVIOUS, INDUCTION, 'V') == pytest.approx(0, abs=1e-3)
    assert by_hand_ablation.path(PREVIOUS, [(1, 1)], 'K') == pytest.approx(0, abs=1e-4)


def test_no_path_leads_backwards(by_hand_ablation):
    assert by_hand_ablation.path(INDUCTION, PREVIOUS, 'K') == 0


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('kind', ['mha', 'mla', 'mla with q latent'])
def test_with_patterns_and_scales_kept_nothing_but_sums_is_left(kind, norm, tiny, tokens):
    """Attention alone is then affine in what a head writes: half way to its mean is half way."""
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', mlp=False, bias=True, norm=norm, **changes).eval()
    ids = tokens(17, B=4)
    for module in model.modules():
        if isinstance(module, Norm):
            torch.nn.init.normal_(module.weight)
    ablated = ablation.Ablation(model, ids, 8)
    intact, half_way, at_mean = (towards_mean(model, ablated, ids, s) for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half_way, (intact + at_mean) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(at_mean, model.hidden(ids), atol=1e-5, rtol=1e-4)
    assert (intact - at_mean).abs().max() > 1e-3
    cost = ablated.loss_of(intact) - ablated.loss
    assert ablated.cost([(0, 0)], 'frozen') == pytest.approx(cost, abs=1e-5)


def towards_mean(model, ablated, ids, share):
    """Return the last stream with head 0.0 replaced by its mean but for a share of itself."""
    weight = torch.tensor([1 - share, 0, 0, 0])[:, None]  # of head 0 alone

    def edit(layer, y):
        return y.lerp(y.mean(0, keepdim=True), weight) if layer == 0 else None

    with (
        torch.no_grad(),
        ablation.edit_outputs(model, edit),
        patterns.watch_patterns(model, lambda layer, a: ablated.patterns[layer]),
        ablation.edit_norms(model, lambda norm, x: x * ablated.scales[norm]),
    ):
        return model.hidden(ids)


def test_a_constant_that_later_layers_count_on(tiny, tokens):
    """A head with a constant output costs something to zero, and nothing when its mean stays."""
    model, ids = tiny(kernel='eager', bias=True).eval(), tokens(21, B=6)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[-8:] = 0  # W^V of head 3: its bias alone is left
    ablated = ablation.Ablation(model, ids, 10)
    for method in ('zero', 'pattern'):
        assert abs(ablated.cost([(0, 3)], method)) > 1e-3, method
    for method in ('mean', 'frozen'):
        assert ablated.cost([(0, 3)], method) == pytest.approx(0, abs=1e-5), method


def test_frozen_is_more_than_its_mean(tiny, tokens):
    ablated = ablation.Ablation(tiny(kernel='eager', bias=True).eval(), tokens(21, B=6), 10)
    frozen = ablated.cost([(0, 2)], 'frozen')
    assert abs(frozen) > 1e-3
    assert abs(frozen - ablated.cost([(0, 2)], 'mean')) > 1e-3


@every_kind
def test_zero_ablation_is_the_model_without_the_head(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', **changes)
    trial = trial_of(model, n=8)
    ablated = ablation.Ablation(model, trial.repeated, trial.L)
    intact = loss_on_repeat(model, trial)
    assert ablated.loss == pytest.approx(intact, abs=1e-5)
    without = copy.deepcopy(model)
    heads = [(0, 2), (1, 1)]
    with torch.no_grad():
        for layer, head in heads:
            without.transformer.h[layer].attn.c_proj.weight.unflatten(1, (4, -1))[:, head] = 0
    cost = loss_on_repeat(without, trial) - intact
    assert ablated.cost(heads) == pytest.approx(cost, abs=1e-4)


@every_kind
def test_kept_patterns_change_nothing_for_the_last_layer_and_paths_do(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', **changes)
    trial = trial_of(model, n=8)
    ablated = ablation.Ablation(model, trial.repeated, trial.L)
    first, last = [[(layer, head) for head in range(4)] for layer in (0, 1)]
    assert ablated.cost(last, 'pattern') == pytest.approx(ablated.cost(last), abs=1e-5)
    assert sum(abs(ablated.path(first, last, reads)) for reads in 'QKV') > 1e-4


def loss_on_repeat(model, trial):
    """Return the loss over the tokens of the second copy that the first one predicts."""
    ids, L = trial.repeated, trial.L
    x = model.hidden(ids)[:, L + 1 : 2 * L]
    return patterns.token_losses(model, x, ids[:, L + 2 : 2 * L + 1]).mean().item()
