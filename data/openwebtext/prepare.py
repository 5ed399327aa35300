"""
OpenWebText in GPT-2 tokens: about 8 million documents, 9 billion tokens, 17 GiB of train.bin; or in
those of any model's tokenizer.json (--tokenizer).

The documents come from huggingface.co (tens of gigabytes of download, kept in Hugging Face's own
cache), or from local files with --input. Each is followed by <|endoftext|>, or stands between what
begins and ends a document for the model; one of every 2,000, drawn by the seed, validates. Kill it
whenever you like: the next run with the same settings resumes.

train.bin and val.bin grow under the name *.partial, and progress.json says how far they can be
trusted.
"""

import glob
import hashlib
import sys
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, HERE.parents[:2])  # data/ and the repository

import hugging_face

from nanomla.core.checks import check_entries
from nanomla.core.configurator import UserError, configure
from nanomla.core.files import progress_bar, read_json
from nanomla.core.token_files import SPLITS, Progress, TokenWriter, in_order, summary
from nanomla.core.tokenizers import Tokenizer
from nanomla.training.next_steps import dataset_option, print_next_steps

dataset = 'Skylion007/openwebtext'  # its name on huggingface.co
input = ''  # instead: .jsonl, .parquet or .txt files (a line a document); * stands for several
tokenizer = 'gpt2'  # gpt2 | a model: its folder, or its name on the hub
column = 'text'  # the column or key that holds the text
limit = 0  # the first so many documents only (0 = all)
val_fraction = 0.0005  # the share of the documents that validates
seed = 0  # draws them
num_proc = 0  # threads or processes that tokenise (0 = one a core)
batch = 1000  # documents that one of them takes at a time
save_every = 5.0  # seconds of work that a kill may cost
out = ''  # the folder of the dataset ('' = data/openwebtext)


def local_files(pattern: str) -> tuple[str, list[str]]:
    """Return Hugging Face's name of the files' format, and the files that `pattern` names."""
    formats = {'.jsonl': 'json', '.json': 'json', '.parquet': 'parquet', '.txt': 'text'}
    files = sorted(glob.glob(pattern)) or [pattern]
    found = set()
    for file in map(Path, files):
        if not file.is_file():
            raise UserError(f'--input={file}: there is no such file')
        suffix = file.suffix
        if suffix not in formats:  # .jsonl.gz
            suffix = Path(file.stem).suffix
        found.add(formats.get(suffix))
    if len(found) > 1 or None in found:
        raise UserError(f'--input={pattern}: give files of one kind, .jsonl, .parquet or .txt')
    return found.pop(), files


def load_rows():
    """
    Return the rows, and a dict that identifies them.

    With `limit`, rows of a dataset on the hub are streamed, so that not all is downloaded.
    """
    if not input:
        hugging_face.use_cache_without_network()
    hugging_face.import_datasets()
    if input:
        file_format, files = local_files(input)
        identity = dict(input=[identity_of(Path(file)) for file in files])
        wanted = dict(path=file_format, data_files=files, split='train')
        hint = 'check the file'
    else:
        identity = dict(dataset=dataset)
        wanted = dict(path=dataset, split='train')
        if limit:
            wanted['streaming'] = True
        else:
            wanted['num_proc'] = num_proc or None
        hint = 'check the name and the network, or give local files with --input='
    try:
        rows = load_dataset(wanted)
    except Exception as error:  # the hub's errors come in many classes
        why = f'{type(error).__name__}: {str(error)[:200]}'
        raise UserError(f'cannot load {input or dataset}: {hint} ({why})') from None
    if rows.column_names and column not in rows.column_names:
        columns = ', '.join(rows.column_names)
        raise UserError(
            f"{input or dataset} has no column '{column}': give --column= one of {columns}"
        )
    return rows, identity


def load_dataset(wanted: dict):
    datasets = hugging_face.import_datasets()
    try:
        return datasets.load_dataset(**wanted)
    except RuntimeError as error:
        if 'scripts' not in str(error):
            raise
    # The dataset is a script, which is no longer run; the hub has converted its rows.
    return datasets.load_dataset(**wanted, revision='refs/convert/parquet')


def identity_of(file: Path) -> list:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def batches(rows, done: int, documents: int) -> Iterator[tuple[int, list]]:
    """Yield the number of its first document and the texts of each batch that is left to do."""
    if done >= documents:  # killed between its last batch and its end
        return
    try:
        for page in rows.skip(done).iter(batch):
            texts = page[column][: documents - done]
            yield done, [checked_text(text) for text in texts]
            done += len(texts)
            if done >= documents:
                return
    except UserError:
        raise
    except Exception as error:  # the network again, or a broken file
        why = f'{type(error).__name__}: {str(error)[:200]}'
        raise UserError(
            f'reading stopped after {done} documents: run the same command again to go on ({why})'
        ) from None


@lru_cache
def held_out(group: int, every: int, seed: int) -> int:
    """Return the one document of a group of `every` that validates."""
    return group * every + int(np.random.default_rng((seed, group)).integers(every))


def checked_text(text: object) -> str:
    """Return a document, '' where there is none. UserError for what is no text."""
    if not isinstance(text, str | None):
        kind = type(text).__name__
        raise UserError(f"column '{column}' holds {kind}, not text: give --column=")
    return text or ''


def by_split(first: int, encoded: list[np.ndarray], every: int) -> dict[str, np.ndarray]:
    """
    Return the ids of each split that has some: one document of each `every` is for 'val'.

    encoded: the ids of documents from number `first` on, [] for an empty one
    """
    ids = {split: [] for split in SPLITS}
    for number, document in enumerate(encoded, first):
        validates = number == held_out(number // every, every, seed)
        ids['val' if validates else 'train'].append(document)
    return {split: np.concatenate(parts) for split, parts in ids.items() if parts}


@dataclass
class Encoding:
    """
    How documents become tokens.

    meta: names the tokenizer; make_pool: of the threads or processes in which encode runs
    encode: (number of the first, texts) -> the same number, ids of each
    copy_to: brings the tokenizer's files to the dataset's folder
    """

    meta: dict
    vocab_size: int
    encode: Callable
    make_pool: Callable = ThreadPoolExecutor
    copy_to: Callable = lambda folder: None


def open_encoding() -> Encoding:
    if tokenizer == 'gpt2':
        return gpt2_encoding()
    from nanomla.checkpoints.tokens.prepare import (
        DocumentCodec,
        encode_documents,
        open_model_tokenizer,
    )

    codec = DocumentCodec.of(open_model_tokenizer(tokenizer))
    return Encoding(codec.meta, codec.vocab_size, encode_documents, codec.pool, codec.copy_to)


def gpt2_encoding() -> Encoding:
    codec = Tokenizer(dict(tokenizer='gpt2'))
    end = [codec.bpe.eot_token]

    def encode(numbered):
        first, texts = numbered
        encoded = []
        for text in texts:
            ids = [codec.encode_array(text), end] if text else [[]]
            encoded.append(np.concatenate(ids).astype(np.int64))
        return first, encoded

    return Encoding(dict(tokenizer='gpt2'), codec.vocab_size, encode)


def is_complete(folder: Path, plan: dict) -> bool:
    """Return whether the folder has the dataset of this plan."""
    try:
        meta = read_json(folder / 'meta.json')
        check_entries(meta, {})
    except (OSError, ValueError):
        return False
    return meta.get('plan') == plan and (folder / 'train.bin').exists()


def sha256_of(files: TokenWriter) -> str:
    """Return the checksum of all tokens, train then val: the text is nowhere in one piece."""
    digest = hashlib.sha256()
    for split in SPLITS:
        with open(files.partial(split), 'rb') as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def main():
    configure(globals())
    if limit < 0 or batch < 1 or not 0 < val_fraction < 1:
        raise UserError(
            '--limit counts documents from 0, --batch from 1, and --val_fraction is between 0 and 1'
        )
    folder = Path(out) if out else HERE
    encoding = open_encoding()
    rows, identity = load_rows()
    documents = limit or sys.maxsize
    if isinstance(rows, Sized):  # streamed rows have no length
        documents = min(documents, len(rows))
    every = max(min(round(1 / val_fraction), documents), 1)
    plan = identity | dict(column=column, documents=documents, every=every, seed=seed)
    if tokenizer != 'gpt2':
        plan |= encoding.meta
    progress = Progress(folder, plan, save_every)
    if is_complete(folder, plan):
        progress.remove()  # which a kill may have left
        print(f'{folder} has this dataset already: remove train.bin to make it again')
        return

    done = progress.done
    if done:
        print(f'going on after {done:,} documents')
    with (
        TokenWriter(folder, encoding.vocab_size, progress.sizes, keep=True) as files,
        progress_bar(documents, ' documents', done) as bar,
    ):
        texts = batches(rows, done, documents)
        for first, encoded in in_order(encoding.encode, texts, num_proc, encoding.make_pool):
            for split, part in by_split(first, encoded, every).items():
                files.add(split, part)
            done += len(encoded)
            bar.update(len(encoded))
            progress.save_when_due(done, files)
        files.sync()
        source = f'{Path(input).name} (your own text)' if input else dataset
        if limit:
            source += f', the first {done:,} documents'
        meta = encoding.meta | dict(source=source, sha256=sha256_of(files))
        encoding.copy_to(folder)
        meta = files.publish(meta | dict(documents=done, plan=plan))
    progress.remove()
    print(summary(folder, meta))
    print_next_steps(
        ['train.py', 'config/train_gpt2_mla.py', *dataset_option(out)],
        ['train.py', 'config/train_gpt2.py', *dataset_option(out)],
    )


if __name__ == '__main__':
    main()
