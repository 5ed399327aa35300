"""What a model's ids mean, and the text that it is measured on with the number of its bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from nanomla.checkpoints.load import LoadedModel, codec_of, may_be_model
from nanomla.checkpoints.text import read_text
from nanomla.core import token_files

CHARS = '\n abcdeé'
TEXT = 'éa bé.\n'.replace('.', 'c') * 20


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_files, 'DATA', tmp_path / 'data')
    return tmp_path


def loaded_with(model, **checkpoint):
    return LoadedModel(model, 'out/ckpt.pt', checkpoint)


@pytest.fixture
def loaded(tiny):
    meta = dict(tokenizer='char', chars=CHARS)
    return loaded_with(tiny(vocab_size=8), meta=meta, config=dict(dataset='tale'))


@pytest.mark.parametrize('name', ['gpt2', 'gpt2-xl', 'random:tiny', 'someone/a-model', 'here'])
def test_names_that_may_be_models(name, folder):
    (folder / 'here').mkdir()
    assert may_be_model(name)


@pytest.mark.parametrize('name', ['gone', 'gone.pt', 'folder/gone.pt', 'gpt3'])
def test_names_that_cannot_be_models(name):
    assert not may_be_model(name)


# -------------------------------------------------------------------------------------------------
# what the ids mean


def test_a_checkpoint_says_it_by_its_meta(loaded):
    codec = codec_of(loaded)
    assert codec.tokenizer.decode([2, 3]) == 'ab'
    assert (codec.begin, codec.ends, codec.leading_blank) == (None, set(), False)


@pytest.mark.parametrize('vocab_size', [6, 64])  # as it is, and rounded up
def test_nanogpts_says_it_by_the_dataset_that_it_names(vocab_size, tiny):
    token_files.write_text('data/tale', TEXT * 9, 'char', 'a test')
    meta = json.loads(open('data/tale/meta.json').read())
    assert meta['vocab_size'] == 6
    loaded = loaded_with(tiny(vocab_size=vocab_size), config=dict(dataset='tale'))
    assert codec_of(loaded).tokenizer.chars == meta['chars']


def test_without_any_of_these_it_is_not_known(tiny):
    model = tiny(vocab_size=8)
    refused(codec_of, loaded_with(model), match='what its 8 tokens are: GPT-2 has 50257')
    named = loaded_with(model, config=dict(dataset='tale'))
    refused(codec_of, named, match="run the prepare.py of the dataset 'tale'")


# -------------------------------------------------------------------------------------------------
# text


def test_a_text_file(loaded, folder):
    (folder / 'a.txt').write_bytes(b'\xef\xbb\xbf' + TEXT.encode())
    codec = codec_of(loaded)
    text = read_text(loaded, codec, 'a.txt')
    assert codec.tokenizer.decode(text.ids) == TEXT
    assert text.n_bytes == len(TEXT[1:].encode())
    assert text.name == 'a.txt'
    text = read_text(loaded, codec, 'a.txt', max_tokens=5)
    assert codec.tokenizer.decode(text.ids) == TEXT[:5]
    assert text.n_bytes == len(TEXT[1:5].encode())


def test_the_dataset_that_the_model_was_trained_on(loaded):
    meta = dict(loaded.meta, source='a test')
    ids = codec_of(loaded).tokenizer.encode_array(TEXT)
    with token_files.TokenWriter('data/tale', len(CHARS)) as files:
        files.add('train', ids[:100])
        files.add('val', ids[100:])
        files.publish(meta)
    for split, expected in (('train', TEXT[:100]), ('val', TEXT[100:])):
        text = read_text(loaded, codec_of(loaded), split=split)
        assert codec_of(loaded).tokenizer.decode(text.ids) == expected
        assert text.n_bytes == len(expected[1:].encode())
        assert text.name == 'tale'
    text = read_text(loaded, codec_of(loaded), max_tokens=7)
    assert len(text.ids) == 7
    assert text.n_bytes == len(TEXT[101:107].encode())


def test_the_setting_that_names_a_text_is_in_the_message(loaded, folder):
    codec = codec_of(loaded)
    (folder / 'empty.txt').touch()
    (folder / 'latin.txt').write_bytes(b'\xff\xfe')
    option = dict(option='--calibration')
    refused(read_text, loaded, codec, 'empty.txt', match='--calibration=empty.txt', **option)
    refused(read_text, loaded, codec, 'latin.txt', match='--calibration=latin.txt', **option)
    refused(read_text, loaded, codec, 'gone', match='--calibration=gone is neither', **option)
    nameless = loaded_with(loaded.model, meta=loaded.meta)
    refused(read_text, nameless, codec, match='by --calibration', **option)


def test_tokens_of_another_vocabulary_are_refused(loaded):
    token_files.write_text('data/tale', TEXT * 9, 'char', 'a test')
    refused(read_text, loaded, codec_of(loaded), match='tokens of another vocabulary')


def test_ids_beyond_the_vocabulary_are_refused(loaded):
    token_files.write_text('data/tale', CHARS * 99, 'char', 'a test')
    meta = json.loads(Path('data/tale/meta.json').read_text())
    del meta['val_tokens'], meta['val_crc32']  # as nanoGPT's files come
    Path('data/tale/meta.json').write_text(json.dumps(meta))
    np.full(50, 9, np.uint16).tofile('data/tale/val.bin')
    refused(read_text, loaded, codec_of(loaded), match='holds token 9, but the vocabulary has 8')


# -------------------------------------------------------------------------------------------------
# what a checkpoint names is only read

PREPARE = """
from pathlib import Path
Path('ran').touch()
"""


@pytest.mark.parametrize('name', ['data/foreign', 'foreign', '.', '../foreign'])
def test_no_prepare_script_runs_because_a_checkpoint_names_its_folder(name, loaded, folder):
    for place in ('data/foreign', 'foreign', '.', '../foreign'):
        Path(place).mkdir(parents=True, exist_ok=True)
        (Path(place) / 'prepare.py').write_text(PREPARE)
    loaded.checkpoint['config'] = dict(dataset=name)
    refused(read_text, loaded, codec_of(loaded), match='no train.bin.*--data')
    assert not Path('ran').exists()
    # The same folder, named by a person, is prepared.
    refused(read_text, loaded, codec_of(loaded), 'data/foreign', match='data/foreign')
    assert Path('ran').exists()


def test_a_checkpoint_cannot_have_a_file_read_as_its_text(loaded, folder):
    (folder / 'secret.txt').write_text(CHARS)
    loaded.checkpoint['config'] = dict(dataset=str(folder / 'secret.txt'))
    refused(read_text, loaded, codec_of(loaded), match='no train.bin')
