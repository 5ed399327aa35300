"""
model.py: one test for each thing it promises. model_mla.py's variants join where the promise is
common.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, hf_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from model import CHOICES, GPT, GPTConfig, rope_tables
from model_mla import GPT_MLA, MLAConfig
from nanomla.checkpoints.gpt2 import from_pretrained
from nanomla.inference.generate import Sampling, choose, generate

UNEQUAL = {
    'mla_absorbed',
    'mla_q_lora_absorbed',
    'mla_qk_norm_absorbed',
    'mla_unequal',
}  # q wider than v: no flash
SHAPES = (
    'gpt2',
    'gqa',
    'mqa',
    'mla',
    'mla_absorbed',
    'mla_early_absorbed',
    'mla_unequal',
)  # each that attend() can get; for slow kernels
every_variant = pytest.mark.parametrize('variant', VARIANTS)
every_kernel = pytest.mark.parametrize('kernel', CHOICES['kernel'])
all_that_run_on_the_cpu = pytest.mark.parametrize(
    'variant, kernel',
    [
        (v, k)
        for v in VARIANTS
        for k in ('eager', 'sdpa', 'flash', 'flex')
        if not (k == 'flash' and v in UNEQUAL or k == 'flex' and v not in SHAPES)
    ],
)


@pytest.fixture
def plain_flex(monkeypatch):
    """
    FlexAttention's own unfused form: the same mask and mathematics without half a minute of
    compiling, and without the compiler's front end, which would trace every length anew.
    """
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr(flex, '_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True)
    monkeypatch.setattr(model_file, 'compiled_flex', lambda: flex.flex_attention)


def one_line(error):
    return '\n' not in str(error.value) and len(str(error.value)) > 20


# -------------------------------------------------------------------------------------------------
# against transformers


@pytest.mark.parametrize('form', ['safetensors', 'bin', 'bare keys'])
def test_gpt2_has_the_logits_of_transformers(form, tmp_path, tokens):
    theirs = hf_gpt2()
    theirs.save_pretrained(tmp_path)
    if form != 'safetensors':
        # What transformers wrote before. OpenAI's files have no 'transformer.' prefix, but masks.
        state = theirs.state_dict()
        if form == 'bare keys':
            state = {
                k.removeprefix('transformer.'): v for k, v in state.items() if k != 'lm_head.weight'
            }
            state['h.0.attn.bias'] = torch.ones(1, 1, 20, 20).tril()
            state['h.0.attn.masked_bias'] = torch.tensor(-1e4)
        torch.save(state, tmp_path / 'pytorch_model.bin')
        (tmp_path / 'model.safetensors').unlink()
    idx = tokens(20, 50)
    torch.testing.assert_close(
        from_pretrained(tmp_path).eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5
    )


def test_loss_is_transformers_shifted_loss(tmp_path, tokens):
    theirs = hf_gpt2()
    theirs.save_pretrained(tmp_path)
    idx = tokens(20, 50)
    targets = torch.cat([idx[:, 1:], torch.full((2, 1), -1)], dim=1)  # -1 does not count
    ours = from_pretrained(tmp_path).eval()(idx, targets)
    torch.testing.assert_close(ours, theirs(idx, labels=idx).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'case',
    [
        dict(),
        dict(n_kv_head=2),
        dict(n_kv_head=1),
        dict(qk_norm=True),
        dict(qk_norm=True, n_kv_head=2),
        dict(rope_theta=500.0),
        dict(rope_scaling=4.0),
        dict(n_kv_head=2, rope_theta=1e5, rope_scaling=4.0, tie_weights=True, head_dim=12),
    ],
    ids=str,
)
def test_llama_has_the_logits_of_transformers(case, tokens):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    ours = GPT(
        GPTConfig(
            **(
                dict(
                    block_size=20,
                    vocab_size=50,
                    n_layer=2,
                    n_head=4,
                    n_embd=32,
                    n_inner=44,
                    bias=False,
                    pos='rope',
                    norm='rmsnorm',
                    norm_eps=1e-6,
                    act='swiglu',
                    tie_weights=False,
                )
                | case
            )
        )
    ).eval()
    c = ours.config
    rope = dict(rope_type='default', rope_theta=c.rope_theta)
    if c.rope_scaling != 1:
        rope |= dict(rope_type='linear', factor=c.rope_scaling)
    config, causal_lm = (
        (Qwen3Config, Qwen3ForCausalLM) if c.qk_norm else (LlamaConfig, LlamaForCausalLM)
    )  # Qwen3 is Llama and a QK norm
    theirs = causal_lm(
        config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=c.head_dim,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=20,
            rms_norm_eps=1e-6,
            rope_parameters=rope,
            tie_word_embeddings=c.tie_weights,
            attention_bias=False,
            mlp_bias=False,
            initializer_range=0.2,
            hidden_act='silu',
        )
    ).eval()
    ours.load_state_dict(state_of_llama(theirs))
    idx = tokens(20, 50)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-5)


def state_of_llama(llama):
    """The weights of a LlamaForCausalLM under the names of GPT, norms made random first."""
    theirs, ours = llama.state_dict(), {}
    for k, v in theirs.items():
        if k.endswith('norm.weight') and 'self_attn' not in k:  # our QK norm has no gain
            v.add_(torch.randn_like(v) * 0.2)
    ours['transformer.wte.weight'], ours['lm_head.weight'] = (
        theirs['model.embed_tokens.weight'],
        theirs['lm_head.weight'],
    )
    ours['transformer.ln_f.weight'] = theirs['model.norm.weight']
    for n in range(llama.config.num_hidden_layers):
        a, b = f'model.layers.{n}.', f'transformer.h.{n}.'
        ours[b + 'ln_1.weight'] = theirs[a + 'input_layernorm.weight']
        ours[b + 'ln_2.weight'] = theirs[a + 'post_attention_layernorm.weight']
        ours[b + 'attn.c_attn.weight'] = torch.cat(
            [theirs[f'{a}self_attn.{x}_proj.weight'] for x in 'qkv']
        )
        ours[b + 'attn.c_proj.weight'] = theirs[a + 'self_attn.o_proj.weight']
        ours[b + 'mlp.c_fc.weight'] = torch.cat(
            [theirs[f'{a}mlp.{x}_proj.weight'] for x in ('gate', 'up')]
        )
        ours[b + 'mlp.c_proj.weight'] = theirs[a + 'mlp.down_proj.weight']
    return ours


# -------------------------------------------------------------------------------------------------
# attention and its kernels


@all_that_run_on_the_cpu
def test_no_logit_sees_a_later_token(variant, kernel, tiny, tokens, plain_flex):
    kind, settings_ = VARIANTS[variant]
    model = tiny(kind, kernel=kernel, **settings_)
    idx, t = tokens(13), 6
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 40
    with torch.no_grad():
        before, after = model(idx), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.isclose(before[:, t:], after[:, t:]).all(-1).any()
    if kernel == 'flex':
        return  # no gradients on the CPU
    embedded = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: embedded.append(out))
    early = model(idx)[:, :t].square().sum()
    (grad,) = torch.autograd.grad(early, embedded)
    assert grad[:, t:].eq(0).all() and grad[:, :t].abs().sum(-1).gt(0).all()


@all_that_run_on_the_cpu
def test_kernels_agree_with_eager(variant, kernel, tiny, tokens, plain_flex):
    kind, settings_ = VARIANTS[variant]
    model = tiny(kind, kernel=kernel, **settings_)
    eager = tiny(kind, kernel='eager', **settings_)
    for T in (1, 2, 13, 24):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(T)), eager(tokens(T)), rtol=0, atol=1e-5)


@pytest.mark.parametrize('variant', ['gqa', 'mla_unequal'])
def test_traced_flex_agrees_with_eager(variant, tiny, tokens, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(model_file, 'compiled_flex', lambda: flex_attention)
    kind, settings_ = VARIANTS[variant]
    model, eager = (tiny(kind, kernel=kernel, **settings_) for kernel in ('flex', 'eager'))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(13)), eager(tokens(13)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('variant', SHAPES)
def test_compiled_flex_agrees_with_eager(variant, tiny, tokens):
    torch._dynamo.reset()
    kind, settings_ = VARIANTS[variant]
    model, eager = (
        tiny(kind, kernel=kernel, block_size=150, **settings_) for kernel in ('flex', 'eager')
    )
    changed = tokens(141).clone()
    changed[:, 70:] = (changed[:, 70:] + 1) % 40
    with torch.no_grad():
        logits = model(tokens(141))
        torch.testing.assert_close(logits, eager(tokens(141)), rtol=0, atol=1e-5)
        assert torch.equal(logits[:, :70], model(changed)[:, :70])


@pytest.mark.gpu
@pytest.mark.parametrize('variant', SHAPES + ('llama', 'modern', 'mla_q_lora', 'mla_qk_norm'))
def test_kernels_agree_with_eager_on_the_gpu(variant, tiny, tokens):
    """
    Each kernel either trains in bf16 and agrees with eager to 3 %, or check_kernel says why it
    cannot.
    """
    torch._dynamo.reset()
    kind, settings_ = VARIANTS[variant]
    shape = dict(block_size=150, n_embd=128) | (
        dict(qk_rope_head_dim=16) if kind == 'mla' else {}
    )  # heads of 32: flex wants 16 at least
    shape |= settings_ | (dict(kv_lora_rank=64) if kind == 'mla' else {})
    idx, expected = tokens(141).cuda(), None
    for kernel in CHOICES['kernel']:
        model = tiny(kind, kernel=kernel, **shape).cuda()
        model.stream = torch.bfloat16
        try:
            model.check_kernel('cuda')
        except ValueError as error:
            assert kernel in ('flash', 'cudnn', 'flex') and len(str(error)) > 60
            continue
        logits = model(idx).float()
        expected = logits.detach() if expected is None else expected  # eager comes first
        assert (logits - expected).norm() < 0.03 * expected.norm(), kernel
        model(idx, idx).backward()


@every_variant
@every_kernel
def test_check_kernel_speaks_for_training(variant, kernel, tiny, tokens):
    kind, settings_ = VARIANTS[variant]
    model = tiny(kind, kernel=kernel, **settings_)
    if kernel in ('cudnn', 'flex') or kernel == 'flash' and variant in UNEQUAL:
        with pytest.raises(
            ValueError,
            match=f'^--kernel={kernel} cannot run on cpu in float32: .{{20}}.* Use --kernel=sdpa$',
        ) as error:
            model.check_kernel('cpu')
        assert one_line(error)
        with pytest.raises((RuntimeError, NotImplementedError)):
            model(tokens(13))
    else:
        model.check_kernel('cpu')
        model(tokens(13), tokens(13)).backward()


def test_check_kernel_gives_the_kernels_own_reason(tiny):
    with pytest.raises(ValueError, match='CUDA'):
        tiny(kernel='cudnn').check_kernel('cpu')
    with pytest.raises(ValueError, match='same last dimension.*10.*7'):
        tiny(
            'mla', kernel='flash', qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
        ).check_kernel('cpu')
    with pytest.raises(ValueError, match='same last dimension.*16.*12'):
        tiny('mla', kernel='flash', absorb=True).check_kernel('cpu')
    with pytest.raises(ValueError, match='no dropout'):
        tiny(kernel='flex', dropout=0.1).check_kernel('cpu')
    with pytest.raises(ValueError, match='dropout'):
        tiny(kernel='flash', dropout=0.1).train().check_kernel('cpu')
    tiny(kernel='flash', dropout=0.1).eval().check_kernel('cpu')


@pytest.mark.parametrize(
    'variant',
    [
        'gpt2',
        'llama',
        'gqa',
        'mqa',
        'modern',
        'mla',
        'mla_absorbed',
        'mla_unequal',
        'mla_early_absorbed',
    ],
)
def test_hooked_pattern_is_the_one_that_was_used(variant, tiny, tokens):
    kind, settings_ = VARIANTS[variant]
    model = tiny(kind, kernel='eager', **settings_)
    attn, seen = model.transformer.h[1].attn, {}
    attn.attn_dropout.register_forward_hook(lambda module, args, out: seen.update(pattern=out))
    attn.register_forward_hook(
        lambda module, args, out: seen.update(x=args[0], rope=args[1], out=out)
    )
    with torch.no_grad():
        model(tokens(13))
        pattern, (q, k, v) = seen['pattern'], attn.qkv(seen['x'], seen['rope'])
        assert pattern.shape == (2, attn.n_head, 13, 13)
        torch.testing.assert_close(
            pattern.sum(-1), torch.ones(2, attn.n_head, 13), rtol=0, atol=1e-6
        )
        assert pattern.triu(1).eq(0).all()
        k, v = (t.repeat_interleave(attn.n_head // t.size(1), dim=1) for t in (k, v))
        rebuilt = attn.c_proj((pattern @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(rebuilt, seen['out'], rtol=0, atol=1e-5)
        future = torch.ones(13, 13, dtype=torch.bool).triu(1)
        logits = torch.einsum('bhid,bhjd->bhij', q, k) / math.sqrt(q.size(-1))
        torch.testing.assert_close(
            pattern, logits.masked_fill(future, -torch.inf).softmax(-1), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize('scaling', [1.0, 4.0])
def test_rope_turns_pairs_by_position_times_frequency(scaling):
    config = GPTConfig(n_head=1, n_embd=8, pos='rope', rope_theta=50.0, rope_scaling=scaling)
    cos, sin = rope_tables(config, torch.arange(9))
    x = torch.randn(2, 9, 3, 8)  # B, T, H, D
    turned = model_file.rotate(x, (cos, sin))[1, :, 2]
    x = x[1, :, 2]
    for p in range(9):
        for k in range(4):  # as a product of complex numbers
            z = complex(x[p, k], x[p, k + 4]) * complex(
                math.cos(p / scaling * 50 ** (-2 * k / 8)),
                math.sin(p / scaling * 50 ** (-2 * k / 8)),
            )
            assert abs(complex(turned[p, k], turned[p, k + 4]) - z) < 1e-5
    assert rope_tables(GPTConfig(pos='learned'), torch.arange(9)) is None


def test_the_stream_sets_the_dtype_and_weights_stay_fp32(tiny, tokens):
    for kind in ('mha', 'mla'):
        model = tiny(kind, pos='rope')
        full = model(tokens(13))
        model.stream = torch.bfloat16
        half = model(tokens(13))
        assert half.dtype == torch.bfloat16 and (half.float() - full).norm() < 0.05 * full.norm()
        loss = model(tokens(13), tokens(13))
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('kernel', ['eager', 'sdpa'])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_dropout_acts_in_training_only(kind, kernel, tiny, tokens):
    without, model = tiny(kind, kernel=kernel), tiny(kind, kernel=kernel, dropout=0.5)
    assert torch.equal(model(tokens(13)), without(tokens(13)))
    for place in (
        'attn_dropout',
        'resid_dropout',
        'mlp.dropout',
        'transformer.drop',
    ):  # one at a time
        model.eval()
        for name, module in model.named_modules():
            if name.endswith(place):
                module.train()
            if name.endswith('attn'):
                module.training = place == 'attn_dropout'  # SDPA's dropout has no module of its own
        assert not torch.equal(model(tokens(13)), model(tokens(13))), place


# -------------------------------------------------------------------------------------------------
# initialisation


def std(tensor):
    return tensor.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize('model_class', [GPT, GPT_MLA])
def test_gpt2_initialisation(model_class):
    shape = dict(block_size=64, vocab_size=500, n_layer=3, n_head=4, n_embd=128)
    shape |= dict(kv_lora_rank=64, latent_init='gpt2') if model_class is GPT_MLA else {}
    model = model_class(model_class.Config(**shape))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert p.eq(0).all(), name
        elif p.ndim == 1:
            assert p.eq(1).all(), name
        else:
            assert std(p) == pytest.approx(
                0.02 / math.sqrt(2 * 3) if 'c_proj' in name else 0.02, rel=0.03
            ), name
    idx = torch.randint(500, (4, 64))
    assert model(idx, torch.randint(500, (4, 64))).item() == pytest.approx(math.log(500), abs=0.1)


def test_fan_in_initialisation():
    model = GPT(
        GPTConfig(
            block_size=64,
            vocab_size=500,
            n_layer=3,
            n_head=4,
            n_embd=128,
            init='fan_in',
            tie_weights=False,
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 2 and 'c_proj' in name:
            assert std(p) == pytest.approx(p.size(1) ** -0.5 / math.sqrt(2 * 3), rel=0.03), name
        elif p.ndim == 2:
            assert std(p) == pytest.approx(
                p.size(1) ** -0.5 if '.h.' in name else 0.02, rel=0.03
            ), name


@pytest.mark.parametrize('init', CHOICES['init'])
@pytest.mark.parametrize('model_class', [GPT, GPT_MLA])
def test_zero_init_starts_without_the_blocks(model_class, init, tokens):
    model = model_class(
        model_class.Config(
            block_size=24,
            vocab_size=40,
            n_layer=2,
            n_head=4,
            n_embd=32,
            zero_init=True,
            init=init,
            **(dict(qk_rope_head_dim=4) if model_class is GPT_MLA else {}),
        )
    ).eval()
    embedded = model.transformer.wte(tokens(13)) + (
        model.transformer.wpe.weight[:13] if model_class is GPT else 0
    )
    assert torch.equal(model(tokens(13)), model.lm_head(model.transformer.ln_f(embedded)))


# -------------------------------------------------------------------------------------------------
# what a model says of itself


@pytest.mark.parametrize('vocab, count', [(50257, 124_439_808), (50304, 124_475_904)])
def test_gpt2_has_124m_parameters(vocab, count):
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=vocab))
    assert model.num_params() == count


@pytest.mark.parametrize(
    'variant',
    ['gpt2', 'llama', 'gqa', 'mqa', 'wide_heads', 'mla', 'mla_q_lora', 'mla_unequal', 'mla_early'],
)
def test_flops_are_those_that_torch_counts(variant, tiny, tokens):
    """
    The eager kernel multiplies all T positions, as the formula counts them; a tied head is one
    product more.
    """
    kind, settings_ = VARIANTS[variant]
    model = tiny(kind, kernel='eager', **settings_)
    for T in (8, 24):
        with FlopCounterMode(display=False) as counter:
            model(tokens(T, B=3), tokens(T, B=3)).backward()
        assert model.flops_per_token(T) * 3 * T == counter.get_total_flops()
    assert model.estimate_mfu(1e6, 2e12) == pytest.approx(model.flops_per_token(24) * 1e6 / 2e12)


@every_variant
def test_cache_dims_are_what_a_token_leaves_behind(variant, tiny, tokens):
    kind, settings_ = VARIANTS[variant]
    model = tiny(kind, **settings_)
    c, attn = model.config, model.transformer.h[0].attn
    if kind == 'mha':
        assert attn.cache_dims() == dict(k=c.n_kv_head * c.head_dim, v=c.n_kv_head * c.head_dim)
    else:
        assert attn.cache_dims() == dict(c_kv=c.kv_lora_rank, k_pe=c.qk_rope_head_dim)
    x, rope = torch.randn(2, 5, c.n_embd), rope_tables(c, torch.arange(5))
    left = attn.qkv(x, rope)[1:] if kind == 'mha' else attn.latent(x, rope)
    assert sum(t.numel() for t in left) == 2 * 5 * sum(attn.cache_dims().values())
    assert model.cache_bytes_per_token() == 2 * c.n_layer * sum(attn.cache_dims().values())
    assert model.cache_bytes_per_token(4) == 2 * model.cache_bytes_per_token()


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_crop_block_size(pos, tiny, tokens):
    model = tiny(pos=pos)
    before = model(tokens(10))
    model.crop_block_size(10)
    assert model.config.block_size == 10 and torch.equal(model(tokens(10)), before)
    with pytest.raises(AssertionError, match='11 tokens do not fit a block of 10'):
        model(tokens(11))
    with pytest.raises(ValueError, match='block_size=11') as error:
        model.crop_block_size(11)
    assert one_line(error)
    GPT(model.config).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    'model_class, wrong, word',
    [
        *[
            (GPT, {name: 'wrong'}, f"{name}='wrong'.*use {choices[0]}")
            for name, choices in CHOICES.items()
        ],
        *[
            (GPT, {name: 0}, f'{name}=0')
            for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')
        ],
        *[(GPT, {name: -2}, f'{name}=-2') for name in ('n_kv_head', 'head_dim', 'n_inner')],
        (GPT, dict(dropout=1.0), 'dropout=1.0'),
        (GPT, dict(dropout=-0.1), 'dropout=-0.1'),
        (GPT, dict(n_head=5), 'n_embd=768 .* n_head=5'),
        (GPT, dict(n_kv_head=5), 'n_head=12 .* n_kv_head=5'),
        (GPT, dict(n_kv_head=24), 'n_kv_head=24'),
        (GPT, dict(pos='rope', head_dim=7), 'even, not 7'),
        (GPT, dict(pos='rope', rope_scaling=0.0), 'rope_scaling=0.0'),
        (GPT, dict(pos='rope', rope_theta=-1.0), 'rope_theta=-1.0'),
        (GPT_MLA, dict(pos='learned'), "pos='learned' .* qk_rope_head_dim=32"),
        (GPT_MLA, dict(pos='none'), "pos='none'"),
        (GPT_MLA, dict(qk_rope_head_dim=0), "pos='rope' .* qk_rope_head_dim=0"),
        (GPT_MLA, dict(n_kv_head=4), 'n_kv_head=4'),
        (GPT_MLA, dict(qk_rope_head_dim=7), 'even, not 7'),
        (GPT_MLA, dict(qk_rope_head_dim=-4), 'qk_rope_head_dim=-4'),
        (GPT_MLA, dict(qk_rope_head_dim=66), 'qk_nope_head_dim=-2'),
        (GPT_MLA, dict(kv_lora_rank=0), 'kv_lora_rank=0'),
        (GPT_MLA, dict(q_lora_rank=-1), 'q_lora_rank=-1'),
        (GPT_MLA, dict(v_head_dim=-1), 'v_head_dim=-1'),
        (GPT_MLA, dict(latent_init='wrong'), "latent_init='wrong'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_settings_that_do_not_fit_end_in_one_line(model_class, wrong, word):
    with pytest.raises(ValueError, match=word) as error:
        model_class.Config(**wrong)
    assert one_line(error)


def test_settings_with_zero_are_derived():
    c = GPTConfig(act='swiglu', n_embd=2048, n_head=16)
    assert (c.n_kv_head, c.head_dim, c.n_inner) == (16, 128, 5504)  # as in DeepSeek-Coder 1.3B
    assert GPTConfig().n_inner == 3072 and GPTConfig(n_inner=7).n_inner == 7
    c = MLAConfig()
    assert (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.rope_dim) == (32, 32, 64, 32)
    assert 'rope_dim' not in MLAConfig.keys() and set(GPTConfig.keys()) < set(MLAConfig.keys())


# -------------------------------------------------------------------------------------------------
# the next token


def nucleus(logits, temperature, top_k, top_p):
    """
    id -> probability that choose() may draw, by brute force in Python floats; and the ids on the
    edge of rounding.
    """
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    if top_k:
        least = sorted(weights)[-min(top_k, len(weights))]
        weights = [w if w >= least else 0.0 for w in weights]
    share = [w / sum(weights) for w in weights]
    kept, edge, before = {}, set(), 0.0
    for i in sorted(range(len(share)), key=lambda i: -share[i]):
        if abs(before - top_p) < 1e-5:
            edge.add(i)
        elif share[i] and (before < top_p or top_p == 1):
            kept[i] = share[i]
        before += share[i]
    return {i: p / sum(kept.values()) for i, p in kept.items()}, edge


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-15, 15), min_size=1, max_size=9, unique=True),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 0, 1, 3, 5, 10]),
    st.sampled_from([0.01, 0.3, 0.5, 0.7, 0.9, 1.0]),
    st.integers(0, 3),
)
def test_choose_draws_from_the_nucleus_and_from_all_of_it(
    logits, temperature, top_k, top_p, padding
):
    logits = [x / 10 for x in logits]
    rows = torch.tensor(logits + [50.0] * padding).expand(
        3000, -1
    )  # padding looks likeliest of all
    evenly = torch.arange(3000) / 3000
    drawn = (
        choose(rows, evenly, Sampling(temperature, top_k, top_p, len(logits))).bincount(
            minlength=len(logits)
        )
        / 3000
    )
    allowed, edge = nucleus(logits, temperature, top_k, top_p)
    for i, share in enumerate(drawn.tolist()):
        if i not in edge and not edge:
            assert share == pytest.approx(allowed.get(i, 0.0), abs=2e-3)
        assert share == 0 or i in allowed or i in edge
    assert len(drawn) == len(logits)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=7, max_size=7), min_size=1, max_size=4
    ),
    st.integers(1, 7),
)
def test_temperature_zero_takes_the_likeliest(rows, vocab_size):
    expected = [max(range(vocab_size), key=lambda i: (row[i], -i)) for row in rows]
    assert (
        choose(torch.tensor(rows), sampling=Sampling(0, vocab_size=vocab_size)).tolist() == expected
    )


def test_choose_draws_equal_tokens_alike_and_keeps_one_at_least():
    drawn = (
        choose(torch.zeros(4000, 8), draw=torch.arange(4000) / 4000).bincount(minlength=8) / 4000
    )
    assert drawn.sub(1 / 8).abs().max() < 1e-3
    assert choose(
        torch.tensor([[0.0, 1000.0, 1.0]]), torch.tensor([0.99]), Sampling(top_p=1e-9)
    ).tolist() == [1]
    assert choose(
        torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), Sampling(top_k=1)
    ).tolist() == [1]
    assert choose(torch.tensor([[-9e9, 1.0, -9e9]]), draw=torch.tensor([0.0])).tolist() == [
        1
    ]  # the improbable is not drawn, whatever the draw
    assert choose(torch.tensor([[1.0, -9e9]]), draw=torch.tensor([1 - 2**-24])).tolist() == [0]


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_generate_yields_tokens_and_repeats_itself(kind, tiny, tokens):
    model = tiny(kind)

    def text(seed, **how):
        return torch.stack(
            list(
                generate(model, tokens(5), 8, generator=torch.Generator().manual_seed(seed), **how)
            )
        )

    assert (
        text(1).shape == (8, 2)
        and torch.equal(text(1), text(1))
        and not torch.equal(text(1), text(2))
    )
    assert text(1, vocab_size=7).max() < 7
    assert list(generate(model, tokens(5), 0)) == []
    idx = tokens(5)
    for token in text(1, temperature=0):  # greedy: each is the argmax of the whole context
        assert torch.equal(token, model(idx)[:, -1].argmax(-1))
        idx = torch.cat([idx, token[:, None]], dim=1)


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_generate_keeps_to_the_last_block(kind, tiny, tokens):
    model = tiny(kind)
    long = tokens(60)
    text, cropped = (
        torch.stack(list(generate(model, idx, 6, temperature=0))) for idx in (long, long[:, -24:])
    )
    assert torch.equal(text, cropped)


def test_loss_counts_every_target_but_minus_one(tiny, tokens):
    model, idx, targets = tiny(), tokens(13), tokens(13).roll(-1)
    targets[:, 3:7] = -1
    logits = model(idx).detach().double().log_softmax(-1)
    counted = [
        -logits[b, t, targets[b, t]] for b in range(2) for t in range(13) if targets[b, t] >= 0
    ]
    assert model(idx, targets).item() == pytest.approx(torch.stack(counted).mean().item(), abs=1e-5)


def test_one_matrix_or_two_for_embedding_and_head(tiny):
    for tied in (True, False):
        model = tiny(tie_weights=tied)
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert tiny(tie_weights=False).num_params() == tiny().num_params() + 40 * 32


def test_relu2_is_the_square_of_relu(tiny):
    mlp = tiny(act='relu2').transformer.h[0].mlp
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(
        mlp(x), mlp.c_proj(F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias).clamp(min=0) ** 2)
    )
