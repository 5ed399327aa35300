"""eval.py from end to end: on tiny random checkpoints, run in this process as a person runs it."""

import csv
import json
import math
import random
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import token_files as dataset
from nanomla.core import tokenizers
from nanomla.core.configurator import UserError
from nanomla.evals import scoreboard
from nanomla.evals.scoring import Scorer

ROOT = Path(__file__).parent.parent
CHARS = '\n abcdefghijklmnopqrstuvwxyz.,:Té' + 'ABDFGHKLMNPRSVWZ'
META = dict(
    tokenizer='char', chars=CHARS, vocab_size=len(CHARS), source='Some tale', dtype='uint16'
)
TALE = ''.join(random.Random(0).choices('abcdefghij é.\n', k=1200))


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test in a folder of its own with a dataset 'tale', on one thread, and no trace of configure() afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, 'DATA', tmp_path / 'data')
    monkeypatch.setattr(machine, 'commit', lambda: 'abc1234')
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path / 'data' / 'tale'
    with dataset.TokenWriter(folder, len(CHARS)) as files:
        ids = tokenizers.Tokenizer(META).encode_array(TALE)
        files.add('train', ids[:900])
        files.add('val', ids[900:])
        files.publish(dict(META))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tiny):
    """saved(folder, kind, **settings) -> a checkpoint of a tiny model trained on 'tale' in `folder`."""

    def save(folder='out', kind='mha', meta=META, **settings):
        model = tiny(kind, **dict(vocab_size=meta['vocab_size'], pos='rope') | settings)
        checkpoint.save(
            f'{folder}/ckpt.pt',
            dict(
                kind=kind,
                model_args=checkpoint.model_args(model),
                model=model.state_dict(),
                step=7,
                best_val_loss=1.5,
                meta=meta,
                config=dict(dataset='tale'),
            ),
        )
        return model

    return save


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """evaluate(*arguments) -> (stdout, stderr, records of results.json), on the CPU."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['eval.py', '--device=cpu', *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / 'eval.py'), run_name='__main__')
        out_dir = next(
            (a.partition('=')[2] for a in arguments if a.startswith('--out_dir=')), 'out-evaluate'
        )
        return *capsys.readouterr(), json.loads(Path(out_dir, 'results.json').read_text())

    return run


def size_of_png(path):
    data = Path(path).read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    return struct.unpack('>II', data[16:24])


def loss_by_hand(model, ids, context, stride):
    """Mean nats of ids[1:], each token in a pass of its own."""
    nats = []
    for t in range(1, len(ids)):
        begin = (
            0
            if t <= context
            else min(context + stride * -(-(t - context) // stride), len(ids) - 1) - context
        )
        with torch.no_grad():
            nats.append(-model(torch.tensor([ids[begin:t]]))[0, -1].log_softmax(-1)[ids[t]].item())
    return sum(nats) / len(nats)


# ---------------------------------------------------------------------------------------------------
# perplexity


def test_models_and_formats_in_one_table(saved, evaluate):
    models = dict(a=saved('a'), b=saved('b', 'mla'))
    out, err, records = evaluate(
        '--models=a,b',
        '--cache=none,dense,paged',
        '--cache_dtype=auto,int8',
        '--window=2,4',
        '--chunk_size=1',
        '--page_size=16',
        '--max_tokens=80',
    )
    lines = out.splitlines()
    assert len(lines) == 1 + 2 * 7 and lines[0].split()[:2] == [
        'model',
        'kind',
    ]  # none; dense and paged: auto, and int8 with two windows
    assert [line.split()[0] for line in lines[1:]] == ['a'] * 7 + [
        'b'
    ] * 7 and 'nothing was ever read' not in err
    ids = tokenizers.Tokenizer(META).encode(TALE[900:980])
    n_bytes = len(TALE[901:980].encode())
    for record in records:
        result = record['result']
        right = loss_by_hand(models[record['model']], ids, 24, 12)
        assert result['loss'] == pytest.approx(
            right, abs=2e-2 if 'int8' in record['cache'] else 1e-5
        )
        assert (record['dequantised'] > 0) == ('int8' in record['cache'])
        assert (result['tokens'], result['bytes'], result['context'], result['stride']) == (
            79,
            n_bytes,
            24,
            12,
        )
        assert result['bits_per_byte'] == pytest.approx(result['loss'] * 79 / math.log(2) / n_bytes)
        if record['cache'] in ('dense auto', 'paged auto'):
            assert record['cache_bytes']['bytes_per_token'] == 2 * 4 * (
                64 if record['model'] == 'a' else 16
            )  # layers, fp32, width
    table = list(csv.DictReader(open('out-evaluate/results.csv')))
    assert (
        len(table) == 14
        and float(table[0]['perplexity']) == records[0]['result']['perplexity']
        and table[0]['bytes_per_token'] == ''
    )
    assert [float(row['change']) for row in table if row['cache'] == 'none'] == [0, 0]
    assert size_of_png('out-evaluate/results.png')[0] == 1600


def test_text_files_and_their_bytes(saved, evaluate):
    model = saved()
    text = 'éa bé.\n' * 12
    Path('a.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    _, _, (record,) = evaluate('--models=out', '--data=a.txt', '--stride=24')
    ids = tokenizers.Tokenizer(META).encode(text)
    assert record['result']['loss'] == pytest.approx(loss_by_hand(model, ids, 24, 24), abs=1e-5)
    assert (record['result']['tokens'], record['result']['bytes']) == (
        len(text) - 1,
        len(text.encode()) - 2,
    )  # the first character has two
    _, _, (record,) = evaluate('--models=out', '--data=a.txt', '--max_tokens=30', '--context=7')
    assert (record['result']['tokens'], record['result']['bytes']) == (
        29,
        len(text[1:30].encode()),
    ) and record['result']['context'] == 7
    saved('raw', meta=dict(tokenizer='bytes', vocab_size=256, source='x', dtype='uint16'))
    Path('b.txt').write_bytes(bytes(range(256)))
    assert evaluate('--models=raw', '--data=b.txt')[2][0]['result']['bytes'] == 255


@pytest.mark.parametrize('begins', [False, True])
def test_a_llama_with_its_own_tokenizer(begins, tiny, evaluate):
    """Pieces with a blank in front of each text, as Llama 2 has them: bytes are those of the file."""
    pytest.importorskip('tokenizers')
    from tokenizers import Tokenizer, decoders, models, normalizers

    from nanomla.checkpoints import export

    text = 'the theory of tea: thé\n' * 9
    vocab = {'<s>': 0, '</s>': 1, '<unk>': 2} | {f'<0x{b:02X}>': 3 + b for b in range(256)}
    vocab |= {
        piece: 259 + i for i, piece in enumerate(['▁', *'theoryfa:é', 'th', 'the', '▁t', '▁the'])
    }
    tok = Tokenizer(
        models.BPE(
            vocab,
            [('t', 'h'), ('th', 'e'), ('▁', 't'), ('▁', 'the')],
            byte_fallback=True,
            unk_token='<unk>',
        )
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace('▁', ' '),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(' ', 1, 0),
        ]
    )
    tok.add_special_tokens(['<s>', '</s>', '<unk>'])
    model = tiny('mha', pos='rope', norm='rmsnorm', act='swiglu', bias=False, vocab_size=320)
    export.export(model, 'llama')
    tok.save('llama/tokenizer.json')
    Path('llama/tokenizer_config.json').write_text(
        json.dumps(dict(bos_token='<s>', add_bos_token=begins))
    )
    Path('a.txt').write_text(text)
    _, _, (record,) = evaluate('--models=llama', '--data=a.txt')
    ids = tok.encode(text, add_special_tokens=False).ids
    first = tok.id_to_token(ids[0]).replace('▁', '')  # without the blank that is not in the file
    ids = [0] * begins + ids
    assert record['result']['tokens'] == len(ids) - 1
    assert record['result']['bytes'] == len(text.encode()) - (0 if begins else len(first.encode()))
    assert record['result']['loss'] == pytest.approx(loss_by_hand(model, ids, 24, 12), abs=1e-4)


# ---------------------------------------------------------------------------------------------------
# retrieval


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
        assert [(cell['length'], cell['depth']) for cell in result['cells']] == [
            (144, 0),
            (144, 1),
            (160, 0),
            (160, 1),
        ]
        assert 0 <= result['exact'] <= result['ranked'] <= result['pairwise'] <= 1 and (
            record['dequantised'] > 0.5
        ) == (record['cache'] != 'none')
    assert (
        'key value pairwise' in out
        and size_of_png('out-evaluate/needle.png')[0]
        == size_of_png('out-evaluate/key_value.png')[0]
        == 1600
    )
    plain = evaluate(
        '--models=out',
        '--tasks=needle',
        '--haystack=synthetic',
        '--lengths=160',
        '--depths=.5',
        '--trials=1',
    )[2]
    assert len(plain[0]['result']['cells']) == 1


# ---------------------------------------------------------------------------------------------------
# results that stay


def test_only_what_is_missing_is_measured_again(saved, evaluate, monkeypatch):
    saved('a'), saved('b', 'mla')
    scored = []
    score = Scorer.score

    def counting(self, *args):
        scored.append(self)
        return score(self, *args)

    monkeypatch.setattr(Scorer, 'score', counting)
    first = evaluate('--models=a', '--max_tokens=60')
    assert scored and 'a · dense auto · perplexity' in first[1]
    scored.clear()
    again = evaluate('--models=a', '--max_tokens=60')
    assert not scored and again[0] == first[0] and ' · ' not in again[1]
    with open('out-evaluate/results.jsonl', 'a') as file:
        file.write('{"key": "unfinis')  # a kill
    both = evaluate('--models=a,b', '--max_tokens=60')
    assert 'a · dense' not in both[1] and 'b · dense' in both[1] and len(both[2]) == 2
    assert len(scoreboard.read('out-evaluate/results.jsonl')) == 2
    for change in ('--max_tokens=61', '--chunk_size=3', '--stride=3', '--fresh=True'):
        assert 'a · dense' in evaluate('--models=a', change)[1]
    saved('a', n_layer=1)  # trained again
    assert 'a · dense' in evaluate('--models=a', '--max_tokens=60')[1]


def test_what_is_there_outlives_an_error(saved, evaluate):
    saved('a')
    saved('short', block_size=500)
    with pytest.raises(
        UserError, match='val.bin|tale has 300 tokens, too few for one window of 500'
    ):
        evaluate('--models=a,short')
    assert [
        record['model'] for record in scoreboard.read('out-evaluate/results.jsonl').values()
    ] == ['a']


def test_a_format_that_measures_nothing_is_told(saved, evaluate):
    saved()
    assert (
        'nothing was ever read back from its codes'
        in evaluate('--models=out', '--cache_dtype=int4', '--max_tokens=60')[1]
    )  # window 128


# ---------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    'arguments, why',
    [
        ([], 'say what to evaluate: --models='),
        (['--models=outt'], 'there is no outt'),
        (['--models=out', '--tasks='], 'say what to measure'),
        (
            ['--models=out', '--cache=sparse'],
            "cache='sparse' is not known: use none, dense, paged",
        ),
        (['--models=out', '--cache_dtype=int3'], "cache_dtype='int3' is not known"),
        (['--models=out', '--window=a'], 'window=a: write numbers with commas'),
        (['--models=out', '--window=-1'], 'window=-1 must be at least 0'),
        (['--models=out', '--data=empty.txt'], 'empty.txt is empty'),
        (
            ['--models=out', '--data=short.txt'],
            r'short.txt has 5 tokens, too few for one window of 24 .* --context=4',
        ),
        (
            ['--models=out', '--data=Q.txt'],
            "Q.txt: the text has characters this model has never seen: 'Q'",
        ),
        (['--models=out', '--data=latin.txt'], 'latin.txt cannot be read: it is not UTF-8 text'),
        (['--models=out', '--data=nowhere'], 'nowhere is neither a text file nor a dataset'),
        (['--models=out', '--data=other'], r'other holds tokens of another vocabulary \(bytes\)'),
        (['--models=out', '--context=25'], '--context=25 is more than out was made for: 24'),
        (['--models=out', '--context=8', '--stride=9'], '--stride=9 is more than the context of 8'),
        (['--models=out', '--split=test'], "split='test' is not known: use val, train"),
        (['--models=out', '--tasks=needle'], 'needle needs texts of .* tokens or more'),
        (['--models=out', '--tasks=needle', '--lengths=99'], '--lengths=99 is more than'),
        (['--models=out', '--tasks=needle', '--depths=2'], 'depths=2.0 must be at least 0 and at most 1'),
        (['--models=out', '--batch_size=0'], 'batch_size=0 must be at least 1'),
        (['--models=out', '--candidates=1'], 'candidates=1 must be at least 2'),
        (['--models=out', '--kernel=flex'], 'use --kernel=sdpa'),
        (['--models=out', '--out_dir=short.txt/x'], 'cannot write'),
    ],
)
def test_errors_are_one_clear_line(arguments, why, saved, evaluate):
    saved()
    for name, content in {
        'empty.txt': b'',
        'short.txt': b'abcde',
        'Q.txt': b'Q' * 90,
        'latin.txt': b'\xff\xfe\xfa' * 90,
    }.items():
        Path(name).write_bytes(content)
    dataset.write_text(Path('data/other'), b'abc' * 99, 'bytes', 'x')
    with pytest.raises(UserError, match=why) as caught:
        evaluate(*arguments)
    assert '\n' not in str(caught.value)
    assert not Path('out-evaluate/results.json').exists()


def test_a_bin_with_foreign_tokens(saved, evaluate):
    saved()
    np.full(300, 60000, np.uint16).tofile('data/tale/val.bin')
    with pytest.raises(UserError, match='holds token 60000, but the vocabulary has'):
        evaluate('--models=out')


# ---------------------------------------------------------------------------------------------------
# the table


def record(task, **result):
    return dict(
        task=task,
        result=result,
        model='m',
        label='m',
        cache='none',
        cache_bytes={},
        dequantised=0,
        kind='mla',
        params=1,
        dtype='float32',
    )


@pytest.mark.parametrize(
    'task, metrics, name, value',
    [
        ('piqa', dict(acc=0.6, acc_stderr=0.1, acc_norm=0.7), 'piqa acc_norm', 0.7),
        ('mmlu', {'mmlu acc': 0.25, 'mmlu acc_stderr': 0.1, 'mmlu_law acc': 0.5}, 'mmlu acc', 0.25),
        ('tag', {'a score': 1.0, 'b score': 0.5, 'a score_stderr': 9.0}, 'tag score (mean)', 0.75),
        ('my/own.yaml', dict(f1=0.5, f1_stderr=0.1), 'own f1', 0.5),
        ('longbench', {'longbench score': 0.3, 'longbench_x score': 0.1}, 'longbench score', 0.3),
    ],
)
def test_the_number_that_stands_for_a_task(task, metrics, name, value):
    assert scoreboard.headline(record(task, metrics=metrics))[:2] == (name, pytest.approx(value))
    (row,) = scoreboard.rows([record(task, metrics=metrics)])
    assert row[name] == pytest.approx(value) and name.replace('_', ' ') in scoreboard.table([row])
