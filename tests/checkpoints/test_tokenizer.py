"""tokenizer.json: the ids of transformers; texts come back, and what changes them is refused."""

import json
import re

import pytest
import torch
from helpers import exit_code
from llamas import add_tokenizer, hf_llama
from refusals import refused

from nanomla.checkpoints import hf
from nanomla.checkpoints.export import export
from nanomla.checkpoints.load import codec_of, load_model
from nanomla.checkpoints.tokenizer import PROBES

TEXT = 'def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n' * 3 + 'naïve 漢字  words and words'
SPECIAL = ['<bos>', '<eos>']
NAMES = ('byte_level', 'pieces', 'split', 'lower')


def pieces_tokenizer():
    """As Llama 2 has it: ▁ for a blank, one in front of each text, and <0x0A> for bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    strip = decoders.Strip(' ', 1, 0)
    replace = decoders.Replace('▁', ' ')
    tok.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    special = SPECIAL + ['<unk>'] + [f'<0x{b:02X}>' for b in range(256)]
    train(tok, special, alphabet=[])
    spec = json.loads(tok.to_str())
    spec['added_tokens'] = spec['added_tokens'][:3]  # the bytes' names are plain tokens
    return Tokenizer.from_str(json.dumps(spec))


def metaspace_tokenizer(scheme):
    """`pieces_tokenizer` as transformers 5 writes it: a pre-tokenizer puts the first ▁."""
    from tokenizers import Tokenizer

    spec = json.loads(pieces_tokenizer().to_str())
    metaspace = dict(type='Metaspace', replacement='▁', prepend_scheme=scheme, split=False)
    return Tokenizer.from_str(json.dumps(spec | dict(normalizer=None, pre_tokenizer=metaspace)))


def byte_level_tokenizer(name):
    """Byte-level BPE; 'split' drops white space, as a damaged one does, and 'lower' capitals."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tok = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = byte_level
    if name == 'split':
        split = pre_tokenizers.WhitespaceSplit()
        tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if name == 'lower':
        tok.normalizer = normalizers.Lowercase()
    tok.decoder = decoders.ByteLevel()
    train(tok, SPECIAL, alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tok


def train(tok, special, alphabet):
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 290,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tok.train_from_iterator([TEXT], trainer)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Tokenizers trained on TEXT: name -> tokenizer.json."""
    folder = tmp_path_factory.mktemp('bpe')
    made = {}
    for name in NAMES:
        tok = pieces_tokenizer() if name == 'pieces' else byte_level_tokenizer(name)
        made[name] = folder / f'{name}.json'
        tok.save(str(made[name]))
    return made


@pytest.mark.parametrize('name', ['byte_level', 'pieces'])
def test_texts_come_back(name, files, tmp_path):
    from transformers import PreTrainedTokenizerFast

    pieces = name == 'pieces'
    hf_llama(tmp_path, vocab_size=600, bos_token_id=0, eos_token_id=1)
    add_tokenizer(tmp_path, files[name], add_bos_token=pieces)
    _, tokenizer = hf.load(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    assert tokenizer.vocab_size == len(fast) <= 600
    assert tokenizer.bos == (0 if pieces else None)
    assert tokenizer.eos == {1}
    assert tokenizer.leading_blank == pieces
    before = b' ' if pieces else b''
    for text in (TEXT, *PROBES):
        ids = tokenizer.encode(text)
        assert ids == fast.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode_array(text).tolist()
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == before + text.encode()
        assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes([0, *tokenizer.encode('x')]).endswith(b'x')
    assert tokenizer.decode_bytes([599]) == b''


@pytest.mark.parametrize(
    'name, match',
    [
        ('split', 'turns .* into .*: a tokenizer that changes texts'),
        ('lower', "turns '.*The end.' into 'the end.'"),
    ],
)
def test_a_tokenizer_that_changes_texts_is_refused(name, match, files, tmp_path):
    hf_llama(tmp_path, vocab_size=600)
    add_tokenizer(tmp_path, files[name])
    refused(hf.load, tmp_path, match=match)


@pytest.mark.parametrize('scheme', ['first', 'always'])
def test_llama_2_as_transformers_5_writes_it_loses_the_blank_that_begins_a_text(
    scheme, tmp_path, capsys
):
    from transformers import PreTrainedTokenizerFast

    hf_llama(tmp_path, vocab_size=600, bos_token_id=0, eos_token_id=1)
    metaspace_tokenizer(scheme).save(str(tmp_path / 'made.json'))
    add_tokenizer(tmp_path, tmp_path / 'made.json')
    _, tokenizer = hf.load(tmp_path)
    assert 'a text that begins with a blank has the ids' in capsys.readouterr().err
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    for text in (TEXT, *PROBES):
        ids = tokenizer.encode(text)
        assert ids == fast.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text.removeprefix(' ')


@pytest.mark.parametrize(
    'ends, expected',
    [
        (None, {1}),
        (dict(eos_token_id=2), {1, 2}),
        (dict(eos_token_id=[1, 300]), {1, 300}),
        (dict(eos_token_id=None), {1}),
    ],
    ids=str,
)
def test_a_text_ends_with_what_config_or_generation_config_says(ends, expected, files, tmp_path):
    folder = tmp_path / 'folder'
    hf_llama(folder, vocab_size=600, bos_token_id=0, eos_token_id=1)
    add_tokenizer(folder, files['byte_level'])
    (folder / 'generation_config.json').unlink(missing_ok=True)
    if ends is not None:
        (folder / 'generation_config.json').write_text(json.dumps(ends))
    loaded = load_model(folder)
    assert codec_of(loaded).ends == expected
    export(loaded.model, tmp_path / 'copy', loaded.tokenizer)
    assert codec_of(load_model(tmp_path / 'copy')).ends == expected


def test_a_tokenizer_larger_than_the_model_is_refused(files, tmp_path):
    hf_llama(tmp_path)
    add_tokenizer(tmp_path, files['byte_level'])
    refused(hf.load, tmp_path, match=r'its tokenizer has \d+ tokens, the model only 50')


@pytest.mark.parametrize(
    'name, entries, match',
    [
        ('config.json', dict(eos_token_id=[[1]]), 'eos_token_id is'),
        ('generation_config.json', dict(eos_token_id=[[1]]), 'eos_token_id is'),
        ('generation_config.json', dict(eos_token_id='1'), 'eos_token_id is'),
        ('tokenizer_config.json', dict(bos_token=[1]), 'bos_token is'),
        ('tokenizer_config.json', dict(bos_token=dict(content=[1])), 'content is'),
        ('tokenizer_config.json', dict(add_bos_token=[1]), 'add_bos_token is'),
    ],
)
def test_entries_of_another_type_are_one_line(name, entries, match, files, tmp_path):
    hf_llama(tmp_path, vocab_size=600, bos_token_id=0, eos_token_id=1)
    add_tokenizer(tmp_path, files['byte_level'])
    path = tmp_path / name
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | entries))
    refused(load_model, tmp_path, match=match)


# -------------------------------------------------------------------------------------------------
# scripts on such folders


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script(name, *arguments) -> what a script writes to stdout and stderr, run in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        code = exit_code(name, ['--device=cpu', *arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def llama(files, tmp_path):
    folder = tmp_path / 'llama'
    hf_llama(folder, torch.bfloat16, vocab_size=600, bos_token_id=0, eos_token_id=1)
    add_tokenizer(folder, files['byte_level'], add_bos_token=True)
    return folder


def test_an_export_has_the_tokenizer_and_samples_the_same(llama, script, tmp_path):
    model, tokenizer = hf.load(llama)
    export(model, tmp_path / 'copy', tokenizer)
    export(model, tmp_path / 'third', llama)
    for name in ('copy', 'third'):
        assert (tmp_path / name / 'tokenizer_config.json').exists()
    shape = json.loads((tmp_path / 'third' / 'config.json').read_text())
    assert (shape['bos_token_id'], shape['eos_token_id']) == (0, 1)
    how = ['--start=  def f(x):', '--num_samples=1', '--max_new_tokens=8', '--dtype=float32']
    text, log = script('sample.py', '--init_from=llama', *how)
    assert text.startswith('  def f(x):')
    assert 'MHA, 0.06M parameters, llama' in log
    assert script('sample.py', '--init_from=copy', *how)[0] == text


def test_a_llama_is_trained_on(llama, script, tmp_path):
    (tmp_path / 'text').mkdir()
    for split in ('train', 'val'):
        ids = torch.randint(500, (400,)).to(torch.int16).numpy()
        (tmp_path / 'text' / f'{split}.bin').write_bytes(ids.tobytes())
    meta = dict(tokenizer='hf', source='a test', dtype='uint16', vocab_size=500)
    meta |= load_model('llama').tokens
    (tmp_path / 'text' / 'meta.json').write_text(json.dumps(meta))
    small = ['--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1']
    arguments = ['--init_from=llama', '--dataset=text', '--max_iters=2', '--compile=False', *small]
    out, _ = script('train.py', *arguments)
    assert (tmp_path / 'out' / 'tokenizer.json').exists()
    assert re.search('step +2', out)
    model = load_model(tmp_path / 'out').model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.act == 'swiglu'
