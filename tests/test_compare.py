"""
compare.py with tiny models on the CPU: what it trains, that contenders see the same batches, what a
kill costs, and what it says when a contender fails.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, ROOT, TEXT, TINY, exit_code, log, run, series, wait_until, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.comparison import figures
from nanomla.comparison.runs import RESTARTS, RUN_LOCK, STOPPED, Run, RunQueue
from nanomla.comparison.table import read, rows
from nanomla.core import devices, token_files
from nanomla.core.configurator import UserError
from nanomla.training import batches
from nanomla.training.launch import PROMPT

STAIRCASE = ROOT / 'assets' / 'logs' / 'study_staircase.jsonl'

SETTINGS = TINY | dict(
    out_dir='cmp',
    pos='rope',
    n_head=2,
    max_iters=6,
    eval_interval=3,
    log_interval=1,
    learning_rate=1e-2,
    min_lr=1e-6,  # less than the least learning_rate of a grid
    decode_tokens=8,
    decode_repeats=1,
    in_process=True,
)
del SETTINGS['sample_tokens']
MLA = dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
CONTENDERS = dict(mha=dict(label='MHA + RoPE'), mla=dict(label='MLA', **MLA))
SHORT = dict(seeds=[1], max_iters=2, decode_tokens=0)
DRAWN = dict(draw=figures.draw, draw_front=figures.draw_front)
MODEL_CLASSES = dict(native.MODELS)
MADE = {}  # models of contenders
WILD = dict(learning_rate=1e30, grad_clip=0.0, weight_decay=1e9)  # its loss is nan at once


# The workers, which train, are forks.
pytestmark = pytest.mark.usefixtures('forked_python', 'blank_pictures')


def new_model_once(kind, settings, given, vocab_size):
    """
    Do what native.new_model does, but make equal models once.

    Contenders only count the parameters of theirs, which have no memory. Most presets have the
    same control, which is asked for several times each.
    """
    if kind not in MODEL_CLASSES:  # refused, or of one test alone
        return native.new_model(kind, settings, given, vocab_size)
    own = {name: settings[name] for name in MODEL_CLASSES[kind].Config.keys() if name in settings}
    key = repr((kind, sorted(own.items()), sorted(given), vocab_size))
    if key not in MADE:
        MADE[key] = native.new_model(kind, settings, given, vocab_size)
    return MADE[key]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """
    Each test in a folder of its own that has the dataset `text`.

    A picture is drawn only where a test asks for one.
    """
    monkeypatch.chdir(tmp_path)
    for name in DRAWN:
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr('nanomla.comparison.contenders.new_model', new_model_once)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('NANOMLA_COMMIT', 'abc1234')
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
    token_files.write_text(tmp_path / 'text', TEXT, 'char', 'A tale of a cat')


def arguments(contenders=CONTENDERS, **changes):
    """Return the command line of compare.py with SETTINGS and `changes`."""
    return words(SETTINGS | dict(contenders=contenders) | changes)


def compare(**changes):
    return exit_code('compare.py', arguments(**changes))


def found(path='cmp/results.jsonl'):
    return read(path)


def start(**changes):
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'compare.py'), *arguments(**changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def in_one_line(text):
    return ' '.join(text.split())


def run_files():
    """Return the files of all runs, without locks."""
    return [path for path in Path('cmp').glob('*/*/*') if path.name not in ('lock', RUN_LOCK)]


def times():
    return {path: path.stat().st_mtime_ns for path in run_files()}


def contents():
    return {path: path.read_bytes() for path in run_files()}


def plan(*words, **changes):
    """Return the queue of compare.py up to its first run."""
    caught = []

    def leave(queue, *_, **__):
        caught.append(queue)
        sys.exit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunQueue, 'train', leave)
        with pytest.raises(SystemExit):
            run('compare.py', words or arguments(**changes))
    return caught[0]


# -------------------------------------------------------------------------------------------------
# what is compared


def test_contenders_read_the_same_batches_seed_by_seed(monkeypatch):
    seen, cut = {}, batches.Dataset.cut

    def remember(self, split, starts):
        x, y = cut(self, split, starts)
        batch = (starts.tolist(), x.tolist(), y.tolist())
        seen.setdefault((one.contender, one.seed, split), []).append(batch)
        return x, y

    monkeypatch.setattr(batches.Dataset, 'cut', remember)
    queue = plan(seeds=[1, 2], gradient_accumulation_steps=2)
    for one in queue.runs:
        queue.prepare(one)
        run('train.py', [*one.words, f'--out_dir={one.folder}'])
    for seed in (1, 2):
        assert len(seen['mha', seed, 'train']) == 12
        for split in ('train', 'val'):
            assert seen['mha', seed, split] == seen['mla', seed, split]
    assert seen['mha', 1, 'train'] != seen['mha', 2, 'train']
    assert seen['mha', 1, 'val'] == seen['mha', 2, 'val']


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([64, 96, 192]),
    st.integers(8, 80),
    st.sampled_from(['gelu', 'relu2', 'swiglu']),
    st.booleans(),
    st.sampled_from([1, 2]),
)
def test_parameters_come_within_one_percent(width, rank, act, bias, groups):
    contenders = dict(
        mha={},
        mla=MLA | dict(kv_lora_rank=rank),
        grouped=dict(n_kv_head=groups),
        learned=dict(pos='learned', norm='rmsnorm'),
        own=dict(n_inner=8),
    )
    shape = dict(n_embd=width, n_layer=3, n_head=4, act=act, bias=bias)
    field = plan(contenders=contenders, **shape).field
    target = field['mha'].model().num_params()
    for name in ('mla', 'grouped', 'learned'):
        assert field[name].params == field[name].model().num_params()
        assert abs(field[name].params / target - 1) < 0.01
    assert field['own'].model().config.n_inner == 8 and field['own'].ratio < 0.99


def test_parameters_that_cannot_be_matched_are_pointed_out(capsys):
    contenders = CONTENDERS | dict(deep=dict(n_layer=30))
    field = plan(contenders=contenders, match=False).field
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (line,) = [line for line in lines if line.startswith('deep')]
    assert 'NOT EQUAL' in line and field['deep'].ratio > 2
    field = plan(contenders=contenders).field
    assert 'there is no n_inner that gives it' in field['deep'].error
    assert not field['mla'].error


def test_a_control_without_rope_is_pointed_out(capsys):
    plan(control='plain', contenders=CONTENDERS | dict(plain=dict(pos='learned')))
    assert "note: the control 'plain' is not MHA with RoPE" in capsys.readouterr().out
    plan()
    assert 'note:' not in capsys.readouterr().out


def commands(queue):
    """Return contender -> the words of its first run."""
    for one in queue.runs:
        queue.prepare(one)
    return {one.contender: one.words for one in reversed(queue.runs)}


def test_settings_of_mla_reach_only_mla():
    given_to = commands(plan(latent_norm=False, contenders=dict(mha={}, mla=MLA)))
    assert '--latent_norm=False' not in given_to['mha']
    assert '--latent_norm=False' in given_to['mla']


@dataclass
class LatentGPTConfig(GPTConfig):
    latent_norm: bool = True


class LatentGPT(GPT):
    """Any attention that has a setting in common with MLA."""

    Config = LatentGPTConfig


def test_any_registered_attention_is_a_contender(monkeypatch):
    monkeypatch.setitem(native.MODELS, 'other', LatentGPT)
    contenders = dict(mha={}, other=dict(attention='other'), mla=MLA)
    queue = plan(latent_norm=False, latent_init='gpt2', contenders=contenders)
    assert queue.field['other'].error == '' and queue.field['other'].kind == 'other'
    given_to = commands(queue)
    assert '--latent_norm=False' in given_to['other'] and '--attention=other' in given_to['other']
    assert '--latent_init=gpt2' not in given_to['other']  # a setting of MLA alone
    assert '--latent_init=gpt2' in given_to['mla']
    assert '--latent_norm=False' not in given_to['mha']


# -------------------------------------------------------------------------------------------------
# grids


def test_a_grid_is_a_product_and_a_contender_s_own_comes_first():
    queue = plan(
        tune=dict(learning_rate=[1e-3, 2e-3], weight_decay=[0.0, 0.1]),
        contenders=CONTENDERS | dict(other=dict(beta2=[0.9, 0.95, 0.99])),
    )
    tried, roles = {}, {}
    for one in queue.runs:
        roles.setdefault(one.contender, []).append(one.role)
        if one.role == 'tune':
            assert one.seed == 1000
            tried.setdefault(one.contender, []).append(one.tuned)
    product = [(1e-3, 0.0), (1e-3, 0.1), (2e-3, 0.0), (2e-3, 0.1)]
    assert tried['mha'] == [dict(learning_rate=a, weight_decay=b) for a, b in product]
    assert tried['mla'] == tried['mha']
    assert tried['other'] == [dict(beta2=b) for b in (0.9, 0.95, 0.99)]
    for name in queue.field:
        assert roles[name] == ['tune'] * len(tried[name]) + ['seed'] * 3
    assert [one.contender for one in queue.runs] == ['mha'] * 7 + ['mla'] * 7 + ['other'] * 6
    assert len({one.folder for one in queue.runs}) == len(queue.runs) == 20


def test_a_grid_may_take_fewer_steps_and_its_ends_are_those_that_could_be_trained(capfd):
    mha = dict(label='MHA', grad_clip=0.0, learning_rate=[3e-4, 1e-2, 1e30])
    assert compare(contenders=dict(mha=mha), tune_iters=3, seeds=[2]) == 0
    results = found()
    trained = [
        (line['role'], line['eval_steps'][-1]) for line in results.runs if 'error' not in line
    ]
    assert sorted(trained) == [('seed', 6), ('tune', 3), ('tune', 3)]
    out = in_one_line(capfd.readouterr().out)
    assert 'Tuned on seed 1000 in 3 steps: learning_rate of' in out
    assert (results.head['tune_steps'], results.head['steps']) == (3, 6)
    assert results.contenders['mha']['at_edge']
    assert sum('error' in line for line in results.runs) == 1


def test_a_grid_that_has_grown_trains_what_it_chooses_now_and_keeps_what_was_trained():
    small = dict(mla=dict(MLA, learning_rate=[1e-5, 1e-4]))
    grown = dict(mla=dict(MLA, learning_rate=[1e-5, 1e-4, 1e-2]))
    assert compare(contenders=small, **SHORT) == 0
    before, of_small = contents(), found().runs
    assert compare(contenders=grown, **SHORT) == 0
    after, of_grown = contents(), found().runs
    assert before.items() <= after.items()
    facts = json.loads(Path('cmp/mla/seed-1/run.json').read_text())
    assert '--learning_rate=0.0001' in facts['words']
    assert of_grown[-1]['tuned'] == dict(learning_rate=1e-2)
    assert of_grown[-1]['val_loss'] < of_small[-1]['val_loss']
    assert '--learning_rate=0.01' in of_grown[-1]['command']
    assert log('cmp/mla/seed-1,learning_rate=0.01')[0]['config']['learning_rate'] == 1e-2
    assert compare(contenders=small, **SHORT) == 0
    assert found().runs == of_small and contents() == after


def test_a_grid_may_be_of_words(capfd):
    mha = dict(act=['gelu', 'relu2'], qk_norm=[False, True])
    assert compare(contenders=dict(mha=mha), **SHORT) == 0
    out = in_one_line(capfd.readouterr().out)
    assert 'act of gelu, relu2; qk_norm of False, True.' in out
    best = json.loads(Path('cmp/compare.json').read_text())[0]
    tuned = [line['tuned'] for line in found().runs]
    assert len(tuned) == 5
    assert best['tuned'] == tuned[-1] and best['tuned'] in tuned[:4]
    assert not best['at_edge']  # words have no order


def test_a_grid_does_not_change_the_size_of_a_model():
    several, one = dict(kv_lora_rank=[4, 8]), dict(kv_lora_rank=[4])
    field = plan(contenders=dict(mha={}, mla=MLA | several, one=MLA | one)).field
    message = "its grid of kv_lora_rank changes the model's size: name a contender for each"
    assert field['mla'].error == message
    assert field['one'].cache_bytes == 2 * 2 * 8 and not field['one'].error  # one value is no grid


# -------------------------------------------------------------------------------------------------
# a whole comparison

END_TO_END = dict(
    contenders=dict(
        mha=dict(label='MHA + RoPE'),
        mla=dict(MLA, label='MLA', learning_rate=[1e-2, 3e-4]),
        bad=dict(n_head=3),
        wild=WILD,
    ),
    seeds=[2, 3],
    sample_tokens=20,
)
PICTURES = ('compare.png', 'compare.md', 'compare.json', 'compare_front.png')


def line_of(results, name, seed=2, role='seed'):
    wanted = (name, seed, role)
    for line in results.runs:
        if (line['contender'], line['seed'], line['role']) == wanted:
            return line
    raise AssertionError(f'no run of {wanted}')


@pytest.mark.draws
def test_a_comparison_from_end_to_end(capfd, monkeypatch):
    for name, function in DRAWN.items():
        monkeypatch.setattr(figures, name, function)
    os.makedirs('cmp/mla/seed-3')
    Path('cmp/mla/seed-3/error.txt').write_text('out of memory')
    assert compare(**END_TO_END) == 1  # some have failed
    out, results = capfd.readouterr().out, found()
    counts = {}
    for line in results.runs:
        key = line['contender'], line['role']
        counts[key] = counts.get(key, 0) + 1
    assert counts == {
        ('mha', 'seed'): 2,
        ('mla', 'tune'): 2,
        ('mla', 'seed'): 2,
        ('bad', 'seed'): 2,
        ('wild', 'seed'): 2,
    }
    assert 'cannot be built: n_embd=16 is not a multiple of n_head=3' in out
    assert 'wild, seed 2: failed: the loss is nan at step' in out
    assert out.index('[0/10] mha, seed 2 begins\n') < out.index('] mha, seed 2: val loss')
    page = Path('cmp/compare.md').read_text()
    assert '| bad |' in page
    assert '| failed: n_embd=16 is not a multiple of n_head=3: ' in page
    assert '| failed: the loss is nan at step' in page
    check_tuning(results)
    for name in ('mha', 'mla'):
        check_contender(results, name)
    check_differences(results, out)
    check_it_can_be_shown_again()


def check_tuning(results):
    tried = {}
    for line in results.runs:
        if line['role'] == 'tune':
            tried[line['tuned']['learning_rate']] = line['val_loss']
    assert tried.keys() == {1e-2, 3e-4}
    mha, mla = results.contenders['mha'], results.contenders['mla']
    assert mla['tuned'] == dict(learning_rate=min(tried, key=tried.get))
    assert mla['at_edge'] and not mha['tuned']
    assert (mha['cache_bytes'], mla['cache_bytes']) == (2 * 2 * 32, 2 * 2 * 12)
    assert mla['differs'].items() >= MLA.items()
    assert not {'learning_rate', 'seed'} & mla['differs'].keys()


def check_contender(results, name):
    about = results.contenders[name]
    loaded = load_model(f'cmp/{name}/seed-2')
    rate = about['tuned'].get('learning_rate', SETTINGS['learning_rate'])
    assert loaded.settings['seed'] == 2 and loaded.settings['learning_rate'] == rate
    assert native.kind_of(loaded.model) == name
    assert loaded.model.num_params() == about['params']
    assert abs(about['params_ratio'] - 1) < 0.01
    loss = line_of(results, name)['val_loss']
    assert loss == loaded.checkpoint['best_val_loss']
    assert loss == min(series(f'cmp/{name}/seed-2', 'eval', 'val_loss').values())
    decode = about['decode']
    assert decode['tok_per_s'] > 0 and len(decode['sample']) > 0
    assert decode['cache_bytes'] == 2 * 8 * about['cache_bytes']  # fp32


def check_differences(results, out):
    row = json.loads(Path('cmp/compare.json').read_text())[1]
    assert row == rows(results)[1]
    assert row['seeds'] == 1 and row['error'] == 'out of memory' and '(1 of 2 seeds)' in out
    mha, mla = (line_of(results, name)['val_loss'] for name in ('mha', 'mla'))
    assert row['difference'] == pytest.approx(mla - mha) and row['half'] is None


def check_it_can_be_shown_again():
    """Again nothing is trained and everything is there; results.jsonl alone is enough for that."""
    before = times()
    kept = {name: Path('cmp', name).read_bytes() for name in PICTURES}
    for name in PICTURES:
        os.remove(f'cmp/{name}')
    assert compare(**END_TO_END) == 1
    assert times() == before
    assert {name: Path('cmp', name).read_bytes() for name in PICTURES} == kept
    shutil.copy('cmp/results.jsonl', 'kept.jsonl')
    shutil.rmtree('cmp')
    show = ['--plot_only=True', '--results=kept.jsonl', '--figure=new/compare.png']
    assert exit_code('compare.py', show) == 0
    assert {name: Path('new', name).read_bytes() for name in PICTURES} == kept
    both = ['--plot_only=True', '--results=kept.jsonl,kept.jsonl', '--figure=both.png']
    assert exit_code('compare.py', both) == 0
    assert Path('both.png').exists()


def test_runs_are_complete_by_their_logs_and_the_rest_can_be_left_out():
    asked = dict(
        seeds=[1],
        only=['mla'],
        contenders=dict(mha={}, gqa=dict(n_kv_head=1), mla=dict(MLA, learning_rate=[1e-2, 3e-4])),
        sample_tokens=5,
    )

    def logs():
        return {path: path.read_bytes() for path in Path('cmp').rglob('log.jsonl')}

    assert compare(**asked) == 0
    before, logs_before = found(), logs()
    assert list(before.contenders) == ['mla'] and before.control == 'mla'
    assert len(before.runs) == len(logs_before) == 3
    assert before.contenders['mla']['decode']['sample']
    for path in [*Path('cmp').rglob('*.pt'), *Path('cmp').rglob('decode.json')]:
        path.unlink()
    assert compare(**asked) == 0
    assert found().runs == before.runs and logs() == logs_before
    assert found().contenders['mla']['decode'] is None


UNTUNED = ('compare_quick', 'study_stability')
CONFIGS = sorted(
    path.stem
    for path in (ROOT / 'config').glob('*.py')
    if path.stem.startswith(('compare', 'study')) and path.stem not in UNTUNED
)
STANDS_AFTER = dict(study_staircase_124m='study_gates', study_mla='compare_shakespeare')
SEEDS_OF = dict(cpu=3, cuda=5)
SMALLEST_CACHE = dict(  # config -> the least of the caches, as a share of the control's
    compare_124m=1 / 8, compare_books=1 / 8, compare_litgpt=1 / 8, compare_shakespeare=1 / 4
)


def on_each_device():
    """Return (config, device): every config on a GPU, on a CPU those with contenders of its own."""
    cases = [(name, 'cuda') for name in CONFIGS]
    for name in CONFIGS:
        _, _, on_cpu = (ROOT / 'config' / f'{name}.py').read_text().partition('\non_cpu = ')
        if 'contenders=' in on_cpu:
            cases.append((name, 'cpu'))
    return cases


@pytest.mark.parametrize('name, device', on_each_device())
def test_every_preset_is_a_fair_comparison(name, device, monkeypatch):
    path = ROOT / 'config' / f'{name}.py'
    files = [path]
    if name in STANDS_AFTER:
        files.insert(0, ROOT / 'config' / f'{STANDS_AFTER[name]}.py')
    if device == 'cuda':
        monkeypatch.setattr(devices, 'pick_device', lambda device: torch.device('cuda', 0))
        monkeypatch.setattr(devices, 'describe', lambda device: 'GPU')
        monkeypatch.setattr('nanomla.comparison.contenders.describe', lambda device: 'GPU')
    outputs = ['--dataset=text', '--out_dir=cmp', '--results=r.jsonl', '--figure=r.png']
    queue = plan(*map(str, files), *outputs)
    field = queue.field
    control = next(iter(field.values()))
    assert control.kind == ('mla' if name == 'study_mla' else 'mha')
    assert control.config.pos == 'rope' and control.grid
    for one in field.values():
        assert not one.error
        assert one is control or abs(one.ratio - 1) < 0.01
        assert len(one.points) >= 3 and {'muon_lr', 'learning_rate'} & one.grid.keys()
        assert len(one.points) == len(control.points) or device == 'cpu'
    latent = [one for one in field.values() if 'mla' in one.kind]
    assert latent
    if name in SMALLEST_CACHE:
        smallest = min(one.cache_bytes for one in latent)
        assert smallest <= SMALLEST_CACHE[name] * control.cache_bytes
    if name == 'study_mla':
        assert {one.cache_bytes for one in latent} == {control.cache_bytes}
    if name in ('study_mla', 'compare_shakespeare'):
        seeds = {one.seed for one in queue.runs if one.role == 'seed'}
        assert len(seeds) == SEEDS_OF[device]


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_the_quick_start_is_two_runs_of_equal_models_and_a_quarter_of_the_cache(
    device, monkeypatch
):
    if device == 'cuda':
        monkeypatch.setattr(devices, 'pick_device', lambda device: torch.device('cuda', 0))
        monkeypatch.setattr(devices, 'describe', lambda device: 'GPU')
        monkeypatch.setattr('nanomla.comparison.contenders.describe', lambda device: 'GPU')
    outputs = ['--dataset=text', '--out_dir=cmp', '--results=r.jsonl', '--figure=r.png']
    queue = plan(str(ROOT / 'config' / 'compare_quick.py'), *outputs)
    gpt, mla = queue.field.values()
    assert len(queue.runs) == 2
    assert not gpt.error and not mla.error and abs(mla.ratio - 1) < 0.01
    assert (gpt.kind, mla.kind) == ('mha', 'mla') and 4 * mla.cache_bytes == gpt.cache_bytes


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_stability_tools_stand_beside_each_other_in_one_model(device, monkeypatch):
    if device == 'cuda':
        monkeypatch.setattr(devices, 'pick_device', lambda device: torch.device('cuda', 0))
        monkeypatch.setattr(devices, 'describe', lambda device: 'GPU')
        monkeypatch.setattr('nanomla.comparison.contenders.describe', lambda device: 'GPU')
    queue = plan(str(ROOT / 'config' / 'study_stability.py'), '--dataset=text', '--out_dir=cmp')
    control, *others = queue.field.values()
    assert [one.differs(control) for one in others] == [
        dict(muon_heads=True),
        dict(qk_clip=100.0),
        dict(qk_norm=True),
        dict(qk_norm=True, qk_norm_latent=True),
    ]
    assert {(one.kind, one.params, one.error) for one in queue.field.values()} == {
        ('mla', control.params, '')
    }
    assert all(one.settings['log_max_logits'] for one in queue.field.values())


@pytest.mark.slow
def test_a_worker_and_a_process_of_its_own_train_the_same():
    assert compare(seeds=[5]) == 0
    assert compare(seeds=[5], in_process=False, jobs=2, out_dir='other') == 0
    for name in CONTENDERS:
        worker = series(f'cmp/{name}/seed-5', 'train', 'loss')
        assert worker == series(f'other/{name}/seed-5', 'train', 'loss')
    one, other = found().runs, found('other/results.jsonl').runs
    assert [line['val_loss'] for line in one] == [line['val_loss'] for line in other]
    assert not any(line['shared'] for line in one) and all(line['shared'] for line in other)


# -------------------------------------------------------------------------------------------------
# what goes wrong


def test_a_command_that_cannot_work_leaves_complete_runs_as_they_are():
    assert compare(**SHORT) == 0
    before, times_before = found(), times()
    assert compare(**SHORT, n_head=3) == 1
    for line in found().runs:
        assert line['error'].startswith('n_embd=16 is not a multiple')
    Path('cmp/mla/seed-1/error.txt').write_text('out of memory')
    assert compare(**SHORT) == 1
    assert found().runs[1]['error'] == 'out of memory'
    assert compare(**SHORT, retry=True) == 0
    assert found() == before and times() == times_before


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_and_retry_tries_again(capfd):
    def written():
        return Path('cmp/wild/seed-1/run.json').stat().st_mtime_ns

    asked = dict(contenders=dict(mha={}, wild=MLA | WILD), seeds=[1])
    assert compare(**asked) == 1
    out = capfd.readouterr().out
    assert '| wild |' in out and 'failed: the loss is nan at step' in out
    assert 'wild, seed 1: failed: the loss is nan' in out
    assert found().runs[0]['val_loss'] > 0
    before = written()
    assert compare(**asked) == 1 and written() == before
    assert compare(**asked, retry=True) == 1 and written() > before
    # the control, too, and its whole grid
    tune = dict(weight_decay=[1e9, 2e9])
    assert compare(contenders=dict(wild=MLA | WILD), out_dir='all', seeds=[1], tune=tune) == 1


@pytest.mark.slow
def test_a_contender_without_a_point_that_could_be_trained_has_failed(capfd):
    wild = dict(grad_clip=0.0, learning_rate=1e30, weight_decay=[1e9, 2e9])
    assert compare(contenders=dict(wild=wild), seeds=[1]) == 1
    message = 'no point of its grid could be trained: the loss is nan'
    assert message in capfd.readouterr().out


def test_other_settings_are_not_mixed_into_old_results():
    folder = Path('cmp/mha/seed-1')
    folder.mkdir(parents=True)
    queue = plan(seeds=[1])
    first = queue.runs[0]
    queue.prepare(first)
    (folder / 'run.json').write_text(json.dumps(dict(words=first.words)))
    first.check_settings()
    message = r'cmp/mha/seed-1 was trained with other settings .--max_iters=9, --max_iters=6.: name'
    with pytest.raises(UserError, match=message):
        plan(seeds=[1], max_iters=9)
    plan(seeds=[1], tune=dict(learning_rate=[1e-3, 1e-2]))  # a choice is no other setting
    (folder / 'run.json').unlink()
    (folder / 'log.jsonl').write_text('{"event": "end", "why": "max_iters reached"}\n')
    with pytest.raises(UserError, match='cmp/mha/seed-1 holds a complete run but no run.json'):
        plan(seeds=[1])


TUNE = dict(learning_rate=[1e-3, 2e-3])
NAME_A_CONTENDER = "contender 'mha': "
MISTAKES = [
    (dict(contenders={}), 'there is nothing to compare'),
    (dict(control='mqa'), "control='mqa' is no contender; there are mha, mla"),
    (
        dict(contenders=dict(mha=dict(n_haed=2))),
        NAME_A_CONTENDER + "unknown setting 'n_haed'; did you mean n_head?",
    ),
    (
        dict(contenders=dict(mha=dict(n_head='two'))),
        NAME_A_CONTENDER + 'n_head takes a whole number',
    ),
    (
        dict(contenders=dict(mha=dict(batch_size=2))),
        NAME_A_CONTENDER
        + 'batch_size is not for one contender alone: all of them see the same batches',
    ),
    (
        dict(contenders=dict(mha=dict(jobs=2))),
        NAME_A_CONTENDER + 'jobs is not for one contender alone',
    ),
    (dict(contenders={'a/b': {}}), "contender 'a/b': write name=dict(setting=value, ...)"),
    (dict(contenders=dict(mha=3)), NAME_A_CONTENDER + 'write name=dict(setting=value, ...)'),
    (
        dict(contenders=dict(mha=dict(learning_rate=[]))),
        NAME_A_CONTENDER + 'each grid needs values',
    ),
    (dict(seeds=[]), 'seeds=[]'),
    (dict(seeds=[1, 1]), 'seeds=[1, 1]'),
    (dict(seeds=[1.5]), 'seeds=[1.5]'),
    (dict(seeds=3), '--seeds=3: seeds takes a list'),
    (dict(tune_seed=2), 'tune_seed=2 is one of seeds=[1, 2, 3]'),
    (
        dict(tune=dict(batch_size=[1, 2])),
        'batch_size is not for one contender alone: all of them see the same batches',
    ),
    (
        dict(tune=TUNE, tune_iters=7),
        'tune_iters=7 must be more than warmup_iters=2, at least lr_decay_iters=0 and at most '
        'max_iters=6',
    ),
    (
        dict(tune=TUNE, tune_iters=3, warmup_iters=3),
        'tune_iters=3 must be more than warmup_iters=3',
    ),
    (
        dict(tune=TUNE, tune_iters=3, lr_decay_iters=4),
        'tune_iters=3 must be more than warmup_iters=2, at least lr_decay_iters=4',
    ),
    (dict(tune=dict(learning_rate=1e-3)), 'tune: learning_rate needs a list of values'),
    (
        dict(tune=dict(learning_rat=[1e-3])),
        "tune: unknown setting 'learning_rat'; did you mean learning_rate?",
    ),
    (dict(seed=3), '--seed=3: seed is not for a comparison'),
    (dict(init_from='gpt2'), '--init_from=gpt2: init_from is not for a comparison'),
    (dict(jobs=0), 'jobs=0 must be at least 1'),
    (dict(max_iters=-4), 'max_iters=-4 must be at least 1'),
    (dict(max_minutes=-1), 'max_minutes=-1.0 must be at least 0'),
    (dict(only=['mla', 'gqa']), "only=['mla', 'gqa']: 'gqa' is no contender; there are mha, mla"),
    (dict(dataset='nothing'), "there is no dataset 'nothing'"),
    (dict(figure='x.gif'), '--figure=x.gif: name a .png'),
    (
        dict(plot_only=True),
        'cmp/results.jsonl cannot be read (No such file or directory): run the comparison first',
    ),
    (
        dict(plot_only=True, results=str(STAIRCASE), control='mla'),
        'the contenders mha, shared, sliced',
    ),
    (
        dict(plot_only=True, results='text/meta.json'),
        'text/meta.json is damaged or no results.jsonl',
    ),
]


@pytest.mark.parametrize('asked, message', MISTAKES, ids=[' '.join(words(m)) for m, _ in MISTAKES])
def test_what_is_wrong_ends_in_one_line_before_anything_is_trained(asked, message, capsys):
    assert compare(**asked) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and err.count('\n') == 1, err[-2000:]
    assert not list(Path().glob('cmp/*/*'))


def test_what_was_trained_can_be_compared_with_another_control(capsys):
    words = ['--plot_only=True', f'--results={STAIRCASE}', '--figure=a.png', '--control=sliced']
    assert exit_code('compare.py', words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith('sliced latent (control)') for line in lines)
    losses = {}
    for one in read(STAIRCASE).runs:
        if one['role'] == 'seed':
            losses.setdefault(one['contender'], {})[one['seed']] = one['val_loss']
    pairs = [losses['learned'][seed] - losses['sliced'][seed] for seed in range(1, 9)]
    row = next(line for line in lines if line.startswith('learned latent') and '[' in line)
    assert f'{sum(pairs) / 8:+.4f} [' in row


# -------------------------------------------------------------------------------------------------
# the script itself


def test_help_and_pictures_load_no_torch():
    code = (
        'import sys; sys.argv[1:] = ["--help"]\n'
        'import compare\n'
        'try: compare.main()\n'
        'finally: print([name for name in ("torch", "numpy") if name in sys.modules])\n'
    )
    command = [sys.executable, '-X', 'utf8', '-c', code]  # an option: not forked, see forked.py
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]', done.stderr


# -------------------------------------------------------------------------------------------------
# kills

LONG = dict(max_iters=400, eval_interval=40, seeds=[1], log_interval=10)


def process_of(comparison):
    """Return the id of the process that trains for a compare.py."""
    listed = ['pgrep', '-P', str(comparison.pid)]
    return int(subprocess.run(listed, capture_output=True, text=True).stdout.split()[0])


def resumes(folder):
    return [line['step'] for line in log(folder) if line['event'] == 'resume']


def assert_same_as_whole():
    """Compare the evaluations of what was interrupted with those of a comparison that was not."""
    for name in CONTENDERS:
        interrupted = series(f'cmp/{name}/seed-1', 'eval', 'val_loss')
        assert interrupted == series(f'whole/{name}/seed-1', 'eval', 'val_loss')


@pytest.mark.slow
@pytest.mark.parametrize('in_process', [False, True])
def test_what_is_killed_goes_on_from_its_last_checkpoint(in_process):
    assert compare(**LONG, out_dir='whole') == 0
    comparison = start(**LONG, in_process=in_process)
    wait_until(lambda: Path('cmp/mla/seed-1/last.pt').exists(), comparison)
    finished = Path('cmp/mha/seed-1/log.jsonl').read_bytes()
    trainer = process_of(comparison)
    os.kill(comparison.pid, signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    comparison.communicate()
    assert compare(**LONG, in_process=in_process) == 0
    assert Path('cmp/mha/seed-1/log.jsonl').read_bytes() == finished
    (step,) = resumes('cmp/mla/seed-1')
    assert step >= 40
    assert_same_as_whole()
    assert found().runs[1]['eval_steps'] == list(range(40, 401, 40))


@pytest.mark.slow
@pytest.mark.parametrize('in_process', [False, True])
def test_a_train_py_that_outlives_its_compare_py_is_waited_for(in_process):
    comparison = start(**LONG, in_process=in_process)
    wait_until(lambda: Path('cmp/mha/seed-1/last.pt').exists(), comparison)
    os.kill(comparison.pid, signal.SIGKILL)
    comparison.communicate()
    assert compare(**LONG, in_process=False) == 0
    assert resumes('cmp/mha/seed-1') == []
    assert Path('cmp/mha/seed-1/output.txt').read_text().count(PROMPT) == 1


@pytest.mark.slow
@pytest.mark.parametrize('in_process', [False, True])
def test_a_run_whose_process_was_killed_goes_on_in_a_new_one(in_process):
    assert compare(**LONG, out_dir='whole') == 0
    comparison = start(**LONG, in_process=in_process)
    wait_until(lambda: Path('cmp/mla/seed-1/last.pt').exists(), comparison)
    os.kill(process_of(comparison), signal.SIGSEGV)
    out, _ = comparison.communicate(timeout=PATIENCE)
    assert comparison.returncode == 0
    assert 'mla, seed 1: its process or its device broke down (see output.txt), it goes on' in out
    attempts = Path('cmp/mla/seed-1/output.txt').read_text().split(PROMPT)[1:]
    first, second = attempts
    assert 'Fatal Python error: Segmentation fault' in first and 'train.py", line' in first
    assert '--cuda_graph=False' not in first.splitlines()[0]
    assert '--cuda_graph=False' in second.splitlines()[0]
    assert len(resumes('cmp/mla/seed-1')) == 1
    assert not Path('cmp/mla/seed-1/error.txt').exists()
    assert_same_as_whole()


@pytest.mark.slow
def test_a_run_that_kills_its_process_each_time_is_a_row_and_the_others_go_on():
    comparison, killed = start(**LONG, in_process=True), []
    output = Path('cmp/mha/seed-1/output.txt')

    def killed_often_enough():
        attempts = output.read_text().split(PROMPT)[1:] if output.exists() else []
        if len(attempts) > len(killed) and 'tokens a step' in attempts[-1]:
            killed.append(process_of(comparison))
            os.kill(killed[-1], signal.SIGSEGV)
        return len(killed) == RESTARTS + 1

    wait_until(killed_often_enough, comparison)
    comparison.communicate(timeout=PATIENCE)
    assert comparison.returncode == 1 and len(set(killed)) == 3
    errors = [line.get('error') for line in found().runs]
    assert errors == ['killed by SIGSEGV, 3 times', None]


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, in_process', [(signal.SIGTERM, True), (signal.SIGUSR1, False), (signal.SIGINT, False)]
)
def test_a_signal_saves_and_stops(number, in_process):
    comparison = start(**LONG | dict(max_iters=4000), in_process=in_process)
    first = Run('mha', 'seed', 1, Path('cmp/mha/seed-1'))
    wait_until(lambda: first.last_event().get('step'), comparison)
    comparison.send_signal(number)
    out, _ = comparison.communicate(timeout=PATIENCE)
    assert comparison.returncode == STOPPED
    assert f'stopped by {signal.Signals(number).name} with 2 of 2 runs to go' in out
    end = log('cmp/mha/seed-1')[-1]
    assert end['event'] == 'end' and end['why'] == 'stopped by SIGTERM'
    assert native.load('cmp/mha/seed-1/last.pt')['step'] == end['step'] > 0
    assert not Path('cmp/mha/seed-1/error.txt').exists()


@pytest.mark.slow
def test_two_processes_share_the_runs():
    both = [start(seeds=[1, 2, 3], max_iters=150, in_process=False) for _ in range(2)]
    for comparison in both:
        out, _ = comparison.communicate(timeout=PATIENCE)
        assert comparison.returncode == 0, out
    for name in CONTENDERS:
        for seed in (1, 2, 3):
            lines = log(f'cmp/{name}/seed-{seed}')
            assert [line['event'] for line in lines].count('settings') == 1
            assert lines[-1]['step'] == 150
    assert len(found().runs) == 6


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_a_worker_trains_as_a_process_does():
    asked = dict(
        device='cuda',
        compile=True,
        cuda_graph=True,
        n_embd=64,
        kernel='sdpa',
        seeds=[1, 2],
        contenders=dict(mha={}, mla=MLA | dict(qk_nope_head_dim=12)),
    )
    assert compare(**asked) == 0
    assert compare(**asked, in_process=False, out_dir='other') == 0
    one, other = found(), found('other/results.jsonl')
    losses = [line['val_loss'] for line in other.runs]
    assert [line['val_loss'] for line in one.runs] == pytest.approx(losses, abs=0.02)
    assert all(line['tok_per_s'] > 0 and line['peak_memory'] > 0 for line in one.runs)
    assert all(about['decode']['tok_per_s'] > 0 for about in one.contenders.values())
