"""One cell of an evaluation: a model, a cache format and a task. eval.py runs all of them."""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from nanomla.checkpoints import native
from nanomla.checkpoints.load import codec_of, load_model
from nanomla.checkpoints.text import ModelText, read_text
from nanomla.checkpoints.tokens.chat import chat_template_of
from nanomla.core import figures
from nanomla.core.checks import (
    check_choice,
    check_range,
    settings_errors,
    split_list,
    split_numbers,
)
from nanomla.core.configurator import UserError
from nanomla.core.devices import pick_device, pick_dtype
from nanomla.core.files import progress_bar
from nanomla.evals import harness, retrieval
from nanomla.evals.scoring import Scorer, perplexity
from nanomla.inference.cache import LAYOUTS
from nanomla.inference.quantize import BITS, FULL

OWN_TASKS = ('perplexity', *retrieval.TASKS)

# The settings that a task's result depends on, besides those of all tasks.
OF_TRIALS = ('lengths', 'depths', 'trials', 'candidates', 'haystack')
RETRIEVAL = ('data', 'split', *OF_TRIALS, 'chat', 'seed')
SETTINGS = dict(
    perplexity=('data', 'split', 'max_tokens', 'context', 'stride'),
    **dict.fromkeys(retrieval.TASKS, RETRIEVAL),
)
OF_HARNESS = ('include_path', 'limit', 'num_fewshot', 'chat', 'seed')
OF_ALL = ('batch_size', 'chunk_size', 'device', 'dtype', 'kernel')


@dataclass(frozen=True)
class EvalSettings:
    """eval.py's settings of the same names, where each has its comment."""

    data: str = ''
    split: str = 'val'
    max_tokens: int = 0
    context: int = 0
    stride: int = 0
    lengths: str = ''
    depths: str = '0,0.25,0.5,0.75,1'
    trials: int = 8
    candidates: int = 8
    haystack: str = 'data'
    include_path: str = ''
    limit: int = 0
    num_fewshot: int = -1
    chat: bool = False
    seed: int = 1337
    chunk_size: int = 32
    batch_size: int = 8
    device: str = 'auto'
    dtype: str = 'auto'
    kernel: str = 'sdpa'

    def check(self) -> None:
        """Raise a UserError for a setting out of its range, and for a device that is not there."""
        pick_device(self.device)
        for name in ('chunk_size', 'max_tokens', 'context', 'stride', 'limit'):
            check_range(name, getattr(self, name), least=0)
        for name in ('trials', 'batch_size'):
            check_range(name, getattr(self, name), least=1)
        check_range('candidates', self.candidates, least=2)
        check_range('num_fewshot', self.num_fewshot, least=-1)
        check_choice('split', self.split, ('val', 'train'))
        check_choice('haystack', self.haystack, ('data', 'synthetic'))
        if self.kernel == 'flex':
            raise UserError(
                '--kernel=flex is compiled for one length, and texts grow: use --kernel=sdpa'
            )


@dataclass(frozen=True)
class CacheFormat:
    """
    A way to keep keys and values.

    name: 'none', 'dense auto', 'paged int8 window 128'
    arguments: of Scorer
    """

    name: str
    arguments: dict


def cache_formats(cache: str, cache_dtype: str, window: str, page_size: int) -> list[CacheFormat]:
    """Return the formats that lists of layouts, dtypes and windows, with commas, make together."""
    layouts = split_list(cache) or ['dense']
    dtypes = split_list(cache_dtype) or ['auto']
    windows = split_numbers('window', window) or [128]
    for layout in layouts:
        check_choice('cache', layout, ('none', *LAYOUTS))
    for dtype in dtypes:
        check_choice('cache_dtype', dtype, ('auto', *FULL, *BITS))
    for size in windows:
        check_range('window', size, least=0)
    formats = {}
    for layout, dtype, size in itertools.product(layouts, dtypes, windows):
        name, arguments = layout, dict(layout=layout)
        if layout != 'none':
            name += f' {dtype}'
            arguments |= dict(dtype=dtype, window=size, page_size=page_size)
            if dtype in BITS:
                name += f' window {size}'
        formats[name] = CacheFormat(name, arguments)
    return list(formats.values())


def harness_tasks(tasks: list[str], include_path: str) -> harness.Tasks | None:
    """Return those of `tasks` that are the harness's, None where there are none."""
    foreign = [task for task in tasks if task not in OWN_TASKS]
    if not foreign:
        return None
    return harness.Tasks(foreign, include_path, [*OWN_TASKS, *harness.GROUPS])


class EvaluatedModel:
    """
    A model on its device, with its tokenizer, and its text, which is read when it is needed first.

    facts: what its records say of it
    """

    def __init__(self, path: str, settings: EvalSettings):
        self.path, self.settings = path, settings
        self.loaded = load_model(path, dropout=0.0, kernel=settings.kernel)
        self.codec = codec_of(self.loaded)
        self.model = self.loaded.model
        device = pick_device(settings.device)
        self.model.stream = pick_dtype(settings.dtype, device)
        self.model.to(device, self.model.stream).eval()
        with settings_errors():
            self.model.check_kernel(device)
        self.block_size = self.model.config.block_size
        kind = native.kind_of(self.model)
        self.facts = dict(
            kind=figures.kind_of(dict(kind=kind, config=vars(self.model.config))),
            params=self.model.num_params(),
            block_size=self.block_size,
            dtype=str(self.model.stream).removeprefix('torch.'),
        )

    @cached_property
    def text(self) -> ModelText:
        s = self.settings
        return read_text(self.loaded, self.codec, s.data, s.split, s.max_tokens)

    @property
    def has_text(self) -> bool:
        return bool(self.settings.data or self.loaded.settings.get('dataset'))


# -------------------------------------------------------------------------------------------------
# measuring


def measure(
    model: EvaluatedModel, cache_format: CacheFormat, task: str, tasks: harness.Tasks | None
) -> dict:
    """
    Return the result of `task` for a model with a cache format, the bytes of its cache, and the
    share of the attended tokens that had been quantised.

    tasks: those of the harness
    """
    settings, tokenizer = model.settings, model.codec.tokenizer
    scorer = Scorer(
        model.model,
        tokenizer.vocab_size,
        chunk_size=settings.chunk_size,
        batch_size=settings.batch_size,
        **cache_format.arguments,
    )
    if task == 'perplexity':
        result = measure_perplexity(model, scorer)
    elif task in retrieval.TASKS:
        result = measure_retrieval(model, scorer, task)
    else:
        template = None
        if settings.chat:
            template = chat_template_of(tokenizer, model.path)
        lm = harness.adapter(scorer, model.codec, template)
        metrics = tasks.run(task, lm, settings.limit, settings.num_fewshot, settings.seed)
        result = dict(metrics=metrics)
    return dict(result=result, cache_bytes=scorer.footprint(), dequantised=scorer.dequantised)


def measure_perplexity(model: EvaluatedModel, scorer: Scorer) -> dict:
    text = model.text
    context = model.settings.context or min(model.block_size, 2048)
    stride = model.settings.stride or max(1, context // 2)
    check_windows(model, context, stride, len(text.ids))
    bar = progress_bar(len(text.ids) - 1, 'token')
    result = perplexity(scorer, text.ids, context, stride, text.n_bytes, bar.update)
    bar.close()
    return result | dict(data=text.name)


def check_windows(model: EvaluatedModel, context: int, stride: int, n_tokens: int) -> None:
    if context > model.block_size:
        raise UserError(
            f'--context={context} is more than {model.path} was made for: {model.block_size}'
        )
    if stride > context:
        raise UserError(
            f'--stride={stride} is more than the context of {context}: '
            'tokens between would never be scored'
        )
    if n_tokens == model.settings.max_tokens <= context:  # the text may well have more
        hint = f'use --max_tokens={context + 1} or more, 0 for the whole text'
        if n_tokens > 1:
            hint += f', or --context={n_tokens - 1}'
        raise UserError(
            f'--max_tokens={n_tokens} is too few for one window of {context} '
            f'and a token after it: {hint}'
        )
    if n_tokens <= context:
        hint = 'use a longer text'
        if n_tokens > 1:
            hint += f' or --context={n_tokens - 1}'
        raise UserError(
            f'{model.text.name} has {n_tokens} tokens, too few for one window of {context} '
            f'and a token after it: {hint}'
        )


def measure_retrieval(model: EvaluatedModel, scorer: Scorer, task: str) -> dict:
    settings = model.settings
    depths = unique(split_numbers('depths', settings.depths, float))
    if not depths:
        raise UserError('depths: name at least one, from 0 to 1')
    for depth in depths:
        check_range('depths', depth, least=0, most=1)
    begin, end = around_texts(model)
    haystack = None
    if task == 'needle' and settings.haystack == 'data' and model.has_text:
        haystack = model.text.ids
    trials = retrieval.Trials(
        task,
        model.codec.tokenizer,
        settings.trials,
        settings.candidates,
        settings.seed,
        begin,
        end,
        haystack,
    )
    lengths = retrieval_lengths(model, trials)
    bar = progress_bar(len(lengths) * len(depths) * settings.trials, 'text')
    result = retrieval.evaluate(scorer, trials, lengths, depths, bar.update)
    bar.close()
    return result


def around_texts(model: EvaluatedModel) -> tuple[list[int], list[int]]:
    """
    Return the ids before a text and after it. In a conversation the text is the user's, and its
    last line, which asks, is where the answer begins.
    """
    tokenizer = model.codec.tokenizer
    if model.settings.chat:
        before, after = chat_template_of(tokenizer, model.path).around_question()
        return tokenizer.encode(before), retrieval.encode_inside(tokenizer, after)
    if model.codec.begin is not None:
        return [model.codec.begin], []
    return [], []


def retrieval_lengths(model: EvaluatedModel, trials: retrieval.Trials) -> list[int]:
    """Return the lengths of the texts: those that were given, or parts of the block that fit."""
    given = unique(split_numbers('lengths', model.settings.lengths))
    parts = [model.block_size // 4, model.block_size // 2, model.block_size]
    lengths = given or parts
    if max(lengths) > model.block_size:
        raise UserError(
            f'--lengths={max(lengths)} is more than {model.path} was made for: {model.block_size}'
        )
    try:
        least = retrieval.least_length(trials)
    except UserError as error:
        raise UserError(f'{trials.task}: {error}') from None
    fitting = [length for length in lengths if length >= least]
    if not fitting or (given and len(fitting) < len(given)):
        raise UserError(
            f'{trials.task} needs texts of {least} tokens or more with this vocabulary, '
            f'not {min(lengths)}: use longer --lengths (the model has {model.block_size})'
        )
    return fitting


def unique(items: Sequence) -> list:
    return list(dict.fromkeys(items))


# -------------------------------------------------------------------------------------------------
# what has been measured already


def record_key(path: str, cache_format: CacheFormat, task: str, settings: EvalSettings) -> str:
    """Return what one cell depends on, as a short hash."""
    names = SETTINGS.get(task, OF_HARNESS)
    values = asdict(settings)
    about = {name: values[name] for name in (*OF_ALL, *names)}
    if task in OWN_TASKS and not settings.chat:
        about.pop('chat', None)  # keys are what they were before there was a choice
    text = []
    if 'data' in names and os.path.isfile(settings.data):
        text = fingerprint(settings.data)
    made_of = [
        path,
        fingerprint(path),
        cache_format.name,
        cache_format.arguments,
        task,
        about,
        text,
        fingerprint(task),  # of a task file
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(path: str | Path) -> list[tuple]:
    """Return what tells whether the files of a model or text are still the same."""
    path = Path(path)
    files = []
    if path.is_dir():
        for file in sorted(path.iterdir()):
            of_model = file.name == 'ckpt.pt' or file.suffix in ('.json', '.safetensors', '.bin')
            if file.is_file() and of_model:
                files.append(file)
    elif path.is_file():
        files.append(path)
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
