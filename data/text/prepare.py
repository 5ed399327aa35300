"""
A dataset of your own text: python data/text/prepare.py FILE... --tokenizer=gpt2 --out=FOLDER

A FILE is UTF-8 text, plain or packed as .xz, .gz or .bz2; - is standard input. Several files are
joined in the order given: by a newline, for gpt2 by <|endoftext|>, for a model's tokenizer by what
ends and begins a document there. The end of the text validates. train.bin, val.bin and meta.json go
to FOLDER and replace a dataset there only when they are complete; a model's tokenizer.json goes
along.

The files are read twice, in blocks: once to check and count them, once to tokenise. So memory does
not grow with the text. Tokens are made in parallel, of chunks that are cut where the tokens of the
whole text have a boundary anyway. After an interruption the same command resumes.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository

from nanomla.core.configurator import UserError, configure
from nanomla.core.files import progress_bar, writing
from nanomla.core.token_files import Progress, TokenWriter, in_order, summary, val_begin
from nanomla.core.tokenizers import Tokenizer
from nanomla.training.next_steps import print_next_steps

if TYPE_CHECKING:
    from nanomla.checkpoints.tokens.prepare import DocumentCodec

tokenizer = 'char'  # char | bytes (any file) | gpt2 | a model: its folder, or its name on the hub
out = ''  # the folder of the dataset ('' = data/text, which is --dataset=text in train.py)
val_fraction = 0.1  # the share of the text, at its end, that validates
num_proc = 0  # threads or processes that tokenise (0 = one a core)


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
            position, byte = begin + error.start, error.object[error.start]
            raise UserError(
                f'{name} is not UTF-8 text: byte {position} is {byte:#04x}; '
                'convert it to UTF-8 or use --tokenizer=bytes'
            ) from None
        read += len(block)
        if text:
            yield text


END_OF_TEXT = None  # stands between two files that are documents of their own
BUILT_IN = ('char', 'bytes', 'gpt2')


@dataclass
class Text:
    """The text of all files, one after the other: str, or bytes for tokenizer 'bytes'."""

    files: list[tuple[str, Path]]  # the name that a person gave, and the path
    tokenizer: str
    codec: 'DocumentCodec | None' = None  # of a model's tokenizer
    chunk_size: int = 2**18  # characters tokenised at a time

    def blocks(self) -> Iterator[str | bytes | None]:
        """Yield the text in blocks, and what stands between two files."""
        between = {'char': '\n', 'bytes': b'\n'}.get(self.tokenizer, END_OF_TEXT)
        for number, (name, path) in enumerate(self.files):
            if number:
                yield between
            if self.tokenizer == 'bytes':
                yield from read_bytes(path)
            else:
                yield from read_text(path, name)

    def survey(self) -> tuple[int, str, str]:
        """Return the length of the text, its sha256 and, for char, its characters."""
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
            if self.tokenizer == 'char':
                chars.update(block)
        return length, digest.hexdigest(), ''.join(sorted(chars))

    def divided_blocks(self, cut: int) -> Iterator[tuple[str, str | bytes | None]]:
        """Yield (split, block); the block that holds character `cut` is divided there."""
        position = 0
        for block in self.blocks():
            if block is END_OF_TEXT:
                yield 'train' if position <= cut else 'val', END_OF_TEXT
                continue
            head = max(cut - position, 0)
            if block[:head]:
                yield 'train', block[:head]
            if block[head:]:
                yield 'val', block[head:]
            position += len(block)

    def chunks(self, cut: int) -> Iterator[tuple[str, str | bytes | None]]:
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
                end, begin = self.chunk_end(rest)
                yield split, rest[:end]
                rest = rest[begin:]
        if rest:
            yield split, rest

    def nothing(self) -> str | bytes:
        return b'' if self.tokenizer == 'bytes' else ''

    def chunk_end(self, text: str | bytes) -> tuple[int, int]:
        """Return where the first chunk of a longer text ends, and where the next one begins."""
        if self.codec:
            return self.codec.cut(text, self.chunk_size)
        end = self.chunk_size
        if self.tokenizer == 'gpt2':
            end = token_boundary(text[:end]) or end
        return end, end


def token_boundary(text: str) -> int:
    """
    Return the last position before a newline or space that follows no whitespace; 0 if none is.

    GPT-2's pattern ends a piece there whatever follows, so the tokens of both sides are the tokens
    of the whole. Not so after a newline: how a run of blanks is divided depends on what follows it.
    """
    for blank in '\n', ' ':
        position = text.rfind(blank)
        while position > 0 and text[position - 1].isspace():
            position = text.rfind(blank, 0, position)
        if position > 0:
            return position
    return 0


@dataclass
class Encoding:
    """
    How parts of the text become tokens.

    meta: names the tokenizer; encode_part: (split, text) -> split, characters, ids
    make_pool: of the threads or processes in which encode_part runs
    """

    meta: dict
    vocab_size: int
    encode_part: Callable
    make_pool: Callable = ThreadPoolExecutor


def encoding_of(text: Text, chars: str) -> Encoding:
    if text.codec:
        from nanomla.checkpoints.tokens.prepare import encode_part

        codec = text.codec
        return Encoding(codec.meta, codec.vocab_size, encode_part, codec.pool)
    meta = dict(tokenizer=tokenizer)
    if tokenizer == 'char':
        meta['chars'] = chars
    built_in = Tokenizer(meta)

    def encode(part):
        split, chunk = part
        if chunk is END_OF_TEXT:
            return split, 0, [built_in.bpe.eot_token]
        return split, len(chunk), built_in.encode_array(chunk)

    return Encoding(meta, built_in.vocab_size, encode)


def write_dataset(text: Text, folder: str | Path) -> dict:
    """Tokenise the text into `folder` and return the meta."""
    length, sha256, chars = text.survey()
    cut = val_begin(length, val_fraction)
    names = ', '.join(Path(name).name for name, _ in text.files)
    encoding = encoding_of(text, chars)
    meta = encoding.meta | dict(source=f'{names} (your own text)', sha256=sha256)
    plan = encoding.meta | dict(sha256=sha256, cut=cut, chunk_size=text.chunk_size)
    progress = Progress(folder, plan)
    done = progress.done
    if done:
        print(f'going on after {done:,} chunks of text')

    with (
        TokenWriter(folder, encoding.vocab_size, progress.sizes, keep=done > 0) as files,
        progress_bar(length, ' characters') as bar,
    ):
        if text.codec and not done:
            files.add('train', text.codec.begin)
        chunks = text.chunks(cut)
        for _, chunk in islice(chunks, done):
            bar.update(len(chunk or ''))
        encoded = in_order(encoding.encode_part, chunks, num_proc, encoding.make_pool)
        for split, characters, ids in encoded:
            files.add(split, ids)
            done += 1
            bar.update(characters)
            progress.save_when_due(done, files)
        if text.codec:
            text.codec.copy_to(folder)
        meta = files.publish(meta)
    progress.remove()
    return meta


def open_codec() -> 'DocumentCodec | None':
    """Return the codec of the model that `tokenizer` names; None for what is built in."""
    if tokenizer in BUILT_IN:
        return None
    from nanomla.checkpoints.tokens.prepare import DocumentCodec, open_model_tokenizer

    return DocumentCodec.of(open_model_tokenizer(tokenizer))


def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith('--') or arg == '-h']
    configure(globals(), options, takes='FILE ...')
    names = [arg for arg in sys.argv[1:] if arg not in options]
    if not names:
        raise UserError('which text? python data/text/prepare.py FILE... (--help tells more)')
    codec = open_codec()
    folder = out or HERE
    with tempfile.TemporaryDirectory() as temporary:
        files = [(name, Path(name)) for name in names]
        if '-' in names:  # standard input can be read only once, so to a file first
            copy = Path(temporary) / 'stdin'
            with writing(copy), open(copy, 'wb') as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            standard_input = ('standard input', copy)
            files = [standard_input if name == '-' else (name, path) for name, path in files]
        meta = write_dataset(Text(files, tokenizer, codec), folder)
    print(summary(folder, meta))
    name = out or 'text'
    if codec:
        commands = [['train.py', 'config/train_gpt2_mla.py', f'--dataset={name}']]
        if Path(tokenizer, 'config.json').exists():  # a model of another maker
            convert = ['convert_mla.py', tokenizer, '--out=out-mla', '--saving=0.5']
            commands.insert(0, [*convert, f'--calibration={name}'])
        print_next_steps(*commands)
        return
    config, trained = 'config/train_shakespeare_mla.py', 'out-shakespeare-mla'
    if tokenizer == 'gpt2':  # 50,257 tokens want a larger model, and on a CPU smaller batches
        config, trained = 'config/books_modern.py', 'out-books-modern'
    print_next_steps(
        ['train.py', config, f'--dataset={name}'],
        ['sample.py', f'--out_dir={trained}'],
    )


if __name__ == '__main__':
    main()
