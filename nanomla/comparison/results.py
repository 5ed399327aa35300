"""
The lines of a results.jsonl: the comparison, each contender with its speed of decoding, each run.

Everything is read from the folders of the runs. nanomla.comparison.table reads the file again.
"""

import json
import shlex
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints.load import load_model
from nanomla.comparison.contenders import ComparisonQueue, Contender, control_of
from nanomla.comparison.runs import Run
from nanomla.core.checks import TEXT, check_entries, number
from nanomla.core.configurator import UserError
from nanomla.core.devices import describe, pick_dtype
from nanomla.core.figures import read_log
from nanomla.core.files import jsonl, read_json, write_file
from nanomla.core.timing import synchronize
from nanomla.core.tokenizers import Tokenizer, opening
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

MEASURED = dict(  # of a decode.json
    tok_per_s=number() | None, sample=TEXT | None, device=TEXT, dtype=TEXT
)
CURVE_POINTS = 50  # training losses of a run that are kept

# -------------------------------------------------------------------------------------------------
# decoding


@dataclass
class DecodeSettings:
    """How the speed of decoding is measured: the median of `repeats`, after one to warm up."""

    tokens: int  # with fewer than two nothing is measured
    batch: int
    repeats: int


def measure_decode(
    contender: Contender, runs: list[Run], settings: DecodeSettings, device: torch.device
) -> dict | None:
    """
    Return the speed of decoding and a sample, by the first complete run with a checkpoint.

    They are kept in its folder and measured once. None where no run has a checkpoint: a log without
    weights is a complete run all the same.
    """
    done = [run for run in runs if run.state() == 'done']
    for run in done:
        measured = read_measured(run.folder / 'decode.json', settings)
        if measured:
            return measured
    with_weights = [run for run in done if (run.folder / 'ckpt.pt').exists()]
    if not with_weights:
        return None
    folder = with_weights[0].folder
    loaded = load_model(folder, dropout=0.0, kernel='sdpa')
    train = contender.comparison.train
    model = loaded.model
    model.stream = pick_dtype(train['dtype'], device)
    model.to(device, model.stream).eval()
    cache = Cache.of(model, settings.batch, max(settings.tokens, 1), static=device.type == 'cuda')
    tok_per_s = None
    if settings.tokens > 1:
        times = []
        for _ in range(1 + settings.repeats):
            times.append(decode_seconds(model, cache, settings, device))
        tok_per_s = settings.batch / statistics.median(times[1:])
    sample = write_sample(
        model, Tokenizer(loaded.meta), train['sample_tokens'], contender.comparison.seeds[0]
    )
    measured = asdict(settings) | dict(
        tok_per_s=tok_per_s,
        device=describe(device),
        dtype=str(model.stream).removeprefix('torch.'),
        cache_bytes=cache.nbytes,
        sample=sample,
    )
    write_file(folder / 'decode.json', json.dumps(measured))
    return measured


def read_measured(path: Path, settings: DecodeSettings) -> dict | None:
    """Return an earlier measurement with the same settings."""
    if not path.exists():
        return None
    try:
        measured = read_json(path)
        check_entries(measured, MEASURED, needed=MEASURED)
    except (OSError, ValueError):
        return None  # it is measured again
    for name, value in asdict(settings).items():
        if measured.get(name) != value:
            return None
    return measured


def decode_seconds(
    model: GPT, cache: Cache, settings: DecodeSettings, device: torch.device
) -> float:
    """Return the seconds of a decoding step, without the first one, which reads the prompt."""
    for slot in range(settings.batch):
        cache.free(slot)
    prompt = torch.zeros(settings.batch, 1, dtype=torch.long, device=device)
    steps = generate(model, prompt, settings.tokens, temperature=0, cache=cache)
    next(steps)
    synchronize(device)
    begin = time.perf_counter()
    for _ in steps:
        pass
    synchronize(device)
    return (time.perf_counter() - begin) / (settings.tokens - 1)


def write_sample(model: GPT, tokenizer: Tokenizer, length: int, seed: int) -> str:
    """Return a text of `length` tokens that the model writes."""
    device = model.lm_head.weight.device
    block_size = model.config.block_size
    cache = None
    # Learned positions end with the block: a longer text is written without a cache.
    if model.config.pos != 'learned' or length < block_size:
        cache = Cache.of(model, 1, block_size)
    tokens = generate(
        model,
        torch.tensor([opening(tokenizer)], device=device),
        length,
        temperature=0.8,
        top_k=200,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
        cache=cache,
    )
    return tokenizer.decode([token.item() for token in tokens]).strip()


# -------------------------------------------------------------------------------------------------
# the lines


def run_line(run: Run) -> dict:
    """Return what is kept of a run that has ended."""
    line = dict(
        event='run',
        contender=run.contender,
        role=run.role,
        seed=run.seed,
        tuned=run.tuned,
        shared=False,
    )
    if run.outcome == 'failed':
        return line | dict(error=run.error())
    line['shared'] = run.facts().get('shared', False)
    settings, events = read_log(run.folder / 'log.jsonl')
    evals = {event['step']: event['val_loss'] for event in events if event['event'] == 'eval'}
    losses = {event['step']: event['loss'] for event in events if event['event'] == 'train'}
    logits = [event['max_logit'] for event in events if 'max_logit' in event]
    if logits:
        line['max_logit'] = max(logits)
    end = events[-1]
    written = (run.folder / 'log.jsonl').stat().st_mtime
    return line | dict(
        val_loss=end['best_val_loss'],
        best_step=end['best_step'],
        last_val_loss=evals[max(evals)],
        eval_steps=list(evals),
        eval_losses=[round(loss, 5) for loss in evals.values()],
        train_steps=thinned(list(losses)),
        train_losses=thinned([round(loss, 4) for loss in losses.values()]),
        tok_per_s=end['tok_per_s'],
        peak_memory=end['peak_memory'],
        params=settings['params'],
        cache_bytes=settings['cache_bytes_per_token'],
        commit=settings['commit'],
        device=settings['device'],
        dtype=settings['dtype'],
        torch=settings['torch'],
        command=shlex.join(['python', 'train.py', *run.words]),
        date=time.strftime('%Y-%m-%d', time.gmtime(written)),
    )


def thinned(values: list) -> list:
    """Return every n-th value, CURVE_POINTS at most, the last one among them."""
    every = -(-len(values) // CURVE_POINTS) or 1
    return values[::-1][::every][::-1]


def contender_line(contender: Contender, control: Contender, decode: dict | None) -> dict:
    """Return what is kept of a contender."""
    return dict(
        event='contender',
        name=contender.name,
        label=contender.label,
        kind=contender.kind,
        params=contender.params,
        params_ratio=contender.ratio,
        cache_bytes=contender.cache_bytes,
        error=contender.error or None,
        settings=contender.settings,
        differs=contender.differs(control),
        grid=contender.grid,
        tuned=contender.chosen,
        at_edge=contender.at_edge(),
        decode=decode,
    )


def provenance(lines: list[dict]) -> dict:
    """Return where the numbers come from: commits, devices, dtypes, versions and the last day."""
    done = [line for line in lines if 'val_loss' in line]
    found = {}
    for key in ('commit', 'device', 'dtype', 'torch'):
        found[key] = ', '.join(sorted({line[key] for line in done}))
    found['date'] = max((line['date'] for line in done), default='')
    return found


def check_models(lines: list[dict], field: dict[str, Contender], out: Path) -> None:
    """Raise a UserError where a folder holds a run of another model than the contender is now."""
    for line in lines:
        if 'val_loss' not in line:
            continue
        contender = field[line['contender']]
        trained = line['params'], line['cache_bytes']
        if trained != (contender.params, contender.cache_bytes):
            raise UserError(
                f'{out}/{contender.name} holds another model than this comparison asks for: '
                'name another --out_dir'
            )


def conclude(
    path: Path,
    queue: ComparisonQueue,
    source: str,
    decode: DecodeSettings | None,
    device: torch.device,
) -> list[dict]:
    """
    Write results.jsonl and return the lines of runs that failed, those of grids aside.

    source: of the text. decode: None to measure nothing.
    """
    control = control_of(queue.field)
    comparison = control.comparison
    lines = [run_line(run) for run in queue.runs if run.outcome]
    check_models(lines, queue.field, comparison.out)
    head = dict(
        event='comparison',
        title=comparison.title,
        control=comparison.control,
        seeds=comparison.seeds,
        tune_seed=comparison.tune_seed,
        tune_steps=comparison.tune_steps(),
        steps=comparison.train['max_iters'],
        tokens_per_step=comparison.tokens_per_step(),
        remark=comparison.remark,
        source=source,
        settings=comparison.shared(),
        tolerance=comparison.tolerance,
        **provenance(lines),
    )
    about = []
    for contender in queue.field.values():
        measured = None
        if decode:
            measured = measure_decode(contender, queue.reported_runs(contender), decode, device)
        about.append(contender_line(contender, control, measured))
    write_file(path, jsonl([head, *about, *lines]))
    return [line for line in lines if 'error' in line and line['role'] == 'seed']
