"""How heads form: scores through the checkpoints of a run, and a study of several seeds."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from nanomla.checkpoints.native import step_files
from nanomla.core.configurator import UserError
from nanomla.core.files import jsonl, write_file
from nanomla.heads.patterns import heads_with_label, repeat_loss, score_heads
from nanomla.heads.report import (
    Message,
    TrialSettings,
    held_out_trials_for,
    in_context_score_of,
    no_message,
    trials_for,
)
from nanomla.heads.subject import LoadOptions, Subject, load_subject, prefixes_of
from nanomla.training.launch import run_train

FORMED = 0.5  # a gap score above which an induction head has formed


@dataclass
class Run:
    """
    A run of train.py with kept checkpoints.

    In a study: variant, the name of its configuration, its config files and its seed. prefix: what
    tells its name from those of others.
    """

    folder: Path
    variant: str = ''
    configs: list[str] = field(default_factory=list)
    seed: int = 0
    prefix: str = ''

    @property
    def name(self) -> str:
        return self.prefix + self.folder.resolve().name

    def files(self) -> list[Path]:
        """Return the checkpoints of its training; UserError where it has none."""
        files = step_files(self.folder)
        if len(files) < 2:
            raise UserError(
                f'{self.folder} holds no checkpoints of its training: run train.py with '
                '--keep_checkpoints=20 first'
            )
        return files

    def is_complete(self) -> bool:
        """Return whether it has been trained to its end."""
        if not (self.folder / 'ckpt.pt').exists() or not step_files(self.folder):
            return False
        log = (self.folder / 'log.jsonl').read_text(encoding='utf-8', errors='replace')
        return '"event": "end"' in log


# -------------------------------------------------------------------------------------------------
# the runs of a study


def study_runs(out: str | Path, entries: list[str], seeds: int) -> list[Run]:
    """
    Return the runs of a study: every entry with seeds 1 to `seeds`.

    An entry is a config file, or several with a + between them: a base, and what differs in the
    last one, which names the variant. UserError for two entries of one name: they would share
    their folders.
    """
    runs = []
    for entry in entries:
        configs = entry.split('+')
        variant = Path(configs[-1]).stem.removeprefix('induction_')
        if any(run.variant == variant for run in runs):
            raise UserError(
                f'--study: two entries are called {variant}, after their last config file; name '
                'one of these files otherwise'
            )
        for seed in range(1, seeds + 1):
            runs.append(Run(Path(out, f'{variant}-{seed}'), variant, configs, seed))
    return runs


def train_missing(runs: list[Run], device: torch.device, message: Message = no_message) -> None:
    """Train the runs of a study that are not complete. UserError where one fails."""
    for run in runs:
        if run.is_complete():
            continue
        message(f'training {run.folder}')
        run_train(
            [
                *run.configs,
                f'--seed={run.seed}',
                f'--out_dir={run.folder}',
                '--sample_tokens=0',
                f'--device={device.type}',
            ]
        )


def tell_apart(subjects: list[Subject], runs: list[Run]) -> None:
    """Give models and runs of one folder name their parents in front: a/run and b/run."""
    prefixes = prefixes_of([named.folder for named in [*subjects, *runs]])
    for named in [*subjects, *runs]:
        named.prefix = prefixes[named.folder.resolve()]


# -------------------------------------------------------------------------------------------------
# scores through training


def through_training(
    run: Run, options: LoadOptions, settings: TrialSettings, message: Message = no_message
) -> dict:
    """
    Return a `checkpoints` entry of the report: what changed over the checkpoints of a run.

    scores are induction scores and gaps those of the gap trial, [checkpoint][layer][head];
    max_induction is the largest gap score, max_text that on repeated held-out text, text_heads the
    number of heads labelled induction there, text_repeat_loss and text_control_loss are in nats a
    token; None without such a text.
    """
    series = {}
    for file in run.files():
        subject = load_subject(file, options)
        found = scores_at(subject, settings)
        for key, value in found.items():
            series.setdefault(key, []).append(value)
        message(
            f'{file}: best gap score {found["max_induction"]:.3f}, loss on the repetition '
            f'{found["repeat_loss"]:.3f}'
        )
    entry = dict(name=run.name, source=str(run.folder)) | series
    entry |= dict(kind=subject.kind, params=subject.model.num_params())
    if run.variant:
        entry['variant'] = run.variant
    return entry


def scores_at(subject: Subject, settings: TrialSettings) -> dict:
    """Return the scores of one checkpoint."""
    trial = trials_for(subject, settings)
    heads, repeated, control = score_heads(subject.model, trial, settings.threshold)
    layers = subject.model.config.n_layer
    gaps = [entry['induction']['gap'] for entry in heads]
    icl_score, _ = in_context_score_of(subject)
    found = dict(
        tokens=subject.tokens,
        step=subject.step,
        max_induction=round(max(gaps), 5),
        max_previous=max(entry['previous']['score'] for entry in heads),
        induction_heads=len(heads_with_label(heads, 'induction')),
        scores=by_layer([entry['induction']['score'] for entry in heads], layers),
        gaps=by_layer(gaps, layers),
        icl=icl_score,
        repeat_loss=round(repeat_loss(repeated, trial.L), 5),
        control_loss=round(repeat_loss(control, trial.L), 5),
    )
    return found | scores_on_text(subject, settings)


def by_layer(values: list[float], layers: int) -> list[list[float]]:
    """Return the values of all heads as rows, a layer each, rounded to four digits."""
    rounded = [round(value, 4) for value in values]
    heads = len(rounded) // layers
    return [rounded[i : i + heads] for i in range(0, len(rounded), heads)]


def scores_on_text(subject: Subject, settings: TrialSettings) -> dict:
    """Return the scores of one checkpoint on repeated held-out text, None where there is none."""
    trial = held_out_trials_for(subject, settings)
    if trial is None:
        names = ('max_text', 'text_heads', 'text_repeat_loss', 'text_control_loss')
        return dict.fromkeys(names)
    heads, repeated, control = score_heads(subject.model, trial, settings.threshold)
    return dict(
        max_text=max(entry['induction']['gap'] for entry in heads),
        text_heads=len(heads_with_label(heads, 'induction')),
        text_repeat_loss=round(repeat_loss(repeated, trial.L), 5),
        text_control_loss=round(repeat_loss(control, trial.L), 5),
    )


# -------------------------------------------------------------------------------------------------
# the summary of a study


def summarize(runs: list[dict]) -> list[dict]:
    """
    Return a dict a variant of a study's runs, which are its seeds: the best head's last gap score,
    and after how many tokens it passed FORMED.
    """
    variants = dict.fromkeys(run['variant'] for run in runs)
    return [summarize_variant([run for run in runs if run['variant'] == v]) for v in variants]


def summarize_variant(runs: list[dict]) -> dict:
    ends = [run['max_induction'][-1] for run in runs]
    moments = [moment_formed(run) for run in runs]
    moments = [tokens for tokens in moments if tokens is not None]
    return dict(
        variant=runs[0]['variant'],
        kind=runs[0]['kind'],
        params=runs[0]['params'],
        seeds=len(runs),
        mean=round(sum(ends) / len(ends), 4),
        least=min(ends),
        most=max(ends),
        formed=len(moments),
        first=min(moments, default=None),
        last=max(moments, default=None),
        repeat_loss=[run['repeat_loss'][-1] for run in runs],
    )


def moment_formed(run: dict) -> int | None:
    """Return the tokens after which a run's best gap score passed FORMED, or None."""
    for tokens, gap in zip(run['tokens'], run['max_induction']):
        if gap > FORMED:
            return tokens
    return None


def variant_line(variant: dict) -> str:
    """Return a line on a variant of a study."""
    line = (
        f'{variant["variant"]:>12} {variant["kind"]}: gap score {variant["mean"]:.3f} '
        f'({variant["least"]:.3f} to {variant["most"]:.3f}), above {FORMED} in '
        f'{variant["formed"]} of {variant["seeds"]} seeds'
    )
    if variant['formed']:
        line += f', first after {variant["first"]:,} to {variant["last"]:,} tokens'
    return line


def write_study(path: Path, runs: list[dict], settings: TrialSettings, made: dict) -> list[dict]:
    """Write the settings, runs and variants of a study as JSONL, and return the variants."""
    variants = summarize(runs)
    rows = [dict(event='settings', made=made) | asdict(settings)]
    rows += [dict(event='run') | run for run in runs]
    rows += [dict(event='variant') | variant for variant in variants]
    write_file(path, jsonl(rows))
    return variants
