"""
training/kernels.py: one test for each thing it promises.

The Triton kernels run here under Triton's interpreter, on the CPU. It must be chosen before Triton
is imported, so the tests called `interpreted` run in a child process, see interpreter.py; the
tests marked gpu hold the same promises to real shapes.
"""

import pytest
import torch
import torch.nn.functional as F
from interpreter import CHILD, interpreted, needs_triton, python, run_interpreted

import model
from nanomla.training import kernels as k


@needs_triton
@pytest.mark.early
def test_under_the_interpreter(request):
    run_interpreted(request, 'not slow')


# -------------------------------------------------------------------------------------------------
# softmax, row by row


def problem(N, C, V, dtype, ignored=True, device='cpu'):
    """
    Return x (N, C) in dtype, weight (V, C) in fp32 and targets (N,). Logits have a standard
    deviation of about 1.
    """
    x = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) * C**-0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    if ignored:
        targets[1::3] = -1
    return x, weight, targets


def exact(x, weight, targets, upstream=1.0):
    """Return loss and gradients in float64, of the weight as x's dtype sees it."""
    x, weight = (t.detach().to(x.dtype).double().requires_grad_() for t in (x, weight))
    logits = (x @ weight.T).flatten(0, -2)
    loss = F.cross_entropy(logits, targets.flatten().long(), ignore_index=-1)
    return loss, *torch.autograd.grad(loss * upstream, (x, weight))


def cosine(got, want):
    return F.cosine_similarity(got.double().flatten(), want.flatten(), 0)


def close(got, want, error):
    """Whether the norm of the difference is at most `error` of the norm."""
    got, want = got.detach().double(), want.detach().double()
    return (got - want).norm() <= error * want.norm()


SHAPES = [(5, 8, 37), (1, 8, 11), (3, 4, 1), (16, 32, 64), (7, 24, 8193), (4, 16, 20000)]
ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@interpreted
@pytest.mark.parametrize('dtype', ERROR)
@pytest.mark.parametrize('N, C, V', SHAPES)
def test_interpreted_loss_and_gradients(N, C, V, dtype):
    x, weight, targets = problem(N, C, V, dtype)
    loss = k.linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.grad_fn.name() == 'LinearCrossEntropyBackward'
    grads = torch.autograd.grad(loss * 3, (x, weight))
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    want, *want_grads = exact(x, weight, targets, 3)
    torch.testing.assert_close(loss.double(), want, rtol=ERROR[dtype], atol=1e-6)
    for g, w in zip(grads, want_grads):
        assert close(g, w, ERROR[dtype]) or V == 1 and g.norm() < 1e-6
    assert grads[0][1::3].eq(0).all()  # targets of -1


@interpreted
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('V', [3, 700, 8200])
def test_interpreted_extreme_logits(V, dtype):
    logits = (torch.randn(6, V) * torch.tensor([0, 1e-3, 1, 100, 1e4, 1e4])[:, None]).to(dtype)
    logits[4] = -1e4
    logits[5, 0], logits[5, -1] = 1e4, -1e4
    targets = torch.tensor([0, V - 1, 1, -1, V // 2, V - 1])
    mine, theirs = logits.clone(), logits.double()
    loss, lse = k.softmax_rows(mine, targets, True)
    want, want_lse = k.softmax_rows_reference(theirs, targets, True)
    # The interpreter rounds x log2(e), 1.4e4; a GPU's FMA does not.
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)
    rtol = 8e-3 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=1e-6)


@interpreted
def test_interpreted_reference_is_the_gradient_of_cross_entropy():
    logits, targets = torch.randn(9, 50, requires_grad=True), torch.randint(50, (9,))
    targets[4] = -1
    want_loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')
    (want,) = torch.autograd.grad(want_loss.sum(), logits)
    for rows in (k.softmax_rows, k.softmax_rows_reference):
        mine = logits.detach().clone()
        loss, lse = rows(mine, targets, True)
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6)
        assert lse[4] == torch.inf
        assert lse[3].isfinite()


@interpreted
def test_interpreted_nothing_is_written_without_a_gradient(monkeypatch):
    logits, targets = torch.randn(4, 100), torch.randint(100, (4,))
    before = logits.clone()
    loss = k.softmax_rows(logits, targets, False)[0]
    assert logits.equal(before)
    assert loss.equal(k.softmax_rows(logits, targets, True)[0])
    assert not logits.equal(before)

    asked, softmax_rows = [], k.softmax_rows

    def recorded(logits, targets, gradient):
        asked.append(gradient)
        return softmax_rows(logits, targets, gradient)

    monkeypatch.setattr(k, 'softmax_rows', recorded)
    x, weight, targets = problem(4, 8, 30, torch.float32)
    with torch.no_grad():
        assert not k.linear_cross_entropy(x, weight, targets).requires_grad
    assert not k.linear_cross_entropy(x.detach(), weight.detach(), targets).requires_grad
    k.linear_cross_entropy(x, weight, targets)
    assert asked == [False, False, True]


@interpreted
def test_interpreted_one_gradient_of_two_and_shapes():
    x, weight, targets = problem(6, 8, 40, torch.float32)
    both = torch.autograd.grad(k.linear_cross_entropy(x, weight, targets), (x, weight))
    for i in range(2):
        inputs = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, weight))]
        loss = k.linear_cross_entropy(inputs[0].view(2, 3, 8), inputs[1], targets.view(2, 3).int())
        grad = torch.autograd.grad(loss, inputs[i], retain_graph=True)[0]
        torch.testing.assert_close(grad, both[i])
        assert grad.equal(torch.autograd.grad(loss, inputs[i])[0])  # a second time
    strided = torch.stack([targets, targets], 1)[:, 0]
    want = k.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(k.linear_cross_entropy(x, weight, strided), want)


@interpreted
def test_interpreted_no_target_and_a_wrong_target():
    x, weight, targets = problem(4, 8, 30, torch.float32)
    none = torch.full_like(targets, -1)
    loss = k.linear_cross_entropy(x, weight, none)
    assert loss.isnan()
    assert k.linear_cross_entropy_reference(x, weight, none).isnan()
    for g in torch.autograd.grad(loss, (x, weight)):
        assert g.eq(0).all()
    targets[2] = 30
    assert k.linear_cross_entropy(x, weight, targets).isnan()


@interpreted
def test_interpreted_inside_a_compiled_caller():
    def caller(x, weight, targets):
        return k.linear_cross_entropy(x * 2, weight, targets) + 1

    x, weight, targets = problem(4, 8, 30, torch.float32)
    got = torch.compile(caller, backend='aot_eager')(x, weight, targets)
    want = caller(x, weight, targets)
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad(got, (x, weight))
    torch.testing.assert_close(got_grads, torch.autograd.grad(want, (x, weight)))


# -------------------------------------------------------------------------------------------------
# fp8

TILES = [(16, 48), (64, 128), (80, 144), (1, 300)]


def differences(got, want):
    """
    Count elements that differ, but for a fault of the interpreter (Triton 3.6 and 3.9): rounding up
    to a power of two, it forgets to raise the exponent and gives half of it.
    """
    got, want = got.double(), want.double()
    halved = (got * 2 == want) & (want.abs().log2() % 1 == 0)
    return ((got != want) & ~halved).sum()


@interpreted
@pytest.mark.parametrize('N, V', TILES)
@pytest.mark.parametrize('source', [torch.float32, torch.bfloat16])
def test_interpreted_fp8_tiles(N, V, source):
    logits, targets = torch.randn(N, V).to(source), torch.randint(V, (N,))
    targets[1::3] = -1
    lse = k.softmax_rows(logits, targets, False)[1]
    factor = 448 / logits.float().abs().max()
    for dtype, args in ((torch.float8_e5m2, (lse, targets)), (torch.float8_e4m3fn, (factor, None))):
        got, got_t = k.fp8_tiles(logits, *args, torch.float32)
        want, _ = k.fp8_tiles_reference(logits, *args, torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
        assert got_t.equal(got.T)
        got, got_t = k.fp8_tiles(logits, *args, dtype)
        assert got.dtype == dtype
        assert got_t.float().equal(got.float().T)
        assert got_t.is_contiguous()
        want, _ = k.fp8_tiles_reference(logits, *args, dtype)
        assert differences(got, want) <= 2  # a last bit of 2^x
        assert k.fp8_tiles(logits, *args, dtype, transposed=False)[1] is None


@interpreted
def test_interpreted_quantize():
    x = torch.randn(32, 48) * 0.02
    y, y_t, scale = k.quantize(x, True)
    torch.testing.assert_close(scale, x.abs().max() / 448)
    want, _ = k.fp8_tiles_reference(x, 1 / scale, None, torch.float8_e4m3fn)
    assert differences(y, want) == 0
    assert k.quantize(torch.zeros(16, 16), False)[0].float().eq(0).all()


@interpreted
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_interpreted_fp8_loss_and_gradients(monkeypatch, dtype):
    # The reference rounds as a GPU does, see `differences`.
    monkeypatch.setattr(k, 'fp8_tiles', k.fp8_tiles_reference)
    x, weight, targets = problem(64, 64, 512, dtype)
    loss = k.linear_cross_entropy(x, weight, targets, fp8=True)
    grads = torch.autograd.grad(loss * 0.5, (x, weight))
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    want, *want_grads = exact(x, weight, targets, 0.5)
    torch.testing.assert_close(loss.double(), want, rtol=2e-3, atol=0)
    for g, w in zip(grads, want_grads):
        assert close(g, w, 0.1)
        assert cosine(g, w) > 0.995
    with pytest.raises(AssertionError, match='multiples of 16'):
        k.linear_cross_entropy(x[:5], weight, targets[:5], fp8=True)


# -------------------------------------------------------------------------------------------------
# without Triton, and GELU


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('fp8', [False, True])
@pytest.mark.skipif(CHILD, reason='the child has Triton on the CPU')
def test_on_a_cpu_it_is_cross_entropy(dtype, fp8):
    x, weight, targets = problem(6, 8, 40, dtype)
    want = F.cross_entropy(F.linear(x, weight.to(dtype)).float(), targets, ignore_index=-1)
    loss = k.linear_cross_entropy(x.view(2, 3, 8), weight, targets.view(2, 3), fp8)
    assert loss.equal(want)
    want_grads = torch.autograd.grad(want, (x, weight))
    for g, w in zip(torch.autograd.grad(loss, (x, weight)), want_grads):
        assert g.equal(w)
    compiled = torch.compile(k.linear_cross_entropy, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, targets), want)


def test_imports_without_triton_and_does_not_import_it():
    child = python(
        '-c',
        """
import importlib, sys, torch
from nanomla.core import devices
from nanomla.training import kernels as k
for installed in (True, False):
    k.linear_cross_entropy(torch.ones(2, 4), torch.eye(4), torch.tensor([0, 1]))
    assert sys.modules.get('triton') is None
    sys.modules['triton'] = None
    importlib.reload(devices)
    importlib.reload(k)
assert k.RUNS_ON == ()
""",
        TRITON_INTERPRET='0',
    )
    assert child.returncode == 0, child.stderr


def grid(dtype=torch.float32):
    """Return numbers around 0 close together, and some extreme ones."""
    extremes = torch.tensor([0.0, 1e-30, 1e4, -1e4, 3e38, -3e38])
    return torch.cat([torch.linspace(-12, 12, 200001), extremes]).to(dtype)


def test_normal_cdf_against_float64():
    x = grid()
    want = torch.special.ndtr(x.double())
    assert (model.normal_cdf(x) - want).abs().max() < 1e-7  # erf: twice that


def test_gelu_against_float64():
    x = grid().requires_grad_()
    y = x.detach().double().requires_grad_()
    got, want = model.gelu(x), F.gelu(y)
    # Φ within 1e-7, times x, and the rounding of the result
    assert ((got - want).abs() <= 1.2e-7 * y.abs().clamp(min=1)).all()
    got, want = torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), y)[0]
    assert (got - want).abs().max() < 2e-7


def test_gelu_in_bf16_is_the_rounded_gelu():
    x = grid(torch.bfloat16).requires_grad_()
    y = x.detach().double().requires_grad_()
    got, want = model.gelu(x), F.gelu(y)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-7)
    got_grad = torch.autograd.grad(got.sum(), x)[0].double()
    want_grad = torch.autograd.grad(want.sum(), y)[0]
    torch.testing.assert_close(got_grad, want_grad, rtol=2**-8, atol=1e-7)


def test_gelu_compiles_without_a_graph_break():
    x = torch.randn(64, requires_grad=True)
    compiled = torch.compile(model.gelu, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), model.gelu(x))
    want = torch.autograd.grad(model.gelu(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), want)


# -------------------------------------------------------------------------------------------------
# on a GPU, at GPT-2's size


@pytest.mark.gpu
@pytest.mark.parametrize('fp8', [False, True])
def test_gpu_loss_and_gradients(fp8):
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip('needs Hopper or Ada')
    x, weight, targets = problem(4096, 768, 50304, torch.bfloat16, device='cuda')
    loss = k.linear_cross_entropy(x, weight, targets, fp8)
    grads = torch.autograd.grad(loss * 0.2, (x, weight))
    want, *want_grads = exact(x, weight, targets, 0.2)
    loss_error, grad_error, least_cosine = 1e-4, 0.01, 0.9999
    if fp8:
        loss_error, grad_error, least_cosine = 1e-3, 0.1, 0.995
    assert abs(loss - want) < loss_error * want
    for g, w in zip(grads, want_grads):
        assert close(g, w, grad_error)
        assert cosine(g, w) > least_cosine
    assert grads[0][1::3].eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize('V', [37, 50257, 8193])
@pytest.mark.parametrize('dtype', ERROR)
def test_gpu_odd_vocabularies(V, dtype):
    x, weight, targets = problem(100, 64, V, dtype, device='cuda')
    loss = k.linear_cross_entropy(x, weight, targets)
    grads = torch.autograd.grad(loss, (x, weight))
    want, *want_grads = exact(x, weight, targets)
    torch.testing.assert_close(loss.double(), want, rtol=max(ERROR[dtype], 1e-5), atol=1e-6)
    for g, w in zip(grads, want_grads):
        assert close(g, w, max(ERROR[dtype], 1e-5))


@pytest.mark.gpu
def test_gpu_more_than_2_31_logits():
    x, weight, targets = problem(45056, 64, 50304, torch.bfloat16, device='cuda')
    logits = x.detach() @ weight.detach().bfloat16().T
    last = logits[-64:].clone()
    loss, _ = k.softmax_rows(logits, targets, True)
    want, _ = k.softmax_rows_reference(last, targets[-64:], True)
    torch.testing.assert_close(loss[-64:], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[-64:], last, rtol=1.6e-2, atol=1e-7)


@pytest.mark.gpu
def test_gpu_inside_a_cuda_graph():
    x, weight, targets = problem(512, 64, 1024, torch.bfloat16, device='cuda')

    def step():
        loss = k.linear_cross_entropy(x, weight, targets)
        return loss, *torch.autograd.grad(loss, (x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        x.mul_(-2)
        targets.copy_(targets.roll(1))
    graph.replay()
    for g, w in zip(got, step()):
        torch.testing.assert_close(g, w)


@pytest.mark.gpu
def test_gpu_gelu_compiled():
    x = grid(torch.bfloat16).cuda().requires_grad_()
    y = x.detach().double().requires_grad_()
    got, want = torch.compile(model.gelu, fullgraph=True)(x), F.gelu(y)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=3e-7)
    got_grad = torch.autograd.grad(got.sum(), x)[0].double()
    want_grad = torch.autograd.grad(want.sum(), y)[0]
    torch.testing.assert_close(got_grad, want_grad, rtol=2**-8, atol=3e-7)


# -------------------------------------------------------------------------------------------------
# AdamW


def ten_updates(sizes, dtype, device, decay):
    """
    Return how far weights and states are from torch's AdamW after ten updates: norms of the
    differences, in norms times the dtype's rounding.
    """
    from nanomla.adapters.step import HalfAdamW, are_half_in_triton

    torch.manual_seed(0)
    mine = [torch.randn(n, device=device).to(dtype).requires_grad_() for n in sizes]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    assert are_half_in_triton(mine)
    assert not are_half_in_triton([mine[0].float()])
    options = dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=decay)
    ours = HalfAdamW(mine, options)
    torchs = torch.optim.AdamW(theirs, **options, fused=True)
    for update in range(10):
        for n, (p, q) in enumerate(zip(mine, theirs)):
            p.grad = q.grad = None
            # A tensor without a gradient is left as it is, and counts its own updates.
            if n == 1 and update < 2:
                continue
            scales = torch.logspace(-1, 1, len(p), device=device)
            p.grad = (torch.randn(len(p), device=device) * scales).to(dtype)
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    pairs = list(zip(mine, theirs))
    for p, q in zip(mine, theirs):
        for name in ('exp_avg', 'exp_avg_sq'):
            pairs.append((ours.state[p][name], torchs.state[q][name]))
    return [relative_error(a, b, dtype) for a, b in pairs if len(a)]


def relative_error(got, want, dtype):
    """Return the norm of the difference, in norms of `want` times the dtype's rounding."""
    got, want = got.detach().float(), want.detach().float()
    return ((got - want).norm() / want.norm() / torch.finfo(dtype).eps).item()


@interpreted
@pytest.mark.parametrize('sizes', [[7], [5000, 3], [2048, 2049, 4096, 0, 1]], ids=str)
@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_interpreted_adamw_is_torchs(sizes, decay):
    # Not in bf16, which the interpreter cuts off where a GPU rounds.
    found = ten_updates(sizes, torch.float16, 'cpu', decay)
    assert max(found) <= 0.5, found


@interpreted
def test_interpreted_adamw_takes_tensors_that_begin_anywhere():
    size = 2 * 2048
    buffers = [torch.randn(size + 1).half() for _ in range(4)]
    buffers[3].abs_()  # squares
    shifted = [buffer[1:] for buffer in buffers]
    aligned = [tensor.clone() for tensor in shifted]
    assert shifted[0].data_ptr() % 16
    before = [buffer[0].item() for buffer in buffers]
    for tensors in (aligned, shifted):
        k.adamw(*([t] for t in tensors), step=3, rate=1e-2)
    for a, b in zip(aligned, shifted):
        assert torch.equal(a, b)
    # Nothing beside them is written.
    assert before == [buffer[0].item() for buffer in buffers]


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('sizes', [[3_000_001], [4_194_304, 2048, 77, 0, 8192, 2047]], ids=len)
def test_adamw_is_torchs_on_a_gpu(dtype, sizes):
    found = ten_updates(sizes, dtype, 'cuda', 0.1)
    assert max(found) <= 0.5, found


# -------------------------------------------------------------------------------------------------
# SwiGLU


def swiglu_errors(function, N, C, dtype, device):
    """
    Return how far the two results of swiglu_gradient, or of its reference, are from float64's:
    norms of the differences, in norms times the dtype's rounding.
    """
    torch.manual_seed(0)
    x, g = (torch.randn(N, width, device=device).mul(3).to(dtype) for width in (2 * C, C))
    exact_x = x.double().requires_grad_()
    gate, up = exact_x.chunk(2, dim=-1)
    act = F.silu(gate) * up
    want = torch.autograd.grad(act, exact_x, g.double())[0]
    got = function(x, g)  # overwrites g by the activation
    errors = []
    for a, b in ((got, want), (g, act.detach())):
        errors.append(((a.double() - b).norm() / b.norm() / torch.finfo(dtype).eps).item())
    return errors


SWIGLU_SHAPES = [(1, 1), (3, 8), (5, 300), (7, 1376), (2, 2048)]


@pytest.mark.parametrize('shape', SWIGLU_SHAPES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_swiglu_reference(shape, dtype):
    assert max(swiglu_errors(k.swiglu_gradient_reference, *shape, dtype, 'cpu')) <= 2


@interpreted
@pytest.mark.parametrize('shape', SWIGLU_SHAPES)
def test_interpreted_swiglu(shape):
    assert max(swiglu_errors(k.swiglu_gradient, *shape, torch.float16, 'cpu')) <= 0.5


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_swiglu_on_a_gpu(dtype):
    for shape in [*SWIGLU_SHAPES, (8192, 5504)]:
        assert max(swiglu_errors(k.swiglu_gradient, *shape, dtype, 'cuda')) <= 4, shape
