"""data/openorca and data/openwebtext in the tokens of a model's own tokenizer.json."""

import json
import sys

import numpy as np
import pytest
from helpers import run
from llamas import byte_tokenizer

from nanomla.checkpoints.load import dataset_tokenizer
from nanomla.checkpoints.tokens.prepare import DocumentCodec, open_model_tokenizer
from nanomla.core.configurator import UserError
from nanomla.core.files import jsonl, read_jsonl
from nanomla.core.token_files import find, read_meta, read_split
from nanomla.training.batches import Dataset

TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
EXAMPLES = [
    dict(system='', question='What is 1 plus 1?', response='2.'),
    dict(system='Answer briefly.', question='What is 2 plus 2?', response='4, of course.'),
    dict(system='', question='Spell "é".', response='é'),
]


@pytest.fixture
def codec(tmp_path, monkeypatch):
    """The codec of the tokenizer in tmp_path/model, which is the current folder's `model`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    byte_tokenizer(tmp_path / 'model', add_bos_token=True)
    (tmp_path / 'a.jsonl').write_text(jsonl(EXAMPLES))
    return DocumentCodec.of(open_model_tokenizer('model'))


def decoded(codec, split, folder='made'):
    """Return a split as text, special tokens and all."""
    ids = np.array(read_split(find(folder), split, read_meta(folder)))
    return codec.tokenizer.bpe.decode(ids.tolist(), skip_special_tokens=False)


def orca(*more):
    settings = ['--train=2', '--val=1', '--num_proc=1', '--out=made']
    run('data/openorca/prepare.py', ['--input=a.jsonl', *settings, *more])


def test_instructions_under_headings(codec):
    orca('--tokenizer=model')
    texts = []
    for row in read_jsonl('made/train.jsonl'):
        head = f'### System:\n{row["system"]}\n\n' if row['system'] else ''
        question = f'{head}### Instruction:\n{row["question"]}\n\n### Response:\n'
        texts.append(f'<bos>{question}{row["response"]}<eos>')
    assert decoded(codec, 'train') == ''.join(texts)
    assert decoded(codec, 'val').count('<eos>') == 1
    meta = read_meta('made')
    assert meta['tokenizer_sha256'] == codec.tokenizer.sha256
    assert (meta['train'], meta['val'], meta['source']) == (2, 1, 'a.jsonl (your own file)')
    assert dataset_tokenizer(find('made'), meta).sha256 == codec.tokenizer.sha256
    assert Dataset('made', 16).train_batch(0, 0, 2)[0].shape == (2, 16)


def test_instructions_by_the_chat_template_of_the_model(codec, tmp_path):
    (tmp_path / 'model/chat_template.jinja').write_text(TEMPLATE)
    orca('--tokenizer=model')
    texts = []
    for row in read_jsonl('made/train.jsonl'):
        system = f'<bos>system: {row["system"]}<eos>' if row['system'] else ''
        turns = f'<bos>user: {row["question"]}<eos><bos>assistant: {row["response"]}<eos>'
        texts.append(system + turns)
    assert decoded(codec, 'train') == ''.join(texts)
    assert (tmp_path / 'made/chat_template.jinja').read_text() == TEMPLATE


def test_without_a_tokenizer_there_are_no_tokens(codec, tmp_path):
    orca('--tokenizer=model')
    orca()
    assert sorted(path.name for path in (tmp_path / 'made').glob('*.bin')) == []
    assert json.loads((tmp_path / 'made/meta.json').read_text())['train'] == 2
    with pytest.raises(UserError, match='--tokenizer=nowhere is neither'):
        orca('--tokenizer=nowhere')


def test_openwebtext(codec, tmp_path):
    documents = [f'document {n} \n' * (n % 3) for n in range(40)]
    (tmp_path / 'd.jsonl').write_text(jsonl([dict(text=text) for text in documents]))
    settings = ['--val_fraction=0.1', '--num_proc=1', '--batch=7', '--out=made']
    run('data/openwebtext/prepare.py', ['--input=d.jsonl', '--tokenizer=model', *settings])
    both = decoded(codec, 'train') + decoded(codec, 'val')
    found = [part.removeprefix('<bos>') for part in both.split('<eos>')[:-1]]
    assert sorted(found) == sorted(text for text in documents if text)
    assert read_meta('made')['tokenizer_sha256'] == codec.tokenizer.sha256


def test_a_tokenizer_that_is_none_is_told_before_anything_is_written(codec, tmp_path):
    orca('--tokenizer=model')
    before = {path: path.read_bytes() for path in (tmp_path / 'made').iterdir()}
    with pytest.raises(UserError, match='--tokenizer=gpt2 is neither the folder nor the name'):
        orca('--tokenizer=gpt2', '--seed=1')
    assert {path: path.read_bytes() for path in (tmp_path / 'made').iterdir()} == before
