"""
Token files: what data/*/prepare.py writes and what train.py reads.

A dataset is a folder. `train.bin` and `val.bin` are bare token ids (uint16, or uint32 where the
vocabulary needs it), laid out as nanoGPT writes them. `meta.json` describes them: dtype,
vocab_size, tokenizer, source, the number of tokens, sha256 of the text and, for characters, the
characters.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from nanomla.core.configurator import UserError
from nanomla.core.files import ROOT, writing
from nanomla.core.tokenizers import Tokenizer

DATA = ROOT / 'data'
SPLITS = ('train', 'val')

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
    """Return the line with which a prepare.py ends."""
    train, val, vocab_size = meta['train_tokens'], meta['val_tokens'], meta['vocab_size']
    return (
        f'{folder}: {train:,} tokens to train on, {val:,} to validate, '
        f'vocabulary {vocab_size:,}; {meta["source"]}'
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
        self.files = {}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                file = open(self.partial(split), 'r+b' if sizes else 'wb')
                self.files[split] = file
                file.seek(sizes[split] if sizes else 0)
                file.truncate()

    def partial(self, split: str) -> Path:
        return self.folder / f'{split}.bin.partial'

    def add(self, split: str, ids) -> None:
        with writing(self.partial(split)):
            self.files[split].write(np.asarray(ids, self.dtype).tobytes())

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
        )
        meta_partial = self.folder / 'meta.json.partial'
        meta_text = json.dumps(meta, indent=1, ensure_ascii=False) + '\n'
        with writing(self.folder):
            for file in self.files.values():
                file.close()
            meta_partial.write_bytes(meta_text.encode())
            (self.folder / 'train.bin').unlink(missing_ok=True)
            self.partial('val').replace(self.folder / 'val.bin')
            meta_partial.replace(self.folder / 'meta.json')
            self.partial('train').replace(self.folder / 'train.bin')
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


def in_order(function: Callable, items: Iterable, num_proc: int) -> Iterator:
    """
    Yield function(item) of each item in their order.

    num_proc threads compute them (0: one a core); threads are enough, as tiktoken releases Python's
    lock. Few items are in memory at a time.
    """
    if num_proc < 0:
        raise UserError(f'num_proc is {num_proc}: give the number of threads, or 0 for one a core')
    num_proc = num_proc or os.cpu_count()
    pool = ThreadPoolExecutor(num_proc)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
    """Run the prepare.py of a dataset that has not been made yet, or not of the text it has now."""
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
    if subprocess.run([sys.executable, str(script)]).returncode:
        raise UserError(f'{script} could not prepare the dataset (its message is above)')


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
        return check_meta(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} cannot be used ({error!r}): run the prepare.py of this dataset again'
        ) from None


def check_meta(meta: dict) -> dict:
    """Return a meta with its vocab_size as a number, or raise what is wrong with it."""
    needed = {name: meta[name] for name in ('tokenizer', 'source', 'dtype')}
    needed['vocab_size'] = int(meta['vocab_size'])
    if needed['dtype'] not in ('uint16', 'uint32'):
        raise ValueError(f'dtype {needed["dtype"]}')
    if needed['tokenizer'] == 'char' and len(meta['chars']) != needed['vocab_size']:
        raise ValueError(f'{len(meta["chars"])} chars')
    return meta | needed


def read_tokens(path: Path, dtype: str) -> np.memmap:
    """Return a read-only memmap of a split. UserError: it is missing, empty or not whole tokens."""
    if not path.exists():
        raise UserError(f'{path} is missing: run the prepare.py of this dataset')
    size = path.stat().st_size
    if size == 0:
        raise UserError(f'{path} is empty: run the prepare.py of this dataset again')
    if size % np.dtype(dtype).itemsize:
        raise UserError(
            f'{path} has {size} bytes, which is no whole number of {dtype} tokens: '
            'run the prepare.py of this dataset again'
        )
    return np.memmap(path, dtype, mode='r')
