"""Components that kv heads share: the most that can be shared, and folded frequencies."""

import pytest
import torch
from converting import assert_same_logits, converted

from nanomla.conversion.calibration import measure
from nanomla.conversion.rope_pairs import principal_components
from nanomla.conversion.settings import ConversionSettings
from nanomla.conversion.source import layer_weights


@pytest.mark.parametrize('name', ['mha', 'gqa', 'biases'])
def test_complex_components_never_hold_less_than_real_ones(name, source):
    """Of each frequency, the m first components carry the largest m eigenvalues."""
    model, moments = source(name)
    for block, layer in zip(model.transformer.h, moments):
        q, k, _ = layer_weights(block.attn, torch.float64)
        by_complex, by_real = (
            list(principal_components(q, k, layer.cov, ConversionSettings(real=real)))
            for real in (False, True)
        )
        for a, b in zip(by_complex, by_real):
            assert (a.power.cumsum(0) >= b.power.cumsum(0) - 1e-9).all()
            assert a.power.sum().item() == pytest.approx(b.power.sum().item())
            eye = torch.eye(len(a.analysis), dtype=a.analysis.dtype)
            torch.testing.assert_close(a.synthesis @ a.analysis, eye)


def test_components_of_keys_alone_are_those_of_rorope(source):
    """
    TransMLA, section 4.2: of each frequency the eigenvectors of the keys' covariance over the kv
    heads, where the real and the imaginary parts count as samples of their own.
    """
    model, moments = source('gqa')
    q, k, _ = layer_weights(model.transformer.h[0].attn, torch.float64)
    settings = ConversionSettings(components='keys', real=True)
    found = list(principal_components(q, k, moments[0].cov, settings))
    x = torch.linalg.cholesky(moments[0].cov + 1e-12 * torch.eye(33)).T  # Σ x xᵀ = cov
    keys = torch.einsum('nc,kdc->nkd', x, k)  # (samples, K, D)
    for frequency, components in enumerate(found):
        samples = torch.cat([keys[:, :, frequency], keys[:, :, frequency + 4]])
        values, vectors = torch.linalg.eigh(samples.T @ samples)
        torch.testing.assert_close(components.power, values.flip(0), rtol=1e-6, atol=1e-9)
        overlap = (components.analysis.real @ vectors.flip(1)).abs()
        torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_layers_may_choose_their_own_components(source, tokens):
    model, moments = source('gqa')
    with torch.no_grad():  # one frequency has all the keys of a layer: the last and the first
        for block, loud in zip(model.transformer.h, (3, 0)):
            keys = block.attn.c_attn.weight[32:48].view(2, 2, 4, 32)
            keys[:, :, loud] *= 100
    moments = measure(model, tokens(24, B=30))
    mla, _ = converted(model, moments, rope_pairs=2, rope='2-norm', by_layer=True)
    assert [block.attn.rope_pairs.tolist() for block in mla.transformer.h] == [[3, 3], [0, 0]]


@pytest.mark.parametrize('name', ['mha', 'gqa', 'biases'])
def test_all_layers_share_one_choice_of_components(name, source):
    model, moments = source(name)
    mla, _ = converted(model, moments, rope_pairs=3, rope_heads='shared', rope='2-norm')
    assert mla.config.qk_rope_head_dim == 6
    assert mla.config.qk_nope_head_dim == model.config.head_dim
    layers = [block.attn.rope_pairs.tolist() for block in mla.transformer.h]
    assert layers == [layers[0]] * len(layers)
    mla, _ = converted(model, moments, rope_pairs=4, rope_heads='shared', rope='uniform')
    # As RoRoPE: the first component of each frequency.
    assert mla.transformer.h[0].attn.rope_pairs.tolist() == [0, 1, 2, 3]


def test_the_first_component_is_shared_without_loss_where_heads_are_alike(source, tokens):
    """
    Kv heads whose keys differ by a complex factor a frequency are one key: the first component of
    each frequency is all of them. Real rotations do not see it.
    """
    model, _ = source('gqa')
    factors = torch.polar(torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([0.3, 1.2, 2.0, -1.0]))
    for block in model.transformer.h:
        w = block.attn.c_attn.weight.data
        key = torch.complex(w[32:36], w[36:40]) * factors[:, None]
        w[40:44], w[44:48] = key.real, key.imag
    moments = measure(model, tokens(24, B=30))
    settings = dict(rope_heads='shared', rope='uniform', rope_pairs=4)
    by_complex, _ = converted(model, moments, **settings)
    assert_same_logits(by_complex, model, tokens(24), atol=1e-4)
    by_real, _ = converted(model, moments, real=True, **settings)
    assert (by_real(tokens(24)) - model(tokens(24))).abs().max() > 1e-2


def test_folded_frequencies(source, tokens):
    model, moments = source('mha')
    mla, _ = converted(model, moments, rope_heads='shared', rope_pairs=4, fold=2)
    assert set(mla.transformer.h[0].attn.rope_pairs.tolist()) <= {0, 1, 2, 3}

    # Where all frequencies are one, folding them loses nothing, and one pair holds more.
    model, moments = source('mha', rope_theta=1.0)
    mla, _ = converted(model, moments, rope_heads='shared', fold=4)
    assert_same_logits(mla, model, tokens(24))
    errors = []
    for fold in (1, 4):
        mla, _ = converted(model, moments, rope_heads='shared', rope_pairs=8, fold=fold)
        errors.append((mla(tokens(24)) - model(tokens(24))).square().mean())
    assert errors[1] < errors[0]
