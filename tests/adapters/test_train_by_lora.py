"""train.py --lora_rank: only adapters learn, what is saved is an ordinary model, runs resume."""

from pathlib import Path

import pytest
import torch
from adapter_models import make_adapted
from helpers import run, words

from nanomla.adapters import lora
from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.core.configurator import UserError
from nanomla.core.token_files import write_text

SENTENCE = 'to be or not to be that is the question whether tis nobler in the mind to suffer '


@pytest.mark.parametrize('targets', ['all', 'attention', 'q_proj'])
@pytest.mark.parametrize('name', ['mha', 'mla', 'gpt2'])
def test_the_merged_state_is_the_model_with_its_adapters(name, targets, tiny, tokens):
    model, idx = make_adapted(tiny, 'lora', name, targets=targets).eval(), tokens(20)
    with_adapters = model(idx)
    state = lora.merged_state(model)
    torch.testing.assert_close(model(idx), with_adapters, rtol=0, atol=0)
    ordinary = type(model)(model.config).eval()
    ordinary.load_state_dict(state)
    torch.testing.assert_close(ordinary(idx), with_adapters, rtol=1e-5, atol=1e-5)


@pytest.fixture
def learn(tiny, tmp_path, monkeypatch):
    """learn(**settings): run train.py from a tiny model, for a few steps."""
    monkeypatch.chdir(tmp_path)
    meta = write_text('text', SENTENCE * 20, 'char', 'a test')
    model = tiny('mla', vocab_size=meta['vocab_size'])
    args = native.model_args(model)
    state = dict(kind='mla', model_args=args, model=model.state_dict(), step=1, meta=meta)
    native.save(Path('model/ckpt.pt'), state)
    settings = dict(
        init_from='model',
        dataset=Path('text').resolve(),
        batch_size=4,
        gradient_accumulation_steps=1,
        block_size=16,
        max_iters=4,
        eval_interval=2,
        warmup_iters=0,
        learning_rate=1e-2,
        schedule='wsd',
        decay_lr=False,
        sample_tokens=3,
        lora_rank=2,
        device='cpu',
        compile=False,
    )

    def make(**changes):
        run('train.py', words(settings | changes))

    return make


def test_adapters_of_the_attention_learn_and_an_ordinary_model_is_saved(learn, capsys):
    learn(out_dir='out')
    assert 'LoRA of rank 2' in capsys.readouterr().out
    before, after = load_model('model').model, load_model('out').model
    assert type(before) is type(after)
    weights = after.state_dict()
    changed = [k for k, old in before.state_dict().items() if not torch.equal(old, weights[k])]
    matrices = [
        f'h.{n}.attn.{name}.weight'
        for n in (0, 1)
        for name in ('q_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'c_proj')
    ]
    assert sorted(changed) == sorted(f'transformer.{name}' for name in matrices)
    for name in changed:
        assert torch.linalg.matrix_rank(weights[name] - before.state_dict()[name], rtol=1e-3) <= 2
    last = native.load('out/last.pt')
    moved = sum(len(optimizer['state']) for optimizer in last['optimizers'])
    assert moved == 2 * len(matrices)  # moments of A and B alone
    torch.testing.assert_close(native.build(last).state_dict(), weights)


def test_a_resumed_run_is_the_uninterrupted_one(learn):
    learn(out_dir='whole')
    learn(out_dir='parts', max_iters=2)
    learn(out_dir='parts', init_from='resume', max_iters=4)
    whole, parts = native.load('whole/last.pt'), native.load('parts/last.pt')
    assert whole['adapters'].keys() == parts['adapters'].keys()
    for entry in ('model', 'adapters'):
        for name, weight in whole[entry].items():
            assert torch.equal(weight, parts[entry][name]), name
    with pytest.raises(UserError, match='was trained with other adapters'):
        learn(out_dir='parts', init_from='resume', lora_rank=3)


@pytest.mark.gpu
def test_a_gpu_learns_by_adapters_compiled_as_plain(learn):
    for out_dir, compile in (('plain', False), ('compiled', True)):
        learn(out_dir=out_dir, device='cuda', compile=compile, dtype='float32')
    plain, compiled = (native.load(name)['best_val_loss'] for name in ('plain', 'compiled'))
    assert compiled == pytest.approx(plain, abs=2e-3)


def test_what_does_not_go_with_adapters_is_refused(learn):
    for changes, match in (
        (dict(train_only='attn'), 'lora_rank does not go with --train_only=attn'),
        (dict(ema_decay=0.9), 'lora_rank does not go with --ema_decay=0.9'),
        (dict(optimizer='muon'), 'lora_rank does not go with --optimizer=muon'),
        (dict(init_from='scratch'), 'lora_rank adapts a trained model'),
        (dict(lora_targets='mlp'), "target 'mlp' is none of this model's Linears"),
        (dict(lora_rank=-1), 'lora_rank=-1 must be at least 0'),
    ):
        with pytest.raises(UserError, match=match):
            learn(out_dir='o', **changes)
    assert not Path('o').exists()
