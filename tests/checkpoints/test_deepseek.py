"""DeepSeek-V2 and V3 with experts: what transformers computes, in every form of our MLA."""

import json
from pathlib import Path

import pytest
import torch
from families import assert_same_greedy_text
from helpers import run, words
from llamas import add_tokenizer, edit_config
from refusals import refused

from attentions import moe as moe_py
from attentions.moe import GPT_MoE, MoE
from model_mla import GPT_MLA
from nanomla.checkpoints import hf
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

SHAPE = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=44,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=12,
    qk_rope_head_dim=8,
    qk_nope_head_dim=6,
    v_head_dim=5,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=64,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=None,
)
YARN = dict(
    rope_type='yarn',
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4,
    mscale=0.707,
    mscale_all_dim=0.707,
)
GROUPS = dict(n_group=4, topk_group=2)
V3 = dict(n_shared_experts=1, q_lora_rank=9) | GROUPS
V2 = dict(n_shared_experts=2, q_lora_rank=None)
MODELS = dict(
    v2=('V2', V2 | dict(rope_parameters=YARN)),
    v2_groups=(
        'V2',
        V2 | GROUPS | dict(topk_method='group_limited_greedy', routed_scaling_factor=1.5),
    ),
    v2_mscale=('V2', V2 | dict(rope_parameters=YARN | dict(mscale_all_dim=0.3), q_lora_rank=9)),
    v3=('V3', V3 | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
    v3_halves=('V3', V3 | dict(rope_interleave=False)),
    moonlight=('V3', V3 | dict(n_group=1, topk_group=1, n_shared_experts=2, q_lora_rank=None)),
    biased=('V3', V3 | dict(attention_bias=True)),
    not_normed=('V3', V3 | dict(norm_topk_prob=False)),
)


def hf_deepseek(folder, name, dtype=torch.float32, **changes):
    """Save a model of MODELS with random weights, gains and balances to `folder`; return it."""
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f'Deepseek{kind}Config')(**(SHAPE | settings | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f'Deepseek{kind}ForCausalLM')(config).eval()
    for key, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.ndim == 1 and 'inv_freq' not in key:
            p.data.add_(torch.randn_like(p) * 0.2)
        if key.endswith('mlp.gate.weight'):
            p.data.normal_()
    model.to(dtype).save_pretrained(folder)
    return model


@pytest.fixture(scope='module')
def deepseek(tmp_path_factory):
    """deepseek(name) -> a folder, the model that transformers wrote to it, and ours."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            theirs = hf_deepseek(folder, name)
            made[name] = folder, theirs, hf.load(folder)[0].eval()
        return made[name]

    return make


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(name, deepseek, tokens):
    _, theirs, ours = deepseek(name)
    assert [type(block.mlp) is MoE for block in ours.transformer.h] == [False, True, True]
    if not ours.config.bias:  # else ours has some more, which are zero
        assert ours.num_params() == sum(p.numel() for p in theirs.state_dict().values())
    idx = tokens(60, 50)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=5e-5)
    assert_same_greedy_text(ours, theirs, tokens(5, 50), 15)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('page_size', [0, 16])
@torch.no_grad()
def test_with_a_cache_and_absorbed_the_logits_are_the_same(name, page_size, deepseek, tokens):
    _, _, ours = deepseek(name)
    idx = tokens(60, 50)
    expected = ours(idx)
    cache = Cache.of(ours, len(idx), 64, page_size=page_size)
    pieces = [ours(piece, context=cache) for piece in idx.split([20, 1, 15, 1, 23], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)
    for block in ours.transformer.h:
        block.attn.absorb = True
    torch.testing.assert_close(ours(idx), expected, rtol=0, atol=1e-5)
    for block in ours.transformer.h:
        block.attn.absorb = False


# -------------------------------------------------------------------------------------------------
# experts


@torch.no_grad()
def test_experts_are_the_sum_over_those_that_each_token_chose(deepseek):
    """Each expert by itself, as the papers write it down."""
    _, _, ours = deepseek('v3')
    moe = ours.transformer.h[1].mlp
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    weights, experts = moe.router(x)
    assert all(len(set(chosen)) == 3 for chosen in experts.tolist())
    expected = torch.zeros_like(x)
    for m in range(len(x)):
        for weight, e in zip(weights[m], experts[m]):
            gate, up = (moe.gate_up[e] @ x[m]).chunk(2)
            expected[m] += weight * (moe.down[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(moe.routed(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(moe(x), expected + moe.shared(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_the_best_groups_of_experts_count(deepseek):
    _, _, ours = deepseek('v3')
    router = ours.transformer.h[1].mlp.router
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    _, experts = router(x)
    scores = torch.sigmoid(x @ router.weight.T) + router.balance
    for m in range(len(x)):
        pairs = scores[m].view(4, 2)  # two experts a group
        best = set(pairs.sum(1).topk(2).indices.tolist())
        allowed = [e for e in range(8) if e // 2 in best]
        wanted = sorted(allowed, key=lambda e: -scores[m, e])[:3]
        assert set(experts[m].tolist()) == set(wanted)


@torch.no_grad()
def test_the_router_stays_exact_in_a_model_of_another_dtype(tmp_path, tokens):
    theirs = hf_deepseek(tmp_path, 'v3', torch.bfloat16)
    for layer in theirs.model.layers[1:]:
        balance = layer.mlp.gate.e_score_correction_bias
        balance.data = torch.randn(8) * 0.2  # in fp32, as in DeepSeek's own files
    theirs.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)[0].eval()
    router = ours.transformer.h[1].mlp.router
    assert ours.transformer.h[1].mlp.gate_up.dtype == torch.bfloat16
    ours.stream = torch.bfloat16
    ours.to(torch.bfloat16)
    balance = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(router.balance, balance)
    ours.stream = torch.float32
    ours.float()
    exact = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    idx = tokens(60, 50)
    torch.testing.assert_close(ours(idx), exact(idx).logits, rtol=0, atol=5e-5)


@torch.no_grad()
def test_while_a_graph_is_recorded_the_experts_are_the_same(deepseek, monkeypatch):
    _, _, ours = deepseek('v3')
    moe = ours.transformer.h[1].mlp
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    expected = moe(x)
    monkeypatch.setattr(moe_py, 'is_recorded', lambda x: True)
    monkeypatch.setattr(torch.nn.functional, 'grouped_mm', None)
    torch.testing.assert_close(moe(x), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('layout', [{}, dict(layout='paged', page_size=16)], ids=str)
@torch.no_grad()
def test_on_a_gpu_decoding_with_a_recorded_graph_is_the_plain_path(dtype, layout, deepseek):
    folder, _, _ = deepseek('v3')
    model = hf.load(folder)[0].to('cuda', dtype).eval()
    model.stream = dtype
    prompt = torch.randint(50, (2, 9), device='cuda')
    texts = []
    for options in (dict(kernel='torch'), dict(static=True)):
        cache = Cache.of(model, 2, 64, **layout, **options)
        tokens = generate(model, prompt, 12, temperature=0, cache=cache)
        texts.append(torch.stack(list(tokens), dim=1).tolist())
    agree = sum(a == b for text, other in zip(*texts) for a, b in zip(text, other))
    assert agree >= (24 if dtype == torch.float32 else 18)


# -------------------------------------------------------------------------------------------------
# files


def test_further_layers_may_be_named_with_or_without_weights(tmp_path, tokens):
    from safetensors.torch import load_file, save_file

    theirs = hf_deepseek(tmp_path, 'v3')
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_nextn_predict_layers'] == 1  # transformers' default, without weights
    idx = tokens(60, 50)
    expected = theirs(idx).logits
    torch.testing.assert_close(hf.load(tmp_path)[0].eval()(idx), expected, rtol=0, atol=5e-5)
    state = load_file(tmp_path / 'model.safetensors')
    state['model.layers.3.eh_proj.weight'] = torch.ones(32, 64)
    save_file(state, tmp_path / 'model.safetensors')
    torch.testing.assert_close(hf.load(tmp_path)[0].eval()(idx), expected, rtol=0, atol=5e-5)
    edit_config(tmp_path, num_nextn_predict_layers=0)
    refused(hf.load, tmp_path, match='unknown here, model.layers.3.eh_proj.weight')


def test_kimi_has_the_layout_of_deepseek_v3(deepseek, tokens, tmp_path):
    theirs = hf_deepseek(tmp_path, 'moonlight')
    edit_config(tmp_path, model_type='kimi_k2', scoring_func='sigmoid', topk_method='noaux_tc')
    idx = tokens(60, 50)
    ours = hf.load(tmp_path)[0].eval()
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=5e-5)


def test_without_experts_it_is_a_plain_mla(tmp_path):
    hf_deepseek(tmp_path, 'v3', first_k_dense_replace=3)
    assert type(hf.load(tmp_path)[0]) is GPT_MLA


@pytest.mark.parametrize(
    'name, change, word',
    [
        ('v2', dict(norm_topk_prob=True), 'norm_topk_prob=True in DeepSeek-V2'),
        ('v2', dict(topk_method='noaux_tc'), 'topk_method=noaux_tc'),
        ('v3', dict(moe_layer_freq=2), 'moe_layer_freq=2'),
        ('v3', dict(scoring_func='softmax'), 'scoring_func=softmax'),
        ('v3', dict(n_group=3), 'multiple of n_group=3'),
        ('v3', dict(num_experts_per_tok=5), 'num_experts_per_tok=5 must be 1 to 4'),
        (
            'v3',
            dict(n_routed_experts=9, n_group=1, topk_group=1),
            r'lacks model.layers.1.mlp.experts.8',
        ),
        ('v3', dict(quantization_config=dict(quant_method='fp8')), 'quantization_config'),
        ('v3', dict(n_shared_experts=0), 'n_shared_experts=0 and n_group=4 must be at least 1'),
        ('v3', dict(attention_bias=True), r'lacks .*self_attn.*\.bias'),
    ],
)
def test_what_has_no_place_here_is_refused(name, change, word, tmp_path):
    hf_deepseek(tmp_path, name)
    edit_config(tmp_path, **change)
    refused(hf.load, tmp_path, match=word)


def test_deepseek_v2_lite_without_weights():
    with torch.device('meta'):
        model, tokenizer = hf.load('random:deepseek-v2-lite')
    assert tokenizer is None
    assert type(model) is GPT_MoE
    assert model.num_params() == 15_706_484_224
    assert model.cache_bytes_per_token() == 27 * (512 + 64) * 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    softmax_scale = (0.1 * 0.707 * torch.tensor(40.0).log().item() + 1) ** 2 * 192**-0.5
    assert model.transformer.h[0].attn.scale == pytest.approx(softmax_scale)


# -------------------------------------------------------------------------------------------------
# scripts


@pytest.fixture(scope='module')
def folder_with_tokenizer(tmp_path_factory):
    from test_tokenizer import byte_level_tokenizer

    place = tmp_path_factory.mktemp('scripts')
    folder = place / 'v2'
    ends = dict(bos_token_id=0, eos_token_id=1)
    hf_deepseek(folder, 'v2', torch.bfloat16, vocab_size=600, **ends)
    byte_level_tokenizer('byte_level').save(str(place / 'made.json'))
    add_tokenizer(folder, place / 'made.json', add_bos_token=True)
    (place / 'text.txt').write_text('the cat sat on the mat. ' * 40)
    return place


def test_sample_writes_text_through_a_paged_latent_cache(
    folder_with_tokenizer, monkeypatch, capsys
):
    monkeypatch.chdir(folder_with_tokenizer)
    settings = dict(init_from='v2', start='def f(x):', num_samples=1, max_new_tokens=8)
    run('sample.py', words(settings | dict(device='cpu', cache='paged', dtype='float32')))
    printed = capsys.readouterr()
    assert printed.out.startswith('def f(x):')
    assert 'paged float32 cache, 240 bytes a token' in printed.out + printed.err


def test_eval_gives_the_perplexity_of_transformers(folder_with_tokenizer, monkeypatch, tokens):
    from transformers import DeepseekV2ForCausalLM

    monkeypatch.chdir(folder_with_tokenizer)
    settings = dict(models='v2', data='text.txt', max_tokens=50, device='cpu', dtype='float32')
    run('eval.py', words(settings | dict(cache='paged', context=49, out_dir='evaluated')))
    row = json.loads(Path('evaluated/results.jsonl').read_text().splitlines()[-1])
    tokenizer = hf.load('v2')[1]
    text = Path('text.txt').read_text()
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)][:50]])
    theirs = DeepseekV2ForCausalLM.from_pretrained('v2', dtype=torch.float32).eval()
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss
    assert row['result']['perplexity'] == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.mark.slow
def test_the_heads_are_scored(folder_with_tokenizer, monkeypatch):
    monkeypatch.chdir(folder_with_tokenizer)
    settings = dict(init_from='v2', device='cpu', out='heads', length=12)
    run('find_induction_heads.py', words(settings))
    heads = json.loads(Path('heads/heads.json').read_text())
    assert heads
