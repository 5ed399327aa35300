"""data/*/prepare.py, in copies under tmp_path, without a network and without GPT-2's vocabulary."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import END_OF_TEXT as END
from helpers import ROOT, tiny_bpe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nanomla.core.configurator import UserError
from nanomla.core.files import jsonl
from nanomla.core.token_files import Progress, TokenWriter, read_meta, read_split, val_begin
from nanomla.core.tokenizers import Tokenizer


@pytest.fixture
def bpe(monkeypatch):
    monkeypatch.setattr('tiktoken.get_encoding', tiny_bpe)
    return tiny_bpe()


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts, so that the real data/ stays as it is."""
    root = tmp_path / 'project'
    for pattern in (
        'nanomla/core/*.py',
        'nanomla/training/next_steps.py',
        'data/*.py',
        'data/*/prepare.py',
    ):
        for path in ROOT.glob(pattern):
            copy = root / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return root


@pytest.fixture
def prepare(project, monkeypatch):
    """prepare('text', 'a.txt', '--out=x') runs the copy of data/text/prepare.py in this process."""

    def run(name, *args):
        script = project / 'data' / name / 'prepare.py'
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        monkeypatch.setattr(sys, 'path', sys.path[:])
        runpy.run_path(str(script), run_name='__main__')
        return project / 'data' / name

    return run


@pytest.fixture
def shakespeare(project, monkeypatch):
    """The copy's tiny_shakespeare module, its network cut."""
    monkeypatch.syspath_prepend(str(project / 'data'))
    sys.modules.pop('tiny_shakespeare', None)
    import tiny_shakespeare

    assert tiny_shakespeare.INPUT == project / 'data/shakespeare_char/input.txt'
    monkeypatch.setattr(tiny_shakespeare, 'URL', (project / 'nothing').as_uri())
    yield tiny_shakespeare
    del sys.modules['tiny_shakespeare']


def text_of(folder):
    codec, meta = Tokenizer(read_meta(folder)), read_meta(folder)
    return b''.join(
        codec.decode_bytes(read_split(folder, split, meta).tolist()) for split in ('train', 'val')
    )


def contents(folder):
    """The files of a folder: name -> bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).glob('*') if path.is_file()}


def python(cwd, *args, **env):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONDONTWRITEBYTECODE='1') | env,
    )


# ---- tiny Shakespeare ----


def test_shakespeare_is_downloaded_once_and_checked(
    shakespeare, prepare, project, monkeypatch, capsys
):
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\n' * 30
    served = project / 'served.txt'
    served.write_text(text)
    monkeypatch.setattr(shakespeare, 'URL', served.as_uri())
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(text.encode()).hexdigest())
    folder = prepare('shakespeare_char')
    assert (folder / 'input.txt').read_text() == text
    assert read_meta(folder)['source'] == 'tiny Shakespeare' and text_of(folder).decode() == text
    served.unlink()
    prepare('shakespeare_char')
    assert read_meta(folder)['source'] == 'tiny Shakespeare'
    assert capsys.readouterr().err == ''


def test_without_a_network_a_stand_in_is_named(shakespeare, prepare, project, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, 'reference_text', lambda: 'Some reference text.\n' * 20)
    folder = prepare('shakespeare_char')
    version = f'Python {sys.version_info.major}.{sys.version_info.minor}'
    why = 'stand-in: no network for tiny Shakespeare'
    assert read_meta(folder)['source'] == f'{version} reference text ({why})'
    printed = capsys.readouterr()
    assert printed.err.startswith('no network for tiny Shakespeare: taking the')
    assert printed.err.count('\n') == 1
    assert 'stand-in' in printed.out and not (folder / 'input.txt').exists()

    served = project / 'served.txt'  # a network, but not the text we know
    served.write_text('<html>log in first</html>')
    monkeypatch.setattr(shakespeare, 'URL', served.as_uri())
    prepare('shakespeare_char')
    assert 'wrong checksum' in read_meta(folder)['source'] and not (folder / 'input.txt').exists()

    (folder / 'input.txt').write_text('my words ' * 30)  # and a later run replaces the stand-in
    prepare('shakespeare_char')
    assert read_meta(folder)['source'] == 'input.txt (your own text)'
    assert text_of(folder) == b'my words ' * 30


def test_shakespeare_in_gpt2_tokens_is_the_same_text(shakespeare, prepare, bpe):
    shakespeare.INPUT.write_text('the thing in the inn\n' * 30)
    folder = prepare('shakespeare')
    meta = read_meta(folder)
    assert (meta['tokenizer'], meta['dtype'], meta['vocab_size']) == ('gpt2', 'uint16', 50257)
    assert text_of(folder) == shakespeare.INPUT.read_bytes() and not (folder / 'input.txt').exists()
    assert text_of(folder) == text_of(prepare('shakespeare_char'))


def test_the_split_of_tiny_shakespeare(shakespeare):
    assert val_begin(shakespeare.SIZE, 0.1) == 1_003_854


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'cannot read .*own.txt'),
        (b'', 'the text is empty'),
        (b'ab', 'too short'),
        (b'caf\xe9', r'own.txt is not UTF-8 text \(byte 3\)'),
    ],
)
def test_a_text_of_ones_own_for_shakespeare(shakespeare, prepare, project, content, message):
    own = project / 'own.txt'
    own.write_bytes(b'my own words, ' * 20)
    folder = prepare('shakespeare_char', f'--input={own}')
    assert read_meta(folder)['source'] == 'own.txt (your own text)'
    assert text_of(folder) == own.read_bytes()
    before = contents(folder)
    if content is None:
        own.unlink()
    else:
        own.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare('shakespeare_char', f'--input={own}')
    assert contents(folder) == before


def test_the_stand_in_is_good_english(shakespeare):
    imported = set(sys.modules)
    text = shakespeare.reference_text()
    assert 800_000 < len(text) <= shakespeare.SIZE
    assert set(text) <= {chr(i) for i in range(32, 127)} | {'\n'}
    paragraphs = text.split('\n\n')
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(c.islower() or c == ' ' for c in text) > 0.85 * len(text)
    parsed = {'antigravity', 'pydoc_data.topics', 'this', 'turtle'}
    assert not parsed & (set(sys.modules) - imported)  # and not imported


def test_the_stand_in_is_the_same_each_time(shakespeare, monkeypatch):
    few = frozenset({'argparse', 'json', 'pydoc_data', 'test', 'sys'})
    monkeypatch.setattr(sys, 'stdlib_module_names', few)
    documents = list(shakespeare.reference_documents())
    assert any('JavaScript Object Notation' in text for text in documents)
    topic = 'The "assert" statement'  # of pydoc_data
    assert any(text.startswith(topic) for text in documents)
    assert shakespeare.reference_text() == shakespeare.reference_text()


def test_a_python_without_sources_cannot_stand_in(shakespeare, monkeypatch):
    monkeypatch.setattr(sys, 'stdlib_module_names', frozenset({'sys'}))
    with pytest.raises(UserError, match='give --input=FILE'):
        shakespeare.reference_text()


def test_prose_is_known_from_code(shakespeare):
    assert shakespeare.is_prose('Return the number of sentences that a reader finds in the text.')
    for other in (
        'Too short.',
        '>>> print("the quick brown fox jumps over the lazy dog again")',
        'a heading of many words ' * 3,
        'x = f(a[1]) + 2 * g(b[2]) / 3 - h(c[3]) ** 4 % i(d[4]) + 5.',
        'Return the café where a reader finds all of the text.',
    ):
        assert not shakespeare.is_prose(other)


# ---- your own text ----

WORDS = st.sampled_from(
    ['the', 'thing', "he's", 'é', '日', '12', '...', '<|endoftext|>', 'in', '\u200b', "'", 'a-b']
)
BLANKS = st.sampled_from(
    [' ', '  ', '\n', '\n\n', '\n\n\n', ' \n', '\n ', '\t\t', '\x1c', '\u3000', '\x85 ']
    + ['     \n\n  ', '\r\n']
)


@given(
    st.lists(st.tuples(BLANKS, WORDS, st.booleans()), min_size=40, max_size=120),
    st.floats(0.05, 0.95),
)
@example([('\n\n', 'the', True)] * 60, 0.5)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_chunks_have_the_tokens_of_the_whole(project, prepare, bpe, pieces, val_fraction):
    script = project / 'data/text/prepare.py'
    source = script.read_text()
    source = source.replace('block_size: int = 2**20', 'block_size: int = 7')
    source = source.replace('chunk_size: int = 2**18', 'chunk_size: int = 64')
    assert 'block_size: int = 7' in source and 'chunk_size: int = 64' in source
    script.write_text(source)
    # ' so' after every second piece gives each 64 characters a place to cut. Without one the tokens
    # are valid, but not equal.
    text = ''
    for i, (blank, word, blank_first) in enumerate(pieces):
        text += blank + word if blank_first else word + ' '
        if i % 2:
            text += ' so'
    file = project / 'own.txt'
    file.write_bytes(text.encode())
    options = ['--tokenizer=gpt2', f'--val_fraction={val_fraction!r}', '--num_proc=2']
    folder = prepare('text', file, *options)
    cut = int(len(text) * (1 - val_fraction))
    for split, part in ('train', text[:cut]), ('val', text[cut:]):
        assert np.fromfile(folder / f'{split}.bin', 'uint16').tolist() == bpe.encode_ordinary(part)
    for tokenizer in 'char', 'bytes':
        assert text_of(prepare('text', file, f'--tokenizer={tokenizer}')) == text.encode()


def test_a_text_without_blanks_and_one_of_blanks_still_come_back(prepare, project, bpe):
    file = project / 'own.txt'
    for text in '日' * 300_000, ' ' * 600_000, '\n' * 300_000 + 'x':
        file.write_bytes(text.encode())
        assert text_of(prepare('text', file, '--tokenizer=gpt2')).decode() == text


def test_blanks_that_tiktoken_gives_up_on_are_halved(monkeypatch, bpe):
    codec = Tokenizer(dict(tokenizer='gpt2'))
    text = 'the thing ' * 300

    def weak(part, **_):
        if len(part) > 900:
            raise ValueError('stack')
        return bpe.encode_to_numpy(part)

    monkeypatch.setattr(codec, 'bpe', SimpleNamespace(encode_to_numpy=weak))
    assert bpe.decode(codec.encode_array(text).tolist()) == text


@pytest.mark.parametrize(
    'tokenizer, joint', [('char', b'\n'), ('bytes', b'\n'), ('gpt2', b'<|endoftext|>')]
)
def test_packed_files_and_standard_input_are_joined_in_order(
    prepare, project, bpe, monkeypatch, tokenizer, joint
):
    parts = ['the first é\n' * 9, 'the second 日' * 9, 'third\n' * 9, 'and the last' * 9]
    parts = [part.encode() for part in parts]
    monkeypatch.chdir(project)
    Path('a.txt.xz').write_bytes(lzma.compress(parts[0]))
    Path('b.gz').write_bytes(gzip.compress(parts[1]))
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(parts[2])))
    Path('d.bz2').write_bytes(bz2.compress(parts[3]))
    prepare('text', 'a.txt.xz', 'b.gz', f'--tokenizer={tokenizer}', '-', 'd.bz2', '--out=made/here')
    assert text_of('made/here') == joint.join(parts)
    meta = read_meta('made/here')
    assert meta['source'] == 'a.txt.xz, b.gz, standard input, d.bz2 (your own text)'
    assert meta['sha256'] == hashlib.sha256(b'\n'.join(parts)).hexdigest()
    length = [len(b'\n'.join(parts)), len('\n'.join(map(bytes.decode, parts)))]
    if tokenizer != 'gpt2':
        assert meta['train_tokens'] == int(length[tokenizer == 'char'] * 0.9)
    assert not (project / 'data/text/train.bin').exists()


def test_a_vocabulary_beyond_uint16(prepare, project):
    text = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (project / 'own.txt').write_text(text, encoding='utf-8')
    folder = prepare('text', project / 'own.txt')
    assert read_meta(folder)['dtype'] == 'uint32' and text_of(folder).decode() == text


@pytest.mark.parametrize(
    'files, options, message',
    [
        ([], [], 'which text'),
        (['none.txt'], [], 'cannot read none.txt: No such file'),
        (['good.txt', 'none.txt'], [], 'cannot read none.txt'),
        (['.'], [], 'cannot read .: Is a directory'),
        (
            ['latin.txt'],
            [],
            'latin.txt is not UTF-8 text: byte 1200003 is 0xe9; .* use --tokenizer=bytes',
        ),
        (['cut.txt'], [], 'cut.txt is not UTF-8 text: byte 4 is 0xe6'),
        (['broken.xz'], [], 'cannot read broken.xz'),
        (['broken.gz'], [], 'cannot read broken.gz'),
        (['short.gz'], [], 'cannot read short.gz'),
        (['empty.txt'], [], 'the text is empty'),
        (['tiny.txt'], [], 'the text is too short: 1 tokens for train.bin'),
        (
            ['good.txt'],
            ['--tokenizer=words'],
            '--tokenizer=words is neither the folder nor the name on the hub of a model',
        ),
        (['good.txt'], ['--tokeniser=char'], 'did you mean --tokenizer'),
        (['good.txt'], ['--val_fraction=1.5'], 'val_fraction is 1.5'),
        (['good.txt'], ['--num_proc=-1'], 'num_proc is -1'),
    ],
)
def test_what_can_be_wrong_with_a_text_leaves_the_dataset_as_it_was(
    prepare, project, monkeypatch, files, options, message
):
    monkeypatch.chdir(project)
    made = dict(
        good=b'good words ' * 20,
        latin=b'caf ' * 300_000 + b'caf\xe9 ',
        cut=b'abcd\xe6\x97',
        empty=b'',
        tiny=b'ab',
    )
    for name, content in made.items():
        Path(f'{name}.txt').write_bytes(content)
    for name in 'broken.xz', 'broken.gz':
        Path(name).write_bytes(b'not packed at all')
    Path('short.gz').write_bytes(gzip.compress(bytes(range(256)) * 9)[:-20])
    folder = prepare('text', 'good.txt')
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        prepare('text', *files, *options)
    assert contents(folder) == before and not Path('made').exists()


def test_any_bytes_are_a_text_for_bytes(prepare, project):
    raw = bytes(range(256)) * 9
    (project / 'picture.raw').write_bytes(raw)
    assert text_of(prepare('text', project / 'picture.raw', '--tokenizer=bytes')) == raw


def test_from_any_folder_with_one_line_and_code_2(project, tmp_path):
    (tmp_path / 'own.txt').write_text('words of my own\n' * 20)
    done = python(tmp_path, project / 'data/text/prepare.py', 'own.txt')
    assert done.returncode == 0 and read_meta(project / 'data/text')['train_tokens'] == 288
    assert 'own.txt (your own text)' in done.stdout
    assert '  python train.py config/train_shakespeare_mla.py --dataset=text' in done.stdout
    before = contents(project / 'data/text')
    done = python(project / 'data/text', 'prepare.py', 'own.txt')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'error: cannot read own.txt: No such file or directory\n'
    assert contents(project / 'data/text') == before


TAKES = dict(text='FILE ...')


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char', 'openwebtext', 'text'])
def test_help(prepare, capsys, name):
    with pytest.raises(SystemExit) as end:
        prepare(name, '--help')
    text = capsys.readouterr().out
    assert not end.value.code and '--val_fraction=' in text
    usage = text.splitlines()[0]
    assert usage.startswith('usage: python ')
    assert f'prepare.py {TAKES.get(name, "[config/x.py ...]")} [--key=value ...]' in usage


# ---- OpenWebText ----


SMALL = ['--batch=7', '--val_fraction=0.05', '--save_every=0', '--num_proc=2']


@pytest.fixture
def owt(prepare, project, bpe, monkeypatch, tmp_path):
    """owt('--limit=3') runs it on local documents, `owt.documents`, in batches of 7."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # nobody answers there
    # The script sets it too late for a library that is loaded already.
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    documents = [f'{i}: the thing in document {i} <|endoftext|>\n' * (i % 5) for i in range(100)]
    file = project / 'documents.jsonl'
    file.write_text(jsonl([dict(text=text, number=i) for i, text in enumerate(documents)]))

    def run(*args, input=file):
        return prepare('openwebtext', f'--input={input}', *SMALL, *args)

    run.documents, run.file = documents, file
    return run


def documents_of(folder):
    """The documents of each split, by their tokens."""
    codec = Tokenizer(dict(tokenizer='gpt2'))
    found = {}
    for split in 'train', 'val':
        ids = np.fromfile(folder / f'{split}.bin', 'uint16')
        ends = np.flatnonzero(ids == END)
        assert ends[-1] == len(ids) - 1
        found[split] = [codec.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
    return found


def test_each_document_is_in_one_split_and_ends(owt):
    found = documents_of(owt())
    texts = [text for text in owt.documents if text]
    assert sorted(found['train'] + found['val']) == sorted(texts)
    assert found['train'] == [text for text in texts if text not in found['val']]  # in their order
    # One of each 20 validates, unless that one is empty.
    val = [owt.documents.index(text) // 20 for text in found['val']]
    assert len(set(val)) == len(val) and 3 <= len(val) <= 5
    folder = owt.file.parent / 'again'
    owt(f'--out={folder}')
    assert documents_of(folder) == found
    owt('--seed=1', f'--out={folder}')
    assert documents_of(folder)['val'] != found['val']
    meta = read_meta(folder)
    both = (folder / 'train.bin').read_bytes() + (folder / 'val.bin').read_bytes()
    assert meta['sha256'] == hashlib.sha256(both).hexdigest() and meta['documents'] == 100
    assert sorted(contents(folder)) == ['meta.json', 'train.bin', 'val.bin']


def test_limit_and_other_kinds_of_files(owt, project, capsys):
    folder = owt('--limit=30')
    found = documents_of(folder)
    assert sorted(found['train'] + found['val']) == sorted(filter(None, owt.documents[:30]))
    assert read_meta(folder)['source'] == 'documents.jsonl (your own text), the first 30 documents'
    owt('--limit=30')
    assert 'has this dataset already' in capsys.readouterr().out

    lines = [f'the line {i}' for i in range(40)]
    (project / 'part1.txt').write_text('\n'.join(lines[:20]) + '\n\n')
    (project / 'part2.txt').write_text('\n'.join(lines[20:]) + '\n')
    found = documents_of(owt(input=project / 'part*.txt'))
    assert sorted(found['train'] + found['val']) == sorted(lines)

    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(body=lines)), project / 'x.parquet')
    found = documents_of(owt('--column=body', input=project / 'x.parquet'))
    assert sorted(found['train'] + found['val']) == sorted(lines)


class Killed(BaseException):
    pass


@pytest.mark.parametrize('end', ['publish', 'remove'])
def test_a_run_that_was_killed_after_its_last_document_ends_well(owt, project, monkeypatch, end):
    def die(*_):
        raise Killed

    owt(f'--out={project / "whole"}')
    out = project / 'killed'
    with monkeypatch.context() as patch:
        if end == 'publish':
            patch.setattr(TokenWriter, 'publish', die)
        else:  # its dataset is there, and progress.json still
            patch.setattr(Progress, 'remove', die)
        with pytest.raises(Killed):
            owt(f'--out={out}')
    assert json.loads((out / 'progress.json').read_text())['done'] == 100
    owt(f'--out={out}')
    assert contents(out) == contents(project / 'whole')


@pytest.mark.parametrize('last', [0, 1, 5, 9, 17])
def test_an_interrupted_run_goes_on(owt, project, monkeypatch, capsys, last):
    owt(f'--out={project / "whole"}')
    add, added = TokenWriter.add, []

    def dying_add(self, split, ids):
        if len(added) == last:
            add(self, split, ids[:1])  # half a batch
            self.files[split].flush()
            raise Killed
        added.append(split)
        add(self, split, ids)

    monkeypatch.setattr(TokenWriter, 'add', dying_add)
    out = project / 'killed'
    with pytest.raises(Killed):
        owt(f'--out={out}')
    assert not (out / 'train.bin').exists() and not (out / 'meta.json').exists()
    monkeypatch.setattr(TokenWriter, 'add', add)
    capsys.readouterr()
    owt(f'--out={out}')
    assert ('going on after' in capsys.readouterr().out) == (last > 0)
    whole = contents(project / 'whole')
    assert contents(out) == whole


def test_a_killed_process_goes_on_and_another_plan_does_not(owt, project, tmp_path, forked_python):
    out, whole = project / 'killed', project / 'whole'
    arguments = ['prepare.py', f'--input={owt.file}', *SMALL, f'--out={out}']
    driver = f"""
import os, runpy, signal, sys
import tiktoken
from nanomla.core.token_files import TokenWriter
from helpers import tiny_bpe
tiktoken.get_encoding = tiny_bpe
sync, calls = TokenWriter.sync, []
def last_sync(self):
    calls.append(self)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return sync(self)
TokenWriter.sync = last_sync
sys.argv = {arguments!r}
runpy.run_path({str(project / 'data/openwebtext/prepare.py')!r}, run_name='__main__')
"""
    path = os.pathsep.join(map(str, [project, ROOT / 'tests', ROOT / 'tests' / 'data']))
    done = python(tmp_path, '-c', driver, PYTHONPATH=path, HF_HOME=str(tmp_path / 'hf'))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((out / 'progress.json').read_text())['done'] == 35
    shutil.copytree(out, project / 'other')
    owt(f'--out={whole}')
    owt(f'--out={out}')
    assert contents(out) == contents(whole)
    owt('--seed=9', f'--out={project / "other"}')  # another plan begins anew
    found = documents_of(project / 'other')
    assert sorted(found['train'] + found['val']) == sorted(text for text in owt.documents if text)


def test_from_the_hub_with_a_limit_rows_are_streamed(owt, prepare, monkeypatch):
    import datasets

    asked = []

    def load_dataset(**what):
        asked.append(what)
        if len(asked) == 1:
            raise RuntimeError('Dataset scripts are no longer supported, but found openwebtext.py')
        rows = datasets.Dataset.from_dict(dict(text=owt.documents))
        return rows.to_iterable_dataset() if what.get('streaming') else rows

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    folder = prepare('openwebtext', '--limit=50', '--val_fraction=0.05', '--batch=7')
    wanted = dict(path='Skylion007/openwebtext', split='train', streaming=True)
    assert asked[1] == wanted | dict(revision='refs/convert/parquet')
    found = documents_of(folder)
    assert sorted(found['train'] + found['val']) == sorted(filter(None, owt.documents[:50]))
    assert read_meta(folder)['source'] == 'Skylion007/openwebtext, the first 50 documents'
    prepare('openwebtext', '--val_fraction=0.05')
    assert read_meta(folder)['documents'] == 100 and 'streaming' not in asked[2]


def test_what_can_be_wrong_with_openwebtext(owt, prepare, project, monkeypatch):
    for args, message in [
        ((), 'cannot load Skylion007/openwebtext: check the name and the network'),
        (('--input=none.jsonl',), 'none.jsonl: there is no such file'),
        ((f'--input={ROOT / "nanomla" / "core" / "token_files.py"}',), 'give files of one kind'),
        (
            (f'--input={owt.file}', '--column=body'),
            "has no column 'body': give --column= one of text, number",
        ),
        ((f'--input={owt.file}', '--column=number'), "column 'number' holds int"),
        ((f'--input={owt.file}', '--limit=1'), 'the text is too short'),
        ((f'--input={owt.file}', '--limit=-1'), '--limit counts'),
        ((f'--input={owt.file}', '--val_fraction=0.0'), '--val_fraction is between'),
    ]:
        with pytest.raises(UserError, match=message):
            prepare('openwebtext', *args)
    (project / 'broken.jsonl').write_text('{"text": "unfinished')
    with pytest.raises(UserError, match='cannot load .*broken.jsonl: check the file'):
        prepare('openwebtext', f'--input={project / "broken.jsonl"}')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        owt()
    assert not (project / 'data/openwebtext/train.bin').exists()
