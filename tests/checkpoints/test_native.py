"""checkpoint.py: what is written can be read, what cannot be read is told in one line, and nothing is ever lost or run."""

import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, hf_gpt2

from nanomla.checkpoints import gpt2, load
from nanomla.checkpoints import native as checkpoint
from nanomla.core.configurator import UserError

ROOT = Path(__file__).resolve().parents[2]


def content_of(model, kind, **more):
    return (
        dict(
            kind=kind,
            model_args=checkpoint.model_args(model),
            model=model.state_dict(),
            step=7,
            best_val_loss=1.5,
            meta=dict(vocab_size=40, chars='abc'),
            config=dict(batch_size=12),
        )
        | more
    )


def refused(call, *args, match=None):
    """The message of the UserError that call(*args) has to raise: one line that names the file."""
    with pytest.raises(UserError, match=match) as error:
        call(*args)
    message = str(error.value)
    assert '\n' not in message and len(message) < 400
    return message


# ---------------------------------------------------------------------------------------------------
# there and back


@pytest.mark.parametrize(
    'variant',
    [
        'gpt2',
        'llama',
        'gqa',
        'modern',
        'mla',
        'mla_q_lora',
        'mla_early',
        'mla_absorbed',
        'mla_unequal',
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(variant, tiny, tokens, tmp_path):
    kind, settings = VARIANTS[variant]
    model = tiny(kind, **settings)
    assert checkpoint.kind_of(model) == kind
    checkpoint.save(tmp_path / 'new' / 'folder' / 'ckpt.pt', content_of(model, kind))
    content = checkpoint.load(tmp_path / 'new' / 'folder')
    assert (
        content['step'] == 7
        and content['best_val_loss'] == 1.5
        and content['meta']['chars'] == 'abc'
    )
    assert content['config'] == dict(batch_size=12) and content['path'] == str(
        tmp_path / 'new' / 'folder' / 'ckpt.pt'
    )
    back = checkpoint.build(content).eval()
    assert type(back) is type(model) and back.config == model.config
    assert torch.equal(back(tokens(13)), model(tokens(13)))
    assert os.listdir(tmp_path / 'new' / 'folder') == ['ckpt.pt']


def test_changes_leave_the_weights_alone(tiny, tokens, tmp_path):
    model = tiny('mla')
    checkpoint.save(tmp_path / 'x.pt', content_of(model, 'mla'))
    source = load.load_model(str(tmp_path / 'x.pt'), kernel='eager', dropout=0.3, absorb=True)
    back, content = source.model, source.checkpoint
    assert (
        back.config.kernel == 'eager'
        and back.config.dropout == 0.3
        and content['model_args']['kernel'] == 'sdpa'
    )
    assert back.transformer.h[0].attn.kernel == 'eager' and back.transformer.h[0].attn.absorb
    torch.testing.assert_close(back.eval()(tokens(13)), model(tokens(13)), rtol=0, atol=1e-5)


def test_what_a_resumed_run_needs_comes_back_too(tmp_path, tiny):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)).backward()
    optimizer.step()
    checkpoint.save(
        tmp_path / 'last.pt',
        content_of(
            model, 'mha', optimizers=[optimizer.state_dict()], average=[torch.ones(3)], seconds=1.25
        ),
    )
    content = checkpoint.load(tmp_path / 'last.pt')
    optimizer.load_state_dict(content['optimizers'][0])
    assert content['seconds'] == 1.25 and torch.equal(content['average'][0], torch.ones(3))


def test_kind_in_a_folder(tiny, tmp_path):
    assert checkpoint.kind_in(tmp_path) is None and checkpoint.kind_in(tmp_path / 'none') is None
    checkpoint.save(tmp_path / 'ckpt.pt', content_of(tiny('mla'), 'mla'))
    assert checkpoint.kind_in(tmp_path) == 'mla'
    (tmp_path / 'last.pt').write_bytes(b'damaged')
    assert checkpoint.kind_in(tmp_path) == 'mla'
    checkpoint.save(tmp_path / 'last.pt', content_of(tiny(), 'mha'))
    assert checkpoint.kind_in(tmp_path) == 'mha'


# ---------------------------------------------------------------------------------------------------
# nanoGPT's own


def nanogpt_checkpoint(bias, compiled):
    """A ckpt.pt as nanoGPT's train.py leaves it, of a 2-layer model, and that model as a plain function of idx."""
    torch.manual_seed(0)
    V, T, C, H, L = 30, 16, 24, 3, 2
    shapes = {
        'transformer.wte.weight': (V, C),
        'transformer.wpe.weight': (T, C),
        'transformer.ln_f.weight': (C,),
    }
    for n in range(L):
        h = f'transformer.h.{n}.'
        shapes |= {
            h + 'ln_1.weight': (C,),
            h + 'attn.c_attn.weight': (3 * C, C),
            h + 'attn.c_proj.weight': (C, C),
            h + 'ln_2.weight': (C,),
            h + 'mlp.c_fc.weight': (4 * C, C),
            h + 'mlp.c_proj.weight': (C, 4 * C),
        }
    if bias:
        shapes |= {
            k.replace('.weight', '.bias'): shape[:1]
            for k, shape in shapes.items()
            if 'wte' not in k and 'wpe' not in k
        }
    state = {
        k: torch.randn(shape) * 0.3 + (k.endswith('weight') and '.ln_' in k)
        for k, shape in shapes.items()
    }
    state['lm_head.weight'] = state['transformer.wte.weight']

    def logits(idx):
        x = state['transformer.wte.weight'][idx] + state['transformer.wpe.weight'][: idx.size(1)]
        at = lambda x, name: F.linear(x, state[name + '.weight'], state.get(name + '.bias'))
        ln = lambda x, name: F.layer_norm(
            x, (C,), state[name + '.weight'], state.get(name + '.bias'), 1e-5
        )
        for n in range(L):
            h = f'transformer.h.{n}.'
            q, k, v = (
                t.unflatten(2, (H, -1)).transpose(1, 2)
                for t in at(ln(x, h + 'ln_1'), h + 'attn.c_attn').chunk(3, dim=2)
            )
            a = (
                (q @ k.mT / (C // H) ** 0.5)
                .masked_fill(torch.ones(idx.size(1), idx.size(1)).triu(1).bool(), -torch.inf)
                .softmax(-1)
            )
            x = x + at((a @ v).transpose(1, 2).flatten(2), h + 'attn.c_proj')
            x = x + at(F.gelu(at(ln(x, h + 'ln_2'), h + 'mlp.c_fc')), h + 'mlp.c_proj')
        return ln(x, 'transformer.ln_f') @ state['lm_head.weight'].T

    saved = dict(state)
    for n in range(L):  # the buffer of its attention without flash
        saved[f'transformer.h.{n}.attn.bias'] = torch.ones(T, T).tril().view(1, 1, T, T)
    weights = [torch.nn.Parameter(t) for t in state.values()]
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in weights if p.dim() > 1], weight_decay=0.1),
            dict(params=[p for p in weights if p.dim() < 2], weight_decay=0.0),
        ],
        lr=6e-4,
        betas=(0.9, 0.95),
    )
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]['lr'] = 0.0
    optimizer.step()
    return dict(
        model={('_orig_mod.' if compiled else '') + k: v for k, v in saved.items()},
        optimizer=optimizer.state_dict(),
        model_args=dict(
            n_layer=L, n_head=H, n_embd=C, block_size=T, bias=bias, vocab_size=V, dropout=0.2
        ),
        iter_num=250,
        best_val_loss=torch.tensor(1.7),
        config=dict(
            out_dir='out', eval_interval=250, wandb_log=False, learning_rate=6e-4, compile=compiled
        ),
    ), logits


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('compiled', [True, False])
def test_nanogpts_own_checkpoint_loads_as_it_is(bias, compiled, tmp_path):
    content, logits = nanogpt_checkpoint(bias, compiled)
    torch.save(content, tmp_path / 'ckpt.pt')
    source = load.load_model(str(tmp_path))
    model, loaded = source.model, source.checkpoint
    idx = torch.randint(30, (2, 16))
    torch.testing.assert_close(model.eval()(idx), logits(idx), rtol=0, atol=1e-4)
    assert (
        loaded['kind'] == 'mha'
        and loaded['step'] == 250
        and float(loaded['best_val_loss']) == pytest.approx(1.7)
    )
    assert model.config.dropout == 0.2


# ---------------------------------------------------------------------------------------------------
# files that are none


@pytest.fixture
def saved(tiny, tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, content_of(tiny(), 'mha'))
    return path


def test_truncated_files_are_refused(saved):
    whole = saved.read_bytes()
    for cut in [
        0,
        1,
        2,
        3,
        4,
        10,
        100,
        len(whole) - 1,
        len(whole) - 22,
        *random.Random(0).sample(range(len(whole)), 60),
    ]:
        saved.write_bytes(whole[:cut])
        assert 'damaged' in refused(checkpoint.load, saved, match=str(saved)), cut


def test_random_bytes_are_refused(tmp_path):
    for seed in range(200):
        (tmp_path / 'x.pt').write_bytes(random.Random(seed).randbytes(seed * 3))
        refused(checkpoint.load, tmp_path / 'x.pt', match='x.pt')


def test_flipped_bytes_are_refused_or_read_never_more(saved):
    """Whatever stands in the file: a checkpoint or one line, no traceback."""
    whole = saved.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        broken = bytearray(whole)
        start = rng.choice(
            [0, len(whole) - 3000, rng.randrange(len(whole))]
        )  # headers and the directory are where it hurts
        for _ in range(rng.choice([1, 3, 30])):
            broken[min(start + rng.randrange(3000), len(whole) - 1)] = rng.randrange(256)
        saved.write_bytes(broken)
        try:
            checkpoint.build(checkpoint.load(saved))
        except UserError as error:
            assert '\n' not in str(error) and 'ckpt.pt' in str(error)


@pytest.mark.parametrize(
    'foreign',
    [
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
    ],
    ids=str,
)
def test_foreign_torch_files_are_refused(foreign, tmp_path):
    torch.save(foreign, tmp_path / 'x.pt')
    refused(checkpoint.load, tmp_path / 'x.pt', match='x.pt')


class Malice:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize(
    'form', ['zip', 'legacy', 'bare pickle', 'inside a checkpoint', 'pytorch_model.bin']
)
def test_code_in_a_file_is_never_run(form, tmp_path, tiny):
    mark, path = tmp_path / 'mark', tmp_path / 'x.pt'
    bad = Malice(mark)
    if form == 'bare pickle':
        path.write_bytes(pickle.dumps(bad))
    elif form == 'pytorch_model.bin':
        hf_gpt2().config.save_pretrained(tmp_path)
        torch.save(bad, tmp_path / 'pytorch_model.bin')
        path = tmp_path
    else:
        content = content_of(tiny(), 'mha', config=bad) if form == 'inside a checkpoint' else bad
        torch.save(content, path, _use_new_zipfile_serialization=form != 'legacy')
    message = refused(load.load_model, str(path))
    assert 'code' in message and str(path) in message and not mark.exists()
    pickle.loads(pickle.dumps(bad))  # the file would have done it
    assert mark.exists()


def test_a_missing_checkpoint_is_told(tmp_path):
    for path in (tmp_path, tmp_path / 'x.pt', tmp_path / 'x' / 'y.pt'):
        assert 'there is no checkpoint' in refused(checkpoint.load, path, match=str(path))


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
def test_settings_that_do_not_describe_the_weights_are_told(change, word, saved):
    content = checkpoint.load(saved)
    content['model_args'] |= change
    refused(checkpoint.build, content, match=word)


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
def test_weights_that_do_not_fit_are_told(change, saved):
    content = checkpoint.load(saved)
    content['model'] |= change
    assert str(saved) in refused(checkpoint.build, content, match='do not fit')


def test_a_missing_weight_is_told(saved):
    content = checkpoint.load(saved)
    del content['model']['transformer.h.1.mlp.c_fc.weight']
    refused(checkpoint.build, content, match='c_fc')


# ---------------------------------------------------------------------------------------------------
# OpenAI's


@pytest.fixture
def gpt2_folder(tmp_path):
    hf_gpt2().save_pretrained(tmp_path)
    return tmp_path


def test_from_pretrained_takes_changes(gpt2_folder):
    source = load.load_model(str(gpt2_folder), dropout=0.25, kernel='eager')
    model, content = source.model, source.checkpoint
    assert (
        model.config.dropout == 0.25
        and model.transformer.h[0].attn.kernel == 'eager'
        and content == {}
    )
    assert checkpoint.kind_of(model) == 'mha' and model.config.act == 'gelu_tanh'


@pytest.mark.parametrize(
    'damage',
    [
        'no config',
        'broken config',
        'config is a list',
        'config lacks a key',
        'another model',
        'another activation',
        'no weights',
        'broken safetensors',
        'broken bin',
        'other weights',
        'list in bin',
    ],
)
def test_gpt2_folders_that_cannot_be_read_are_told(damage, gpt2_folder):
    config, weights, old = (
        gpt2_folder / name for name in ('config.json', 'model.safetensors', 'pytorch_model.bin')
    )
    shape = json.loads(config.read_text())
    if damage == 'no config':
        config.unlink()
    elif damage == 'broken config':
        config.write_text('{"model_type": "gp')
    elif damage == 'config is a list':
        config.write_text('[]')
    elif damage == 'config lacks a key':
        config.write_text(json.dumps({k: v for k, v in shape.items() if k != 'n_embd'}))
    elif damage == 'another model':
        config.write_text(json.dumps(shape | dict(model_type='llama')))
    elif damage == 'another activation':
        config.write_text(json.dumps(shape | dict(activation_function='relu')))
    elif damage == 'no weights':
        weights.unlink()
    elif damage == 'broken safetensors':
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == 'other weights':
        config.write_text(json.dumps(shape | dict(n_layer=3)))
    else:
        weights.unlink()
        old.write_bytes(b'no torch file')
        if damage == 'list in bin':
            torch.save([1], old)
    assert str(gpt2_folder) in refused(gpt2.from_pretrained, str(gpt2_folder))


def test_gpt2_folders_load_without_safetensors(gpt2_folder, monkeypatch):
    state = hf_gpt2().state_dict()
    torch.save(state, gpt2_folder / 'pytorch_model.bin')
    monkeypatch.setitem(sys.modules, 'safetensors', None)  # as if it were not installed
    assert gpt2.from_pretrained(gpt2_folder).num_params() > 0
    (gpt2_folder / 'pytorch_model.bin').unlink()
    refused(gpt2.from_pretrained, gpt2_folder, match='needs safetensors: pip install')


# ---------------------------------------------------------------------------------------------------
# full disks, kills


def untouched(path, before):
    return path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('size', [10, 3_000_000])
def test_a_full_disk_leaves_the_old_file(size, saved, monkeypatch):
    before = saved.read_bytes()
    # Every write to the file beside it ends with ENOSPC.
    monkeypatch.setattr(checkpoint, 'remove_leftovers', lambda path: None)
    saved.with_name(f'ckpt.pt.{os.getpid()}.partial').symlink_to('/dev/full')
    refused(
        checkpoint.save,
        saved,
        dict(x=torch.zeros(size)),
        match=f'cannot write {saved}: no space left',
    )
    assert untouched(saved, before)
    checkpoint.save(saved, dict(x=torch.zeros(size)))  # with room again
    assert torch.load(saved)['x'].numel() == size


@pytest.mark.parametrize('call', ['fsync', 'replace'])
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_late_leaves_the_old_file(call, number, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.os, call, fail)
    refused(
        checkpoint.save,
        saved,
        dict(x=1),
        match='no space left' if number == errno.ENOSPC else 'error',
    )
    assert untouched(saved, before)


def test_a_limit_in_the_middle_of_the_file_leaves_the_old_one(saved):
    before = saved.read_bytes()
    script = f"""
        import resource, signal, sys
        import torch
        from nanomla.checkpoints import native as checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save({str(saved)!r}, dict(x=torch.zeros(1_000_000)))
        except checkpoint.UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and done.stderr == ''
        and done.stdout.startswith(f'cannot write {saved}: ')
        and done.stdout.count('\n') == 1
    )
    assert untouched(saved, before)


def test_places_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (tmp_path / 'folder').mkdir()
    refused(checkpoint.save, tmp_path / 'file' / 'ckpt.pt', {}, match='cannot write')
    refused(checkpoint.save, tmp_path / 'file' / 'deep' / 'ckpt.pt', {}, match='cannot write')
    refused(checkpoint.save, tmp_path / 'folder', {}, match='cannot write')
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    """One process imports torch, then forks twenty that save without end, and are killed in the middle."""
    script = f"""
        import os, random, signal, sys, time
        import torch
        from nanomla.checkpoints import native as checkpoint
        torch.set_num_threads(1)
        path, rng, latest = {str(tmp_path / 'ckpt.pt')!r}, random.Random(0), 0

        def content(n):
            return dict(kind='mha', model_args=dict(n=n), model=dict(w=torch.full((200_000,), float(n))), step=n)

        checkpoint.save(path, content(0))
        for _ in range(20):
            child = os.fork()
            if not child:
                while True:
                    latest += 1
                    checkpoint.save(path, content(latest))
            time.sleep(0.01 + rng.random() * 0.06)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            got = checkpoint.load(path)
            assert got['step'] == got['model_args']['n'] >= latest and got['model']['w'].eq(got['step']).all()
            latest = got['step']
        print(latest, 'saves')
        checkpoint.save(path, content(latest + 1))
    """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0
    assert os.listdir(tmp_path) == ['ckpt.pt']  # what a kill left behind goes with the next save


def test_mistakes_of_programmers_stay_tracebacks(tmp_path):
    with pytest.raises(Exception) as error:
        checkpoint.save(tmp_path / 'x.pt', dict(f=lambda: 0))
    assert not isinstance(error.value, UserError)
    assert not (tmp_path / 'x.pt').exists()


def test_load_reads_from_a_file_alone(saved):
    """weights_only: a checkpoint holds tensors and plain values, nothing that needs this project's classes."""
    content = torch.load(io.BytesIO(saved.read_bytes()), weights_only=True)
    assert set(content) == {
        'kind',
        'model_args',
        'model',
        'step',
        'best_val_loss',
        'meta',
        'config',
    }
