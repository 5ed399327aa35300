"""Text that a model is measured on: as the ids of its own tokenizer, with the number of bytes."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomla.checkpoints.load import LoadedModel, TextCodec
from nanomla.core import token_files
from nanomla.core.configurator import UserError


@dataclass
class ModelText:
    """
    ids: (N,), an array or a memmap
    n_bytes: UTF-8 bytes of all but the first id, for bits per byte
    name: the file or the dataset
    """

    ids: np.ndarray
    n_bytes: int
    name: str


def read_text(
    loaded: LoadedModel,
    codec: TextCodec,
    data: str = '',
    split: str = 'val',
    max_tokens: int = 0,
    option: str = '--data',
) -> ModelText:
    """
    Read the text that a model is measured on.

    data: a text file, or a dataset by its folder or its name in data/; '' is the dataset that the
        model was trained on
    split: of a dataset, 'train' or 'val'
    max_tokens: only the first so many; 0 is all
    option: the setting that names the text, for messages
    """
    if os.path.isfile(data):
        return read_text_file(data, codec, max_tokens, option)
    name = data or loaded.settings.get('dataset', '')
    if not name:
        raise UserError(
            f'{loaded.path} does not say what text it was trained on: '
            f'name a dataset or a text file by {option}'
        )
    if data:
        prepare(data, option)
    else:
        token_files.require(name, loaded.path, option)
    ids = read_split(name, codec, split, loaded.path, option)
    if max_tokens:
        ids = ids[:max_tokens]
    return ModelText(ids, bytes_of_ids(ids[1:], codec), name)


def read_text_file(
    path: str, codec: TextCodec, max_tokens: int = 0, option: str = '--data'
) -> ModelText:
    """Read a whole text file, behind the id that begins a text where the model has one."""
    tokenizer = codec.tokenizer
    text = decode_file(path, tokenizer.name == 'bytes', option)
    try:
        ids = np.asarray(tokenizer.encode_array(text), np.int64)
    except UserError as error:
        raise UserError(f'{option}={path}: {error}') from None
    n_bytes = len(text if isinstance(text, bytes) else text.encode())
    if codec.begin is not None:
        ids = np.concatenate([[codec.begin], ids])
    else:
        # The first id is never scored, so its bytes do not count: those that are in the file.
        n_bytes -= len(tokenizer.decode_bytes(ids[:1].tolist())) - codec.leading_blank
    if max_tokens and len(ids) > max_tokens:
        n_bytes -= len(tokenizer.decode_bytes(ids[max_tokens:].tolist()))
        ids = ids[:max_tokens]
    return ModelText(ids, n_bytes, path)


def decode_file(path: str, may_be_binary: bool, option: str = '--data') -> str | bytes:
    """Return the text of a file without a byte order mark, or its bytes where it is no UTF-8."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{option}={path} cannot be read: {error.strerror or error}') from None
    if not raw:
        raise UserError(f'{option}={path} is empty: name a file with text')
    try:
        return raw.decode('utf-8-sig')
    except UnicodeDecodeError:
        if may_be_binary:
            return raw
        raise UserError(f'{option}={path} cannot be read: it is not UTF-8 text') from None


def prepare(name: str, option: str) -> None:
    """Make the dataset that a person named, where it is missing."""
    folder = token_files.find(name)
    if not os.path.exists(folder):
        raise UserError(
            f'{option}={name} is neither a text file nor a dataset: {folder} is not there'
        )
    token_files.prepare_if_missing(name)


def read_split(name: str, codec: TextCodec, split: str, model: str, option: str) -> np.ndarray:
    """Return the ids of one split of a dataset. UserError where they are not those of `model`."""
    folder = token_files.find(name)
    meta = token_files.read_meta(folder)
    if not token_files.same_tokens(meta, codec.meta):
        raise UserError(
            f'{folder} holds tokens of another vocabulary ({meta["tokenizer"]}) than {model} has '
            f'({codec.tokenizer.name}): give its text as a file by {option}'
        )
    ids = token_files.read_split(folder, split, meta)
    largest = int(ids.max())
    if largest >= codec.tokenizer.vocab_size:
        raise UserError(
            f'{folder}/{split}.bin holds token {largest}, '
            f'but the vocabulary has {codec.tokenizer.vocab_size}'
        )
    return ids


def bytes_of_ids(ids: np.ndarray, codec: TextCodec) -> int:
    """Return how many UTF-8 bytes many ids have together."""
    total = 0
    for i, count in enumerate(np.bincount(ids)):
        if count:
            total += int(count) * len(codec.tokenizer.decode_bytes([i]))
    return total
