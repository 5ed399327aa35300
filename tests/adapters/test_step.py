"""Loss in chunks, recomputation, compiled blocks, a step: each against its plain reference."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from adapter_models import (
    LENGTHS,
    LLAMA,
    batch_on_gpu,
    llama_on_gpu,
    random_batch,
    targets_of,
)
from helpers import needs
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from nanomla.adapters import lora, step
from nanomla.adapters.lora import LoraSettings
from nanomla.adapters.step import (
    Finetuner,
    ForwardSettings,
    HeadLoss,
    SwigluBlock,
    TrainingForward,
    evaluate,
    flops_per_token,
    loss_of,
)
from nanomla.core.configurator import UserError
from nanomla.training import kernels

needs('peft', 'bitsandbytes')
RECOMPUTE = dict(
    none=dict(recompute='none'),
    selective=dict(recompute='selective', save_width=1.0, spared_layers=1),
    full=dict(recompute='full'),
)
every_recompute = pytest.mark.parametrize('recompute', RECOMPUTE)


@pytest.fixture
def fresh_compiler():
    """Let torch.compile begin and end with nothing compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model(tiny, adapter, **changes):
    """Return a small Llama in training mode."""
    if adapter == 'full':
        return lora.adapt(tiny('mha', **LLAMA, n_embd=64, **changes), 'full').train()
    model = tiny('mha', **LLAMA, n_embd=64, **changes)
    lora.adapt(model, adapter, LoraSettings(r=4, alpha=8))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.train()


def loss_and_gradients(model, forward, batch):
    loss = loss_of(forward, batch, targets_of(batch))
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


# -------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('chunk', [1, 5, 100])
def test_the_loss_in_chunks_is_cross_entropy(frozen, chunk):
    x = torch.randn(12, 8, requires_grad=True)
    w = torch.randn(30, 8, requires_grad=not frozen)
    targets = torch.randint(-1, 30, (12,))
    targets[3:8] = -1  # a chunk of nothing
    learned = [x] if frozen else [x, w]
    expected = F.cross_entropy(x @ w.T, targets, ignore_index=-1)
    expected_gradients = torch.autograd.grad(3 * expected, learned)
    loss = HeadLoss.apply(x, w, targets, (targets >= 0).sum().float(), chunk)
    assert torch.isclose(loss, expected, atol=1e-6)
    (loss * 3).backward()
    for tensor, gradient in zip(learned, expected_gradients):
        assert (tensor.grad - gradient).abs().max() < 1e-6
    assert w.grad is None or not frozen


# -------------------------------------------------------------------------------------------------
# recomputation


@pytest.mark.parametrize(
    'adapter, isolated',
    [
        ('full', False),
        ('lora', True),
        pytest.param('lora', False, marks=pytest.mark.slow),
        pytest.param('qlora', False, marks=pytest.mark.slow),
    ],
)
def test_recomputing_changes_no_gradient_and_costs_what_it_should(tiny, adapter, isolated):
    batch = random_batch(LENGTHS, isolated=isolated)
    settings = dict(  # in the order of their work
        none=ForwardSettings('none'),
        wide=ForwardSettings('selective', save_width=9),
        spared=ForwardSettings('selective', save_width=1, spared_layers=1),
        selective=ForwardSettings('selective', save_width=1),
        full=ForwardSettings('full'),
    )
    found, work = {}, {}
    for name, how in settings.items():
        model = make_model(tiny, adapter)
        with FlopCounterMode(display=False) as flops:
            found[name] = loss_and_gradients(model, TrainingForward(model, how), batch)
        work[name] = flops.get_total_flops()
    for name in settings:
        for a, b in zip(found['none'], found[name], strict=True):
            assert (a - b).abs().max() < 1e-6, name
    if adapter != 'qlora':  # the counter does not see into bitsandbytes
        assert work['none'] <= work['wide'] < work['spared'] < work['selective'] < work['full']


def test_a_training_forward_leaves_the_model_as_it_is(tiny):
    model = make_model(tiny, 'lora')
    before = dict(model.named_modules())
    forward = TrainingForward(model, ForwardSettings('selective', compile=True))
    assert dict(model.named_modules()) == before
    assert all('forward' not in module.__dict__ for module in model.modules())
    assert 'embed' not in model.__dict__
    assert len(forward.blocks) == len(model.transformer.h)


@pytest.mark.parametrize('adapter', ['full', 'lora'])
def test_a_training_forward_has_the_hidden_states_of_the_model(tiny, tokens, adapter):
    model = make_model(tiny, adapter).eval()
    with torch.no_grad():
        expected = model.hidden(tokens(24))
        for how in RECOMPUTE.values():
            forward = TrainingForward(model, ForwardSettings(**how))
            assert torch.equal(forward.hidden(tokens(24)), expected)


def test_an_unknown_recomputation_is_one_line():
    with pytest.raises(UserError, match="recompute='half' is not known: use none, selective, full"):
        ForwardSettings('half')


@pytest.mark.parametrize(
    'adapter, how, words',
    [
        ('lora', dict(), 'nothing recomputed'),
        ('lora', dict(recompute='full'), 'blocks recomputed'),
        (
            'lora',
            dict(recompute='selective', save_width=2, spared_layers=3, compile=True),
            'recomputed but for attention and products up to 2 n_embd, 3 layers spared',
        ),
        (
            'lora',
            dict(recompute='selective', compile=True, documents=True),
            'blocks recomputed',
        ),
        ('qlora', dict(compile=True), 'elementwise work recomputed'),
        ('qlora', dict(compile=True, documents=True), 'nothing recomputed'),
    ],
)
def test_what_was_set_up_in_words(tiny, adapter, how, words):
    model = make_model(tiny, adapter)
    assert TrainingForward(model, ForwardSettings(**how)).setting == words


# -------------------------------------------------------------------------------------------------
# compiled


@pytest.mark.slow
@pytest.mark.parametrize('adapter', ['lora', 'qlora'])
@every_recompute
def test_compiled_blocks_are_the_same_blocks(tiny, fresh_compiler, adapter, recompute):
    found, batch = [], random_batch([[24]] * 2)
    for compile in (False, True):
        model = make_model(tiny, adapter, n_layer=4)
        settings = ForwardSettings(**RECOMPUTE[recompute], compile=compile)
        found.append(loss_and_gradients(model, TrainingForward(model, settings), batch))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*found))
    # embedding, a first block whose input needs no gradient, the others, spared ones
    assert counters['stats']['unique_graphs'] <= 4


@pytest.mark.slow
@every_recompute
def test_full_blocks_with_swiglus_own_gradient(tiny, fresh_compiler, monkeypatch, recompute):
    found, batch = [], random_batch([[24]] * 2)
    # The gradient's reference runs on a CPU.
    monkeypatch.setattr(step, 'RUNS_ON', ('cpu',))
    monkeypatch.setattr(kernels, 'swiglu_gradient', kernels.swiglu_gradient_reference)
    for compile in (False, True):
        model = make_model(tiny, 'full', n_layer=3)
        how = dict(compile=compile, backend='aot_eager')
        forward = TrainingForward(model, ForwardSettings(**RECOMPUTE[recompute], **how))
        found.append(loss_and_gradients(model, forward, batch))
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*found))


def test_swiglus_own_gradient_is_for_weights_that_learn(tiny, monkeypatch):
    monkeypatch.setattr(step, 'RUNS_ON', ('cpu',))
    assert step.gains_by_swiglu_down(make_model(tiny, 'full').transformer.h[0])
    assert not step.gains_by_swiglu_down(make_model(tiny, 'lora').transformer.h[0])
    assert not step.gains_by_swiglu_down(tiny('mha', bias=False).transformer.h[0])  # GELU


def test_swiglus_own_gradient_in_a_block(tiny, monkeypatch):
    monkeypatch.setattr(kernels, 'swiglu_gradient', kernels.swiglu_gradient_reference)
    block = make_model(tiny, 'full').transformer.h[0]
    found = []
    for forward in (block, SwigluBlock(block)):
        x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = forward(x, None)
        inputs = [x, *block.parameters()]
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(*found))


@pytest.mark.slow
def test_what_was_compiled_serves_the_next_model(tiny, fresh_compiler):
    graphs, batch = [], random_batch([[24]] * 2)
    for _ in range(2):
        model = make_model(tiny, 'lora', n_layer=4)
        settings = ForwardSettings('selective', 1.0, 1, compile=True, backend='aot_eager')
        loss_and_gradients(model, TrainingForward(model, settings), batch)
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.slow
def test_compiled_four_bit_blocks_store_no_weights(tiny, fresh_compiler):
    model = make_model(tiny, 'qlora', n_layer=2)
    forward = TrainingForward(model, ForwardSettings(compile=True))
    stored = []

    def pack(tensor):
        stored.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(forward, random_batch([[24]] * 2), torch.tensor(1.0))
    weights = set()
    for group in lora.groups(model):
        weights |= {tuple(shape) for shape in group.shapes}
        weights.add((sum(rows for rows, _ in group.shapes), group.shapes[0][1]))
    assert stored and not weights & (set(stored) - {tuple(model.lm_head.weight.shape)})


# -------------------------------------------------------------------------------------------------
# a step


def test_accumulation_is_the_big_batch_weighted_by_targets(tiny):
    def train(parts):
        model = tiny('mha', **LLAMA)
        tuner = Finetuner(model, partial(loss_of, model), 1e-2, grad_clip=0.5)
        # Adam's first step would show the gradients' signs alone.
        tuner.optimizer = torch.optim.SGD(tuner.params, 1.0)
        return tuner.step(parts), model

    big = random_batch([[24]] * 4)
    big.targets[0, 3:] = -1  # one row has hardly any targets: means of means would be wrong
    big.counted = int((big.targets >= 0).sum())
    parts = []
    for rows in ([0], [1, 2, 3]):
        part = random_batch([[24]] * len(rows))
        part.idx, part.targets = big.idx[rows], big.targets[rows]
        part.counted = int((part.targets >= 0).sum())
        parts.append(part)
    loss, model = train([big])
    loss_of_parts, model_of_parts = train(parts)
    assert abs(loss - loss_of_parts) < 1e-6
    for p, q in zip(model.parameters(), model_of_parts.parameters()):
        assert (p - q).abs().max() < 1e-5


def test_evaluation_is_the_mean_over_targets(tiny):
    model = tiny('mha', **LLAMA)
    batches = [random_batch([[24]] * 2), random_batch([[24]], seed=1)]
    idx = torch.cat([batch.idx for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    loss = evaluate(model, partial(loss_of, model), batches)
    assert abs(loss - model(idx, targets).item()) < 1e-5


def test_flops_by_hand(tiny):
    model = tiny('mha', **LLAMA, n_embd=64, n_kv_head=2)
    weights = 0
    for name, p in model.named_parameters():
        if p.ndim == 2 and 'wte' not in name:
            weights += p.numel()
    attention = 2 * 2 * 24 / 2 * 64 * 2  # q k and p v, half of the square, two layers
    assert flops_per_token(model, 24, 'full') == 6 * weights + 3.5 * attention
    before = flops_per_token(model, 24, 'lora')
    assert before == 4 * weights + 3.5 * attention
    lora.adapt(model, 'qlora', LoraSettings(r=2))
    assert flops_per_token(model, 24, 'qlora') == before


# -------------------------------------------------------------------------------------------------
# on a GPU


def relative_distance(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-6)).item()


@pytest.mark.gpu
@pytest.mark.parametrize('chunk', [16, 50])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_in_chunks_on_a_gpu(dtype, tolerance, chunk):
    x = torch.randn(50, 64, device='cuda').to(dtype).requires_grad_()
    w = (torch.randn(512, 64, device='cuda') * 0.125).to(dtype).requires_grad_()
    targets = torch.randint(-1, 512, (50,), device='cuda')
    loss = HeadLoss.apply(x, w, targets, (targets >= 0).sum().float(), chunk)
    loss.backward()
    a, b = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    expected = F.cross_entropy(a @ b.T, targets, ignore_index=-1)
    expected.backward()
    distances = [(abs(loss - expected) / expected).item()]
    distances += [relative_distance(p.grad.float(), q.grad) for p, q in ((x, a), (w, b))]
    assert max(distances) <= tolerance, distances


@pytest.mark.gpu
@pytest.mark.parametrize('adapter', ['full', 'lora', 'qlora'])
@every_recompute
def test_compiled_blocks_on_a_gpu(fresh_compiler, adapter, recompute):
    found, batch = [], batch_on_gpu([[256]] * 2)
    for compile in (False, True):
        model = llama_on_gpu(adapter, torch.float32)
        settings = ForwardSettings(**RECOMPUTE[recompute], compile=compile)
        found.append(loss_and_gradients(model, TrainingForward(model, settings), batch))
    distances = [relative_distance(a, b) for a, b in zip(*found)]
    assert max(distances) <= 1e-3, distances


@pytest.mark.gpu
@pytest.mark.parametrize('kernel', ['sdpa', 'flash', 'cudnn', 'flex'])
@pytest.mark.parametrize('compile', [False, True])
def test_packed_documents_on_a_gpu(fresh_compiler, kernel, compile):
    model = llama_on_gpu('lora', torch.bfloat16, kernel=kernel).eval()
    reference = llama_on_gpu('lora', torch.bfloat16, kernel='eager').eval()
    batch = batch_on_gpu([[100, 156], [7, 200, 49]], isolated=True, flex=kernel == 'flex')
    settings = ForwardSettings('none', compile=compile, documents=True)
    forward = TrainingForward(model, settings)
    with torch.no_grad():
        packed = forward.hidden(batch.idx, batch.documents)
        for row, lengths in enumerate(batch.lengths):
            begin = 0
            for n in lengths:
                here = slice(begin, begin + n)
                alone = reference.hidden(batch.idx[row : row + 1, here])[0]
                assert (packed[row, here] - alone).abs().max() <= 0.05 * alone.abs().max()
                begin += n


@pytest.mark.gpu
def test_what_is_recomputed_takes_no_memory(fresh_compiler):
    peaks = []
    for how in (('none',), ('selective', 1.0), ('full',)):
        torch._dynamo.reset()
        model, batch = llama_on_gpu('lora', torch.bfloat16), batch_on_gpu([[256]] * 16)
        forward = TrainingForward(model, ForwardSettings(*how, compile=True))
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            loss_of(forward, batch, torch.tensor(1.0, device='cuda')).backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del model, forward
    assert peaks[0] > peaks[1] > peaks[2]
