"""An attention is one file: the one of docs/add_an_attention.md works in every script."""

import json
import os
import shutil
import sys
from subprocess import PIPE

import pytest
from forked import FORK_ITS_PROGRAMS, Popen
from helpers import ROOT

from nanomla.core.token_files import write_text

PAGE = ROOT / 'docs' / 'add_an_attention.md'
TINY = dict(
    device='cpu',
    dtype='float32',
    compile=False,
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=32,
    batch_size=2,
    gradient_accumulation_steps=1,
    warmup_iters=1,
    eval_iters=1,
    max_iters=2,
    dataset='letters',
    sample_tokens=5,
)
DRIVER = """
import contextlib, io, json, runpy, sys
import torch
torch.set_num_threads(1)
for name, arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    printed, code = io.TextIOWrapper(io.BytesIO(), encoding='utf-8'), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(name, run_name='__main__')
        except SystemExit as end:
            code = end.code
        except Exception as error:  # what the configurator's hook makes one line of
            code, _ = 2, print(f'error: {error}')
    printed.seek(0)
    print(json.dumps([code or 0, printed.read()]), flush=True)
"""


def words(**settings) -> list[str]:
    return [f'--{name}={value}' for name, value in settings.items()]


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A copy of the project with one more file in attentions/, and a dataset."""
    folder = tmp_path_factory.mktemp('copy') / 'nanomla'
    folder.mkdir()
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    for name in ('attentions', 'nanomla'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    example = PAGE.read_text().partition('```python\n')[2].partition('```')[0]
    (folder / 'attentions' / 'window.py').write_text(example)
    text = 'the cat sat on the mat.\n' * 100
    write_text(folder / 'data' / 'letters', text, tokenizer='char', source='letters')
    return folder


@pytest.fixture(scope='module')
def outputs(project):
    """What every script gives on the new attention: name -> (exit code, output)."""
    mine = dict(attention='window', window=4)
    contenders = "dict(mha=dict(pos='rope'), window=dict(attention='window', window=4))"
    settings = words(contenders=contenders, seeds='[1]', decode_tokens=4, in_process=True)
    decode = dict(models='window', batch_sizes='2', contexts='16', repeats=1, timed_steps=2)
    decode |= dict(caches='dense,paged', device='cpu', dtype='float32', n_layer=1, n_embd=16)
    calls = dict(
        train=['train.py', *words(**TINY, **mine, out_dir='out', log_max_logits=True)],
        resume=['train.py', *words(**TINY | dict(max_iters=4), out_dir='out', init_from='resume')],
        other=['train.py', *words(**TINY, window=4, out_dir='out-mha')],
        clip=['train.py', *words(**TINY, **mine, out_dir='out-clip', qk_clip=100)],
        sample=['sample.py', *words(out_dir='out', device='cpu', max_new_tokens=5, num_samples=1)],
        heads=['find_induction_heads.py', *words(init_from='out', device='cpu', out='heads')],
        evaluate=['eval.py', *words(models='out', device='cpu', out_dir='evaluated')],
        convert=['convert_mla.py', 'out', '--out=converted'],
        decode=['bench.py', 'decode', *words(**decode, n_head=2, out_dir='bench')],
        compare=['compare.py', *words(**TINY, out_dir='compared'), *settings],
    )
    listed = json.dumps([[call[0], call[1:]] for call in calls.values()])
    command = [sys.executable, '-c', DRIVER, listed]
    environment = os.environ | {FORK_ITS_PROGRAMS: '1'}
    with Popen(
        command, stdout=PIPE, stderr=PIPE, cwd=project, env=environment, text=True
    ) as driver:
        out, err = driver.communicate()
    assert driver.returncode == 0, err[-3000:]
    lines = [json.loads(line) for line in out.splitlines()]
    return dict(zip(calls, lines))


def ran(outputs, name) -> str:
    code, text = outputs[name]
    assert code == 0, text[-2000:]
    return text


def test_it_trains_and_resumes(outputs):
    assert 'Window, 0.01M parameters' in ran(outputs, 'train')
    assert 'step      4 | val loss' in ran(outputs, 'resume')


def test_its_settings_are_refused_elsewhere(outputs):
    code, text = outputs['other']
    assert code == 2
    assert "window is a setting of WINDOW, but attention='mha'" in text


def test_its_logits_are_logged_and_what_it_does_not_say_how_to_clip_is_refused(outputs, project):
    ran(outputs, 'train')
    events = map(json.loads, (project / 'out' / 'log.jsonl').read_text().splitlines())
    logits = [event['max_logits'] for event in events if event['event'] == 'train']
    assert [len(heads) for heads in logits[0]] == [2, 2]
    code, text = outputs['clip']
    assert code == 2
    assert 'WindowAttention of Window has no scale_logits' in text


def test_it_writes_text(outputs):
    assert 'Window' in ran(outputs, 'sample')


def test_its_heads_are_scored(outputs):
    assert 'Window' in ran(outputs, 'heads')


def test_it_is_evaluated(outputs):
    assert 'perplexity' in ran(outputs, 'evaluate')


def test_what_cannot_be_converted_is_refused_by_name(outputs):
    code, text = outputs['convert']
    assert code == 2
    assert 'Window' in text


def test_its_decoding_is_measured(outputs, project):
    ran(outputs, 'decode')
    rows = (project / 'bench' / 'decode.jsonl').read_text().splitlines()
    assert {json.loads(row)['model'] for row in rows} == {'window'}


def test_it_stands_in_a_comparison(outputs, project):
    assert 'window' in ran(outputs, 'compare')
    assert (project / 'compared' / 'compare.png').exists()
