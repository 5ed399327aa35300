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
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from nanomla.core.configurator import UserError

DATA = Path(__file__).resolve().parents[2] / 'data'
RESIDENT_TOKENS = 2 ** 28  # splits up to this many tokens live on the device (1 GiB as int32)


# ---------------------------------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """Text to ids and back, as `meta` names it: 'char' (with meta['chars']), 'bytes' or 'gpt2'."""

    def __init__(self, meta):
        self.name = meta['tokenizer']
        if self.name == 'char':
            self.chars = meta['chars']
            self.vocab_size = len(self.chars)
            points = np.array([ord(c) for c in self.chars])
            self.id_of = np.full(points.max() + 2, -1, np.int32)  # by code point; the last entry stands for all above
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
            except ValueError:  # its regex has no stack for a run of a million blanks: half of the text, twice
                if len(text) < 1000:
                    raise
                middle = len(text) // 2
                return np.concatenate([self.encode_array(text[:middle]), self.encode_array(text[middle:])])
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
        ids = self.id_of[np.minimum(points, len(self.id_of) - 1)]
        if (ids < 0).any():
            unknown = ''.join(sorted(set(text) - set(self.chars)))
            raise UserError(f'the text has characters this model has never seen: {unknown[:40]!r}; '
                            f'it knows {"".join(self.chars)[:200]!r}')
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
        raise UserError('tiktoken could not load its GPT-2 vocabulary: connect to the network once, or set '
                        f'TIKTOKEN_CACHE_DIR to a folder that has it ({type(error).__name__})') from None


def vocabulary(content, size, path):
    """The meta of the `size` tokens of a model from `path`: the checkpoint's own, or its dataset's (nanoGPT's holds none), or GPT-2's."""
    if 'tokenizer' in content.get('meta', {}):
        return content['meta']
    name = content.get('config', {}).get('dataset')
    if name and (find(name) / 'meta.json').exists():
        meta = read_meta(find(name))
        if size in (meta['vocab_size'], -(-meta['vocab_size'] // 64) * 64):  # as it is, or rounded up
            return meta
    if size in (50257, 50304):
        return dict(tokenizer='gpt2')
    hint = f"run the prepare.py of the dataset '{name}' that it was trained on" if name else 'GPT-2 has 50257'
    raise UserError(f'{path} does not say what its {size} tokens are: {hint}')


def codec_of(content, size, path):
    """
    What the `size` token ids of a model mean, by its checkpoint dict (checkpoint.load_model): meta, tokenizer,
    the id that begins a text (or None) and the set of ids that end one.
    """
    if 'codec' in content:  # another's model and its own tokenizer.json
        return {}, content['codec'], content['codec'].bos, content['codec'].eos
    meta = vocabulary(content, size, path)
    codec = Tokenizer(meta)
    return meta, codec, None, {codec.bpe.eot_token} if codec.name == 'gpt2' else set()  # <|endoftext|>, between documents


# ---------------------------------------------------------------------------------------------------
# writing, for data/*/prepare.py

def token_dtype(vocab_size):
    return 'uint16' if vocab_size <= 2 ** 16 else 'uint32'


def val_begin(length, val_fraction):
    """Where the validation part of a text begins: its last val_fraction."""
    if not length:
        raise UserError('the text is empty')
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction is {val_fraction}: give the share of the text that validates, between 0 and 1')
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
    return (f'{folder}: {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} to validate, '
            f'vocabulary {meta["vocab_size"]:,}; {meta["source"]}')


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
        tokens = {split: size // np.dtype(self.dtype).itemsize for split, size in self.sync().items()}
        for split, n in tokens.items():
            if n < 2:
                raise UserError(f'the text is too short: {n} tokens for {split}.bin')
        meta |= dict(vocab_size=self.vocab_size, dtype=self.dtype, train_tokens=tokens['train'], val_tokens=tokens['val'])
        meta_partial = self.folder / 'meta.json.partial'
        with writing(self.folder):
            for file in self.files.values():
                file.close()
            meta_partial.write_bytes((json.dumps(meta, indent=1, ensure_ascii=False) + '\n').encode())
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


@contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from None


def write_atomically(path, content):
    partial = path.with_name(path.name + '.partial')
    with writing(path):
        partial.write_bytes(content)
        partial.replace(path)


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


def progress_bar(total, unit, done=0):
    """A bar with the time left on stderr; a line every half minute where that is no terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise UserError('the progress bar needs tqdm: pip install tqdm') from None
    return tqdm(total=total, initial=done, unit=unit, unit_scale=True, mininterval=.2 if sys.stderr.isatty() else 30)


# ---------------------------------------------------------------------------------------------------
# reading, for train.py

def find(name):
    """The folder of a dataset: a path that holds one or can make one, or data/<name>."""
    folder = Path(name)
    return folder if any(os.path.exists(folder / file) for file in ('train.bin', 'prepare.py')) else DATA / name


def prepare_if_missing(name):
    """
    Run data/<name>/prepare.py, which tells what it does, when the dataset has not been made yet or was
    made before there was the input.txt that now lies beside it.
    """
    folder = find(name)
    own, made = folder / 'input.txt', folder / 'train.bin'
    if os.path.exists(made) and os.path.exists(folder / 'val.bin'):
        if not own.exists() or (own.stat().st_mtime <= made.stat().st_mtime and 'stand-in' not in read_meta(folder)['source']):
            return
    script = folder / 'prepare.py'
    if not os.path.exists(script):
        known = ', '.join(sorted(p.parent.name for p in DATA.glob('*/prepare.py')))
        raise UserError(f"there is no dataset '{name}': {folder} has no train.bin and val.bin and no prepare.py; known: {known}")
    if subprocess.run([sys.executable, str(script)]).returncode:
        raise UserError(f'{script} could not prepare the dataset (its message is above)')


def read_meta(folder):
    """meta.json; without one, what nanoGPT's own files mean: GPT-2 tokens as uint16."""
    path = Path(folder) / 'meta.json'
    if path.with_suffix('.pkl').exists() and not path.exists():
        raise UserError(f'{path.with_suffix(".pkl")} is nanoGPT\'s and is never unpickled: run a prepare.py of this project')
    if not path.exists():
        return dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16', source=f'{folder} (no meta.json: taken as GPT-2 tokens)')
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        needed = {name: meta[name] for name in ('tokenizer', 'source', 'dtype')} | dict(vocab_size=int(meta['vocab_size']))
        if needed['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype {needed["dtype"]}')
        if needed['tokenizer'] == 'char' and len(meta['chars']) != needed['vocab_size']:
            raise ValueError(f'{len(meta["chars"])} chars')
        return meta | needed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be used ({error!r}): run the prepare.py of this dataset again') from None


def read_tokens(path, dtype):
    """A read-only memmap of one split; UserError when it is missing, empty or not whole tokens."""
    if not path.exists():
        raise UserError(f'{path} is missing: run the prepare.py of this dataset')
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % width:
        what = 'is empty' if size == 0 else f'has {size} bytes, which is no whole number of {dtype} tokens'
        raise UserError(f'{path} {what}: run the prepare.py of this dataset again')
    return np.memmap(path, dtype, mode='r')


class Dataset:
    """
    Batches of one dataset for one rank: x (B, T) and y (B, T), int64 on `device`, y one token ahead.

    Small splits are copied to the device once and windows are cut out there; larger ones stay in
    their file and each batch travels. Either way the windows are the same.
    """

    def __init__(self, folder, block_size, seed=0, device='cpu', rank=0, world=1):
        self.folder, self.block_size, self.seed = Path(folder), block_size, seed
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.meta = read_meta(folder)
        self.tokens, self.resident = {}, {}
        for split in ('train', 'val'):
            ids = self.tokens[split] = read_tokens(self.folder / f'{split}.bin', self.meta['dtype'])
            if len(ids) <= block_size:
                raise UserError(f'{self.folder}/{split}.bin has {len(ids)} tokens, too few for one block of {block_size}: '
                                'use a longer text or a smaller --block_size')
            if len(ids) <= RESIDENT_TOKENS:
                if (top := int(ids.max())) >= self.meta['vocab_size']:
                    raise UserError(f'{self.folder}/{split}.bin holds token {top}, but its vocabulary has '
                                    f'{self.meta["vocab_size"]}: run the prepare.py of this dataset again')
                self.resident[split] = torch.from_numpy(ids.astype(np.int32)).to(self.device)
        self.window = torch.arange(block_size + 1, device=self.device)

    def starts(self, step, micro, batch_size):
        """Where the windows of a training batch begin: int64 (B,) on the CPU."""
        rng = np.random.default_rng((self.seed, step, micro * self.world + self.rank))
        return torch.from_numpy(rng.integers(0, len(self.tokens['train']) - self.block_size, batch_size))

    def cut(self, split, starts):
        """The windows that begin at `starts` (B,): x, y, each (B, T)."""
        if split in self.resident:
            starts = starts.to(self.device, non_blocking=True)
            windows = self.resident[split][starts[:, None] + self.window].long()
        else:
            ids, length = self.tokens[split], self.block_size + 1
            windows = torch.from_numpy(np.stack([ids[i:i + length] for i in starts.tolist()]).astype(np.int64))
            if self.device.type == 'cuda':
                windows = windows.pin_memory().to(self.device, non_blocking=True)
            else:
                windows = windows.to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def train_batch(self, step, micro, batch_size):
        return self.cut('train', self.starts(step, micro, batch_size))

    def val_batches(self, batch_size, most=0):
        """
        This rank's share of the validation split, each target exactly once: yields x, y (B, T), where
        y is -1 wherever a target was counted before or the batch is only filled up.
        With `most` > 0 and more windows than that, `most` evenly spaced ones stand for all.
        """
        T, n = self.block_size, len(self.tokens['val'])
        starts = np.arange(0, n - 1, T)
        if most and len(starts) > most:
            starts = starts[np.linspace(0, len(starts) - 2, most).astype(int)]  # the last one may be short
        share = batch_size * self.world
        real = len(starts)
        starts = np.concatenate([starts, np.zeros(-real % share, starts.dtype)])
        for at in range(self.rank * batch_size, len(starts), share):
            begin = torch.from_numpy(starts[at:at + batch_size])
            inside = begin.clamp(max=n - 1 - T)  # the last window moves back to stay inside the split
            x, y = self.cut('val', inside)
            counted = (begin - inside)[:, None] > torch.arange(T)
            counted |= (torch.arange(at, at + batch_size) >= real)[:, None]
            yield x, y.masked_fill(counted.to(self.device), -1)
