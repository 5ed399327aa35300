"""Text to token ids and back: characters, bytes and GPT-2's byte pairs; text token by token."""

import codecs
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from nanomla.core.configurator import UserError

END_OF_TEXT = '<|endoftext|>'
SHORTEST_HALF = 1000  # characters; a text that GPT-2's pattern refuses is not cut further


class Tokenizer:
    """Text to ids and back, as `meta` names it: 'char' (with meta['chars']), 'bytes' or 'gpt2'."""

    def __init__(self, meta: dict):
        self.name = meta['tokenizer']
        if self.name == 'char':
            self.chars = meta['chars']
            self.vocab_size = len(self.chars)
            self.id_of = ids_by_code_point(self.chars)
        elif self.name == 'bytes':
            self.vocab_size = 256
        elif self.name == 'gpt2':
            self.bpe = gpt2_bpe()
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"tokenizer '{self.name}' is not known: use char, bytes or gpt2")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. UserError names the characters that a char vocabulary lacks."""
        if self.name == 'gpt2':
            return self.bpe.encode(text, allowed_special={END_OF_TEXT})
        return self.encode_array(text).tolist()

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """
        Return the ids of a whole file as an array.

        Unlike in `encode`, '<|endoftext|>' inside a text is text like any other. For tokenizer
        'bytes' the text may be bytes.
        """
        if self.name == 'bytes':
            raw = text if isinstance(text, bytes) else text.encode(errors='surrogateescape')
            return np.frombuffer(raw, np.uint8)
        if self.name == 'gpt2':
            return self.encode_gpt2(text)
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
        ids = self.id_of[np.minimum(points, len(self.id_of) - 1)]
        if (ids < 0).any():
            unknown = ''.join(sorted(set(text) - set(self.chars)))
            known = ''.join(self.chars)[:200]
            raise UserError(
                f'the text has characters this model has never seen: {unknown[:40]!r}; '
                f'it knows {known!r}'
            )
        return ids

    def encode_gpt2(self, text: str) -> np.ndarray:
        """Return GPT-2's ids of `text`, in which no special token is looked for."""
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            if len(text) < SHORTEST_HALF:
                raise
        # tiktoken's regex has no stack for a run of a million blanks: encode the text in halves.
        middle = len(text) // 2
        return np.concatenate([self.encode_gpt2(text[:middle]), self.encode_gpt2(text[middle:])])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of `ids`, perhaps only a part of a character. Skip padding ids."""
        ids = [i for i in ids if i < self.vocab_size]
        if self.name == 'bytes':
            return bytes(ids)
        if self.name == 'gpt2':
            return self.bpe.decode_bytes(ids)
        return ''.join(self.chars[i] for i in ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with a replacement character for broken UTF-8."""
        return self.decode_bytes(ids).decode(errors='replace')


def opening(tokenizer: Tokenizer) -> list[int]:
    """
    Return the ids that a text of a model's own begins with: a newline, or the first character of a
    vocabulary that has none. Tokenizers of other models are taken, too.
    """
    if tokenizer.name == 'char' and '\n' not in tokenizer.chars:
        return [0]
    return tokenizer.encode('\n')


def ids_by_code_point(chars: Sequence[str]) -> np.ndarray:
    """Return the id of each code point, -1 if it has none; the last entry is for all above."""
    points = np.array([ord(c) for c in chars])
    ids = np.full(points.max() + 2, -1, np.int32)
    ids[points] = np.arange(len(points))
    return ids


def gpt2_bpe():
    """Return tiktoken's GPT-2 encoding, whose vocabulary comes from a network or a cache."""
    try:
        import tiktoken
    except ImportError:
        raise UserError('GPT-2 tokens need tiktoken: pip install tiktoken') from None
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:  # the network's errors come in many classes
        raise UserError(
            'tiktoken could not load its GPT-2 vocabulary: connect to the network once, or set '
            f'TIKTOKEN_CACHE_DIR to a folder that has it ({type(error).__name__})'
        ) from None


class StreamDecoder:
    """
    Turn token ids into text one at a time.

    A character that is made of several tokens is returned with its last one. Nothing is returned
    from the first of the `stops` on; text that may be the beginning of a stop is held back until
    the following tokens decide it.

    decode: a list of ids -> UTF-8 bytes
    ends:   ids that end the text and are not part of it
    """

    def __init__(
        self,
        decode: Callable[[list[int]], bytes],
        stops: Sequence[str] = (),
        ends: Collection[int] = (),
    ):
        self.decode, self.stops, self.ends = decode, stops, ends
        self.utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.held_back = ''
        self.stopped = False  # by one of the stops or ends

    def add(self, token: int) -> str:
        """Return the text that becomes certain with this token, '' once `stopped` is True."""
        if self.stopped:
            return ''
        if token in self.ends:
            text = self.finish()
            self.stopped = True
            return text
        return self.until_stop(self.utf8.decode(self.decode([token])))

    def finish(self) -> str:
        """Return what is still held back, for when no more tokens come."""
        if self.stopped:
            return ''
        text = self.until_stop(self.utf8.decode(b'', final=True)) + self.held_back
        self.held_back = ''
        return text

    def until_stop(self, new: str) -> str:
        """Return the held back and the new text as far as no stop can begin in it."""
        text = self.held_back + new
        places = [text.find(stop) for stop in self.stops]
        found = [place for place in places if place >= 0]
        if found:
            self.stopped, self.held_back = True, ''
            return text[: min(found)]
        certain = len(text) - max((overlap(text, stop) for stop in self.stops), default=0)
        self.held_back = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`, without being all of it."""
    for length in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
