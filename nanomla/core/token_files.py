"""
Token files: what `data/*/prepare.py` writes and what `train.py` reads.

A dataset is a folder: `train.bin` and `val.bin` are bare token ids (uint16, or uint32 where the
vocabulary needs it), laid out as nanoGPT writes them; `meta.json` says what they are: dtype,
vocab_size, tokenizer, source, sha256 of the text and, for characters, the characters.

A batch is a function of (seed, step, micro-step, rank) and of nothing else. So two models trained
with the same seed read the same text, a resumed run goes on where it was, and 2 ranks with 1
micro-step read what 1 rank with 2 micro-steps reads.

Legend: B sequences, T tokens in a sequence.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from nanomla.core.configurator import UserError
from nanomla.core.files import writing
from nanomla.core.tokenizers import Tokenizer

DATA = Path(__file__).resolve().parents[2] / 'data'


# -------------------------------------------------------------------------------------------------
# tokenizers


# -------------------------------------------------------------------------------------------------
# writing, for data/*/prepare.py


def token_dtype(vocab_size):
    return 'uint16' if vocab_size <= 2**16 else 'uint32'


def val_begin(length, val_fraction):
    """Where the validation part of a text begins: its last val_fraction."""
    if not length:
        raise UserError('the text is empty')
    if not 0 < val_fraction < 1:
        raise UserError(
            f'val_fraction is {val_fraction}: give the share of the text that validates, between 0 and 1'
        )
    return int(length * (1 - val_fraction))


def write_text(folder, text, tokenizer, source, val_fraction=0.1):
    """
    Tokenise `text` (str, or bytes for tokenizer 'bytes') into train.bin, val.bin and meta.json in
    `folder`: the first 1 - val_fraction of the characters train, the rest validates.
    `source` is the sentence that names the text wherever the data is used. Returns the meta.
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


def summary(folder, meta):
    """The line with which a prepare.py ends."""
    return (
        f'{folder}: {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} to validate, '
        f'vocabulary {meta["vocab_size"]:,}; {meta["source"]}'
    )


class TokenWriter:
    """
    train.bin, val.bin and meta.json of one dataset, written piece by piece under `.partial` names:
    a dataset that is there already stays whole until publish() puts the new one in its place.

    `sizes` (split -> bytes) goes on with the partial files of an interrupted run, cut to these sizes.
    Partial files outlive an error only with `keep`.
    """

    def __init__(self, folder, vocab_size, sizes=None, keep=False):
        self.folder, self.vocab_size, self.keep = Path(folder), vocab_size, keep
        self.dtype, self.files = token_dtype(vocab_size), {}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for split in ('train', 'val'):
                file = self.files[split] = open(self.partial(split), 'r+b' if sizes else 'wb')
                file.seek(sizes[split] if sizes else 0)
                file.truncate()

    def partial(self, split):
        return self.folder / f'{split}.bin.partial'

    def add(self, split, ids):
        with writing(self.partial(split)):
            self.files[split].write(np.asarray(ids, self.dtype).tobytes())

    def sync(self):
        """Bring everything so far to the disk. Returns `sizes`."""
        with writing(self.folder):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        return {split: file.tell() for split, file in self.files.items()}

    def publish(self, meta):
        """
        Complete `meta`, write it and give all three files their names; train.bin gets its name last:
        a folder that has it is complete. UserError when a split is too short for one x and y.
        """
        tokens = {
            split: size // np.dtype(self.dtype).itemsize for split, size in self.sync().items()
        }
        for split, n in tokens.items():
            if n < 2:
                raise UserError(f'the text is too short: {n} tokens for {split}.bin')
        meta |= dict(
            vocab_size=self.vocab_size,
            dtype=self.dtype,
            train_tokens=tokens['train'],
            val_tokens=tokens['val'],
        )
        meta_partial = self.folder / 'meta.json.partial'
        with writing(self.folder):
            for file in self.files.values():
                file.close()
            meta_partial.write_bytes(
                (json.dumps(meta, indent=1, ensure_ascii=False) + '\n').encode()
            )
            (self.folder / 'train.bin').unlink(missing_ok=True)
            self.partial('val').replace(self.folder / 'val.bin')
            meta_partial.replace(self.folder / 'meta.json')
            self.partial('train').replace(self.folder / 'train.bin')
        return meta

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind:
            for split, file in self.files.items():
                with suppress(OSError):  # a full disk has been told already
                    file.close()
                    if not self.keep:
                        self.partial(split).unlink()


def in_order(function, items, num_proc):
    """
    function(item) of each item, in their order, by `num_proc` threads (0: one a core), which is enough
    as tiktoken lets go of Python's lock. Few items are in memory at a time.
    """
    if num_proc < 0:
        raise UserError(f'num_proc is {num_proc}: give the number of threads, or 0 for one a core')
    num_proc = num_proc or os.cpu_count()
    pool, waiting = ThreadPoolExecutor(num_proc), deque()
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


def find(name):
    """The folder of a dataset: a path that holds one or can make one, or data/<name>."""
    folder = Path(name)
    return (
        folder
        if any(os.path.exists(folder / file) for file in ('train.bin', 'prepare.py'))
        else DATA / name
    )


def prepare_if_missing(name):
    """
    Run data/<name>/prepare.py, which tells what it does, when the dataset has not been made yet or was
    made before there was the input.txt that now lies beside it.
    """
    folder = find(name)
    own, made = folder / 'input.txt', folder / 'train.bin'
    if os.path.exists(made) and os.path.exists(folder / 'val.bin'):
        if not own.exists() or (
            own.stat().st_mtime <= made.stat().st_mtime
            and 'stand-in' not in read_meta(folder)['source']
        ):
            return
    script = folder / 'prepare.py'
    if not os.path.exists(script):
        known = ', '.join(sorted(p.parent.name for p in DATA.glob('*/prepare.py')))
        raise UserError(
            f"there is no dataset '{name}': {folder} has no train.bin and val.bin and no prepare.py; known: {known}"
        )
    if subprocess.run([sys.executable, str(script)]).returncode:
        raise UserError(f'{script} could not prepare the dataset (its message is above)')


def read_meta(folder):
    """meta.json; without one, what nanoGPT's own files mean: GPT-2 tokens as uint16."""
    path = Path(folder) / 'meta.json'
    if path.with_suffix('.pkl').exists() and not path.exists():
        raise UserError(
            f"{path.with_suffix('.pkl')} is nanoGPT's and is never unpickled: run a prepare.py of this project"
        )
    if not path.exists():
        return dict(
            tokenizer='gpt2',
            vocab_size=50257,
            dtype='uint16',
            source=f'{folder} (no meta.json: taken as GPT-2 tokens)',
        )
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        needed = {name: meta[name] for name in ('tokenizer', 'source', 'dtype')} | dict(
            vocab_size=int(meta['vocab_size'])
        )
        if needed['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype {needed["dtype"]}')
        if needed['tokenizer'] == 'char' and len(meta['chars']) != needed['vocab_size']:
            raise ValueError(f'{len(meta["chars"])} chars')
        return meta | needed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} cannot be used ({error!r}): run the prepare.py of this dataset again'
        ) from None


def read_tokens(path, dtype):
    """A read-only memmap of one split; UserError when it is missing, empty or not whole tokens."""
    if not path.exists():
        raise UserError(f'{path} is missing: run the prepare.py of this dataset')
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % width:
        what = (
            'is empty'
            if size == 0
            else f'has {size} bytes, which is no whole number of {dtype} tokens'
        )
        raise UserError(f'{path} {what}: run the prepare.py of this dataset again')
    return np.memmap(path, dtype, mode='r')
