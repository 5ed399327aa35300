"""Checkpoints of earlier versions and of nanoGPT load as they are."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanomla.checkpoints.load import codec_of, load_model

FILES = Path(__file__).parent / 'files'

# Logits of tokens 0 to 7, the last position, by the version that wrote the file.
LOGITS = dict(
    mha=[0.07089, 0.06304, -0.0257, -0.10638],
    mla=[-0.11035, 0.01682, -0.02757, 0.02697],
)


@pytest.mark.parametrize('kind', LOGITS)
def test_a_checkpoint_of_e498ffd_gives_the_logits_it_gave_then(kind):
    loaded = load_model(FILES / f'{kind}.pt')
    with torch.no_grad():
        logits = loaded.model.eval()(torch.arange(8)[None])[0, -1, :4]
    assert logits.tolist() == pytest.approx(LOGITS[kind], abs=2e-5)
    assert loaded.checkpoint['kind'] == kind
    assert loaded.step == 2
    assert loaded.settings['dataset'] == 'text'
    assert codec_of(loaded).tokenizer.decode([0, 1, 2]) == '\n a'


class NanoGPT:
    """A model of nanoGPT's train.py: its state dict, and its logits by plain functions."""

    V, T, C, H, L = 30, 16, 24, 3, 2

    def __init__(self, bias):
        torch.manual_seed(0)
        self.bias = bias
        self.state = {}
        for name, shape in self.shapes().items():
            self.state[name] = torch.randn(shape) * 0.3
            if '.ln_' in name and name.endswith('weight'):
                self.state[name] += 1
        self.state['lm_head.weight'] = self.state['transformer.wte.weight']

    def shapes(self):
        V, T, C = self.V, self.T, self.C
        layers = {'transformer.ln_f': (C,)}
        for n in range(self.L):
            h = f'transformer.h.{n}.'
            layers |= {
                f'{h}ln_1': (C,),
                f'{h}attn.c_attn': (3 * C, C),
                f'{h}attn.c_proj': (C, C),
                f'{h}ln_2': (C,),
                f'{h}mlp.c_fc': (4 * C, C),
                f'{h}mlp.c_proj': (C, 4 * C),
            }
        shapes = {'transformer.wte.weight': (V, C), 'transformer.wpe.weight': (T, C)}
        for name, shape in layers.items():
            shapes[f'{name}.weight'] = shape
            if self.bias:
                shapes[f'{name}.bias'] = shape[:1]
        return shapes

    def linear(self, x, name):
        return F.linear(x, self.state[f'{name}.weight'], self.state.get(f'{name}.bias'))

    def norm(self, x, name):
        weight, bias = self.state[f'{name}.weight'], self.state.get(f'{name}.bias')
        return F.layer_norm(x, (self.C,), weight, bias, 1e-5)

    def logits(self, idx):
        T = idx.size(1)
        future = torch.ones(T, T).triu(1).bool()
        x = self.state['transformer.wte.weight'][idx] + self.state['transformer.wpe.weight'][:T]
        for n in range(self.L):
            h = f'transformer.h.{n}.'
            qkv = self.linear(self.norm(x, f'{h}ln_1'), f'{h}attn.c_attn')
            qkv = [t.unflatten(2, (self.H, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2)]
            q, k, v = qkv
            scores = (q @ k.mT / (self.C // self.H) ** 0.5).masked_fill(future, -torch.inf)
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + self.linear(y, f'{h}attn.c_proj')
            y = F.gelu(self.linear(self.norm(x, f'{h}ln_2'), f'{h}mlp.c_fc'))
            x = x + self.linear(y, f'{h}mlp.c_proj')
        return self.norm(x, 'transformer.ln_f') @ self.state['lm_head.weight'].T

    def checkpoint(self, compiled):
        """Return the content of its ckpt.pt."""
        state = dict(self.state)
        for n in range(self.L):  # the buffer of its attention without flash
            mask = torch.ones(self.T, self.T).tril().view(1, 1, self.T, self.T)
            state[f'transformer.h.{n}.attn.bias'] = mask
        prefix = '_orig_mod.' if compiled else ''
        return dict(
            model={prefix + name: value for name, value in state.items()},
            optimizer=self.optimizer().state_dict(),
            model_args=dict(
                n_layer=self.L,
                n_head=self.H,
                n_embd=self.C,
                block_size=self.T,
                bias=self.bias,
                vocab_size=self.V,
                dropout=0.2,
            ),
            iter_num=250,
            best_val_loss=torch.tensor(1.7),
            config=dict(out_dir='out', wandb_log=False, learning_rate=6e-4, compile=compiled),
        )

    def optimizer(self):
        weights = [torch.nn.Parameter(t.clone()) for t in self.state.values()]
        matrices = [p for p in weights if p.dim() > 1]
        vectors = [p for p in weights if p.dim() < 2]
        groups = [
            dict(params=matrices, weight_decay=0.1),
            dict(params=vectors, weight_decay=0.0),
        ]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('compiled', [True, False])
def test_nanogpts_own_checkpoint_loads_as_it_is(bias, compiled, tmp_path):
    nanogpt = NanoGPT(bias)
    torch.save(nanogpt.checkpoint(compiled), tmp_path / 'ckpt.pt')
    loaded = load_model(tmp_path)
    idx = torch.randint(30, (2, 16))
    torch.testing.assert_close(loaded.model.eval()(idx), nanogpt.logits(idx), rtol=0, atol=1e-4)
    assert loaded.checkpoint['kind'] == 'mha'
    assert loaded.step == 250
    assert float(loaded.checkpoint['best_val_loss']) == pytest.approx(1.7)
    assert loaded.model.config.dropout == 0.2
