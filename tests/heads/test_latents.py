"""What latents hold, against the latents of the model itself."""

import pytest
import torch

from nanomla.core.configurator import UserError
from nanomla.heads import latents


def test_latents_are_those_of_the_model(tiny, tokens):
    model, ids = tiny('mla'), tokens(20, B=12)
    found = latents.read_latents(model, ids, batch=5)
    assert found.shape == (2, 240, 12)
    x, rope = model.embed(ids)
    block = model.transformer.h[0]
    c_kv, _ = block.attn.latent(block.ln_1(x), rope)
    torch.testing.assert_close(found[0], c_kv.flatten(0, 1))


def test_shares_of_the_variance_rise_to_1(tiny, tokens):
    shares = latents.variance_shares(latents.read_latents(tiny('mla'), tokens(20, B=12)))
    assert (shares.diff(dim=1) >= -1e-9).all()
    assert shares[:, -1].tolist() == pytest.approx([1, 1])


def test_components_are_counted_up_to_a_share_of_the_variance():
    shares = torch.tensor([[0.5, 0.89, 0.95, 1.0], [0.9, 0.95, 0.97, 1.0]])
    assert latents.components_for(shares, 0.9).tolist() == [3, 1]


def test_likeness_is_1_for_a_layer_and_itself(tiny, tokens):
    alike = latents.likeness(latents.read_latents(tiny('mla'), tokens(20, B=12)))
    assert alike.diagonal().tolist() == pytest.approx([1, 1])
    assert alike[0, 1].item() == pytest.approx(alike[1, 0].item())
    assert 0 < alike[0, 1] < 1


def test_no_rotation_scaling_or_shift_changes_the_likeness(tiny, tokens):
    layer = latents.read_latents(tiny('mla'), tokens(20, B=12))[0]
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    both = torch.stack([layer, 3 * layer @ rotation + 5])
    assert latents.likeness(both)[0, 1].item() == pytest.approx(1, abs=1e-5)


def test_models_without_a_latent_are_refused(tiny, tokens):
    with pytest.raises(UserError, match='only MLA'):
        latents.read_latents(tiny(), tokens(20))
