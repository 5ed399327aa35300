"""bench_adapters.py: its cells on a model too small to tell anything, the peer beside it, its grid, its table and its errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('peft')
pytest.importorskip('bitsandbytes')
pytest.importorskip('rouge_score')

from helpers import PATIENCE, exit_code, wait_until, words

from model import GPT, GPTConfig
from nanomla.adapters import cell as cells
from nanomla.adapters import peft_peer
from nanomla.adapters import report as adapter_table
from nanomla.adapters import step as finetuning
from nanomla.adapters.cell import KERNELS, Ours, Perceiver, is_causal, to_mla
from nanomla.adapters.packing import Rows
from nanomla.checkpoints import export
from nanomla.core.configurator import configure
from nanomla.inference.cache import Cache

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('NANOMLA_COMMIT', 'abc1234')
    data = tmp_path / 'data'
    data.mkdir()
    for split, n in (('train', 6), ('val', 3)):
        (data / f'{split}.jsonl').write_text(
            ''.join(
                json.dumps(dict(question=f'{i} + 1?', response=f'It is {i + 1}.')) + '\n'
                for i in range(n)
            )
        )
    (tmp_path / 'c.json').write_text(json.dumps(TINY))


def settings(**changes):
    return SimpleNamespace(
        **configure({'__file__': str(ROOT / 'bench_adapters.py')}, words(TINY | changes)),
        model='random:tiny',
    )


def measure(kind, kernel, theirs=False, **changes):
    return cells.measure(
        settings(**changes), kind, kernel, theirs, Path('data'), Path('traces/t.json')
    )


# ---------------------------------------------------------------------------------------------------
# kernels


def llama(**more):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=32,
            vocab_size=64,
            n_layer=2,
            n_head=4,
            n_embd=64,
            pos='rope',
            act='swiglu',
            norm='rmsnorm',
            bias=False,
            tie_weights=False,
            **more,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=p.size(1) ** -0.5)
    return model


def test_kernels_agree_with_padding_and_without():
    model = llama()
    documents = [
        (torch.randint(64, (n,)).tolist(), torch.randint(64, (n,)).tolist()) for n in (20, 7, 13)
    ]
    for packed in (False, True):
        batch = Rows(documents, 24, packed).batch(range(2), 'cpu')
        found = {}
        for kernel in ('eager', 'sdpa', 'flash'):
            for block in model.transformer.h:
                block.attn.kernel = kernel
            real = torch.cat(
                [
                    torch.arange(24) < sum(n for n in lengths[:-1] or lengths)
                    for lengths in batch.lengths
                ]
            )
            found[kernel] = model.hidden(batch.idx, batch.documents).flatten(0, 1)[real]
        assert all((found['eager'] - other).abs().max() < 1e-5 for other in found.values())


@pytest.mark.parametrize('kernel', ['eager', 'sdpa', 'flash'])
def test_a_future_token_moves_no_earlier_logit(kernel):
    model = llama(kernel=kernel)
    assert is_causal(model, 'cpu')


def test_the_first_study_s_latents_see_the_future():
    model = llama()
    for block in model.transformer.h:
        block.attn = Perceiver(model.config)
    assert not is_causal(model, 'cpu')
    idx = torch.randint(64, (1, 12))
    model.transformer.wte.weight.requires_grad_(True)
    x = model.transformer.wte(idx).detach().requires_grad_(True)
    model.transformer.h[0].attn(x, None)[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()  # the first output depends on every token


@pytest.mark.parametrize(
    'kind, targets',
    [('lora', 'q_proj,k_proj,v_proj,o_proj'), ('qlora', 'q_proj,down_proj'), ('lora', 'all')],
)
def test_latents_have_no_adapters_and_learn_themselves(kind, targets):
    cell = Ours(
        settings(targets=targets, dtype='float32'),
        kind,
        'latent',
        torch.device('cpu'),
        torch.float32,
    )
    learn = {name for name, p in cell.model.named_parameters() if p.requires_grad}
    assert {name.split('.')[4] for name in learn if '.attn.' in name} == {
        'latents',
        'read',
        'write',
    }
    elsewhere = {name.split('.')[5] for name in learn if '.attn.' not in name}
    assert elsewhere == dict(all={'gate_proj', 'up_proj', 'down_proj'}).get(
        targets, {'down_proj'} if 'down' in targets else set()
    )


def test_mla_cells_are_conversions_not_random_ones():
    model, idx = llama(), torch.randint(64, (2, 20))
    with torch.no_grad():
        before = model(idx)
        whole = to_mla(model, None, 0, -1)
        assert (whole(idx) - before).abs().max() < 1e-4 and is_causal(whole, 'cpu')
        text = torch.randint(64, (4, 24))
        some = to_mla(llama(), text, 48, 8)
        assert is_causal(some, 'cpu') and 0 < (some(idx) - before).abs().max() < before.abs().max()
        nearer = (to_mla(llama(), text, 48, 8)(idx) - before).square().mean()
        assert nearer < (to_mla(llama(), text, 16, 8)(idx) - before).square().mean()


@pytest.mark.parametrize(
    'kernel, ran',
    [
        ('eager', 'eager'),
        pytest.param('sdpa', 'flash', marks=pytest.mark.slow),
        ('flash', 'flash'),
        pytest.param('latent', 'flash', marks=pytest.mark.slow),
    ],
)
def test_the_profile_tells_which_kernel_ran(kernel, ran):
    s = settings(profile=True)
    train, *_ = cells.data_of(s, None, 256, Path('data'))
    cell = Ours(s, 'lora', kernel, torch.device('cpu'), torch.float32)
    row = cells.profile(s, cell, train, Path('traces/t.json'), torch.device('cpu'), KERNELS[kernel])
    assert row['kernel_ran'] == ran and row['kernel_proved'] and cell.causal == (kernel != 'latent')
    assert row['top_operators'] and all(
        op['ms'] > 0 and op['calls'] >= 0 for op in row['top_operators']
    )
    names = {
        event.get('name') for event in json.loads(Path('traces/t.json').read_text())['traceEvents']
    }
    assert any('aten::mm' in str(name) or 'aten::addmm' in str(name) for name in names)


def test_another_kernel_than_asked_for_is_noticed():
    assert (
        cells.attention_of(['aten::bmm', 'aten::_scaled_dot_product_flash_attention_for_cpu'])
        == 'flash'
    )
    assert (
        cells.attention_of(
            [
                'aten::_scaled_dot_product_cudnn_attention',
                'aten::_scaled_dot_product_cudnn_attention_backward',
            ]
        )
        == 'cudnn'
    )
    assert (
        cells.attention_of(
            ['triton_tem_fused_flex_attention_0', 'aten::_scaled_dot_product_flash_attention']
        )
        == 'flex'
    )
    assert 'flash' not in cells.PROVES['eager'] | cells.PROVES['cudnn']


# ---------------------------------------------------------------------------------------------------
# cells


def test_a_cell_s_row_is_complete():
    row = measure('qlora', 'paged', seeds=2)
    speeds = (
        'train_tok_per_s',
        'train_samples_per_s',
        'eval_tok_per_s',
        'generate_tok_per_s',
        'step_ms',
        'limit_tok_per_s',
        'percent_of_limit',
    )
    assert (
        all(row[name] > 0 for name in speeds)
        and row['train_tok_per_s_least'] <= row['train_tok_per_s'] <= row['train_tok_per_s_most']
    )
    assert {
        f'{phase}_{what}_mib'
        for phase in ('load', 'train', 'eval', 'generate')
        for what in ('allocated', 'reserved')
    } <= row.keys()
    assert all(
        0 <= row[f'{of}{name}'] <= 1
        for of in ('', 'teacher_')
        for name in ('rouge1', 'rouge2', 'rougeL', 'exact_match', 'token_f1')
    )
    assert (
        row['cache'] == 'paged'
        and row['causal']
        and row['kernel_proved']
        and 0 < row['trainable_parameters'] < row['parameters']
    )
    assert 4 < row['val_loss'] < 7 and row['perplexity'] == pytest.approx(
        torch.tensor(row['val_loss']).exp().item(), rel=1e-4
    )
    assert Path('traces/t.json').exists()
    assert [len(ms) for ms in row['warmup_ms']] == [TINY['warmup_steps']] * 2 and [
        len(ms) for ms in row['step_ms_all']
    ] == [TINY['steps'] - TINY['warmup_steps']] * 2
    assert row['step_ms_least'] == pytest.approx(
        min(map(min, row['step_ms_all'])), abs=0.01
    ) and row['step_ms_most'] == pytest.approx(max(map(max, row['step_ms_all'])), abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize('theirs', [False, True])
def test_a_later_seed_takes_no_more_memory_than_the_first(theirs):
    one, three = (
        measure('lora', 'sdpa', theirs, device='cuda', seeds=seeds, profile=seeds > 1)
        for seeds in (1, 3)
    )
    for phase in ('load', 'train', 'eval', 'generate'):
        assert abs(one[f'{phase}_allocated_mib'] - three[f'{phase}_allocated_mib']) < 8, (
            phase
        )  # one workspace of cuBLAS is 32


@pytest.mark.parametrize('kind', ['full', pytest.param('qlora', marks=pytest.mark.slow)])
def test_the_peer_goes_through_the_same(kind):
    row = measure(kind, 'sdpa', theirs=True)
    assert (
        row['train_tok_per_s'] > 0
        and 4 < row['val_loss'] < 7
        and row['kernel_proved']
        and row['kernel_ran'] == 'flash'
    )
    ours = measure(kind, 'sdpa', profile=False)
    assert (row['parameters'], row['trainable_parameters'], row['flops_per_token']) == (
        ours['parameters'],
        ours['trainable_parameters'],
        ours['flops_per_token'],
    )


def test_the_peer_of_the_same_weights_says_the_same():
    export.export(llama(), 'folder')
    s, cpu = settings(block_size=24), torch.device('cpu')
    s.model = 'folder'
    ours, theirs = (kind(s, 'lora', 'sdpa', cpu, torch.float32) for kind in (Ours, peft_peer.Peer))
    for cell in (ours, theirs):
        cell.model.eval()
    documents = [
        (torch.randint(64, (n,)).tolist(), [-1] * 2 + torch.randint(64, (n - 3,)).tolist() + [-1])
        for n in (11, 12, 20)
    ]
    for packed in (True, False):
        batch = Rows([(ids, [-1] * 2 + ids[3:] + [-1]) for ids, _ in documents], 24, packed).batch(
            range(2), 'cpu'
        )
        count = torch.tensor(float(batch.counted))
        with torch.no_grad():
            losses = [cell.loss_of(cell.model, batch, count).item() for cell in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    prompts = [[1, 2, 3, 4], [5, 6]]
    with torch.no_grad():
        asked = [(prompts, 6), ([[7, 8, 9]], 4), (prompts[::-1], 3)]
        assert all(
            torch.equal(a, b)
            for a, b in zip(ours.answers(asked), theirs.answers(asked), strict=True)
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    'kind, kernel',
    [('lora', 'sdpa'), ('qlora', 'paged'), ('full', 'mla'), ('qlora', 'mla'), ('lora', 'eager')],
)
def test_recorded_answers_on_a_gpu(kind, kernel, monkeypatch):
    s, gpu = settings(block_size=64), torch.device('cuda')
    cell = Ours(s, kind, kernel, gpu, torch.float32)
    cell.model.eval()
    asked, made = [([[1, 2, 3, 4], [5, 6]], 4), ([[1, 2, 3, 4], [5, 6]], 12), ([[7, 8, 9]], 8)], []
    of = Cache.of
    for static in (True, False):
        monkeypatch.setattr(
            Cache, 'of', lambda *args, **how: of(*args, **how | dict(static=static))
        )
        with torch.no_grad():
            made.append(list(cell.answers(asked)))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b), (a, b)


@pytest.mark.parametrize(
    'kernel, why',
    [('cudnn', 'cuDNN needs a CUDA GPU'), ('flex', 'FlexAttention does not train on the CPU')],
)
def test_a_kernel_that_is_not_here_is_a_reason(kernel, why):
    if kernel == 'flex':
        with pytest.raises(finetuning.NotHere, match=why):
            peft_peer.Peer(settings(), 'lora', kernel, torch.device('cpu'), torch.float32)
    with pytest.raises(finetuning.NotHere, match=why):
        measure('lora', kernel)


@pytest.mark.slow
def test_training_learns():
    row = measure('lora', 'sdpa', steps=12, profile=False, learning_rate=1e-2)
    assert row['train_loss'] < row['first_loss'] and row['val_loss'] < row['val_loss_before']


# ---------------------------------------------------------------------------------------------------
# the grid


def bench(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / 'bench_adapters.py', *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_bad_input_is_one_line(capsys):
    cases = [
        ([], 'give MODEL CONFIG.json OUT'),
        (['random:tiny', 'c.json'], 'give MODEL CONFIG.json OUT, not random:tiny c.json'),
        (['random:tiny', 'none.json', 'out'], 'none.json: cannot be read'),
        (
            ['random:tiny', 'c.json', 'out', '--kernels=eager,sdp'],
            "kernels: 'sdp' is not known: use eager",
        ),
        (
            ['random:tiny', 'c.json', 'out', '--adapters=dora'],
            "adapters: 'dora' is not known: use full, lora, qlora",
        ),
        (['random:tiny', 'c.json', 'out', '--lora_rr=3'], 'did you mean --lora_r?'),
        (['random:tiny', 'c.json', 'out', '--cell=lora/nope'], 'is none of this grid'),
        (['random:tiny', 'c.json', 'out', '--data=nowhere'], 'there is no train.jsonl'),
        (['random:tiny', 'bad.json', 'out'], 'bad.json: lora_rank=3: unknown setting'),
        (['random:tiny', 'broken.json', 'out'], 'broken.json: not JSON'),
        (['random:tiny', 'list.json', 'out'], 'settings are one object'),
        (['random:tiny', 'per.json', 'out'], 'per_adapter knows full, lora, qlora, not dora'),
        (['random:tiny', 'c.json', 'out', '--steps=1'], 'steps=1 must be more than warmup_steps=1'),
    ]
    for name, text in (
        ('bad', '{"lora_rank": 3}'),
        ('broken', '{'),
        ('list', '[]'),
        ('per', '{"data": "data", "per_adapter": {"dora": {}}}'),
    ):
        Path(f'{name}.json').write_text(text)
    for arguments, said in cases:
        code = exit_code('bench_adapters.py', arguments)
        err = capsys.readouterr().err.strip()
        assert code == 2 and said in err and err.count('\n') == 0, (arguments, err)
    assert not Path('out').exists()


def test_the_shipped_presets_are_settings(capsys):
    for name, n in (('adapters', 24), ('adapters_study', 27), ('adapters_speed', 30)):
        assert not exit_code(
            'bench_adapters.py',
            [
                'random:tiny',
                str(ROOT / f'config/{name}.json'),
                'out',
                '--show_grid=True',
                '--data=data',
            ],
        )
        lines = capsys.readouterr().out.split('\n')[:-1]
        assert (
            len(lines) == n
            and lines[0] == '0 full/eager'
            and any(line.endswith('qlora/sdpa/peer') for line in lines)
        )


def test_an_adapter_s_own_settings_are_in_its_rows_alone(capsys):
    Path('per.json').write_text(
        json.dumps(TINY | dict(per_adapter=dict(lora=dict(lora_r=7, targets=['q_proj', 'v_proj']))))
    )
    for kind in ('lora', 'qlora'):
        assert not exit_code(
            'bench_adapters.py',
            ['random:tiny', 'per.json', 'out', f'--cell={kind}/cudnn', '--seed=3'],
        )
    rows = [json.loads(path.read_text()) for path in sorted(Path('out/cells').iterdir())]
    assert [
        (row['settings']['lora_r'], row['settings']['targets'], row['settings']['seed'])
        for row in rows
    ] == [(7, 'q_proj,v_proj', 3), (4, 'all', 3)]


def test_a_row_belongs_to_its_settings_and_its_data(capsys):
    def cell(*more):
        assert not exit_code(
            'bench_adapters.py', ['random:tiny', 'c.json', 'out', '--cell=lora/cudnn', *more]
        )
        assert capsys.readouterr().out.startswith('lora/cudnn: n/a: cuDNN needs')
        return sorted(Path('out/cells').iterdir())

    (first,) = cell()
    kept = first.stat().st_mtime_ns
    assert cell() == [first] and first.stat().st_mtime_ns == kept  # it was there
    assert len(cell('--seed=7')) == 2 and len(cell('--wandb_project=x')) == 2
    Path('data/train.jsonl').write_text(Path('data/val.jsonl').read_text())
    assert len(cell()) == 3
    first.write_text('{')
    Path('data/train.jsonl').write_text(
        ''.join(
            json.dumps(dict(question=f'{i} + 1?', response=f'It is {i + 1}.')) + '\n'
            for i in range(6)
        )
    )
    assert (
        len(cell()) == 3 and json.loads(first.read_text())['status'] == 'n/a'
    )  # a damaged row is made again


def test_the_table_holds_every_row(tmp_path):
    ok = dict(
        status='ok',
        model='m',
        peer=False,
        causal=True,
        kernel_ran='flash',
        kernel_proved=True,
        percent_of_limit=50.0,
        step_ms=3.0,
        train_allocated_mib=100,
        train_reserved_mib=120,
        eval_tok_per_s=5.0,
        generate_tok_per_s=5.0,
        val_loss=1.0,
        perplexity=2.7,
        trainable_parameters=1000,
        device='a GPU',
        dtype='bfloat16',
        seeds=3,
        torch='2',
        commit='c',
        settings=dict(seed=1),
    )
    rows = [
        ok
        | dict(
            cell=name,
            adapter='lora',
            kernel=name,
            train_tok_per_s=speed,
            train_tok_per_s_least=speed * 0.9,
            train_tok_per_s_most=speed * 1.1,
        )
        for name, speed in (('sdpa', 200.0), ('mla', 150.0))
    ]
    rows += [
        rows[0]
        | dict(
            cell='lora/sdpa/peer',
            peer=True,
            train_tok_per_s=100.0,
            train_tok_per_s_least=95.0,
            train_tok_per_s_most=105.0,
        ),
        rows[0] | dict(cell='lora/latent', kernel='latent', causal=False, seeds=1),
        rows[0] | dict(cell='lora/flash', kernel='flash', kernel_ran='math', kernel_proved=False),
        dict(
            cell='lora/cudnn',
            adapter='lora',
            kernel='cudnn',
            peer=False,
            status='n/a',
            reason='needs a | GPU',
            model='m',
        ),
        dict(
            cell='full/eager',
            adapter='full',
            kernel='eager',
            peer=False,
            status='out of memory',
            reason='more than it has',
            model='m',
        ),
    ]
    adapter_table.write(rows, tmp_path / 'r', dict(model='m'))
    table = (tmp_path / 'r/results.md').read_text().splitlines()
    assert len(table) == 2 + len(rows) and len({line.count('|') for line in table}) == 1
    assert (
        '| 200 | 2.00 |' in table[2]
        and 'transformers + PEFT' in table[4]
        and 'sees the future' in table[5]
        and 'not what was asked for' in table[6]
    )
    assert 'n/a: needs a / GPU' in table[7] and 'out of memory' in table[8]
    assert len((tmp_path / 'r/results.csv').read_text().splitlines()) == 1 + len(rows)
    assert (
        len(json.loads((tmp_path / 'r/results.json').read_text())['rows']) == len(rows)
        and (tmp_path / 'r/results.png').stat().st_size > 10000
    )


@pytest.mark.slow
def test_the_whole_grid_and_its_resumption_after_a_kill():
    arguments = [
        'random:tiny',
        'c.json',
        'out',
        '--kernels=eager,sdpa,flash,cudnn,flex,paged,mla,latent',
        '--max_new_tokens=2',
    ]
    first = subprocess.Popen(
        [sys.executable, ROOT / 'bench_adapters.py', *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: len(list(Path('out/cells').glob('*.json'))) >= 4, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in Path('out/cells').glob('*.json')}
    assert 4 <= len(before) < 27
    done = bench(*arguments)
    assert done.returncode == 0 and f'{len(before)} of 27 cells are there already' in done.stderr, (
        done.stderr
    )
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    rows = json.loads(Path('out/results.json').read_text())['rows']
    assert len(rows) == 27 and {row['status'] for row in rows} == {'ok', 'n/a'}
    for row in rows:
        assert (row['status'] == 'n/a') == (row['kernel'] in ('cudnn', 'flex')), row
        assert row['status'] == 'n/a' or (
            row['kernel_proved'] and row['causal'] == (row['kernel'] != 'latent')
        ), row
    assert Path('out/results.png').exists() and Path('out/results.md').read_text().count('\n') == 29
    again = bench(*arguments, '--report=True')
    assert again.returncode == 0 and '27 of 27' in again.stderr


@pytest.mark.slow
def test_a_model_folder_that_is_incomplete_ends_it():
    export.export(llama(), 'folder')
    Path('folder/model.safetensors').unlink()
    done = bench('folder', 'c.json', 'out')
    assert done.returncode == 2 and 'folder has no weights' in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------
# the job array

SCRIPT = ROOT / 'slurm' / 'adapters.sbatch'


def job(folder=ROOT, **environment):
    environment = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')} | environment
    bin = Path('bin').absolute()
    bin.mkdir(exist_ok=True)
    (bin / 'python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin / 'python').chmod(0o755)
    return subprocess.run(
        [
            'bash',
            SCRIPT,
            'random:tiny',
            str(Path('c.json').absolute()),
            str(Path('out').absolute()),
            f'--data={Path("data").absolute()}',
            '--kernels=cudnn',
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment | dict(PATH=f'{bin}:{os.environ["PATH"]}'),
    )


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_a_task_of_the_job_array():
    subprocess.run(['bash', '-n', SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith('#SBATCH ')]
    assert lines[0] == '#!/bin/bash' and max(directives) < next(
        number for number, line in enumerate(lines) if line and line[0] != '#'
    )
    assert {'#SBATCH --requeue', '#SBATCH --gpus=1', '#SBATCH --ntasks=1'} < set(lines)
    done = job()
    assert done.returncode == 2 and 'this is a job array' in done.stderr
    done = job(SLURM_ARRAY_TASK_ID='99')
    assert done.returncode == 0 and 'no cell 99' in done.stdout
    done = job(folder=Path('bin'), SLURM_ARRAY_TASK_ID='0')
    assert done.returncode == 2 and 'there is no bench_adapters.py' in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_a_task_runs_its_cell():
    done = job(SLURM_ARRAY_TASK_ID='2')
    assert (
        done.returncode == 0
        and 'cell 2, lora/cudnn' in done.stdout
        and done.stdout.splitlines()[-1].startswith('lora/cudnn: n/a')
    ), done.stderr
    assert len(list(Path('out/cells').iterdir())) == 1
