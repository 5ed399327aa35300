"""GLA against its equations, and against MLA, which it is with one latent."""

import math

import pytest
import torch

from attentions.gla import GPT_GLA, GLAConfig
from model import rope_tables, rotate
from model_mla import GPT_MLA, MLAConfig

SHAPE = dict(
    n_layer=1, n_head=4, n_embd=32, block_size=16, vocab_size=20, kv_lora_rank=12, bias=False
)
SHAPE |= dict(qk_rope_head_dim=4)


@torch.no_grad()
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_the_heads_are_those_of_the_equations(groups):
    torch.manual_seed(1)
    model = GPT_GLA(GLAConfig(**SHAPE, latent_groups=groups)).double()
    attention = model.transformer.h[0].attn
    T, N, P, D, r = 9, 4, 4, 8, 12 // groups
    x = torch.randn(2, T, 32, dtype=torch.float64)
    rope = [table.double() for table in rope_tables(model.config, torch.arange(T))]

    q_nope, q_pe = attention.q_proj(x).split([4 * N, 4 * P], dim=-1)
    c_kv, k_pe = attention.kv_a_proj_with_mqa(x).split([12, P], dim=-1)
    c_kv = attention.kv_a_layernorm(c_kv)
    w_uk, w_uv = attention.kv_b_proj.weight.split([4 * N, 4 * D])
    k_pe = rotate(k_pe[:, :, None], rope)[:, :, 0]
    heads = []
    for h in range(4):
        group = h // (4 // groups)
        c = c_kv[..., group * r : (group + 1) * r]
        q = torch.cat(
            [
                q_nope[..., h * N : (h + 1) * N],
                rotate(q_pe[..., h * P : (h + 1) * P][:, :, None], rope)[:, :, 0],
            ],
            dim=-1,
        )
        k = torch.cat([c @ w_uk[h * N : (h + 1) * N].T, k_pe], dim=-1)
        v = c @ w_uv[h * D : (h + 1) * D].T
        logits = q @ k.mT / math.sqrt(N + P)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        heads.append(logits.masked_fill(future, -torch.inf).softmax(-1) @ v)
    expected = attention.c_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, rope), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize('absorb', [False, True])
def test_one_group_is_mla(absorb):
    model = GPT_MLA(MLAConfig(**SHAPE, absorb=absorb))
    grouped = GPT_GLA(GLAConfig(**SHAPE, absorb=absorb, latent_groups=1))
    grouped.load_state_dict(model.state_dict())
    idx = torch.randint(20, (2, 16))
    torch.testing.assert_close(grouped(idx), model(idx), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_absorbed_and_naive_agree(tiny, tokens):
    naive = tiny('gla', latent_groups=2)
    absorbed = tiny('gla', latent_groups=2, absorb=True)
    torch.testing.assert_close(absorbed(tokens(20)), naive(tokens(20)), rtol=1e-4, atol=1e-4)


def test_up_projections_are_smaller_by_the_number_of_groups():
    def size(groups):
        model = GPT_GLA(GLAConfig(**SHAPE, latent_groups=groups))
        return model.transformer.h[0].attn.kv_b_proj.weight.numel()

    assert size(1) == 2 * size(2) == 4 * size(4)


@pytest.mark.parametrize('groups', [0, 3, 8])
def test_groups_that_do_not_fit_are_refused(groups):
    with pytest.raises(ValueError, match=f'latent_groups={groups} must divide n_head=4'):
        GLAConfig(**SHAPE, latent_groups=groups)
