"""Checkpoints: what is written can be read; all else is refused in one line, and never run."""

import errno
import io
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import ROOT, VARIANTS, fill_disk, hf_gpt2
from refusals import refused

from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.core.configurator import UserError

SAVED_VARIANTS = [
    'gpt2',
    'llama',
    'gqa',
    'modern',
    'mla',
    'mla_q_lora',
    'mla_early',
    'mla_absorbed',
    'mla_unequal',
]


def content_of(model, kind, **more):
    content = dict(
        kind=kind,
        model_args=native.model_args(model),
        model=model.state_dict(),
        step=7,
        best_val_loss=1.5,
        meta=dict(vocab_size=40, chars='abc'),
        config=dict(batch_size=12),
    )
    return content | more


@pytest.fixture
def saved(tiny, tmp_path):
    path = tmp_path / 'ckpt.pt'
    native.save(path, content_of(tiny(), 'mha'))
    return path


# -------------------------------------------------------------------------------------------------
# there and back


@pytest.mark.parametrize('variant', SAVED_VARIANTS)
def test_a_saved_model_comes_back_bit_for_bit(variant, tiny, tokens, tmp_path):
    kind, settings = VARIANTS[variant]
    model = tiny(kind, **settings)
    folder = tmp_path / 'new' / 'folder'
    native.save(folder / 'ckpt.pt', content_of(model, kind))
    assert os.listdir(folder) == ['ckpt.pt']
    checkpoint = native.load(folder)
    assert checkpoint['step'] == 7
    assert checkpoint['best_val_loss'] == 1.5
    assert checkpoint['meta']['chars'] == 'abc'
    assert checkpoint['config'] == dict(batch_size=12)
    assert checkpoint['path'] == str(folder / 'ckpt.pt')
    back = native.build(checkpoint).eval()
    assert type(back) is type(model)
    assert back.config == model.config
    assert torch.equal(back(tokens(13)), model(tokens(13)))


def test_changes_leave_the_weights_alone(tiny, tokens, tmp_path):
    model = tiny('mla')
    native.save(tmp_path / 'x.pt', content_of(model, 'mla'))
    loaded = load_model(tmp_path / 'x.pt', kernel='eager', dropout=0.3, absorb=True)
    back = loaded.model
    assert back.config.kernel == back.transformer.h[0].attn.kernel == 'eager'
    assert back.config.dropout == 0.3
    assert back.transformer.h[0].attn.absorb
    assert loaded.checkpoint['model_args']['kernel'] == 'sdpa'
    torch.testing.assert_close(back.eval()(tokens(13)), model(tokens(13)), rtol=0, atol=1e-5)


def test_what_a_resumed_run_needs_comes_back_too(tmp_path, tiny):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    idx = torch.zeros(1, 3, dtype=torch.long)
    model(idx, idx).backward()
    optimizer.step()
    more = dict(optimizers=[optimizer.state_dict()], average=[torch.ones(3)], seconds=1.25)
    native.save(tmp_path / 'last.pt', content_of(model, 'mha', **more))
    checkpoint = native.load(tmp_path / 'last.pt')
    optimizer.load_state_dict(checkpoint['optimizers'][0])
    assert checkpoint['seconds'] == 1.25
    assert torch.equal(checkpoint['average'][0], torch.ones(3))


def test_the_kind_in_a_folder_is_that_of_the_last_file_that_can_be_read(tiny, tmp_path):
    assert native.kind_in(tmp_path) is None
    assert native.kind_in(tmp_path / 'none') is None
    native.save(tmp_path / 'ckpt.pt', content_of(tiny('mla'), 'mla'))
    assert native.kind_in(tmp_path) == 'mla'
    (tmp_path / 'last.pt').write_bytes(b'damaged')
    assert native.kind_in(tmp_path) == 'mla'
    native.save(tmp_path / 'last.pt', content_of(tiny(), 'mha'))
    assert native.kind_in(tmp_path) == 'mha'


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_processes_of_a_host_share_what_they_load(tiny, tmp_path, monkeypatch):
    """Its kind is read without its weights, and these stay in the file until they are copied."""
    path, size = tmp_path / 'last.pt', 2**26
    native.save(path, content_of(tiny(), 'mha', average=[torch.ones(size // 4)]))
    before = memory()
    assert native.kind_in(tmp_path) == 'mha'
    checkpoint = native.peek(path)
    after = memory()
    assert after['RssAnon'] + after['RssFile'] - sum(before.values()) < size / 8
    checkpoint = native.load(path)
    assert memory()['RssAnon'] - before['RssAnon'] < size / 8
    assert checkpoint['average'][0].sum() == size // 4
    assert memory()['RssAnon'] - before['RssAnon'] < size / 8


def memory():
    """Return the bytes of this process's own pages, and of those of files that it has read."""
    status = Path('/proc/self/status').read_text()
    found = re.findall(r'(RssAnon|RssFile):\s+(\d+) kB', status)
    return {name: 1024 * int(kilobytes) for name, kilobytes in found}


def test_a_file_holds_tensors_and_plain_values_alone(saved):
    """Nothing in it needs this project's classes."""
    content = torch.load(io.BytesIO(saved.read_bytes()), weights_only=True)
    expected = {'kind', 'model_args', 'model', 'step', 'best_val_loss', 'meta', 'config'}
    assert set(content) == expected


# -------------------------------------------------------------------------------------------------
# files that are none


def test_truncated_files_are_refused(saved):
    whole = saved.read_bytes()
    n = len(whole)
    cuts = [0, 1, 2, 3, 4, 10, 100, n - 1, n - 22, *random.Random(0).sample(range(n), 60)]
    for cut in cuts:
        saved.write_bytes(whole[:cut])
        assert 'damaged' in refused(native.load, saved, match=str(saved)), cut


def test_random_bytes_are_refused(tmp_path):
    for seed in range(200):
        (tmp_path / 'x.pt').write_bytes(random.Random(seed).randbytes(seed * 3))
        refused(native.load, tmp_path / 'x.pt', match='x.pt')


def test_flipped_bytes_give_a_checkpoint_or_one_line(saved):
    whole = saved.read_bytes()
    n = len(whole)
    rng = random.Random(0)
    for _ in range(150):
        broken = bytearray(whole)
        # Headers and the directory are where it hurts.
        start = rng.choice([0, n - 3000, rng.randrange(n)])
        for _ in range(rng.choice([1, 3, 30])):
            broken[min(start + rng.randrange(3000), n - 1)] = rng.randrange(256)
        saved.write_bytes(broken)
        try:
            native.build(native.load(saved))
        except UserError as error:
            assert '\n' not in str(error)
            assert 'ckpt.pt' in str(error)


FOREIGN = [
    torch.ones(3),
    [1, 2],
    'text',
    None,
    {},
    {'a': torch.ones(1)},
    {'model': {}},
    {'model': 1, 'model_args': {}},
    {'model': {}, 'model_args': [1]},
    {'model': {}, 'model_args': {}, 'kind': 'mamba'},
    {'model': {}, 'model_args': {}, 'kind': ['mha']},
]


@pytest.mark.parametrize('foreign', FOREIGN, ids=str)
def test_foreign_torch_files_are_refused(foreign, tmp_path):
    torch.save(foreign, tmp_path / 'x.pt')
    refused(native.load, tmp_path / 'x.pt', match='x.pt')


class Malice:
    """Unpickled, it makes the file `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


FORMS = ['zip', 'legacy', 'bare pickle', 'inside a checkpoint', 'pytorch_model.bin']


@pytest.mark.parametrize('form', FORMS)
def test_code_in_a_file_is_never_run(form, tmp_path, tiny):
    mark, path = tmp_path / 'mark', tmp_path / 'x.pt'
    bad = Malice(mark)
    if form == 'bare pickle':
        path.write_bytes(pickle.dumps(bad))
    elif form == 'pytorch_model.bin':
        hf_gpt2().config.save_pretrained(tmp_path)
        torch.save(bad, tmp_path / 'pytorch_model.bin')
        path = tmp_path
    elif form == 'inside a checkpoint':
        torch.save(content_of(tiny(), 'mha', config=bad), path)
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=form == 'zip')
    message = refused(load_model, str(path))
    assert 'code' in message
    assert str(path) in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(bad))  # the file would have done it
    assert mark.exists()


@pytest.mark.parametrize('name', ['', 'x.pt', 'x/y.pt'])
def test_a_missing_checkpoint_is_named(name, tmp_path):
    path = tmp_path / name
    assert 'there is no checkpoint' in refused(native.load, path, match=str(path))


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(n_latent=64), 'not known here: n_latent'),
        (dict(kv_lora_rank=64), 'kv_lora_rank'),
        (dict(n_layer=3), 'do not fit'),
        (dict(n_layer=1), 'do not fit'),
        (dict(n_embd=64), 'do not fit'),
        (dict(vocab_size=41), 'do not fit'),
        (dict(bias=False), 'do not fit'),
        (dict(pos='rope'), 'do not fit'),
        (dict(n_head=5), 'n_head=5'),
        (dict(n_layer='2'), 'do not fit'),
        (dict(n_layer=None), 'do not fit'),
        (dict(pos=['learned']), 'pos'),
        (dict(vocab_size=10**14), 'do not fit'),
        ({3: 4}, 'not known here: 3'),
        ({3: 4, 'x': 1}, 'not known here'),
    ],
    ids=str,
)
def test_settings_that_do_not_describe_the_weights_are_named(change, word, saved):
    checkpoint = native.load(saved)
    checkpoint['model_args'] |= change
    assert str(saved) in refused(native.build, checkpoint, match=word)


@pytest.mark.parametrize(
    'change',
    [
        {'transformer.ln_f.weight': torch.ones(5)},
        {'transformer.ln_f.weight': 'text'},
        {'more': torch.ones(1)},
        {5: torch.ones(1)},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named(change, saved):
    checkpoint = native.load(saved)
    checkpoint['model'] |= change
    assert str(saved) in refused(native.build, checkpoint, match='do not fit')


def test_a_missing_weight_is_named(saved):
    checkpoint = native.load(saved)
    del checkpoint['model']['transformer.h.1.mlp.c_fc.weight']
    refused(native.build, checkpoint, match='c_fc')


# -------------------------------------------------------------------------------------------------
# full disks, kills


def untouched(path, before):
    return path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('size', [10, 3_000_000])
def test_a_full_disk_leaves_the_old_file(size, saved, monkeypatch):
    before = saved.read_bytes()
    content = dict(x=torch.zeros(size))
    with monkeypatch.context() as patch:
        fill_disk(patch, 'ckpt.pt')
        refused(native.save, saved, content, match=f'cannot write {saved}: no space left')
    assert untouched(saved, before)
    native.save(saved, content)  # with room again
    assert torch.load(saved)['x'].numel() == size


@pytest.mark.parametrize('call', ['fsync', 'replace'])
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_late_leaves_the_old_file(call, number, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    match = 'no space left' if number == errno.ENOSPC else 'error'
    refused(native.save, saved, dict(x=1), match=match)
    assert untouched(saved, before)


def test_a_limit_in_the_middle_of_the_file_leaves_the_old_one(saved):
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(native.save, saved, dict(x=torch.zeros(1_000_000)), match=f'cannot write {saved}: ')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert untouched(saved, before)


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (tmp_path / 'folder').mkdir()
    for name in ('file/ckpt.pt', 'file/deep/ckpt.pt', 'folder'):
        refused(native.save, tmp_path / name, {}, match='cannot write')
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path, forked_python):
    """One process forks twenty that save without end, and are killed."""
    script = f"""
        import os, random, signal, time
        import torch
        from nanomla.checkpoints import native
        torch.set_num_threads(1)
        path, rng, latest = {str(tmp_path / 'ckpt.pt')!r}, random.Random(0), 0

        def content(n):
            model = dict(w=torch.full((200_000,), float(n)))
            return dict(kind='mha', model_args=dict(n=n), model=model, step=n)

        native.save(path, content(0))
        for _ in range(20):
            child = os.fork()
            if not child:
                while True:
                    latest += 1
                    native.save(path, content(latest))
            time.sleep(0.01 + rng.random() * 0.06)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            got = native.load(path)
            assert got['step'] == got['model_args']['n'] >= latest
            assert got['model']['w'].eq(got['step']).all()
            latest = got['step']
        print(latest, 'saves')
        native.save(path, content(latest + 1))
    """
    command = [sys.executable, '-c', textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0
    assert os.listdir(tmp_path) == ['ckpt.pt']  # what a kill left behind goes with the next save


def test_mistakes_of_programmers_stay_tracebacks(tmp_path):
    with pytest.raises(Exception) as error:
        native.save(tmp_path / 'x.pt', dict(f=lambda: 0))
    assert not isinstance(error.value, UserError)
    assert not (tmp_path / 'x.pt').exists()
