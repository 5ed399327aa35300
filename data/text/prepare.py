"""
A dataset of your own text: python data/text/prepare.py FILE... --tokenizer=gpt2 --out=FOLDER

A FILE is UTF-8 text, plain or packed as .xz, .gz or .bz2; - is standard input. Several files are
joined in the order given, by a newline, or for gpt2 by <|endoftext|>. The end of the text validates.
train.bin, val.bin and meta.json go to FOLDER and replace a dataset there only when they are complete.

The files are read twice, in blocks: once to check and count them, once to tokenise. So memory does not
grow with the text. GPT-2 tokens are made in parallel, of chunks that are cut where the tokens of
the whole text have a boundary anyway.
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
from itertools import chain, groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository

from nanomla.core.configurator import UserError, configure
from nanomla.core.files import progress_bar, writing
from nanomla.core.token_files import TokenWriter, in_order, summary, val_begin
from nanomla.core.tokenizers import Tokenizer

tokenizer = 'char'  # char (the characters of the text), bytes (any file) or gpt2 (50,257 tokens, needs tiktoken)
out = ''  # the folder of the dataset ('' = data/text, which is --dataset=text in train.py)
val_fraction = 0.1  # the share of the text, at its end, that validates
num_proc = 0  # threads that tokenise (0 = one a core)

options = [arg for arg in sys.argv[1:] if arg.startswith('--') or arg == '-h']
configure(globals(), options)
names = [arg for arg in sys.argv[1:] if arg not in options]

BLOCK = 2**20  # bytes read at a time
CHUNK = 2**18  # characters tokenised at a time
OPEN = {'.xz': lzma.open, '.gz': gzip.open, '.bz2': bz2.open}


def read_bytes(path):
    """A file in blocks of bytes, unpacked."""
    try:
        with OPEN.get(path.suffix, open)(path, 'rb') as file:
            while block := file.read(BLOCK):
                yield block
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f'cannot read {path}: {getattr(error, "strerror", None) or error}'
        ) from None


def read_text(path, name):
    """A file in blocks of text."""
    decoder, read = codecs.getincrementaldecoder('utf-8')(), 0
    for block in chain(read_bytes(path), [b'']):
        begin = read - len(decoder.getstate()[0])  # a character may begin in the block before
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f'{name} is not UTF-8 text: byte {begin + error.start} is {error.object[error.start]:#04x}; '
                'convert it to UTF-8 or use --tokenizer=bytes'
            ) from None
        read += len(block)
        if text:
            yield text


def blocks(files):
    """All files in blocks of text (of bytes for 'bytes'). Between two: a newline, for gpt2 None (<|endoftext|>)."""
    for i, (name, path) in enumerate(files):
        if i:
            yield {'char': '\n', 'bytes': b'\n', 'gpt2': None}[tokenizer]
        yield from read_bytes(path) if tokenizer == 'bytes' else read_text(path, name)


def survey(files):
    """The length of the text, its sha256 and its characters."""
    length, digest, chars = 0, hashlib.sha256(), set()
    for block in blocks(files):
        if tokenizer != 'bytes':
            chars.update(block or '')
        length += len(block or '')
        digest.update(b'\n' if block is None else block if tokenizer == 'bytes' else block.encode())
    return length, digest.hexdigest(), ''.join(sorted(chars))


def halves(files, cut):
    """(split, block) for each block; the one that holds character `cut` is divided there."""
    at = 0
    for block in blocks(files):
        if block is None:
            yield 'train' if at <= cut else 'val', None
            continue
        head = max(cut - at, 0)
        for split, part in ('train', block[:head]), ('val', block[head:]):
            if part:
                yield split, part
        at += len(block)


def chunks(files, cut):
    """(split, chunk), CHUNK long at most; (split, None) for <|endoftext|>."""
    for (split, is_end), group in groupby(
        halves(files, cut), lambda pair: (pair[0], pair[1] is None)
    ):
        rest = b'' if tokenizer == 'bytes' else ''
        for _, block in group:
            if is_end:
                yield split, None
                continue
            rest += block
            while len(rest) > CHUNK:
                end = tokenizer == 'gpt2' and boundary(rest[:CHUNK]) or CHUNK
                yield split, rest[:end]
                rest = rest[end:]
        if rest:
            yield split, rest


def boundary(text):
    """
    The last place in `text` before a newline or a space that comes after no blank; 0 if there is none.
    GPT-2's pattern ends a piece there whatever follows, so the tokens of both sides are the tokens of the
    whole. (Not so after a newline: how a run of blanks is divided depends on what comes after it.)
    """
    for blank in '\n', ' ':
        at = text.rfind(blank)
        while at > 0 and text[at - 1].isspace():
            at = text.rfind(blank, 0, at)
        if at > 0:
            return at
    return 0


def encode(part):
    split, chunk = part
    return (
        split,
        len(chunk or ''),
        [codec.bpe.eot_token] if chunk is None else codec.encode_array(chunk),
    )


if not names:
    raise UserError('which text? python data/text/prepare.py FILE... (--help tells more)')
if tokenizer not in ('char', 'bytes', 'gpt2'):
    raise UserError(f'--tokenizer={tokenizer} is not known: use char, bytes or gpt2')

with tempfile.TemporaryDirectory() as folder:
    files = [(name, Path(name)) for name in names]
    if '-' in names:  # standard input can be read only once, so to a file first
        copy = Path(folder) / 'stdin'
        with writing(copy), open(copy, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BLOCK)
        files = [('standard input', copy) if name == '-' else (name, path) for name, path in files]

    length, sha256, chars = survey(files)
    cut = val_begin(length, val_fraction)
    source = f'{", ".join(Path(name).name for name, _ in files)} (your own text)'
    meta = dict(tokenizer=tokenizer, source=source, sha256=sha256) | (
        dict(chars=chars) if tokenizer == 'char' else {}
    )
    codec = Tokenizer(meta)
    with (
        TokenWriter(out or HERE, codec.vocab_size) as written,
        progress_bar(length, ' characters') as bar,
    ):
        for split, n, ids in in_order(encode, chunks(files, cut), num_proc):
            written.add(split, ids)
            bar.update(n)
        meta = written.publish(meta)
print(summary(out or HERE, meta))
