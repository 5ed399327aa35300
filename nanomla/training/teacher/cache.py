"""
A teacher's predictions on disk: written once, and read by later runs, which then run no teacher.

FOLDER/cache.json says whose predictions they are, of which text. FOLDER/predictions.bin has a
record a window of the training text, in the order in which the run that wrote them reads them:

    start     where the window begins in train.bin
    ids       (T, K) the K most probable next tokens, for each token of the window
    log_p     (T, K) logarithms of their probabilities, in 16 bits
    log_rest  (T,) the logarithm of what all other tokens have together
    crc32     of the bytes before it

A token takes 4 K + 2 bytes, with more than 65,536 different tokens 6 K + 2. A run of the same seed
and batch reads the windows that it would read without a cache. Other seeds take the same windows in
another order. A longer run adds what it lacks, and so does one after a kill.

Legend: B windows, T tokens of a window, K most probable tokens, V all tokens.
"""

import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from nanomla.core.checks import check_entries, check_range, whole
from nanomla.core.configurator import UserError
from nanomla.core.files import (
    appending_bytes,
    lock,
    progress_bar,
    read_json,
    write_file,
    writing,
)
from nanomla.core.token_files import token_dtype
from nanomla.training.batches import Dataset, window_starts
from nanomla.training.loss import BatchLoss

ROWS = 2048  # tokens whose logits are in memory at a time
SHOWN = 64  # windows whose probabilities are summed up in a line for people

# cache.json, and what is said where an entry is another one than the run's
DIFFERENCES = dict(
    teacher='another teacher',
    dataset='another text',
    vocab_size='another vocabulary',
    block_size='windows of {} tokens',
    top_k='{} predictions of each token',
)
ENTRIES = {name: whole(least=0) for name in [*DIFFERENCES, 'seed', 'batch_size', 'micro_batches']}


class Predictions(NamedTuple):
    """Predictions for B windows: ids (B, T, K), log_p (B, T, K) and log_rest (B, T)."""

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor


@torch.no_grad()
def top_predictions(teacher: GPT, x: torch.Tensor, top_k: int) -> Predictions:
    """Return what the teacher predicts after each of its final hidden states x (B, T, C)."""
    parts = []
    for rows in x.flatten(0, 1).split(ROWS):
        log_p = teacher.lm_head(rows).float().log_softmax(-1)
        top, ids = log_p.topk(top_k)
        log_rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        parts.append((ids, top, log_rest))
    return Predictions(*(torch.cat(part).unflatten(0, x.shape[:2]) for part in zip(*parts)))


def fingerprint(model: GPT) -> int:
    """Return a checksum of all weights of a model."""
    crc = 0
    for name, weight in sorted(model.state_dict().items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(weight.cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


class TeacherCache:
    """
    The predictions in a folder, for a run on `data`.

    settings: train.py's. teacher: its stream is set; None where the cache is complete.
    top_k_is_given: whether a person asks for teacher_top_k, and no cache with another one will do.
    UserError where it holds predictions of something else, or the settings do not go with it.
    """

    def __init__(
        self,
        settings: dict,
        data: Dataset,
        teacher: GPT | None,
        vocab_size: int,
        top_k_is_given: bool = False,
    ):
        s = settings
        self.folder = Path(s['teacher_cache'])
        self.data, self.teacher = data, teacher
        self.seed, self.batch_size = s['seed'], s['batch_size']
        self.micro_batches = s['gradient_accumulation_steps']
        self.needed = s['max_iters'] * self.micro_batches * self.batch_size
        for name in ('distill_hidden', 'cuda_graph'):
            if s[name]:
                raise UserError(f'--teacher_cache={self.folder} does not go with --{name}')
        top_k = s['teacher_top_k']
        if not top_k_is_given:
            top_k = min(top_k, vocab_size - 1)
        check_range('teacher_top_k', top_k, least=1, below=vocab_size)
        self.facts = dict(
            dataset=data.meta.get('train_crc32', len(data.tokens['train'])),
            vocab_size=vocab_size,
            block_size=s['block_size'],
            top_k=top_k,
            seed=self.seed,
            batch_size=self.batch_size,
            micro_batches=self.micro_batches,
        )
        if teacher is not None:
            self.facts['teacher'] = fingerprint(teacher)
        if (self.folder / 'cache.json').exists():
            self.take_facts(top_k_is_given)
        self.record = self.record_type()
        self.records = self.open_records()
        self.order = self.order_of_windows()

    # ---------------------------------------------------------------------------------------------
    # whose predictions

    def take_facts(self, top_k_is_given: bool) -> None:
        """Take over what cache.json says. UserError where the run is about something else."""
        path = self.folder / 'cache.json'
        try:
            found = read_json(path)
            check_entries(found, ENTRIES, needed=ENTRIES)
        except (OSError, ValueError) as error:
            raise UserError(f'{path} cannot be used: {error}; name another folder') from None
        for name, what in DIFFERENCES.items():
            if name == 'top_k' and not top_k_is_given:
                continue
            if self.facts.get(name, found[name]) != found[name]:
                raise UserError(
                    f'--teacher_cache={self.folder} holds {what.format(found[name])}: '
                    'name another folder'
                )
        self.facts = found

    def record_type(self) -> np.dtype:
        T, K = self.facts['block_size'], self.facts['top_k']
        return np.dtype(
            [
                ('start', np.int64),
                ('ids', token_dtype(self.facts['vocab_size']), (T, K)),
                ('log_p', np.float16, (T, K)),
                ('log_rest', np.float16, T),
                ('crc32', np.uint32),
            ]
        )

    @property
    def path(self) -> Path:
        return self.folder / 'predictions.bin'

    def open_records(self) -> np.ndarray:
        """Return the whole records that are there."""
        try:
            count = os.path.getsize(self.path) // self.record.itemsize
        except OSError:
            count = 0
        if not count:
            return np.zeros(0, self.record)
        return np.memmap(self.path, self.record, 'r', shape=(count,))

    def order_of_windows(self) -> np.ndarray:
        """Return the numbers of the records in the order in which this run reads them."""
        if self.seed == self.facts['seed']:
            return np.arange(self.needed)
        return np.random.default_rng(self.seed).permutation(self.needed)

    @property
    def is_complete(self) -> bool:
        return len(self.records) >= self.needed

    @property
    def description(self) -> str:
        """One line on what is there; the share of the probability is that of the first windows."""
        size = len(self.records) * self.record.itemsize
        rest = np.exp(self.records['log_rest'][:SHOWN].astype(np.float32)).mean()
        return (
            f"{self.folder}: the teacher's {self.facts['top_k']} most probable tokens, "
            f'{1 - rest:.1%} of the probability, for {len(self.records):,} windows: '
            f'{size / 1e9:.3g} GB'
        )

    # ---------------------------------------------------------------------------------------------
    # writing

    def complete(self, device: torch.device, compile: bool = False) -> None:
        """
        Write what this run needs and the file lacks.

        device: of the teacher, whose stream is set. UserError where there is no teacher.
        """
        if self.teacher is None:
            raise UserError(
                f'--teacher_cache={self.folder} has {len(self.records):,} windows and the run '
                f'needs {self.needed:,}: name the --teacher, which predicts the others'
            )
        if self.data.world > 1:
            raise UserError(
                f'--teacher_cache={self.folder} is written by one process: run this command '
                'without torchrun and with --eval_only=True first'
            )
        with lock(self.folder, wait=True), writing(self.folder):
            # Another process may have written it by now.
            if (self.folder / 'cache.json').exists():
                self.take_facts(top_k_is_given=False)
            else:
                write_file(self.folder / 'cache.json', json.dumps(self.facts, indent=1) + '\n')
            done = self.whole_batches()
            size = done * self.facts['batch_size'] * self.record.itemsize
            with appending_bytes(self.path, size) as file:
                self.write_batches(file, done, device, compile)
                file.flush()
                os.fsync(file.fileno())
        self.records = self.open_records()
        self.teacher = None  # its memory is the run's now

    def whole_batches(self) -> int:
        """Return how many batches are there, without a last one that a kill has damaged."""
        self.records = self.open_records()
        batch_size = self.facts['batch_size']
        done = len(self.records) // batch_size
        while done and not self.are_whole(self.records[(done - 1) * batch_size :][:batch_size]):
            done -= 1
        return done

    def write_batches(self, file, done: int, device: torch.device, compile: bool) -> None:
        """Append the batches from number `done` on."""
        f, T = self.facts, self.facts['block_size']
        teacher = self.teacher.to(device).eval()
        forward = BatchLoss(teacher)
        if compile:
            forward.compile_parts(embedding=False)
        count = -(-self.needed // f['batch_size'])
        tokens = f['batch_size'] * T
        possible_starts = len(self.data.tokens['train']) - T
        with progress_bar(count * tokens, ' tokens of the teacher', done * tokens) as bar:
            for number in range(done, count):
                step, micro = divmod(number, f['micro_batches'])
                starts = window_starts(f['seed'], step, micro, possible_starts, f['batch_size'])
                x, _ = self.data.cut('train', starts)
                with torch.no_grad():
                    hidden = forward.hidden(x)
                predictions = top_predictions(teacher, hidden, f['top_k'])
                file.write(self.as_records(starts, predictions).tobytes())
                bar.update(tokens)

    def as_records(self, starts: torch.Tensor, predictions: Predictions) -> np.ndarray:
        records = np.zeros(len(starts), self.record)
        records['start'] = starts.numpy()
        for name, values in predictions._asdict().items():
            records[name] = values.cpu().numpy()
        records['crc32'] = self.checksums(records)
        return records

    # ---------------------------------------------------------------------------------------------
    # reading

    def checksums(self, records: np.ndarray) -> list[int]:
        content = records.view(np.uint8).reshape(len(records), -1)[:, :-4]
        return [zlib.crc32(np.ascontiguousarray(row)) for row in content]

    def are_whole(self, records: np.ndarray) -> bool:
        return self.checksums(records) == records['crc32'].tolist()

    def batch(self, step: int, micro: int) -> tuple[torch.Tensor, Predictions]:
        """
        Return where the windows of a training batch begin, (B,) on the CPU, and their predictions.

        UserError where a byte of them has changed.
        """
        data, B = self.data, self.batch_size
        number = step * self.micro_batches + micro * data.world + data.rank
        records = self.records[self.order[number * B : (number + 1) * B]]
        if not self.are_whole(records):
            raise UserError(
                f'{self.path} is damaged: its bytes are not those that were written; '
                f'remove {self.folder}, and the teacher writes it again'
            )
        ids = torch.from_numpy(records['ids'].astype(np.int32))
        log_p = torch.from_numpy(records['log_p'].copy())
        log_rest = torch.from_numpy(records['log_rest'].copy())
        predictions = Predictions(
            data.to_device(ids).long(),
            data.to_device(log_p).float(),
            data.to_device(log_rest).float(),
        )
        return torch.from_numpy(records['start'].copy()), predictions
