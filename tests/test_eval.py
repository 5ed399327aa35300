"""eval.py from end to end: on tiny random checkpoints, run in this process as a person runs it."""

import csv
import json
import math
import random
import runpy
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from model import GPT, GPTConfig, MultiHeadAttention
from nanomla.checkpoints import native
from nanomla.core import devices, token_files
from nanomla.core.configurator import UserError
from nanomla.core.tokenizers import Tokenizer
from nanomla.evals import scoreboard
from nanomla.evals.measure import CacheFormat, EvalSettings, record_key
from nanomla.evals.scoring import Scorer

CHARS = '\n abcdefghijklmnopqrstuvwxyz.,:Té' + 'ABDFGHKLMNPRSVWZ'
META = dict(
    tokenizer='char', chars=CHARS, vocab_size=len(CHARS), source='Some tale', dtype='uint16'
)
TALE = ''.join(random.Random(0).choices('abcdefghij é.\n', k=1200))
VAL = TALE[900:]


pytestmark = pytest.mark.usefixtures('blank_pictures')


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test in a folder of its own with a dataset 'tale', on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_files, 'DATA', tmp_path / 'data')
    monkeypatch.setattr(devices, 'commit', lambda: 'abc1234')
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() sets its own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with token_files.TokenWriter(tmp_path / 'data' / 'tale', len(CHARS)) as files:
        ids = Tokenizer(META).encode_array(TALE)
        files.add('train', ids[:900])
        files.add('val', ids[900:])
        files.publish(dict(META))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tiny):
    """saved(folder, kind, **settings) -> the model of a checkpoint in `folder`, of 'tale'."""

    def save(folder='out', kind='mha', meta=META, **settings):
        settings = dict(vocab_size=meta['vocab_size'], pos='rope') | settings
        model = tiny(kind, **settings)
        checkpoint = dict(
            kind=kind,
            model_args=native.model_args(model),
            model=model.state_dict(),
            step=7,
            best_val_loss=1.5,
            meta=meta,
            config=dict(dataset='tale'),
        )
        native.save(f'{folder}/ckpt.pt', checkpoint)
        return model

    return save


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """evaluate(*arguments) -> (stdout, stderr, records of results.json), on the CPU."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['eval.py', '--device=cpu', *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / 'eval.py'), run_name='__main__')
        out, err = capsys.readouterr()
        return out, err, json.loads(Path('out-evaluate/results.json').read_text())

    return run


def width_of_png(path):
    data = Path(path).read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    width, _ = struct.unpack('>II', data[16:24])
    return width


def loss_by_hand(model, ids, context, stride):
    """Return the mean nats of ids[1:], each token in a pass of its own."""
    nats = []
    for t in range(1, len(ids)):
        begin = 0
        if t > context:
            end_of_window = context + stride * -(-(t - context) // stride)
            begin = min(end_of_window, len(ids) - 1) - context
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:t]]))[0, -1]
        nats.append(-logits.log_softmax(-1)[ids[t]].item())
    return sum(nats) / len(nats)


# -------------------------------------------------------------------------------------------------
# perplexity


@pytest.mark.full_size
def test_models_and_formats_in_one_table(saved, evaluate):
    saved('a')
    saved('b', 'mla')
    out, err, _ = evaluate(
        '--models=a,b',
        '--cache=none,dense,paged',
        '--cache_dtype=auto,int8',
        '--window=2,4',
        '--chunk_size=1',
        '--page_size=16',
        '--max_tokens=80',
    )
    header, *lines = [line for line in out.splitlines() if line and line[0] != ' ']
    assert header.split()[:2] == ['model', 'kind']
    names = [line.split()[0] for line in lines]
    lines = lines[: names.index('model')]  # where the columns that do not fit a line begin
    # none; dense and paged, each auto, and int8 with two windows
    assert [line.split()[0] for line in lines] == ['a'] * 7 + ['b'] * 7
    assert 'nothing was ever read' not in err
    table = list(csv.DictReader(open('out-evaluate/results.csv')))
    assert len(table) == 14
    assert [row['kind'] for row in table] == ['mha'] * 7 + ['mla'] * 7
    assert table[0]['bytes_per_token'] == ''
    assert [float(row['change']) for row in table if row['cache'] == 'none'] == [0, 0]
    assert width_of_png('out-evaluate/results.png') == 1600


@pytest.mark.parametrize('kind, width', [('mha', 64), ('mla', 16)])
def test_perplexity_is_that_of_the_plain_model(kind, width, saved, evaluate):
    model = saved('out', kind)
    _, _, records = evaluate(
        '--models=out',
        '--cache=none,dense,paged',
        '--cache_dtype=auto,int8',
        '--window=2',
        '--chunk_size=1',
        '--page_size=16',
        '--max_tokens=80',
    )
    ids = Tokenizer(META).encode(VAL[:80])
    n_bytes = len(VAL[1:80].encode())
    right = loss_by_hand(model, ids, 24, 12)
    for record in records:
        result, quantised = record['result'], 'int8' in record['cache']
        assert result['loss'] == pytest.approx(right, abs=2e-2 if quantised else 1e-5)
        assert (record['dequantised'] > 0) == quantised
        assert (result['tokens'], result['bytes']) == (79, n_bytes)
        assert (result['context'], result['stride']) == (24, 12)
        bits = result['loss'] * 79 / math.log(2)
        assert result['bits_per_byte'] == pytest.approx(bits / n_bytes)
        if record['cache'] in ('dense auto', 'paged auto'):
            layers, fp32 = 2, 4
            assert record['cache_bytes']['bytes_per_token'] == layers * fp32 * width


def test_text_files_and_their_bytes(saved, evaluate):
    model = saved()
    text = 'éa bé.\n' * 12
    Path('a.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    ids = Tokenizer(META).encode(text)
    _, _, (record,) = evaluate('--models=out', '--data=a.txt', '--stride=24')
    result = record['result']
    assert result['loss'] == pytest.approx(loss_by_hand(model, ids, 24, 24), abs=1e-5)
    assert result['tokens'] == len(text) - 1
    assert result['bytes'] == len(text.encode()) - 2  # the first character has two
    _, _, (record,) = evaluate('--models=out', '--data=a.txt', '--max_tokens=30', '--context=7')
    result = record['result']
    assert (result['tokens'], result['context']) == (29, 7)
    assert result['bytes'] == len(text[1:30].encode())


def test_bytes_need_not_be_text(saved, evaluate):
    saved(meta=dict(tokenizer='bytes', vocab_size=256, source='x', dtype='uint16'))
    Path('b.txt').write_bytes(bytes(range(256)))
    _, _, (record,) = evaluate('--models=out', '--data=b.txt')
    assert record['result']['bytes'] == 255


def llama_2_tokenizer():
    """Pieces with a blank in front of each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {'<s>': 0, '</s>': 1, '<unk>': 2} | {f'<0x{b:02X}>': 3 + b for b in range(256)}
    pieces = ['▁', *'theoryfa:é', 'th', 'the', '▁t', '▁the']
    vocab |= {piece: 259 + i for i, piece in enumerate(pieces)}
    merges = [('t', 'h'), ('th', 'e'), ('▁', 't'), ('▁', 'the')]
    tok = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token='<unk>'))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    strip = decoders.Strip(' ', 1, 0)
    replace = decoders.Replace('▁', ' ')
    tok.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    tok.add_special_tokens(['<s>', '</s>', '<unk>'])
    return tok


@pytest.mark.parametrize('begins', [False, True])
def test_a_llama_with_its_own_tokenizer(begins, tiny, evaluate):
    """The bytes are those of the file, without the blank in front of it."""
    from nanomla.checkpoints.export import export

    text = 'the theory of tea: thé\n' * 9
    tok = llama_2_tokenizer()
    model = tiny('mha', pos='rope', norm='rmsnorm', act='swiglu', bias=False, vocab_size=320)
    export(model, 'llama')
    tok.save('llama/tokenizer.json')
    settings = dict(bos_token='<s>', add_bos_token=begins)
    Path('llama/tokenizer_config.json').write_text(json.dumps(settings))
    Path('a.txt').write_text(text)
    _, _, (record,) = evaluate('--models=llama', '--data=a.txt')
    ids = tok.encode(text, add_special_tokens=False).ids
    n_bytes = len(text.encode())
    if begins:
        ids = [0, *ids]
    else:  # the first token is not scored
        n_bytes -= len(tok.id_to_token(ids[0]).replace('▁', '').encode())
    assert record['result']['tokens'] == len(ids) - 1
    assert record['result']['bytes'] == n_bytes
    assert record['result']['loss'] == pytest.approx(loss_by_hand(model, ids, 24, 12), abs=1e-4)


@dataclass
class GatedConfig(GPTConfig):
    gate: float = 0.5


class GatedAttention(MultiHeadAttention):
    """MHA with other mathematics: its output is scaled."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.gate = config.gate

    def forward(self, x, rope, context=None):
        return self.gate * super().forward(x, rope, context)


class GatedGPT(GPT):
    Config, Attention = GatedConfig, GatedAttention


def test_any_registered_attention_is_evaluated_as_it_is(saved, evaluate, monkeypatch):
    monkeypatch.setitem(native.MODELS, 'gated', GatedGPT)
    model = saved('out', 'gated', gate=3.0)
    _, _, records = evaluate('--models=out', '--cache=none,dense,paged', '--max_tokens=60')
    right = loss_by_hand(model, Tokenizer(META).encode(VAL[:60]), 24, 12)
    assert len(records) == 3
    for record in records:
        assert record['kind'] == 'gated'
        assert record['result']['loss'] == pytest.approx(right, abs=1e-5)


# -------------------------------------------------------------------------------------------------
# retrieval


@pytest.mark.full_size
def test_retrieval_maps_and_numbers(saved, evaluate):
    saved(block_size=160)
    out, _, records = evaluate(
        '--models=out',
        '--tasks=needle,key_value',
        '--cache=none,dense',
        '--cache_dtype=int4',
        '--window=8',
        '--lengths=144,160',
        '--depths=0,1',
        '--trials=2',
        '--candidates=3',
    )
    assert [record['task'] for record in records] == ['needle', 'key_value'] * 2
    for record in records:
        result = record['result']
        cells = [(cell['length'], cell['depth']) for cell in result['cells']]
        assert cells == [(144, 0), (144, 1), (160, 0), (160, 1)]
        assert 0 <= result['exact'] <= result['ranked'] <= result['pairwise'] <= 1
        assert (record['dequantised'] > 0.5) == (record['cache'] != 'none')
    assert 'key value pairwise' in out
    for name in ('needle', 'key_value'):
        assert width_of_png(f'out-evaluate/{name}.png') == 1600


def test_a_needle_in_sentences_about_nothing(saved, evaluate):
    saved(block_size=160)
    how = ['--haystack=synthetic', '--lengths=160', '--depths=.5', '--trials=1']
    _, _, (record,) = evaluate('--models=out', '--tasks=needle', *how)
    assert len(record['result']['cells']) == 1


def test_lengths_that_were_not_given_are_those_that_fit(saved, evaluate):
    saved(block_size=160)  # a quarter of it is too short
    _, _, (record,) = evaluate('--models=out', '--tasks=needle', '--depths=.5', '--trials=1')
    assert [cell['length'] for cell in record['result']['cells']] == [80, 160]


# -------------------------------------------------------------------------------------------------
# results that stay


@pytest.fixture
def scored(monkeypatch):
    """The scorers that have scored something."""
    scorers = []
    score = Scorer.score

    def counting(self, *args):
        scorers.append(self)
        return score(self, *args)

    monkeypatch.setattr(Scorer, 'score', counting)
    return scorers


def test_the_same_command_again_measures_nothing(saved, evaluate, scored):
    saved('a')
    first = evaluate('--models=a', '--max_tokens=60')
    assert scored
    assert 'a · dense auto · perplexity' in first[1]
    scored.clear()
    again = evaluate('--models=a', '--max_tokens=60')
    assert not scored
    assert again[0] == first[0]
    assert ' · ' not in again[1]


def test_only_what_is_missing_is_measured_after_a_kill(saved, evaluate):
    saved('a')
    saved('b', 'mla')
    evaluate('--models=a', '--max_tokens=60')
    with open('out-evaluate/results.jsonl', 'a') as file:
        file.write('{"key": "unfinis')
    _, err, records = evaluate('--models=a,b', '--max_tokens=60')
    assert 'a · dense' not in err
    assert 'b · dense' in err
    assert len(records) == 2
    assert len(scoreboard.read('out-evaluate/results.jsonl')) == 2


CHANGES = ['--max_tokens=61', '--chunk_size=3', '--stride=3', '--fresh=True']


@pytest.mark.parametrize('change', CHANGES)
def test_what_a_result_depends_on_makes_it_measured_again(change, saved, evaluate):
    saved('a')
    evaluate('--models=a', '--max_tokens=60')
    assert 'a · dense' in evaluate('--models=a', '--max_tokens=60', change)[1]


def test_a_model_trained_again_is_measured_again(saved, evaluate):
    saved('a')
    evaluate('--models=a', '--max_tokens=60')
    saved('a', n_layer=1)
    assert 'a · dense' in evaluate('--models=a', '--max_tokens=60')[1]


KEYS = dict(perplexity='a25c067fa444945f', needle='1c580a208294787d')


def test_results_of_earlier_versions_are_still_known():
    """The key of a cell is what it was at e498ffd."""
    how = dict(layout='dense', dtype='int8', window=16, page_size=64)
    settings = EvalSettings(device='cpu', max_tokens=60)
    key = record_key('a', CacheFormat('dense int8 window 16', how), 'perplexity', settings)
    assert key == KEYS['perplexity']
    key = record_key('a', CacheFormat('none', dict(layout='none')), 'needle', settings)
    assert key == KEYS['needle']


def test_what_is_there_outlives_an_error(saved, evaluate):
    saved('a')
    saved('short', block_size=500)
    with pytest.raises(UserError, match='tale has 300 tokens, too few for one window of 500'):
        evaluate('--models=a,short')
    found = scoreboard.read('out-evaluate/results.jsonl').values()
    assert [record['model'] for record in found] == ['a']
    with pytest.raises(UserError, match='^--max_tokens=60 is too few for one window of 500'):
        evaluate('--models=short', '--max_tokens=60')


def test_a_format_that_measures_nothing_is_noted(saved, evaluate):
    saved()
    _, err, _ = evaluate('--models=out', '--cache_dtype=int4', '--max_tokens=60')  # window 128
    assert 'nothing was ever read back from its codes' in err


# -------------------------------------------------------------------------------------------------
# errors

FILES = {
    'empty.txt': b'',
    'short.txt': b'abcde',
    'Q.txt': b'Q' * 90,
    'latin.txt': b'\xff\xfe\xfa' * 90,
}


@pytest.mark.parametrize(
    'arguments, why',
    [
        ([], 'say what to evaluate: --models='),
        (['--models=outt'], 'there is no outt'),
        (['--models=out', '--tasks='], 'say what to measure'),
        (['--models=out', '--cache=sparse'], "cache='sparse' is not known: use none, dense, paged"),
        (['--models=out', '--cache_dtype=int3'], "cache_dtype='int3' is not known"),
        (['--models=out', '--window=a'], 'window=a: write numbers with commas'),
        (['--models=out', '--window=-1'], 'window=-1 must be at least 0'),
        (['--models=out', '--data=empty.txt'], 'empty.txt is empty'),
        (['--models=out', '--data=short.txt'], 'short.txt has 5 tokens, too few .* --context=4'),
        (['--models=out', '--data=Q.txt'], "Q.txt: the text has characters .*: 'Q'"),
        (['--models=out', '--data=latin.txt'], 'latin.txt cannot be read: it is not UTF-8 text'),
        (['--models=out', '--data=nowhere'], 'nowhere is neither a text file nor a dataset'),
        (['--models=out', '--data=other'], r'other holds tokens of another vocabulary \(bytes\)'),
        (['--models=out', '--context=25'], '--context=25 is more than out was made for: 24'),
        (['--models=out', '--context=8', '--stride=9'], '--stride=9 is more than the context of 8'),
        (['--models=out', '--split=test'], "split='test' is not known: use val, train"),
        (['--models=out', '--tasks=needle'], 'needle needs texts of .* tokens or more'),
        (['--models=out', '--tasks=needle', '--lengths=99'], '--lengths=99 is more than'),
        (['--models=out', '--tasks=needle', '--depths=2'], 'depths=2.0 must be at least 0 and at'),
        (['--models=out', '--tasks=needle', '--depths='], 'depths: name at least one'),
        (['--models=out', '--batch_size=0'], 'batch_size=0 must be at least 1'),
        (['--models=out', '--candidates=1'], 'candidates=1 must be at least 2'),
        (['--models=out', '--kernel=flex'], 'use --kernel=sdpa'),
        (['--models=out', '--device=tpu:0'], '--device=tpu:0 is'),
        (['--models=out', '--out_dir=short.txt/x'], 'cannot write'),
    ],
)
def test_errors_are_one_clear_line(arguments, why, saved, evaluate):
    saved()
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    token_files.write_text(Path('data/other'), b'abc' * 99, 'bytes', 'x')
    with pytest.raises(UserError, match=why) as caught:
        evaluate(*arguments)
    assert '\n' not in str(caught.value)
    assert not Path('out-evaluate/results.json').exists()


def test_a_bin_with_foreign_tokens(saved, evaluate):
    saved()
    np.full(300, 60000, np.uint16).tofile('data/tale/val.bin')
    meta = json.loads(Path('data/tale/meta.json').read_text())
    without_counts = {key: meta[key] for key in meta if not key.startswith(('val_', 'train_'))}
    Path('data/tale/meta.json').write_text(json.dumps(without_counts))
    with pytest.raises(UserError, match='holds token 60000, but the vocabulary has'):
        evaluate('--models=out')
