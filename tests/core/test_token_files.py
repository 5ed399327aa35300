"""Token files and tokenizers: what is written is what is read, and batches are reproducible."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core import files, token_files
from nanomla.core.configurator import UserError
from nanomla.core.token_files import TokenWriter, in_order, read_meta, write_text
from nanomla.core.tokenizers import Tokenizer
from nanomla.training import batches
from nanomla.training.batches import Dataset


def make(folder, train=500, val=120, vocab_size=1000):
    """A dataset whose tokens are their own positions."""
    with TokenWriter(folder, vocab_size) as files:
        files.add('train', np.arange(train) % vocab_size)
        files.add('val', np.arange(val) % vocab_size)
        files.publish(dict(tokenizer='bytes', source='numbers'))
    return folder


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- batches ----


def test_y_is_one_token_ahead(tmp_path):
    x, y = Dataset(make(tmp_path), 8).train_batch(0, 0, 5)
    assert x.shape == y.shape == (5, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y) and torch.equal(x[:, 1:], y[:, :-1])


def test_a_batch_is_a_function_of_seed_step_micro_and_rank(tmp_path):
    make(tmp_path)
    data = Dataset(tmp_path, 8, seed=3)
    first = data.train_batch(7, 1, 4)
    data.train_batch(8, 0, 4), list(data.val_batches(4))  # what was read in between changes nothing
    assert equal(first, data.train_batch(7, 1, 4))
    assert equal(first, Dataset(tmp_path, 8, seed=3).train_batch(7, 1, 4))
    others = [
        data.train_batch(7, 0, 4),
        data.train_batch(6, 1, 4),
        Dataset(tmp_path, 8, seed=4).train_batch(7, 1, 4),
        Dataset(tmp_path, 8, seed=3, rank=1, world=2).train_batch(7, 1, 4),
    ]
    assert not any(equal(first, other) for other in others)


@pytest.mark.parametrize('world', [2, 3, 4])
def test_ranks_read_what_one_rank_reads_in_more_micro_steps(tmp_path, world):
    make(tmp_path)
    alone = Dataset(tmp_path, 8)
    ranks = [Dataset(tmp_path, 8, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        together = [
            ranks[rank].train_batch(step, micro, 4) for micro in range(2) for rank in range(world)
        ]
        assert all(equal(alone.train_batch(step, k, 4), batch) for k, batch in enumerate(together))


def test_training_windows_reach_both_ends_and_no_further(tmp_path):
    data = Dataset(make(tmp_path, train=12), 8)
    starts = torch.cat([data.starts(step, 0, 8) for step in range(40)])
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]


def test_resident_and_memmap_give_the_same_batches(tmp_path, monkeypatch):
    make(tmp_path)
    resident = Dataset(tmp_path, 8)
    monkeypatch.setattr(batches, 'RESIDENT_TOKENS', 0)
    memmap = Dataset(tmp_path, 8)
    assert set(resident.resident) == {'train', 'val'} and not memmap.resident
    assert equal(resident.train_batch(5, 0, 4), memmap.train_batch(5, 0, 4))
    for one, other in zip(resident.val_batches(3), memmap.val_batches(3), strict=True):
        assert equal(one, other)


# ---- validation ----

# T, and n > T
sizes = st.tuples(st.integers(1, 12), st.integers(1, 90)).map(lambda t: (t[0], t[0] + t[1]))


@pytest.fixture(scope='module')
def long_folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp('long'), val=102)


def val_targets(folder, T, n, B, world, most=0):
    """Every counted target of all ranks; checks on the way that x is the token before y."""
    targets, counts = [], []
    for rank in range(world):
        data = Dataset(folder, T, rank=rank, world=world)
        data.tokens['val'] = data.tokens['val'][:n]
        data.resident['val'] = data.resident['val'][:n]
        batches = list(data.val_batches(B, most))
        counts.append(len(batches))
        for x, y in batches:
            assert x.shape == y.shape == (B, T)
            assert torch.equal(x[y >= 0] + 1, y[y >= 0])
            targets += y[y >= 0].tolist()
    assert len(set(counts)) == 1  # each rank takes part in every all-reduce
    return targets


@given(sizes, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_validation_counts_each_target_exactly_once(long_folder, size, B, world):
    T, n = size
    assert sorted(val_targets(long_folder, T, n, B, world)) == list(range(1, n))


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_a_sample_of_the_validation_has_whole_windows_evenly_spread(
    long_folder, size, B, world, most
):
    T, n = size
    targets = val_targets(long_folder, T, n, B, world, most)
    assert len(set(targets)) == len(targets)
    windows = -(-(n - 1) // T)
    if windows <= most:
        assert len(targets) == n - 1
    else:
        assert len(targets) == most * T
        begins = sorted((t - 1) // T for t in targets if (t - 1) % T == 0)
        gaps = np.diff(begins)
        assert begins[0] == 0 and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)
    assert sorted(targets) == sorted(val_targets(long_folder, T, n, 1, 1, most))


# ---- what a person can get wrong ----


def break_meta(folder, **changes):
    meta = json.loads((folder / 'meta.json').read_text()) | changes
    (folder / 'meta.json').write_text(
        json.dumps({key: value for key, value in meta.items() if value is not None})
    )


def put_other_val(folder, raw):
    """Put tokens into val.bin as nanoGPT does: nothing says what they were."""
    (folder / 'val.bin').write_bytes(raw)
    break_meta(folder, val_tokens=None, val_crc32=None)


def append(path, raw):
    path.write_bytes(path.read_bytes() + raw)


def overwrite(path, raw):
    path.write_bytes(raw + path.read_bytes()[len(raw) :])


def turn_into_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda d: (d / 'val.bin').unlink(), 'val.bin is missing'),
        (lambda d: (d / 'train.bin').write_bytes(b''), 'train.bin is empty'),
        (
            lambda d: (d / 'train.bin').write_bytes(b'abc'),
            'train.bin has 3 bytes, which is no whole number of uint16 tokens',
        ),
        (
            lambda d: put_other_val(d, bytes(16)),
            'val.bin has 8 tokens, too few for one block of 8',
        ),
        (
            lambda d: put_other_val(d, b'\xe8\x03' * 20),
            'val.bin holds token 1000, but its vocabulary has 1000',
        ),
        (
            lambda d: os.truncate(d / 'train.bin', 100),
            'train.bin has 50 tokens, but meta.json says',
        ),
        (lambda d: os.truncate(d / 'val.bin', 16), 'val.bin has 8 tokens, but meta.json says'),
        (lambda d: append(d / 'train.bin', b'\1\0'), 'tokens, but meta.json says'),
        (lambda d: overwrite(d / 'val.bin', bytes(20)), 'val.bin is damaged'),
        (lambda d: overwrite(d / 'train.bin', b'\7'), 'train.bin is damaged'),
        (lambda d: turn_into_folder(d / 'val.bin'), 'val.bin is no file'),
        (lambda d: (d / 'meta.json').write_text('[' * 100_000), 'meta.json cannot be used'),
        (lambda d: break_meta(d, source=5), 'source is 5, not a text'),
        (lambda d: break_meta(d, tokenizer=['char']), "tokenizer is ['char'], not a text"),
        (lambda d: break_meta(d, vocab_size=-3), 'vocab_size is -3'),
        (lambda d: break_meta(d, train_tokens='many'), "train_tokens is 'many'"),
        (lambda d: break_meta(d, tokenizer='char'), "it has no entry 'chars'"),
        (lambda d: break_meta(d, tokenizer='char', chars=7), 'chars is 7'),
        (lambda d: (d / 'meta.json').write_text('{'), 'meta.json cannot be used'),
        (lambda d: (d / 'meta.json').write_text('[]'), 'meta.json cannot be used'),
        (lambda d: (d / 'meta.json').write_bytes(b'\xff'), 'meta.json cannot be used'),
        (lambda d: break_meta(d, dtype='float32'), 'meta.json cannot be used'),
        (lambda d: break_meta(d, dtype=None), 'meta.json cannot be used'),
        (lambda d: break_meta(d, tokenizer=None), 'meta.json cannot be used'),
        (lambda d: break_meta(d, vocab_size='many'), 'meta.json cannot be used'),
        (lambda d: break_meta(d, tokenizer='char', chars='ab'), 'meta.json cannot be used'),
        (lambda d: (d / 'meta.json').rename(d / 'meta.pkl'), 'never unpickled'),
    ],
)
def test_a_spoilt_dataset_says_what_is_wrong(tmp_path, spoil, message):
    spoil(make(tmp_path))
    with pytest.raises(UserError) as error:
        Dataset(tmp_path, 8)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_bins_without_meta_are_nanogpts_gpt2_tokens(tmp_path):
    (make(tmp_path) / 'meta.json').unlink()
    meta = read_meta(tmp_path)
    assert (meta['tokenizer'], meta['vocab_size'], meta['dtype']) == ('gpt2', 50257, 'uint16')
    Dataset(tmp_path, 8).train_batch(0, 0, 1)


# ---- prepare it if it is missing ----


def test_find_takes_a_path_or_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, 'DATA', tmp_path / 'data')
    assert token_files.find('nothing') == tmp_path / 'data/nothing'
    assert token_files.find(str(make(tmp_path / 'elsewhere'))) == tmp_path / 'elsewhere'


def test_of_several_processes_one_prepares_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, 'DATA', tmp_path)
    folder = tmp_path / 'slow'
    folder.mkdir()
    (folder / 'prepare.py').touch()
    prepared = []

    def prepare(command, env):
        assert not (folder / 'train.bin').exists()
        time.sleep(0.2)  # the others come meanwhile
        prepared.append(command[-1])
        make(folder)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(files.subprocess, 'run', prepare)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(token_files.prepare_if_missing, ['slow'] * 4))
    assert prepared == [str(folder / 'prepare.py')]


def test_prepare_if_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(token_files, 'DATA', tmp_path)
    good, bad = tmp_path / 'good', tmp_path / 'bad'
    good.mkdir(), bad.mkdir()
    (good / 'prepare.py').write_text(
        'from pathlib import Path\nprint("making it")\nfor name in "train.bin", "val.bin":\n'
        '    (Path(__file__).parent / name).write_bytes(bytes(40))\n'
    )
    (bad / 'prepare.py').write_text('raise SystemExit("error: no text")\n')
    token_files.prepare_if_missing('good')
    assert (good / 'train.bin').stat().st_size == 40 and capfd.readouterr().out == 'making it\n'
    token_files.prepare_if_missing('good')
    token_files.prepare_if_missing(str(good))
    assert capfd.readouterr().out == ''  # it was there
    with pytest.raises(SystemExit) as ended:
        token_files.prepare_if_missing('bad')
    assert ended.value.code == 1
    assert capfd.readouterr().err == 'error: no text\n'  # its own message, and no other
    with pytest.raises(UserError, match="there is no dataset 'ugly'.*known: bad, good"):
        token_files.prepare_if_missing('ugly')


# ---- tokenizers ----


@given(st.text(min_size=1))
@settings(deadline=None)
def test_char_and_bytes_round_trip(text):
    for codec in (
        Tokenizer(dict(tokenizer='char', chars=''.join(sorted(set(text))))),
        Tokenizer(dict(tokenizer='bytes')),
    ):
        ids = codec.encode(text)
        assert codec.decode(ids) == text
        assert all(type(i) is int and 0 <= i < codec.vocab_size for i in ids)
        assert codec.encode_array(text).tolist() == ids
        # Padding ids of a wider model give nothing.
        assert codec.decode(ids + [codec.vocab_size + 5]) == text


def test_char_ids_are_places_in_the_vocabulary():
    codec = Tokenizer(dict(tokenizer='char', chars='\nab日'))
    assert codec.encode('b日\na') == [2, 3, 0, 1] and codec.encode('') == []


@pytest.mark.parametrize(
    'text, unknown',
    [('abc', 'c'), ('a日', '日'), ('a\U0010ffff', r'\U0010ffff'), ('\udcff', r'\udcff')],
)
def test_char_names_what_it_does_not_know(text, unknown):
    with pytest.raises(UserError) as error:
        Tokenizer(dict(tokenizer='char', chars='ab')).encode(text)
    message = str(error.value)
    assert f'never seen: {unknown!r}'.replace('\\\\', '\\') in message
    assert "it knows 'ab'" in message


def test_bytes_of_a_broken_argument_survive():
    # Python hands over a stray byte in argv as a surrogate.
    assert Tokenizer(dict(tokenizer='bytes')).encode('\udcff') == [255]


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="'words' is not known: use char, bytes or gpt2"):
        Tokenizer(dict(tokenizer='words'))


def test_gpt2_without_vocabulary_or_tiktoken(monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError('unreachable')

    monkeypatch.setattr(tiktoken, 'get_encoding', no_network)
    with pytest.raises(UserError, match='connect to the network once, or set TIKTOKEN_CACHE_DIR'):
        Tokenizer(dict(tokenizer='gpt2'))
    monkeypatch.setitem(__import__('sys').modules, 'tiktoken', None)
    with pytest.raises(UserError, match='pip install tiktoken'):
        Tokenizer(dict(tokenizer='gpt2'))


# ---- writing ----


def test_write_text(tmp_path):
    text = 'hello world\n' * 10
    meta = write_text(tmp_path, text, 'char', 'greetings', val_fraction=0.25)
    assert meta == read_meta(tmp_path)
    assert (meta['train_tokens'], meta['val_tokens']) == (90, 30)
    assert (meta['vocab_size'], meta['dtype']) == (9, 'uint16')
    data, codec = Dataset(tmp_path, 4), Tokenizer(meta)
    train, val = (codec.decode(data.tokens[split].tolist()) for split in ('train', 'val'))
    assert train + val == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize(
    'text, fraction, message',
    [
        ('', 0.1, 'empty'),
        ('abc', 0.1, 'too short'),
        ('a' * 99, 0.0, 'val_fraction is 0.0'),
        ('a' * 99, 1.0, 'between 0 and 1'),
    ],
)
def test_text_that_cannot_be_split_changes_nothing(tmp_path, text, fraction, message):
    write_text(tmp_path, 'an older text' * 9, 'char', 'old')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        write_text(tmp_path, text, 'bytes', 'new', fraction)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_old_dataset_stays_until_the_new_one_is_complete(tmp_path):
    old = write_text(tmp_path, 'an older text' * 9, 'char', 'old')
    with pytest.raises(ZeroDivisionError), TokenWriter(tmp_path, 70000) as files:
        files.add('train', [69999] * 10)
        files.sync()
        assert read_meta(tmp_path) == old
        raise ZeroDivisionError
    assert read_meta(tmp_path) == old and not list(tmp_path.glob('*.partial'))


def test_a_writer_goes_on_where_it_was(tmp_path):
    first = TokenWriter(tmp_path, 70000, keep=True)
    first.add('train', [1, 2, 3])
    first.add('val', [4])
    sizes = first.sync()
    first.add('train', [99] * 1000)  # what was written after the last sync may be there in part
    first.files['train'].flush()
    with TokenWriter(tmp_path, 70000, sizes) as files:
        files.add('train', [69999])
        files.add('val', [5, 6])
        meta = files.publish(dict(tokenizer='bytes', source='numbers'))
    assert meta['dtype'] == 'uint32'
    assert np.fromfile(tmp_path / 'train.bin', 'uint32').tolist() == [1, 2, 3, 69999]
    assert np.fromfile(tmp_path / 'val.bin', 'uint32').tolist() == [4, 5, 6]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write .*file'):
        write_text(tmp_path / 'file', 'some text ' * 9, 'char', 'x')


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot write .*: no space left on the device'):
        write_text(tmp_path, 'some text ' * 9, 'char', 'x')
    assert not list(tmp_path.iterdir())


def test_in_order_keeps_the_order_and_takes_few_at_a_time():
    taken, done = [], []
    for value in in_order(lambda i: i * i, (taken.append(i) or i for i in range(100)), 3):
        done.append(value)
        assert len(taken) - len(done) <= 2 * 3
    assert done == [i * i for i in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 / i, [1, 0], 2))
    with pytest.raises(UserError, match='num_proc is -1'):
        list(in_order(abs, [1], -1))
