"""
Evaluate models through their caches: perplexity, long-context retrieval, every task of the lm-evaluation-harness.

    python evaluate.py --models=out-shakespeare-mla --cache_dtype=bfloat16,int8,int4
    python evaluate.py --models=gpt2,out-gpt2-mla --data=my_book.txt --cache=none,dense
    python evaluate.py --models=my_llama_folder --tasks=needle,key_value --lengths=1024,4096,16384 --cache_dtype=auto,int4
    python evaluate.py --models=gpt2 --tasks=commonsense --cache_dtype=auto,int8,int4 --limit=200

One line for each model and cache format, with the bytes that a token takes, measured on the cache's buffers. Each
result is kept in out_dir/results.jsonl as soon as it is there; the same command again goes on with what is missing.
"""

# what
models = ''  # comma-separated: checkpoint files or folders, gpt2, gpt2-medium ..., folders of Llama or DeepSeek-V3, names on the Hugging Face hub
tasks = 'perplexity'  # comma-separated: perplexity, needle, key_value, commonsense (MHA2MLA's set), tasks of the harness, task files (*.yaml)
out_dir = 'out-evaluate'  # results.jsonl, .json, .csv, .png and heat maps go here
fresh = False  # forget what out_dir/results.jsonl has, and measure again
# cache; comma-separated lists are tried in every combination
cache = 'dense'  # dense | paged | none: whole texts without a cache
cache_dtype = 'auto'  # auto = that of the model | float32 | bfloat16 | float16 | int8 | int4
window = '128'  # int8, int4: the last tokens of a sequence that are kept at full precision as well
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
chunk_size = 32  # tokens that run at a time and see each other in full precision: 1 = as decoding does; 0 = all at once
# perplexity
data = ''  # a dataset (its folder, or its name in data/) or a text file; '' = the dataset that the model was trained on
split = 'val'  # of a dataset: val | train
max_tokens = 0  # only the first so many tokens; 0 = all
context = 0  # tokens a window has; 0 = block_size, but at most 2048
stride = 0  # new tokens of a window behind the first: each is scored once, with context - stride + 1 or more before it; 0 = half of context
# needle, key_value
lengths = (
    ''  # tokens of the whole text, comma-separated; '' = a quarter, a half and all of block_size
)
depths = '0,0.25,0.5,0.75,1'  # where the answer stands: 0 = at the beginning, 1 = at the end
trials = 8  # texts for each length and depth
candidates = 8  # words to choose among, for the rank by likelihood
haystack = 'data'  # needle: data = pieces of --data | synthetic = sentences about nothing
# the harness
include_path = ''  # a folder of your own task files
limit = 0  # only the first so many examples of a task; 0 = all
num_fewshot = -1  # examples in front of each question; -1 = as the task has it
# machine
seed = 1337  # of texts and few-shot examples
batch_size = 8  # texts at a time
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # of weights and arithmetic: auto | float32 | bfloat16 | float16
kernel = 'sdpa'  # attention: eager | sdpa | flash | cudnn

from nanomla.core.configurator import UserError, configure

config = configure(globals())

# ---------------------------------------------------------------------------------------------------
import datetime
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from nanomla.checkpoints import gpt2, load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import figures
from nanomla.core import token_files as datasets
from nanomla.core.files import progress_bar, write_file, writing
from nanomla.evals import harness, retrieval, scoreboard
from nanomla.evals.scoring import Scorer, perplexity
from nanomla.inference.cache import LAYOUTS
from nanomla.inference.quantize import BITS, FULL

OWN = ('perplexity', *retrieval.TASKS)
SETTINGS = dict(
    perplexity=('data', 'split', 'max_tokens', 'context', 'stride'),
    **dict.fromkeys(
        retrieval.TASKS,
        ('data', 'split', 'lengths', 'depths', 'trials', 'candidates', 'haystack', 'seed'),
    ),
)  # what a task's result depends on
HARNESS = ('include_path', 'limit', 'num_fewshot', 'seed')


def listed(name, kind=str):
    """A comma-separated setting as a list without doubles; UserError where a part is not of `kind`."""
    try:
        return list(
            dict.fromkeys(kind(part.strip()) for part in config[name].split(',') if part.strip())
        )
    except ValueError:
        what = 'whole numbers' if kind is int else 'numbers'
        raise UserError(f'--{name}={config[name]}: give {what} with commas between them') from None


def formats():
    """The cache formats as dicts of Scorer's settings, by name."""
    found = {}
    for layout, stored, kept in itertools.product(
        listed('cache') or ['dense'],
        listed('cache_dtype') or ['auto'],
        listed('window', int) or [128],
    ):
        name = ' '.join(
            [layout]
            + [stored] * (layout != 'none')
            + [f'window {kept}'] * (layout != 'none' and stored in BITS)
        )
        found[name] = dict(layout=layout) | (
            dict(dtype=stored, window=kept, page_size=page_size) if layout != 'none' else {}
        )
        if layout not in ('none', *LAYOUTS):
            raise UserError(f'--cache={layout} is not known: use none, dense or paged')
        if stored not in (known := ['auto', *FULL, *BITS]):
            raise UserError(f'--cache_dtype={stored} is not known: use {", ".join(known)}')
        if kept < 0:
            raise UserError(f'--window={window}: give whole numbers of at least 0')
    return found


def fingerprint(path):
    """What tells whether the files of a model or text are still the same."""
    path = Path(path)
    files = (
        sorted(p for p in path.iterdir() if p.is_file())
        if path.is_dir()
        else [path] * path.is_file()
    )
    files = [
        p
        for p in files
        if not path.is_dir() or p.name == 'ckpt.pt' or p.suffix in ('.json', '.safetensors', '.bin')
    ]
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


class Subject:
    """A model with its tokenizer and its text, loaded when it is needed first."""

    def __init__(self, path):
        self.path, self.model = path, None

    def load(self):
        if self.model is not None:
            return
        loaded = load.load_model(self.path, dropout=0.0, kernel=kernel)
        self.model = loaded.model
        self.meta = load.meta_of(loaded) if loaded.tokenizer is None else {}
        codec = load.codec_of(loaded)
        self.codec, self.begin, self.ends = codec.tokenizer, codec.begin, codec.ends
        self.trained_on = loaded.settings.get('dataset', '')
        self.model.stream = machine.pick_dtype(dtype, device)
        self.model.to(device, self.model.stream).eval()
        self.model.check_kernel(device)
        kind = figures.kind_of(
            dict(kind=checkpoint.kind_of(self.model), config=vars(self.model.config))
        )
        self.facts = dict(
            kind=kind,
            params=self.model.num_params(),
            block_size=self.model.config.block_size,
            dtype=str(self.model.stream)[6:],
        )
        self.text = None

    def read(self):
        """(ids, UTF-8 bytes of all but the first id, name) of the text, once."""
        if self.text is None:
            name = data or self.trained_on
            if not name:
                raise UserError(
                    f'{self.path} does not say what text it was trained on: name a dataset or a text file by --data'
                )
            self.text = *(self.read_file if os.path.isfile(name) else self.read_bin)(name), name
        return self.text

    def read_file(self, path):
        try:
            raw = Path(path).read_bytes()
            text = raw.decode('utf-8-sig')
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or self.codec.name != 'bytes':
                raise UserError(
                    f'--data={path} cannot be read: {getattr(error, "strerror", None) or "it is not UTF-8 text"}'
                ) from None
            text = raw
        if not text:
            raise UserError(f'--data={path} is empty: name a file with text')
        try:
            ids = np.asarray(
                self.codec.encode(text)
                if self.codec.name == 'hf'
                else self.codec.encode_array(text),
                np.int64,
            )
        except UserError as error:
            raise UserError(f'--data={path}: {error}') from None
        n_bytes = len(text if isinstance(text, bytes) else text.encode())
        if self.begin is not None:
            ids = np.concatenate([[self.begin], ids])
        else:
            n_bytes -= len(self.codec.decode_bytes(ids[:1].tolist())) - getattr(
                self.codec, 'blank', False
            )  # some put a blank in front of a text
        if max_tokens and len(ids) > max_tokens:
            rest = self.codec.decode_bytes(ids[max_tokens:].tolist())
            ids, n_bytes = ids[:max_tokens], n_bytes - len(rest)
        return ids, n_bytes

    def read_bin(self, name):
        folder = datasets.find(name)
        if not os.path.exists(folder):
            raise UserError(
                f'--data={name} is neither a text file nor a dataset: {folder} is not there'
            )
        datasets.prepare_if_missing(name)
        meta = datasets.read_meta(folder)
        own = self.meta.get('tokenizer', self.codec.name)
        if (meta['tokenizer'], meta.get('chars')) != (own, self.meta.get('chars')):
            raise UserError(
                f'{folder} holds tokens of another vocabulary ({meta["tokenizer"]}) than {self.path} has ({own}): give its text as a file by --data'
            )
        ids = datasets.read_tokens(folder / f'{split}.bin', meta['dtype'])
        ids = ids[: max_tokens or len(ids)]
        if (top := int(ids.max())) >= self.codec.vocab_size:
            raise UserError(
                f'{folder}/{split}.bin holds token {top}, but the vocabulary has {self.codec.vocab_size}'
            )
        counts = np.bincount(ids[1:], minlength=top + 1)
        return ids, sum(
            int(n) * len(self.codec.decode_bytes([i])) for i, n in enumerate(counts) if n
        )


def measure(subject, how, task):
    """One cell: the result of `task` for a model with a cache format."""
    subject.load()
    model, codec = subject.model, subject.codec
    scorer = Scorer(model, codec.vocab_size, chunk_size=chunk_size, batch_size=batch_size, **how)
    begin = [] if subject.begin is None else [subject.begin]
    if task == 'perplexity':
        ids, n_bytes, name = subject.read()
        size = context or min(model.config.block_size, 2048)
        step = stride or max(1, size // 2)
        if size > model.config.block_size:
            raise UserError(
                f'--context={size} is more than {subject.path} was made for: {model.config.block_size}'
            )
        if step > size:
            raise UserError(
                f'--stride={step} is more than the context of {size}: tokens between would never be scored'
            )
        if len(ids) <= size:
            raise UserError(
                f'{name} has {len(ids)} tokens, too few for one window of {size} and a token behind it: '
                + (
                    f'use a longer text or --context={len(ids) - 1}'
                    if len(ids) > 1
                    else 'use a longer text'
                )
            )
        bar = progress_bar(len(ids) - 1, 'token')
        result = perplexity(scorer, ids, size, step, n_bytes, bar) | dict(data=name)
        bar.close()
    elif task in retrieval.TASKS:
        sizes = listed('lengths', int) or [
            model.config.block_size // 4,
            model.config.block_size // 2,
            model.config.block_size,
        ]
        where = listed('depths', float)
        if not where or min(where) < 0 or max(where) > 1:
            raise UserError(f'--depths={depths}: give numbers from 0 to 1')
        if max(sizes) > model.config.block_size:
            raise UserError(
                f'--lengths={max(sizes)} is more than {subject.path} was made for: {model.config.block_size}'
            )
        hay = (
            subject.read()[0]
            if task == 'needle' and haystack == 'data' and (data or subject.trained_on)
            else None
        )
        try:
            least = retrieval.least_length(task, codec, candidates, seed, begin, hay)
        except UserError as error:
            raise UserError(f'{task}: {error}') from None
        fitting = sizes if 'lengths' in config.given else [n for n in sizes if n >= least]
        if not fitting or min(fitting) < least:
            raise UserError(
                f'{task} needs texts of {least} tokens or more with this vocabulary, not {min(sizes)}: use longer --lengths'
                + f' (the model has {model.config.block_size})'
            )
        bar = progress_bar(len(fitting) * len(where) * trials, 'text')
        result = retrieval.evaluate(
            scorer, task, codec, fitting, where, trials, candidates, seed, begin, hay, bar
        )
        bar.close()
    else:
        lm = harness.adapter(scorer, codec, subject.begin, subject.ends, progress_bar)
        result = dict(metrics=harnessed.run(task, lm, limit, num_fewshot, seed))
    return dict(result=result, cache_bytes=scorer.footprint(), dequantised=scorer.dequantised)


def key_of(path, format_name, how, task):
    """What one cell depends on, as a short hash."""
    names = SETTINGS.get(task, HARNESS)
    about = {
        name: config[name]
        for name in ('batch_size', 'chunk_size', 'device', 'dtype', 'kernel', *names)
    }
    text = fingerprint(data) if 'data' in names and data and os.path.isfile(data) else []
    made_of = [path, fingerprint(path), format_name, how, task, about, text, fingerprint(task)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------
device = machine.pick_device(device)
for name, least in dict(
    chunk_size=0,
    max_tokens=0,
    context=0,
    stride=0,
    trials=1,
    candidates=2,
    limit=0,
    batch_size=1,
    num_fewshot=-1,
).items():
    if config[name] < least:
        raise UserError(f'{name}={config[name]} must be at least {least}')
for name, known in dict(split=('val', 'train'), haystack=('data', 'synthetic')).items():
    if config[name] not in known:
        raise UserError(f'--{name}={config[name]} is not known: use {" or ".join(known)}')
if kernel == 'flex':
    raise UserError('--kernel=flex is compiled for one length, and texts grow: use --kernel=sdpa')
paths, wanted = (
    listed('models'),
    ','.join(harness.GROUPS.get(task, task) for task in listed('tasks')).split(','),
)
if not paths:
    raise UserError(
        'say what to evaluate: --models=out-shakespeare-mla, or several with commas between them'
    )
if wanted == ['']:
    raise UserError(f'say what to measure: --tasks={",".join(OWN)}, or tasks of the harness')
for path in paths:
    if (
        not os.path.exists(path)
        and path not in gpt2.HUB
        and ('/' not in path and ':' not in path or path.endswith('.pt'))
    ):
        raise UserError(
            f'--models: there is no {path}: train one first, or name a file or folder that is there'
        )
caches, foreign = formats(), [task for task in wanted if task not in OWN]
harnessed = harness.Tasks(foreign, include_path, [*OWN, *harness.GROUPS]) if foreign else None
labels = {path: Path(path).name for path in paths}
if len(set(labels.values())) < len(paths):
    labels = {path: path for path in paths}

store = Path(out_dir, 'results.jsonl')
with writing(out_dir):
    store.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        store.unlink(missing_ok=True)
done = scoreboard.read(store)
records = []
for path in paths:
    subject = Subject(path)
    for (format_name, how), task in itertools.product(caches.items(), wanted):
        key = key_of(path, format_name, how, task)
        if key not in done:
            print(f'{labels[path]} · {format_name} · {task}', file=sys.stderr)
            began = time.perf_counter()
            cell = measure(subject, how, task)
            about = subject.facts | dict(
                seconds=round(time.perf_counter() - began, 2),
                commit=machine.commit(),
                torch=torch.__version__,
                device=machine.describe(device),
                date=f'{datetime.date.today()}',
                chunk_size=chunk_size,
            )
            done[key] = dict(key=key, model=path, cache=format_name, task=task) | about | cell
            with writing(store):
                scoreboard.add(store, done[key])
        records.append(done[key] | dict(label=labels[path]))
    del subject

rows = scoreboard.rows(records)
for record in records:
    if record['dequantised'] == 0 and record['cache'].split()[1:2] in (['int8'], ['int4']):
        print(
            f'note: {record["label"]}, {record["cache"]}, {record["task"]}: nothing was ever read back from its codes, as all of it lay in the window of '
            'full precision or in one chunk: use a smaller --window and --chunk_size, or longer texts',
            file=sys.stderr,
        )
write_file(store.with_suffix('.json'), json.dumps(records, indent=1).encode())
write_file(store.with_suffix('.csv'), scoreboard.csv(rows).encode())
footer = scoreboard.footer(records, seed)
scoreboard.draw(figures, records, store.with_suffix('.png'), footer)
for task in retrieval.TASKS:
    if mine := [
        (f'{record["label"]}, {record["cache"]}', record['result'])
        for record in records
        if record['task'] == task
    ]:
        retrieval.heat_map(figures, mine, task, store.with_name(f'{task}.png'), footer)
print(scoreboard.table(rows))
print(
    f'written: {", ".join(sorted(str(p) for p in store.parent.iterdir() if p.suffix in (".jsonl", ".json", ".csv", ".png")))}',
    file=sys.stderr,
)
