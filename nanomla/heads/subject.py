"""
A model to look into: loaded so that its patterns can be seen, with its name, its tokens and the text it was held out from.

One that was never trained is refused: the scores of random weights look like a finding ("no induction heads"),
and have been published as one.
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import token_files as datasets
from nanomla.core import tokenizers
from nanomla.core.configurator import UserError

MOST = 2**24  # tokens of a training split that are looked at to see which ones the data uses


@lru_cache(maxsize=8)
def used_in(folder, dtype, vocab_size, often=1):
    """The ids that a dataset uses `often` times or more, and its validation split, both int64."""
    train, val = (
        datasets.read_tokens(Path(folder) / f'{split}.bin', dtype) for split in ('train', 'val')
    )
    counts = sum(np.bincount(ids[:MOST], minlength=vocab_size) for ids in (train, val))
    return torch.from_numpy(np.flatnonzero(counts[:vocab_size] >= often)), torch.from_numpy(
        val[:MOST].astype(np.int64)
    )


class Subject:
    """
    path: a run's folder, a checkpoint file, or anything checkpoint.load_model reads. UserError for what is no checkpoint, and
    for untrained weights unless `untrained` allows them. The model is fp32, on `device`, in eval mode, with the eager kernel.

    usable: ids that the data really uses, without special ones; begin: the id that begins a text, or None; held: tokens of
    the validation split, or None where its dataset is not here; codec: ids to text, or None. dataset: instead of the checkpoint's.
    often: ids that come less often in the data are not usable (the first MOST tokens of each split are counted): a model that has
    hardly seen a token cannot be asked to tell it from others.
    """

    def __init__(self, path, device='cpu', untrained=False, dataset='', often=1):
        self.source = str(path)
        self.loaded = load.load_model(path, kernel='eager', dropout=0.0)
        self.model, self.content = self.loaded.model, self.loaded.checkpoint
        self.step = self.content.get('step')
        self.trained = not (str(path).startswith('random:') or self.step == 0)
        if not self.trained and not untrained:
            raise UserError(
                f'{path} was never trained: its scores would be those of random weights. Name a trained checkpoint, '
                'or say --untrained=True to look at one on purpose'
            )
        self.model.float().to(device).eval().requires_grad_(False)
        self.model.stream = torch.float32
        c, settings = self.model.config, self.content.get('config', {})
        self.kind = (
            'MLA'
            if checkpoint.kind_of(self.model) == 'mla'
            else 'MHA'
            if c.n_kv_head == c.n_head
            else 'MQA'
            if c.n_kv_head == 1
            else 'GQA'
        )
        file = Path(self.content.get('path', self.source))
        self.name = (
            file.parent.name
            if file.name == 'ckpt.pt'
            else f'{file.parent.name} {file.stem}'.strip()
            if file.suffix == '.pt'
            else file.name
        ) or file.stem
        self.tokens = (
            self.step
            * math.prod(
                settings[k] for k in ('batch_size', 'block_size', 'gradient_accumulation_steps')
            )
            if self.step is not None and 'gradient_accumulation_steps' in settings
            else None
        )
        loss = self.content.get('best_val_loss', math.nan)
        self.val_loss = float(loss) if math.isfinite(loss) and self.trained else None
        self.read_vocabulary(
            dataset or settings.get('dataset', ''), given=bool(dataset), often=often
        )

    def read_vocabulary(self, dataset, given, often):
        V, self.codec, self.begin, self.held, found = (
            self.model.config.vocab_size,
            self.loaded.tokenizer,
            None,
            None,
            None,
        )
        meta, folder = self.content.get('meta', {}), datasets.find(dataset) if dataset else None
        if folder and (folder / 'train.bin').exists():
            found = datasets.read_meta(folder)
            fits = (
                found['vocab_size'] <= V
                and (self.codec is None or given)
                and all(meta.get(k, found.get(k)) == found.get(k) for k in ('tokenizer', 'chars'))
            )
            meta, found = (found, found) if fits else (meta, None)
        if given and not found:
            raise UserError(
                f'--dataset={dataset} is not the text of {self.source}: it is missing, or has other tokens'
            )
        if often > 1 and not found:
            raise UserError(
                f'--often={often} counts tokens in the text of {self.source}, which is not here: name it by --dataset'
            )
        if self.codec is None and (meta.get('tokenizer') or V in (50257, 50304)):
            try:
                self.codec = tokenizers.Tokenizer(
                    meta if meta.get('tokenizer') else dict(tokenizer='gpt2')
                )
            except UserError:
                pass  # no tiktoken, or no vocabulary for it: ids are shown as numbers
        name = getattr(self.codec, 'name', None)
        special = {'gpt2': {50256}}.get(name or ('gpt2' if V in (50257, 50304) else ''), set())
        if name == 'hf':
            self.begin, special = (
                self.codec.bos,
                {*self.codec.eos, *self.codec.bpe.get_added_tokens_decoder()},
            )
        elif special:
            self.begin = 50256
        elif name in ('char', 'bytes'):
            self.begin = (
                self.codec.encode('\n')[0] if name == 'bytes' or '\n' in self.codec.chars else None
            )
        if found:
            ids, self.held = used_in(folder, found['dtype'], found['vocab_size'], often)
        elif self.codec:
            ids = torch.tensor(
                [
                    i
                    for i in range(min(V, self.codec.vocab_size))
                    if self.codec.decode([i]).isprintable()
                    and '\ufffd' not in self.codec.decode([i])
                ]
            )
        else:
            ids = torch.arange(min(V, 50256 if V in (50257, 50304) else V))
        self.usable = ids[[i not in special and i != self.begin for i in ids.tolist()]]

    def text_of(self, ids):
        """The text of each token, for labels."""
        if not self.codec:
            return [f'#{i}' for i in ids.tolist()]
        return [self.codec.decode([i]) for i in ids.tolist()]

    def encode(self, text):
        """A prompt as ids (T,), with what begins a text before it."""
        if not self.codec:
            raise UserError(f'{self.source} has no tokenizer here, so --prompt cannot be read')
        ids = ([] if self.begin is None else [self.begin]) + self.codec.encode(text)
        return torch.tensor(ids[: self.model.config.block_size])

    def banner(self):
        """One line: what was looked at."""
        parts = [
            f'{self.kind}, {self.model.num_params() / 1e6:.2f}M parameters',
            'untrained' if not self.trained else '',
        ]
        parts += [
            f'step {self.step:,}' if self.step is not None else '',
            f'{self.tokens / 1e6:,.1f}M tokens' if self.tokens else '',
        ]
        parts += [f'val loss {self.val_loss:.4f}' if self.val_loss is not None else '', self.source]
        return f'{self.name}: ' + ', '.join(filter(None, parts))
