"""
compare.py with tiny models on the CPU: what it trains, that contenders see the same batches, what a kill costs,
what it says when a contender fails; and the numbers of comparison.py against published tables and by their meaning.
"""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, ROOT, TEXT, TINY, exit_code, log, run, series, wait_until, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.comparison import figures as comparison_figures
from nanomla.comparison import runs
from nanomla.comparison import table as comparison
from nanomla.core import files
from nanomla.core import token_files as dataset
from nanomla.core.configurator import UserError
from nanomla.training import batches

SETTINGS = TINY | dict(
    out_dir='cmp',
    pos='rope',
    n_head=2,
    max_iters=6,
    eval_interval=3,
    log_interval=1,
    learning_rate=1e-2,
    decode_tokens=8,
    decode_repeats=1,
    in_process=True,
)
del SETTINGS['sample_tokens']
MLA = dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
CONTENDERS = dict(mha=dict(label='MHA + RoPE'), mla=dict(label='MLA', **MLA))


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test in a folder of its own that has the dataset `text`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('NANOMLA_COMMIT', 'abc1234')
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
    dataset.write_text(tmp_path / 'text', TEXT, 'char', 'A tale of a cat')


def ask(contenders=CONTENDERS, **settings):
    """The command line of compare.py with SETTINGS, changed by `settings`."""
    return words(SETTINGS | dict(contenders=contenders) | settings)


def compare(*arguments, **settings):
    return exit_code('compare.py', [*arguments, *ask(**settings)])


def found(path='cmp/results.jsonl'):
    return comparison.read(path)


def start(*arguments, script=ROOT / 'compare.py', **settings):
    return subprocess.Popen(
        [sys.executable, str(script), *arguments, *ask(**settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# ---------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize(
    'freedom, at_90, at_95, at_99',
    [
        (1, 3.078, 12.706, 63.657),
        (2, 1.886, 4.303, 9.925),
        (3, 1.638, 3.182, 5.841),
        (4, 1.533, 2.776, 4.604),
        (5, 1.476, 2.571, 4.032),
        (9, 1.383, 2.262, 3.250),
        (30, 1.310, 2.042, 2.750),
        (120, 1.289, 1.980, 2.617),
    ],
)
def test_quantiles_of_student_are_those_of_the_printed_tables(freedom, at_90, at_95, at_99):
    assert [
        round(comparison.t_quantile(p, freedom), 3) for p in (0.9, 0.975, 0.995)
    ] == pytest.approx([at_90, at_95, at_99], abs=1.1e-3)


def test_an_interval_is_paired():
    ours, theirs = [1.50, 1.70, 1.60], [1.52, 1.71, 1.63]
    mean, half = comparison.interval([a - b for a, b in zip(ours, theirs)])
    assert mean == pytest.approx(-0.02) and half == pytest.approx(
        4.303 * 0.01 / math.sqrt(3), rel=1e-3
    )
    assert comparison.interval([0.25]) == (0.25, None)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = (
        torch.randn(2000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
        + 1
    )
    inside = statistics.fmean(
        abs(mean - 1) <= half for mean, half in map(comparison.interval, draws.tolist())
    )
    assert 0.93 < inside < 0.97


ROWS = st.lists(
    st.builds(
        lambda cache, loss: dict(cache_bytes=cache, val_loss=loss),
        st.integers(1, 6),
        st.one_of(st.none(), st.integers(1, 6)),
    ),
    max_size=12,
)


@given(ROWS)
def test_the_front_is_what_nothing_beats(rows):
    rows = [row | dict(name=i) for i, row in enumerate(rows)]
    on = comparison.front(rows)

    def beats(a, b):
        return (
            a['cache_bytes'] <= b['cache_bytes']
            and a['val_loss'] <= b['val_loss']
            and (a['cache_bytes'], a['val_loss']) != (b['cache_bytes'], b['val_loss'])
        )

    known = [row for row in rows if row['val_loss'] is not None]
    for row in known:
        assert (row['name'] in on) == (not any(beats(other, row) for other in known))
        assert row['name'] in on or any(beats(rows[i], row) for i in on)
    assert set(on) <= {row['name'] for row in known}


def test_what_lies_far_above_the_others_is_not_drawn_to_scale():
    def rows(*losses):
        return [dict(name=str(i), val_loss=loss) for i, loss in enumerate(losses)]

    assert comparison_figures.beyond(rows(1.40, 1.593, 1.41, None, 1.43, 1.42, 1.7)) == {'1', '6'}
    assert (
        comparison_figures.beyond(rows(1.40, 1.5, 1.41, 1.43, 1.42))
        == set()
        == comparison_figures.beyond(rows(1.40, 1.9, 1.41))
        == comparison_figures.beyond(rows(1.4, 1.4, 1.4, 1.4, 1.5))
    )


def made_up(losses, **about):
    """A comparison with these losses, name -> one for each seed (None: failed); the first is the control."""
    head = (
        dict(
            event='comparison',
            title='T',
            control=next(iter(losses)),
            seeds=[1, 2, 3],
            tune_seed=9,
            steps=100,
            tokens_per_step=64,
            source='a text',
            commit='abc1234',
            device='NVIDIA H200',
            dtype='bfloat16',
            torch='2.11',
            date='2026-01-31',
        )
        | about
    )
    contenders = {
        name: dict(
            name=name,
            label=name.upper(),
            kind='mla' if 'mla' in name else 'mha',
            params=1000,
            params_ratio=1.0,
            cache_bytes=512 >> i,
            error=None,
            differs={},
            grid={},
            tuned={},
            at_edge=False,
            decode=None,
        )
        for i, name in enumerate(losses)
    }
    runs = [
        dict(event='run', contender=name, role='seed', seed=seed, tuned={}, shared=False)
        | (
            dict(error='the loss is nan')
            if loss is None
            else dict(
                val_loss=loss,
                tok_per_s=1000 * seed,
                peak_memory=2**20 * seed,
                eval_steps=[50, 100],
                eval_losses=[loss + 1, loss],
            )
        )
        for name, row in losses.items()
        for seed, loss in zip((1, 2, 3), row)
    ]
    return head, contenders, runs


def test_rows_compare_seed_by_seed_with_those_that_both_have():
    result = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, None, 1.4], bad=[None] * 3))
    mha, mla, bad = comparison.rows(*result)
    assert (
        mha['val_loss'] == pytest.approx(1.6)
        and mha['sd'] == pytest.approx(0.1)
        and mha['difference'] is None
        and mha['control']
    )
    assert (
        mla['difference'] == pytest.approx(-0.15)
        and mla['half'] == pytest.approx(12.706 * 0.05, rel=1e-3)
        and mla['seeds'] == 2
    )
    assert mla['percent'] == pytest.approx(-100 * 0.15 / 1.55) and mla['cache_ratio'] == 0.5
    assert mha['tok_per_s'] == 2000 and mha['peak_memory'] == 3 * 2**20
    assert bad['val_loss'] is None and bad['error'] == 'the loss is nan'
    text = comparison.table(*result)
    assert (
        '| BAD | 1,000 (+0.00 %) | 128 (1/4) | failed: the loss is nan |' in text
        and '(2 of 3 seeds)' in text
        and 'commit abc1234 · seeds 1, 2, 3' in text
    )
    assert text.count('- mla, seed 2') == 1 and text.count('- bad, seed') == 3


def test_speeds_of_runs_that_shared_a_device_are_not_reported():
    head, contenders, lines = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    for line in lines[3:]:
        line['shared'] = True
    mha, mla = comparison.rows(head, contenders, lines)
    assert mha['tok_per_s'] and mla['tok_per_s'] is None and mla['peak_memory'] is None
    assert 'speeds and memory are not reported' in ' '.join(
        comparison.table(head, contenders, lines).split()
    )


def test_contenders_that_a_stop_has_kept_waiting_are_left_out():
    whole = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6], late=[], bad=[None] * 3))
    text = comparison.table(*whole)
    assert (
        'Not trained yet: LATE.' in ' '.join(text.split())
        and '| LATE' not in text
        and '| BAD | 1,000 (+0.00 %)' in text
    )
    whole[1].pop('late')
    assert [line for line in text.splitlines() if line.startswith('|')] == [
        line for line in comparison.table(*whole).splitlines() if line.startswith('|')
    ]
    assert 'Not trained yet' not in comparison.table(*whole) and list(
        comparison.reached(*made_up(dict(mha=[], mla=[])))
    ) == ['mha']


@pytest.mark.parametrize(
    'losses',
    [
        dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]),
        dict(mha=[1.5, None, None], mla=[None] * 3),
        dict(mha=[None] * 3),
        dict(mha=[], mla=[]),
        {
            name: [1.5 + i / 100] * 3
            for i, name in enumerate(['mha', *(f'mla{i}' for i in range(9))])
        },
        {f'mla{i}': [1.5 + i * i / 100] * 3 for i in range(14)},
    ],
    ids=['two', 'one seed', 'none', 'stopped', 'ten', 'fourteen'],
)
def test_a_figure_is_drawn_of_whatever_there_is(losses):
    result = made_up(losses)
    comparison_figures.draw(*result, 'a.png')
    comparison_figures.draw_front([result, result], 'front.png')
    assert all(Path(name).read_bytes().startswith(b'\x89PNG') for name in ('a.png', 'front.png'))


def test_tables_tell_grids_of_words():
    head, contenders, lines = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    contenders['mla'] |= dict(
        grid=dict(dropout_in=['all', 'residual'], qk_norm=[True, False], learning_rate=[1e-3]),
        tuned=dict(dropout_in='residual', qk_norm=False, learning_rate=1e-3),
    )
    text = ' '.join(comparison.table(head, contenders, lines).split())
    assert (
        'dropout_in of all, residual; qk_norm of True, False; learning_rate of 0.001.' in text
        and '| residual, False, 0.001 |' in text
    )


def test_a_legend_names_contenders_without_a_speed_too(monkeypatch):
    head, contenders, lines = made_up(dict(mha=[1.5, 1.7, 1.6], mla=[1.4, 1.5, 1.6]))
    for line in lines:
        line['shared'], line['tok_per_s'] = line['contender'] == 'mla', 1000
    legends = []
    monkeypatch.setattr(
        comparison_figures.figures,
        'save',
        lambda fig, *_, **__: legends.extend(ax.get_legend() for ax in fig.axes),
    )
    comparison_figures.draw(head, contenders, lines, 'a.png')
    assert [
        text.get_text()
        for text in next(
            legend for legend in legends if legend and len(legend.get_texts()) > 1
        ).get_texts()
    ] == [about['label'] for about in contenders.values()]


@pytest.mark.parametrize('number', [6, 30])
def test_names_of_points_cover_no_other_point_and_are_left_out_where_there_are_too_many(number):
    from matplotlib.figure import Figure

    losses = {f'mla{i}': [1.5 + 0.001 * (i % 5)] * 3 for i in range(number)}
    head, contenders, lines = made_up(losses)
    for i, about in enumerate(contenders.values()):
        about |= dict(cache_bytes=int(1024 * 1.33 ** (i % 6)))
    found, fig = comparison.rows(head, contenders, lines), Figure(figsize=(11, 5))
    ax = fig.add_subplot()
    paint = comparison_figures.colors(contenders)
    comparison_figures.pareto(ax, found, paint)
    comparison_figures.name_points(ax, found, paint, 4)
    fig.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in ax.texts]
    assert {name for name, _ in boxes} == {
        row['label']
        for row in found
        if number == 6 or row['control'] or row['name'] in comparison.front(found)
    }
    if number == 6:
        for row in found:
            x, y = ax.transData.transform((row['cache_bytes'], row['val_loss']))
            assert not [name for name, box in boxes if box.x0 < x < box.x1 and box.y0 < y < box.y1]


# ---------------------------------------------------------------------------------------------------
# a whole comparison


def test_a_grid_may_take_fewer_steps_and_its_ends_are_those_that_could_be_trained(capfd):
    assert (
        compare(
            contenders=dict(mha=dict(label='MHA', grad_clip=0.0, learning_rate=[3e-4, 1e-2, 1e30])),
            tune_iters=3,
            seeds=[2],
        )
        == 0
    )
    head, contenders, lines = found()
    assert sorted(
        (line['role'], line['eval_steps'][-1]) for line in lines if 'error' not in line
    ) == [('seed', 6), ('tune', 3), ('tune', 3)]
    assert 'Tuned on seed 1000 in 3 steps: learning_rate of' in ' '.join(
        capfd.readouterr().out.split()
    ) and (head['tune_steps'], head['steps']) == (3, 6)
    assert contenders['mha']['at_edge'] and len([line for line in lines if 'error' in line]) == 1


def test_a_grid_that_has_grown_trains_what_it_chooses_now_and_keeps_what_was_trained():
    asked, mla = (
        dict(seeds=[1], max_iters=2, decode_tokens=0),
        dict(MLA, learning_rate=[1e-5, 1e-4]),
    )
    assert compare(contenders=dict(mla=mla), **asked) == 0
    before, short = {path: path.read_bytes() for path in Path('cmp').glob('*/*/*')}, found()[2]
    assert compare(contenders=dict(mla=mla | dict(learning_rate=[1e-5, 1e-4, 1e-2])), **asked) == 0
    after, long = {path: path.read_bytes() for path in Path('cmp').glob('*/*/*')}, found()[2]
    assert (
        before.items() <= after.items()
        and '--learning_rate=0.0001'
        in json.loads(Path('cmp/mla/seed-1/run.json').read_text())['words']
    )
    assert (
        long[-1]['tuned'] == dict(learning_rate=1e-2)
        and long[-1]['val_loss'] < short[-1]['val_loss']
        and '--learning_rate=0.01' in long[-1]['command']
    )
    assert log('cmp/mla/seed-1,learning_rate=0.01')[0]['config']['learning_rate'] == 1e-2
    assert (
        compare(contenders=dict(mla=mla), **asked) == 0
        and found()[2] == short
        and {path: path.read_bytes() for path in Path('cmp').glob('*/*/*')} == after
    )


def test_a_command_that_cannot_work_leaves_complete_runs_as_they_are():
    asked = dict(seeds=[1], max_iters=2, decode_tokens=0)
    assert compare(**asked) == 0
    before, kept = found(), {path: path.stat().st_mtime_ns for path in Path('cmp').glob('*/*/*')}
    assert compare(**asked, n_head=3) == 1 and all(
        line['error'].startswith('n_embd=16 is not a multiple') for line in found()[2]
    )
    Path('cmp/mla/seed-1/error.txt').write_text('out of memory')
    assert compare(**asked) == 1 and found()[2][1]['error'] == 'out of memory'
    assert (
        compare(**asked, retry=True) == 0
        and found() == before
        and {path: path.stat().st_mtime_ns for path in Path('cmp').glob('*/*/*')} == kept
    )


def test_a_grid_may_be_of_words(capfd):
    assert (
        compare(
            contenders=dict(mha=dict(act=['gelu', 'relu2'], qk_norm=[False, True])),
            max_iters=2,
            seeds=[1],
            decode_tokens=0,
        )
        == 0
    )
    assert 'act of gelu, relu2; qk_norm of False, True.' in ' '.join(capfd.readouterr().out.split())
    (_, contenders, lines), best = found(), json.loads(Path('cmp/compare.json').read_text())[0]
    assert (
        len(lines) == 5
        and best['tuned'] == lines[-1]['tuned'] in [line['tuned'] for line in lines[:4]]
        and not best['at_edge']
    )  # words have no order


def test_a_grid_does_not_change_the_size_of_a_model():
    _, _, field = plan(
        contenders=dict(
            mha={}, mla=MLA | dict(kv_lora_rank=[4, 8]), one=MLA | dict(kv_lora_rank=[4])
        )
    )
    assert (
        field['mla'].error
        == "its grid of kv_lora_rank changes the model's size: name a contender for each"
    )
    assert field['one'].cache_bytes == 2 * 2 * 8 and not field['one'].error  # one value is no grid


def test_a_comparison_from_end_to_end(capfd):
    asked = dict(
        contenders=dict(
            mha=dict(label='MHA + RoPE'),
            mla=dict(MLA, label='MLA', learning_rate=[1e-2, 3e-4]),
            bad=dict(n_head=3),
            wild=dict(learning_rate=1e30, grad_clip=0.0, weight_decay=1e9),
        ),
        seeds=[2, 3],
        sample_tokens=20,
    )
    os.makedirs('cmp/mla/seed-3')
    Path('cmp/mla/seed-3/error.txt').write_text('out of memory')
    assert compare(**asked) == 1  # some have failed
    out = capfd.readouterr().out
    head, contenders, lines = found()
    assert [
        len([line for line in lines if line['contender'] == name and line['role'] == role])
        for name in contenders
        for role in ('tune', 'seed')
    ] == [0, 2, 2, 2, 0, 2, 0, 2]
    assert (
        'cannot be built: n_embd=16 is not a multiple of n_head=3' in out
        and '| bad |' in out
        and '| failed: n_embd=16 is not a multiple of n_head=3: ' in out
    )
    assert (
        'wild, seed 2: failed: the loss is nan at step' in out
        and '| failed: the loss is nan at step' in out
    )
    tried = {
        line['tuned']['learning_rate']: line['val_loss'] for line in lines if line['role'] == 'tune'
    }
    best = dict(mha=SETTINGS['learning_rate'], mla=min(tried, key=tried.get))
    assert (
        tried.keys() == {1e-2, 3e-4}
        and contenders['mla']['tuned'] == dict(learning_rate=best['mla'])
        and contenders['mla']['at_edge']
        and not contenders['mha']['tuned']
    )
    for name in ('mha', 'mla'):
        source = load.load_model(f'cmp/{name}/seed-2')
        model, content = source.model, source.checkpoint
        assert (content['config']['seed'], content['config']['learning_rate']) == (
            2,
            best[name],
        ) and checkpoint.kind_of(model) == name
        assert (
            model.num_params() == contenders[name]['params']
            and abs(contenders[name]['params_ratio'] - 1) < 0.01
        )
        one = next(
            line
            for line in lines
            if line['contender'] == name and (line['role'], line['seed']) == ('seed', 2)
        )
        assert (
            one['val_loss']
            == content['best_val_loss']
            == min(series(f'cmp/{name}/seed-2', 'eval', 'val_loss').values())
        )
        decode = contenders[name]['decode']
        assert (
            decode['tok_per_s'] > 0
            and decode['cache_bytes'] == 2 * 8 * contenders[name]['cache_bytes']
            and len(decode['sample']) > 0
        )  # fp32
    assert (contenders['mha']['cache_bytes'], contenders['mla']['cache_bytes']) == (
        2 * 2 * 32,
        2 * 2 * 12,
    )
    assert (
        contenders['mla']['differs'].items() >= MLA.items()
        and not {'learning_rate', 'seed'} & contenders['mla']['differs'].keys()
    )
    rows = json.loads(Path('cmp/compare.json').read_text())
    mha, mla = (
        next(
            line['val_loss']
            for line in lines
            if (line['contender'], line['role'], line['seed']) == (name, 'seed', 2)
        )
        for name in ('mha', 'mla')
    )
    assert rows[1]['seeds'] == 1 and rows[1]['error'] == 'out of memory' and '(1 of 2 seeds)' in out
    assert rows[1]['difference'] == pytest.approx(mla - mha) and rows[1]['half'] is None

    before = {
        path: path.stat().st_mtime_ns for path in Path('cmp').glob('*/*/*')
    }  # again: nothing is trained, and everything is there
    kept = {
        name: Path('cmp', name).read_bytes()
        for name in ('compare.png', 'compare.md', 'compare.json', 'compare_front.png')
    }
    for name in kept:
        os.remove(f'cmp/{name}')
    assert compare(**asked) == 1
    assert {path: path.stat().st_mtime_ns for path in Path('cmp').glob('*/*/*')} == before
    shutil.copy('cmp/results.jsonl', 'kept.jsonl')
    shutil.rmtree('cmp')
    assert (
        exit_code(
            'compare.py', ['--plot_only=True', '--results=kept.jsonl', '--figure=new/compare.png']
        )
        == 0
    )  # from the one file alone
    assert {name: Path('new', name).read_bytes() for name in kept} == kept
    assert (
        exit_code(
            'compare.py',
            ['--plot_only=True', '--results=kept.jsonl,kept.jsonl', '--figure=both.png'],
        )
        == 0
        and Path('both.png').exists()
    )


def test_runs_are_complete_by_their_logs_and_the_rest_can_be_left_out():
    asked = dict(
        seeds=[1],
        only=['mla'],
        contenders=dict(mha={}, gqa=dict(n_kv_head=1), mla=dict(MLA, learning_rate=[1e-2, 3e-4])),
        sample_tokens=5,
    )
    assert compare(**asked) == 0
    before, logs = found(), {path: path.read_bytes() for path in Path('cmp').rglob('log.jsonl')}
    assert (
        list(before[1]) == ['mla']
        and len(before[2]) == len(logs) == 3
        and before[0]['control'] == 'mla'
        and before[1]['mla']['decode']['sample']
    )
    for path in [*Path('cmp').rglob('*.pt'), *Path('cmp').rglob('decode.json')]:
        path.unlink()
    assert compare(**asked) == 0
    assert (
        found()[2] == before[2]
        and {path: path.read_bytes() for path in Path('cmp').rglob('log.jsonl')} == logs
        and found()[1]['mla']['decode'] is None
    )


def plan(*arguments, **settings):
    """compare.py up to the first run: the runs it has in mind, the function that prepares one, and its contenders."""
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runs,
            'train',
            lambda every, prepare, *_: (
                caught.extend([every, prepare, dict(prepare.__globals__['field'])]) or sys.exit()
            ),
        )
        with pytest.raises(SystemExit):
            run('compare.py', [*arguments, *(ask(**settings) if settings or not arguments else [])])
    return caught


def test_contenders_read_the_same_batches_seed_by_seed(monkeypatch):
    read, cut = {}, batches.Dataset.cut

    def remember(self, split, starts):
        x, y = cut(self, split, starts)
        read.setdefault((now, split), []).append((starts.tolist(), x.tolist(), y.tolist()))
        return x, y

    monkeypatch.setattr(batches.Dataset, 'cut', remember)
    every, prepare, _ = plan(seeds=[1, 2], gradient_accumulation_steps=2)
    for one in every:
        prepare(one)
        now = one.contender, one.seed
        run('train.py', [*one.words, f'--out_dir={one.folder}'])
    for seed in (1, 2):
        assert len(read[('mha', seed), 'train']) == 12
        assert (
            read[('mha', seed), 'train'] == read[('mla', seed), 'train']
            and read[('mha', seed), 'val'] == read[('mla', seed), 'val']
        )
    assert (
        read[('mha', 1), 'train'] != read[('mha', 2), 'train']
        and read[('mha', 1), 'val'] == read[('mha', 2), 'val']
    )


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
    _, _, field = plan(
        n_embd=width,
        n_layer=3,
        n_head=4,
        act=act,
        bias=bias,
        contenders=dict(
            mha={},
            mla=MLA | dict(kv_lora_rank=rank),
            grouped=dict(n_kv_head=groups),
            learned=dict(pos='learned', norm='rmsnorm'),
            own=dict(n_inner=8),
        ),
    )
    target = field['mha'].model().num_params()
    for name in ('mla', 'grouped', 'learned'):
        one = field[name]
        model = one.model()
        assert one.params == model.num_params() and abs(one.params / target - 1) < 0.01
    assert field['own'].model().config.n_inner == 8 and field['own'].ratio < 0.99


def test_parameters_that_cannot_be_matched_are_pointed_out(capsys):
    _, _, field = plan(contenders=CONTENDERS | dict(deep=dict(n_layer=30)), match=False)
    out = capsys.readouterr().out
    assert (
        'NOT EQUAL' in next(line for line in out.splitlines() if line.strip().startswith('deep'))
        and field['deep'].ratio > 2
    )
    _, _, field = plan(contenders=CONTENDERS | dict(deep=dict(n_layer=30)))
    assert 'there is no n_inner that gives it' in field['deep'].error and not field['mla'].error


def test_a_control_without_rope_is_pointed_out(capsys):
    plan(control='plain', contenders=CONTENDERS | dict(plain=dict(pos='learned')))
    assert "note: the control 'plain' is not MHA with RoPE" in capsys.readouterr().out
    plan()
    assert 'note:' not in capsys.readouterr().out


def test_settings_of_mla_reach_only_mla():
    every, prepare, field = plan(latent_norm=False, contenders=dict(mha={}, mla=MLA))
    for one in every:
        prepare(one)
    assert {one.contender: '--latent_norm=False' in one.words for one in every} == dict(
        mha=False, mla=True
    )


def test_a_grid_is_a_product_and_a_contender_s_own_comes_first():
    every, _, field = plan(
        tune=dict(learning_rate=[1e-3, 2e-3], weight_decay=[0.0, 0.1]),
        contenders=CONTENDERS | dict(other=dict(beta2=[0.9, 0.95, 0.99])),
    )
    tried = {
        name: [one.tuned for one in every if one.contender == name and one.role == 'tune']
        for name in field
    }
    assert (
        tried['mla']
        == tried['mha']
        == [dict(learning_rate=a, weight_decay=b) for a in (1e-3, 2e-3) for b in (0.0, 0.1)]
    )
    assert tried['other'] == [dict(beta2=b) for b in (0.9, 0.95, 0.99)]
    assert {one.seed for one in every if one.role == 'tune'} == {1000} and [
        one.contender for one in every
    ] == ['mha'] * 7 + ['mla'] * 7 + ['other'] * 6
    assert all(
        [one.role for one in every if one.contender == name]
        == ['tune'] * len(tried[name]) + ['seed'] * 3
        for name in field
    )
    assert len({one.folder for one in every}) == len(every) == 11 + 9


CONFIGS = sorted(
    path.stem
    for path in (ROOT / 'config').glob('*.py')
    if path.stem.startswith(('compare', 'study'))
)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_preset_is_a_fair_comparison(name, device, monkeypatch):
    config = lambda stem: str(ROOT / 'config' / f'{stem}.py')
    asked = [config('compare_shakespeare')] * name.startswith('study') + [
        config(name),
        '--dataset=text',
        '--out_dir=cmp',
        '--results=r.jsonl',
        '--figure=r.png',
    ]
    if device == 'cuda':
        monkeypatch.setattr(
            'nanomla.core.devices.pick_device', lambda device: torch.device('cuda', 0)
        )
        monkeypatch.setattr('nanomla.core.devices.describe', lambda device: 'GPU')
    elif 'on_cpu' not in Path(config(name)).read_text():
        pytest.skip('made for a GPU')
    every, prepare, field = plan(*asked)
    control = next(iter(field.values()))
    assert (
        not any(one.error for one in field.values())
        and control.kind == ('mla' if name == 'study_mla' else 'mha')
        and control.shape.pos == 'rope'
        and control.grid
    )
    for one in field.values():
        assert (
            abs(one.ratio - 1 if one is not control else 0) < 0.01
            and len(one.points) >= 3
            and {'muon_lr', 'learning_rate'} & one.grid.keys()
        )
        assert len(one.points) == len(control.points) or device == 'cpu'
    assert any(one.kind == 'mla' for one in field.values())
    if name in ('compare_124m', 'compare_books', 'compare_litgpt'):
        assert any(
            one.kind == 'mla' and 8 * one.cache_bytes <= control.cache_bytes
            for one in field.values()
        )
    if name == 'compare_shakespeare':
        assert any(
            one.kind == 'mla' and 4 * one.cache_bytes <= control.cache_bytes
            for one in field.values()
        )
        assert len({one.seed for one in every if one.role == 'seed'}) == (
            5 if device == 'cuda' else 3
        )
    if name == 'study_mla':
        assert all(
            one.cache_bytes == control.cache_bytes for one in field.values() if one.kind == 'mla'
        )
        assert len({one.seed for one in every if one.role == 'seed'}) == (
            5 if device == 'cuda' else 3
        )


@pytest.mark.slow
def test_a_worker_and_a_process_of_its_own_train_the_same():
    assert compare(seeds=[5]) == 0
    assert compare(seeds=[5], in_process=False, jobs=2, out_dir='other') == 0
    for name in CONTENDERS:
        assert series(f'cmp/{name}/seed-5', 'train', 'loss') == series(
            f'other/{name}/seed-5', 'train', 'loss'
        )
    (_, _, one), (_, _, other) = found(), found('other/results.jsonl')
    assert [line['val_loss'] for line in one] == [line['val_loss'] for line in other]
    assert not any(line['shared'] for line in one) and all(line['shared'] for line in other)


# ---------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_and_retry_tries_again(capfd):
    wild = dict(mha={}, wild=dict(MLA, learning_rate=1e30, grad_clip=0.0, weight_decay=1e9))
    assert compare(contenders=wild, seeds=[1]) == 1
    out = capfd.readouterr().out
    assert (
        '| wild |' in out
        and 'failed: the loss is nan at step' in out
        and 'wild, seed 1: failed: the loss is nan' in out
    )
    assert found()[2][0]['val_loss'] > 0
    at = Path('cmp/wild/seed-1/run.json').stat().st_mtime_ns
    assert (
        compare(contenders=wild, seeds=[1]) == 1
        and Path('cmp/wild/seed-1/run.json').stat().st_mtime_ns == at
    )
    assert (
        compare(contenders=wild, seeds=[1], retry=True) == 1
        and Path('cmp/wild/seed-1/run.json').stat().st_mtime_ns > at
    )
    assert (
        compare(
            contenders=dict(wild=wild['wild']),
            out_dir='all',
            seeds=[1],
            tune=dict(weight_decay=[1e9, 2e9]),
        )
        == 1
    )  # the control, too, and its whole grid
    assert 'no point of its grid could be trained: the loss is nan' in capfd.readouterr().out


def test_other_settings_are_not_mixed_into_old_results(capsys):
    folder = Path('cmp/mha/seed-1')
    folder.mkdir(parents=True)
    every, prepare, _ = plan(seeds=[1])
    prepare(every[0])
    (folder / 'run.json').write_text(json.dumps(dict(words=every[0].words)))
    every[0].checked()
    with pytest.raises(
        UserError,
        match='cmp/mha/seed-1 was trained with other settings .--max_iters=9, --max_iters=6.: name another --out_dir',
    ):
        plan(seeds=[1], max_iters=9)
    plan(
        seeds=[1], tune=dict(learning_rate=[1e-3, 1e-2])
    )  # of a grid that was shorter then: no other settings
    (folder / 'run.json').unlink()
    (folder / 'log.jsonl').write_text('{"event": "end", "why": "max_iters reached"}\n')
    with pytest.raises(UserError, match='cmp/mha/seed-1 holds a complete run but no run.json'):
        plan(seeds=[1])


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(contenders={}), 'there is nothing to compare'),
        (dict(control='mqa'), "control='mqa' is no contender; there are mha, mla"),
        (
            dict(contenders=dict(mha=dict(n_haed=2))),
            "contender 'mha': unknown setting 'n_haed'; did you mean n_head?",
        ),
        (
            dict(contenders=dict(mha=dict(n_head='two'))),
            "contender 'mha': n_head takes a whole number",
        ),
        (
            dict(contenders=dict(mha=dict(batch_size=2))),
            "contender 'mha': batch_size is not for one contender alone: all of them see the same batches",
        ),
        (
            dict(contenders=dict(mha=dict(jobs=2))),
            "contender 'mha': jobs is not for one contender alone",
        ),
        (dict(contenders={'a/b': {}}), "contender 'a/b': write name=dict(setting=value, ...)"),
        (dict(contenders=dict(mha=3)), "contender 'mha': write name=dict(setting=value, ...)"),
        (
            dict(contenders=dict(mha=dict(learning_rate=[]))),
            "contender 'mha': each grid needs values",
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
            dict(tune=dict(learning_rate=[1e-3, 2e-3]), tune_iters=7),
            'tune_iters=7 must be more than warmup_iters=2, at least lr_decay_iters=0 and at most max_iters=6',
        ),
        (
            dict(tune=dict(learning_rate=[1e-3, 2e-3]), tune_iters=3, warmup_iters=3),
            'tune_iters=3 must be more than warmup_iters=3',
        ),
        (
            dict(tune=dict(learning_rate=[1e-3, 2e-3]), tune_iters=3, lr_decay_iters=4),
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
        (
            dict(only=['mla', 'gqa']),
            "only=['mla', 'gqa']: 'gqa' is no contender; there are mha, mla",
        ),
        (dict(dataset='nothing'), "there is no dataset 'nothing'"),
        (dict(figure='x.gif'), '--figure=x.gif: name a .png'),
        (
            dict(plot_only=True),
            'cmp/results.jsonl cannot be read (No such file or directory): run the comparison first',
        ),
        (
            dict(plot_only=True, results='text/meta.json'),
            'text/meta.json is damaged or no results.jsonl',
        ),
    ],
    ids=lambda value: (
        ' '.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else ''
    ),
)
def test_what_is_wrong_is_told_in_one_line_before_anything_is_trained(settings, message, capsys):
    assert compare(**settings) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and err.count('\n') == 1, err[-2000:]
    assert not list(Path().glob('cmp/*/*'))


COMMITTED = sorted(
    path
    for start in ('compare', 'study')
    for path in (ROOT / 'assets' / 'logs').glob(f'{start}*.jsonl')
    if '"comparison"' in path.read_text()[:40]
)


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: path.stem)
def test_tables_of_the_readme_are_those_of_the_committed_logs(path):
    head, contenders, lines = comparison.read(path)
    text, readme = comparison.table(head, contenders, lines), (ROOT / 'README.md').read_text()
    assert (
        not [line for line in text.splitlines() if line.startswith('|') and line not in readme]
        and path.name in readme
    )
    assert all(commit in readme for commit in head['commit'].split(', ')) and not any(
        '/work' in line.get('command', '') for line in lines
    )
    assert len({line['command'] for line in lines if 'command' in line}) == len(
        [line for line in lines if 'command' in line]
    )


def test_losses_of_the_screening_are_those_of_its_log():
    head, contenders, lines = comparison.read(ROOT / 'assets' / 'logs' / 'shapes_pilot.jsonl')
    about = (
        (ROOT / 'README.md').read_text().partition('| latent + RoPE key |')[2].partition('\n\n')[0]
    )
    said, tried = (
        set(re.findall(r'1\.4\d{3}', about)),
        [
            line
            for line in lines
            if line['tuned']['dropout'] == 0.1 and line['tuned'].get('dropout_in', 'all') == 'all'
        ],
    )
    assert (
        len(said) == 10
        and said <= {f'{line["val_loss"]:.4f}' for line in tried}
        and {line['seed'] for line in tried} == {head['tune_seed']}
    )


def test_losses_of_the_screening_on_books_are_those_of_its_log():
    head, contenders, lines = comparison.read(ROOT / 'assets' / 'logs' / 'screen_books.jsonl')
    about = (
        (ROOT / 'README.md').read_text().partition('| | rate: val loss |')[2].partition('\n\n')[0]
    )
    found, best = (
        [
            (f'{line["val_loss"]:.4f}', f'{contenders[line["contender"]]["settings"]["muon_lr"]:g}')
            for line in lines
        ],
        min(line['val_loss'] for line in lines),
    )
    rows = [
        (re.findall(r'(0\.\d+): (1\.\d{4})', row), re.findall(r'([+]\d\.\d\d) %', row))
        for row in about.splitlines()[2:]
    ]
    assert (
        len(rows) == 29
        and all((loss, rate) in found for tried, _ in rows for rate, loss in tried)
        and {line['seed'] for line in lines} == {1000}
    )
    for tried, percent in rows[1:]:
        assert (
            abs(float(percent[0]) - 100 * (min(float(loss) for _, loss in tried) / best - 1))
            < 0.011
        )


# ---------------------------------------------------------------------------------------------------
# kills

LONG = dict(max_iters=400, eval_interval=40, seeds=[1], log_interval=10)


@pytest.mark.slow
@pytest.mark.parametrize('in_process', [False, True])
def test_what_is_killed_goes_on_from_its_last_checkpoint(in_process):
    assert compare(**LONG, out_dir='whole') == 0
    process = start(**LONG, in_process=in_process)
    wait_until(lambda: Path('cmp/mla/seed-1/last.pt').exists(), process)
    finished = Path('cmp/mha/seed-1/log.jsonl').read_bytes()
    trainer = worker_of(process)
    os.kill(process.pid, signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    process.communicate()
    assert compare(**LONG, in_process=in_process) == 0
    assert Path('cmp/mha/seed-1/log.jsonl').read_bytes() == finished
    resumed = [line['step'] for line in log('cmp/mla/seed-1') if line['event'] == 'resume']
    assert len(resumed) == 1 and resumed[0] >= 40
    for name in CONTENDERS:
        assert series(f'cmp/{name}/seed-1', 'eval', 'val_loss') == series(
            f'whole/{name}/seed-1', 'eval', 'val_loss'
        )
    assert found()[2][1]['eval_steps'] == list(range(40, 401, 40))


def worker_of(process):
    return next(
        int(pid)
        for pid in subprocess.run(
            ['pgrep', '-P', str(process.pid)], capture_output=True, text=True
        ).stdout.split()
    )


@pytest.mark.slow
@pytest.mark.parametrize('in_process', [False, True])
def test_a_run_whose_process_was_killed_goes_on_in_a_new_one(in_process):
    assert compare(**LONG, out_dir='whole') == 0
    process = start(**LONG, in_process=in_process)
    wait_until(lambda: Path('cmp/mla/seed-1/last.pt').exists(), process)
    os.kill(worker_of(process), signal.SIGSEGV)
    out, _ = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode == 0
        and 'mla, seed 1: its process or its device broke down (see output.txt), it goes on in a new one'
        in out
    )
    said = Path('cmp/mla/seed-1/output.txt').read_text()
    assert (
        said.count(runs.PROMPT) == 2
        and 'Fatal Python error: Segmentation fault' in said.split(runs.PROMPT)[1]
        and 'train.py", line' in said
    )
    assert ['--cuda_graph=False' in one.splitlines()[0] for one in said.split(runs.PROMPT)[1:]] == [
        False,
        True,
    ]
    assert (
        len([line for line in log('cmp/mla/seed-1') if line['event'] == 'resume']) == 1
        and not Path('cmp/mla/seed-1/error.txt').exists()
    )
    for name in CONTENDERS:
        assert series(f'cmp/{name}/seed-1', 'eval', 'val_loss') == series(
            f'whole/{name}/seed-1', 'eval', 'val_loss'
        )


@pytest.mark.slow
def test_a_run_that_kills_its_process_each_time_is_a_row_and_the_others_go_on():
    process, killed = start(**LONG, in_process=True), []

    def kill():
        last = Path('cmp/mha/seed-1/output.txt')
        if (
            last.exists()
            and last.read_text().count(runs.PROMPT) > len(killed)
            and 'tokens a step' in last.read_text().split(runs.PROMPT)[-1]
        ):
            killed.append(worker_of(process))
            os.kill(killed[-1], signal.SIGSEGV)
        return len(killed) == runs.DEATHS + 1

    wait_until(kill, process)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and len(set(killed)) == 3
    assert [line.get('error') for line in found()[2]] == ['killed by SIGSEGV, 3 times', None]


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, in_process', [(signal.SIGTERM, True), (signal.SIGUSR1, False), (signal.SIGINT, False)]
)
def test_a_signal_saves_and_stops(number, in_process):
    process = start(**LONG | dict(max_iters=4000), in_process=in_process)
    wait_until(
        lambda: any(
            run.last_event().get('step')
            for run in [runs.Run('mha', 'seed', 1, Path('cmp/mha/seed-1'))]
        ),
        process,
    )
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode == runs.STOPPED
        and f'stopped by {signal.Signals(number).name} with 2 of 2 runs to go' in out
    )
    end = log('cmp/mha/seed-1')[-1]
    assert (
        end['event'] == 'end'
        and end['why'] == 'stopped by SIGTERM'
        and checkpoint.load('cmp/mha/seed-1/last.pt')['step'] == end['step'] > 0
    )
    assert not Path('cmp/mha/seed-1/error.txt').exists()


@pytest.mark.slow
def test_two_processes_share_the_runs():
    both = [start(seeds=[1, 2, 3], max_iters=150, in_process=False) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out
    logs = [log(f'cmp/{name}/seed-{seed}') for name in CONTENDERS for seed in (1, 2, 3)]
    assert all(
        [line['event'] for line in lines].count('settings') == 1 and lines[-1]['step'] == 150
        for lines in logs
    )
    assert len(found()[2]) == 6


def test_a_folder_is_locked_until_its_holder_ends(tmp_path):
    held = files.lock(tmp_path / 'run')
    assert held and files.lock(tmp_path / 'run') is None
    child = subprocess.Popen(['sleep', '60'], pass_fds=[held.fileno()])
    held.close()
    assert files.lock(tmp_path / 'run') is None  # its train.py lives on
    child.kill()
    child.wait()
    files.lock(tmp_path / 'run').close()


def test_why_a_run_failed_is_what_it_said_last(tmp_path):
    for said in ('error: too old\n', 'step 1\nerror: out of memory\nbye\n'):
        with runs.open_output(tmp_path, ['--a=1 2']) as output:
            output.write(said)
    assert (tmp_path / 'output.txt').read_text().count("$ python train.py '--a=1 2'\n") == 2
    assert (
        runs.reason(tmp_path, 2) == 'out of memory'
        and runs.reason(tmp_path, -9) == 'killed by SIGKILL'
    )
    with runs.open_output(tmp_path, []) as output:
        output.write('Traceback (most recent call last):\nKeyError: 3\n')
    assert runs.reason(tmp_path, 1) == 'KeyError: 3'
    runs.open_output(tmp_path, []).close()
    assert runs.reason(tmp_path, 3) == 'exit code 3'


BROKEN_DEVICE = """
import atexit, json, os, pathlib, sys
out = pathlib.Path(next(word for word in sys.argv if word.startswith('--out_dir=')).removeprefix('--out_dir='))
print('step 1')
atexit.register(os.write, 2, b'lost sys.stderr\\n')
if 'always' in out.name or not (out / 'tried').exists():
    (out / 'tried').touch()
    raise RuntimeError('CUDA error: unspecified launch failure\\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1')
(out / 'log.jsonl').write_text(json.dumps(dict(event='end', why='max_iters reached')))
"""


@pytest.mark.parametrize('in_process', [False, True])
def test_a_run_whose_device_failed_goes_on_in_a_new_process(in_process, tmp_path, monkeypatch):
    for name in ('comparison/runs.py', 'core/configurator.py', 'core/files.py'):
        (tmp_path / 'nanomla' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'nanomla' / name).write_text((ROOT / 'nanomla' / name).read_text())
    (tmp_path / 'train.py').write_text(BROKEN_DEVICE)
    monkeypatch.setattr(runs, 'HERE', tmp_path)
    monkeypatch.setattr(runs, 'DEATHS', 1)
    every, told = (
        [
            runs.Run('mla', 'seed', seed, tmp_path / name, ['--a=1'])
            for seed, name in enumerate(('once', 'always'))
        ],
        [],
    )
    assert (
        runs.train(
            every,
            lambda run: None,
            [{}],
            in_process,
            {},
            lambda run: told.append((run.seed, run.over)),
            lambda running: None,
        )
        == ''
    )
    assert told == [(0, ''), (0, 'done'), (1, ''), (1, 'failed')]
    assert every[1].error() == 'RuntimeError: CUDA error: unspecified launch failure, 2 times'
    said = [(run.folder / 'output.txt').read_text() for run in every]
    assert [
        '--cuda_graph=False' in one.splitlines()[0] for one in said[0].split(runs.PROMPT)[1:]
    ] == [False, True]
    assert all(text.count('step 1') == 2 for text in said) and any(
        'lost sys.stderr' in text for text in said
    ) == (not in_process)


def test_places_for_runs(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    monkeypatch.delenv(
        'CUDA_VISIBLE_DEVICES', raising=False
    )  # not for all tests: CUDA has read it by then, and what counts GPUs reads it again
    assert runs.slots(torch.device('cpu'), 1) == [{}]
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert (
        runs.slots(torch.device('cpu'), 2)
        == [dict(OMP_NUM_THREADS='4', TORCHINDUCTOR_COMPILE_THREADS='4')] * 2
    )
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [place['CUDA_VISIBLE_DEVICES'] for place in runs.slots(torch.device('cuda'), 2)] == [
        '0',
        '1',
        '0',
        '1',
    ]
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,GPU-7')
    assert [place['CUDA_VISIBLE_DEVICES'] for place in runs.slots(torch.device('cuda'), 1)] == [
        '5',
        'GPU-7',
    ]
    assert runs.slots(torch.device('cuda', 1), 1) == [{}]


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
    assert compare(**asked) == 0 and compare(**asked, in_process=False, out_dir='other') == 0
    (_, about, one), (_, _, other) = found(), found('other/results.jsonl')
    assert [line['val_loss'] for line in one] == pytest.approx(
        [line['val_loss'] for line in other], abs=0.02
    )
    assert all(line['tok_per_s'] > 0 and line['peak_memory'] > 0 for line in one) and all(
        line['decode']['tok_per_s'] > 0 for line in about.values()
    )
