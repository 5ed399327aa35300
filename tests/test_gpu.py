"""The trainer on a GPU: the recorded, compiled, fused step is the plain one, only faster."""

import numpy as np
import pytest
import torch

from nanomla.checkpoints import native as checkpoint
from nanomla.core import token_files as dataset
from nanomla.core.configurator import configure
from nanomla.training import batches
from nanomla.training.trainer import Trainer

pytestmark = pytest.mark.gpu
TINY = (
    '--n_layer=2 --n_head=4 --n_embd=64 --block_size=32 --batch_size=8 '
    '--gradient_accumulation_steps=2 --warmup_iters=2 --max_iters=12'
)


@pytest.fixture
def losses(tmp_path):
    """
    losses('--key=value ...') -> the training losses of 12 steps, then the validation loss.

    losses.trainer is the Trainer of the last call.
    """
    with dataset.TokenWriter(tmp_path, 65) as files:
        ids = np.arange(4000) * np.arange(4000) % 65
        files.add('train', ids)
        files.add('val', ids[:500])
        files.publish(dict(tokenizer='char', chars=''.join(map(chr, range(65))), source='squares'))

    def run(more, stream=torch.float32):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = configure(dict(__file__='train.py'), f'{TINY} {more}'.split())
        model = checkpoint.new_model(config['attention'], config, config.given, 65).cuda().train()
        model.stream = stream
        trainer = Trainer(config, model, batches.Dataset(tmp_path, 32, 1, 'cuda'))
        run.trainer = trainer
        return torch.tensor(
            [trainer.update(step).item() for step in range(12)] + [trainer.evaluate()]
        )

    return run


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_graph_compile_and_fused_loss_train_as_the_plain_step(losses, kind, optimizer):
    shape = f'--attention={kind} --optimizer={optimizer}' + (
        ' --kv_lora_rank=32 --qk_rope_head_dim=8' if kind == 'mla' else ''
    )
    plain = losses(f'{shape} --compile=False --fused_loss=False')
    fast = losses(f'{shape} --cuda_graph=True')
    assert (plain - fast).abs().max() < (
        2e-2 if optimizer == 'muon' else 2e-3
    )  # Muon's products are bf16
    assert plain[-2] < plain[0] - 0.1


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_qk_clip_in_a_recorded_compiled_step_is_the_plain_one(kind, losses):
    shape = f'--attention={kind} --optimizer=muon --muon_heads=True --qk_clip=0.05'
    if kind == 'mla':
        shape += ' --kv_lora_rank=32 --qk_rope_head_dim=8'
    plain = losses(f'{shape} --compile=False --fused_loss=False')
    plain_logits = losses.trainer.largest_logits(11)
    assert torch.equal(losses.trainer.largest_logits(11), plain_logits)
    fast = losses(f'{shape} --cuda_graph=True')
    assert (plain - fast).abs().max() < 2e-2
    assert 0.05 < plain_logits.max() < 1  # it grows by what one step adds
    assert (losses.trainer.largest_logits(11) - plain_logits).abs().max() < 0.05
    assert (fast - losses(f'{shape} --cuda_graph=True --qk_clip=0')).abs().max() > 1e-4


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_the_largest_logits_beside_a_recorded_step(kind, losses):
    shape = f'--attention={kind} --cuda_graph=True'
    if kind == 'mla':
        shape += ' --kv_lora_rank=32 --qk_rope_head_dim=8'
    unseen = losses(shape)
    assert (losses(f'{shape} --log_max_logits=True') - unseen).abs().max() < 2e-3
    model = losses.trainer.model
    x, _ = losses.trainer.data.train_batch(11, 0, 8)
    q, k, _ = model.transformer.h[0].attn.qkv(*attention_input(model, x))
    logits = (q @ k.mT * model.transformer.h[0].attn.scale).tril()
    expected = logits.amax(dim=(0, 2, 3))  # the largest of so many is above 0
    assert (losses.trainer.largest_logits(11)[0] - expected).abs().max() < 1e-2


def attention_input(model, idx):
    x, rope = model.embed(idx)
    return model.transformer.h[0].ln_1(x), rope


def test_recorded_steps_draw_new_dropout(losses):
    dropped = '--dropout=0.5 --learning_rate=1e-12 --min_lr=0 --compile=False'
    recorded, plain = losses(f'{dropped} --cuda_graph=True'), losses(dropped)
    assert (
        recorded - plain
    ).abs().max() < 1e-4  # the masks are those of an unrecorded step, new ones each time
    assert recorded[:-1].std() > 1e-3


def test_bf16_stream_trains_as_fp32(losses):
    assert (losses('', torch.bfloat16) - losses('')).abs().max() < 0.05
