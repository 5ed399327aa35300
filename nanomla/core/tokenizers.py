"""Text to token ids and back: characters, bytes and GPT-2's byte pairs; and text as its tokens come."""

import codecs

import numpy as np

from nanomla.core.configurator import UserError


class Tokenizer:
    """Text to ids and back, as `meta` names it: 'char' (with meta['chars']), 'bytes' or 'gpt2'."""

    def __init__(self, meta):
        self.name = meta['tokenizer']
        if self.name == 'char':
            self.chars = meta['chars']
            self.vocab_size = len(self.chars)
            points = np.array([ord(c) for c in self.chars])
            self.id_of = np.full(
                points.max() + 2, -1, np.int32
            )  # by code point; the last entry stands for all above
            self.id_of[points] = np.arange(len(points))
        elif self.name == 'bytes':
            self.vocab_size = 256
        elif self.name == 'gpt2':
            self.bpe = gpt2_bpe()
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"tokenizer '{self.name}' is not known: use char, bytes or gpt2")

    def encode(self, text):
        """The ids of `text`. UserError names the first character that a char vocabulary lacks."""
        if self.name == 'gpt2':
            return self.bpe.encode(text, allowed_special={'<|endoftext|>'})
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """
        `encode` for whole files: an array, and '<|endoftext|>' inside a text is text like any other.
        For tokenizer 'bytes' the text may be bytes.
        """
        if self.name == 'bytes':
            raw = text if isinstance(text, bytes) else text.encode(errors='surrogateescape')
            return np.frombuffer(raw, np.uint8)
        if self.name == 'gpt2':
            try:
                return self.bpe.encode_to_numpy(text, disallowed_special=())
            except (
                ValueError
            ):  # its regex has no stack for a run of a million blanks: half of the text, twice
                if len(text) < 1000:
                    raise
                middle = len(text) // 2
                return np.concatenate(
                    [self.encode_array(text[:middle]), self.encode_array(text[middle:])]
                )
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
        ids = self.id_of[np.minimum(points, len(self.id_of) - 1)]
        if (ids < 0).any():
            unknown = ''.join(sorted(set(text) - set(self.chars)))
            raise UserError(
                f'the text has characters this model has never seen: {unknown[:40]!r}; '
                f'it knows {"".join(self.chars)[:200]!r}'
            )
        return ids

    def decode_bytes(self, ids):
        """UTF-8 bytes of `ids`; a part of a character stays a part. Padding ids give nothing."""
        ids = [i for i in ids if i < self.vocab_size]
        if self.name == 'bytes':
            return bytes(ids)
        if self.name == 'gpt2':
            return self.bpe.decode_bytes(ids)
        return ''.join(self.chars[i] for i in ids).encode()

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors='replace')


def gpt2_bpe():
    """tiktoken's GPT-2 byte-pair encoding. It needs its vocabulary file: from a network, or a cache."""
    try:
        import tiktoken
    except ImportError:
        raise UserError('GPT-2 tokens need tiktoken: pip install tiktoken') from None
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:  # requests' errors come in many classes
        raise UserError(
            'tiktoken could not load its GPT-2 vocabulary: connect to the network once, or set '
            f'TIKTOKEN_CACHE_DIR to a folder that has it ({type(error).__name__})'
        ) from None


class Teller:
    """
    Token ids as text while they come: a character of several tokens is told once it is whole, and nothing
    from the first of the `stops` on; what may be the beginning of a stop waits until it is known.
    decode: a list of ids -> UTF-8 bytes; ends: ids that end a text, untold.
    """

    def __init__(self, decode, stops=(), ends=()):
        self.decode, self.stops, self.ends = decode, stops, ends
        self.characters = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.waiting, self.ended = '', False

    def tell(self, token):
        """The text that this token makes certain, '' from the end on; `ended` says whether there is any more."""
        if self.ended or token in self.ends:
            text, self.ended = '' if self.ended else self.rest(), True
            return text
        return self.after(self.characters.decode(self.decode([token])))

    def after(self, text):
        text = self.waiting + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.ended, self.waiting = True, ''
            return text[: min(found)]
        hold = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self.waiting = text[len(text) - hold :]
        return text[: len(text) - hold]

    def rest(self):
        """What still waits when no more tokens come."""
        if self.ended:
            return ''
        text = self.after(self.characters.decode(b'', final=True))
        text, self.waiting = text + self.waiting, ''
        return text
