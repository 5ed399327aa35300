"""Load a model by its name: a checkpoint, GPT-2, or another model of the Hugging Face layout."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from model import GPT
from nanomla.checkpoints import gpt2, hf, native
from nanomla.checkpoints.tokenizer import HFTokenizer, read_tokenizer
from nanomla.core.configurator import UserError
from nanomla.core.token_files import find, read_meta, same_tokens
from nanomla.core.tokenizers import Tokenizer

GPT2_VOCAB_SIZES = (50257, 50304)  # its own, and that rounded up to a multiple of 64


@dataclass
class LoadedModel:
    """
    A model and what its files say of it.

    path: the file it came from, or the name that was asked for
    checkpoint: the dict of a native checkpoint without its weights; {} for Hugging Face models
    tokenizer: the model's own tokenizer.json, where it has one; else the checkpoint's meta names it
    """

    model: GPT
    path: str
    checkpoint: dict = field(default_factory=dict)
    tokenizer: HFTokenizer | None = None

    @property
    def settings(self) -> dict:
        """The settings of the run that trained it; {} where they are not known."""
        return self.checkpoint.get('config') or {}

    @property
    def meta(self) -> dict:
        """The meta.json of the dataset it was trained on; {} where it is not known."""
        return self.checkpoint.get('meta') or {}

    @property
    def step(self) -> int | None:
        """Training steps of the run that saved it; None where that is not known."""
        if not self.checkpoint.get('step') and self.checkpoint.get('pretrained'):
            return None
        return self.checkpoint.get('step')

    @property
    def trained(self) -> bool:
        """Whether its weights were trained, by this run or before it."""
        if self.path.startswith('random:'):
            return False
        return self.step != 0

    @property
    def pretrained(self) -> bool:
        """Whether others trained its weights, at first or all of the time."""
        return self.trained and (not self.checkpoint or self.checkpoint.get('pretrained', False))

    @property
    def tokens(self) -> dict:
        """The entries of a meta.json that say what its ids are; {} where nothing says it."""
        if self.tokenizer is not None:
            return self.tokenizer.meta
        try:
            return meta_of(self)
        except UserError:
            return {}


def load_model(init_from: str | Path, **changes) -> LoadedModel:
    """
    Load a checkpoint file or a folder with ckpt.pt, 'gpt2*', a folder of the Hugging Face layout
    (docs/hf_models.md lists the families), a name on its hub (organisation/model) or 'random:NAME'.

    `changes` are config fields that leave the weights alone, such as dropout and kernel. UserError
    for what is none of these.
    """
    init_from = str(init_from)
    if init_from in gpt2.HUB or gpt2.is_gpt2(Path(init_from)):
        return LoadedModel(gpt2.from_pretrained(init_from, **changes), init_from)
    if is_hugging_face(init_from):
        model, tokenizer = hf.load(init_from, **changes)
        return LoadedModel(model, init_from, tokenizer=tokenizer)
    checkpoint = native.load(init_from)
    tokenizer = tokenizer_of_checkpoint(checkpoint)
    model = native.build(checkpoint, **changes)
    del checkpoint['model']  # the weights are in the model now
    return LoadedModel(model, checkpoint['path'], checkpoint, tokenizer)


def tokenizer_of_checkpoint(checkpoint: dict) -> HFTokenizer | None:
    """
    Return the tokenizer.json of a checkpoint: beside it, or beside its dataset. None where there is
    none, or only another one than the checkpoint was trained with.
    """
    meta = checkpoint.get('meta') or {}
    beside = read_tokenizer(Path(checkpoint['path']).parent, meta)
    expected = meta.get('tokenizer_sha256')
    if expected is None or (beside is not None and beside.sha256 == expected):
        return beside
    dataset = (checkpoint.get('config') or {}).get('dataset')
    if not dataset:
        return None
    return dataset_tokenizer(find(dataset), meta)


def dataset_tokenizer(folder: Path, meta: dict) -> HFTokenizer | None:
    """Return the tokenizer.json that lies beside a dataset, where it made the tokens of `meta`."""
    if meta.get('tokenizer') != HFTokenizer.name:
        return None
    tokenizer = read_tokenizer(folder, meta)
    if tokenizer is not None and tokenizer.sha256 == meta.get('tokenizer_sha256'):
        return tokenizer
    return None


def check_tokens(loaded: LoadedModel, meta: dict, dataset: str) -> None:
    """Raise a UserError where the model has other tokens than the dataset of this meta."""
    if not loaded.tokens or same_tokens(loaded.tokens, meta):
        return
    advice = 'train on a dataset with its characters'
    if loaded.tokenizer is not None:
        folder = loaded.tokenizer.files[0].parent
        advice = f'make them by data/text/prepare.py FILES --tokenizer={folder}'
    elif loaded.tokens['tokenizer'] != 'char':
        advice = f"train on one with tokens of '{loaded.tokens['tokenizer']}'"
    raise UserError(f'{loaded.path} was trained on other tokens than {dataset} has: {advice}')


def is_hugging_face(init_from: str) -> bool:
    """Return whether a name means a Hugging Face folder, a model on the hub, or 'random:NAME'."""
    # os.path and not Path, whose exists() raises for a name that no file system takes.
    path = Path(init_from)
    if os.path.exists(path / 'config.json') or init_from.startswith('random:'):
        return True
    if path.suffix == '.pt' or os.path.exists(path) or os.path.exists(path.parent):
        return False
    return re.fullmatch(r'[\w-]+/[\w.-]+', init_from) is not None


def may_be_model(init_from: str) -> bool:
    """Return False for a name that load_model cannot know. It reads nothing and asks no network."""
    if os.path.exists(init_from) or init_from in gpt2.HUB:
        return True
    if init_from.endswith('.pt'):
        return False
    return '/' in init_from or ':' in init_from


@dataclass
class TextCodec:
    """
    What the token ids of a model mean.

    tokenizer: turns text into ids and back
    begin: the id that begins a text, or None
    ends: the ids that end one
    meta: names a vocabulary that a dataset has, too
    leading_blank: whether decoding puts a blank before a text that is not in it
    prefix: the id that stands for an empty context, or None
    """

    tokenizer: Tokenizer | HFTokenizer
    begin: int | None = None
    ends: set[int] = field(default_factory=set)
    meta: dict = field(default_factory=dict)
    leading_blank: bool = False
    prefix: int | None = None


def codec_of(loaded: LoadedModel) -> TextCodec:
    """Return the tokenizer of a loaded model; UserError where nothing says what its ids mean."""
    if loaded.tokenizer is not None:
        own = loaded.tokenizer
        return TextCodec(own, own.bos, own.eos, own.meta, own.leading_blank, own.prefix)
    meta = meta_of(loaded)
    if meta['tokenizer'] == HFTokenizer.name:
        raise UserError(
            f'{loaded.path}: the tokenizer.json of its tokens is not beside it: copy it there from '
            f'the model that it is of (sha256 of its content {meta.get("tokenizer_sha256")})'
        )
    codec = TextCodec(Tokenizer(meta), meta=meta)
    if codec.tokenizer.name == 'gpt2':
        codec.ends = {codec.tokenizer.bpe.eot_token}  # <|endoftext|>, between documents
    return codec


def meta_of(loaded: LoadedModel) -> dict:
    """
    Return the meta of the dataset whose tokens the model reads: the checkpoint's own, that of the
    dataset it names (nanoGPT's checkpoint holds none), or GPT-2's by the size of the vocabulary.
    """
    if 'tokenizer' in loaded.meta:
        return loaded.meta
    size = loaded.model.config.vocab_size
    dataset = loaded.settings.get('dataset')
    if dataset and os.path.exists(find(dataset) / 'meta.json'):
        meta = read_meta(find(dataset))
        rounded_up = -(-meta['vocab_size'] // 64) * 64
        if size in (meta['vocab_size'], rounded_up):
            return meta
    if size in GPT2_VOCAB_SIZES:
        return dict(tokenizer='gpt2')
    hint = 'GPT-2 has 50257'
    if dataset:
        hint = f"run the prepare.py of the dataset '{dataset}' that it was trained on"
    raise UserError(f'{loaded.path} does not say what its {size} tokens are: {hint}')
