"""convert_mla.py as a person runs it, healing by train.py, the study: what is written, what is refused, and that nothing is half-written."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import token_files as datasets
from nanomla.core.configurator import UserError
from nanomla.training.distill import Distilled

ROOT = Path(__file__).parent.parent
LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44)
WORDS = 'to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows of outrageous fortune '


def run(script, *words):
    """The script in this process."""
    before = sys.argv, sys.excepthook
    sys.argv = [script, *map(str, words)]
    try:
        if script.endswith('.py'):
            return runpy.run_path(str(ROOT / script), run_name='__main__')
        return runpy.run_module(script, run_name='__main__')
    finally:
        sys.argv, sys.excepthook = before


def refused(match, script, *words):
    with pytest.raises(UserError, match=match) as error:
        run(script, *words)
    assert '\n' not in str(error.value)


@pytest.fixture
def source(tiny, tmp_path, monkeypatch):
    """A run's folder of a tiny model, its dataset of characters, and a working directory."""
    monkeypatch.chdir(tmp_path)
    meta = datasets.write_text(tmp_path / 'text', WORDS * 40, 'char', 'a test')

    def make(folder='src', **settings):
        model = tiny('mha', **LLAMA | dict(vocab_size=meta['vocab_size']) | settings)
        checkpoint.save(
            Path(folder) / 'ckpt.pt',
            dict(
                kind='mha',
                model_args=checkpoint.model_args(model),
                model=model.state_dict(),
                step=7,
                best_val_loss=1.5,
                meta=meta,
                config=dict(dataset=str(tmp_path / 'text')),
            ),
        )
        return model

    return make


QUICK = ('--calibration_tokens=400', '--eval_tokens=200', '--device=cpu')


def test_from_a_run_to_a_healed_model(source, tokens, capsys):
    model = source()
    run(
        'convert_mla.py',
        'src',
        '--out=mla',
        '--saving=0.75',
        '--cache_dtype=int4',
        '--rotate=True',
        *QUICK,
    )
    said = capsys.readouterr().out
    assert (
        '75.00 %' in said
        and 'the same in int4' in said
        and 'train.py config/heal_mla.py --init_from=mla --teacher=src' in said
    )
    assert sorted(os.listdir()) == ['mla', 'src', 'text'] and sorted(os.listdir('mla')) == [
        'ckpt.pt',
        'conversion.png',
    ]
    source = load.load_model('mla')
    mla, content = source.model, source.checkpoint
    history = content['conversion']
    assert (
        history['source'] == 'src'
        and history['settings']['kv_lora_rank'] + mla.config.qk_rope_head_dim == 16
        and len(history['layers']) == 2
    )
    table = history['table']
    assert (
        [row['bytes'] for row in table[:3]] == [2 * 2 * 64, 2 * 2 * (32 + 4), 2 * 2 * 16]
        and table[2]['saved'] == 0.75
        and all(row['perplexity'] > 1 for row in table)
    )
    assert (
        content['step'] == 7
        and content['meta']['tokenizer'] == 'char'
        and content['best_val_loss'] == table[2]['nats']
    )

    heal = (
        'config/heal_mla.py',
        '--init_from=mla',
        f'--dataset={content["config"]["dataset"]}',
        '--max_iters=6',
        '--batch_size=4',
        '--warmup_iters=1',
        '--compile=False',
        '--device=cpu',
        '--eval_interval=6',
    )
    run(
        'train.py',
        ROOT / heal[0],
        *heal[1:],
        '--teacher=src',
        '--out_dir=healed',
        '--train_only=kv_a_proj,kv_b_proj',
    )
    source = load.load_model('healed')
    healed, after = source.model, source.checkpoint
    assert after['conversion'] == history
    changed = {
        name
        for name, p in healed.state_dict().items()
        if not torch.equal(p, mla.state_dict()[name])
    }
    assert changed == {
        f'transformer.h.{n}.attn.{name}.weight'
        for n in range(2)
        for name in ('kv_a_proj_with_mqa', 'kv_b_proj')
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'sample.py'),
            '--out_dir=healed',
            '--device=cpu',
            '--start=to be',
            '--num_samples=1',
            '--max_new_tokens=5',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith('to be') and 'MLA' in done.stderr, (
        done.stderr
    )


def test_a_lossless_conversion_of_every_pair(source, capsys):
    source(n_kv_head=2)
    run('convert_mla.py', 'src', '--out=mla', *QUICK)
    table = checkpoint.load('mla')['conversion']['table']
    assert table[0]['nats'] == pytest.approx(table[2]['nats'], abs=1e-5) and table[2]['saved'] <= 0


def test_without_text(source, capsys):
    source(n_kv_head=2, pos='learned', norm='layernorm', act='gelu', bias=True)
    run(
        'convert_mla.py',
        'src',
        '--out=mla',
        '--calibration=none',
        '--low_rank=joint',
        '--kv_lora_rank=12',
        '--device=cpu',
    )
    assert 'perplexity' not in capsys.readouterr().out
    content = checkpoint.load('mla')
    assert content['conversion']['table'][1] == dict(
        name='MLA, rank 12 + 0 (joint)', bytes=48.0, nats=None, perplexity=None, saved=0.625
    )


def test_a_foreign_source_keeps_its_tokenizer(source, tmp_path, capsys):
    """A Llama folder with tokenizer.json: calibrated on a text file, sampled from in its words, exported with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from nanomla.checkpoints import export

    model = source(vocab_size=300)
    export.export(model, 'llama')
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(
            vocab_size=290,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.save('llama/tokenizer.json')
    Path('book.txt').write_text(WORDS * 30)
    run(
        'convert_mla.py',
        'llama',
        '--out=mla',
        '--saving=0.5',
        '--calibration=book.txt',
        '--export=hf',
        *QUICK,
    )
    assert {'tokenizer.json', 'ckpt.pt'} <= set(
        os.listdir('mla')
    ) and 'tokenizer.json' in os.listdir('hf')
    codec = load.load_model('mla').tokenizer
    assert codec.decode(codec.encode(WORDS)) == WORDS
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'sample.py'),
            '--init_from=mla',
            '--device=cpu',
            '--start=to be',
            '--num_samples=1',
            '--max_new_tokens=5',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith('to be'), done.stderr


@pytest.mark.parametrize(
    'words, match',
    [
        ((), 'say what to convert'),
        (('src',), 'say where to put it'),
        (('src', '--out=src'), 'src is there already'),
        (('nowhere', '--out=mla'), 'there is no checkpoint'),
        (('src', '--out=mla', '--export=src'), 'src is there already'),
        (('src', '--out=mla', '--kv_lora_rank=999'), 'above the full rank'),
        (('src', '--out=mla', '--rope_pairs=99'), 'rope_pairs=99'),
        (('src', '--out=mla', '--rope_pairs=2.5'), 'rope_pairs takes a whole number'),
        (('src', '--out=mla', '--saving=1.5'), 'saving=1.5'),
        (('src', '--out=mla', '--saving=0.5', '--kv_lora_rank=3'), 'give one of'),
        (('src', '--out=mla', '--saving=0.99'), 'leaves no room for a latent'),
        (
            ('src', '--out=mla', '--saving=0.9', '--rope_heads=own', '--rope_pairs=2'),
            'beside 2 pairs',
        ),
        (('src', '--out=mla', '--calibration=none'), 'needs calibration text'),
        (('src', '--out=mla', '--calibration=nowhere'), 'no such file, and no dataset'),
        (
            ('src', '--out=mla', '--calibration=short.txt'),
            'calibration=short.txt: 7 tokens are too few',
        ),
        (('src', '--out=mla', '--eval_tokens=3'), 'too few'),
        (('src', '--out=mla', '--cache_dtype=int2'), "cache_dtype='int2'"),
        (('src', '--out=mla', '--batch_size=0'), 'batch_size=0'),
        (('normed', '--out=mla'), 'QK-norm'),
        (('mla_already', '--out=mla'), 'is an MLA model already'),
        (('broken', '--out=mla'), "model_type 'qwen3'"),
        (('src', '--out=text/train.bin/x'), 'cannot write'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)
def test_bad_input(words, match, source, tiny, tmp_path):
    source()
    source('normed', qk_norm=True)
    model = tiny('mla')
    checkpoint.save(
        tmp_path / 'mla_already' / 'ckpt.pt',
        dict(kind='mla', model_args=checkpoint.model_args(model), model=model.state_dict()),
    )
    Path('short.txt').write_text('to be or')
    Path('broken').mkdir()
    Path('broken/config.json').write_text(json.dumps(dict(model_type='qwen3')))
    before = sorted(os.listdir())
    refused(
        match,
        'convert_mla.py',
        *words,
        *QUICK[:1],
        '--device=cpu',
        *(() if '--eval_tokens=3' in words else QUICK[1:2]),
    )
    assert sorted(os.listdir()) == before


def test_nothing_half_written(source, monkeypatch):
    source()
    monkeypatch.setattr(
        checkpoint,
        'save',
        lambda path, content: (_ for _ in ()).throw(UserError('cannot write: no space left')),
    )
    refused('no space left', 'convert_mla.py', 'src', '--out=mla', *QUICK)
    monkeypatch.undo()
    assert 'mla' not in os.listdir() and not [name for name in os.listdir() if 'partial' in name]


# ---------------------------------------------------------------------------------------------------
# healing


def test_distillation_is_cross_entropy_and_divergence(tiny, tokens):
    student, teacher, idx = tiny('mha', n_head=2), tiny('mha', **LLAMA), tokens(20)
    x, y = idx[:, :-1], idx[:, 1:]
    p, logq = teacher(x).softmax(-1), student(x).log_softmax(-1)
    ce, kl = student(x, y), (p * (p.log() - logq)).sum(-1).mean()
    for share in (0.0, 0.3, 1.0):
        both = Distilled(student, teacher, share)
        torch.testing.assert_close(both(x, y), (1 - share) * ce + share * kl, rtol=1e-5, atol=1e-6)
    both(x, y).backward()
    assert all(p.grad is not None for p in student.parameters()) and all(
        p.grad is None for p in teacher.parameters()
    )
    assert Distilled(teacher, teacher, 1.0)(x, y).item() == pytest.approx(0, abs=1e-6)


def test_distillation_compares_the_outputs_of_the_blocks(tiny, tokens):
    torch.manual_seed(1)
    student, teacher, idx = tiny('mla', n_head=2), tiny('mha', **LLAMA), tokens(20)
    x, y = idx[:, :-1], idx[:, 1:]
    seen = {model: [] for model in (student, teacher)}
    for model in seen:
        for block in model.transformer.h:
            block.register_forward_hook(
                lambda block, args, out, model=model: seen[model].append(out)
            )
    plain = Distilled(student, teacher, 0.3)(x, y)
    away = [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(*seen.values())]
    assert len(away) == student.config.n_layer > 1 and min(away) > 0
    both = Distilled(student, teacher, 0.3, hidden=2.0)
    torch.testing.assert_close(
        both(x, y), plain + 2.0 * sum(away) / len(away), rtol=1e-5, atol=1e-6
    )
    both(x, y).backward()
    assert all(p.grad is not None for p in student.parameters()) and all(
        p.grad is None for p in teacher.parameters()
    )
    assert Distilled(teacher, teacher, 1.0, hidden=2.0)(x, y).item() == pytest.approx(0, abs=1e-6)


def test_what_cannot_teach_or_train_is_refused(source):
    source()
    source('other', vocab_size=77)
    source('narrow', block_size=8)
    source('deep', n_layer=3)
    data = f'--dataset={Path("text").resolve()}'
    for words, match in (
        (('--teacher=other',), 'knows 77 tokens'),
        (('--teacher=narrow',), 'reads 8 tokens at a time'),
        (('--train_only=nothing',), 'no parameter has such a name'),
        (('--distill=2',), 'distill=2.0 must be at least 0 and at most 1'),
        (('--teacher=nowhere',), 'there is no checkpoint'),
        (('--teacher=deep', '--distill_hidden=1'), 'has 3 layers of width'),
        (('--teacher=src', '--distill_hidden=-1'), 'distill_hidden=-1.0 must be at least 0'),
    ):
        refused(
            match,
            'train.py',
            '--init_from=src',
            '--out_dir=o',
            data,
            '--device=cpu',
            '--compile=False',
            *words,
        )
    assert not Path('o').exists()


@pytest.mark.gpu
def test_on_a_gpu(source, tiny, tokens):
    """Converted there as here, down to the signs of the latent's channels, which int4 sees (any sign would move it by 1e-2), healed there with a teacher, step by step and as a CUDA graph."""
    model = source(n_kv_head=2)
    for device in ('cpu', 'cuda'):
        run(
            'convert_mla.py',
            'src',
            f'--out={device}',
            '--saving=0.5',
            '--cache_dtype=int4',
            *QUICK[:2],
            f'--device={device}',
        )
    a, b = (checkpoint.load(device)['conversion']['table'] for device in ('cpu', 'cuda'))
    assert [x['nats'] for x in a] == pytest.approx([x['nats'] for x in b], abs=1e-3) and [
        x['bytes'] for x in a
    ] == [x['bytes'] for x in b]
    losses = []
    for graph in (False, True):
        run(
            'train.py',
            ROOT / 'config/heal_mla.py',
            '--init_from=cuda',
            f'--dataset={Path("text").resolve()}',
            '--max_iters=8',
            '--batch_size=4',
            '--warmup_iters=1',
            '--compile=False',
            '--device=cuda',
            '--dtype=float32',
            '--eval_interval=8',
            f'--cuda_graph={graph}',
            '--teacher=src',
            '--distill_hidden=1',
            f'--out_dir=healed-{graph}',
        )
        losses.append(checkpoint.load(f'healed-{graph}')['best_val_loss'])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and losses[0] < a[2]['nats']


@pytest.mark.slow
def test_the_study_goes_on_where_it_was(tmp_path):
    (tmp_path / 'text.txt').write_text(WORDS * 400)
    words = [
        sys.executable,
        str(ROOT / 'nanomla.comparison.conversion_study'),
        f'--text={tmp_path}/text.txt',
        f'--out={tmp_path}/study',
        '--seeds=1',
        '--kinds=mha,gqa',
        '--savings=0.75',
        '--heal_savings=0.75',
        '--n_layer=2',
        '--n_head=4',
        '--n_kv_head=2',
        '--n_embd=32',
        '--block_size=32',
        '--batch_size=4',
        '--source_steps=40',
        '--heal_steps=2',
        '--device=cpu',
        '--calibration_tokens=2000',
        '--eval_tokens=500',
    ]
    first = subprocess.run(words, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / 'study' / 'results.jsonl').read_text().splitlines()
    assert (
        (tmp_path / 'study' / 'study.png').exists()
        and len(lines) == len(set(lines))
        and 'MHA: source perplexity' in first.stdout
    )
    assert {row['kind'] for row in map(json.loads, lines) if row['what'] == 'control'} == {
        'mha',
        'gqa',
    }
    (tmp_path / 'study' / 'results.jsonl').write_text('\n'.join(lines[:-3]) + '\n{"kind": "mh')
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0 and len(
        (tmp_path / 'study' / 'results.jsonl').read_text().splitlines()
    ) == len(lines), again.stderr
    other = [
        *(word for word in words if 'kinds' not in word),
        '--kinds=mha',
        '--heal_muon_lr=0.01',
        '--fold=2',
        '--rope_pairs=1',
        '--compare=False',
    ]
    mixed = subprocess.run(other, capture_output=True, text=True)
    assert mixed.returncode == 2 and 'healed with other settings' in mixed.stderr
    sources = (tmp_path / 'study' / 'mha-1' / 'source' / 'ckpt.pt').stat().st_mtime_ns
    apart = subprocess.run(
        [*other, f'--results={tmp_path}/other.jsonl'], capture_output=True, text=True
    )
    assert (
        apart.returncode == 0
        and (tmp_path / 'study' / 'mha-1' / 'source' / 'ckpt.pt').stat().st_mtime_ns == sources
    ), apart.stderr
    rows = [json.loads(line) for line in (tmp_path / 'other.jsonl').read_text().splitlines()]
    healed = [row for row in rows if row['what'] == 'healed']
    assert [
        (row['way']['fold'], row['way']['rope_pairs'], row['healing']['muon_lr']) for row in healed
    ] == [(2, 1, 0.01)]
    assert next(row['rope'] for row in rows if row['what'] == 'converted') == 2 and not any(
        row['what'] == 'control' for row in rows
    )


def test_a_study_is_drawn_from_several_files(tmp_path, monkeypatch, capsys):
    """Seeds of other machines; what must hold is counted by seed, whatever is missing."""
    monkeypatch.chdir(tmp_path)
    balanced, joint = (
        dict(rope='turn', rope_heads='shared', low_rank=low_rank)
        for low_rank in ('balanced', 'joint')
    )
    theirs = dict(rope='2-norm', rope_heads='own', low_rank='joint')
    for seed, worse in ((1, 1.0), (2, 1.5)):

        def row(what, perplexity, **more):
            return (
                json.dumps(
                    dict(
                        kind='mha',
                        seed=seed,
                        what=what,
                        perplexity=perplexity,
                        commit='x',
                        device='y',
                    )
                    | more
                )
                + '\n'
            )

        with open(f'{seed}.jsonl', 'w') as file:
            file.write(
                row('source', 2.0, steps=100)
                + row('control', 1.99, steps=5)
                + row('converted', 2.2, saving=0.5, way=theirs)
                + row('converted', 2 + 0.04 * worse, saving=0.5, way=balanced)
                + row('healed', 2.01 * worse, saving=0.5, way=balanced, steps=5)
                + row('healed, int4', 2.02 * worse, saving=0.5, way=balanced, steps=5)
            )
            file.write(
                row('converted', 2.03, saving=0.25, way=balanced)
                + row('converted', 2.1, saving=0.5, way=joint)
                if seed == 2
                else ''
            )
    with pytest.raises(SystemExit) as end:
        run(
            'nanomla.comparison.conversion_study',
            '--draw_only=True',
            '--results=1.jsonl,2.jsonl',
            '--picture=both.png',
        )
    told = capsys.readouterr().out
    assert not end.value.code and Path('both.png').stat().st_size > 10_000
    assert (
        '2.50 (2.00–3.00)' in told
        and 'as many steps: -0.50 (-0.50 to -0.50)' in told
        and 'perplexity falls with rank: 1 of 1' in told
    )
    assert (
        "of MHA2MLA's: 30.00 %; healed, above the source: 50.75 %; int4, above healed: 0.50 %"
        in told
    )
    refused('can only be drawn', 'nanomla.comparison.conversion_study', '--results=1.jsonl,2.jsonl')
    refused(
        'cannot read 3.jsonl',
        'nanomla.comparison.conversion_study',
        '--draw_only=True',
        '--results=1.jsonl,3.jsonl',
    )
