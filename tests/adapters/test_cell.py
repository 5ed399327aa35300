"""The cells of the adapter benchmark on a model too small to conclude from, and the peer."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, needs, words

from model import GPT, GPTConfig
from nanomla.adapters import cell as cells
from nanomla.adapters.adapted import (
    KERNELS,
    CellName,
    CellSettings,
    OurModel,
    PerceiverAttention,
    is_causal,
    to_mla,
)
from nanomla.adapters.cell import AS_ASKED, Measurement, attention_of, load_data, measure_or_reason
from nanomla.adapters.lora import UnavailableError
from nanomla.adapters.packing import DocumentRows
from nanomla.adapters.peft_peer import Peer
from nanomla.checkpoints import export
from nanomla.core.configurator import UserError, configure
from nanomla.inference.cache import Cache

needs('peft', 'bitsandbytes', 'rouge_score')
CPU = torch.device('cpu')
TINY = dict(
    block_size=96,
    batch_size=2,
    n_train=3,
    n_val=2,
    steps=2,
    warmup_steps=1,
    seeds=1,
    max_new_tokens=3,
    mla_rank=32,
    mla_rope_pairs=4,
    device='cpu',
    lora_r=4,
    data='data',
)
PHASES = ('load', 'train', 'eval', 'generate')


@pytest.fixture(autouse=True)
def data_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / 'data'
    data.mkdir()
    for split, n in (('train', 6), ('val', 3)):
        rows = [dict(question=f'{i} + 1?', response=f'It is {i + 1}.') for i in range(n)]
        (data / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def settings(model='random:tiny', **changes):
    page = configure({'__file__': str(ROOT / 'bench_adapters.py')}, words(TINY | changes))
    return CellSettings.of(dict(page, model=model))


def measure(kind, kernel, peer=False, **changes):
    cell = CellName(kind, kernel, peer)
    return cells.measure(settings(**changes), cell, Path('data'), Path('traces/t.json'))


def llama(**more):
    """Return a small Llama whose weights are all random."""
    torch.manual_seed(0)
    shape = dict(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=64)
    how = dict(pos='rope', act='swiglu', norm='rmsnorm', bias=False, tie_weights=False)
    model = GPT(GPTConfig(**shape, **how, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=p.size(1) ** -0.5)
    return model


# -------------------------------------------------------------------------------------------------
# kernels and attentions


@pytest.mark.parametrize('packed', [False, True])
def test_kernels_agree_with_padding_and_without(packed):
    model = llama()
    documents = []
    for n in (20, 7, 13):
        documents.append((torch.randint(64, (n,)).tolist(), torch.randint(64, (n,)).tolist()))
    batch = DocumentRows(documents, 24, packed).batch(range(2), 'cpu')
    without_padding = torch.cat([torch.arange(24) < sum(row[:-1] or row) for row in batch.lengths])
    found = {}
    for kernel in ('eager', 'sdpa', 'flash'):
        for block in model.transformer.h:
            block.attn.kernel = kernel
        hidden = model.hidden(batch.idx, batch.documents).flatten(0, 1)
        found[kernel] = hidden[without_padding]
    assert all((found['eager'] - other).abs().max() < 1e-5 for other in found.values())


@pytest.mark.parametrize('kernel', ['eager', 'sdpa', 'flash'])
def test_a_future_token_moves_no_earlier_logit(kernel):
    assert is_causal(llama(kernel=kernel), CPU)


def test_the_first_study_s_latents_see_the_future():
    model = llama()
    for block in model.transformer.h:
        block.attn = PerceiverAttention(model.config)
    assert not is_causal(model, CPU)
    x = torch.randn(1, 12, 64, requires_grad=True)
    model.transformer.h[0].attn(x, None)[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()  # the first output depends on every token


@pytest.mark.parametrize(
    'kind, targets, elsewhere',
    [
        ('lora', 'q_proj,k_proj,v_proj,o_proj', set()),
        ('qlora', 'q_proj,down_proj', {'down_proj'}),
        ('lora', 'all', {'gate_proj', 'up_proj', 'down_proj'}),
    ],
)
def test_latents_have_no_adapters_and_learn_themselves(kind, targets, elsewhere):
    s = settings(targets=targets, dtype='float32')
    subject = OurModel(s, kind, 'latent', CPU, torch.float32)
    paths = [path.split('.') for path, p in subject.model.named_parameters() if p.requires_grad]
    assert {path[4] for path in paths if 'attn' in path} == {'latents', 'read', 'write'}
    assert {path[5] for path in paths if 'attn' not in path} == elsewhere


def test_mla_cells_are_conversions_not_random_ones():
    model, idx = llama(), torch.randint(64, (2, 20))
    text = torch.randint(64, (4, 24))
    with torch.no_grad():
        before = model(idx)
        exact = to_mla(model, None, 0, -1)
        assert (exact(idx) - before).abs().max() < 1e-4 and is_causal(exact, CPU)
        converted = to_mla(llama(), text, 48, 8)
        error = converted(idx) - before
        assert is_causal(converted, CPU) and 0 < error.abs().max() < before.abs().max()
        narrower = to_mla(llama(), text, 16, 8)(idx) - before
        assert error.square().mean() < narrower.square().mean()


def test_a_conversion_that_cannot_be_is_a_reason_in_our_options():
    with pytest.raises(UnavailableError, match='mla_rank=512 and mla_rope_pairs=8 do not go'):
        to_mla(llama(), None, 512, 8)
    with pytest.raises(UnavailableError, match='MLA already'):
        to_mla(to_mla(llama(), None, 0, -1), None, 0, -1)


@pytest.mark.parametrize(
    'kernel, ran',
    [
        ('eager', 'eager'),
        pytest.param('sdpa', 'flash', marks=pytest.mark.slow),
        ('flash', 'flash'),
        pytest.param('latent', 'flash', marks=pytest.mark.slow),
    ],
)
def test_the_profile_shows_which_kernel_ran(kernel, ran):
    s = settings()
    subject = OurModel(s, 'lora', kernel, CPU, torch.float32)
    subject.set_up(documents=True)
    run = Measurement(s, subject, load_data(s, None, 256, Path('data')), CPU, {})
    row = run.profile(Path('traces/t.json'), KERNELS[kernel])
    assert row['kernel_ran'] == ran and row['kernel_proved']
    assert subject.causal == (kernel != 'latent')
    assert row['top_operators']
    assert all(operator['ms'] > 0 for operator in row['top_operators'])
    events = json.loads(Path('traces/t.json').read_text())['traceEvents']
    names = {str(event.get('name')) for event in events}
    assert any('aten::mm' in name or 'aten::addmm' in name for name in names)


@pytest.mark.parametrize(
    'operators, attention',
    [
        (['aten::bmm', 'aten::_scaled_dot_product_flash_attention_for_cpu'], 'flash'),
        (['aten::_scaled_dot_product_cudnn_attention_backward'], 'cudnn'),
        (
            ['triton_tem_fused_flex_attention_0', 'aten::_scaled_dot_product_flash_attention'],
            'flex',
        ),
        (['aten::bmm'], 'eager'),
        (['aten::add'], 'none'),
    ],
)
def test_another_kernel_than_asked_for_is_noticed(operators, attention):
    assert attention_of(operators) == attention
    assert 'flash' not in AS_ASKED['eager'] | AS_ASKED['cudnn']


# -------------------------------------------------------------------------------------------------
# rows


def test_the_row_of_a_cell_is_complete():
    row = measure('qlora', 'paged', seeds=2)
    speeds = ['train_tok_per_s', 'train_samples_per_s', 'eval_tok_per_s', 'generate_tok_per_s']
    speeds += ['step_ms', 'limit_tok_per_s', 'percent_of_limit']
    assert all(row[name] > 0 for name in speeds)
    assert row['train_tok_per_s_least'] <= row['train_tok_per_s'] <= row['train_tok_per_s_most']
    for phase in PHASES:
        assert {f'{phase}_allocated_mib', f'{phase}_reserved_mib'} <= row.keys()
    for name in ('rouge1', 'rouge2', 'rougeL', 'exact_match', 'token_f1'):
        assert 0 <= row[name] <= 1 and 0 <= row[f'teacher_{name}'] <= 1
    assert row['cache'] == 'paged' and row['causal'] and row['kernel_proved']
    assert 0.5 < row['storage_bytes_per_parameter'] < 0.75  # small matrices have large tables
    assert 0 < row['trainable_parameters'] < row['parameters']
    assert 4 < row['val_loss'] < 7
    perplexity = torch.tensor(row['val_loss']).exp().item()
    assert row['perplexity'] == pytest.approx(perplexity, rel=1e-4)
    assert Path('traces/t.json').exists()
    timed = TINY['steps'] - TINY['warmup_steps']
    assert [len(ms) for ms in row['warmup_ms']] == [TINY['warmup_steps']] * 2
    assert [len(ms) for ms in row['step_ms_all']] == [timed] * 2
    steps = sum(row['step_ms_all'], [])
    assert row['step_ms_least'] == pytest.approx(min(steps), abs=0.01)
    assert row['step_ms_most'] == pytest.approx(max(steps), abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize('peer', [False, True])
def test_a_later_seed_takes_no_more_memory_than_the_first(peer):
    one = measure('lora', 'sdpa', peer, device='cuda', seeds=1, profile=False)
    three = measure('lora', 'sdpa', peer, device='cuda', seeds=3)
    for phase in PHASES:  # one workspace of cuBLAS is 32 MiB
        key = f'{phase}_allocated_mib'
        assert abs(one[key] - three[key]) < 8, phase


def test_documents_cut_before_their_answers_still_give_a_row():
    row = measure('lora', 'sdpa', block_size=8, profile=False)
    assert row['cut_documents'] == 3 and row['val_loss'] == 0
    assert 'teacher_rougeL' not in row and row['generate_tok_per_s'] > 0


@pytest.mark.parametrize('kind', ['full', pytest.param('qlora', marks=pytest.mark.slow)])
def test_the_peer_goes_through_the_same(kind):
    row = measure(kind, 'sdpa', peer=True)
    assert row['train_tok_per_s'] > 0 and 4 < row['val_loss'] < 7
    assert row['kernel_proved'] and row['kernel_ran'] == 'flash'
    ours = measure(kind, 'sdpa', profile=False)
    for name in ('parameters', 'trainable_parameters', 'flops_per_token'):
        assert row[name] == ours[name]


def test_the_peer_of_the_same_weights_computes_the_same():
    export.export(llama(), 'folder')
    s = settings('folder', block_size=24)
    subjects = [kind(s, 'lora', 'sdpa', CPU, torch.float32) for kind in (OurModel, Peer)]
    for subject in subjects:
        subject.set_up(documents=False)
        subject.model.eval()
    documents = []
    for n in (11, 12, 20):
        ids = torch.randint(64, (n,)).tolist()
        documents.append((ids, [-1] * 2 + ids[3:] + [-1]))
    for packed in (True, False):
        batch = DocumentRows(documents, 24, packed).batch(range(2), 'cpu')
        count = torch.tensor(float(batch.counted))
        with torch.no_grad():
            ours, theirs = (subject.loss(batch, count).item() for subject in subjects)
        assert ours == pytest.approx(theirs, abs=1e-5)
    prompts = [[1, 2, 3, 4], [5, 6]]
    asked = [(prompts, 6), ([[7, 8, 9]], 4), (prompts[::-1], 3)]
    with torch.no_grad():
        for a, b in zip(*(subject.answers(asked) for subject in subjects), strict=True):
            assert torch.equal(a, b)


def test_the_peer_of_an_mla_model():
    export.export(mla_model(), 'folder')
    s = settings('folder', block_size=24)
    ours, peer = (kind(s, 'lora', 'sdpa', CPU, torch.float32) for kind in (OurModel, Peer))
    assert ours.flops == peer.flops
    adapted = {path.split('.')[-4] for path, _ in peer.model.named_parameters() if 'lora_A' in path}
    assert adapted >= {'q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj'}


def mla_model():
    """Return a small MLA model that can be exported."""
    from model_mla import GPT_MLA, MLAConfig

    shape = dict(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=64)
    how = dict(act='swiglu', norm='rmsnorm', bias=False, tie_weights=False)
    widths = dict(q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8)
    return GPT_MLA(MLAConfig(**shape, **how, **widths)).eval()


@pytest.mark.gpu
@pytest.mark.parametrize(
    'kind, kernel',
    [('lora', 'sdpa'), ('qlora', 'paged'), ('full', 'mla'), ('qlora', 'mla'), ('lora', 'eager')],
)
def test_recorded_answers_on_a_gpu(kind, kernel, monkeypatch):
    subject = OurModel(settings(block_size=64), kind, kernel, torch.device('cuda'), torch.float32)
    subject.model.eval()
    asked = [([[1, 2, 3, 4], [5, 6]], 4), ([[1, 2, 3, 4], [5, 6]], 12), ([[7, 8, 9]], 8)]
    make, made = Cache.of, []
    for static in (True, False):

        def make_cache(*args, static=static, **options):
            return make(*args, **options | dict(static=static))

        monkeypatch.setattr(Cache, 'of', lambda *args, make=make_cache, **how: make(*args, **how))
        with torch.no_grad():
            made.append(list(subject.answers(asked)))
    for recorded, plain in zip(*made, strict=True):
        assert torch.equal(recorded, plain), (recorded, plain)


@pytest.mark.slow
def test_training_learns():
    row = measure('lora', 'sdpa', steps=12, profile=False, learning_rate=1e-2)
    assert row['train_loss'] < row['first_loss'] and row['val_loss'] < row['val_loss_before']


# -------------------------------------------------------------------------------------------------
# cells that cannot run


@pytest.mark.parametrize(
    'kernel, reason',
    [('cudnn', 'cuDNN needs a CUDA GPU'), ('flex', 'FlexAttention does not train on the CPU')],
)
def test_a_kernel_that_is_not_here_is_a_reason(kernel, reason):
    with pytest.raises(UnavailableError, match=reason):
        measure('lora', kernel)
    row = measure_or_reason(settings(), CellName('lora', kernel), Path('data'), Path('t.json'))
    assert row == dict(status='n/a', reason=reason)


def test_a_kernel_that_the_peer_has_not_is_a_reason():
    for kernel, reason in (('flex', 'does not train on the CPU'), ('mla', 'has no such kernel')):
        with pytest.raises(UnavailableError, match=reason):
            Peer(settings(), 'lora', kernel, CPU, torch.float32)


def test_a_package_that_is_not_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    row = measure_or_reason(settings(), CellName('lora', 'sdpa'), Path('data'), Path('t.json'))
    assert row['status'] == 'n/a' and 'LoRA needs peft: pip install' in row['reason']


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory'),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_a_cell_without_memory_is_a_reason(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(cells, 'load_subject', fail)
    row = measure_or_reason(settings(), CellName('lora', 'sdpa'), Path('data'), Path('t.json'))
    assert row['status'] == 'out of memory' and row['reason'].startswith('more than CPU')


def test_other_errors_are_raised(monkeypatch):
    def fail(*args):
        raise RuntimeError('a bug')

    monkeypatch.setattr(cells, 'load_subject', fail)
    with pytest.raises(RuntimeError, match='a bug'):
        measure_or_reason(settings(), CellName('lora', 'sdpa'), Path('data'), Path('t.json'))
    with pytest.raises(UserError, match='block_size=4096 is more than random:tiny was made for'):
        OurModel(settings(block_size=4096), 'lora', 'sdpa', CPU, torch.float32)


@pytest.mark.parametrize('name', ['lora/sdpa', 'full/mla', 'qlora/eager/peer'])
def test_the_name_of_a_cell(name):
    assert str(CellName.parse(name)) == name
    assert CellName.parse(name).peer == name.endswith('/peer')
