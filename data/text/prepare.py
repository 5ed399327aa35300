"""
A dataset of your own text: python data/text/prepare.py FILE... --tokenizer=gpt2 --out=FOLDER

A FILE is UTF-8 text, plain or packed as .xz, .gz or .bz2; - is standard input. Several files are
joined in the order given, by a newline, or for gpt2 by <|endoftext|>. The end of the text
validates. train.bin, val.bin and meta.json go to FOLDER and replace a dataset there only when they
are complete.

The files are read twice, in blocks: once to check and count them, once to tokenise. So memory does
not grow with the text. GPT-2 tokens are made in parallel, of chunks that are cut where the tokens
of the whole text have a boundary anyway.
"""

import bz2
import codecs
import gzip
import hashlib
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository

from nanomla.core.checks import check_choice
from nanomla.core.configurator import UserError, configure
from nanomla.core.files import progress_bar, writing
from nanomla.core.token_files import TokenWriter, in_order, summary, val_begin
from nanomla.core.tokenizers import Tokenizer
from nanomla.training.next_steps import print_next_steps

tokenizer = 'char'  # char (the characters of the text), bytes (any file) or gpt2 (50,257 tokens)
out = ''  # the folder of the dataset ('' = data/text, which is --dataset=text in train.py)
val_fraction = 0.1  # the share of the text, at its end, that validates
num_proc = 0  # threads that tokenise (0 = one a core)


def read_bytes(path: Path, block_size: int = 2**20) -> Iterator[bytes]:
    """Yield a file in blocks of bytes, unpacked."""
    open_packed = {'.xz': lzma.open, '.gz': gzip.open, '.bz2': bz2.open}
    try:
        with open_packed.get(path.suffix, open)(path, 'rb') as file:
            while block := file.read(block_size):
                yield block
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        why = getattr(error, 'strerror', None) or error
        raise UserError(f'cannot read {path}: {why}') from None


def read_text(path: Path, name: str) -> Iterator[str]:
    """Yield a file in blocks of text."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    read = 0
    for block in chain(read_bytes(path), [b'']):
        begin = read - len(decoder.getstate()[0])  # a character may begin in the block before
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place, byte = begin + error.start, error.object[error.start]
            raise UserError(
                f'{name} is not UTF-8 text: byte {place} is {byte:#04x}; '
                'convert it to UTF-8 or use --tokenizer=bytes'
            ) from None
        read += len(block)
        if text:
            yield text


END_OF_TEXT = object()  # stands between two files for gpt2


@dataclass
class Text:
    """The text of all files, one after the other: str, or bytes for tokenizer 'bytes'."""

    files: list[tuple[str, Path]]  # the name that a person gave, and the path
    tokenizer: str
    chunk_size: int = 2**18  # characters tokenised at a time

    def blocks(self) -> Iterator[str | bytes | object]:
        """Yield the text in blocks, and what stands between two files."""
        between = {'char': '\n', 'bytes': b'\n', 'gpt2': END_OF_TEXT}[self.tokenizer]
        for number, (name, path) in enumerate(self.files):
            if number:
                yield between
            if self.tokenizer == 'bytes':
                yield from read_bytes(path)
            else:
                yield from read_text(path, name)

    def survey(self) -> tuple[int, str, str]:
        """Return the length of the text, its sha256 and its characters ('' for bytes)."""
        length, digest, chars = 0, hashlib.sha256(), set()
        for block in self.blocks():
            if block is END_OF_TEXT:
                digest.update(b'\n')
                continue
            length += len(block)
            if self.tokenizer == 'bytes':
                digest.update(block)
            else:
                digest.update(block.encode())
                chars.update(block)
        return length, digest.hexdigest(), ''.join(sorted(chars))

    def divided_blocks(self, cut: int) -> Iterator[tuple[str, str | bytes | object]]:
        """Yield (split, block); the block that holds character `cut` is divided there."""
        place = 0
        for block in self.blocks():
            if block is END_OF_TEXT:
                yield 'train' if place <= cut else 'val', END_OF_TEXT
                continue
            head = max(cut - place, 0)
            if block[:head]:
                yield 'train', block[:head]
            if block[head:]:
                yield 'val', block[head:]
            place += len(block)

    def chunks(self, cut: int) -> Iterator[tuple[str, str | bytes | object]]:
        """Yield (split, chunk) of up to `chunk_size`, and (split, END_OF_TEXT)."""
        split, rest = 'train', self.nothing()
        for next_split, block in self.divided_blocks(cut):
            if rest and (next_split != split or block is END_OF_TEXT):
                yield split, rest
                rest = self.nothing()
            split = next_split
            if block is END_OF_TEXT:
                yield split, END_OF_TEXT
                continue
            rest += block
            while len(rest) > self.chunk_size:
                end = self.chunk_end(rest)
                yield split, rest[:end]
                rest = rest[end:]
        if rest:
            yield split, rest

    def nothing(self) -> str | bytes:
        return b'' if self.tokenizer == 'bytes' else ''

    def chunk_end(self, text: str | bytes) -> int:
        """Return where the first chunk of a longer text ends."""
        if self.tokenizer != 'gpt2':
            return self.chunk_size
        return token_boundary(text[: self.chunk_size]) or self.chunk_size


def token_boundary(text: str) -> int:
    """
    Return the last place before a newline or a space that comes after no blank; 0 if there is none.

    GPT-2's pattern ends a piece there whatever follows, so the tokens of both sides are the tokens
    of the whole. Not so after a newline: how a run of blanks is divided depends on what follows it.
    """
    for blank in '\n', ' ':
        place = text.rfind(blank)
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(blank, 0, place)
        if place > 0:
            return place
    return 0


def write_dataset(text: Text, folder: str | Path) -> dict:
    """Tokenise the text into `folder` and return the meta."""
    length, sha256, chars = text.survey()
    cut = val_begin(length, val_fraction)
    names = ', '.join(Path(name).name for name, _ in text.files)
    meta = dict(tokenizer=tokenizer, source=f'{names} (your own text)', sha256=sha256)
    if tokenizer == 'char':
        meta['chars'] = chars
    codec = Tokenizer(meta)

    def encode(part):
        split, chunk = part
        if chunk is END_OF_TEXT:
            return split, 0, [codec.bpe.eot_token]
        return split, len(chunk), codec.encode_array(chunk)

    with (
        TokenWriter(folder, codec.vocab_size) as files,
        progress_bar(length, ' characters') as bar,
    ):
        for split, characters, ids in in_order(encode, text.chunks(cut), num_proc):
            files.add(split, ids)
            bar.update(characters)
        return files.publish(meta)


def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith('--') or arg == '-h']
    configure(globals(), options)
    names = [arg for arg in sys.argv[1:] if arg not in options]
    if not names:
        raise UserError('which text? python data/text/prepare.py FILE... (--help tells more)')
    check_choice('tokenizer', tokenizer, ['char', 'bytes', 'gpt2'])
    folder = out or HERE
    with tempfile.TemporaryDirectory() as temporary:
        files = [(name, Path(name)) for name in names]
        if '-' in names:  # standard input can be read only once, so to a file first
            copy = Path(temporary) / 'stdin'
            with writing(copy), open(copy, 'wb') as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            standard_input = ('standard input', copy)
            files = [standard_input if name == '-' else (name, path) for name, path in files]
        meta = write_dataset(Text(files, tokenizer), folder)
    print(summary(folder, meta))
    config, trained = 'config/train_shakespeare_mla.py', 'out-shakespeare-mla'
    if tokenizer == 'gpt2':  # 50,257 tokens want a larger model, and on a CPU smaller batches
        config, trained = 'config/books_modern.py', 'out-books-modern'
    print_next_steps(
        ['train.py', config, f'--dataset={out or "text"}'],
        ['sample.py', f'--out_dir={trained}'],
    )


if __name__ == '__main__':
    main()
