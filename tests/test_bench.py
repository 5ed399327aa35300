"""bench.py: what it measures, prints and writes; on a CPU, with models too small to tell much."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import FORK_ITS_PROGRAMS
from helpers import ROOT, exit_code, words

from nanomla.benchmarks import race
from nanomla.benchmarks.training import Benchmark, StepProfile, part_of
from nanomla.core import devices
from nanomla.core.configurator import UserError

TINY = dict(
    device='cpu',
    compile=False,
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=2,
    vocabulary=100,
    warmup_steps=1,
    timed_steps=2,
    repeats=1,
    results='r.jsonl',
)
MLA = dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4)
PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: few')
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, 'commit', lambda: 'abc1234')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setitem(sys.modules, 'peer_model', None)
    # The large product that all else is measured by takes longer than these models.
    monkeypatch.setattr('nanomla.benchmarks.training.MATMUL_SIZE_ON_CPU', 256)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


def bench(*arguments, **settings):
    return exit_code('bench.py', [*arguments, *words(TINY | settings)])


def results():
    return [json.loads(line) for line in Path('r.jsonl').read_text().splitlines()]


# -------------------------------------------------------------------------------------------------
# train


@pytest.mark.parametrize('kind', [dict(), MLA], ids=['mha', 'mla'])
def test_train_prints_tokens_a_second_and_writes_them_down(kind, capsys):
    assert bench('train', **kind) == 0
    assert bench('train', profile=True, **kind) == 0
    out, err = capsys.readouterr()
    assert err == ''
    assert out.count('k tok/s') == 2
    assert 'matmul' in out
    plain, profiled = results()
    assert plain['tok_per_s'] == pytest.approx(2 * 16 / (plain['ms'] / 1e3))
    assert plain['ms_least'] <= plain['ms'] <= plain['ms_most']
    assert plain['config']['n_embd'] == 16
    assert plain['commit'] == 'abc1234'
    assert plain['torch'] == torch.__version__
    assert plain['world'] == 1
    assert plain['mfu_of_matmul'] > 0
    assert plain['profile'] == {}
    assert profiled['profile']['matmul'] > 0
    assert sum(profiled['profile'].values()) == pytest.approx(profiled['ms'])


def test_a_peer_is_measured_beside(capsys):
    Path('peer').mkdir()
    Path('peer/model.py').write_text(PEER)
    assert bench('train', peer='peer', peer_batch_size=3) == 0
    out = capsys.readouterr().out
    assert 'nanoGPT   batch 3:' in out
    assert ' x nanoGPT' in out
    assert 'number of parameters' not in out
    theirs, ours = results()
    assert theirs['what'] == 'nanoGPT'
    assert ours['ratio_to_peer'] == pytest.approx(ours['tok_per_s'] / theirs['tok_per_s'])


@pytest.mark.parametrize(
    'kernel, part',
    [
        ('ncclDevKernel_AllReduce_Sum_f32', 'all-reduce'),
        ('fmha_cutlassF_bf16_aligned', 'attention'),
        ('sm90_xmma_gemm_bf16bf16', 'matmul'),
        ('aten::addmm', 'matmul'),
        ('multi_tensor_apply_kernel', 'optimizer'),
        ('Memcpy DtoD (Device -> Device)', 'copies'),
        ('triton_red_fused_native_layer_norm', 'norms, activations, other'),
    ],
)
def test_kernels_belong_to_parts_of_a_step(kernel, part):
    assert part_of(kernel) == part


def test_a_profile_prints_its_largest_parts_first():
    profile = StepProfile({'loss': 1.0, 'matmul': 3.0}, [(2.5, 'gemm')])
    assert profile.lines(4.0) == [
        '      3.00 ms   75.0 %  matmul',
        '      1.00 ms   25.0 %  loss',
        '         2.500 ms  gemm',
    ]


# -------------------------------------------------------------------------------------------------
# scale


def test_a_run_that_fails_ends_with_exit_code_1(capfd, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda command: SimpleNamespace(returncode=1))
    assert bench('scale') == 1
    assert capfd.readouterr().err == 'error: the run of 2 processes failed (its message is above)\n'


def test_scale_compares_one_process_with_two(capfd, monkeypatch, forked_python):
    monkeypatch.setenv(FORK_ITS_PROGRAMS, '1')
    assert bench('scale', gpus='1,2') == 0
    out = capfd.readouterr().out
    assert '1 processes: ' in out
    assert '2 processes: ' in out
    assert out.count('efficiency') == 2
    one, two = results()
    assert (one['processes'], one['world'], one['speedup']) == (1, 1, 1)
    assert (two['processes'], two['world']) == (2, 2)
    assert two['config']['gradient_accumulation_steps'] == 2
    assert two['speedup'] == pytest.approx(two['tok_per_s'] / one['tok_per_s'])
    assert len(one['ranks']) == 1
    assert len(two['ranks']) == 2
    assert all(rank['ms'] > 0 and rank['peak_memory'] > 0 for rank in two['ranks'])
    picture = Path('out-bench/scale.png')
    before = picture.read_bytes()
    assert before.startswith(b'\x89PNG')
    monkeypatch.setenv('RANK', '0')  # this is the one process
    assert bench('scale', gpus='1', **MLA) == 0
    assert picture.read_bytes() != before  # both models


# -------------------------------------------------------------------------------------------------
# race

PEER_TRAIN = """
import sys
from pathlib import Path
assert Path('data/shakespeare_char/meta.pkl').exists() and Path('config/x.py').exists()
Path('data/shakespeare_char/made').write_text('')
print('words:', *sys.argv[1:])
print('step 0: train loss 4.1, val loss 4.2')
print('iter 0: loss 4.1, time 900.0ms, mfu -100%')
print('iter 1: loss 4.0, time 10.0ms, mfu -100%')
print('iter 2: loss 3.9, time 12.0ms, mfu -100%')
print('step 250: train loss 1.8, val loss 1.9')
print('step 500: train loss 1.5, val loss 1.7')
print('step 750: train loss 1.4, val loss 1.8')
"""
OUR_LOG = [
    dict(event='settings'),
    dict(event='train', step=100, tok_per_s=1000.0),
    dict(event='eval', step=100, val_loss=2.0, tokens=6000, seconds=7.0),
    dict(event='train', step=200, tok_per_s=2000.0),
    dict(event='eval', step=200, val_loss=1.7, tokens=12000, seconds=9.0),
    dict(event='eval', step=300, val_loss=1.6, tokens=18000, seconds=12.0),
]


@pytest.fixture
def racers(monkeypatch):
    """Stand-ins: a checkout of nanoGPT, a dataset, and our train.py. Returns its command lines."""
    Path('peer/config').mkdir(parents=True)
    Path('peer/data').mkdir()
    Path('peer/model.py').write_text(PEER)
    Path('peer/config/x.py').write_text('')
    Path('peer/train.py').write_text(PEER_TRAIN)
    data = Path('data').absolute()
    data.mkdir()
    for name in ('input.txt', 'train.bin', 'val.bin'):
        (data / name).write_text('ab')
    monkeypatch.setattr(race, 'find', lambda name: data)
    monkeypatch.setattr(race, 'prepare_if_missing', lambda name: None)
    monkeypatch.setattr(race, 'read_meta', lambda folder: dict(vocab_size=2, chars='ab'))
    run_train, ours = race.run_train, []

    def run(arguments, **options):
        if 'repository' in options:
            return run_train(arguments, **options)
        ours.append(arguments)
        out = [word.partition('=')[2] for word in arguments if word.startswith('--out_dir=')]
        Path(out[0]).mkdir()
        lines = [json.dumps(event) + '\n' for event in OUR_LOG]
        Path(out[0], 'log.jsonl').write_text(''.join(lines))
        return ''

    monkeypatch.setattr(race, 'run_train', run)
    return ours


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def test_a_race_times_both_until_the_goal(racers, capsys):
    settings = dict(peer='peer', goal=1.8, peer_args='--max_iters=9', results='r.jsonl')
    bench = Benchmark(settings, torch.device('cpu'), torch.float32)
    race.race(bench, ['config/y.py', *words(settings), '--seed=2'])
    theirs, ours = results()
    assert theirs['args'] == '--max_iters=9'
    assert (theirs['reached_step'], theirs['best'], theirs['best_step']) == (500, 1.7, 500)
    assert theirs['train_seconds'] == pytest.approx(500 * 0.012)  # the median step
    assert ours['args'] == 'config/y.py --seed=2'
    assert racers[0][:2] == ['config/y.py', '--seed=2']
    assert (ours['reached_step'], ours['best'], ours['best_step']) == (200, 1.6, 300)
    assert ours['train_seconds'] == pytest.approx(12000 / 2000)
    out = capsys.readouterr().out
    assert 'nanoGPT: val 1.7000 at step 500 after 6.0 s of training' in out
    assert 'nanoMLA: val 1.7000 at step 200 after 6.0 s of training, 9.0 s since its start' in out


def test_a_race_leaves_the_checkout_alone(racers):
    before = files('peer')
    settings = dict(peer='peer', goal=0.1, peer_args='', results='')
    race.race(Benchmark(settings, torch.device('cpu'), torch.float32), [])
    assert files('peer') == before
    assert list(Path('peer/data').iterdir()) == []


def test_a_peer_that_prints_no_losses_is_an_error():
    with pytest.raises(UserError, match='no steps or no validation losses'):
        race.read_output('tokens per iteration will be: 16,384\n')


# -------------------------------------------------------------------------------------------------
# pictures of committed logs


@pytest.mark.full_size
@pytest.mark.parametrize(
    'arguments, log, drawn, committed',
    [
        (['scale', '--results=log.jsonl'], 'h200_scale', 'scale.png', 'scale_h200.png'),
        (['decode', '--out_dir=out'], 'h200_decode_steps', 'latency.png', 'decode_h200.png'),
    ],
)
def test_plot_only_draws_the_committed_figures(arguments, log, drawn, committed):
    content = (ROOT / f'assets/logs/{log}.jsonl').read_bytes()
    Path('out').mkdir()
    Path('log.jsonl').write_bytes(content)
    Path('out/decode.jsonl').write_bytes(content)
    assert exit_code('bench.py', [*arguments, '--plot_only=True', '--out_dir=out']) == 0
    # width and height, as the header of a png has them
    picture = Path('out', drawn).read_bytes()[:24]
    assert picture == (ROOT / 'assets' / committed).read_bytes()[:24]


# -------------------------------------------------------------------------------------------------
# errors and the script itself


@pytest.mark.parametrize(
    'arguments, settings, message',
    [
        ([], {}, 'say what to measure: python bench.py train | scale | race'),
        (['fly'], {}, "'fly' is nothing to measure: python bench.py train | scale | race"),
        (['decod'], {}, "'decod' is nothing to measure: did you mean decode?"),
        (['trian'], {}, "'trian' is nothing to measure: did you mean train?"),
        (['config/nowhere.py'], {}, 'config/nowhere.py: no such config file'),
        (['train'], dict(peer='nowhere'), '--peer=nowhere is no checkout of nanoGPT: it has no'),
        (['race'], dict(peer='nowhere'), '--peer=nowhere is no checkout of nanoGPT'),
        (['race'], {}, 'a race needs a peer: --peer=FOLDER'),
        (['race'], dict(profile=True), '--profile=True goes with train, scale and'),
        (['train'], dict(n_head=3), 'n_embd=16 is not a multiple of n_head=3'),
        (['train'], dict(results='no/folder/r.jsonl'), '--results=no/folder/r.jsonl'),
        (['scale'], dict(gpus='1,two'), '--gpus=1,two'),
        (['scale'], dict(gpus='0,1'), '--gpus=0 must be at least 1'),
        (['scale'], dict(micro_batches=''), '--micro_batches=0 must be at least 1'),
        (['train'], dict(plot_only=True), '--plot_only=True draws out_dir/decode.jsonl'),
        (['scale'], dict(plot_only=True), '--results=r.jsonl: there is no such file'),
        (['train'], dict(repeats=0), 'repeats=0 must be at least 1'),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, (list, dict)) else '',
)
def test_what_is_wrong_is_one_line(arguments, settings, message, capsys):
    assert bench(*arguments, **settings) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: '), err[-2000:]
    assert message in err
    assert err.count('\n') == 1
    assert not Path('r.jsonl').exists()


def test_bench_can_be_imported():
    names = runpy.run_path(str(ROOT / 'bench.py'), run_name='bench')
    assert names['timed_steps'] == 12
    assert names['split_mode'](['scale', 'x']) == ('scale', ['x'])


def test_help_loads_no_torch():
    code = (
        'import runpy, sys\n'
        "sys.argv = ['bench.py', '--help']\n"
        "try: runpy.run_path('bench.py', run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'numpy') if name in sys.modules])\n"
    )
    ended = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert '--timed_steps=12' in ended.stdout
    assert ended.stdout.endswith('[]\n')
