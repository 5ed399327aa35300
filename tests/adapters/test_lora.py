"""LoRA and QLoRA on GPT, packed documents, the loss in chunks, recomputation: each against its plain reference."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, MLP, GPTConfig
from nanomla.adapters import lora as adapters
from nanomla.adapters import step as finetuning
from nanomla.adapters.packing import Batch, Documents, Rows, pack
from nanomla.core.configurator import UserError
from nanomla.inference.cache import Cache
from nanomla.training import kernels

pytest.importorskip('peft')
pytest.importorskip('bitsandbytes')
LLAMA = dict(pos='rope', act='swiglu', norm='rmsnorm', bias=False, tie_weights=False)
KINDS = [
    ('mha', {}),
    ('mha', dict(n_kv_head=2)),
    ('mla', {}),
    ('mha', dict(pos='learned', act='gelu', bias=True)),
]
every_kind = pytest.mark.parametrize(
    'attention, settings', KINDS, ids=['mha', 'gqa', 'mla', 'gpt2']
)
both = pytest.mark.parametrize('adapter', ['lora', 'qlora'])


@pytest.fixture
def adapted(tiny):
    """adapted(adapter, attention, settings, **how) -> a model whose adapters are not zero any more."""

    def make(adapter, attention='mha', settings={}, moved=True, **how):
        model = adapters.adapt(
            tiny(
                attention,
                **(
                    LLAMA | dict(n_embd=64, kv_lora_rank=24) | settings
                    if attention == 'mla'
                    else LLAMA | dict(n_embd=64) | settings
                ),
            ),
            adapter,
            **(dict(r=4, alpha=8) | how),
        )
        for name, p in model.named_parameters():
            if moved and 'lora_B' in name:
                nn.init.normal_(p, std=0.1)
        return model

    return make


# ---------------------------------------------------------------------------------------------------
# adapters


@both
@every_kind
def test_adapters_start_at_the_base_model(tiny, tokens, adapted, adapter, attention, settings):
    model = adapted(adapter, attention, settings, moved=False)
    idx = tokens(24)
    with torch.no_grad():
        started = model(idx)
        if adapter == 'qlora':
            base = adapters.merge(
                adapted(adapter, attention, settings, moved=False)
            )  # what was quantised, dequantised by bitsandbytes
            tolerance = 1e-5
        else:
            base, tolerance = (
                tiny(
                    attention,
                    **(
                        LLAMA
                        | dict(n_embd=64)
                        | (dict(kv_lora_rank=24) if attention == 'mla' else {})
                        | settings
                    ),
                ),
                0,
            )
        assert (started - base(idx)).abs().max() <= tolerance * started.abs().max()


@both
@every_kind
def test_only_adapters_learn_and_all_of_them(tokens, adapted, adapter, attention, settings):
    model = adapted(adapter, attention, settings).train()
    model(tokens(24), tokens(24)).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ('lora_' in name) and (p.grad is not None) == p.requires_grad, (
            name
        )
        assert p.grad is None or p.grad.abs().max() > 0, name
    assert all(
        hasattr(member, 'lora_A') for group in adapters.groups(model) for member in group.members
    )
    assert {name for group in adapters.groups(model) for name in group.names} >= {
        'q_proj',
        'o_proj',
        'down_proj',
        'up_proj',
    }


@both
@pytest.mark.parametrize('dropout', [0.0, 0.3])
@every_kind
def test_the_fused_product_is_what_peft_computes(adapted, adapter, dropout, attention, settings):
    model = adapted(adapter, attention, settings, dropout=dropout).train()
    for group in adapters.groups(model):
        x = torch.randn(5, group.linears[0].in_features)
        torch.manual_seed(1)
        fused = group(x)
        torch.manual_seed(1)  # the same places drop
        assert (fused - group.plain(x)).abs().max() < 1e-5


@both
@every_kind
def test_merging_agrees(tokens, adapted, adapter, attention, settings):
    model, idx = adapted(adapter, attention, settings).eval(), tokens(24)
    with torch.no_grad():
        before = model(idx)
        merged = adapters.merge(model)
        assert not adapters.groups(merged) and (merged(idx) - before).abs().max() < 1e-4
    assert sum(p.numel() for p in merged.parameters()) == merged.num_params()


@both
def test_absorbed_decoding_sees_the_adapters(tokens, adapted, adapter):
    model, idx = adapted(adapter, 'mla').eval(), tokens(20)
    with torch.no_grad(), adapters.held_weights(model):
        assert (model(idx, context=Cache.of(model, 2, 20)) - model(idx)).abs().max() < 1e-4
    assert all(group.held is None for group in adapters.groups(model))


def test_some_targets(adapted):
    model = adapted('lora', targets='q_proj,v_proj')
    assert {
        name.split('.')[-2] for name, m in model.named_modules() if name.endswith('lora_A')
    } == {'q_proj', 'v_proj'}
    for group in adapters.groups(model):
        x = torch.randn(3, group.linears[0].in_features)
        assert (group(x) - group.plain(x)).abs().max() < 1e-5
    mla = adapted(
        'lora', 'mla', targets='q_proj,k_proj,v_proj,o_proj'
    )  # where MLA keeps what MHA calls k and v
    assert {name.split('.')[-2] for name, m in mla.named_modules() if name.endswith('lora_A')} == {
        'q_proj',
        'kv_a_proj_with_mqa',
        'kv_b_proj',
        'o_proj',
    }


def test_parameters_are_counted_as_what_they_stand_for(tiny, adapted):
    whole = tiny('mha', **LLAMA, n_embd=64).num_params()
    for adapter in ('lora', 'qlora'):
        trainable, total = adapters.count(adapted(adapter))
        assert trainable > 0 and total == whole + trainable
    assert adapters.count(adapters.adapt(tiny('mha', **LLAMA, n_embd=64), 'full')) == (whole, whole)


@pytest.mark.parametrize(
    'how, words',
    [
        (dict(kind='dora'), "adapter 'dora' is not known: use full, lora, qlora"),
        (
            dict(kind='lora', targets='q_proj,w_proj'),
            "target 'w_proj' is none of this model's Linears",
        ),
        (dict(kind='lora', r=0), 'lora_r=0'),
    ],
)
def test_what_cannot_be_adapted_is_said(tiny, how, words):
    with pytest.raises(UserError, match=words):
        adapters.adapt(tiny('mha', **LLAMA), **how)


# ---------------------------------------------------------------------------------------------------
# 4 bits


@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('shape', [(64, 64), (192, 128), (70, 64)])
def test_nf4_is_what_bitsandbytes_dequantises(double, shape):
    group = adapters.Group(nn.Linear(shape[1], shape[0], bias=False), ('one',), [shape[0]])
    group.quantise(torch.float32, double)
    assert torch.equal(
        adapters.nf4(*group.parts()[0], group.shapes[0], torch.float32),
        adapters.dequantise(group.linears[0]),
    )


def test_nf4_storage():
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=8, n_embd=1024, **LLAMA))
    adapters.adapt(model, 'qlora', r=2)
    assert abs(adapters.storage(model) - 0.516) <= 0.002


def test_evaluating_first_changes_nothing(tokens, adapted):
    """On CPUs with AVX512-BF16 bitsandbytes would repack its weights in an evaluation and then pass no gradient on."""

    def gradients(evaluated):
        model = adapted('qlora')
        if evaluated:
            model.eval()
            with torch.no_grad():
                model(tokens(24))
        loss = model.train()(tokens(24), tokens(24))
        loss.backward()
        assert not any(
            linear.support_avx512bf16_for_cpu
            for group in adapters.groups(model)
            for linear in group.linears
        )
        return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True)))


# ---------------------------------------------------------------------------------------------------
# packed documents

LENGTHS = [[5, 12, 7], [20, 4]]


@pytest.mark.parametrize('kernel', ['eager', 'sdpa', 'flash'])
@every_kind
def test_packed_documents_are_as_if_alone(tiny, tokens, kernel, attention, settings):
    model, idx = tiny(attention, kernel=kernel, **settings).train(), tokens(24)
    weigh = torch.randn(2, 24, 32)

    def gradients():
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    packed = model.hidden(idx, Documents(LENGTHS))
    (packed * weigh).sum().backward()
    together, total = gradients(), 0
    for row, lengths in enumerate(LENGTHS):
        for n, at in zip(lengths, np.cumsum([0, *lengths])):
            alone = model.hidden(idx[row : row + 1, at : at + n])[0]
            assert (alone - packed[row, at : at + n]).abs().max() < 1e-5
            total = total + (alone * weigh[row, at : at + n]).sum()
    total.backward()
    for a, b in zip(together, gradients()):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_packing_loses_nothing(lengths):
    rows = pack(lengths, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 30 for row in rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.booleans(), st.integers(1, 4))
def test_batches_hold_every_document_once(lengths, packed, B):
    documents = [
        ([100 * n + t for t in range(length)], [t - 1 for t in range(length)])
        for n, length in enumerate(lengths)
    ]
    rows, found = Rows(documents, 10, packed), []
    assert rows.cut == sum(n > 10 for n in lengths)
    for numbers in rows.all_batches(B):
        batch = rows.batch(numbers, 'cpu')
        assert (
            batch.counted == (batch.targets >= 0).sum() and (batch.documents is not None) == packed
        )
        for idx, targets, lengths_here in zip(batch.idx, batch.targets, batch.lengths):
            found += [
                (a.tolist(), b.tolist())
                for a, b in zip(idx.split(lengths_here), targets.split(lengths_here))
                if (b >= 0).any() or a.any() or len(a) == 1
            ]
    kept = [(list(ids[:10]), list(targets[:10])) for ids, targets in documents]
    for document in kept:
        assert document in found
    order, n = rows.train_batches(3, B), len(rows.rows)
    drawn = [i for _ in range(n) for i in next(order)]
    assert all(
        sorted(drawn[at : at + n]) == list(range(n)) for at in range(0, len(drawn) - n + 1, n)
    )


# ---------------------------------------------------------------------------------------------------
# loss, recomputation, a step


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('chunk', [1, 5, 100])
def test_the_loss_in_chunks_is_cross_entropy(frozen, chunk):
    x, w = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8, requires_grad=not frozen)
    targets = torch.randint(-1, 30, (12,))
    targets[3:8] = -1  # a chunk of nothing
    expected = torch.autograd.grad(
        F.cross_entropy(x @ w.T, targets, ignore_index=-1) * 3, [x] if frozen else [x, w]
    )
    loss = finetuning.HeadLoss.apply(x, w, targets, (targets >= 0).sum().float(), chunk)
    assert torch.isclose(loss, F.cross_entropy(x @ w.T, targets, ignore_index=-1), atol=1e-6)
    (loss * 3).backward()
    assert all(
        (a - b).abs().max() < 1e-6
        for a, b in zip(expected, [x.grad] if frozen else [x.grad, w.grad])
    )
    assert w.grad is None or not frozen


def batch_of(lengths, T=24, V=40, isolated=False, seed=0):
    rng = np.random.default_rng(seed)
    shape = (len(lengths), T)
    return Batch(rng.integers(0, V, shape), rng.integers(-1, V, shape), lengths, isolated, 'cpu')


@pytest.mark.parametrize(
    'adapter, isolated',
    [
        ('full', False),
        ('lora', True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (('lora', False), ('qlora', False))
        ),
    ],
)
def test_recomputing_changes_no_gradient_and_costs_what_it_should(tiny, adapted, adapter, isolated):
    batch, found = batch_of(LENGTHS, isolated=isolated), {}
    for how in (
        dict(recompute='none'),
        dict(recompute='selective', save_width=1),
        dict(recompute='selective', save_width=1, spared_layers=1),
        dict(recompute='selective', save_width=9),
        dict(recompute='full'),
    ):
        model = (
            adapted(adapter)
            if adapter != 'full'
            else adapters.adapt(tiny('mha', **LLAMA, n_embd=64), 'full')
        ).train()
        finetuning.set_up(model, **how)
        with FlopCounterMode(display=False) as flops:
            loss = finetuning.loss_of(model, batch, torch.tensor(float(batch.counted)))
            loss.backward()
        found[tuple(how.values())] = (
            flops.get_total_flops(),
            loss.item(),
            [p.grad for p in model.parameters() if p.requires_grad],
        )
    (least, loss, gradients), *others = found.values()
    for _, other, theirs in others:
        assert abs(loss - other) < 1e-6 and all(
            (a - b).abs().max() < 1e-6 for a, b in zip(gradients, theirs)
        )
    if adapter != 'qlora':  # the counter does not see into bitsandbytes
        assert (
            least
            <= found['selective', 9][0]
            < found['selective', 1, 1][0]
            < found['selective', 1][0]
            < found['full',][0]
        )


def test_accumulation_is_the_big_batch_weighed_by_tokens(tiny):
    def trained(parts):
        model = tiny('mha', **LLAMA)
        tuner = finetuning.Finetuner(model, finetuning.loss_of, 1e-2, grad_clip=0.5)
        tuner.optimizer = torch.optim.SGD(
            tuner.params, 1.0
        )  # Adam's first step would show the gradients' signs alone
        loss = tuner.step(parts)
        return loss, model

    big = batch_of([[24]] * 4)
    big.targets[0, 3:] = -1  # one row has hardly any targets: means of means would be wrong
    big.counted = int((big.targets >= 0).sum())
    parts = []
    for rows in ([0], [1, 2, 3]):
        part = batch_of([[24]] * len(rows))
        part.idx, part.targets = big.idx[rows], big.targets[rows]
        part.counted = int((part.targets >= 0).sum())
        parts.append(part)
    (a, one), (b, two) = trained([big]), trained(parts)
    assert abs(a - b) < 1e-6 and all(
        (p - q).abs().max() < 1e-5 for p, q in zip(one.parameters(), two.parameters())
    )


def test_evaluation_is_the_mean_over_targets(tiny):
    model, batches = tiny('mha', **LLAMA), [batch_of([[24]] * 2), batch_of([[24]], seed=1)]
    idx, targets = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ('idx', 'targets')
    )
    assert (
        abs(finetuning.evaluate(model, finetuning.loss_of, batches) - model(idx, targets).item())
        < 1e-5
    )


def test_flops_by_hand(tiny):
    model = tiny('mha', **LLAMA, n_embd=64, n_kv_head=2)
    weights = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and 'wte' not in name
    )
    attention = 2 * 2 * 24 / 2 * 64 * 2  # q k and p v, half of the square, two layers
    assert finetuning.flops_per_token(model, 24, 'full') == 6 * weights + 3.5 * attention
    before = finetuning.flops_per_token(model, 24, 'lora')
    assert before == 4 * weights + 3.5 * attention
    assert finetuning.flops_per_token(adapters.adapt(model, 'qlora', r=2), 24, 'qlora') == before


def test_unknown_recomputation(tiny):
    with pytest.raises(UserError, match="recompute='half' is not known: use none, selective, full"):
        finetuning.set_up(tiny('mha'), 'half')


@pytest.mark.slow
@pytest.mark.parametrize('adapter', ['lora', 'qlora'])
@pytest.mark.parametrize(
    'how', [('none',), ('selective', 1.0, 1), ('full',)], ids=lambda how: how[0]
)
def test_compiled_blocks_are_the_same_blocks(adapted, adapter, how):
    from torch._dynamo.utils import counters

    found = []
    for compile in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model, batch = adapted(adapter, settings=dict(n_layer=4)).train(), batch_of([[24]] * 2)
        finetuning.set_up(model, *how, compile=compile)
        loss = finetuning.loss_of(model, batch, torch.tensor(float(batch.counted)))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*found))
    assert (
        counters['stats']['unique_graphs'] <= 4
    )  # embedding, a first block whose input needs no gradient, the others, spared ones
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    'how', [('none',), ('selective', 1.0, 1), ('full',)], ids=lambda how: how[0]
)
def test_full_blocks_with_swiglus_own_gradient(tiny, monkeypatch, how):
    found, batch = [], batch_of([[24]] * 2)
    for compile in (False, True):
        torch._dynamo.reset()
        model = adapters.adapt(tiny('mha', **LLAMA, n_embd=64, n_layer=3), 'full').train()
        if compile:
            monkeypatch.setattr(
                'nanomla.training.kernels.RUNS_ON', ('cpu',)
            )  # the gradient's reference runs there
            monkeypatch.setattr(
                'nanomla.training.kernels.swiglu_gradient', kernels.swiglu_gradient_reference
            )
        finetuning.set_up(model, *how, compile=compile, backend='aot_eager')
        assert {type(block.mlp) for block in model.transformer.h} == {
            finetuning.SwigluMLP if compile else MLP
        }
        loss = finetuning.loss_of(model, batch, torch.tensor(float(batch.counted)))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*found))
    torch._dynamo.reset()


@pytest.mark.slow
def test_what_was_compiled_serves_the_next_model(adapted):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs, batch = [], batch_of([[24]] * 2)
    for _ in range(2):
        model = adapted('lora', settings=dict(n_layer=4)).train()
        finetuning.set_up(model, 'selective', 1.0, 1, compile=True, backend='aot_eager')
        finetuning.loss_of(model, batch, torch.tensor(float(batch.counted))).backward()
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs[0] == graphs[1] > 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_four_bit_blocks_keep_no_weights(adapted):
    torch._dynamo.reset()
    model = adapted('qlora', settings=dict(n_layer=2)).train()
    finetuning.set_up(model, 'none', compile=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        finetuning.loss_of(model, batch_of([[24]] * 2), torch.tensor(1.0))
    weights = {
        tuple(shape)
        for group in adapters.groups(model)
        for shape in [*group.shapes, (sum(s[0] for s in group.shapes), group.shapes[0][1])]
    }
    assert kept and not weights & {tuple(shape) for shape in kept} - {
        tuple(model.lm_head.weight.shape)
    }
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------
# on a GPU


def llama_on_gpu(adapter, stream, **how):
    torch.manual_seed(0)
    with torch.device('cuda'):
        model = GPT(
            GPTConfig(
                block_size=256, vocab_size=512, n_layer=3, n_head=4, n_embd=512, **LLAMA, **how
            )
        )
    model.stream = stream
    adapters.adapt(model if stream == torch.float32 else model.to(stream), adapter, r=8)
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(p, std=0.05)
    return model.train()


def on_gpu(lengths, **how):
    batch = batch_of(lengths, T=256, V=512, **how)
    batch.idx, batch.targets = batch.idx.cuda(), batch.targets.cuda()
    if batch.documents:
        batch.documents = Documents(batch.lengths, 'cuda')
    return batch


@pytest.mark.gpu
@pytest.mark.parametrize('chunk', [16, 50])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_in_chunks_on_a_gpu(dtype, tolerance, chunk):
    x, w = (
        (torch.randn(n, 64, device='cuda') * scale).to(dtype).requires_grad_()
        for n, scale in ((50, 1), (512, 0.125))
    )
    targets = torch.randint(-1, 512, (50,), device='cuda')
    loss = finetuning.HeadLoss.apply(x, w, targets, (targets >= 0).sum().float(), chunk)
    loss.backward()
    a, b = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    expected = F.cross_entropy(a @ b.T, targets, ignore_index=-1)
    expected.backward()
    off = [(abs(loss - expected) / expected).item()] + [
        ((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in ((x, a), (w, b))
    ]
    assert max(off) <= tolerance, off


@pytest.mark.gpu
@pytest.mark.parametrize('adapter', ['full', 'lora', 'qlora'])
@pytest.mark.parametrize(
    'how', [('none',), ('selective', 1.0, 1), ('full',)], ids=lambda how: how[0]
)
def test_compiled_blocks_on_a_gpu(adapter, how):
    torch._dynamo.reset()
    found, batch = [], on_gpu([[256]] * 2)
    for compile in (False, True):
        model = llama_on_gpu(adapter, torch.float32)
        finetuning.set_up(model, *how, compile=compile)
        loss = finetuning.loss_of(model, batch, torch.tensor(float(batch.counted), device='cuda'))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
    off = [((a - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(*found)]
    assert max(off) <= 1e-3, off


@pytest.mark.gpu
@pytest.mark.parametrize('kernel', ['sdpa', 'flash', 'cudnn', 'flex'])
@pytest.mark.parametrize('compile', [False, True])
def test_packed_documents_on_a_gpu(kernel, compile):
    torch._dynamo.reset()
    model = llama_on_gpu('lora', torch.bfloat16, kernel=kernel).eval()
    batch, reference = (
        on_gpu([[100, 156], [7, 200, 49]], isolated=True),
        llama_on_gpu('lora', torch.bfloat16, kernel='eager').eval(),
    )
    finetuning.set_up(model, 'none', compile=compile, documents=True)
    with torch.no_grad():
        packed = model.hidden(batch.idx, batch.documents)
        for row, lengths in enumerate(batch.lengths):
            at = 0
            for n in lengths:
                alone = reference.hidden(batch.idx[row : row + 1, at : at + n])[0]
                assert (packed[row, at : at + n] - alone).abs().max() <= 0.05 * alone.abs().max()
                at += n


@pytest.mark.gpu
def test_what_is_recomputed_takes_no_memory():
    peaks = []
    for how in (('none',), ('selective', 1.0), ('full',)):
        torch._dynamo.reset()
        model, batch = llama_on_gpu('lora', torch.bfloat16), on_gpu([[256]] * 16)
        finetuning.set_up(model, *how, compile=True)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            finetuning.loss_of(model, batch, torch.tensor(1.0, device='cuda')).backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    assert peaks[0] > peaks[1] > peaks[2]
