"""bench_adapters.py: its grid, its rows, its table, its errors and its job array."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, ROOT, exit_code, needs, wait_until

import bench_adapters
from model import GPT, GPTConfig
from nanomla.adapters import report
from nanomla.checkpoints import export

needs('peft', 'bitsandbytes', 'rouge_score')
CELLS = 'out/cells'
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
ARGUMENTS = ['random:tiny', 'c.json', 'out']


pytestmark = pytest.mark.usefixtures('blank_pictures')


@pytest.fixture(autouse=True)
def data_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('NANOMLA_COMMIT', 'abc1234')
    (tmp_path / 'data').mkdir()
    write_data('train', 6)
    write_data('val', 3)
    (tmp_path / 'c.json').write_text(json.dumps(TINY))


def write_data(split, n):
    rows = [dict(question=f'{i} + 1?', response=f'It is {i + 1}.') for i in range(n)]
    Path(f'data/{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def bench(*arguments):
    """Run bench_adapters.py in a process of its own."""
    command = [sys.executable, ROOT / 'bench_adapters.py', *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)


def bench_here(*arguments):
    """Run bench_adapters.py in this process, which forks one for each cell; return the code."""
    if torch.cuda.is_available():  # CUDA may be awake here, and does not outlive a fork
        return bench(*arguments).returncode
    return exit_code('bench_adapters.py', arguments)


def make_folder(name):
    shape = dict(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=64)
    how = dict(pos='rope', act='swiglu', norm='rmsnorm', bias=False, tie_weights=False)
    export.export(GPT(GPTConfig(**shape, **how)), name)


# -------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'give MODEL CONFIG.json OUT'),
        (['random:tiny', 'c.json'], 'give MODEL CONFIG.json OUT, not random:tiny c.json'),
        (['random:tiny', 'none.json', 'out'], 'none.json: cannot be read'),
        ([*ARGUMENTS, '--kernels=eager,sdp'], "kernels='sdp' is not known: use eager"),
        ([*ARGUMENTS, '--adapters=dora'], "adapters='dora' is not known: use full, lora, qlora"),
        ([*ARGUMENTS, '--lora_rr=3'], 'did you mean --lora_r?'),
        ([*ARGUMENTS, '--cell=lora/nope'], 'is none of this grid'),
        ([*ARGUMENTS, '--data=nowhere'], 'there is no train.jsonl'),
        ([*ARGUMENTS, '--batch_size=0'], 'batch_size=0 must be at least 1'),
        ([*ARGUMENTS, '--steps=1'], 'steps=1 must be more than warmup_steps=1'),
        (['random:huge', 'c.json', 'out'], 'random:huge is not known'),
        (['random:tiny', 'bad.json', 'out'], 'bad.json: lora_rank=3: unknown setting'),
        (['random:tiny', 'broken.json', 'out'], 'broken.json: not JSON'),
        (['random:tiny', 'list.json', 'out'], 'settings are one object'),
        (['random:tiny', 'null.json', 'out'], 'settings are one object'),
        (['random:tiny', 'kinds.json', 'out'], 'settings are one object'),
        (
            ['random:tiny', 'dora.json', 'out'],
            'per_adapter knows full, lora, qlora, not dora',
        ),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    files = dict(
        bad='{"lora_rank": 3}',
        broken='{',
        list='[]',
        null='{"steps": null}',
        kinds='{"per_adapter": 3}',
        dora='{"data": "data", "per_adapter": {"dora": {}}}',
    )
    for name, text in files.items():
        Path(f'{name}.json').write_text(text)
    assert exit_code('bench_adapters.py', arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count('\n') == 0
    assert not Path('out').exists()


@pytest.mark.parametrize(
    'name, cells', [('adapters', 24), ('adapters_study', 27), ('adapters_speed', 30)]
)
def test_the_shipped_presets_are_settings(capsys, name, cells):
    config = str(ROOT / f'config/{name}.json')
    arguments = ['random:tiny', config, 'out', '--show_grid=True', '--data=data']
    assert not exit_code('bench_adapters.py', arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == cells and lines[0] == '0 full/eager'
    assert any(line.endswith('qlora/sdpa/peer') for line in lines)


def test_settings_are_the_page_alone():
    command = bench_adapters.Command('random:tiny', 'c.json', Path('out'), [])
    settings = command.settings()
    assert list(settings)[0] == 'adapters' and list(settings)[-1] == 'wandb_project'
    assert all(name.islower() for name in settings)


def test_help_loads_no_torch():
    code = (
        'import sys, runpy; sys.argv = ["bench_adapters.py", "--help"]\n'
        'try: runpy.run_path("bench_adapters.py", run_name="__main__")\n'
        'except SystemExit: pass\n'
        'assert "torch" not in sys.modules and "matplotlib" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True)


def test_settings_of_one_adapter_are_in_its_rows_alone():
    own = dict(lora=dict(lora_r=7, targets=['q_proj', 'v_proj']))
    Path('c.json').write_text(json.dumps(TINY | dict(per_adapter=own)))
    for kind in ('lora', 'qlora'):
        arguments = [*ARGUMENTS, f'--cell={kind}/cudnn', '--seed=3']
        assert not exit_code('bench_adapters.py', arguments)
    found = []
    for path in sorted(Path(CELLS).iterdir()):
        used = json.loads(path.read_text())['settings']
        found.append((used['lora_r'], used['targets'], used['seed']))
    assert found == [(7, 'q_proj,v_proj', 3), (4, 'all', 3)]


def test_rows_are_no_longer_than_the_model_allows(capsys):
    arguments = [*ARGUMENTS, '--cell=lora/cudnn', '--block_size=2048']
    assert not exit_code('bench_adapters.py', arguments)
    assert 'block_size=128: random:tiny has no more positions' in capsys.readouterr().err
    (path,) = Path(CELLS).iterdir()
    assert json.loads(path.read_text())['settings']['block_size'] == 128


# -------------------------------------------------------------------------------------------------
# rows


def test_a_row_belongs_to_its_settings_and_its_data(capsys):
    def run_cell(*more):
        assert not exit_code('bench_adapters.py', [*ARGUMENTS, '--cell=lora/cudnn', *more])
        assert capsys.readouterr().out.startswith('lora/cudnn: n/a: cuDNN needs')
        return sorted(Path(CELLS).iterdir())

    (first,) = run_cell()
    written = first.stat().st_mtime_ns
    assert run_cell() == [first] and first.stat().st_mtime_ns == written  # it was there
    assert len(run_cell('--seed=7')) == 2
    assert len(run_cell('--wandb_project=x')) == 2
    write_data('train', 3)
    assert len(run_cell()) == 3
    write_data('train', 6)
    for damaged in ('{', '{"status": "ok"}', '[]', '{"status": ["n/a"]}'):
        first.write_text(damaged)
        assert len(run_cell()) == 3
        assert json.loads(first.read_text())['status'] == 'n/a'  # a damaged row is made again


def test_a_bad_cell_is_a_row_and_the_others_run():
    """The peer cannot be made with such targets; our cell can."""
    asked = ['--adapters=lora', '--kernels=cudnn,mla,sdpa', '--mla_rank=512']
    assert bench_here(*ARGUMENTS, *asked) == 0
    rows = json.loads(Path('out/results.json').read_text())['rows']
    status = {row['cell']: row['status'] for row in rows}
    assert status['lora/mla'] == 'n/a' and status['lora/cudnn'] == 'n/a'
    assert status['lora/sdpa'] == status['lora/sdpa/peer'] == 'ok'
    mla = next(row for row in rows if row['cell'] == 'lora/mla')
    assert 'mla_rank=512' in mla['reason']


@pytest.mark.slow
def test_a_failed_cell_is_a_row_that_is_run_again():
    Path('data/val.jsonl').write_text('oops\n')
    arguments = [*ARGUMENTS, '--adapters=lora,qlora', '--kernels=cudnn,eager', '--peer=False']
    for _ in range(2):
        done = bench(*arguments)
        assert done.returncode == 1
        assert '2 of 4 cells failed, the first: lora/eager' in done.stderr
        assert 'val.jsonl:1: not JSON' in done.stderr.splitlines()[-1]
        rows = json.loads(Path('out/results.json').read_text())['rows']
        assert [row['status'] for row in rows] == ['n/a', 'failed'] * 2
    write_data('val', 3)


@pytest.mark.slow
def test_the_smallest_model_runs_with_the_default_preset():
    """What is too large for it is cut, or reported with the reason."""
    less = ['--seeds=1', '--steps=4', '--n_val=2', '--max_new_tokens=2', '--adapters=lora']
    config = str(ROOT / 'config/adapters.json')
    done = bench('random:tiny', config, 'out', '--device=cpu', '--data=data', *less)
    assert done.returncode == 0, done.stderr
    rows = json.loads(Path('out/results.json').read_text())['rows']
    reasons = {row['kernel']: row['reason'] for row in rows if row['status'] == 'n/a'}
    assert set(reasons) == {'cudnn', 'flex', 'mla'} and 'mla_rank=512' in reasons['mla']
    assert {row['status'] for row in rows} == {'ok', 'n/a'}


@pytest.mark.slow
def test_the_whole_grid_and_its_resumption_after_a_kill():
    kernels = 'eager,sdpa,flash,cudnn,flex,paged,mla,latent'
    arguments = [*ARGUMENTS, f'--kernels={kernels}', '--max_new_tokens=2']
    first = subprocess.Popen(
        [sys.executable, ROOT / 'bench_adapters.py', *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: len(list(Path(CELLS).glob('*.json'))) >= 4, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in Path(CELLS).glob('*.json')}
    assert 4 <= len(before) < 27
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    assert f'{len(before)} of 27 cells are there already' in done.stderr
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    rows = json.loads(Path('out/results.json').read_text())['rows']
    assert len(rows) == 27
    for row in rows:
        if row['kernel'] in ('cudnn', 'flex'):
            assert row['status'] == 'n/a'
        else:
            assert row['status'] == 'ok' and row['kernel_proved'], row
            assert row['causal'] == (row['kernel'] != 'latent')
    assert Path('out/results.png').exists()
    assert Path('out/results.md').read_text().count('\n') == 29
    again = bench(*arguments, '--report=True')
    assert again.returncode == 0 and '27 of 27' in again.stderr


@pytest.mark.slow
def test_a_model_folder_without_weights_ends_it():
    make_folder('folder')
    Path('folder/model.safetensors').unlink()
    done = bench('folder', 'c.json', 'out')
    assert done.returncode == 2 and 'folder has no weights' in done.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------------------
# the table


def table_row(name, speed=200.0, **changes):
    """Return a row of the table that was measured."""
    kind, kernel, *peer = name.split('/')
    row = dict(cell=name, adapter=kind, kernel=kernel, peer=bool(peer), status='ok', model='m')
    row |= dict(causal=True, kernel_ran='flash', kernel_proved=True, seeds=3)
    row |= dict(train_tok_per_s=speed, train_tok_per_s_least=0.9 * speed)
    row |= dict(train_tok_per_s_most=1.1 * speed, percent_of_limit=50.0, step_ms=3.0)
    row |= dict(train_allocated_mib=100, train_reserved_mib=120, trainable_parameters=1000)
    row |= dict(eval_tok_per_s=5.0, generate_tok_per_s=5.0, val_loss=1.0, perplexity=2.7)
    row |= dict(device='a GPU', dtype='bfloat16', torch='2', commit='c', settings=dict(seed=1))
    return row | changes


def missing_row(name, status, reason):
    kind, kernel = name.split('/')
    row = dict(cell=name, adapter=kind, kernel=kernel, peer=False, model='m')
    return row | dict(status=status, reason=reason)


@pytest.mark.full_size
def test_the_table_holds_every_row(tmp_path):
    rows = [
        table_row('lora/sdpa'),
        table_row('lora/mla', 150.0, trainable_parameters=900),
        table_row('lora/sdpa/peer', 100.0),
        table_row('lora/latent', causal=False, seeds=1),
        table_row('lora/flash', kernel_ran='math', kernel_proved=False),
        missing_row('lora/cudnn', 'n/a', 'needs a | GPU'),
        missing_row('full/eager', 'out of memory', 'more than it has'),
    ]
    folder = tmp_path / 'r'
    report.write_results(rows, folder, dict(model='m'))
    table = (folder / 'results.md').read_text().splitlines()
    assert len(table) == 2 + len(rows) and len({line.count('|') for line in table}) == 1
    assert '| 200 | 2.00 |' in table[2] and '| 150 | 1.50 |' in table[3]
    assert 'transformers + PEFT' in table[4]
    assert 'sees the future' in table[5]
    assert 'not what was asked for' in table[6]
    assert 'n/a: needs a / GPU' in table[7]
    assert 'out of memory' in table[8]
    assert len((folder / 'results.csv').read_text().splitlines()) == 1 + len(rows)
    assert len(json.loads((folder / 'results.json').read_text())['rows']) == len(rows)
    assert (folder / 'results.png').stat().st_size > 10000


def test_the_printed_table_fits_a_terminal_and_gives_the_reasons_below_it():
    reason = 'there is no kernel for this ' * 8
    rows = [table_row('lora/sdpa'), missing_row('lora/cudnn', 'n/a', reason.strip())]
    text = report.terminal_table(report.with_speedups(rows))
    assert max(map(len, text.splitlines())) <= 120
    assert f'lora cudnn: n/a: {reason.strip()}' in ' '.join(text.split())
    for heading in report.HEADINGS:
        assert heading in text


def test_a_ratio_is_between_models_that_train_the_same_parameters():
    peer = table_row('lora/sdpa/peer', 100.0, trainable_parameters=700)
    ours, theirs = report.with_speedups([table_row('lora/sdpa'), peer])
    assert 'speedup' not in ours and theirs['speedup'] == 1


# -------------------------------------------------------------------------------------------------
# the job array

SCRIPT = ROOT / 'slurm' / 'adapters.sbatch'
needs_bash = pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')


def job(folder=ROOT, **environment):
    """Run the batch script with this Python as `python`."""
    bin = Path('bin').absolute()
    bin.mkdir(exist_ok=True)
    python = bin / 'python'
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
    path = f'{bin}:{os.environ["PATH"]}'
    config, out, data = (str(Path(name).absolute()) for name in ('c.json', 'out', 'data'))
    return subprocess.run(
        ['bash', SCRIPT, 'random:tiny', config, out, f'--data={data}', '--kernels=cudnn'],
        cwd=folder,
        capture_output=True,
        text=True,
        env=inherited | environment | dict(PATH=path),
    )


@needs_bash
def test_a_task_of_the_job_array():
    subprocess.run(['bash', '-n', SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith('#SBATCH ')]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith('#')]
    assert lines[0] == '#!/bin/bash' and max(directives) < commands[0]
    assert {'#SBATCH --requeue', '#SBATCH --gpus=1', '#SBATCH --ntasks=1'} < set(lines)
    done = job()
    assert done.returncode == 2 and 'this is a job array' in done.stderr
    done = job(SLURM_ARRAY_TASK_ID='99')
    assert done.returncode == 0 and 'no cell 99' in done.stdout
    done = job(folder=Path('bin'), SLURM_ARRAY_TASK_ID='0')
    assert done.returncode == 2 and 'there is no bench_adapters.py' in done.stderr


@pytest.mark.slow
@needs_bash
def test_a_task_runs_its_cell():
    done = job(SLURM_ARRAY_TASK_ID='2')
    assert done.returncode == 0 and 'cell 2, lora/cudnn' in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].startswith('lora/cudnn: n/a')
    assert len(list(Path(CELLS).iterdir())) == 1
