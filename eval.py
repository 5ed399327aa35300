"""
Evaluate models through their caches: perplexity, long-context retrieval, the lm-evaluation-harness.

    python eval.py --models=out-shakespeare-mla --cache_dtype=bfloat16,int8,int4
    python eval.py --models=gpt2,out-gpt2-mla --data=my_book.txt --cache=none,dense
    python eval.py --models=my_llama_folder --tasks=needle,key_value --cache_dtype=auto,int4
    python eval.py --models=gpt2 --tasks=commonsense --cache_dtype=auto,int8,int4 --limit=200

One line for each model and cache format, with the bytes that a token takes, measured on the cache's
buffers. Each result is kept in out_dir/results.jsonl as soon as it is there; the same command again
goes on with what is missing.
"""

# what; lists have commas between their words
models = ''  # checkpoints (files or folders), gpt2 ..., Llama and DeepSeek-V3 folders, hub names
tasks = 'perplexity'  # perplexity, needle, key_value, commonsense, the harness's tasks, *.yaml
out_dir = 'out-evaluate'  # results.jsonl, .json, .csv, .png and heat maps go here
fresh = False  # forget what out_dir/results.jsonl has, and measure again
# cache; lists are tried in every combination
cache = 'dense'  # dense | paged | none: whole texts without a cache
cache_dtype = 'auto'  # auto = that of the model | float32 | bfloat16 | float16 | int8 | int4
window = '128'  # int8, int4: the last tokens of a sequence that are kept in full precision as well
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
chunk_size = (
    32  # tokens that run at a time, in full precision: 1 = as decoding does; 0 = all at once
)
# perplexity
data = ''  # a dataset (its folder, or its name in data/) or a text file; '' = the model's own
split = 'val'  # of a dataset: val | train
max_tokens = 0  # only the first so many tokens; 0 = all
context = 0  # tokens a window has; 0 = block_size, but at most 2048
stride = 0  # new tokens of each further window, all of them scored once; 0 = half of context
# needle, key_value
lengths = ''  # tokens of the whole text; '' = a quarter, a half and all of block_size
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

import datetime
import sys
import time
from pathlib import Path

from nanomla.core.checks import split_list
from nanomla.core.configurator import UserError, configure
from nanomla.core.files import writing


def main():
    config = configure(globals())

    # Imported here, as --help should not wait for torch.
    from nanomla.evals import scoreboard
    from nanomla.evals.measure import EvalSettings, cache_formats, harness_tasks

    names = EvalSettings.__dataclass_fields__
    settings = EvalSettings(**{name: config[name] for name in names})
    settings.check()
    paths, wanted = models_and_tasks(config['models'], config['tasks'])
    formats = cache_formats(
        config['cache'], config['cache_dtype'], config['window'], config['page_size']
    )
    of_harness = harness_tasks(wanted, settings.include_path)

    store = Path(config['out_dir'], 'results.jsonl')
    with writing(store.parent):
        store.parent.mkdir(parents=True, exist_ok=True)
        if config['fresh']:
            store.unlink(missing_ok=True)
    cells = [(cache_format, task) for cache_format in formats for task in wanted]
    records = []
    for path, label in labels_of(paths).items():
        records += evaluate(path, label, cells, settings, of_harness, store)

    for record in records:
        if scoreboard.nothing_quantised(record):
            print(
                f'note: {record["label"]}, {record["cache"]}, {record["task"]}: nothing was ever '
                'read back from its codes, as all of it lay in the window of full precision or in '
                'one chunk: use a smaller --window and --chunk_size, or longer texts',
                file=sys.stderr,
            )
    scoreboard.write_results(records, store.parent, settings.seed)
    print(scoreboard.table(scoreboard.rows(records)))
    endings = ('.jsonl', '.json', '.csv', '.png')
    written = [str(file) for file in store.parent.iterdir() if file.suffix in endings]
    print(f'written: {", ".join(sorted(written))}', file=sys.stderr)


def models_and_tasks(models, tasks):
    """Return the two lists of names, with groups of tasks taken apart, once they may exist."""
    from nanomla.checkpoints.load import may_be_model
    from nanomla.evals.harness import GROUPS
    from nanomla.evals.measure import OWN_TASKS, unique

    paths = unique(split_list(models))
    if not paths:
        raise UserError(
            'say what to evaluate: --models=out-shakespeare-mla, or several with commas between'
        )
    wanted = []
    for task in split_list(tasks):
        wanted += split_list(GROUPS.get(task, task))
    if not wanted:
        own = ','.join(OWN_TASKS)
        raise UserError(f'say what to measure: --tasks={own}, or tasks of the harness')
    for path in paths:
        if not may_be_model(path):
            raise UserError(
                f'--models: there is no {path}: train one first, '
                'or name a file or folder that is there'
            )
    return paths, unique(wanted)


def labels_of(paths):
    """Return path -> its last part, or all of it where two models have the same last part."""
    labels = {path: Path(path).name for path in paths}
    if len(set(labels.values())) < len(paths):
        return {path: path for path in paths}
    return labels


def evaluate(path, label, cells, settings, of_harness, store):
    """Return the records of one model; what `store` has already is not measured again."""
    import torch

    from nanomla.core import devices
    from nanomla.evals import scoreboard
    from nanomla.evals.measure import EvaluatedModel, measure, record_key

    done = scoreboard.read(store)
    device = devices.pick_device(settings.device)
    model = None
    records = []
    for cache_format, task in cells:
        key = record_key(path, cache_format, task, settings)
        if key not in done:
            print(f'{label} · {cache_format.name} · {task}', file=sys.stderr)
            began = time.perf_counter()
            if model is None:
                model = EvaluatedModel(path, settings)
            measured = measure(model, cache_format, task, of_harness)
            record = dict(key=key, model=path, cache=cache_format.name, task=task)
            record |= model.facts
            record |= dict(
                seconds=round(time.perf_counter() - began, 2),
                commit=devices.commit(),
                torch=torch.__version__,
                device=devices.describe(device),
                date=str(datetime.date.today()),
                chunk_size=settings.chunk_size,
            )
            done[key] = record | measured
            with writing(store):
                scoreboard.add(store, done[key])
        records.append(done[key] | dict(label=label))
    return records


if __name__ == '__main__':
    main()
