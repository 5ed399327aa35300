"""convert_mla.py as a person runs it, and healing: what is written, refused, never half-written."""

import errno
import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, exit_code, run, words

from nanomla.checkpoints import native
from nanomla.checkpoints.export import export
from nanomla.checkpoints.load import load_model
from nanomla.conversion import heal as heal_module
from nanomla.conversion.heal import Healing
from nanomla.core import files
from nanomla.core.configurator import UserError
from nanomla.core.token_files import write_text
from nanomla.heads.subject import load_subject
from nanomla.inference.generate import generate

pytestmark = pytest.mark.usefixtures('blank_pictures')

LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44)
STOPPED = 75  # exit code of a run that can be resumed
SENTENCE = (
    'to be or not to be that is the question whether tis nobler in the mind to suffer the slings '
    'and arrows of outrageous fortune '
)
QUICK = dict(calibration_tokens=400, eval_tokens=200, layerwise=False, device='cpu')


def convert(*arguments, **settings):
    """Run convert_mla.py in this process."""
    return run('convert_mla.py', [*arguments, *words(settings)])


def heal(**settings):
    """Run train.py with config/heal_mla.py in this process, for a few steps."""
    settings = dict(batch_size=4, warmup_iters=1, compile=False) | settings
    return run('train.py', [ROOT / 'config' / 'heal_mla.py', *words(settings)])


def assert_refused(match, script, arguments):
    """Assert that a script ends with an error of one line."""
    with pytest.raises(UserError, match=match) as error:
        run(script, arguments)
    assert '\n' not in str(error.value)


@pytest.fixture
def sample(capsys):
    """sample(**settings) -> what sample.py writes to stdout and stderr for a few tokens."""

    def run(**settings):
        settings |= dict(device='cpu', start='to be', num_samples=1, max_new_tokens=5)
        capsys.readouterr()
        code = exit_code('sample.py', words(settings))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def source(tiny, tmp_path, monkeypatch):
    """source(folder, **settings): a folder of a tiny run, trained on a dataset of characters."""
    monkeypatch.chdir(tmp_path)
    meta = write_text(tmp_path / 'text', SENTENCE * 40, 'char', 'a test')

    def make(folder='src', **settings):
        model = tiny('mha', **LLAMA | dict(vocab_size=meta['vocab_size']) | settings)
        checkpoint = dict(
            kind='mha',
            model_args=native.model_args(model),
            model=model.state_dict(),
            step=7,
            best_val_loss=1.5,
            meta=meta,
            config=dict(dataset=str(tmp_path / 'text')),
        )
        native.save(Path(folder) / 'ckpt.pt', checkpoint)
        return model

    return make


@pytest.mark.draws
def test_a_conversion_is_a_checkpoint_with_its_history(source, capsys):
    source()
    fitted = QUICK | dict(layerwise=True, layer_steps=3)
    convert('src', out='mla', saving=0.75, cache_dtype='int4', rotate=True, **fitted)
    printed = capsys.readouterr().out
    assert '75.00 %' in printed
    assert 'the same, fitted layer by layer' in printed
    assert 'the same in int4' in printed
    assert 'error of the output of each fitted attention' in printed
    assert 'heal_mla.py --init_from=mla --teacher=src' in printed
    assert sorted(os.listdir()) == ['mla', 'src', 'text']
    assert sorted(os.listdir('mla')) == ['ckpt.pt', 'conversion.png']

    loaded = load_model('mla')
    mla, history = loaded.model, loaded.checkpoint['conversion']
    assert history['source'] == 'src'
    assert history['settings']['kv_lora_rank'] + mla.config.qk_rope_head_dim == 16
    assert history['settings']['layer_steps'] == 3
    assert all(0 < layer['error'] < 1 for layer in history['layers'])
    assert len(history['layers']) == 2
    table = history['table']
    assert [row['bytes'] for row in table[:3]] == [2 * 2 * 64, 2 * 2 * (32 + 4), 2 * 2 * 16]
    assert table[2]['saved'] == 0.75
    assert all(row['perplexity'] > 1 for row in table)
    assert loaded.step == 7
    assert loaded.meta['tokenizer'] == 'char'
    assert len(table) == 5
    assert table[3]['name'] == 'the same, fitted layer by layer'
    assert loaded.checkpoint['best_val_loss'] == table[3]['nats']


def test_a_conversion_is_healed_and_sampled_from(source, sample, capsys):
    source()
    convert('src', out='mla', saving=0.75, **QUICK)
    before = load_model('mla')
    heal(
        init_from='mla',
        teacher='src',
        out_dir='healed',
        dataset=before.settings['dataset'],
        train_only='kv_a_proj,kv_b_proj',
        max_iters=6,
        eval_interval=6,
        device='cpu',
    )
    after = load_model('healed')
    assert after.checkpoint['conversion'] == before.checkpoint['conversion']
    weights = before.model.state_dict()
    changed = {
        name
        for name, weight in after.model.state_dict().items()
        if not torch.equal(weight, weights[name])
    }
    assert changed == {
        'transformer.h.0.attn.kv_a_proj_with_mqa.weight',
        'transformer.h.0.attn.kv_b_proj.weight',
        'transformer.h.1.attn.kv_a_proj_with_mqa.weight',
        'transformer.h.1.attn.kv_b_proj.weight',
    }
    out, err = sample(out_dir='healed')
    assert out.startswith('to be')
    assert 'MLA' in err


def test_one_command_converts_and_heals_and_goes_on_where_it_was(source, monkeypatch, capsys):
    """Started again it converts nothing anew, and resumes the run that a signal has stopped."""
    started = []

    def train(command, env):
        started.append(command[3:])
        minutes = 0.001 if len(started) == 1 else 0
        try:
            run('train.py', [*command[2:], '--compile=False', f'--max_minutes={minutes}'])
        except SystemExit as stopped:
            return SimpleNamespace(returncode=stopped.code)
        return SimpleNamespace(returncode=0)

    source()
    monkeypatch.setattr(files, 'subprocess', SimpleNamespace(run=train))
    tokens = 3 * 16 * 24  # three steps
    passed_on = dict(teacher_cache='predictions', lora_rank=2, learning_rate=2e-3, batch_size=4)
    with pytest.raises(SystemExit) as stopped:
        convert('src', out='mla', saving=0.5, heal=tokens, **passed_on, **QUICK)
    assert stopped.value.code == STOPPED
    convert('src', out='mla', saving=0.5, heal=tokens, **passed_on, **QUICK)
    printed = capsys.readouterr().out
    assert 'mla is there already: on with healing' in printed
    assert 'eval.py --models=src,mla,mla-healed\n' in printed
    assert 'sample.py --init_from=mla-healed\n' in printed
    assert '--teacher=src' in started[0]
    assert {'--max_iters=3', '--gradient_accumulation_steps=4'} <= set(started[0])
    assert {'--eval_iters=4', '--warmup_iters=10'} <= set(started[0])
    assert set(words(passed_on)) <= set(started[0])
    assert [words[0] for words in started] == ['--init_from=mla', '--init_from=resume']
    assert load_model('mla-healed').step == 3
    why = 'mla holds another conversion than the one that is asked for'
    settings = words(dict(out='mla', saving=0.75, heal=tokens) | QUICK)
    assert_refused(why, 'convert_mla.py', ['src', *settings])
    Path('book.txt').write_text(SENTENCE * 30)
    settings = words(dict(out='new', saving=0.5, heal=tokens, calibration='book.txt') | QUICK)
    assert_refused('book.txt is none: make one', 'convert_mla.py', ['src', *settings])
    assert not Path('new').exists()


def test_evaluations_of_a_short_healing_are_short():
    batches = {}
    for tokens in (20_000, 2_000_000, 20_000_000):
        batches[tokens] = Healing('mla', 'src', 'text', tokens, block_size=256).eval_batches
    assert batches == {20_000: 1, 2_000_000: 61, 20_000_000: 200}


def test_two_steps_partial_rope_is_healed_before_the_cut(source, capsys):
    """The healed model at full rank is a source, whose latent alone is cut."""
    source(n_kv_head=2)
    convert('src', out='partial', rope_pairs=4, **QUICK)
    dataset = load_model('partial').settings['dataset']
    steps = dict(max_iters=2, eval_interval=2, device='cpu', dataset=dataset)
    heal(init_from='partial', teacher='src', out_dir='partial-healed', **steps)
    capsys.readouterr()
    convert('partial-healed', out='mla', saving=0.5, export='hf', **QUICK | dict(layerwise=True))
    printed = capsys.readouterr().out
    assert 'MLA (the source)' in printed
    assert 'full rank' not in printed
    loaded, partial = load_model('mla'), load_model('partial-healed').model
    assert loaded.checkpoint['conversion']['before']['source'] == 'src'
    rows = loaded.checkpoint['conversion']['table']
    assert [row['saved'] for row in rows] == [0, 0.5, 0.5]
    for one, other in zip(loaded.model.transformer.h, partial.transformer.h):
        assert torch.equal(one.attn.rope_pairs, other.attn.rope_pairs)
        assert torch.equal(one.mlp.c_fc.weight, other.mlp.c_fc.weight)
    idx = torch.arange(12)[None] % 10
    exported = load_model('hf').model(idx)
    torch.testing.assert_close(exported, loaded.model(idx), rtol=0, atol=1e-4)
    refused = 'the source is MLA, whose pairs with RoPE stay as they are: leave it out'
    assert_refused(refused, 'convert_mla.py', ['partial-healed', '--out=o', '--rope_pairs=2'])


def test_what_is_exported_with_heal_is_the_healed_model(source, monkeypatch):
    def heal(healing):
        checkpoint = native.load('mla')
        checkpoint['model']['transformer.ln_f.weight'] += 1
        Path(healing.out).mkdir()
        native.save(f'{healing.out}/ckpt.pt', checkpoint)

    source()
    monkeypatch.setattr(heal_module, 'heal', heal)
    convert('src', out='mla', saving=0.5, heal=1000, export='hf', **QUICK)
    idx = torch.arange(12)[None] % 10
    exported, healed = (load_model(name).model(idx) for name in ('hf', 'mla-healed'))
    torch.testing.assert_close(exported, healed, rtol=0, atol=1e-4)
    assert not torch.allclose(healed, load_model('mla').model(idx), atol=1e-2)


def test_layers_that_lose_by_their_fit_stay_as_they_were(source, monkeypatch, capsys):
    """As by too few tokens for a large model; here by a fit that diverges."""

    def fit_badly(source, mla, *_):
        for block in mla.transformer.h:
            block.attn.c_proj.weight.data.fill_(torch.nan)
        return [2.0, 2.0]

    source()
    convert('src', out='closed', saving=0.75, **QUICK | dict(layerwise=False))
    monkeypatch.setattr('nanomla.conversion.layerwise.fit_layers', fit_badly)
    convert('src', out='mla', saving=0.75, **QUICK | dict(layerwise=True, layer_steps=3))
    assert 'fit undone: calibrate on more text' in capsys.readouterr().out
    loaded = load_model('mla')
    idx = torch.arange(12)[None] % 10
    torch.testing.assert_close(loaded.model(idx), load_model('closed').model(idx))
    history = loaded.checkpoint['conversion']
    closed = load_model('closed').checkpoint['conversion']
    undone, kept = history['table'][-2:]
    assert undone['name'] == 'fit undone: calibrate on more text'
    assert kept == closed['table'][-1]
    assert not any('error' in layer for layer in history['layers'])


@pytest.mark.parametrize(
    'pretrained, asked, rate',
    [
        (True, {}, 5e-4),
        (True, dict(lora_rank=2), None),
        (True, dict(learning_rate=2e-4), 2e-4),
        (False, {}, None),
    ],
)
def test_weights_that_others_trained_are_healed_at_a_lower_rate(
    source, monkeypatch, capsys, pretrained, asked, rate
):
    source()
    checkpoint = native.load('src') | dict(pretrained=pretrained)
    native.save(Path('src/ckpt.pt'), checkpoint)
    asked_for = []
    monkeypatch.setattr(heal_module, 'heal', asked_for.append)
    convert('src', out='mla', saving=0.5, heal=1000, **asked, **QUICK)
    assert asked_for[0].options.get('learning_rate') == rate
    convert('src', out='other', saving=0.5, **QUICK)
    assert ('--learning_rate=0.0005' in capsys.readouterr().out) == pretrained


def test_a_lossless_conversion_of_every_pair(source):
    source(n_kv_head=2)
    convert('src', out='mla', **QUICK)
    table = native.load('mla')['conversion']['table']
    assert table[0]['name'] == 'GQA (the source)'
    assert table[0]['nats'] == pytest.approx(table[2]['nats'], abs=1e-5)
    assert table[2]['saved'] <= 0


def test_without_text(source, capsys):
    source(n_kv_head=2, pos='learned', norm='layernorm', act='gelu', bias=True)
    convert('src', out='mla', calibration='none', low_rank='joint', kv_lora_rank=12, device='cpu')
    assert 'perplexity' not in capsys.readouterr().out
    table = native.load('mla')['conversion']['table']
    assert table[1] == dict(
        name='MLA, rank 12 + 0 (joint)', bytes=48.0, nats=None, perplexity=None, saved=0.625
    )


def test_ranks_of_layers_are_printed_where_they_differ(source, capsys):
    source()
    settings = dict(ranks='spectrum', kv_lora_rank=20, rope_pairs=3, low_rank='balanced')
    convert('src', out='mla', **settings, **QUICK)
    printed = capsys.readouterr().out
    assert 'MLA, rank up to 24 + 6 (balanced)' in printed
    assert '(rank 16)' in printed


def write_tokenizer(folder, vocab_size=290):
    """Write a tokenizer.json of byte pairs that knows SENTENCE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE], trainer)
    tokenizer.save(f'{folder}/tokenizer.json')


def test_the_split_between_pairs_and_rank_is_searched(source, capsys):
    """The report has what was tried, and the checkpoint the best of it."""
    source(n_kv_head=2)
    convert('src', out='mla', saving=0.5, search_pairs=True, **QUICK)
    assert 'error of the attentions by rank + k_pe' in capsys.readouterr().out
    checkpoint = native.load('mla')
    splits = checkpoint['conversion']['splits']
    shape = checkpoint['model_args']
    best = f'{shape["kv_lora_rank"]} + {shape["qk_rope_head_dim"]}'
    assert len(splits) > 1 and splits[best] == min(splits.values())


def test_a_hugging_face_source_keeps_its_tokenizer(source, sample):
    """It is calibrated on a text file, sampled from in its words, exported with its tokenizer."""
    export(source(vocab_size=300), 'llama')
    write_tokenizer('llama')
    Path('book.txt').write_text(SENTENCE * 30)
    convert('llama', out='mla', saving=0.5, calibration='book.txt', export='hf', **QUICK)
    assert {'tokenizer.json', 'ckpt.pt'} <= set(os.listdir('mla'))
    assert 'tokenizer.json' in os.listdir('hf')
    codec = load_model('mla').tokenizer
    assert codec.decode(codec.encode(SENTENCE)) == SENTENCE
    out, _ = sample(init_from='mla')
    assert out.startswith('to be')


def test_an_export_stops_at_all_ends_of_generation_config(source):
    """In stock transformers as here: half of the vocabulary ends a text."""
    from transformers import AutoModelForCausalLM

    export(source(vocab_size=300), 'llama')
    write_tokenizer('llama')
    ends = list(range(1, 300, 2))
    Path('llama/generation_config.json').write_text(json.dumps(dict(eos_token_id=ends)))
    Path('book.txt').write_text(SENTENCE * 30)
    convert('llama', out='mla', saving=0.5, calibration='book.txt', export='hf', **QUICK)
    ours, theirs = load_model('mla'), AutoModelForCausalLM.from_pretrained('hf').eval()
    assert ours.tokenizer.eos == set(ends)
    assert theirs.generation_config.eos_token_id == ends
    stopped = 0
    for start in range(4):
        prompt = torch.tensor([[start, 2 * start, 50]])
        text = theirs.generate(prompt, max_new_tokens=12, do_sample=False)[0, 3:].tolist()
        expected = torch.stack(list(generate(ours.model.eval(), prompt, 12, temperature=0)))
        expected = expected.flatten().tolist()
        ending = [i + 1 for i, token in enumerate(expected) if token in ends]
        assert text == expected[: min(ending, default=12)]
        stopped += bool(ending)
    assert stopped


def test_the_commands_printed_for_a_foreign_model_run_as_printed(source, capsys):
    """Its text is tokenised, it is healed beside its source, and the result is read."""
    export(source(vocab_size=300), 'llama')
    write_tokenizer('llama')
    Path('book.txt').write_text(SENTENCE * 30)
    convert('llama', out='mla', saving=0.5, calibration='book.txt', **QUICK)
    printed = capsys.readouterr().out.split('next:')[1].strip().splitlines()
    commands = [shlex.split(line)[1:] for line in printed]
    scripts = [Path(command[0]).relative_to(ROOT) for command in commands]
    assert list(map(str, scripts)) == ['data/text/prepare.py', 'train.py', 'eval.py', 'sample.py']
    shorter = {
        'train.py': ['--max_iters=2', '--warmup_iters=1', '--compile=False'],
        'eval.py': ['--max_tokens=60', '--context=16'],
        'sample.py': ['--max_new_tokens=3', '--start=to be'],
    }
    # Here alone the text is tokenised in processes, as by default.
    for script, command in zip(scripts, commands):
        run(script, [*command[1:], *shorter.get(str(script), [])])
    healed = load_model('out-healed')
    assert healed.checkpoint['conversion']['source'] == 'llama'
    assert healed.tokenizer.sha256 == load_model('llama').tokenizer.sha256


def test_a_conversion_is_as_trained_as_its_source(source):
    """As what has no step of ours is, a model of another maker, and unlike random weights."""
    export(source(vocab_size=300), 'llama')
    write_tokenizer('llama')
    Path('book.txt').write_text(SENTENCE * 30)
    convert('llama', out='mla', saving=0.5, calibration='book.txt', **QUICK)
    subject = load_subject('mla')
    assert subject.trained
    assert 'converted from llama' in subject.banner()
    assert 'step' not in subject.banner()
    settings = dict(calibration='none', low_rank='joint', rope='uniform', device='cpu')
    convert('random:tiny', out='blank', saving=0.5, **settings)
    with pytest.raises(UserError, match='blank was never trained'):
        load_subject('blank')


@pytest.mark.parametrize('tokens', ['characters', 'another tokenizer'])
def test_healing_on_other_tokens_is_refused(tokens, source):
    export(source(vocab_size=300), 'llama')
    write_tokenizer('llama')
    Path('book.txt').write_text(SENTENCE * 30)
    convert('llama', out='mla', saving=0.5, calibration='book.txt', **QUICK)
    dataset = 'text'
    if tokens == 'another tokenizer':
        Path('other').mkdir()
        write_tokenizer('other', vocab_size=280)
        made = ['--tokenizer=other', '--num_proc=1', '--out=others']
        run('data/text/prepare.py', ['book.txt', *made])
        dataset = 'others'
    match = 'mla/ckpt.pt was trained on other tokens than .*: make them by data/text/prepare.py'
    settings = dict(init_from='mla', dataset=Path(dataset).resolve(), device='cpu', out_dir='o')
    assert_refused(match, 'train.py', words(settings))


def test_an_export_that_cannot_be_is_refused_before_the_work(source, capsys):
    source(bias=True)
    assert_refused(
        'the MLP of layer 0 has a bias', 'convert_mla.py', ['src', '--out=mla', '--export=hf']
    )
    source('learned', pos='learned', norm='layernorm')
    assert_refused('norm=layernorm', 'convert_mla.py', ['learned', '--out=mla', '--export=hf'])
    assert 'perplexity' not in capsys.readouterr().out
    assert sorted(os.listdir()) == ['learned', 'src', 'text']


def test_healing_by_adapters_without_peft_is_refused_before_the_work(source, monkeypatch):
    source()
    monkeypatch.setitem(sys.modules, 'peft', None)
    words = ['src', '--out=mla', '--saving=0.5', '--heal=100', '--lora_rank=2']
    assert_refused('LoRA needs peft: pip install', 'convert_mla.py', words)
    assert not Path('mla').exists()


def test_an_export_that_fails_leaves_the_checkpoint_and_goes_on(source, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    source()
    arguments = ['src', '--out=mla', '--export=hf', *words(QUICK)]
    with monkeypatch.context() as patch:
        patch.setattr('safetensors.torch.save_file', fail)
        assert_refused('no space left .*; mla is written', 'convert_mla.py', arguments)
    assert load_model('mla').model.config.source_head_dim
    assert not Path('hf').exists()
    assert_refused('mla holds another conversion', 'convert_mla.py', [*arguments, '--saving=0.5'])
    run('convert_mla.py', arguments)
    assert 'mla is there already: on with the export' in capsys.readouterr().out
    assert native.kind_of(load_model('hf').model) == 'mla'


def test_exports_have_the_frequencies_of_an_ordinary_rope(source, capsys):
    """As vLLM and SGLang have no others; what a person asks for is exported all the same."""
    source(norm_eps=1e-6, head_dim=16)
    convert('src', out='mla', saving=0.7, export='hf', **QUICK)
    rope = json.loads(Path('hf/config.json').read_text())['rope_parameters']
    assert rope['rope_type'] == 'default'
    printed = capsys.readouterr().out
    assert 'vLLM and SGLang have all that it needs; load it in float32 or bfloat16' in printed
    convert('src', out='mla2', saving=0.7, rope='turn', export='hf2', **QUICK)
    printed = capsys.readouterr().out
    assert 'only transformers loads it as it is: RoPE is longrope' in printed


def test_the_dtype_of_an_export_is_a_setting(source, capsys):
    from safetensors.torch import load_file

    source(norm_eps=1e-6, head_dim=16)
    settings = dict(out='mla', saving=0.7, export='hf', export_dtype='float16') | QUICK
    convert('src', **settings)
    assert {weight.dtype for weight in load_file('hf/model.safetensors').values()} == {torch.half}
    printed = capsys.readouterr().out
    assert 'its latents have a constant channel, by a bias, for float16)' in printed
    for wrong, why in (
        (dict(export_dtype='half'), "export_dtype='half' is not known: use float32, bfloat16"),
        (dict(export=''), 'export_dtype is that of an export: name one by --export=FOLDER'),
    ):
        arguments = words(settings | dict(out='other', export='other-hf') | wrong)
        assert_refused(why, 'convert_mla.py', ['src', *arguments])


def test_an_export_for_llama_cpp(source, capsys):
    """It is written beside the checkpoint, or refused before the work."""
    import gguf

    source(head_dim=16)
    convert('src', out='mla', saving=0.5, export='a b.gguf', **QUICK)
    assert 'written: a b.gguf (llama.cpp loads it)' in capsys.readouterr().out
    fields = gguf.GGUFReader('a b.gguf').fields
    config = load_model('mla').model.config
    assert fields['deepseek2.attention.kv_lora_rank'].contents() == config.kv_lora_rank
    source('biased', bias=True)
    for arguments, match in (
        ('biased', 'bias=True'),
        ('src', 'RoPE on all of a key'),
        ('src --rope=turn --saving=0.5', 'the frequencies of RoPE'),
        ('src --rope_heads=own --saving=0.5', 'the frequencies of RoPE'),
    ):
        arguments = [*arguments.split(), '--out=out', '--export=new.gguf', *words(QUICK)]
        assert_refused(f"llama.cpp's deepseek2 cannot .*{match}", 'convert_mla.py', arguments)
    assert sorted(os.listdir()) == ['a b.gguf', 'biased', 'mla', 'src', 'text']


# -------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    'arguments, match',
    [
        ('', 'say what to convert'),
        ('src', 'say where to put it'),
        ('src --out=src', 'src is there already'),
        ('nowhere --out=mla', 'there is no checkpoint'),
        ('src --out=mla --export=src', 'src is there already'),
        ('src --out=mla --kv_lora_rank=999', 'above the full rank'),
        ('src --out=mla --rope_pairs=99', 'rope_pairs=99'),
        ('src --out=mla --rope_pairs=2.5', 'rope_pairs takes a whole number'),
        ('src --out=mla --saving=1.5', 'saving=1.5'),
        ('src --out=mla --saving=0.5 --kv_lora_rank=3', 'give one of'),
        ('src --out=mla --search_pairs=True', 'search_pairs needs --saving'),
        ('src --out=mla --search_pairs=True --saving=0.5 --rope_pairs=2', 'looks for those'),
        ('src --out=mla --saving=0.99', 'leaves no room for a latent'),
        ('src --out=mla --saving=0.9 --rope_heads=own --rope_pairs=2', 'beside 2 pairs'),
        ('src --out=mla --calibration=none', 'needs calibration text'),
        ('src --out=mla --calibration=nowhere', 'no such file, and no dataset'),
        ('src --out=mla --calibration=short.txt', 'short.txt: 7 tokens are too few'),
        ('src --out=mla --eval_tokens=3', 'too few'),
        ('src --out=mla --cache_dtype=int2', "cache_dtype='int2' is not known: use int8, int4"),
        ('src --out=mla --batch_size=0', 'batch_size=0'),
        ('normed --out=mla', 'QK-norm'),
        ('mla_already --out=mla', 'is an MLA model already'),
        ('mla_already --out=mla --saving=0.5', 'is an MLA model already'),
        ('broken --out=mla', "model_type 'mamba'"),
        ('src --out=text/train.bin/x', 'cannot write .*train.bin is no folder'),
        ('src --out=mla --export=text/train.bin/x', 'cannot write .*train.bin is no folder'),
        ('src --out=mla --export=mla/', 'is where out writes: name another folder'),
        ('src --out=mla --heal=9 --export=mla-healed', 'is where healing writes'),
        ('src --out=mla --heal=9 --teacher_cache=short.txt', 'short.txt is a file: name a folder'),
        ('src --out=mla --lora_rank=4', 'lora_rank is a setting of healing: add --heal=TOKENS'),
        ('src --out=mla --seed=-1', 'seed=-1 must be at least 0'),
        ('src --out=mla --block_size=99', 'block_size=99: the source reads 24 tokens at a time'),
        ('src --out=mla --export=x.GGUF', "llama.cpp's deepseek2 cannot express this"),
    ],
)
def test_bad_input(arguments, match, source, tiny, tmp_path):
    source()
    source('normed', qk_norm=True)
    model = tiny('mla')
    checkpoint = dict(kind='mla', model_args=native.model_args(model), model=model.state_dict())
    native.save(tmp_path / 'mla_already' / 'ckpt.pt', checkpoint)
    Path('short.txt').write_text('to be or')
    Path('broken').mkdir()
    Path('broken/config.json').write_text(json.dumps(dict(model_type='mamba')))
    before = sorted(os.listdir())
    quick = dict(QUICK)
    if 'eval_tokens' in arguments:
        del quick['eval_tokens']
    assert_refused(match, 'convert_mla.py', [*arguments.split(), *words(quick)])
    assert sorted(os.listdir()) == before


def test_nothing_half_written(source, monkeypatch):
    def fail(path, checkpoint):
        raise UserError('cannot write: no space left')

    source()
    monkeypatch.setattr(native, 'save', fail)
    assert_refused('no space left', 'convert_mla.py', ['src', '--out=mla', *words(QUICK)])
    assert sorted(os.listdir()) == ['src', 'text']


def test_what_cannot_teach_or_train_is_refused(source):
    source()
    source('other', vocab_size=77)
    source('narrow', block_size=8)
    source('deep', n_layer=3)
    settings = dict(
        init_from='src',
        out_dir='o',
        dataset=Path('text').resolve(),
        device='cpu',
        compile=False,
    )
    for changes, match in (
        (dict(teacher='other'), 'knows 77 tokens'),
        (dict(teacher='narrow'), 'reads 8 tokens at a time'),
        (dict(train_only='nothing'), 'no parameter has such a name'),
        (dict(distill=2), 'distill=2.0 must be at least 0 and at most 1'),
        (dict(teacher='nowhere'), 'there is no checkpoint'),
        (dict(teacher='deep', distill_hidden=1), 'has 3 layers of width'),
        (dict(teacher='src', distill_hidden=-1), 'distill_hidden=-1.0 must be at least 0'),
    ):
        assert_refused(match, 'train.py', words(settings | changes))
    assert not Path('o').exists()


# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_converts_as_a_cpu_does(source):
    """
    Down to the signs of the latent's channels, which int4 sees: any sign would move it by 1e-2.
    """
    source(n_kv_head=2)
    tables = {}
    for device in ('cpu', 'cuda'):
        settings = QUICK | dict(device=device)
        convert('src', out=device, saving=0.5, cache_dtype='int4', **settings)
        tables[device] = native.load(device)['conversion']['table']
    for here, there in zip(tables['cpu'], tables['cuda']):
        assert there['nats'] == pytest.approx(here['nats'], abs=1e-3)
        assert there['bytes'] == here['bytes']


@pytest.mark.gpu
def test_a_gpu_heals_alike_step_by_step_and_as_a_graph(source):
    source(n_kv_head=2)
    convert('src', out='mla', saving=0.5, **QUICK | dict(device='cuda'))
    losses = []
    for graph in (False, True):
        out_dir = f'healed-{graph}'
        heal(
            init_from='mla',
            teacher='src',
            out_dir=out_dir,
            dataset=Path('text').resolve(),
            distill_hidden=1,
            max_iters=8,
            eval_interval=8,
            device='cuda',
            dtype='float32',
            cuda_graph=graph,
        )
        losses.append(native.load(out_dir)['best_val_loss'])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0] < native.load('mla')['conversion']['table'][2]['nats']
