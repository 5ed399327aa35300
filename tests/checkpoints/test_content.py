"""Checkpoints are verified before they are used: every byte, and what each entry may be."""

import errno
import os
import random
import zipfile

import pytest
import torch
from refusals import refused

from model import GPT, GPTConfig
from nanomla.checkpoints import content, native
from nanomla.checkpoints.load import load_model

SHAPE = dict(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=4)


@pytest.fixture(scope='module')
def model():
    return GPT(GPTConfig(**SHAPE))


@pytest.fixture
def entries(model):
    return dict(
        kind='mha',
        model_args=native.model_args(model),
        model=model.state_dict(),
        step=7,
        best_val_loss=1.5,
        meta=dict(tokenizer='bytes'),
        config=dict(dataset='tale'),
    )


@pytest.fixture
def saved(entries, tmp_path):
    native.save(tmp_path / 'ckpt.pt', entries)
    return tmp_path / 'ckpt.pt'


def flips(size, number, seed=0):
    """Yield (place, bits) of changed bytes: the first and the last 300, and others at random."""
    rng = random.Random(seed)
    places = [*range(300), *range(size - 300, size), *range(size)]
    for place in rng.sample(places, number):
        yield place, rng.randrange(1, 256)


def changed(whole, place, bits):
    broken = bytearray(whole)
    broken[place] ^= bits
    return broken


# -------------------------------------------------------------------------------------------------
# bytes


@pytest.mark.parametrize('number', [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_every_changed_byte_is_noticed(number, saved):
    """Padding and headers, too: nothing in the file is exempt."""
    whole = saved.read_bytes()
    for place, bits in flips(len(whole), number):
        saved.write_bytes(changed(whole, place, bits))
        assert 'ckpt.pt' in refused(native.load, saved), (place, bits)
    saved.write_bytes(whole)
    assert native.load(saved)['step'] == 7


def test_bytes_that_are_missing_or_too_many_are_noticed(saved):
    whole = saved.read_bytes()
    for other in (whole[:-1], whole + b'\0', whole + whole, whole[4:], whole[:100] + whole[101:]):
        saved.write_bytes(other)
        refused(native.load, saved, match='damaged')


def test_large_files_have_a_checksum_for_each_chunk(saved, entries, monkeypatch):
    monkeypatch.setattr(content, 'CHUNK', 1000)
    native.save(saved, entries)
    whole = saved.read_bytes()
    assert len(whole) > 7000
    native.load(saved)
    for place, bits in flips(len(whole), 60, seed=1):
        saved.write_bytes(changed(whole, place, bits))
        refused(native.load, saved, match='ckpt.pt')


@pytest.mark.parametrize('zipped', [True, False])
def test_checkpoints_without_checksums_still_load(zipped, entries, tmp_path):
    """As nanoGPT writes them, and torch did before it wrote archives."""
    path = tmp_path / 'ckpt.pt'
    torch.save(entries, path, _use_new_zipfile_serialization=zipped)
    assert native.load(path)['step'] == 7


def test_weights_of_a_checkpoint_without_checksums_are_verified(entries, tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.save(entries, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        raw = [archive.read(one) for one in archive.infolist() if one.file_size >= 16]
    once = [data for data in raw if whole.count(data) == 1]
    assert len(once) > 5
    for data in once:
        begin = whole.index(data)
        path.write_bytes(changed(whole, begin + len(data) // 2, 1))
        refused(native.load, path, match='damaged')


def test_plain_torch_reads_what_is_written(saved):
    """The checksums are no obstacle to others, mapped into memory or not."""
    for mapped in (False, True):
        assert torch.load(saved, weights_only=True, mmap=mapped)['step'] == 7


def test_a_damaged_file_is_named_with_the_way_out(saved, entries):
    folder = saved.parent
    last = folder / 'last.pt'
    last.write_bytes(changed(saved.read_bytes(), 500, 1))
    message = refused(native.load, last, match='last.pt is damaged')
    assert f'go on from {saved} by --init_from' in message
    native.save(folder / 'previous' / '20260101-000000-abc' / 'ckpt.pt', entries)
    saved.unlink()
    assert str(folder / 'previous' / '20260101-000000-abc' / 'ckpt.pt') in refused(
        native.load, last
    )
    (folder / 'previous' / '20260101-000000-abc' / 'ckpt.pt').unlink()
    assert 'take it from a copy' in refused(native.load, last)


def test_a_file_that_cannot_be_read_is_one_line(saved, monkeypatch):
    def fail(*args, **more):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(content, 'checksums', fail)
    refused(native.load, saved, match='cannot be read: Input/output error')


def test_a_folder_in_the_place_of_a_checkpoint_is_one_line(tmp_path):
    (tmp_path / 'ckpt.pt').mkdir()
    refused(native.load, tmp_path, match='ckpt.pt')


# -------------------------------------------------------------------------------------------------
# content


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(meta=5), 'meta is 5, not a table'),
        (dict(meta=dict(tokenizer='char')), "it has no entry 'chars'"),
        (dict(meta=dict(tokenizer='char', chars=7)), 'chars is 7'),
        (dict(meta=dict(tokenizer='char', chars='')), "chars is ''"),
        (dict(meta=dict(tokenizer=['char'])), 'tokenizer is'),
        (dict(meta=dict(tokenizer='hf', eos_token_id=[[1]])), 'eos_token_id is'),
        (dict(best_val_loss='x'), "best_val_loss is 'x', not a number"),
        (dict(best_val_loss=torch.ones(2)), 'best_val_loss is'),
        (dict(step=-5), 'step is -5, not a whole number from 0 on'),
        (dict(step=True), 'step is True'),
        (dict(step=1.5), 'step is 1.5'),
        (dict(step=10**30), 'step is 1000'),
        (dict(best_step='3'), 'best_step is'),
        (dict(seconds=-1.0), 'seconds is -1.0'),
        (dict(optimizers=5), 'optimizers is 5'),
        (dict(optimizers=[5]), 'optimizers is'),
        (dict(optimizers=[{}]), "it has no entry 'state'"),
        (dict(optimizers=[dict(state={}, param_groups=7)]), 'param_groups is 7'),
        (dict(optimizers=[dict(state={0: 5}, param_groups=[])]), 'are no tables'),
        (dict(optimizers=[dict(state={}, param_groups=[{}])]), "no entry 'params'"),
        (dict(optimizers=[dict(state={}, param_groups=[dict(params='x')])]), 'params is'),
        (dict(scaler=dict(scale='x')), "no entry 'growth_factor'"),
        (dict(run_id=7), 'run_id is 7'),
        (dict(launch=7), 'launch is 7'),
        (dict(tokens=-1), 'tokens is -1'),
        (dict(average=[1]), 'average is'),
        (dict(scaler=[1]), 'scaler is'),
        (dict(config=[1]), 'config is'),
        (dict(config=dict(dataset=5)), 'dataset is 5'),
        (dict(conversion='x'), 'conversion is'),
        (dict(commit=5), 'commit is 5'),
        (dict(kind=5), 'kind is 5'),
        (dict(model=[1]), 'model is'),
        (dict(model_args='x'), 'model_args is'),
    ],
    ids=str,
)
def test_an_entry_of_another_type_is_named(change, message, entries, tmp_path):
    torch.save(entries | change, tmp_path / 'x.pt')
    assert message in refused(native.load, tmp_path / 'x.pt', match='x.pt is no checkpoint')


def test_what_nanogpt_writes_is_taken_as_ours(entries, tmp_path):
    theirs = dict(model=entries['model'], model_args=SHAPE | dict(bias=True, dropout=0.0))
    theirs |= dict(optimizer={}, iter_num=20, best_val_loss=torch.tensor(1.25), config={})
    torch.save(theirs, tmp_path / 'ckpt.pt')
    loaded = load_model(tmp_path)
    assert loaded.step == 20
    assert loaded.checkpoint['best_val_loss'] == 1.25


ABSURD = [
    dict(n_layer=10**9),
    dict(n_embd=10**9),
    dict(vocab_size=10**15),
    dict(block_size=10**12),
    dict(n_inner=10**14),
    dict(n_head=10**9, head_dim=2),
    dict(n_embd=2**62),
]


@pytest.mark.parametrize('change', ABSURD, ids=str)
def test_absurd_sizes_are_refused_at_once(change, saved):
    checkpoint = native.load(saved)
    checkpoint['model_args'] |= change
    refused(native.build, checkpoint, match='ckpt.pt')


@pytest.mark.parametrize(
    'change',
    [
        dict(n_layer=True),
        dict(n_layer=1.0),
        dict(dropout='0'),
        dict(bias=0),
        dict(act=7),
        dict(norm_eps=None),
    ],
    ids=str,
)
def test_model_settings_of_another_type_are_named(change, saved):
    checkpoint = native.load(saved)
    checkpoint['model_args'] |= change
    (name,) = change
    refused(native.build, checkpoint, match=f'do not fit: {name} is')
