"""Models of Hugging Face families, converted at full rank and full RoPE: nothing changes."""

import pytest
import torch
from converting import assert_refused, assert_same_logits, converted
from families import FAMILIES, hf_family

from nanomla.checkpoints import hf, native
from nanomla.conversion.calibration import measure

QK_NORM = ('qwen3', 'olmo2')


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    """family(name) -> a model of a family; each is made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            hf_family(folder, name)
            made[name] = hf.load(folder)[0].eval()
        return made[name]

    return make


@pytest.mark.parametrize('name', [name for name in FAMILIES if name not in QK_NORM])
@torch.no_grad()
def test_with_all_pairs_and_the_full_rank_nothing_changes(name, family, tokens):
    model = family(name)
    moments = measure(model, tokens(60, 50, B=8))
    for settings in (dict(rope_heads='own', low_rank='joint'), dict(rope_heads='shared')):
        mla, _ = converted(model, moments, **settings)
        assert_same_logits(mla, model, tokens(60, 50))
        for block in mla.transformer.h:
            block.attn.absorb = True
        assert_same_logits(mla, model, tokens(60, 50))


@torch.no_grad()
def test_a_part_of_the_pairs_leaves_layers_without_rope_as_they_were(family, tokens):
    """What has no RoPE loses nothing by it: at full rank such a layer is exact with any pairs."""
    model = family('smollm3_first')
    moments = measure(model, tokens(60, 50, B=8))
    mla, _ = converted(model, moments, rope_pairs=3)
    assert mla.config.nope_layers == (0,)
    x = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(0))
    _, tables = model.embed(tokens(60, 50))
    ours, theirs = mla.transformer.h, model.transformer.h
    torch.testing.assert_close(ours[0](x, tables), theirs[0](x, tables), rtol=0, atol=1e-5)
    assert (ours[1](x, tables) - theirs[1](x, tables)).abs().max() > 1e-3


@torch.no_grad()
def test_a_converted_family_is_a_checkpoint_like_any_other(family, tokens, tmp_path):
    mla, _ = converted(family('smollm3'), measure(family('smollm3'), tokens(60, 50, B=8)))
    args = native.model_args(mla)
    native.save(tmp_path / 'ckpt.pt', dict(kind='mla', model_args=args, model=mla.state_dict()))
    again = native.build(native.load(tmp_path / 'ckpt.pt')).eval()
    assert_same_logits(again, mla, tokens(60, 50), atol=0)


@pytest.mark.parametrize('name', QK_NORM)
def test_qk_norm_is_refused_with_the_reason(name, family):
    assert_refused('QK-norm.*normed after W', converted, family(name), low_rank='joint')
