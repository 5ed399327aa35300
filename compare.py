"""
Train contenders on the same batches with the same seeds, and report what each costs and gains.

    python compare.py config/compare_shakespeare.py
    python compare.py --plot_only=True --results=assets/logs/compare_shakespeare.jsonl \
        --figure=compare.png
    sbatch --array=0-7 slurm/compare.sbatch config/compare_124m.py

Every run is an ordinary train.py run in out_dir/CONTENDER/; started again, a comparison resumes
where it was. It writes out_dir/results.jsonl, which holds all that is shown, compare.md,
compare.json, compare.png and compare_front.png. The settings of train.py are those of all
contenders; a config file may hold them, too.
"""

# the comparison; the settings of train.py follow
out_dir = 'out-compare'
title = ''  # of table and figure; '' = the name of out_dir
remark = ''  # a sentence for both
contenders = {}  # name -> settings of train.py, and 'label'; a list of values is a grid
only = []  # names of contenders: train and show these alone; [] = all
control = ''  # the contender that the others are compared with; '' = the first
seeds = [1, 2, 3]  # a run of each contender with each; differences are paired by them
tune = {}  # the grid of contenders without one, as dict(muon_lr=[0.01, 0.02]); {} = no tuning
tune_seed = 1000  # the seed of the grid's runs, none of `seeds`
tune_iters = 0  # steps of a grid's run, for long comparisons: the schedule in short; 0 = max_iters
match = True  # give each contender the control's parameters by n_inner, unless it has its own
tolerance = 0.01  # of the parameters: a contender that is further away is pointed out
retry = False  # try runs again that have failed
# speed
jobs = 1  # runs at a time on each GPU, or on the CPU; with more, speeds and memory are not reported
in_process = False  # one process trains run after run: no start-up and no compiling in between
decode_tokens = 200  # tokens decoded to measure the speed, at most a block; 0 = do not measure it
decode_batch = 1  # sequences at a time
decode_repeats = 5  # the median counts, after one to warm up
# output
plot_only = False  # train nothing: table and figures from --results
results = ''  # the file to draw; '' = out_dir/results.jsonl; several, with commas: one picture
figure = ''  # where to draw; '' = out_dir/compare.png. The table goes beside it, as .md and .json

import json
import os
import sys
from pathlib import Path

from nanomla.comparison.figures import draw, draw_front
from nanomla.comparison.table import read, report, rows, table
from nanomla.core.checks import split_list
from nanomla.core.configurator import UserError, configure
from nanomla.core.figures import if_possible
from nanomla.core.files import lock, write_file


def main() -> int:
    own_names = set(globals())
    config = configure(globals(), also='train.py', classes='attentions')
    out = Path(out_dir)
    picture = Path(figure or out / 'compare.png')
    if picture.suffix != '.png':
        raise UserError(f'--figure={picture}: name a .png')
    if plot_only:
        found = [read_results(path) for path in split_list(results) or [out / 'results.jsonl']]
        if len(found) == 1:
            show_table(found[0], picture)
        draw_pictures(found, picture)
        return 0

    # torch is imported from here on: neither --help nor a picture has to wait for it.
    from nanomla.comparison.contenders import (
        ComparisonQueue,
        ComparisonSettings,
        Contender,
        forget_failures,
        measure_all,
        print_plan,
    )
    from nanomla.comparison.results import DecodeSettings, conclude
    from nanomla.comparison.runs import STOPPED, run_environments
    from nanomla.core.devices import pick_device
    from nanomla.core.token_files import find, prepare_if_missing, read_meta

    # what was asked for, checked before anything is trained
    device = pick_device(config['device'])
    if device.type == 'cpu':
        config.apply_on_cpu()
    asked = chosen_contenders()
    comparison = ComparisonSettings(
        train=config,
        own_names=own_names,
        out=out,
        title=title or out.name,
        remark=remark,
        control=control or next(iter(asked), ''),
        seeds=seeds,
        tune=tune,
        tune_seed=tune_seed,
        tune_iters=tune_iters,
        match=match,
        tolerance=tolerance,
    )
    comparison.check(asked)
    field = {name: Contender(name, entry, comparison) for name, entry in asked.items()}
    with lock(out, wait=True):
        prepare_if_missing(config['dataset'])
    meta = read_meta(find(config['dataset']))
    measure_all(field, meta['vocab_size'])
    environments = run_environments(device, jobs)
    print_plan(field, meta['source'], len(environments), device)

    # training
    queue = ComparisonQueue(field, environments, in_process, shared=jobs > 1)
    if retry:
        forget_failures(field)
    # A task of a SLURM array leaves when others train all that is left.
    stopped = queue.train(config['max_minutes'], wait='SLURM_ARRAY_TASK_ID' not in os.environ)
    left = sum(not run.outcome for run in queue.runs)
    if left and not stopped:
        print(
            f'{left} runs are still being trained by other processes: '
            'the last of them writes the results'
        )
        return 0

    # results; what is decoded is measured once all is trained
    decode = None
    if not stopped:
        tokens = min(decode_tokens, config['block_size'])
        decode = DecodeSettings(tokens, decode_batch, decode_repeats)
    path = Path(results or out / 'results.jsonl')
    with lock(out, wait=True):
        failed = conclude(path, queue, meta['source'], decode, device)
        if stopped:
            print(
                f'stopped by {stopped} with {left} of {len(queue.runs)} runs to go: '
                'what is under way is saved, go on with the same command'
            )
            return STOPPED
        found = read_results(path)
        show_table(found, picture)
        with if_possible():
            draw_pictures([found], picture)
    if failed:
        print(
            f'{len(failed)} runs failed, the first one because: {failed[0]["error"]}. '
            'Their output.txt tells more; --retry=True tries them again'
        )
        return 1
    return 0


def chosen_contenders() -> dict:
    """Return the contenders of the config file, or those of --only."""
    for name in only:
        if name not in contenders:
            raise UserError(
                f"only={only}: '{name}' is no contender; there are {', '.join(contenders)}"
            )
    return {name: entry for name, entry in contenders.items() if not only or name in only}


def read_results(path):
    """Read a results.jsonl file, compared with --control where that is given."""
    results = read(path)
    if control and control not in results.contenders:
        names = ', '.join(results.contenders)
        raise UserError(f'--control={control}: {path} has the contenders {names}')
    results.head['control'] = control or results.control
    return results


def show_table(results, picture) -> None:
    """Print the table of a comparison, and write it beside its picture."""
    write_file(picture.with_suffix('.md'), table(results))
    write_file(picture.with_suffix('.json'), json.dumps(rows(results), indent=1) + '\n')
    print('\n' + report(results))


def draw_pictures(found, picture) -> None:
    """Draw a comparison; of several there is one picture of all, against their controls."""
    if len(found) > 1:
        draw_front(found, picture)
        print(picture)
        return
    draw(found[0], picture)
    front = picture.with_name(picture.stem + '_front.png')
    draw_front(found, front)
    print(f'pictures: {picture}, {front}')


if __name__ == '__main__':
    sys.exit(main())
