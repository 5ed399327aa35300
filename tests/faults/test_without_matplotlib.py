"""Without matplotlib what measures says so and goes on; what only draws ends in that line."""

import sys

import pytest
import torch
from faulty import run_forked
from helpers import ROOT, words
from scenarios import CONVERSION, EVALUATION, HEADS, TABLE, TRAIN, make_place

from nanomla.core.files import write_file

WHY = 'pictures need matplotlib, which is not installed: pip install matplotlib'
LOGS = ROOT / 'assets' / 'logs'
DECODED = ['decode', '--plot_only=True', '--out_dir=measured']
SCALED = ['scale', '--plot_only=True', f'--results={LOGS}/h200_scale.jsonl', '--out_dir=s']
HEADS_AGAIN = ['--plot_only=True', f'--results={LOGS}/induction_study.jsonl', '--out=h']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    torch.set_num_threads(1)
    place = make_place(tmp_path_factory.mktemp('place'))
    write_file(place / 'measured' / 'decode.jsonl', (LOGS / 'decode_cpu.jsonl').read_text())
    return place


def hide_matplotlib():
    sys.modules['matplotlib'] = None


def run_without(script, arguments, place):
    ended = run_forked(script, arguments, place, prepare=hide_matplotlib).check()
    assert not list(place.glob('[!d]*/*.png'))
    return ended


@pytest.mark.parametrize(
    'script, arguments',
    [
        ('compare.py', TABLE.arguments),
        ('find_induction_heads.py', HEADS_AGAIN),
        ('bench.py', DECODED),
        ('bench.py', SCALED),
    ],
)
def test_what_only_draws_ends_in_one_line(script, arguments, place):
    ended = run_without(script, arguments, place)
    assert ended.code == 2 and ended.output.splitlines()[-1] == f'error: {WHY}'


@pytest.mark.parametrize(
    'script, arguments, written',
    [
        ('train.py', words(TRAIN | dict(out_dir='run')), 'run/last.pt'),
        ('eval.py', EVALUATION.arguments, 'ev/results.csv'),
        ('convert_mla.py', CONVERSION.arguments, 'mla/ckpt.pt'),
        pytest.param(
            'find_induction_heads.py',
            HEADS.arguments,
            'heads/heads.html',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_measures_goes_on(script, arguments, written, place):
    ended = run_without(script, arguments, place)
    assert ended.code == 0, ended.output
    assert f'no picture: {WHY}' in ended.output.splitlines() and (place / written).exists()
