"""
Which heads of a model do what, do MHA and MLA differ, and is it causal?

    python find_induction_heads.py --out_dir=out-induction-mha-rope,out-induction-mla
    python find_induction_heads.py --init_from=gpt2 --prompt="When Mary and John went to the store"
    python find_induction_heads.py --sweep=out-induction-mla

Writes heads.html (open it by a double click), heads.png, heads.json, heads.jsonl, heads.csv and
composition.csv to --out. The figures can be drawn again from the log alone:

    python find_induction_heads.py --plot_only=True --results=out-heads/heads.jsonl
"""

# models, side by side where there are several (with a comma between them)
out_dir = ''  # runs of train.py: their ckpt.pt
init_from = ''  # instead or besides: gpt2*, a checkpoint, a folder of Llama or DeepSeek-V3
sweep = ''  # runs of train.py --keep_checkpoints=N: scores through training, in training.png
dataset = ''  # the held-out text: a folder in data/, or a path; '' = the checkpoint's dataset
untrained = False  # look at random weights on purpose
out = 'out-heads'  # the folder for what is written
# what is measured
length = 50  # |S|, the repeated tokens; less where the block or the vocabulary is small
often = 1  # random texts are made of tokens that the data holds at least so often
texts = 32  # sequences of each trial, at least 8
seed = 0  # of the random texts
threshold = 0.2  # by how much a score must beat null, control and gap before a head gets a label
causes = 'auto'  # ablations: auto (all heads of a small model, else labelled ones) | all | none
prompt = ''  # the text on the page; '' = the first of the repeated random texts
shown = 128  # the most tokens of it
latents = False  # what the latents of MLA models hold, as latents.png
copying = False  # heads that move a name ("When Mary and John ..., John gave a drink to")
# a study: trains every config with every seed (where its folder is missing), and draws study.png
study = ''  # configs; of several files one: config/induction.py+config/induction_mla.py,...
seeds = 5  # runs of each config
# figures again
plot_only = False  # measure nothing: draw the figures of --results into --out
results = ''  # a log of an earlier call, such as out-heads/heads.jsonl
call = 1  # of several calls in one log: which of them
# machine
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps

from nanomla.core.configurator import UserError, configure

if __name__ == '__main__':
    configure(globals())  # before the imports below, so that --help is quick

# -------------------------------------------------------------------------------------------------
import datetime
import shlex
import sys
from pathlib import Path

import torch

from nanomla.core.checks import check_choice, check_range, split_list
from nanomla.core.devices import commit, describe, pick_device
from nanomla.core.figures import if_possible
from nanomla.core.files import writing
from nanomla.heads import ioi
from nanomla.heads.figures import draw_report
from nanomla.heads.latents import (
    components_for,
    has_latents,
    likeness,
    read_latents,
    variance_shares,
)
from nanomla.heads.report import (
    ReportSettings,
    TrialSettings,
    examine,
    findings,
    missing_scores,
    read_report,
    texts_for_latents,
    write_report,
)
from nanomla.heads.study import (
    Run,
    study_runs,
    tell_apart,
    through_training,
    train_missing,
    variant_line,
    write_study,
)
from nanomla.heads.subject import LoadOptions, Subject, load_subject

LATENT_DIGITS = 4  # of shares and likeness in the report


def print_row(text: str) -> None:
    print(text, flush=True)


def print_detail(text: str) -> None:
    print_row(f'  {text}')


# -------------------------------------------------------------------------------------------------
# what is asked for


def check_settings() -> None:
    """Raise a UserError for settings that do not fit."""
    for name, least in dict(length=4, texts=8, often=1, shown=2, seeds=1).items():
        check_range(name, globals()[name], least=least)
    check_range('threshold', threshold, above=0, below=1)
    check_choice('causes', causes, ('auto', 'all', 'none'))
    if plot_only:
        if not results:
            raise UserError(
                '--plot_only=True draws the figures of --results: name a log, such as '
                '--results=out-heads/heads.jsonl'
            )
        return
    if not (models_asked() or split_list(sweep) or split_list(study)):
        raise UserError(
            'which model? --out_dir=FOLDER of a run of train.py, or --init_from=gpt2, a file or a '
            'folder (--help shows more)'
        )
    for folder in split_list(out_dir):
        if not Path(folder, 'ckpt.pt').exists():
            raise UserError(
                f'there is no {folder}/ckpt.pt: train a model first, for instance with '
                f'`python train.py config/induction_mla.py --out_dir={folder}`'
            )


def models_asked() -> list[str]:
    """Return the models that are asked for by name."""
    return split_list(out_dir) + split_list(init_from)


def paths_of_models(runs: list[Run]) -> list[str | Path]:
    """Return the models to look at: those asked for, the swept runs, or a study's first seeds."""
    if models_asked():
        return models_asked()
    if split_list(sweep):
        return split_list(sweep)
    return [run.folder for run in runs if run.seed == 1]


def check_extras(subjects: list[Subject]) -> None:
    """Raise a UserError for what these models cannot be asked, before any work is done."""
    for subject in subjects:
        if prompt:
            subject.encode(prompt)
        if copying:
            name_prompts(subject)
    if latents and not any(has_latents(subject.model) for subject in subjects):
        raise UserError(
            '--latents=True compares the latents of MLA, and none of these models has one'
        )


def name_prompts(subject: Subject) -> list[ioi.Prompt]:
    return ioi.make_prompts(subject.vocabulary.codec, subject.vocabulary.begin, seed=seed)


# -------------------------------------------------------------------------------------------------
# the work


def sweep_runs(runs: list[Run], options: LoadOptions, trials: TrialSettings) -> list[dict]:
    """Return the `checkpoints` of the report: the scores of each run through its training."""
    # The first checkpoints of a run may be untrained.
    options = LoadOptions(options.device, True, options.dataset, options.often)
    return [through_training(run, options, trials, print_row) for run in runs]


def examine_latents(subject: Subject, model: dict) -> None:
    """Add to a model's entry what its latents hold."""
    found = read_latents(subject.model, texts_for_latents(subject, texts, seed))
    shares = variance_shares(found)
    model['latents'] = dict(
        variance=rounded(shares),
        components_for_90_percent=components_for(shares, 0.9).tolist(),
        likeness=rounded(likeness(found)),
    )


def rounded(rows: torch.Tensor) -> list[list[float]]:
    return [[round(value, LATENT_DIGITS) for value in row] for row in rows.tolist()]


def examine_names(subject: Subject, model: dict) -> None:
    """Add to a model's entry which heads move a name, and print the best of them."""
    answers, movers = ioi.measure(subject.model, name_prompts(subject))
    model['indirect_objects'] = answers
    for entry, mover in zip(model['scores'], movers):
        entry['indirect_object'] = {name: mover[name] for name in ioi.MEASURES}
    print_detail(
        f'indirect objects: {answers["prompts"]} prompts, {answers["accuracy"]:.0%} right, '
        f'IO above S by {answers["logit_difference"]:.2f} logits'
    )
    movers = sorted(movers, key=lambda mover: mover['moved'], reverse=True)
    for mover in movers[:3]:
        print_detail(
            f'  head {mover["layer"]}.{mover["head"]} adds {mover["moved"]:+.3f}, attends to the '
            f'name by {mover["attention"]:.2f}, copies {mover["copying"]:.0%} of the names'
        )


def draw(folder: Path, report: dict) -> list[Path]:
    """Draw the figures of a report and return their paths; none where matplotlib is missing."""
    with if_possible(print_row):
        return draw_report(folder, report)
    return []


def draw_again() -> None:
    """Draw the figures of an earlier call from its log."""
    report = read_report(results, call)
    for line in missing_scores(report):
        print_row(line)
    written = draw_report(Path(out), report)
    if not written:
        raise UserError(f'{results} holds nothing that a figure could be drawn of')
    print_row(', '.join(str(path) for path in written))


def main():
    check_settings()
    if plot_only:
        draw_again()
        return
    used = pick_device(device)
    folder = Path(out)
    with writing(f'--out={out}'):
        folder.mkdir(parents=True, exist_ok=True)
    made = dict(
        command=f'python find_induction_heads.py {shlex.join(sys.argv[1:])}'.strip(),
        commit=commit(),
        date=str(datetime.date.today()),
        device=describe(used),
    )
    options = LoadOptions(used, untrained, dataset, often)
    settings = ReportSettings(length, texts, seed, threshold, causes, prompt, shown)
    trials = TrialSettings(length, texts, seed, threshold)

    studied = study_runs(out, split_list(study), seeds)
    train_missing(studied, used, print_row)
    swept = [Run(Path(path)) for path in split_list(sweep)] + studied
    for run in swept:
        run.files()  # a run without checkpoints is an error before any work
    subjects = [load_subject(path, options) for path in paths_of_models(studied)]
    tell_apart(subjects, swept)
    check_extras(subjects)

    runs = sweep_runs(swept, options, trials)
    if study:
        for variant in write_study(folder / 'study.jsonl', runs, trials, made):
            print_row(variant_line(variant))
    models = []
    for subject in subjects:
        print_row(subject.banner())
        model = examine(subject, settings, print_detail)
        for line in findings(model):
            print_row(line)
        if latents and has_latents(subject.model):
            examine_latents(subject, model)
        if copying:
            examine_names(subject, model)
        models.append(model)

    report = dict(models=models, checkpoints=runs, made=made)
    written = write_report(folder, report) + draw(folder, report)
    print_row(', '.join(str(path) for path in written))


if __name__ == '__main__':
    main()
