"""
The tokenizers of Hugging Face models: tokenizer.json with the interface of core's Tokenizer.

The `tokenizers` package reads the file, and nothing lies in between: what AutoTokenizer makes of a
local folder has been seen to drop white space.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from nanomla.checkpoints.tokens.identity import identity_of
from nanomla.core.checks import FLAG, TABLE, TEXT, check_entries
from nanomla.core.configurator import UserError
from nanomla.core.files import read_json
from nanomla.core.token_files import TOKEN_IDS

FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'tokenizer.model',
    'chat_template.jinja',
)
PROBES = (  # texts that must come back as they are
    ' a',
    '  two',
    'a ',
    '\n',
    '\n\n\tx = 1\n',
    ' \t \r\n',
    'def f(x):\n    return {"k": [x, -1]}  # naïve, ﬁt\n',
    '漢字 🙂 — “é”\n  ',
    'The end.',
)


class HFTokenizer:
    """
    A tokenizer.json as text to ids and back: byte-level BPE, or pieces with ▁ for a blank and
    <0x0A> for bytes. One that does not give texts back exactly, white space above all, is refused.

    files: tokenizer.json first, then those that stand beside it; an export copies them
    sha256: of what decides the ids of a text; datasets and checkpoints name the tokenizer by it
    bos: the id that begins a text, or None
    eos: the ids that end one
    prefix: the id before a text without a context in transformers: that of bos_token, whether texts
        begin with it or not, or of eos_token; None where there is neither
    leading_blank: whether decode_bytes puts a blank before each text, which is not in the text
    loses_blank: whether a text that begins with a blank has the ids of one without, as in Llama 2
        where transformers 5 has written it
    """

    name = 'hf'

    def __init__(self, files: Iterable[str | Path], config: dict):
        """config: the model's config.json, for bos_token_id and eos_token_id."""
        self.files = [Path(file) for file in files]
        path = self.files[0]
        self.bpe = open_tokenizer(path)
        # A file may ask for texts of one length: here they are as long as they are.
        self.bpe.no_truncation()
        self.bpe.no_padding()
        vocab = self.bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        byte_level = is_byte_level(path)
        self.bytes_of = token_bytes(self.bpe, vocab, byte_level, path)
        # These tokenizers put a blank in front of each text.
        begins_with_blank = self.decode_bytes(self.encode('a')).startswith(b' ')
        self.leading_blank = begins_with_blank and not byte_level
        self.loses_blank = self.leading_blank and self.encode(' a') == self.encode('a')
        self.check_probes()
        settings = read_tokenizer_config(self.files)
        named = [vocab.get(token_text(settings, name)) for name in ('bos_token', 'eos_token')]
        self.prefix = next((i for i in named if i is not None), None)
        self.bos = self.find_bos(settings, named[0], config)
        self.eos = ids_that_end(config)

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """
        Return the ids of a whole file as an array.

        Unlike in `encode`, a special token inside a text is text like any other.
        """
        self.bpe.encode_special_tokens = True
        try:
            # _fast: no offsets; a batch of one is the way to it
            encoded = self.bpe.encode_batch_fast([text], add_special_tokens=False)[0]
        finally:
            self.bpe.encode_special_tokens = False
        return np.asarray(encoded.ids, np.int64)

    @cached_property
    def sha256(self) -> str:
        return identity_of(self.bpe.to_str())

    @property
    def meta(self) -> dict:
        """The entries of a meta.json that name this tokenizer."""
        return dict(tokenizer=self.name, tokenizer_sha256=self.sha256)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of `ids`; a part of a character stays a part."""
        return b''.join(self.bytes_of.get(i, b'') for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        text = self.decode_bytes(ids).decode(errors='replace')
        return text.removeprefix(' ') if self.leading_blank else text

    def check_probes(self) -> None:
        for text in PROBES:
            back = self.decode(self.encode(text))
            expected = text.removeprefix(' ') if self.loses_blank else text
            if back != expected:
                raise UserError(
                    f'{self.files[0]} turns {text!r} into {back!r}: '
                    'a tokenizer that changes texts is of no use here'
                )

    def find_bos(self, settings: dict, named: int | None, config: dict) -> int | None:
        """
        Return the id that begins a text, where the tokenizer or its config adds one.

        named: the id of the bos_token in settings
        """
        bos = config.get('bos_token_id') if named is None else named
        adds_it = settings.get('add_bos_token') or self.bpe.encode('').ids[:1] == [bos]
        return bos if adds_it else None


def token_text(settings: dict, name: str) -> str | None:
    """Return the text of a special token in tokenizer_config.json."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get('content')
    return token if isinstance(token, str) else None


def read_tokenizer(folder: Path, config: dict) -> HFTokenizer | None:
    """Return the tokenizer of a model's folder; None where it has no tokenizer.json."""
    if not (folder / 'tokenizer.json').exists():
        return None
    files = [folder / name for name in FILES if (folder / name).exists()]
    tokenizer = HFTokenizer(files, config)
    tokenizer.eos |= ids_that_end(read_settings(folder / 'generation_config.json'))
    if tokenizer.loses_blank:
        print(
            f'{files[0]}: a text that begins with a blank has the ids of the text without it',
            file=sys.stderr,
        )
    return tokenizer


def open_tokenizer(path: Path):
    # prepare.py has processes of its own; threads would warn whenever this process forks.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(f'{path} needs tokenizers: pip install -e .[convert]') from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # its errors are bare Exceptions
        why = ' '.join(str(error).split())[:160]
        raise UserError(f'{path} is no tokenizer that can be loaded: {why}') from None


def is_byte_level(path: Path) -> bool:
    decoder = read_json(path).get('decoder')  # of a tokenizer that was opened: an object
    return 'ByteLevel' in json.dumps(decoder)


def read_tokenizer_config(files: list[Path]) -> dict:
    """Return tokenizer_config.json, {} where it is not among the files."""
    for file in files:
        if file.name == 'tokenizer_config.json':
            return read_settings(file)
    return {}


# Of tokenizer_config.json and generation_config.json.
SETTINGS = dict(
    bos_token=TEXT | TABLE | None,
    add_bos_token=FLAG | None,
    bos_token_id=TOKEN_IDS,
    eos_token_id=TOKEN_IDS,
)


def read_settings(file: Path) -> dict:
    """Return the content of a JSON file, {} where it is not there."""
    if not file.exists():
        return {}
    try:
        settings = read_json(file)
    except (OSError, ValueError):
        raise UserError(f'{file} cannot be read: it is damaged or no JSON') from None
    try:
        check_entries(settings, SETTINGS)
        if isinstance(settings.get('bos_token'), dict):
            check_entries(settings['bos_token'], dict(content=TEXT))
    except ValueError as error:
        raise UserError(f'{file} cannot be used: {error}') from None
    return settings


def ids_that_end(config: dict) -> set[int]:
    eos = config.get('eos_token_id')
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list) else {eos}


# -------------------------------------------------------------------------------------------------
# the bytes that a token stands for


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: visible bytes stand for themselves, the others from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return alphabet


ALPHABET = byte_alphabet()


def bytes_of_alphabet(token: str) -> bytes:
    return bytes(ALPHABET[character] for character in token)


def bytes_of_piece(token: str) -> bytes:
    if re.fullmatch('<0x[0-9A-F]{2}>', token):
        return bytes([int(token[3:5], 16)])
    return token.replace('\u2581', ' ').encode()


def token_bytes(bpe, vocab: dict[str, int], byte_level: bool, path: Path) -> dict[int, bytes]:
    """Return the bytes of every token by its id. Added tokens stand for their own text."""
    added = bpe.get_added_tokens_decoder()
    found = {i: token.content.encode() for i, token in added.items()}
    bytes_of = bytes_of_alphabet if byte_level else bytes_of_piece
    for token, i in vocab.items():
        if i in found:
            continue
        try:
            found[i] = bytes_of(token)
        except KeyError as error:
            raise UserError(
                f'{path} is no byte-level tokenizer that can be used: '
                f'a token has the character {error}'
            ) from None
    return found
