"""find_induction_heads.py and what it needs of train.py: kept checkpoints, repeated texts."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, exit_code, hf_gpt2, run, words
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, MultiHeadAttention
from nanomla.checkpoints import export
from nanomla.checkpoints import native as checkpoint
from nanomla.core import token_files as dataset
from nanomla.core import tokenizers
from nanomla.core.configurator import UserError
from nanomla.heads import patterns, report, study, subject
from nanomla.heads.report import ReportSettings, TrialSettings
from nanomla.heads.subject import LoadOptions, load_subject

TINY = dict(
    dataset='repeats',
    device='cpu',
    compile=False,
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=40,
    batch_size=4,
    gradient_accumulation_steps=1,
    max_iters=6,
    eval_interval=3,
    eval_iters=2,
    log_interval=1,
    warmup_iters=2,
    learning_rate=1e-2,
    sample_tokens=0,
    keep_checkpoints=4,
    always_save_checkpoint=True,
    mlp=False,
)
MLA = dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, 'DATA', tmp_path / 'data')


@pytest.fixture
def repeats(home, tmp_path):
    run('data/repeats/prepare.py', ['--documents=300', f'--out={tmp_path}/data/repeats'])


def train(**changes):
    return run('train.py', words(TINY | changes))


def find(*arguments):
    return run('find_induction_heads.py', ['--device=cpu', '--texts=8', *arguments])


# -------------------------------------------------------------------------------------------------
# repeated texts


@pytest.mark.parametrize('shortest, longest', [(3, 9), (7, 7)])
def test_every_document_has_its_text_twice(shortest, longest, tmp_path, capsys):
    run(
        'data/repeats/prepare.py',
        [
            '--documents=200',
            '--symbols=12',
            f'--shortest={shortest}',
            f'--longest={longest}',
            '--out=two',
        ],
    )
    meta = dataset.read_meta('two')
    codec, lengths = tokenizers.Tokenizer(meta), set()
    assert (
        meta['vocab_size'] == 13
        and meta['chars'][0] == '\n'
        and meta['val_tokens'] < meta['train_tokens']
    )
    texts = codec.decode(np.fromfile('two/train.bin', meta['dtype']).tolist()).split('\n')[1:]
    assert len(texts) == 200 and len(set(texts)) > 190
    for text in texts:
        half = text[: len(text) // 2]
        assert text == half * 2 and len(set(half)) == len(half)
        lengths.add(len(half))
    assert lengths == set(range(shortest, longest + 1)) and '200' not in capsys.readouterr().err
    before = Path('two/train.bin').read_bytes()
    run(
        'data/repeats/prepare.py',
        [
            '--documents=200',
            '--symbols=12',
            f'--shortest={shortest}',
            f'--longest={longest}',
            '--out=two',
        ],
    )
    assert Path('two/train.bin').read_bytes() == before


@pytest.mark.parametrize(
    'wrong, what',
    [
        ('--symbols=1', 'symbols=1 must be'),
        ('--longest=99', 'L must be'),
        ('--shortest=0', 'L must be'),
        ('--documents=0', 'at least 1'),
    ],
)
def test_texts_that_cannot_be(wrong, what, capsys):
    assert exit_code('data/repeats/prepare.py', [wrong, '--out=two']) == 2
    assert what in capsys.readouterr().err and not Path('two').exists()


# -------------------------------------------------------------------------------------------------
# checkpoints on the way


@given(st.integers(0, 40), st.integers(1, 100000))
@settings(max_examples=100, deadline=None)
def test_steps_to_keep(count, last):
    steps = checkpoint.steps_to_keep(count, last)
    assert (
        len(steps) <= count
        and (not count or max(steps) == last)
        and (count < 2 or 0 in steps)
        and min(steps, default=0) >= 0
    )
    if count > 5 and last >= 10000:
        ratios = [b / a for a, b in zip(sorted(steps)[1:], sorted(steps)[2:])]
        assert len(steps) == count and max(ratios) / min(ratios) < 1.1


def test_a_run_keeps_its_way(repeats, capsys):
    train(max_iters=20, keep_checkpoints=5)
    kept = checkpoint.step_files('out')
    steps = [int(path.stem[5:]) for path in kept]
    assert steps == sorted(checkpoint.steps_to_keep(5, 20)) and steps[0] == 0 and steps[-1] == 20
    contents = [checkpoint.load(path) for path in kept]
    assert [content['step'] for content in contents] == steps and all(
        'optimizers' not in content for content in contents
    )
    weights = [content['model']['transformer.h.0.attn.c_attn.weight'] for content in contents]
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:]))
    last = checkpoint.load('out/last.pt')['model']
    assert all(torch.equal(last[key], value) for key, value in contents[-1]['model'].items())
    assert (
        all('mlp' not in key and 'ln_2' not in key for key in last)
        and contents[0]['model_args']['mlp'] is False
    )
    train(max_iters=3, keep_checkpoints=1)
    assert [path.name for path in checkpoint.step_files('out')] == ['step-000003.pt']
    assert [path.name for path in checkpoint.step_files('out/previous')] == [
        path.name for path in kept
    ]
    train(max_iters=3, keep_checkpoints=0)
    assert not checkpoint.step_files('out') and [
        path.name for path in checkpoint.step_files('out/previous')
    ] == ['step-000003.pt']


def test_without_it_nothing_is_kept(repeats):
    train(keep_checkpoints=0)
    assert not checkpoint.step_files('out')


def test_attention_alone_cannot_go_elsewhere(tiny):
    model = tiny(mlp=False, pos='rope', norm='rmsnorm', act='swiglu')
    assert not any('mlp' in name or 'ln_2' in name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match='mlp=False'):
        export.export(model, 'elsewhere')
    x = torch.randn(1, 5, 32)
    block, rope = model.transformer.h[0], model.embed(torch.zeros(1, 5, dtype=torch.long))[1]
    torch.testing.assert_close(block(x, rope), x + block.attn(block.ln_1(x), rope))


# -------------------------------------------------------------------------------------------------
# the script


def test_from_a_run_to_its_files(repeats, capsys):
    pytest.importorskip('matplotlib')
    train(out_dir='a')
    train(out_dir='b', **MLA, mlp=True)
    capsys.readouterr()
    find('--out_dir=a,b', '--sweep=b', '--out=heads', '--latents=True', '--prompt=ABCABC')
    told = capsys.readouterr().out
    assert 'a: MHA' in told and 'b: MLA' in told and 'step 6' in told and 'val loss' in told
    written = json.loads(Path('heads/heads.json').read_text())
    a, b = written['models']
    assert (
        (a['kind'], b['kind']) == ('MHA', 'MLA')
        and a['trained']
        and a['step'] == 6
        and a['tokens'] == 6 * 4 * 40
    )
    assert (
        a['tokens_text'] == ['\n', *'ABCABC']
        and len(a['scores']) == 4
        and a['repeats']['row_sums'] < 1e-6
        and a['repeats']['rebuilt'] < 1e-5
    )
    assert all(
        isinstance(e[f'{way}_ablation'], float)
        for e in a['scores']
        for way in ('zero', 'mean', 'pattern')
    )
    assert 'mla_split' in b and 'mla_split' not in a and len(b['latents']['likeness']) == 2
    assert a['val_loss'] == pytest.approx(checkpoint.load('a')['best_val_loss'])
    assert (
        len(a['loss_by_position']['x'])
        == len(a['loss_by_position']['repeated'])
        == 2 * a['repeats']['L']
    )
    (swept,) = written['checkpoints']
    assert swept['step'] == sorted(checkpoint.steps_to_keep(4, 6)) and np.shape(
        swept['scores']
    ) == (len(swept['step']), 2, 2)
    assert swept['tokens'] == [160 * step for step in swept['step']]
    last = [e['induction']['score'] for e in b['scores']]
    if checkpoint.load('b')['step'] == 6:  # the best is the last
        assert np.ravel(swept['scores'][-1]) == pytest.approx(last, abs=1e-3)
        best = max(e['on_text']['gap'] for e in b['scores'])
        assert swept['max_text'][-1] == pytest.approx(best, abs=1e-4)
        for name in ('text_repeat_loss', 'text_control_loss'):
            assert swept[name][-1] == pytest.approx(b[name], abs=1e-3)
    check_text_scores(swept, load_subject(checkpoint.step_files('b')[-1]))
    assert isinstance(b['group_ablation']['text_loss'], float) and all(
        isinstance(e['on_text']['zero_ablation'], float) for e in b['scores']
    )
    assert b['repeats']['ids'] == 64
    rows = list(csv.DictReader(Path('heads/heads.csv').open()))
    assert (
        len(rows) == 8
        and float(rows[0]['induction_score']) == a['scores'][0]['induction']['score']
        and rows[4]['model'] == 'b'
    )
    assert len(list(csv.DictReader(Path('heads/composition.csv').open()))) == 2 * 3 * 4
    assert len(list(csv.DictReader(Path('heads/checkpoints.csv').open()))) == len(swept['step'])
    for picture in ('heads.png', 'training.png', 'latents.png'):
        assert Path('heads', picture).read_bytes()[:4] == b'\x89PNG'
    assert 'ABC' in Path('heads/heads.html').read_text() and not list(
        Path('heads').glob('*.partial')
    ) + list(Path('heads').glob('*.tmp'))


def check_text_scores(swept, last):
    """The last numbers of a sweep on held-out text are those of its last checkpoint."""
    trial = report.held_out_trials_for(last, TrialSettings(texts=8))
    L, _ = patterns.trial_lengths(40, 64)
    heads, repeated, control = patterns.score_heads(last.model, trial)
    assert swept['text_heads'][-1] == sum(e['label'] == 'induction' for e in heads)
    assert swept['max_text'][-1] == max(e['induction']['gap'] for e in heads)
    for name, losses in dict(text_repeat_loss=repeated, text_control_loss=control).items():
        mean = losses[:, L + 1 : 2 * L].mean().item()
        assert swept[name][-1] == pytest.approx(mean, abs=1e-4)


@pytest.mark.slow
def test_a_study_trains_what_is_missing(repeats, capsys, monkeypatch):
    pytest.importorskip('matplotlib')
    (Path('data/repeats/prepare.py')).write_text('')
    config = ''.join(
        f'{key} = {value!r}\n'
        for key, value in (
            TINY | dict(dataset=str(Path('data/repeats').resolve()), max_iters=9)
        ).items()
        if key != 'device'
    )
    Path('induction.py').write_text(config)
    Path('induction_small.py').write_text('max_iters = 3\n')
    find('--study=induction.py+induction_small.py', '--seeds=1', '--out=study', '--causes=none')
    lines = [json.loads(line) for line in Path('study/study.jsonl').read_text().splitlines()]
    assert (
        [line['event'] for line in lines] == ['settings', 'run', 'variant']
        and lines[-1]['seeds'] == 1
        and lines[-1]['variant'] == 'small'
    )
    assert (
        json.loads(Path('study/small-1/log.jsonl').read_text().splitlines()[0])['config']['seed']
        == 1
        and Path('study/study.png').exists()
    )
    stamp = Path('study/small-1/ckpt.pt').stat().st_mtime_ns
    find('--study=induction.py+induction_small.py', '--seeds=1', '--out=study', '--causes=none')
    assert Path('study/small-1/ckpt.pt').stat().st_mtime_ns == stamp


def test_summary_of_seeds():
    def seed(gaps):
        return dict(
            variant='a',
            kind='MHA',
            params=1,
            tokens=[0, 10, 20],
            max_induction=gaps,
            repeat_loss=[4, 3, 2.5],
        )

    (line,) = study.summarize([seed([0, 0.6, 0.9]), seed([0, 0.1, 0.7]), seed([0, 0.1, 0.2])])
    assert (
        line['seeds'],
        line['formed'],
        line['first'],
        line['last'],
        line['least'],
        line['most'],
    ) == (3, 2, 10, 20, 0.2, 0.9) and line['mean'] == 0.6


@pytest.mark.parametrize('make', ['gpt2', 'llama', 'deepseek'])
def test_other_peoples_models_have_heads_as_well(make, tiny, tmp_path):
    pytest.importorskip('transformers')
    if make == 'gpt2':
        hf_gpt2().save_pretrained('theirs')
    else:
        model = tiny(
            'mla' if make == 'deepseek' else 'mha',
            norm='rmsnorm',
            act='swiglu',
            pos='rope',
            block_size=64,
            **(dict(bias=False) if make == 'deepseek' else dict(n_kv_head=2)),
        )
        export.export(model, 'theirs')
    theirs = load_subject('theirs')
    assert theirs.trained and theirs.model.stream == torch.float32
    assert theirs.kind == dict(gpt2='MHA', llama='GQA', deepseek='MLA')[make]
    found = report.examine(theirs, ReportSettings(texts=8))
    assert (
        found['step'] is None
        and len(found['scores']) == found['layers'] * found['heads']
        and found['repeats']['rebuilt'] < 1e-4
    )
    with pytest.raises(UserError, match='no tokenizer'):
        theirs.encode('text')


def test_tokens_are_those_the_data_uses(repeats):
    train(out_dir='a')
    found = load_subject('a')
    meta = checkpoint.load('a')['meta']
    assert found.vocabulary.begin == 0
    assert found.vocabulary.usable.tolist() == list(range(1, 65))
    assert found.vocabulary.text_of(torch.tensor([0, 1])) == ['\n', meta['chars'][1]]
    val = np.fromfile('data/repeats/val.bin', np.uint16)
    assert torch.equal(found.vocabulary.held_out, torch.from_numpy(val.astype(np.int64)))
    assert found.encode('AB').tolist() == [0, *tokenizers.Tokenizer(meta).encode('AB')]

    def usable(often=1):
        subject.tokens_in.cache_clear()
        return load_subject('b', LoadOptions(often=often)).vocabulary.usable.tolist()

    few = np.tile([0, *range(5, 25)], 30).astype(np.uint16)  # a part of the same vocabulary
    for split in ('train', 'val'):
        few.tofile(f'data/repeats/{split}.bin')
    Path('b').mkdir()
    shutil.copy('a/ckpt.pt', 'b/ckpt.pt')
    assert usable() == list(range(5, 25))
    np.concatenate([few, [7, 7, 9]]).astype(np.uint16).tofile('data/repeats/val.bin')
    assert usable(often=61) == [7, 9]  # both splits count
    assert usable(often=62) == [7]
    shutil.rmtree('data')
    assert load_subject('b').vocabulary.held_out is None
    assert usable() == list(range(1, 65))
    with pytest.raises(UserError, match='counts tokens in the text of b, which is not here'):
        usable(often=2)


class Gated(MultiHeadAttention):
    """An attention of somebody else: MHA with a gate on what it writes."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.gate = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rope, context=None):
        return super().forward(x, rope, context) * self.gate(x).sigmoid()


class GatedGPT(GPT):
    Attention = Gated


class OwnKernel(MultiHeadAttention):
    """One whose patterns nobody can see."""

    def attend(self, q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class HiddenGPT(GPT):
    Attention = OwnKernel


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(checkpoint.MODELS, 'gated', GatedGPT)
    monkeypatch.setitem(checkpoint.MODELS, 'hidden', HiddenGPT)


def test_a_registered_attention_has_scores_and_its_own_name(registered, repeats, capsys):
    train(out_dir='a', attention='gated')
    capsys.readouterr()
    find('--out_dir=a', '--sweep=a', '--out=heads')
    printed = capsys.readouterr().out
    assert 'a: gated, ' in printed and printed.count('no circuits for this attention') == 1
    (model,) = json.loads(Path('heads/heads.json').read_text())['models']
    assert model['kind'] == 'gated' and model['composition'] == model['paths'] == []
    assert len(model['scores']) == 4 and 'mla_split' not in model
    for entry in model['scores']:
        assert 0 <= entry['induction']['score'] <= 1 and entry['copying'] is None
        assert isinstance(entry['zero_ablation'], float)
    assert '"kind":"gated"' in Path('heads/heads.html').read_text()


def test_an_attention_without_patterns_is_refused_by_name(registered, repeats, capsys):
    train(out_dir='a', attention='hidden')
    capsys.readouterr()
    assert exit_code('find_induction_heads.py', ['--device=cpu', '--out_dir=a']) == 2
    assert 'OwnKernel shows no pattern' in capsys.readouterr().err


def test_what_is_no_trained_model_is_refused(repeats, capsys):
    train(out_dir='a')
    for arguments, what in (
        (['--out_dir=nothing'], 'there is no nothing/ckpt.pt'),
        (['--init_from=nothing.pt'], 'there is no checkpoint'),
        (['--init_from=a/step-000000.pt'], 'was never trained'),
        ([], 'which model?'),
        (['--sweep=nothing'], 'holds no checkpoints'),
        (['--out_dir=a', '--causes=some'], 'is not known'),
        (['--out_dir=a', '--texts=2'], 'texts=2'),
        (['--out_dir=a', '--prompt=ÄÖ'], 'never seen'),
        (['--out_dir=a', '--latents=True'], 'latents of MLA'),
        (['--out_dir=a', '--copying=True'], 'single tokens'),
        (['--out_dir=a', '--dataset=nothing'], 'is not the text of'),
        (['--out_dir=a', '--threshold=2'], 'more than 0 and less than 1'),
    ):
        assert (
            exit_code('find_induction_heads.py', ['--device=cpu', '--out=heads', *arguments]) == 2
        ), arguments
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and what in said[0], said
    assert not Path('heads/heads.json').exists()
    find('--init_from=a/step-000000.pt', '--untrained=True', '--out=heads', '--causes=none')
    model = json.loads(Path('heads/heads.json').read_text())['models'][0]
    assert (
        not model['trained']
        and model['val_loss'] is None
        and 'untrained' in capsys.readouterr().out
    )


# -------------------------------------------------------------------------------------------------
# what the configs promise


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')

    def make(name, *more):
        out = folder / name
        if not out.exists():
            run(
                'train.py',
                [
                    str(ROOT / 'config/induction.py'),
                    str(ROOT / f'config/induction_{name}.py'),
                    '--device=cpu',
                    '--seed=1',
                    f'--out_dir={out}',
                    f'--dataset={folder / "texts"}',
                    *more,
                ],
            )
        return report.examine(load_subject(out))

    run('data/repeats/prepare.py', [f'--out={folder}/texts'])
    return make


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mha_rope', 'mla'])
def test_two_layers_grow_induction_heads(name, trained):
    found = trained(name)
    costs = found['group_ablation']
    assert max(e['induction']['gap'] for e in found['scores'] if e['label'] == 'induction') > 0.6
    assert costs['induction_zero'] >= 2 and found['repeat_loss'] < 1 < found['control_loss']
    assert (
        costs['previous_pattern'] < (0.1 if name == 'mha_rope' else 0.2) * costs['previous_zero']
    )  # MLA's values read that head, too
    assert costs['previous_to_induction_K'] > 5 * max(
        costs['previous_to_induction_Q'], costs['previous_to_induction_V']
    )


@pytest.mark.slow
def test_one_layer_does_not(trained):
    found = trained('one_layer')
    assert max(
        e['induction']['gap'] for e in found['scores']
    ) < 0.1 and not patterns.heads_with_label(found['scores'], 'induction')


@pytest.mark.slow
def test_the_trap_is_called_positional(trained, tmp_path):
    run('data/repeats_fixed/prepare.py', [f'--out={tmp_path}/fixed'])
    found = trained('trap', f'--dataset={tmp_path}/fixed')
    assert patterns.heads_with_label(
        found['scores'], 'positional'
    ) and not patterns.heads_with_label(found['scores'], 'induction')
    assert (
        max(e['positional']['score'] for e in found['scores'])
        > 0.5
        > max(e['induction']['gap'] for e in found['scores']) + 0.4
    )
