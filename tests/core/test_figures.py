"""Logs after kills and resumes, curves, and pictures that leave nothing else changed."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from nanomla.core import figures
from nanomla.core.configurator import UserError

NAN = float('nan')
SETTINGS = {
    'event': 'settings',
    'config': {'seed': 1337, 'n_head': 6},
    'kind': 'mla',
    'params': 10_650_000,
    'data': {
        'name': 'shakespeare_char',
        'source': 'a text worth $5 or $6 (stand-in)',
        'tokenizer': 'char',
    },
    'commit': 'abc1234',
    'device': 'NVIDIA H200',
    'dtype': 'bfloat16',
    'cache_bytes_per_token': 4992,
}


def train(step, loss, seconds=None):
    seconds = 0.05 * step if seconds is None else seconds
    return {
        'event': 'train',
        'step': step,
        'tokens': 1000 * step,
        'seconds': seconds,
        'loss': loss,
        'lr': 1e-3,
        'tok_per_s': 2e4,
        'mfu': 0.3,
    }


def val(step, loss):
    return {
        'event': 'eval',
        'step': step,
        'tokens': 1000 * step,
        'seconds': 0.05 * step,
        'val_loss': loss,
        'train_loss': loss,
    }


END = {
    'event': 'end',
    'best_val_loss': 1.5,
    'best_step': 60,
    'seconds': 10.0,
    'tok_per_s': 2e4,
    'peak_memory': 2**30,
}


def write(path, *events, tail=''):
    path.write_text(''.join(json.dumps(event) + '\n' for event in events) + tail)
    return path


def steps(events, kind='train'):
    return [event['step'] for event in events if event['event'] == kind]


# -------------------------------------------------------------------------------------------------
# read_log


def test_log_is_settings_and_events(tmp_path):
    log = write(tmp_path / 'log.jsonl', SETTINGS, train(0, 4.0), val(0, 4.1), END)
    assert figures.read_log(log) == (SETTINGS, [train(0, 4.0), val(0, 4.1), END])


def test_resume_supersedes_later_steps(tmp_path):
    log = write(
        tmp_path / 'log.jsonl',
        SETTINGS,
        *[train(s, 4.0) for s in (0, 10, 20, 30)],
        val(20, 3.5),
        val(30, 3.3),
        {'event': 'resume', 'step': 20},
        *[train(s, 2.0) for s in (30, 40)],
        END,
        {'event': 'resume', 'step': 30},
        train(40, 1.0),
    )
    settings, events = figures.read_log(log)
    assert settings == SETTINGS
    assert steps(events) == [0, 10, 20, 30, 40]
    assert [e['loss'] for e in events if e['event'] == 'train'] == [4.0, 4.0, 4.0, 2.0, 1.0]
    assert steps(events, 'eval') == [20]
    assert steps(events, 'resume') == [20, 30]
    assert END not in events  # the run went on


def test_cut_last_line_is_skipped(tmp_path):
    whole = json.dumps(train(10, 3.0))
    for cut in range(1, len(whole)):
        log = write(tmp_path / 'log.jsonl', SETTINGS, train(0, 4.0), tail=whole[:cut])
        assert figures.read_log(log) == (SETTINGS, [train(0, 4.0)])


def test_resume_right_behind_a_cut_line_counts(tmp_path):
    cut = json.dumps(train(20, 3.0))[:40]
    resume = json.dumps({'event': 'resume', 'step': 5})
    tail = f'{cut}{resume}\n{json.dumps(train(10, 3.4))}\n'
    log = write(tmp_path / 'log.jsonl', SETTINGS, train(0, 4.0), train(10, 3.5), tail=tail)
    _, events = figures.read_log(log)
    assert [(e['event'], e['step']) for e in events] == [('train', 0), ('resume', 5), ('train', 10)]


def test_log_that_is_none(tmp_path):
    with pytest.raises(UserError, match='cannot read'):
        figures.read_log(tmp_path / 'missing.jsonl')
    (tmp_path / 'prose.txt').write_text('To be,\nor not to be\n')
    with pytest.raises(UserError, match='not a log'):
        figures.read_log(tmp_path / 'prose.txt')
    assert figures.read_log(write(tmp_path / 'empty.jsonl')) == ({}, [])


# -------------------------------------------------------------------------------------------------
# curve

RUNS = {
    'normal': [
        SETTINGS,
        *[train(s, 1.5 + 3 / (1 + s / 9)) for s in range(300)],
        *[val(s, 1.6) for s in (0, 60, 299)],
        END,
    ],
    'tiny': [SETTINGS, train(0, 4.2), train(1, 4.1), train(2, 4.0), val(2, 4.05)],
    'nan': [
        SETTINGS,
        *[train(s, 3.0 if s < 50 else NAN) for s in range(80)],
        val(0, 4.0),
        val(60, NAN),
    ],
    'only nan': [SETTINGS, train(0, NAN), val(0, NAN)],
    'no events': [SETTINGS],
    'no settings': [train(0, 4.0), val(0, 4.0)],
    'nothing': [],
}


@pytest.mark.full_size
@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', RUNS)
def test_curve(tmp_path, name):
    figures.curve(write(tmp_path / 'log.jsonl', *RUNS[name]), tmp_path / 'curve.png')
    assert sorted(os.listdir(tmp_path)) == ['curve.png', 'log.jsonl']  # no temporary left
    picture = (tmp_path / 'curve.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) < 200_000
    assert int.from_bytes(picture[16:20], 'big') == figures.WIDTH * figures.DPI


def test_end_of_the_run_fills_the_axis():
    falling = [10.9, 8.0] + [3 - s / 100 for s in range(98)]
    low, high = figures._limits([(list(range(100)), falling)], 0, 99)
    assert low < min(falling) and 3 < high < 3.5


def test_clock_goes_on_after_a_resume(tmp_path):
    log = write(
        tmp_path / 'log.jsonl',
        SETTINGS,
        train(0, 4, 0.0),
        train(10, 3, 100.0),
        train(20, 3, 200.0),
        {'event': 'resume', 'step': 10},
        train(20, 3, 120.0 - 100.0),
        train(30, 3, 130.0),
    )
    unit, points = figures._clock(figures.read_log(log)[1])
    assert unit == 'min' and [round(60 * amount) for _, amount in points] == [0, 100, 120, 230]


# -------------------------------------------------------------------------------------------------
# the style


def test_import_is_free_of_matplotlib():
    code = (
        'import sys; from nanomla.core import figures; '
        "assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_drawing_is_free_of_pyplot(tmp_path):
    log = write(tmp_path / 'log.jsonl', SETTINGS)
    code = (
        'import sys; from nanomla.core import figures; figures.curve(*sys.argv[1:]); '
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    command = [sys.executable, '-c', code, str(log), str(tmp_path / 'a.png')]
    subprocess.run(command, cwd=ROOT, check=True)


def test_missing_matplotlib_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        with figures.sheet():
            pass


def test_rcparams_and_backend_stay_the_callers(tmp_path):
    import matplotlib

    with matplotlib.rc_context({'font.size': 23, 'axes.grid': False}):
        before = dict(matplotlib.rcParams.copy())  # a look at ["backend"] itself would choose one
        with figures.sheet(rows=1, cols=2, title='two', note='of them') as (fig, axes):
            assert len(axes) == 2 and matplotlib.rcParams['font.size'] == figures.STYLE['font.size']
            figures.footer(fig, 'commit abc1234')
            figures.save(fig, tmp_path / 'two.png')
        assert dict(matplotlib.rcParams.copy()) == before


def full_disk(*_):
    raise OSError(28, 'No space left on device')


def test_unwritable_path_is_the_users_error_and_keeps_the_old_picture(tmp_path, monkeypatch):
    old = tmp_path / 'old.png'
    old.write_text('old')
    with figures.sheet(size=(2, 2)) as (fig, _):
        with pytest.raises(UserError, match='cannot write .*old.png'):
            figures.save(fig, old / 'a.png')
        with pytest.raises(UserError, match='ends in .png'):
            figures.save(fig, tmp_path / 'a.xyz')
        monkeypatch.setattr(os, 'replace', full_disk)
        with pytest.raises(UserError, match='no space left'):
            figures.save(fig, old)
    assert [p.name for p in tmp_path.iterdir()] == ['old.png'] and old.read_text() == 'old'


def test_kind_has_its_colour():
    run = {'kind': 'mha', 'config': {'n_head': 12}}
    assert figures.kind_of(run) == 'mha' and figures.kind_of({'kind': 'mla'}) == 'mla'
    for heads, kind in ((12, 'mha'), (4, 'gqa'), (1, 'mqa'), (0, 'mha')):
        assert figures.kind_of({**run, 'config': {'n_head': 12, 'n_kv_head': heads}}) == kind


# simulated dichromacy: Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
SEES = {
    'all': ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    'no red': ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    'no green': ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    'no blue': ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


XYZ_OF_RGB = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


@pytest.mark.parametrize('eye', SEES)
def test_kinds_stay_apart_for_every_eye(eye):
    np = pytest.importorskip('numpy')

    def lab(color):
        rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(SEES[eye]) @ linear, 0, 1)
        xyz = np.array(XYZ_OF_RGB) @ seen
        f = np.cbrt(xyz / (0.9505, 1.0, 1.089))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for a, b in itertools.combinations(('mha', 'gqa', 'mqa', 'mla', 'peer'), 2):
        # a difference of 2.3 is just noticeable
        assert np.linalg.norm(lab(figures.COLORS[a]) - lab(figures.COLORS[b])) > 12, (a, b)
