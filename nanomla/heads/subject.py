"""
A model to look into: loaded so that its patterns can be seen, with its name, its tokens and the
text that was held out from its training.

A model that was never trained is refused: the scores of random weights look like a finding ("no
induction heads"), and have been published as one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from model import GPT
from nanomla.checkpoints import native
from nanomla.checkpoints.load import GPT2_VOCAB_SIZES, LoadedModel, codec_of, load_model
from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.core import token_files
from nanomla.core.configurator import UserError
from nanomla.core.tokenizers import Tokenizer

COUNTED = 2**24  # tokens at the beginning of each split, to see which ones the data uses
END_OF_TEXT = 50256  # GPT-2's <|endoftext|>, which begins a text, too


@dataclass
class Vocabulary:
    """
    The tokens of a model.

    codec: ids to text and back, or None
    begin: the id that begins a text, or None
    usable: ids (V,) that the data really uses, without special ones
    held_out: ids of the validation split; None where its dataset is not here
    """

    codec: Tokenizer | HFTokenizer | None
    begin: int | None
    usable: torch.Tensor
    held_out: torch.Tensor | None

    def text_of(self, ids: torch.Tensor) -> list[str]:
        """Return the text of each token, for labels."""
        if self.codec is None:
            return [f'#{i}' for i in ids.tolist()]
        return [self.codec.decode([i]) for i in ids.tolist()]


@dataclass
class Subject:
    """A model in fp32, in eval mode, with the eager kernel, and what its files say of it."""

    loaded: LoadedModel
    source: str  # as it was asked for
    trained: bool
    vocabulary: Vocabulary
    prefix: str = ''  # what tells its name from those of others, as a/ of a/run beside b/run

    @property
    def model(self) -> GPT:
        return self.loaded.model

    @property
    def step(self) -> int | None:
        return self.loaded.step

    @property
    def kind(self) -> str:
        """The name of its attention for people."""
        return attention_name(self.model)

    @property
    def converted_from(self) -> str:
        """What convert_mla.py made it of; '' where it was not converted."""
        return (self.loaded.checkpoint.get('conversion') or {}).get('source', '')

    @property
    def file(self) -> Path:
        """Its checkpoint, or the folder or name that it was loaded from."""
        return Path(self.loaded.path if self.loaded.checkpoint else self.source)

    @property
    def folder(self) -> Path:
        """The folder that its name begins with."""
        return self.file.parent if self.file.suffix == '.pt' else self.file

    @property
    def name(self) -> str:
        """The run's folder, with the file's name where that is not ckpt.pt."""
        file = self.file
        if file.name == 'ckpt.pt':
            name = file.parent.name
        elif file.suffix == '.pt':
            name = f'{file.parent.name} {file.stem}'.strip()
        else:
            name = file.name
        return self.prefix + (name or file.stem)

    @property
    def tokens(self) -> int | None:
        """Tokens seen in training; None where that is not known."""
        settings = self.loaded.settings
        if self.step is None or 'gradient_accumulation_steps' not in settings:
            return None
        sizes = ('batch_size', 'block_size', 'gradient_accumulation_steps')
        return self.step * math.prod(settings[name] for name in sizes)

    @property
    def val_loss(self) -> float | None:
        loss = self.loaded.checkpoint.get('best_val_loss', math.nan)
        if self.trained and math.isfinite(loss):
            return float(loss)
        return None

    def encode(self, text: str) -> torch.Tensor:
        """Return a prompt as ids (T,), after the token that begins a text."""
        vocabulary = self.vocabulary
        if vocabulary.codec is None:
            raise UserError(f'{self.source} has no tokenizer here, so --prompt cannot be read')
        start = [] if vocabulary.begin is None else [vocabulary.begin]
        ids = start + vocabulary.codec.encode(text)
        return torch.tensor(ids[: self.model.config.block_size])

    def banner(self) -> str:
        """Return one line on what was looked at."""
        parts = [self.kind, f'{self.model.num_params() / 1e6:.2f}M parameters']
        if not self.trained:
            parts.append('untrained')
        if self.step is not None:
            parts.append(f'step {self.step:,}')
        if self.converted_from:
            parts.append(f'converted from {self.converted_from}')
        if self.tokens:
            parts.append(f'{self.tokens / 1e6:,.1f}M tokens')
        if self.val_loss is not None:
            parts.append(f'val loss {self.val_loss:.4f}')
        parts.append(self.source)
        return f'{self.name}: {", ".join(parts)}'


@dataclass
class LoadOptions:
    """
    How to load models.

    untrained: allow random weights
    dataset: the held-out text, instead of the checkpoint's dataset; '' for that one
    often: ids that come less often in the data are not usable (the first COUNTED tokens of each
        split are counted): a model that has hardly seen a token cannot tell it from others
    """

    device: str | torch.device = 'cpu'
    untrained: bool = False
    dataset: str = ''
    often: int = 1


def load_subject(path: str | Path, options: LoadOptions | None = None) -> Subject:
    """
    Load what `path` names: a run's folder, a checkpoint file, or anything else of `load_model`.

    UserError for what is none of these, and for weights that were never trained unless the options
    allow them.
    """
    options = options or LoadOptions()
    loaded = load_model(path, kernel='eager', dropout=0.0)
    trained = loaded.trained
    if not trained and not options.untrained:
        raise UserError(
            f'{path} was never trained: its scores would be those of random weights. Name a '
            'trained checkpoint, or say --untrained=True to look at one on purpose'
        )
    loaded.model.float().to(options.device).eval().requires_grad_(False)
    loaded.model.stream = torch.float32
    vocabulary = read_vocabulary(loaded, str(path), options)
    return Subject(loaded, str(path), trained, vocabulary)


def prefixes_of(folders: Iterable[Path]) -> dict[Path, str]:
    """
    Return what each folder's name needs in front so that no two folders share one: '', or its
    parents as far as they differ, such as a/ for a/run beside b/run. Keys are resolved paths.
    """
    resolved = {folder.resolve() for folder in folders}
    prefixes = {}
    for folder in resolved:
        others = [other for other in resolved if other != folder]
        length = 1  # of the end of the path that the name is
        while any(other.parts[-length:] == folder.parts[-length:] for other in others):
            length += 1
        prefixes[folder] = ''.join(f'{part}/' for part in folder.parts[-length:-1])
    return prefixes


def attention_name(model: GPT) -> str:
    """
    Return the name of a model's attention for people: MHA, GQA, MQA, MLA, or what its config says.

    A registered attention that inherits the config of another one goes by its name in MODELS.
    """
    registered = native.kind_of(model)
    for other in native.MODELS.values():
        derived = type(model) is not other and isinstance(model, other)
        if derived and type(model).Config.label is other.Config.label:
            return registered
    return model.config.label


# -------------------------------------------------------------------------------------------------
# the vocabulary


def read_vocabulary(loaded: LoadedModel, source: str, options: LoadOptions) -> Vocabulary:
    """
    Read what the tokens of a model are, and the text that was held out from its training.

    UserError where the options ask for a dataset that is missing or has other tokens.
    """
    folder, meta = find_dataset(loaded, options.dataset)
    if options.dataset and folder is None:
        raise UserError(
            f'--dataset={options.dataset} is not the text of {source}: it is missing, or has other '
            'tokens'
        )
    if options.often > 1 and folder is None:
        raise UserError(
            f'--often={options.often} counts tokens in the text of {source}, which is not here: '
            'name it by --dataset'
        )
    codec = tokenizer_of(loaded, meta)
    vocab_size = loaded.model.config.vocab_size
    begin, special = special_tokens(codec, vocab_size)
    held_out = None
    if folder is not None:
        used, held_out = tokens_in(folder, options.often)
    elif codec is not None:
        used = printable_tokens(codec, vocab_size)
    else:
        count = END_OF_TEXT if vocab_size in GPT2_VOCAB_SIZES else vocab_size
        used = torch.arange(count)
    kept = [i not in special and i != begin for i in used.tolist()]
    return Vocabulary(codec, begin, used[kept], held_out)


def find_dataset(loaded: LoadedModel, asked: str) -> tuple[Path | None, dict]:
    """
    Return the folder and the meta of the dataset that a model was trained on, or of the one asked
    for. The folder is None where it is not here or has other tokens; the meta is the model's then.
    """
    name = asked or loaded.settings.get('dataset', '')
    if not name or not (token_files.find(name) / 'train.bin').exists():
        return None, loaded.meta
    folder = token_files.find(name)
    meta = token_files.read_meta(folder)
    fits = meta['vocab_size'] <= loaded.model.config.vocab_size
    known = loaded.meta
    if loaded.tokenizer is not None:
        known = loaded.tokenizer.meta
    if not fits or (known and not token_files.same_tokens(known, meta)):
        return None, loaded.meta
    return folder, meta


def tokenizer_of(loaded: LoadedModel, meta: dict) -> Tokenizer | HFTokenizer | None:
    """Return the model's tokenizer; None where nothing says it, or its vocabulary is not here."""
    if loaded.tokenizer is not None:
        return loaded.tokenizer
    try:
        if meta.get('tokenizer'):
            return Tokenizer(meta)
        return codec_of(loaded).tokenizer
    except UserError:
        return None


def special_tokens(codec, vocab_size: int) -> tuple[int | None, set[int]]:
    """Return the id that begins a text, or None, and the ids that are no text."""
    name = '' if codec is None else codec.name
    if name == 'hf':
        return codec.bos, {*codec.eos, *codec.bpe.get_added_tokens_decoder()}
    if name == 'gpt2' or (codec is None and vocab_size in GPT2_VOCAB_SIZES):
        return END_OF_TEXT, {END_OF_TEXT}
    if name == 'bytes' or (name == 'char' and '\n' in codec.chars):
        return codec.encode('\n')[0], set()
    return None, set()


def printable_tokens(codec, vocab_size: int) -> torch.Tensor:
    """Return the ids whose text can be printed."""
    ids = []
    for i in range(min(vocab_size, codec.vocab_size)):
        text = codec.decode([i])
        if text.isprintable() and '\ufffd' not in text:  # that sign is a part of a character
            ids.append(i)
    return torch.tensor(ids)


@lru_cache(maxsize=8)
def tokens_in(folder: Path, often: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids that a dataset uses `often` times or more, and its validation split."""
    meta = token_files.read_meta(folder)
    vocab_size = meta['vocab_size']
    counts = np.zeros(vocab_size, dtype=np.int64)
    for split in ('train', 'val'):
        ids = token_files.read_split(folder, split, meta)[:COUNTED]
        counts += np.bincount(ids, minlength=vocab_size)[:vocab_size]
    used = torch.from_numpy(np.flatnonzero(counts >= often))
    return used, torch.from_numpy(ids.astype(np.int64))
