"""The hash of a tokenizer: what decides its tokens, whatever the bytes of its file."""

import json

import pytest

from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.checkpoints.tokens.prepare import DocumentCodec


@pytest.fixture
def tokenizer_json(tmp_path):
    """tokenizer_json(change=...): a tokenizer.json of byte pairs, its content changed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['the cat sat on the mat, and then she ran. ' * 5], trainer)

    def write(change=lambda content: None, **layout):
        content = json.loads(tokenizer.to_str())
        change(content)
        path = tmp_path / 'tokenizer.json'
        path.write_text(json.dumps(content, **layout))
        return HFTokenizer([path], {})

    return write


def other_spelling(content):
    model = content['model']
    model['merges'] = [' '.join(pair) for pair in model['merges']]
    model['vocab'] = dict(reversed(model['vocab'].items()))
    content['truncation'] = dict(max_length=8, strategy='LongestFirst', stride=0, direction='Right')


def fewer_merges(content):
    content['model']['merges'].pop()


def lower_case(content):
    content['normalizer'] = dict(type='NFC')


def other_special_token(content):
    content['added_tokens'][0]['special'] = False


def test_two_spellings_of_one_tokenizer_are_one(tokenizer_json):
    assert tokenizer_json(other_spelling, indent=3).sha256 == tokenizer_json().sha256


@pytest.mark.parametrize('change', [fewer_merges, lower_case, other_special_token])
def test_what_decides_the_tokens_changes_the_hash(change, tokenizer_json):
    assert tokenizer_json(change).sha256 != tokenizer_json().sha256


def test_special_tokens_in_a_file_are_text(tokenizer_json):
    tokenizer = tokenizer_json()
    end = tokenizer.encode('<|endoftext|>')
    assert len(end) == 1
    ids = tokenizer.encode_array('a<|endoftext|>b').tolist()
    assert end[0] not in ids
    assert tokenizer.decode(ids) == 'a<|endoftext|>b'


@pytest.mark.parametrize(
    'text',
    [
        'the cat sat on the mat,\n\n\n   and then she ran.  ' * 60,
        'thecatsatonthematandthensheran' * 80,
        '猫はマットの上に座った。' * 200,
        ' ' * 3000,
    ],
    ids=['prose', 'no blanks', 'Japanese', 'only blanks'],
)
def test_chunks_have_the_tokens_of_the_whole(text, tokenizer_json):
    codec = DocumentCodec.of(tokenizer_json())
    ids, rest = [], text
    while len(rest) > 700:
        end, begin = codec.cut(rest, 700)
        ids += codec.encode_array(rest[:end]).tolist()
        rest = rest[begin:]
    ids += codec.encode_array(rest).tolist()
    assert ids == codec.encode_array(text).tolist()
