"""
Token files: what data/*/prepare.py writes and what train.py reads.

A dataset is a folder. `train.bin` and `val.bin` are bare token ids (uint16, or uint32 where the
vocabulary needs it), laid out as nanoGPT writes them. `meta.json` describes them: dtype,
vocab_size, tokenizer, source, the number of tokens and the CRC-32 of each split, sha256 of the text
and what the tokenizer is: for characters, the characters; for a model's own tokenizer.json (`hf`),
which lies beside it, the hash of what decides its tokens. What is read is checked by it.
"""

import hashlib
import json
import os
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanomla.core.checks import (
    TABLE,
    TEXT,
    Rule,
    check_entries,
    list_of,
    one_of,
    shortened,
    table_of,
    whole,
)
from nanomla.core.configurator import UserError
from nanomla.core.files import (
    ROOT,
    lock,
    read_json,
    remove_leftovers,
    run_script,
    sync_folder,
    write_file,
    writing,
)
from nanomla.core.tokenizers import Tokenizer

DATA = ROOT / 'data'
SPLITS = ('train', 'val')
CHECKED_BYTES = 2**29  # of larger splits only the size is checked

CHARS = Rule(lambda value: isinstance(value, str) and len(value) > 0, 'the characters as one text')
TOKEN_IDS = whole(least=0) | list_of(whole(least=0)) | None
META = dict(  # the entries of meta.json, and of the meta in a checkpoint
    tokenizer=TEXT,
    tokenizer_sha256=TEXT,
    source=TEXT,
    dtype=one_of('uint16', 'uint32'),
    vocab_size=whole(least=1, most=2**32),
    chars=CHARS | None,
    train_tokens=whole(least=0),
    val_tokens=whole(least=0),
    train_crc32=whole(least=0),
    val_crc32=whole(least=0),
    bos_token_id=TOKEN_IDS,
    eos_token_id=TOKEN_IDS,
)


def same_tokens(one: dict, other: dict) -> bool:
    """Return whether two metas, of datasets or checkpoints, are of the same tokens."""
    names = ('tokenizer', 'chars', 'tokenizer_sha256')
    return all(one.get(name) == other.get(name) for name in names)


# -------------------------------------------------------------------------------------------------
# writing, for data/*/prepare.py


def token_dtype(vocab_size: int) -> str:
    return 'uint16' if vocab_size <= 2**16 else 'uint32'


def val_begin(length: int, val_fraction: float) -> int:
    """Return where the validation part of a text begins: its last `val_fraction`."""
    if not length:
        raise UserError('the text is empty')
    if not 0 < val_fraction < 1:
        raise UserError(
            f'val_fraction is {val_fraction}: give the share of the text that validates, '
            'between 0 and 1'
        )
    return int(length * (1 - val_fraction))


def write_text(
    folder: str | os.PathLike,
    text: str | bytes,
    tokenizer: str,
    source: str,
    val_fraction: float = 0.1,
) -> dict:
    """
    Tokenise a text into train.bin, val.bin and meta.json in `folder`. Return the meta.

    The first 1 - val_fraction of its characters train, the rest validates. The text may be bytes
    for tokenizer 'bytes'. source: the sentence that names the text wherever the data is used.
    """
    cut = val_begin(len(text), val_fraction)
    raw = text if isinstance(text, bytes) else text.encode()
    meta = dict(tokenizer=tokenizer, source=source, sha256=hashlib.sha256(raw).hexdigest())
    if tokenizer == 'char':
        meta['chars'] = ''.join(sorted(set(text)))
    codec = Tokenizer(meta)
    with TokenWriter(folder, codec.vocab_size) as files:
        files.add('train', codec.encode_array(text[:cut]))
        files.add('val', codec.encode_array(text[cut:]))
        return files.publish(meta)


def summary(folder: str | os.PathLike, meta: dict) -> str:
    """Return two lines about a dataset that a prepare.py has made: its size and its text."""
    train, val, vocab_size = meta['train_tokens'], meta['val_tokens'], meta['vocab_size']
    return (
        f'{folder}: {train:,} tokens to train on, {val:,} to validate, '
        f'vocabulary {vocab_size:,}\ntext: {meta["source"]}'
    )


class TokenWriter:
    """
    Write train.bin, val.bin and meta.json of one dataset, piece by piece under `.partial` names.

    A dataset that is there already stays whole until `publish` puts the new one in its place.

    sizes: split -> bytes, to go on with the partial files of an interrupted run, cut to these sizes
    keep:  keep the partial files when an error ends the `with`
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        vocab_size: int,
        sizes: dict[str, int] | None = None,
        keep: bool = False,
    ):
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.keep = keep
        self.dtype = token_dtype(vocab_size)
        self.files, self.crc = {}, dict.fromkeys(SPLITS, 0)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                if sizes:
                    file = open_regular(self.partial(split))
                    self.crc[split] = crc_of(file, sizes[split])
                    file.truncate()
                else:
                    self.partial(split).unlink(missing_ok=True)
                    file = open(self.partial(split), 'xb')  # x: never through a link
                self.files[split] = file

    def partial(self, split: str) -> Path:
        return self.folder / f'{split}.bin.partial'

    def add(self, split: str, ids) -> None:
        raw = np.asarray(ids, self.dtype).tobytes()
        with writing(self.partial(split)):
            self.files[split].write(raw)
        self.crc[split] = zlib.crc32(raw, self.crc[split])

    def sync(self) -> dict[str, int]:
        """Bring everything so far to the disk. Return the `sizes` to go on from."""
        with writing(self.folder):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        return {split: file.tell() for split, file in self.files.items()}

    def publish(self, meta: dict) -> dict:
        """
        Complete `meta`, write it, give all three files their names and return it.

        train.bin gets its name last: a folder that has one is complete. UserError when a split is
        too short for one x and y.
        """
        width = np.dtype(self.dtype).itemsize
        tokens = {split: size // width for split, size in self.sync().items()}
        for split, number in tokens.items():
            if number < 2:
                raise UserError(f'the text is too short: {number} tokens for {split}.bin')
        meta |= dict(
            vocab_size=self.vocab_size,
            dtype=self.dtype,
            train_tokens=tokens['train'],
            val_tokens=tokens['val'],
            train_crc32=self.crc['train'],
            val_crc32=self.crc['val'],
        )
        meta_text = json.dumps(meta, indent=1, ensure_ascii=False) + '\n'
        with writing(self.folder):
            for file in self.files.values():
                file.close()
            (self.folder / 'train.bin').unlink(missing_ok=True)
            self.partial('val').replace(self.folder / 'val.bin')
            write_file(self.folder / 'meta.json', meta_text.encode(errors='backslashreplace'))
            self.partial('train').replace(self.folder / 'train.bin')
            sync_folder(self.folder)
        return meta

    def __enter__(self) -> 'TokenWriter':
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            return
        for split, file in self.files.items():
            with suppress(OSError):  # a full disk is reported already
                file.close()
                if not self.keep:
                    self.partial(split).unlink()


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read and write. OSError for a link and for what is no file."""
    opened = os.open(path, os.O_RDWR | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_BINARY', 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(f'{path} is no file')
    return open(opened, 'r+b')


def crc_of(file: BinaryIO, size: int) -> int:
    """Return the CRC-32 of the next `size` bytes of a file, and leave the file behind them."""
    crc = 0
    while size > 0:
        raw = file.read(min(size, 2**20))
        if not raw:
            raise OSError(f'{file.name} is shorter than it was')
        crc = zlib.crc32(raw, crc)
        size -= len(raw)
    return crc


def in_order(
    function: Callable,
    items: Iterable,
    num_proc: int,
    make_pool: Callable[[int], Executor] = ThreadPoolExecutor,
) -> Iterator:
    """
    Yield function(item) of each item in their order.

    num_proc threads compute them (0: one a core); threads are enough for tiktoken, which releases
    Python's lock. make_pool: of so many threads or processes. Few items are in memory at a time.
    """
    if num_proc < 0:
        raise UserError(
            f'num_proc is {num_proc}: give the number of threads or processes, or 0 for one a core'
        )
    num_proc = num_proc or os.cpu_count()
    pool = make_pool(num_proc)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise UserError(
            'a process that tokenises has been killed, as systems do that run out of memory: run '
            'the same command again to go on, with a smaller --num_proc'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


PROGRESS = dict(  # of progress.json
    plan=TABLE, done=whole(least=0), sizes=table_of(whole(least=0))
)


class Progress:
    """
    How far a run of a prepare.py has come: progress.json beside its partial files, so that the next
    run with the same plan resumes there.

    plan: all that decides the tokens; save_every: seconds of work that a kill may cost
    """

    def __init__(self, folder: str | os.PathLike, plan: dict, save_every: float = 5.0):
        self.folder, self.plan, self.save_every = Path(folder), plan, save_every
        self.path = self.folder / 'progress.json'
        self.done = 0  # items that are in the partial files
        self.sizes: dict[str, int] | None = None  # of these files
        self.last_save = time.monotonic()
        self.read()

    def read(self) -> None:
        try:
            saved = read_json(self.path)
            check_entries(saved, PROGRESS, needed=PROGRESS)
            check_entries(saved['sizes'], {}, needed=SPLITS)
            fits = saved['plan'] == self.plan
            for split in SPLITS:
                partial = self.folder / f'{split}.bin.partial'
                fits = fits and partial.stat().st_size >= saved['sizes'][split]
        except (OSError, ValueError):
            return  # there is nothing to go on from
        if fits:
            self.done, self.sizes = saved['done'], saved['sizes']

    def save_when_due(self, done: int, files: TokenWriter) -> None:
        if time.monotonic() - self.last_save < self.save_every:
            return
        files.keep = True  # an error from now on is no reason to begin again
        state = dict(plan=self.plan, done=done, sizes=files.sync())
        write_file(self.path, json.dumps(state))
        self.last_save = time.monotonic()

    def remove(self) -> None:
        remove_leftovers(self.path)
        self.path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# reading, for train.py


def find(name: str) -> Path:
    """Return the folder of a dataset: a path that holds one or can make one, or data/<name>."""
    folder = Path(name)
    for file in ('train.bin', 'prepare.py'):
        if os.path.exists(folder / file):
            return folder
    return DATA / name


def prepare_if_missing(name: str) -> None:
    """
    Run the prepare.py of a dataset that has not been made yet, or not of the text it has now.

    Of several processes one prepares it, and the others wait, however long that takes.
    """
    folder = find(name)
    if is_prepared(folder):
        return
    script = folder / 'prepare.py'
    if not os.path.exists(script):
        known = ', '.join(sorted(path.parent.name for path in DATA.glob('*/prepare.py')))
        raise UserError(
            f"there is no dataset '{name}': {folder} has no train.bin and val.bin and no "
            f'prepare.py; known: {known}'
        )
    with lock(folder, 'prepare.lock', wait=True):
        if not is_prepared(folder):
            run_script(script)


def require(name: str, path: str, option: str) -> None:
    """
    Raise a UserError unless the dataset that a checkpoint names is there.

    It is only read: no prepare.py is run because a file says so.

    path: the checkpoint. option: the setting by which a person names another
    """
    folder = find(name)
    if not os.path.exists(folder / 'train.bin'):
        raise UserError(
            f'{path} says that it was trained on {shortened(name)}, and {folder} has no '
            f'train.bin: run its prepare.py, or name a text by {option}'
        )


def is_prepared(folder: Path) -> bool:
    """Return whether the folder has a dataset, and one of the input.txt that may lie beside it."""
    train, text = folder / 'train.bin', folder / 'input.txt'
    # os.path: a name that is too long for a path is no folder, where Path raises.
    if not (os.path.exists(train) and os.path.exists(folder / 'val.bin')):
        return False
    if not text.exists():
        return True
    is_stand_in = 'stand-in' in read_meta(folder)['source']
    return text.stat().st_mtime <= train.stat().st_mtime and not is_stand_in


def read_meta(folder: str | os.PathLike) -> dict:
    """
    Return a dataset's meta.json; without one, what nanoGPT's files mean: GPT-2 tokens as uint16.

    UserError when it is damaged, or when there is only nanoGPT's meta.pkl.
    """
    path = Path(folder) / 'meta.json'
    pickled = path.with_suffix('.pkl')
    if not path.exists():
        if pickled.exists():
            raise UserError(
                f"{pickled} is nanoGPT's and is never unpickled: run a prepare.py of this project"
            )
        source = f'{folder} (no meta.json: taken as GPT-2 tokens)'
        return dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16', source=source)
    try:
        meta = read_json(path)
        check_meta(meta, needed=('tokenizer', 'source', 'dtype', 'vocab_size'))
        if meta['tokenizer'] == 'hf':
            check_entries(meta, {}, needed=['tokenizer_sha256'])
        return meta
    except (OSError, ValueError) as error:
        raise UserError(
            f'{path} cannot be used ({error}): run the prepare.py of this dataset again'
        ) from None


def check_meta(meta: object, needed: Collection[str] = ()) -> None:
    """Raise a ValueError unless `meta` can describe a dataset, or the tokens of a checkpoint."""
    check_entries(meta, META, needed)
    if meta.get('tokenizer') != 'char':
        return
    check_entries(meta, dict(chars=CHARS), needed=['chars'])
    number = len(meta['chars'])
    if meta.get('vocab_size', number) != number or len(set(meta['chars'])) != number:
        raise ValueError(f'it has {len(set(meta["chars"]))} different chars')


def read_split(folder: str | os.PathLike, split: str, meta: dict) -> np.memmap:
    """
    Return a read-only memmap of a split ('train' or 'val') of a dataset, checked by its meta.

    UserError where it is missing, empty, or not what was written: of another size, or, up to
    CHECKED_BYTES, with other bytes. Of what has no counts in its meta (nanoGPT's) any tokens count.
    """
    path = Path(folder) / f'{split}.bin'
    if not os.path.exists(path):
        raise UserError(f'{path} is missing: run the prepare.py of this dataset')
    again = 'run the prepare.py of this dataset again'
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f'{path} is no file: {again}')
        size, width = os.stat(path).st_size, np.dtype(meta['dtype']).itemsize
        if size == 0:
            raise UserError(f'{path} is empty: {again}')
        if size % width:
            raise UserError(
                f'{path} has {size} bytes, which is no whole number of {meta["dtype"]} tokens: '
                f'{again}'
            )
        expected = meta.get(f'{split}_tokens', size // width)
        if size // width != expected:
            raise UserError(
                f'{path} has {size // width:,} tokens, but meta.json says {expected:,}: {again}'
            )
        ids = np.memmap(path, meta['dtype'], mode='r')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from None
    crc = meta.get(f'{split}_crc32')
    if crc is not None and size <= CHECKED_BYTES and zlib.crc32(ids) != crc:
        raise UserError(f'{path} is damaged: its bytes are not those that were written; {again}')
    return ids
