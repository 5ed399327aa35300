"""
The tokenizers of other people's models: tokenizer.json of the Hugging Face layout with the interface of
dataset.Tokenizer. The `tokenizers` package reads it, and nothing lies in between: what AutoTokenizer
makes of a local folder has been seen to drop white space.
"""

import json
import re
from pathlib import Path

from nanomla.core.configurator import UserError

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
    tokenizer.json with the interface of dataset.Tokenizer, and `bos` (id before a text, or None) and `eos`
    (ids that end one). Byte-level BPE, or pieces with ▁ for a blank and <0x0A> for bytes. What it does not
    give back exactly, white space above all, is refused.
    """

    name = 'hf'

    def __init__(self, files, shape):
        self.files = [Path(file) for file in files]
        path, *others = self.files
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(
                f'{path} needs tokenizers: pip install -r requirements-convert.txt'
            ) from None
        try:
            self.bpe = Tokenizer.from_file(str(path))
        except Exception as error:  # its errors are bare Exceptions
            raise UserError(
                f'{path} is no tokenizer that can be loaded: {" ".join(str(error).split())[:160]}'
            ) from None
        vocab = self.bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        byte_level = 'ByteLevel' in json.dumps(
            json.loads(path.read_text(encoding='utf-8')).get('decoder')
        )
        self.bytes_of = {
            i: token.content.encode() for i, token in self.bpe.get_added_tokens_decoder().items()
        }
        try:
            self.bytes_of |= {
                i: (of_alphabet if byte_level else of_pieces)(token)
                for token, i in vocab.items()
                if i not in self.bytes_of
            }
        except KeyError as error:
            raise UserError(
                f'{path} is no byte-level tokenizer that can be used: a token has the character {error}'
            ) from None
        first = self.encode('a')
        self.blank = not byte_level and self.decode_bytes(first).startswith(
            b' '
        )  # these begin each text with a blank
        for text in PROBES:
            if (back := self.decode(self.encode(text))) != text:
                raise UserError(
                    f'{path} turns {text!r} into {back!r}: a tokenizer that changes texts is of no use here'
                )
        try:
            extra = dict(
                next(
                    (
                        json.loads(file.read_text(encoding='utf-8'))
                        for file in others
                        if file.name == 'tokenizer_config.json'
                    ),
                    {},
                )
            )
        except (ValueError, TypeError):
            raise UserError(
                f'{path.with_name("tokenizer_config.json")} cannot be read: it is damaged or no JSON'
            ) from None
        bos = extra.get('bos_token')
        bos = vocab.get(
            bos.get('content') if isinstance(bos, dict) else bos, shape.get('bos_token_id')
        )
        self.bos = (
            bos if extra.get('add_bos_token') or self.bpe.encode('').ids[:1] == [bos] else None
        )
        eos = shape.get('eos_token_id')
        self.eos = set(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids):
        return b''.join(self.bytes_of.get(i, b'') for i in ids)

    def decode(self, ids):
        text = self.decode_bytes(ids).decode(errors='replace')
        return text[1:] if self.blank and text[:1] == ' ' else text


VISIBLE = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # GPT-2's alphabet: these bytes stand for themselves,
HIDDEN = [
    byte for byte in range(256) if byte not in VISIBLE
]  # and these are written from U+0100 on
ALPHABET = {chr(byte): byte for byte in VISIBLE} | {
    chr(256 + i): byte for i, byte in enumerate(HIDDEN)
}


def of_alphabet(token):
    return bytes(ALPHABET[c] for c in token)


def of_pieces(token):
    return (
        bytes([int(token[3:5], 16)])
        if re.fullmatch('<0x[0-9A-F]{2}>', token)
        else token.replace('\u2581', ' ').encode()
    )
