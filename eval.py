"""
Evaluate models through their caches: perplexity, long-context retrieval, the lm-evaluation-harness.

    python eval.py --models=out-shakespeare-mla --cache_dtype=bfloat16,int8,int4
    python eval.py --models=gpt2,out-gpt2-mla --data=my_book.txt --cache=none,dense
    python eval.py --models=my_llama_folder --tasks=needle,key_value --cache_dtype=auto,int4
    python eval.py --models=gpt2 --tasks=commonsense --cache_dtype=auto,int8,int4 --limit=200

One line for each model and cache format, with the bytes that a token takes, measured on the cache's
buffers. Each result is kept in out_dir/results.jsonl as soon as it is there; the same command again
measures what is missing.
"""

# what; lists have commas between their words
models = ''  # checkpoints (files or folders), gpt2 ..., Hugging Face folders, hub names
tasks = 'perplexity'  # perplexity, needle, key_value, commonsense, the harness's tasks, *.yaml
out_dir = 'out-evaluate'  # results.jsonl, .json, .csv, .png and heat maps go here
fresh = False  # forget what out_dir/results.jsonl has, and measure again
# cache; lists are tried in every combination
cache = 'dense'  # dense | paged | none: whole texts without a cache
cache_dtype = 'auto'  # auto = that of the model | float32 | bfloat16 | float16 | int8 | int4
window = '128'  # int8, int4: the last tokens of a sequence that are kept in full precision as well
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
chunk_size = 32  # tokens that run at a time: 1 = as decoding does; 0 = all at once
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
# needle, key_value and the harness
chat = False  # put tasks as conversations in the model's chat template
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

import sys
from pathlib import Path

from nanomla.core.configurator import configure
from nanomla.core.figures import if_possible
from nanomla.core.files import writing


def main():
    config = configure(globals())

    # Imported here, as --help should not wait for torch.
    from nanomla.evals import run, scoreboard
    from nanomla.evals.measure import EvalSettings, cache_formats, harness_tasks

    names = EvalSettings.__dataclass_fields__
    settings = EvalSettings(**{name: config[name] for name in names})
    settings.check()
    paths = run.model_names(config['models'])
    tasks = run.task_names(config['tasks'])
    formats = cache_formats(
        config['cache'], config['cache_dtype'], config['window'], config['page_size']
    )
    evaluation = run.Evaluation(
        settings,
        cells=run.all_cells(formats, tasks),
        of_harness=harness_tasks(tasks, settings.include_path),
        store=Path(config['out_dir'], 'results.jsonl'),
    )
    scoreboard.read(evaluation.store)  # or a refusal, before anything in the folder changes
    with writing(config['out_dir']):
        evaluation.store.parent.mkdir(parents=True, exist_ok=True)
        if config['fresh']:
            evaluation.store.unlink(missing_ok=True)

    records = []
    for path, label in run.labels_of(paths).items():
        records += evaluation.records_of(path, label)

    for record in records:
        if scoreboard.nothing_quantised(record):
            print(
                f'note: {record["label"]}, {record["cache"]}, {record["task"]}: nothing was ever '
                'read back from its codes, as all of it lay in the window of full precision or in '
                'one chunk: use a smaller --window and --chunk_size, or longer texts',
                file=sys.stderr,
            )
    folder = evaluation.store.parent
    scoreboard.write_results(records, folder)
    print(scoreboard.table(scoreboard.rows(records)))
    with if_possible():
        scoreboard.draw_results(records, folder, settings.seed)
    endings = ('.jsonl', '.json', '.csv', '.png')
    written = [str(file) for file in folder.iterdir() if file.suffix in endings]
    print(f'written: {", ".join(sorted(written))}', file=sys.stderr)


if __name__ == '__main__':
    main()
