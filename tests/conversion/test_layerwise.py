"""Layer-wise distillation: its closed form, what it fits to, and that the source stays."""

import pytest
import torch
from converting import assert_same_logits, converted

from nanomla.conversion.layerwise import (
    LayerwiseSettings,
    fit_layers,
    fit_output,
    layer_data,
    ridge_regression,
    robust_weights,
)

QUICK = LayerwiseSettings(steps=20, batch_size=10)


def test_ridge_regression_is_least_squares_of_a_longer_system():
    """|W y - t|² + λ |W - old|² over samples is least squares with λ's rows below them."""
    g = torch.Generator().manual_seed(0)
    y, t, old = (
        torch.randn(*size, dtype=torch.float64, generator=g) for size in ((50, 6), (50, 3), (3, 6))
    )
    strength = 0.1 * (y.T @ y).diagonal().mean()
    below = strength.sqrt() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([y, below]), torch.cat([t, below @ old.T])).solution.T
    torch.testing.assert_close(ridge_regression(y.T @ y, y.T @ t, old, 0.1), expected)


@pytest.mark.parametrize('name', ['gqa', 'biases', 'gpt2'])
def test_the_output_projection_solves_its_normal_equations(name, source, tokens):
    """Of the layer's weighted error, no small step of W^O makes less."""
    model, moments = source(name)
    mla, _ = converted(model, moments, kv_lora_rank=12)
    idx = tokens(24, B=30)
    x, rope = model.embed(idx)
    old, new = model.transformer.h[0], mla.transformer.h[0]
    data = layer_data(old, new, [x.detach()], [x.detach()], rope)
    fit_output(new.attn, data, rope, LayerwiseSettings(ridge=1e-9, batch_size=7))
    error = new.attn(data.inputs, rope) - data.targets
    (gradient,) = torch.autograd.grad((data.weights * error**2).mean(), new.attn.c_proj.weight)
    error = old.attn(data.inputs, rope) * 0.5 - data.targets
    (scale,) = torch.autograd.grad((data.weights * error**2).mean(), old.attn.c_proj.weight)
    assert gradient.abs().max() < 1e-3 * scale.abs().max()


def test_each_layer_leads_back_to_the_source(source, tokens):
    model, moments = source('gqa')
    mla, _ = converted(model, moments, kv_lora_rank=12, rope_pairs=2)
    block, old = mla.transformer.h[1], model.transformer.h[1]
    x, rope = model.embed(tokens(24))
    x_hat = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    data = layer_data(old, block, [x], [x_hat], rope)
    torch.testing.assert_close(data.inputs, block.ln_1(x_hat))
    torch.testing.assert_close(x_hat + data.targets, x + old.attn(old.ln_1(x), rope))
    assert (data.weights * data.targets**2).mean().item() == pytest.approx(1, rel=1e-5)


def test_a_token_that_went_astray_does_not_outweigh_the_others():
    x = torch.ones(100, 1, 4)
    drift = torch.full_like(x, 0.1)
    drift[7] = 1000.0
    errors = (robust_weights(x, drift) * drift.square()).mean(-1)
    assert errors[7] < 0.1 + 1e-6
    assert errors[8].item() == pytest.approx(0.01 / 1.1)


@pytest.mark.parametrize('name', ['gqa', 'biases', 'nope', 'gpt2'])
def test_fitting_brings_a_conversion_nearer_to_its_source(name, source, tokens):
    model, moments = source(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = dict(kv_lora_rank=12)
    if model.config.pos == 'rope':
        settings['rope_pairs'] = 2
    idx, unseen = tokens(24, B=30), tokens(24)
    distances = []
    for steps in (None, 0, 20):
        mla, _ = converted(model, moments, **settings)
        if steps is not None:
            how = LayerwiseSettings(steps=steps, batch_size=10)
            errors = fit_layers(model, mla, idx, how)
            assert len(errors) == 2
        distances.append((mla(unseen) - model(unseen)).square().mean().item())
    assert distances[0] > distances[1] > distances[2]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_what_is_exact_stays_exact(source, tokens):
    model, moments = source('gqa')
    mla, _ = converted(model, moments)
    errors = fit_layers(model, mla, tokens(24, B=30), LayerwiseSettings(steps=0))
    assert max(errors) < 1e-9
    assert_same_logits(mla, model, tokens(24))


@pytest.mark.gpu
def test_a_recorded_step_fits_as_on_a_cpu(source, tokens):
    model, moments = source('gqa')
    errors = []
    for device in ('cpu', 'cuda'):
        mla, _ = converted(model.cpu(), moments, kv_lora_rank=12, rope_pairs=2)
        errors.append(
            fit_layers(model.to(device), mla.to(device), tokens(24, B=30).to(device), QUICK)
        )
    torch.testing.assert_close(*map(torch.tensor, errors), rtol=0.05, atol=0)
