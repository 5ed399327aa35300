"""The attentions of attentions/ against their papers' equations, head by head, in float64."""

import math

import pytest
import torch

from attentions.early import GPT_Early
from attentions.frozen import GPT_Frozen
from attentions.gated import GPT_Gated
from attentions.gated_mla import GPT_GatedMLA
from attentions.gta import GPT_GTA
from attentions.mfa import GPT_MFA
from attentions.sliced import GPT_Sliced
from attentions.tpa import GPT_TPA
from model import GPT, rope_tables, rotate
from model_mla import GPT_MLA

B, T, H, C, D = 2, 9, 4, 32, 8
SHAPE = dict(n_layer=1, n_head=H, n_embd=C, block_size=16, vocab_size=20, bias=False, pos='rope')
LATENT = dict(kv_lora_rank=12, qk_rope_head_dim=4)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make(model_class, **settings):
    """Return a model of one layer in float64 with weights that matter, and its attention."""
    torch.manual_seed(1)
    model = model_class(model_class.Config(**(SHAPE | settings))).double().eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(std=p.size(1) ** -0.5)
    return model, model.transformer.h[0].attn


def inputs(model):
    """Return x (B, T, C) and RoPE's tables in float64."""
    x = torch.randn(B, T, C, dtype=torch.float64)
    rope = rope_tables(model.config, torch.arange(T))
    if rope is not None:
        rope = [table.double() for table in rope]
    return x, rope


def turn(x, rope):
    """Rotate a single head x (B, T, D)."""
    return rotate(x[:, :, None], rope)[:, :, 0]


def softmax_attention(q, k, v):
    """One head: q, k, v (B, T, ...)."""
    logits = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def head_of(weight, h, width=D):
    return weight[h * width : (h + 1) * width]


def test_gated():
    model, attention = make(GPT_Gated)
    x, rope = inputs(model)
    w_q, w_k, w_v = attention.c_attn.weight.split([C, C, C])
    heads = []
    for h in range(H):
        q, k = turn(x @ head_of(w_q, h).T, rope), turn(x @ head_of(w_k, h).T, rope)
        gate = 1 / (1 + torch.exp(-x @ head_of(attention.gate.weight, h).T))
        heads.append(gate * softmax_attention(q, k, x @ head_of(w_v, h).T))
    same(attention(x, rope), attention.c_proj(torch.cat(heads, dim=-1)))


def test_an_open_gate_is_mha():
    model, attention = make(GPT_Gated, bias=True)
    attention.gate.weight.zero_()
    attention.gate.bias.fill_(40.0)
    plain, mha = make(GPT, bias=True)
    mha.load_state_dict(attention.state_dict(), strict=False)
    x, rope = inputs(model)
    same(attention(x, rope), mha(x, rope))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_gta(groups):
    model, attention = make(GPT_GTA, n_kv_head=groups)
    x, rope = inputs(model)
    w_s, w_kr = attention.kv_proj.weight.split([groups * D, D // 2])
    k_pe = turn(x @ w_kr.T, rope)
    heads = []
    for h in range(H):
        state = x @ head_of(w_s, h // (H // groups)).T
        q_nope, q_pe = (x @ head_of(attention.q_proj.weight, h).T).split(D // 2, dim=-1)
        q = torch.cat([q_nope, turn(q_pe, rope)], dim=-1)
        k = torch.cat([state[..., : D // 2], k_pe], dim=-1)
        heads.append(softmax_attention(q, k, state))
    same(attention(x, rope), attention.c_proj(torch.cat(heads, dim=-1)))


def outer_products(x, w_a, w_b, rank, rope):
    """Return 1/R Σ_r a_r ⊗ b_r of every token, (B, T, H, D), one product at a time."""
    total = torch.zeros(B, T, H, D, dtype=torch.float64)
    for r in range(rank):
        a, b = x @ head_of(w_a, r, H).T, x @ head_of(w_b, r).T
        if rope is not None:
            b = turn(b, rope)
        total += a[..., :, None] * b[..., None, :]
    return total / rank


def test_tpa():
    model, attention = make(GPT_TPA, tpa_rank=2, tpa_q_rank=3)
    x, rope = inputs(model)
    a_q, b_q = attention.q_proj.weight.split([3 * H, 3 * D])
    a_k, b_k, a_v, b_v = attention.kv_proj.weight.split([2 * H, 2 * D, 2 * H, 2 * D])
    q = outer_products(x, a_q, b_q, 3, rope)
    k = outer_products(x, a_k, b_k, 2, rope)
    v = outer_products(x, a_v, b_v, 2, None)
    heads = [softmax_attention(q[:, :, h], k[:, :, h], v[:, :, h]) for h in range(H)]
    same(attention(x, rope), attention.c_proj(torch.cat(heads, dim=-1)))


def test_tpa_with_a_unit_vector_for_each_head_is_mha():
    model, attention = make(GPT_TPA, tpa_rank=H, tpa_q_rank=H, bias=True)
    plain, mha = make(GPT, bias=True)
    w_q, w_k, w_v = mha.c_attn.weight.split([C, C, C])
    units = H * torch.eye(H).flatten().double()  # times H, as the products are averaged
    blank = torch.zeros(H * H, C).double()
    attention.q_proj.weight.copy_(torch.cat([blank, w_q]))
    attention.q_proj.bias.copy_(torch.cat([units, torch.zeros(C)]))
    attention.kv_proj.weight.copy_(torch.cat([blank, w_k, blank, w_v]))
    attention.kv_proj.bias.copy_(torch.cat([units, torch.zeros(C), units, torch.zeros(C)]))
    attention.c_proj.load_state_dict(mha.c_proj.state_dict())
    x, rope = inputs(model)
    same(attention(x, rope), mha(x, rope))


def test_mfa():
    model, attention = make(GPT_MFA, mfa_q_rank=10, head_dim=12)
    x, rope = inputs(model)
    w_dq, w_k, w_v = attention.down.weight.split([10, 12, 12])
    c_q = x @ w_dq.T
    c_q = c_q / (c_q.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    k, v = turn(x @ w_k.T, rope), x @ w_v.T
    heads = []
    for h in range(H):
        q = turn(c_q @ head_of(attention.q_up.weight, h, 12).T, rope)
        heads.append(softmax_attention(q, k, v))
    same(attention(x, rope), attention.c_proj(torch.cat(heads, dim=-1)))


def latent_heads(attention, x, rope, c_kv, w_kr):
    """What MLA's heads gather, each (B, T, D), for latents c_kv (B, T, 12) before their norm."""
    c_kv = c_kv / (c_kv.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    w_uq, w_qr = attention.q_proj.weight.split([H * 4, H * 4])
    w_uk, w_uv = attention.kv_b_proj.weight.split([H * 4, H * D])
    k_pe = turn(x @ w_kr.T, rope)
    heads = []
    for h in range(H):
        q_pe = turn(x @ head_of(w_qr, h, 4).T, rope)
        q = torch.cat([x @ head_of(w_uq, h, 4).T, q_pe], dim=-1)
        k = torch.cat([c_kv @ head_of(w_uk, h, 4).T, k_pe], dim=-1)
        heads.append(softmax_attention(q, k, c_kv @ head_of(w_uv, h).T))
    return heads


def latent_reference(attention, x, rope, c_kv, w_kr):
    """MLA's output for latents c_kv (B, T, 12) before their norm."""
    heads = latent_heads(attention, x, rope, c_kv, w_kr)
    return attention.c_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize('absorb', [False, True])
def test_gated_mla(absorb):
    model, attention = make(GPT_GatedMLA, **LATENT, absorb=absorb)
    x, rope = inputs(model)
    w_dkv, w_kr = attention.kv_a_proj_with_mqa.weight.split([12, 4])
    heads = []
    for h, gathered in enumerate(latent_heads(attention, x, rope, x @ w_dkv.T, w_kr)):
        gate = 1 / (1 + torch.exp(-x @ head_of(attention.gate.weight, h).T))
        heads.append(gate * gathered)
    same(attention(x, rope), attention.c_proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize('absorb', [False, True])
@pytest.mark.parametrize(
    'settings',
    [
        dict(softmax_scale=0.25, qk_norm=True, head_dim=4, v_head_dim=8),  # no content keys
        dict(q_lora_rank=10, qk_nope_head_dim=6, v_head_dim=7, bias=True),
    ],
    ids=['only_rope', 'unequal'],
)
def test_a_gate_of_one_half_and_twice_the_output_is_mla(settings, absorb):
    model, attention = make(GPT_GatedMLA, **LATENT, **settings, absorb=absorb)
    other, mla = make(GPT_MLA, **LATENT, **settings, absorb=absorb)
    state = attention.state_dict()
    mla.load_state_dict({name: p for name, p in state.items() if not name.startswith('gate.')})
    attention.gate.weight.zero_()
    attention.c_proj.weight.mul_(2)
    x, rope = inputs(model)
    same(attention(x, rope), mla(x, rope))


@pytest.mark.parametrize('model_class', [GPT_Gated, GPT_GatedMLA])
def test_a_gate_starts_as_any_matrix_and_is_orthogonalised_by_head(model_class):
    latent = {}
    if model_class is GPT_GatedMLA:
        latent = dict(LATENT, latent_init='orthogonal')
    model = model_class(model_class.Config(**SHAPE, init='gpt2', **latent))
    weight = model.transformer.h[0].attn.gate.weight
    assert weight.heads == [H]
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize('absorb', [False, True])
def test_sliced_latent(absorb):
    model, attention = make(GPT_Sliced, **LATENT, absorb=absorb)
    x, rope = inputs(model)
    w_kr = attention.k_pe_proj.weight
    same(attention(x, rope), latent_reference(attention, x, rope, x[..., :12], w_kr))


@pytest.mark.parametrize('absorb', [False, True])
def test_frozen_latent(absorb):
    model, attention = make(GPT_Frozen, **LATENT, absorb=absorb)
    x, rope = inputs(model)
    w_kr = attention.k_pe_proj.weight
    same(attention(x, rope), latent_reference(attention, x, rope, x @ attention.w_dkv.T, w_kr))


def test_the_frozen_projection_is_saved_and_not_trained():
    model, attention = make(GPT_Frozen, **LATENT)
    assert 'transformer.h.0.attn.w_dkv' in model.state_dict()
    assert not any(name.endswith('w_dkv') for name, _ in model.named_parameters())
    product = attention.w_dkv @ attention.w_dkv.T  # it was drawn in fp32
    torch.testing.assert_close(product, torch.eye(12).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize('model_class', [GPT_Sliced, GPT_Frozen])
def test_a_given_latent_is_mla_with_that_down_projection(model_class):
    model, attention = make(model_class, **LATENT)
    other, mla = make(GPT_MLA, **LATENT)
    w_dkv = torch.eye(12, C).double()
    if model_class is GPT_Frozen:
        w_dkv = attention.w_dkv
    state = attention.state_dict()
    state['kv_a_proj_with_mqa.weight'] = torch.cat([w_dkv, state.pop('k_pe_proj.weight')])
    state.pop('w_dkv', None)
    mla.load_state_dict(state)
    x, rope = inputs(model)
    same(attention(x, rope), mla(x, rope))


def test_early_is_mla_without_position_and_norm():
    model, attention = make(GPT_Early, n_latent=12)
    assert model.config.pos == 'learned'
    assert attention.cache_dims() == dict(c_kv=12, k_pe=0)
    x, rope = inputs(model)
    assert rope is None
    c = x @ attention.kv_a_proj_with_mqa.weight.T
    w_uk, w_uv = attention.kv_b_proj.weight.split([C, C])
    heads = []
    for h in range(H):
        q = x @ head_of(attention.q_proj.weight, h).T
        heads.append(softmax_attention(q, c @ head_of(w_uk, h).T, c @ head_of(w_uv, h).T))
    same(attention(x, rope), attention.c_proj(torch.cat(heads, dim=-1)))
