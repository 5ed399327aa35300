"""
OpenWebText in GPT-2 tokens: about 8 million documents, 9 billion tokens, 17 GiB of train.bin.

The documents come from huggingface.co (tens of gigabytes of download, kept in Hugging Face's own cache), or
from local files with --input. Each is followed by <|endoftext|>; one of every 2,000, drawn by the
seed, validates. Kill it whenever you like: the next run with the same settings goes on.

train.bin and val.bin grow under the name *.partial, and progress.json says how far they can be trusted.
"""

import glob
import hashlib
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository

from nanomla.core.configurator import UserError, configure
from nanomla.core.files import progress_bar, write_file
from nanomla.core.token_files import TokenWriter, in_order, summary
from nanomla.core.tokenizers import Tokenizer

dataset = 'Skylion007/openwebtext'  # its name on huggingface.co
input = (
    ''  # instead: local .jsonl, .parquet or .txt files (each line a document); * stands for several
)
column = 'text'  # the column or key that holds the text
limit = 0  # the first so many documents only (0 = all)
val_fraction = 0.0005  # the share of the documents that validates
seed = 0  # draws them
num_proc = 0  # threads that tokenise (0 = one a core)
batch = 1000  # documents that a thread takes at a time
save_every = 5.0  # seconds of work that a kill may cost
out = ''  # the folder of the dataset ('' = data/openwebtext)

configure(globals())

KINDS = {
    '.jsonl': 'json',
    '.json': 'json',
    '.parquet': 'parquet',
    '.txt': 'text',
}  # suffix -> Hugging Face's reader


def local_files():
    """The files that `input` names and how to read them."""
    files = sorted(glob.glob(input)) or [input]
    kinds = set()
    for file in map(Path, files):
        if not file.is_file():
            raise UserError(f'--input={file}: there is no such file')
        kinds.add(
            KINDS.get(file.suffix if file.suffix in KINDS else Path(file.stem).suffix)
        )  # .jsonl or .jsonl.gz
    if len(kinds) > 1 or None in kinds:
        raise UserError(f'--input={input}: give files of one kind, .jsonl, .parquet or .txt')
    return kinds.pop(), files


def online():
    try:
        urllib.request.urlopen(
            os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), timeout=10
        ).close()
    except OSError as error:  # an HTTPError, or a certificate that only Hugging Face's own client knows, is an answer
        return isinstance(error, urllib.error.HTTPError) or isinstance(
            getattr(error, 'reason', None), ssl.SSLError
        )
    return True


def load():
    """The rows, and what names them. With `limit` rows of a dataset on the hub are streamed, not all downloaded."""
    if not input and not online():
        os.environ['HF_HUB_OFFLINE'] = (
            '1'  # from the cache or not at all, instead of half a minute of trying
        )
    try:
        import datasets
    except ImportError:
        raise UserError('this needs Hugging Face datasets: pip install datasets') from None
    if input:
        kind, files = local_files()
        what = dict(
            input=[
                [str(Path(f).resolve()), Path(f).stat().st_size, Path(f).stat().st_mtime_ns]
                for f in files
            ]
        )
        wanted = dict(path=kind, data_files=files, split='train')
    else:
        what = dict(dataset=dataset)
        wanted = dict(path=dataset, split='train') | (
            dict(streaming=True) if limit else dict(num_proc=num_proc or None)
        )
    try:
        try:
            rows = datasets.load_dataset(**wanted)
        except RuntimeError as error:
            if 'scripts' not in str(error):
                raise
            rows = datasets.load_dataset(
                **wanted, revision='refs/convert/parquet'
            )  # what the hub makes of an old script
    except Exception as error:  # the hub's errors come in many classes
        hint = (
            'check the file'
            if input
            else 'check the name and the network, or give local files with --input='
        )
        raise UserError(
            f'cannot load {input or dataset}: {hint} ({type(error).__name__}: {str(error)[:200]})'
        ) from None
    if rows.column_names and column not in rows.column_names:
        raise UserError(
            f"{input or dataset} has no column '{column}': give --column= one of {', '.join(rows.column_names)}"
        )
    return rows, what


def batches(rows, done, documents):
    """(number of the first document, the texts) for each batch after the first `done` documents."""
    try:
        for page in rows.skip(done).iter(batch):
            texts = page[column][: documents - done]
            yield done, texts
            done += len(texts)
            if done >= documents:
                return
    except Exception as error:  # the network again, or a broken file
        raise UserError(
            f'reading stopped after {done} documents: run the same command again to go on '
            f'({type(error).__name__}: {str(error)[:200]})'
        ) from None


@lru_cache
def held_out(group):
    """The one document of a group of `every` that validates."""
    return group * every + int(np.random.default_rng((seed, group)).integers(every))


def encode(part):
    """The ids of a batch by split, each document with its <|endoftext|>."""
    first, texts = part
    ids = dict(train=[], val=[])
    for i, text in enumerate(texts, first):
        if not isinstance(text, str | None):
            raise UserError(
                f"column '{column}' holds {type(text).__name__}, not text: give --column="
            )
        if text:
            ids['val' if i == held_out(i // every) else 'train'] += [codec.encode_array(text), end]
    return len(texts), {split: np.concatenate(parts) for split, parts in ids.items() if parts}


def resumable(plan):
    """What progress.json says of an interrupted run of the same plan; None: begin anew."""
    try:
        saved = json.loads(progress.read_text())
        whole = all(
            (folder / f'{split}.bin.partial').stat().st_size >= size
            for split, size in saved['sizes'].items()
        )
        return saved if saved['plan'] == plan and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


if limit < 0 or batch < 1 or not 0 < val_fraction < 1:
    raise UserError(
        '--limit counts documents from 0, --batch from 1, and --val_fraction is between 0 and 1'
    )
folder = Path(out) if out else HERE
progress = folder / 'progress.json'
codec = Tokenizer(dict(tokenizer='gpt2'))
end = [codec.bpe.eot_token]
rows, what = load()
documents = min(limit or sys.maxsize, len(rows) if hasattr(rows, '__len__') else sys.maxsize)
every = max(min(round(1 / val_fraction), documents), 1)
plan = what | dict(column=column, documents=documents, every=every, seed=seed)

try:
    complete = (
        json.loads((folder / 'meta.json').read_text()).get('plan') == plan
        and (folder / 'train.bin').exists()
    )
except (OSError, ValueError):
    complete = False
if complete:
    print(f'{folder} has this dataset already: remove train.bin to make it again')
    raise SystemExit

saved = resumable(plan) or dict(documents=0, sizes=None)
if saved['documents']:
    print(f'going on after {saved["documents"]:,} documents')
with (
    TokenWriter(folder, codec.vocab_size, saved['sizes'], keep=True) as files,
    progress_bar(documents, ' documents', saved['documents']) as bar,
):
    done, last = saved['documents'], time.monotonic()
    for n, ids in in_order(encode, batches(rows, done, documents), num_proc):
        for split, part in ids.items():
            files.add(split, part)
        done += n
        bar.update(n)
        if time.monotonic() - last >= save_every:
            state = dict(plan=plan, documents=done, sizes=files.sync())
            write_file(progress, json.dumps(state).encode())
            last = time.monotonic()
    files.sync()
    digest = hashlib.sha256()  # of the tokens, train then val: the text is nowhere in one piece
    for split in 'train', 'val':
        with open(files.partial(split), 'rb') as file:
            while block := file.read(2**24):
                digest.update(block)
    source = f'{Path(input).name} (your own text)' if input else dataset
    if limit:
        source += f', the first {done:,} documents'
    meta = files.publish(
        dict(tokenizer='gpt2', source=source, sha256=digest.hexdigest(), documents=done, plan=plan)
    )
progress.unlink(missing_ok=True)
print(summary(folder, meta))
