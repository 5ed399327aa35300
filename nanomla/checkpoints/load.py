"""Load a model by its name: a checkpoint, GPT-2, or a folder or hub name of another model."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from model import GPT
from nanomla.checkpoints import hf, hub
from nanomla.checkpoints.gpt2 import HUB, from_pretrained, is_gpt2
from nanomla.checkpoints.native import build, load
from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.core.configurator import UserError
from nanomla.core.token_files import find, read_meta
from nanomla.core.tokenizers import Tokenizer


@dataclass
class LoadedModel:
    """
    A model and what its files say of it.

    path: the file it came from, or the name that was asked for
    checkpoint: the dict of a native checkpoint without its weights; {} for models of other makers
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
        return self.checkpoint.get('step')


def load_model(init_from: str | Path, **changes) -> LoadedModel:
    """
    Load a checkpoint file or a folder with ckpt.pt, 'gpt2*', a folder of the Hugging Face layout
    (GPT-2, Llama, dense DeepSeek-V3), a name on its hub (organisation/model) or 'random:NAME'.

    `changes` are config fields that leave the weights alone, such as dropout and kernel. UserError
    for what is none of these.
    """
    init_from, path = str(init_from), Path(init_from)
    if init_from in HUB or is_gpt2(path):
        return LoadedModel(from_pretrained(init_from, **changes), init_from)
    if is_foreign(init_from):
        model, tokenizer = hf.load(init_from, **changes)
        return LoadedModel(model, init_from, tokenizer=tokenizer)
    content = load(init_from)
    tokenizer = None
    folder = Path(content['path']).parent
    if (folder / 'tokenizer.json').exists():  # it was converted or trained from another's model
        tokenizer = hf.tokenizer_of(hub.finder(str(folder)), content.get('meta') or {})
    model = build(content, **changes)
    del content['model']  # the weights are in the model now
    return LoadedModel(model, content['path'], content, tokenizer)


def is_foreign(init_from: str) -> bool:
    """Whether a name means a Hugging Face folder, a model on its hub, or random weights in such a shape."""
    path = Path(init_from)
    if (path / 'config.json').exists() or init_from.startswith('random:'):
        return True
    if path.suffix == '.pt' or path.exists() or path.parent.exists():
        return False
    return re.fullmatch(r'[\w-]+/[\w.-]+', init_from) is not None


@dataclass
class TextCodec:
    """What the token ids of a model mean: `tokenizer` turns text into them and back."""

    tokenizer: Tokenizer | HFTokenizer
    begin: int | None = None  # the id that begins a text
    ends: set[int] = field(default_factory=set)  # ids that end one


def codec_of(loaded: LoadedModel) -> TextCodec:
    """Return the tokenizer of a loaded model; UserError where nothing says what its ids mean."""
    if loaded.tokenizer is not None:
        return TextCodec(loaded.tokenizer, loaded.tokenizer.bos, loaded.tokenizer.eos)
    tokenizer = Tokenizer(meta_of(loaded))
    if tokenizer.name == 'gpt2':  # <|endoftext|>, between documents
        return TextCodec(tokenizer, ends={tokenizer.bpe.eot_token})
    return TextCodec(tokenizer)


def meta_of(loaded: LoadedModel) -> dict:
    """
    Return the meta of the dataset whose tokens the model reads: the checkpoint's own, or that of the
    dataset it names (nanoGPT's checkpoint holds none), or GPT-2's by the size of the vocabulary.
    """
    if 'tokenizer' in loaded.meta:
        return loaded.meta
    size = loaded.model.config.vocab_size
    name = loaded.settings.get('dataset')
    if name and (find(name) / 'meta.json').exists():
        meta = read_meta(find(name))
        padded = -(-meta['vocab_size'] // 64) * 64
        if size in (meta['vocab_size'], padded):
            return meta
    if size in (50257, 50304):
        return dict(tokenizer='gpt2')
    hint = 'GPT-2 has 50257'
    if name:
        hint = f"run the prepare.py of the dataset '{name}' that it was trained on"
    raise UserError(f'{loaded.path} does not say what its {size} tokens are: {hint}')
