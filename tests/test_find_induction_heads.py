"""find_induction_heads.py and what it needs of train.py: kept checkpoints, repeated texts."""

import contextlib
import csv
import io
import json
import shutil
from dataclasses import dataclass
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
from nanomla.heads import ablation, patterns, report, study, subject
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
INDUCTION_STUDY = ROOT / 'assets/logs/induction_study.jsonl'


pytestmark = pytest.mark.usefixtures('blank_pictures')


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
    sizes = dict(documents=200, symbols=12, shortest=shortest, longest=longest, out='two')
    run('data/repeats/prepare.py', words(sizes))
    assert '200' not in capsys.readouterr().err
    meta = dataset.read_meta('two')
    assert meta['vocab_size'] == 13
    assert meta['chars'][0] == '\n'
    assert meta['val_tokens'] < meta['train_tokens']
    ids = np.fromfile('two/train.bin', meta['dtype']).tolist()
    texts = tokenizers.Tokenizer(meta).decode(ids).split('\n')[1:]
    assert len(texts) == 200
    assert len(set(texts)) > 190
    halves = [text[: len(text) // 2] for text in texts]
    for text, half in zip(texts, halves):
        assert text == half * 2
        assert len(set(half)) == len(half)
    assert {len(half) for half in halves} == set(range(shortest, longest + 1))


def test_the_same_seed_makes_the_same_documents(tmp_path):
    for out in ('one', 'two'):
        run('data/repeats/prepare.py', ['--documents=50', f'--out={out}'])
    assert Path('one/train.bin').read_bytes() == Path('two/train.bin').read_bytes()


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
    assert what in capsys.readouterr().err
    assert not Path('two').exists()


# -------------------------------------------------------------------------------------------------
# checkpoints on the way


@given(st.integers(0, 40), st.integers(1, 100000))
@settings(max_examples=100, deadline=None)
def test_steps_to_keep_reach_from_the_first_to_the_last(count, last):
    steps = checkpoint.steps_to_keep(count, last)
    assert len(steps) <= count
    assert min(steps, default=0) >= 0
    if count:
        assert max(steps) == last
    if count >= 2:
        assert 0 in steps


@given(st.integers(6, 40), st.integers(10000, 100000))
@settings(max_examples=100, deadline=None)
def test_steps_to_keep_are_equally_far_apart_on_a_logarithmic_axis(count, last):
    steps = sorted(checkpoint.steps_to_keep(count, last))
    assert len(steps) == count
    ratios = [later / earlier for earlier, later in zip(steps[1:], steps[2:])]
    assert max(ratios) / min(ratios) < 1.1


def test_a_run_keeps_checkpoints_through_its_training(repeats):
    train(max_iters=20, keep_checkpoints=5)
    kept = checkpoint.step_files('out')
    steps = [int(path.stem[5:]) for path in kept]
    assert steps == sorted(checkpoint.steps_to_keep(5, 20))
    assert (steps[0], steps[-1]) == (0, 20)
    contents = [checkpoint.load(path) for path in kept]
    assert [content['step'] for content in contents] == steps
    for content in contents:
        assert 'optimizers' not in content
    weights = [content['model']['transformer.h.0.attn.c_attn.weight'] for content in contents]
    for earlier, later in zip(weights, weights[1:]):
        assert not torch.equal(earlier, later)
    last = checkpoint.load('out/last.pt')['model']
    for key, value in contents[-1]['model'].items():
        assert torch.equal(last[key], value), key


def test_a_run_without_mlps_has_none_in_its_checkpoints(repeats):
    train(mlp=False)
    content = checkpoint.load('out/last.pt')
    assert content['model_args']['mlp'] is False
    for key in content['model']:
        assert 'mlp' not in key
        assert 'ln_2' not in key


def names_of(folder):
    return [path.name for path in checkpoint.step_files(folder)]


def test_the_next_run_moves_kept_checkpoints_aside(repeats):
    train(max_iters=6, keep_checkpoints=3)
    first = names_of('out')
    train(max_iters=3, keep_checkpoints=1)
    assert names_of('out') == ['step-000003.pt']
    assert [names_of(earlier) for earlier in Path('out/previous').iterdir()] == [first]
    train(max_iters=3, keep_checkpoints=0)
    assert names_of('out') == []
    assert ['step-000003.pt'] in [names_of(earlier) for earlier in Path('out/previous').iterdir()]


def test_without_it_nothing_is_kept(repeats):
    train(keep_checkpoints=0)
    assert names_of('out') == []


def test_attention_alone_cannot_go_elsewhere(tiny):
    model = tiny(mlp=False, pos='rope', norm='rmsnorm', act='swiglu')
    for name, _ in model.named_parameters():
        assert 'mlp' not in name
        assert 'ln_2' not in name
    with pytest.raises(UserError, match='mlp=False'):
        export.export(model, 'elsewhere')
    x = torch.randn(1, 5, 32)
    block, rope = model.transformer.h[0], model.embed(torch.zeros(1, 5, dtype=torch.long))[1]
    torch.testing.assert_close(block(x, rope), x + block.attn(block.ln_1(x), rope))


# -------------------------------------------------------------------------------------------------
# the script


@dataclass
class Found:
    """What a call of the script wrote and printed: an MHA model a, an MLA model b and its sweep."""

    folder: Path
    printed: str

    @property
    def report(self):
        return json.loads((self.folder / 'heads.json').read_text())

    @property
    def models(self):
        return self.report['models']

    def rows(self, name):
        return list(csv.DictReader((self.folder / name).open()))


@pytest.fixture(scope='module')
def trained_pair(tmp_path_factory):
    """A folder with the texts, and the runs a (MHA) and b (MLA with MLPs)."""
    folder = tmp_path_factory.mktemp('pair')
    run('data/repeats/prepare.py', ['--documents=300', f'--out={folder}/repeats'])
    both = dict(a={}, b=MLA | dict(mlp=True))
    for name, changes in both.items():
        settings = TINY | changes | dict(out_dir=folder / name, dataset=folder / 'repeats')
        run('train.py', words(settings))
    return folder


@pytest.fixture(scope='module')
def found(trained_pair):
    pytest.importorskip('matplotlib')
    folder = trained_pair / 'heads'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        find(
            f'--out_dir={trained_pair}/a,{trained_pair}/b',
            f'--sweep={trained_pair}/b',
            f'--out={folder}',
            '--latents=True',
            '--prompt=ABCABC',
        )
    return Found(folder, printed.getvalue())


def test_the_script_prints_what_it_looks_at_and_what_it_found(found):
    for text in ('a: MHA', 'b: MLA', 'step 6', 'val loss', 'labels: ', 'loss on the repetition'):
        assert text in found.printed
    measured = [line for line in found.printed.splitlines() if line.startswith('  ')]
    assert max(len(line) for line in measured) <= 120


def test_the_report_says_which_models_it_is_of(found, trained_pair):
    a, b = found.models
    assert (a['kind'], b['kind']) == ('MHA', 'MLA')
    assert a['trained']
    assert a['step'] == 6
    assert a['tokens'] == 6 * 4 * 40
    assert a['val_loss'] == pytest.approx(checkpoint.load(trained_pair / 'a')['best_val_loss'])
    assert b['repeats']['ids'] == 64


def test_the_report_shows_the_prompt(found):
    a, _ = found.models
    assert a['tokens_text'] == ['\n', *'ABCABC']
    assert 'ABC' in (found.folder / 'heads.html').read_text()


def test_the_report_has_every_head_with_its_ablations(found):
    for model in found.models:
        assert len(model['scores']) == 4
        for head in model['scores']:
            for method in ablation.METHODS:
                assert isinstance(head[f'{method}_ablation'], float), method
            assert isinstance(head['on_text']['zero_ablation'], float)
        assert isinstance(model['group_ablation']['text_loss'], float)


def test_the_patterns_are_those_that_the_model_computes_with(found):
    for model in found.models:
        assert model['repeats']['row_sums'] < 1e-6
        assert model['repeats']['rebuilt'] < 1e-5


def test_only_mla_has_parts_of_logits_and_latents(found):
    a, b = found.models
    assert 'mla_split' in b
    assert 'mla_split' not in a
    assert 'latents' not in a
    latents = b['latents']
    assert np.shape(latents['likeness']) == (2, 2)
    assert np.shape(latents['variance']) == (2, 8)
    assert len(latents['components_for_90_percent']) == 2


def test_losses_are_given_by_position(found):
    for model in found.models:
        losses = model['loss_by_position']
        assert len(losses['x']) == len(losses['repeated']) == 2 * model['repeats']['L']


def test_a_sweep_scores_every_checkpoint(found):
    (swept,) = found.report['checkpoints']
    assert swept['step'] == sorted(checkpoint.steps_to_keep(4, 6))
    assert swept['tokens'] == [160 * step for step in swept['step']]
    assert np.shape(swept['scores']) == (len(swept['step']), 2, 2)


def test_the_last_scores_of_a_sweep_are_those_of_the_last_checkpoint(found, trained_pair):
    (swept,) = found.report['checkpoints']
    last = load_subject(checkpoint.step_files(trained_pair / 'b')[-1])
    settings = TrialSettings(texts=8)
    heads, *_ = patterns.score_heads(last.model, report.trials_for(last, settings))
    scores = [head['induction']['score'] for head in heads]
    assert np.ravel(swept['scores'][-1]) == pytest.approx(scores, abs=1e-4)
    trial = report.held_out_trials_for(last, settings)
    heads, repeated, control = patterns.score_heads(last.model, trial)
    assert swept['text_heads'][-1] == len(patterns.heads_with_label(heads, 'induction'))
    assert swept['max_text'][-1] == max(head['induction']['gap'] for head in heads)
    L, _ = patterns.trial_lengths(40, 64)
    for name, losses in dict(text_repeat_loss=repeated, text_control_loss=control).items():
        mean = losses[:, L + 1 : 2 * L].mean().item()
        assert swept[name][-1] == pytest.approx(mean, abs=1e-4), name


def test_the_tables_have_a_row_a_head_a_pair_and_a_checkpoint(found):
    a, _ = found.models
    rows = found.rows('heads.csv')
    assert len(rows) == 8
    assert float(rows[0]['induction_score']) == a['scores'][0]['induction']['score']
    assert rows[4]['model'] == 'b'
    assert rows[4]['kind'] == 'MLA'
    assert len(found.rows('composition.csv')) == 2 * 3 * 4
    (swept,) = found.report['checkpoints']
    assert len(found.rows('checkpoints.csv')) == len(swept['step'])


def test_pictures_are_written_and_nothing_is_left_aside(found):
    for picture in ('heads.png', 'training.png', 'latents.png'):
        assert (found.folder / picture).read_bytes()[:4] == b'\x89PNG'
    assert list(found.folder.glob('*.partial')) == []
    assert list(found.folder.glob('*.tmp')) == []


@pytest.mark.draws
def test_the_figures_are_drawn_again_from_the_log_alone(found, tmp_path, capsys):
    shutil.copy(found.folder / 'heads.jsonl', tmp_path / 'log.jsonl')
    find('--plot_only=True', '--results=log.jsonl', '--out=again')
    printed = capsys.readouterr().out
    pictures = ('heads.png', 'latents.png', 'training.png')
    for picture in pictures:
        assert Path('again', picture).read_bytes() == (found.folder / picture).read_bytes()
        assert f'again/{picture}' in printed
    assert sorted(path.name for path in Path('again').iterdir()) == list(pictures)


def test_two_runs_of_one_folder_name_are_told_apart(trained_pair, tmp_path):
    for parent, name in (('one', 'a'), ('two', 'b')):
        shutil.copytree(trained_pair / name, tmp_path / parent / 'run')
    find('--sweep=one/run,two/run', '--out=heads', '--causes=none')
    written = Found(Path('heads'), '')
    runs = [(entry['name'], entry['kind']) for entry in written.report['checkpoints']]
    assert runs == [('one/run', 'MHA'), ('two/run', 'MLA')]
    assert [model['name'] for model in written.models] == ['one/run', 'two/run']
    for name in ('heads.csv', 'checkpoints.csv', 'composition.csv'):
        rows = {(row['model'], row['kind'], row['source']) for row in written.rows(name)}
        assert rows == {('one/run', 'MHA', 'one/run'), ('two/run', 'MLA', 'two/run')}, name


@pytest.mark.slow
def test_a_study_trains_what_is_missing(repeats):
    pytest.importorskip('matplotlib')
    settings = TINY | dict(dataset=str(Path('data/repeats').resolve()), max_iters=9)
    del settings['device']
    lines = [f'{key} = {value!r}\n' for key, value in settings.items()]
    Path('induction.py').write_text(''.join(lines))
    Path('induction_small.py').write_text('max_iters = 3\n')
    study_words = ['--study=induction.py+induction_small.py', '--seeds=1', '--out=study']
    find(*study_words, '--causes=none')
    rows = [json.loads(line) for line in Path('study/study.jsonl').read_text().splitlines()]
    assert [row['event'] for row in rows] == ['settings', 'run', 'variant']
    assert rows[-1]['seeds'] == 1
    assert rows[-1]['variant'] == 'small'
    log = Path('study/small-1/log.jsonl').read_text().splitlines()
    assert json.loads(log[0])['config']['seed'] == 1
    assert Path('study/study.png').exists()
    # What is there is not trained again.
    stamp = Path('study/small-1/ckpt.pt').stat().st_mtime_ns
    find(*study_words, '--causes=none')
    assert Path('study/small-1/ckpt.pt').stat().st_mtime_ns == stamp


def test_summary_of_seeds():
    def seed(gaps):
        run = dict(variant='a', kind='MHA', params=1, tokens=[0, 10, 20], max_induction=gaps)
        return run | dict(repeat_loss=[4, 3, 2.5])

    (line,) = study.summarize([seed([0, 0.6, 0.9]), seed([0, 0.1, 0.7]), seed([0, 0.1, 0.2])])
    assert line['seeds'] == 3
    assert line['formed'] == 2
    assert (line['first'], line['last']) == (10, 20)
    assert (line['least'], line['most']) == (0.2, 0.9)
    assert line['mean'] == 0.6


@pytest.mark.parametrize('make', ['gpt2', 'llama', 'deepseek'])
def test_other_peoples_models_have_heads_as_well(make, tiny, tmp_path):
    pytest.importorskip('transformers')
    shape = dict(norm='rmsnorm', act='swiglu', pos='rope', block_size=64)
    if make == 'gpt2':
        hf_gpt2().save_pretrained('theirs')
    elif make == 'llama':
        export.export(tiny('mha', n_kv_head=2, **shape), 'theirs')
    else:
        export.export(tiny('mla', bias=False, **shape), 'theirs')
    theirs = load_subject('theirs')
    assert theirs.trained
    assert theirs.model.stream == torch.float32
    assert theirs.kind == dict(gpt2='MHA', llama='GQA', deepseek='MLA')[make]
    found = report.examine(theirs, ReportSettings(texts=8))
    assert found['step'] is None
    assert len(found['scores']) == found['layers'] * found['heads']
    assert found['repeats']['rebuilt'] < 1e-4
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
    """Return the tokens that the data of the run `a` uses so often."""
    subject.tokens_in.cache_clear()
    return load_subject('a', LoadOptions(often=often)).vocabulary.usable.tolist()


def replace_tokens(train_ids, val_ids):
    """Write other tokens of the same vocabulary into the dataset, without counts and checksums."""
    folder = Path('data/repeats')
    meta = json.loads((folder / 'meta.json').read_text())
    for split, ids in dict(train=train_ids, val=val_ids).items():
        np.array(ids, dtype=np.uint16).tofile(folder / f'{split}.bin')
        for key in (f'{split}_tokens', f'{split}_crc32'):
            meta.pop(key, None)
    (folder / 'meta.json').write_text(json.dumps(meta))


def test_tokens_may_be_asked_to_come_often(repeats):
    train(out_dir='a')
    few = [0, *range(5, 25)] * 30
    replace_tokens(few, few)
    assert usable() == list(range(5, 25))
    replace_tokens(few, [*few, 7, 7, 9])
    assert usable(often=61) == [7, 9]  # both splits count
    assert usable(often=62) == [7]


def test_without_its_data_a_model_has_all_its_tokens_and_none_can_be_counted(repeats):
    train(out_dir='a')
    shutil.rmtree('data')
    assert load_subject('a').vocabulary.held_out is None
    assert usable() == list(range(1, 65))
    with pytest.raises(UserError, match='counts tokens in the text of a, which is not here'):
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
    assert 'a: gated, ' in printed
    assert printed.count('no circuits for this attention') == 1
    (model,) = json.loads(Path('heads/heads.json').read_text())['models']
    assert model['kind'] == 'gated'
    assert model['composition'] == []
    assert model['paths'] == []
    assert 'mla_split' not in model
    assert len(model['scores']) == 4
    for entry in model['scores']:
        assert 0 <= entry['induction']['score'] <= 1
        assert entry['copying'] is None
        assert isinstance(entry['zero_ablation'], float)
    assert '"kind":"gated"' in Path('heads/heads.html').read_text()


def test_an_attention_without_patterns_is_refused_by_name(registered, repeats, capsys):
    train(out_dir='a', attention='hidden')
    capsys.readouterr()
    assert exit_code('find_induction_heads.py', ['--device=cpu', '--out_dir=a']) == 2
    assert 'OwnKernel shows no pattern' in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, what',
    [
        (['--out_dir=nothing'], 'there is no nothing/ckpt.pt'),
        (['--init_from=nothing.pt'], 'there is no checkpoint'),
        (['--init_from=RUN/step-000000.pt'], 'was never trained'),
        ([], 'which model?'),
        (['--sweep=nothing'], 'holds no checkpoints'),
        (['--out_dir=RUN', '--causes=some'], 'is not known'),
        (['--out_dir=RUN', '--texts=2'], 'texts=2'),
        (['--out_dir=RUN', '--prompt=ÄÖ'], 'never seen'),
        (['--out_dir=RUN', '--latents=True'], 'latents of MLA'),
        (['--out_dir=RUN', '--copying=True'], 'single tokens'),
        (['--out_dir=RUN', '--dataset=nothing'], 'is not the text of'),
        (['--out_dir=RUN', '--threshold=2'], 'more than 0 and less than 1'),
        (['--study=x/mla.py,y/mla.py'], 'two entries are called mla'),
        (['--plot_only=True'], 'name a log'),
        (['--plot_only=True', '--results=nothing.jsonl'], 'cannot read the log'),
        (['--plot_only=True', f'--results={INDUCTION_STUDY}', '--call=2'], 'holds 1 calls'),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(arguments, what, trained_pair, capsys):
    arguments = [word.replace('RUN', str(trained_pair / 'a')) for word in arguments]
    arguments = ['--device=cpu', '--out=heads', *arguments]
    assert exit_code('find_induction_heads.py', arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line
    assert not Path('heads/heads.json').exists()


def test_an_untrained_model_is_looked_at_on_purpose_alone(trained_pair, capsys):
    untrained = f'--init_from={trained_pair}/a/step-000000.pt'
    find(untrained, '--untrained=True', '--out=heads', '--causes=none')
    (model,) = json.loads(Path('heads/heads.json').read_text())['models']
    assert not model['trained']
    assert model['val_loss'] is None
    assert 'untrained' in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# what the configs promise


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """trained(name, *more) -> the report on config/induction_NAME.py, trained once."""
    folder = tmp_path_factory.mktemp('study')

    def make(name, *more):
        out = folder / name
        if not out.exists():
            configs = [str(ROOT / 'config/induction.py'), str(ROOT / f'config/induction_{name}.py')]
            settings = dict(device='cpu', seed=1, out_dir=out, dataset=folder / 'texts')
            run('train.py', [*configs, *words(settings), *more])
        return report.examine(load_subject(out))

    run('data/repeats/prepare.py', [f'--out={folder}/texts'])
    return make


def best_gap_score(found):
    return max(head['induction']['gap'] for head in found['scores'])


@pytest.mark.slow
@pytest.mark.parametrize('name, share_with_patterns', [('mha_rope', 0.1), ('mla', 0.2)])
def test_two_layers_grow_induction_heads(name, share_with_patterns, trained):
    found = trained(name)
    costs = found['group_ablation']
    labelled = patterns.heads_with_label(found['scores'], 'induction')
    gaps = {(head['layer'], head['head']): head['induction']['gap'] for head in found['scores']}
    assert max(gaps[head] for head in labelled) > 0.6
    assert costs['induction_zero'] >= 2
    assert found['repeat_loss'] < 1 < found['control_loss']
    # MLA's values read the previous-token head, too.
    assert costs['previous_pattern'] < share_with_patterns * costs['previous_zero']
    by_others = max(costs['previous_to_induction_Q'], costs['previous_to_induction_V'])
    assert costs['previous_to_induction_K'] > 5 * by_others


@pytest.mark.slow
def test_one_layer_does_not(trained):
    found = trained('one_layer')
    assert best_gap_score(found) < 0.1
    assert patterns.heads_with_label(found['scores'], 'induction') == []


@pytest.mark.slow
def test_the_trap_is_called_positional(trained, tmp_path):
    run('data/repeats_fixed/prepare.py', [f'--out={tmp_path}/fixed'])
    found = trained('trap', f'--dataset={tmp_path}/fixed')
    assert patterns.heads_with_label(found['scores'], 'positional')
    assert patterns.heads_with_label(found['scores'], 'induction') == []
    by_position = max(head['positional']['score'] for head in found['scores'])
    assert by_position > 0.5
    assert by_position > best_gap_score(found) + 0.4
