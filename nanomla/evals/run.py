"""All cells of an evaluation: which they are, and what of them is measured already."""

import datetime
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanomla.checkpoints.load import may_be_model
from nanomla.core import devices
from nanomla.core.checks import split_list
from nanomla.core.configurator import UserError
from nanomla.core.files import writing
from nanomla.evals import harness, scoreboard
from nanomla.evals.measure import (
    OWN_TASKS,
    CacheFormat,
    EvalSettings,
    EvaluatedModel,
    measure,
    record_key,
    unique,
)


def model_names(models: str) -> list[str]:
    """Return the models of a list with commas. UserError for one that cannot exist."""
    names = unique(split_list(models))
    if not names:
        raise UserError(
            'say what to evaluate: --models=out-shakespeare-mla, or several with commas between'
        )
    for name in names:
        if not may_be_model(name):
            raise UserError(
                f'--models: there is no {name}: train one first, '
                'or name a file or folder that is there'
            )
    return names


def task_names(tasks: str) -> list[str]:
    """Return the tasks of a list with commas, with groups of them taken apart."""
    names = []
    for task in split_list(tasks):
        names += split_list(harness.GROUPS.get(task, task))
    if not names:
        own = ','.join(OWN_TASKS)
        raise UserError(f'say what to measure: --tasks={own}, or tasks of the harness')
    return unique(names)


def labels_of(paths: list[str]) -> dict[str, str]:
    """Return path -> its last part, or all of it where two models have the same last part."""
    labels = {path: Path(path).name for path in paths}
    if len(set(labels.values())) < len(paths):
        return {path: path for path in paths}
    return labels


Cell = tuple[CacheFormat, str]  # and a task


def all_cells(formats: list[CacheFormat], tasks: list[str]) -> list[Cell]:
    return list(itertools.product(formats, tasks))


@dataclass
class Evaluation:
    """
    The same cells for every model.

    of_harness: the tasks of the harness among them
    store: results.jsonl, which gets each record as soon as it is measured
    """

    settings: EvalSettings
    cells: list[Cell]
    of_harness: harness.Tasks | None
    store: Path

    def records_of(self, path: str, label: str) -> list[dict]:
        """Return the records of one model; what is in the store is not measured again."""
        done = scoreboard.read(self.store)
        model = None
        records = []
        for cache_format, task in self.cells:
            key = record_key(path, cache_format, task, self.settings)
            if key not in done:
                print(f'{label} · {cache_format.name} · {task}', file=sys.stderr)
                began = time.perf_counter()
                if model is None:
                    model = EvaluatedModel(path, self.settings)
                measured = measure(model, cache_format, task, self.of_harness)
                seconds = round(time.perf_counter() - began, 2)
                record = dict(key=key, model=path, cache=cache_format.name, task=task)
                done[key] = record | model.facts | self.circumstances(seconds) | measured
                with writing(self.store):
                    scoreboard.add(self.store, done[key])
            records.append(done[key] | dict(label=label))
        return records

    def circumstances(self, seconds: float) -> dict:
        """Return when, how and on what a cell was measured."""
        return dict(
            seconds=seconds,
            commit=devices.commit(),
            torch=torch.__version__,
            device=devices.describe(devices.pick_device(self.settings.device)),
            date=str(datetime.date.today()),
            chunk_size=self.settings.chunk_size,
        )
