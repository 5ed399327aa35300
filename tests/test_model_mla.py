"""
model_mla.py: MLA against DeepSeek's own, against the paper's equations, and its two forms against
each other.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig, rope_tables
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention
from nanomla.checkpoints.native import MODELS

LATENT = dict(qk_norm=True, qk_norm_latent=True)
EARLY = dict(qk_rope_head_dim=0, latent_norm=False, latent_init='gpt2', pos='learned')


def attention(dtype=torch.float32, **shape):
    """An attention layer with random weights, biases and norms."""
    torch.manual_seed(0)
    shape = (
        dict(
            n_head=3,
            n_embd=30,
            kv_lora_rank=14,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=5,
        )
        | shape
    )
    config = MLAConfig(**shape)
    layer = MultiHeadLatentAttention(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(
                torch.randn(p.shape) * (p.size(1) ** -0.5 if p.ndim == 2 else 0.3)
                + ('layernorm' in name)
            )
    return layer, config


# -------------------------------------------------------------------------------------------------
# against transformers


def deepseek_rows(weight, first, second, heads):
    """
    Ours, all heads of `first` rows and then all heads of `second`, to DeepSeek's: head by head,
    both parts.
    """
    a, b = weight.split([heads * first, heads * second])
    return torch.cat(
        [
            torch.cat([a[h * first : (h + 1) * first], b[h * second : (h + 1) * second]])
            for h in range(heads)
        ]
    )


def interleaved(weight, width, rows_before, period):
    """
    Moves the RoPE rows of each `period` rows from halves, pair (k, k + width/2), to neighbours,
    (2k, 2k + 1).
    """
    weight = weight.clone()
    for start in range(rows_before, weight.size(0), period):
        old = weight[start : start + width].clone()
        for k in range(width // 2):
            weight[start + 2 * k], weight[start + 2 * k + 1] = old[k], old[k + width // 2]
    return weight


@pytest.mark.parametrize('interleave', [False, True])
@pytest.mark.parametrize('absorb', [False, True])
@pytest.mark.parametrize('q_lora_rank', [0, 9])
def test_mla_equals_deepseek_v3(q_lora_rank, absorb, interleave):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    ours, c = attention(
        q_lora_rank=q_lora_rank,
        absorb=absorb,
        bias=False,
        rope_theta=300.0,
        kernel='eager',
        qk_rope_head_dim=8,
    )
    N, P, D, H = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.n_head
    hf = DeepseekV3Config(
        hidden_size=c.n_embd,
        num_attention_heads=H,
        num_key_value_heads=H,
        kv_lora_rank=c.kv_lora_rank,
        q_lora_rank=q_lora_rank or None,
        qk_rope_head_dim=P,
        qk_nope_head_dim=N,
        v_head_dim=D,
        rope_interleave=interleave,
        rope_parameters=dict(rope_type='default', rope_theta=300.0),
    )
    hf._attn_implementation = 'eager'
    theirs = DeepseekV3Attention(hf, 0).eval()

    state = ours.state_dict()
    q = 'q_b_proj.weight' if q_lora_rank else 'q_proj.weight'
    state[q] = deepseek_rows(state[q], N, P, H)
    state['kv_b_proj.weight'] = deepseek_rows(state['kv_b_proj.weight'], N, D, H)
    if interleave:
        state[q] = interleaved(state[q], P, N, N + P)
        state['kv_a_proj_with_mqa.weight'] = interleaved(
            state['kv_a_proj_with_mqa.weight'], P, c.kv_lora_rank, c.kv_lora_rank + P
        )
    state['o_proj.weight'] = state.pop('c_proj.weight')
    theirs.load_state_dict(state)

    T = 11
    x, mask = torch.randn(2, T, c.n_embd), torch.full((1, 1, T, T), -torch.inf).triu(1)
    with torch.no_grad():
        expected = theirs(x, DeepseekV3RotaryEmbedding(hf)(x, torch.arange(T)[None]), mask)[0]
        torch.testing.assert_close(
            ours(x, rope_tables(c, torch.arange(T))), expected, rtol=0, atol=1e-5
        )


# -------------------------------------------------------------------------------------------------
# against the paper


def by_the_paper(x, w, c):
    """
    DeepSeek-V2, equations 9 to 19, head by head and position by position in float64; x (T, C) ->
    (T, C).
    """
    T, H, N, P, D = len(x), c.n_head, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim

    def bias(name):
        return w.get(f'{name}.bias', 0)

    def rms(t, gain=1.0, eps=2.0**-52):
        return t / (t.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def latent_norm(t, name):
        return rms(t, w[f'{name}.weight'], 1e-6) if c.latent_norm else t

    def rope(t, p):
        out = t.clone()
        for k in range(P // 2):
            angle = p / c.rope_scaling * c.rope_theta ** (-2 * k / P)
            out[k] = t[k] * math.cos(angle) - t[k + P // 2] * math.sin(angle)
            out[k + P // 2] = t[k + P // 2] * math.cos(angle) + t[k] * math.sin(angle)
        return out

    norm = rms if c.qk_norm else lambda t: t
    kv_a = torch.einsum('rc,tc->tr', w['kv_a_proj_with_mqa.weight'], x) + bias('kv_a_proj_with_mqa')
    c_kv = latent_norm(kv_a[:, : c.kv_lora_rank], 'kv_a_layernorm')  # eq. 9
    k_pe = [rope(norm(kv_a[t, c.kv_lora_rank :]), t) for t in range(T)]  # eq. 15
    if c.q_lora_rank:
        c_q = latent_norm(
            torch.einsum('rc,tc->tr', w['q_a_proj.weight'], x) + bias('q_a_proj'), 'q_a_layernorm'
        )  # eq. 12
        q = torch.einsum('qr,tr->tq', w['q_b_proj.weight'], c_q) + bias('q_b_proj')
    else:
        q = torch.einsum('qc,tc->tq', w['q_proj.weight'], x) + bias('q_proj')
    heads = []
    for h in range(H):
        w_uk, w_uv = (
            w['kv_b_proj.weight'][h * N : (h + 1) * N],
            w['kv_b_proj.weight'][H * N + h * D : H * N + (h + 1) * D],
        )
        k_nope, v = (
            torch.einsum('nr,tr->tn', w_uk, c_kv),
            torch.einsum('dr,tr->td', w_uv, c_kv),
        )  # eq. 10, 11
        q_nope, q_pe = q[:, h * N : (h + 1) * N], q[:, H * N + h * P : H * N + (h + 1) * P]
        if c.qk_norm_latent:
            size = [torch.cat([q_nope[t] @ w_uk, q_pe[t]]).square().mean().sqrt() for t in range(T)]
            q_nope, q_pe = (
                torch.stack([one[t] / size[t] for t in range(T)]) for one in (q_nope, q_pe)
            )
        else:
            q_nope, q_pe = norm(q_nope), norm(q_pe)  # eq. 13
        q_pe = [rope(q_pe[t], t) for t in range(T)]  # eq. 14
        rows = []
        for t in range(T):  # eq. 16 to 18
            logits = torch.stack(
                [
                    (q_nope[t] @ k_nope[j] + q_pe[t] @ k_pe[j])
                    / math.sqrt(c.kv_lora_rank + P if c.qk_norm_latent else N + P)
                    for j in range(t + 1)
                ]
            )
            rows.append(torch.einsum('j,jd->d', logits.softmax(0), v[: t + 1]))
        heads.append(torch.stack(rows))
    return torch.einsum('co,to->tc', w['c_proj.weight'], torch.cat(heads, dim=1)) + bias(
        'c_proj'
    )  # eq. 19


@pytest.mark.parametrize('absorb', [False, True])
@pytest.mark.parametrize(
    'case',
    [
        dict(),
        dict(q_lora_rank=9),
        dict(bias=False, rope_theta=200.0, rope_scaling=4.0),
        dict(qk_norm=True),
        dict(qk_norm=True, q_lora_rank=9),
        dict(latent_norm=False),
        EARLY,
        EARLY | dict(pos='none', latent_norm=True, q_lora_rank=9),
        EARLY | dict(qk_norm=True),
        LATENT,
        LATENT | dict(q_lora_rank=9),
    ],
    ids=str,
)
def test_mla_follows_the_equations(case, absorb):
    layer, c = attention(torch.float64, absorb=absorb, **case)
    x = torch.randn(2, 9, c.n_embd, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x, rope_tables(c, torch.arange(9)))
        expected = torch.stack([by_the_paper(row, layer.state_dict(), c) for row in x])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)  # RoPE's tables are fp32


def test_a_latent_as_wide_as_the_model_is_mha():
    """
    With W^DKV the identity, W^UK and W^UV are the W^K and W^V of MHA: the early block, without a
    bottleneck.
    """
    shape = dict(block_size=20, vocab_size=40, n_layer=1, n_head=3, n_embd=24)
    mha = GPT(GPTConfig(**shape))
    mla = GPT_MLA(MLAConfig(**shape, **EARLY, kv_lora_rank=24))
    state = mha.state_dict()
    a = 'transformer.h.0.attn.'
    w, b = state.pop(a + 'c_attn.weight'), state.pop(a + 'c_attn.bias')
    b[24:].zero_()  # W^UK | W^UV have no bias
    mha.transformer.h[0].attn.c_attn.bias.data.copy_(b)
    state |= {
        a + 'q_proj.weight': w[:24],
        a + 'q_proj.bias': b[:24],
        a + 'kv_b_proj.weight': w[24:],
        a + 'kv_a_proj_with_mqa.weight': torch.eye(24),
        a + 'kv_a_proj_with_mqa.bias': torch.zeros(24),
    }
    mla.load_state_dict(state)
    idx = torch.randint(40, (2, 20))
    for absorb in (False, True):
        mla.transformer.h[0].attn.absorb = absorb
        torch.testing.assert_close(mla(idx), mha(idx), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# naive and absorbed

FORMS = [
    dict(),
    dict(q_lora_rank=9),
    dict(qk_norm=True),
    dict(latent_norm=False),
    dict(qk_rope_head_dim=0, pos='learned'),
    dict(qk_rope_head_dim=0, pos='none', qk_norm=True),
    EARLY,
    dict(qk_nope_head_dim=6, v_head_dim=7, bias=False),
    dict(head_dim=4, v_head_dim=6),
    dict(kv_lora_rank=80),
    LATENT,
    LATENT | dict(qk_rope_head_dim=0, pos='none'),
]


@pytest.mark.parametrize('kernel', ['eager', 'sdpa'])
@pytest.mark.parametrize('form', FORMS, ids=str)
def test_naive_and_absorbed_agree(form, kernel, tiny, tokens):
    naive, absorbed = (
        tiny('mla', kernel=kernel, absorb=absorb, **form) for absorb in (False, True)
    )
    torch.testing.assert_close(naive(tokens(23)), absorbed(tokens(23)), rtol=0, atol=1e-5)
    for model in (naive, absorbed):
        model(tokens(23), tokens(23).roll(-1)).backward()
    for (name, a), b in zip(naive.named_parameters(), absorbed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5, msg=f'gradient of {name}')


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    H=st.integers(1, 4),
    N=st.integers(1, 9),
    pairs=st.integers(0, 4),
    D=st.integers(1, 9),
    R=st.integers(1, 20),
    q=st.integers(0, 6),
    T=st.integers(1, 17),
    latent_norm=st.booleans(),
    bias=st.booleans(),
)
def test_naive_and_absorbed_agree_in_any_shape(H, N, pairs, D, R, q, T, latent_norm, bias):
    layer, c = attention(
        n_head=H,
        n_embd=5 * H,
        qk_nope_head_dim=N,
        qk_rope_head_dim=2 * pairs,
        pos='rope' if pairs else 'none',
        v_head_dim=D,
        kv_lora_rank=R,
        q_lora_rank=q,
        latent_norm=latent_norm,
        bias=bias,
    )
    x, rope = torch.randn(2, T, c.n_embd), rope_tables(c, torch.arange(T))
    with torch.no_grad():
        naive, layer.absorb = layer(x, rope), True
        torch.testing.assert_close(layer(x, rope), naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('R, P', [(12, 4), (6, 0), (5, 8)])
def test_qk_norm_in_the_latent_bounds_logits_however_large_its_weights(R, P):
    layer, c = attention(
        **LATENT | dict(kv_lora_rank=R, qk_rope_head_dim=P, pos='rope' if P else 'none')
    )
    with torch.no_grad():
        layer.kv_a_layernorm.weight.fill_(1)
        layer.kv_b_proj.weight.mul_(1e3)
        layer.q_proj.weight.mul_(30)
        q, k, _ = layer.qkv(torch.randn(2, 40, c.n_embd), rope_tables(c, torch.arange(40)))
        logits = (q @ k.mT * layer.scale).abs()
    assert 1 < logits.max() <= (R + P) ** 0.5 * 1.0001
    assert logits.square().mean().sqrt() == pytest.approx(
        1, rel=0.2
    )  # as of random unit queries and keys


@pytest.mark.parametrize(
    'kind, set',
    [
        ('mha', {}),
        ('mha', dict(n_kv_head=1)),
        ('mla', {}),
        ('mla', LATENT),
        ('mla', dict(absorb=True)),
    ],
)
def test_softmax_scale_takes_the_place_of_the_width(tokens, tiny, kind, set):
    idx, (plain, same, twice) = (
        tokens(20),
        [tiny(kind, **set | scale) for scale in ({}, {}, dict(softmax_scale=0.9))],
    )
    for block in same.transformer.h:
        assert block.attn.scale != 0.9
        block.attn.scale = 0.9
    assert torch.equal(same(idx), twice(idx)) and (plain(idx) - twice(idx)).abs().max() > 1e-3
    with pytest.raises(ValueError, match='softmax_scale=-1'):
        tiny(kind, **set, softmax_scale=-1)


def test_qk_norm_in_the_latent_needs_both_norms(tiny):
    for off in (dict(qk_norm=False), dict(qk_norm=True, latent_norm=False)):
        with pytest.raises(ValueError, match='needs qk_norm=True and latent_norm=True'):
            tiny('mla', **off, qk_norm_latent=True)


def test_a_head_may_be_all_rope(tokens, tiny):
    forms = [tiny('mla', absorb=absorb, head_dim=8, qk_rope_head_dim=8) for absorb in (False, True)]
    assert forms[0].config.qk_nope_head_dim == 0
    torch.testing.assert_close(forms[0](tokens(20)), forms[1](tokens(20)), rtol=0, atol=1e-5)


def test_the_two_forms_share_weights_and_cache(tiny):
    naive, absorbed = tiny('mla'), tiny('mla', absorb=True)
    absorbed.load_state_dict(naive.state_dict())
    assert (
        naive.transformer.h[0].attn.cache_dims()
        == absorbed.transformer.h[0].attn.cache_dims()
        == dict(c_kv=12, k_pe=4)
    )


def test_qkv_is_what_the_softmax_sees(tiny):
    layer, c = attention()
    q, k, v = layer.qkv(torch.randn(2, 9, c.n_embd), rope_tables(c, torch.arange(9)))
    assert (
        q.shape == k.shape == (2, 3, 9, 10) and v.shape == (2, 3, 9, 5) and layer.scale == 10**-0.5
    )
    assert all(
        torch.equal(k[:, h, :, 6:], k[:, 0, :, 6:]) for h in range(3)
    )  # one k_pe for all heads


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('latent_norm', [True, False])
@pytest.mark.parametrize('nope, q_lora_rank, rank', [(0, 0, 24), (8, 20, 24), (8, 12, 6)])
def test_latents_start_orthogonal(latent_norm, nope, q_lora_rank, rank):
    torch.manual_seed(0)
    model = GPT_MLA(
        MLAConfig(
            block_size=8,
            vocab_size=40,
            n_layer=2,
            n_head=4,
            n_embd=64,
            kv_lora_rank=rank,
            q_lora_rank=q_lora_rank,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=16,
            latent_init='orthogonal',
            latent_norm=latent_norm,
        )
    )
    gain, x = 0.02 * 64**0.5 if latent_norm else 1.0, torch.randn(500, 64)
    for block in model.transformer.h:
        a = block.attn
        parts = [(a.kv_b_proj.weight, a.b_widths)] + (
            [(a.q_b_proj.weight, a.q_widths)] if q_lora_rank else []
        )
        heads = [
            head
            for weight, widths in parts
            for symbol in weight.split(widths)
            for head in symbol.chunk(4)
            if head.numel()
        ]
        assert len(heads) == 4 * (1 + (nope > 0)) + (4 * (1 + (nope > 0)) if q_lora_rank else 0)
        for head in heads:
            rows, cols = head.shape
            product = head @ head.T if rows <= cols else head.T @ head
            torch.testing.assert_close(
                product, gain**2 * max(1, rows / cols) * torch.eye(min(rows, cols))
            )
        v = a.kv_b_proj.weight[4 * nope :] @ a.kv_a_layernorm(a.kv_a_proj_with_mqa(x)[:, :rank]).T
        assert v.square().mean().sqrt().item() == pytest.approx(
            0.02 * 64**0.5, rel=0.1
        )  # the size of MHA's: W^V starts at 0.02
    with torch.device('meta'):
        GPT_MLA(model.config)


@pytest.mark.parametrize('init', ['gpt2', 'fan_in'])
@pytest.mark.parametrize('latent_init', ['gpt2', 'fan_in'])
def test_latents_start_by_fan_in(latent_init, init):
    model = GPT_MLA(
        MLAConfig(
            block_size=8,
            vocab_size=300,
            n_layer=2,
            n_head=4,
            n_embd=128,
            kv_lora_rank=64,
            q_lora_rank=96,
            latent_init=latent_init,
            init=init,
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 2 and '.h.' in name:
            latent = any(
                part in name for part in ('q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj')
            )
            expected = (
                p.size(1) ** -0.5
                if init == 'fan_in' or latent and latent_init == 'fan_in'
                else 0.02
            )
            expected /= math.sqrt(2 * 2) if 'c_proj' in name else 1
            assert p.std().item() == pytest.approx(expected, rel=0.04), name


def test_latent_norm_off_leaves_no_norm():
    names = [
        set(dict(attention(q_lora_rank=9, latent_norm=on)[0].named_parameters()))
        for on in (True, False)
    ]
    assert names[0] - names[1] == {'q_a_layernorm.weight', 'kv_a_layernorm.weight'}


def test_mla_differs_from_gpt_in_attention_alone(tiny):
    mha, mla = (
        {n for n, _ in tiny(kind).named_parameters() if '.attn.' not in n}
        for kind in ('mha', 'mla')
    )
    assert mha - mla == {'transformer.wpe.weight'} and mla < mha
    assert (MODELS['mha'], MODELS['mla']) == (GPT, GPT_MLA)


def test_an_mla_key_is_unknown_to_mha():
    with pytest.raises(TypeError, match='kv_lora_rank'):
        GPTConfig(kv_lora_rank=64)
    with pytest.raises(ValueError, match='every head reads the one latent'):
        MLAConfig(n_kv_head=1)
