"""
Which heads of a model do what, do MHA and MLA differ, and is it causal?

    python find_induction_heads.py --out_dir=out-induction-mha-rope,out-induction-mla
    python find_induction_heads.py --init_from=gpt2 --prompt="When Mary and John went to the store, John gave a drink to Mary"
    python find_induction_heads.py --sweep=out-induction-mla

Writes heads.html (open it by a double click), heads.png, heads.json, heads.csv and composition.csv to --out.
"""

# models, side by side where there are several (with a comma between them)
out_dir = ''  # runs of train.py: their ckpt.pt
init_from = ''  # instead or besides: gpt2, gpt2-medium ..., a checkpoint file or folder, also of Llama or DeepSeek-V3
sweep = (
    ''  # runs of train.py --keep_checkpoints=N: scores through training as well, in training.png
)
dataset = ''  # the text that was held out: a folder in data/, or a path; '' = the one the checkpoint names, where it is here
untrained = False  # look at random weights on purpose
out = 'out-heads'  # the folder for what is written
# what is done
length = 50  # |S|, the tokens that are said twice; less where the block or the vocabulary is small
often = 1  # random texts are made of tokens that the data holds so often, at least
texts = 32  # sequences of each trial, at least 8
seed = 0  # of the random texts
threshold = (
    0.2  # by how much a score must beat null, control and gap before a head is called something
)
causes = 'auto'  # ablations: auto (every head of a small model, the labelled ones of a large one) | all | none
prompt = ''  # the text on show; '' = the first of the repeated random texts
shown = 128  # the most tokens of it that are kept
latents = False  # what the latents of MLA models keep, as latents.png
copying = False  # heads that move a name ("When Mary and John ..., John gave a drink to"): in heads.csv, too
# the study: trains every config with every seed (where its folder is not there yet), sweeps all, draws study.png
study = ''  # configs with commas between them; of several files one: config/induction.py+config/induction_mla.py
seeds = 5  # runs of each config
# machine
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps

from nanomla.core.configurator import UserError, configure

config = configure(globals())

# ---------------------------------------------------------------------------------------------------
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core.files import write_file
from nanomla.heads import ioi as indirect_object
from nanomla.heads import report as head_report
from nanomla.heads.latents import likeness, plane, shares
from nanomla.heads.latents import read as read_latents
from nanomla.heads.subject import Subject


def say(text):
    print(text, flush=True)


def named(setting):
    return [part.strip() for part in setting.split(',') if part.strip()]


def load(path):
    return Subject(path, device, untrained, dataset, often)


def tell(model):
    """A model's findings in a few lines."""
    heads = model['scores']
    best = sorted(heads, key=lambda e: -e['induction']['gap'])[:5]
    say(
        f'  {"head":>8}  {"induction":>9} {"(95 %)":>13} {"null":>6} {"control":>7} {"gap":>6} {"copying":>9}  label'
    )
    for e in best:
        i = e['induction']
        say(
            f'  {e["layer"]:>4}.{e["head"]:<3}  {i["score"]:>9.3f} {i["low"]:>6.3f}-{i["high"]:.3f} {i["null"]:>6.3f} {i["control"]:>7.3f} {i["gap"]:>6.3f} '
            f'{e["effective_copying"]:>9.2f}  {e["label"] or "-"}'
        )
    for e in heads:
        if e['shifted']['gap'] - e['induction']['null_gap'] > threshold:
            say(
                '  head {layer}.{head} looks {offset} places behind what is repeated, not 1: {score:.3f}, control {control:.3f}, gap {gap:.3f}'.format(
                    **e | e['shifted']
                )
            )
    counts = {
        label: len(head_report.of_label(heads, label))
        for label in dict.fromkeys(e['label'] for e in heads)
        if label
    }
    say(
        '  called: '
        + (', '.join(f'{count} {label}' for label, count in sorted(counts.items())) or 'nothing')
        + f'; loss of what repeats {model["repeat_loss"]:.3f} nats, of the control {model["control_loss"]:.3f}'
        + (
            f', in-context learning {model["icl_score"]:+.3f} (token {model["icl_positions"][1]} less {model["icl_positions"][0]})'
            if model['icl_score'] is not None
            else ''
        )
    )
    tell_costs(model['group_ablation'], '')
    if 'text_repeat_loss' in model:
        say(
            '  held-out text said twice: {text_repeat_loss:.3f} nats, other text {text_control_loss:.3f}; '.format(
                **model
            )
            + (
                ', '.join(
                    'head {layer}.{head} {on_text[score]:.3f}, control {on_text[control]:.3f}, gap {on_text[gap]:.3f}'.format(
                        **e
                    )
                    for e in sorted(heads, key=lambda e: -e['on_text']['gap'])
                    if e['on_text']['label'] == 'induction'
                )
                or 'no induction head on it'
            )
        )
        tell_costs(model['group_ablation'], 'text_')


def tell_costs(costs, where):
    """Of groups and paths, `where` '' on random tokens and 'text_' on held-out text."""
    costs, on = (
        {key.removeprefix(where): cost for key, cost in costs.items() if key.startswith(where)},
        ' on text' if where else '',
    )
    for label in ('induction', 'previous', 'positional'):
        if f'{label}_heads' in costs:
            say(
                f'  without the {costs[f"{label}_heads"]} {label} heads{on}: {costs[f"{label}_zero"]:+.3f} nats (zero), {costs[f"{label}_mean"]:+.3f} (mean), '
                f'{costs[f"{label}_pattern"]:+.3f} (zero, patterns kept), {costs[f"{label}_frozen"]:+.3f} (mean, patterns and norms kept); '
                f'{costs[f"{label}_zero_control"]:+.3f} (zero) where nothing repeats'
            )
    if 'previous_to_induction_K' in costs:
        say(
            f"  previous-token heads cut off from the induction heads'{on} "
            + ', '.join(
                f'{what} {costs[f"previous_to_induction_{reads}"]:+.3f}'
                for reads, what in dict(Q='queries', K='keys', V='values').items()
            )
            + ' nats'
        )


def variant_of(files):
    """Return the name of an entry of --study, whose last file holds what is special of it."""
    return Path(files.split('+')[-1]).stem.removeprefix('induction_')


def train_study():
    """Trains what --study asks for and is not there yet. Returns [(variant, folder), ...]."""
    runs = []
    for file in named(study):
        variant = variant_of(file)
        for number in range(1, seeds + 1):
            folder = Path(out) / f'{variant}-{number}'
            runs.append((variant, folder))
            if (
                (folder / 'ckpt.pt').exists()
                and checkpoint.step_files(folder)
                and '"event": "end"' in (folder / 'log.jsonl').read_text()
            ):
                continue
            say(f'training {folder}')
            command = [
                sys.executable,
                str(Path(__file__).with_name('train.py')),
                *file.split('+'),
                f'--seed={number}',
                f'--out_dir={folder}',
                '--sample_tokens=0',
                f'--device={device.type}',
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(
                    f'{shlex.join(command[1:])} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}'
                )
    return runs


# ---------------------------------------------------------------------------------------------------
for name, least in dict(length=4, texts=8, often=1, shown=2, seeds=1).items():
    if config[name] < least:
        raise UserError(f'{name}={config[name]} must be at least {least}')
if not 0 < threshold < 1:
    raise UserError(f'threshold={threshold} must be between 0 and 1')
if causes not in ('auto', 'all', 'none'):
    raise UserError(f'--causes={causes} is not known: use auto, all or none')
asked = [*named(out_dir), *named(init_from)]
if not (asked or named(sweep) or named(study)):
    raise UserError(
        'which model? --out_dir=FOLDER of a run of train.py, or --init_from=gpt2, a file or a folder (--help tells more)'
    )
for path in asked:  # before any work
    if path in named(out_dir) and not Path(path, 'ckpt.pt').exists():
        raise UserError(
            f'there is no {path}/ckpt.pt: train a model first, for instance with `python train.py config/induction_mla.py --out_dir={path}`'
        )
device = machine.pick_device(device)
try:
    Path(out).mkdir(parents=True, exist_ok=True)
except OSError as error:
    raise UserError(f'cannot write to --out={out}: {error.strerror}') from None
made = dict(
    command=f'python find_induction_heads.py {shlex.join(sys.argv[1:])}'.strip(),
    commit=machine.commit(),
    date=str(datetime.date.today()),
)
footer = (
    f'{machine.describe(device)} · commit {made["commit"]} · {made["date"]} · {made["command"]}'
)
footer = footer if len(footer) < 150 else footer[:147] + '...'
how = dict(length=length, texts=texts, seed=seed, threshold=threshold)

folders = [(None, Path(path)) for path in named(sweep)] + (train_study() if study else [])
files = {folder: checkpoint.step_files(folder) for _, folder in folders}
for folder in files:
    if len(files[folder]) < 2:
        raise UserError(
            f'{folder} holds no checkpoints of its training: run train.py with --keep_checkpoints=20 first'
        )
paths = (
    asked
    or named(sweep)
    or [f'{out}/{variant_of(file)}-1' for file in named(study)]
)
subjects, names = [load(path) for path in paths], {}
for subject in subjects:  # what cannot be done is said before anything is
    if prompt:
        subject.encode(prompt)
    if copying:
        names[subject] = indirect_object.prompts(subject.codec, subject.begin, seed=seed)
if latents and not any(subject.kind == 'MLA' for subject in subjects):
    raise UserError('--latents=True compares the latents of MLA, and none of these models has one')

runs, models, kept = [], [], []
for variant, folder in folders:
    run = head_report.through_training(
        lambda path: Subject(path, device, True, dataset, often), files[folder], tell=say, **how
    )
    runs.append(dict(name=folder.name) | run | (dict(variant=variant) if variant else {}))
if study:
    variants = head_report.summary(runs)
    write_file(
        Path(out) / 'study.jsonl',
        ''.join(
            json.dumps(line) + '\n'
            for line in [
                dict(event='settings', made=made, **how),
                *(dict(event='run') | run for run in runs),
                *(dict(event='variant') | v for v in variants),
            ]
        ),
    )
    for v in variants:
        say(
            '{variant:>12} {kind}: gap score {mean:.3f} ({least:.3f} to {most:.3f}), above 0.5 in {formed} of {seeds} seeds'.format(
                **v
            )
            + (', first after {first:,} to {last:,} tokens'.format(**v) if v['formed'] else '')
        )
for subject in subjects:
    say(subject.banner())
    models.append(
        head_report.examine(
            subject,
            causes=causes,
            prompt=prompt,
            shown=shown,
            tell=lambda text: say(f'  {text}'),
            **how,
        )
    )
    tell(models[-1])
    if latents and subject.kind == 'MLA':
        found = read_latents(subject.model, head_report.texts_for(subject, texts, seed))
        kept.append((subject.name, shares(found), likeness(found), plane(found[:, :600])))
        models[-1]['latents'] = dict(variance=kept[-1][1].tolist(), likeness=kept[-1][2].tolist())
    if copying:
        answers, movers = indirect_object.measure(subject.model, names[subject])
        models[-1]['indirect_objects'] = answers
        for entry, mover in zip(models[-1]['scores'], movers):
            entry['indirect_object'] = {
                key: mover[key] for key in ('moved', 'attention', 'copying')
            }
        say(
            '  indirect objects: {prompts} prompts, {accuracy:.0%} right, IO above S by {logit_difference:.2f} logits'.format(
                **answers
            )
        )
        for mover in sorted(movers, key=lambda m: -m['moved'])[:3]:
            say(
                '    head {layer}.{head} adds {moved:+.3f}, looks at the name by {attention:.2f}, copies {copying:.0%} of the names'.format(
                    **mover
                )
            )

# ---------------------------------------------------------------------------------------------------
report, out = dict(models=models, checkpoints=runs, made=made), Path(out)
written = head_report.write(out, report)
try:
    from nanomla.heads import figures as head_figures

    if runs:
        written.append(
            head_figures.training(
                runs,
                out / ('study.png' if study else 'training.png'),
                footer,
                'Induction through training',
            )
        )
    for at in range(0, len(models), 4):
        written.append(
            head_figures.maps(
                report | dict(models=models[at : at + 4]),
                out / f'heads{"" if len(models) <= 4 else at // 4 + 1}.png',
                footer,
            )
        )
    if kept:
        written.append(head_figures.latents(kept, out / 'latents.png', footer))
except UserError as error:
    say(f'no picture: {error}')
say(', '.join(str(path) for path in written))
