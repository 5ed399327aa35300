"""
Measure one cell of the adapter benchmark: loaded, trained, evaluated, made to answer, profiled.

OurModel and Peer go through the same measurement.

Legend: B rows of a batch, T tokens of a row.
"""

import gc
import math
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from nanomla.adapters import metrics
from nanomla.adapters.adapted import KERNELS, AdaptedModel, CellName, CellSettings, OurModel
from nanomla.adapters.instructions import Encoder, read_examples
from nanomla.adapters.lora import UnavailableError
from nanomla.adapters.packing import DocumentRows
from nanomla.adapters.peft_peer import PEER_KERNELS, Peer
from nanomla.adapters.step import Finetuner, evaluate
from nanomla.checkpoints import hf
from nanomla.core import devices, timing
from nanomla.core.files import copy_file, writing
from nanomla.core.timing import Clock, free_memory, matmul_rate, record_peak_memory

CALIBRATION_ROWS = 16
OPERATORS = (  # a word of an operator in the profile -> the attention; the first that is found
    ('flex_attention', 'flex'),
    ('_scaled_dot_product_cudnn|cudnn_generated.*sdpa', 'cudnn'),
    ('_scaled_dot_product_flash|flash_attn::|pytorch_flash|flash_fwd', 'flash'),
    ('_scaled_dot_product_efficient|fmha_cutlass', 'efficient'),
    ('_scaled_dot_product_attention_math', 'math'),
    ('bmm|matmul', 'eager'),
)
AS_ASKED = dict(  # the kernel asked for -> attentions that may run
    eager={'eager'},
    sdpa={'flash', 'cudnn', 'efficient', 'math'},
    flash={'flash'},
    cudnn={'cudnn'},
    flex={'flex'},
)


# -------------------------------------------------------------------------------------------------
# data


@dataclass
class CellData:
    """Rows to train and to validate on. Random tokens have neither examples nor an encoder."""

    train: DocumentRows
    val: DocumentRows
    val_examples: list[dict] | None = None
    encoder: Encoder | None = None


def load_data(
    s: CellSettings, tokenizer, vocab_size: int, folder: Path | None, flex: bool = False
) -> CellData:
    """
    Return the data of a cell.

    folder: with train.jsonl and val.jsonl; flex: batches carry FlexAttention's mask.
    """
    if s.data == 'random':
        return random_data(s, vocab_size)
    encoder = Encoder(tokenizer, vocab_size, s.template, s.completion_only)
    examples = read_examples(folder / 'train.jsonl', s.n_train)
    val_examples = read_examples(folder / 'val.jsonl', s.n_val)

    def rows(some):
        documents = [encoder.document(example) for example in some]
        return DocumentRows(documents, s.block_size, s.packing, flex=flex)

    return CellData(rows(examples), rows(val_examples), val_examples, encoder)


def random_data(s: CellSettings, vocab_size: int) -> CellData:
    shape = (s.n_train + s.n_val, s.block_size)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()
    documents = [(row, row[1:] + [-1]) for row in ids]
    train, val = documents[: s.n_train], documents[s.n_train :]
    return CellData(
        DocumentRows(train, s.block_size, packed=False),
        DocumentRows(val, s.block_size, packed=False),
    )


def calibration_rows(s: CellSettings, folder: Path, device: torch.device) -> torch.Tensor:
    """Return training text in whole rows (M, T), for a conversion to MLA."""
    shape = hf.read_shape(s.model)
    tokenizer = hf.tokenizer_of(s.model, shape)
    documents = load_data(s, tokenizer, shape['vocab_size'], folder).train.documents
    rows = DocumentRows(documents, s.block_size, packed=True, isolated=False)
    numbers = range(min(CALIBRATION_ROWS, len(rows.rows)))
    return rows.batch(numbers, device).idx


# -------------------------------------------------------------------------------------------------
# a row of the table


def measure_or_reason(
    s: CellSettings, cell: CellName, folder: Path | None, trace: Path, log: Callable = print
) -> dict:
    """
    Return the row of `measure` with status 'ok', or only a status and its reason.

    'n/a': it cannot run here; 'out of memory'. Other errors, also a UserError, are raised.
    """
    try:
        return dict(status='ok') | measure(s, cell, folder, trace, log)
    except UnavailableError as error:
        return dict(status='n/a', reason=str(error))
    except MemoryError:
        pass
    except RuntimeError as error:  # torch.OutOfMemoryError, and what torch raises on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and 'allocate memory' not in str(error):
            raise
    device = devices.describe(devices.pick_device(s.device))
    return dict(status='out of memory', reason=f'more than {device} has')


def measure(
    s: CellSettings, cell: CellName, folder: Path | None, trace: Path, log: Callable = print
) -> dict:
    """
    Return the row of one cell: a dict of numbers, medians over its seeds.

    folder: with train.jsonl and val.jsonl; trace: the file for the profile; log: gets progress.
    UnavailableError for what cannot run here; torch.OutOfMemoryError.
    """
    device = devices.pick_device(s.device)
    stream = devices.pick_dtype(s.dtype, device)
    if cell.peer and cell.kernel not in PEER_KERNELS:
        raise UnavailableError('transformers has no such kernel')
    rate = matmul_rate(device, stream)
    facts, memory, per_seed = {}, {}, []
    for seed in range(s.seed, s.seed + s.seeds):
        log(f'seed {seed}')
        torch.manual_seed(seed)
        with record_peak_memory('load', memory, device):
            subject = load_subject(s, cell, folder, device, stream)
        flex = cell.kernel == 'flex' and not cell.peer
        vocab_size = subject.model.config.vocab_size
        data = load_data(s, subject.tokenizer, vocab_size, folder, flex)
        subject.set_up(documents=data.train.isolated)
        run = Measurement(s, subject, data, device, memory, log)
        per_seed.append(run.one_seed(seed))
        if seed == s.seed:
            facts = run.facts()
            if s.profile:
                log('profiling')
                facts |= run.profile(trace, KERNELS[cell.kernel])
        del subject, run
    row = facts | summarise(per_seed)
    row['limit_tok_per_s'] = rate / row['flops_per_token']
    row['percent_of_limit'] = 100 * row['train_tok_per_s'] / row['limit_tok_per_s']
    for phase, (allocated, reserved) in memory.items():
        row[f'{phase}_allocated_mib'] = round(allocated / 2**20)
        row[f'{phase}_reserved_mib'] = round(reserved / 2**20)
    return row | dict(
        matmul_tflops=rate / 1e12,
        seeds=s.seeds,
        device=devices.describe(device),
        dtype=str(stream).removeprefix('torch.'),
        torch=torch.__version__,
    )


def load_subject(
    s: CellSettings,
    cell: CellName,
    folder: Path | None,
    device: torch.device,
    stream: torch.dtype,
) -> AdaptedModel:
    """Return the model that a cell names, adapted."""
    if cell.peer:
        return Peer(s, cell.adapter, cell.kernel, device, stream)
    rows = None
    if cell.kernel == 'mla' and s.data != 'random':
        rows = calibration_rows(s, folder, device)
    return OurModel(s, cell.adapter, cell.kernel, device, stream, rows)


def summarise(per_seed: list[dict]) -> dict:
    """
    Return the medians over seeds.

    Beside the median of some numbers least and most; the milliseconds of all steps, a list a seed.
    """
    lists = ('warmup_ms', 'step_ms_all')
    row = {}
    for name in per_seed[0]:
        if name not in lists:
            row[name] = statistics.median(seed[name] for seed in per_seed)
    for name in lists:
        row[name] = [[round(ms, 2) for ms in seed[name]] for seed in per_seed]
    steps = []
    for seed in per_seed:
        steps += seed['step_ms_all']
    row |= timing.median_and_range('step_ms', steps)
    for name in ('train_tok_per_s', 'val_loss'):
        row |= timing.median_and_range(name, [seed[name] for seed in per_seed])
    return row


# -------------------------------------------------------------------------------------------------
# a seed


class Measurement:
    """
    One model through training, evaluation, generation and profile.

    memory: gets the peaks of each phase, see record_peak_memory
    """

    def __init__(
        self,
        s: CellSettings,
        subject: AdaptedModel,
        data: CellData,
        device: torch.device,
        memory: dict,
        log: Callable = print,
    ):
        self.s, self.subject, self.data = s, subject, data
        self.device, self.memory, self.log = device, memory, log
        self.model = subject.model

    def facts(self) -> dict:
        """Return what is the same for every seed."""
        subject, encoder = self.subject, self.data.encoder
        trainable, parameters = subject.parameters
        return dict(
            causal=subject.causal,
            trainable_parameters=trainable,
            parameters=parameters,
            storage_bytes_per_parameter=subject.bytes_per_parameter,
            recompute=subject.setting,
            cache=subject.cache,
            cut_documents=self.data.train.cut,
            rows=len(self.data.train.rows),
            flops_per_token=subject.flops,
            tokenizer=encoder.name if encoder else 'random tokens',
        )

    def one_seed(self, seed: int) -> dict:
        """Train, evaluate and generate once. Returns the numbers of this seed."""
        val = self.data.val
        numbers = val.all_batches(self.s.batch_size)
        val_batches = [val.batch(rows, self.device) for rows in numbers]
        found = dict(val_loss_before=evaluate(self.model, self.subject.loss, val_batches))
        found |= self.train(seed)
        with record_peak_memory('eval', self.memory, self.device):
            found |= self.evaluate(val_batches)
        with record_peak_memory('generate', self.memory, self.device), torch.no_grad():
            self.model.eval()
            found |= self.generate()
            if self.data.val_examples:
                scores = self.teacher_forced(val_batches)
                found |= {f'teacher_{name}': score for name, score in scores.items()}
            self.model.train()
        return found

    def train(self, seed: int) -> dict:
        s, rows = self.s, self.data.train
        order = rows.train_batches(seed, s.batch_size)
        tuner = Finetuner(
            self.model, self.subject.loss, self.learning_rate(), s.weight_decay, s.grad_clip
        )
        epoch = math.ceil(len(rows.rows) / (s.batch_size * s.accumulation))
        steps = s.steps or max(math.ceil(epoch * s.epochs), s.warmup_steps + 1)
        batches = []  # made before the clock starts
        for _ in range(steps):
            numbers = islice(order, s.accumulation)
            batches.append([rows.batch(some, self.device) for some in numbers])
        losses = []
        free_memory(self.device, workspaces=True)
        gc.freeze()  # the garbage collector then looks through the steps' own objects only
        clock = Clock(self.device)

        def run(numbers):
            for step in numbers:
                self.log(f'seed {seed}, step {step + 1} of {steps}')
                losses.append(tuner.step(batches[step]))
                clock.tick()

        run(range(s.warmup_steps))  # compiles and allocates
        with record_peak_memory('train', self.memory, self.device, clean=False):
            run(range(s.warmup_steps, steps))
            times = clock.seconds()
        gc.unfreeze()
        tokens = samples = 0
        for some in batches[s.warmup_steps :]:
            tokens += sum(batch.tokens for batch in some)
            samples += sum(batch.samples for batch in some)
        losses = torch.stack(losses).tolist()
        warmup, timed = times[: s.warmup_steps], times[s.warmup_steps :]
        return dict(
            train_tok_per_s=tokens / sum(timed),
            train_samples_per_s=samples / sum(timed),
            step_ms=1e3 * statistics.median(timed),
            step_ms_all=[1e3 * t for t in timed],
            warmup_ms=[1e3 * t for t in warmup],
            train_loss=statistics.mean(losses[-epoch:]),
            first_loss=losses[0],
            steps=steps,
        )

    def learning_rate(self) -> float:
        if self.s.learning_rate:
            return self.s.learning_rate
        trainable, parameters = self.subject.parameters
        return 2e-5 if trainable == parameters else 2e-4

    def evaluate(self, batches) -> dict:
        evaluate(self.model, self.subject.loss, batches[:1])  # warmup
        clock = Clock(self.device)
        loss = evaluate(self.model, self.subject.loss, batches)
        clock.tick()
        tokens = sum(batch.tokens for batch in batches)
        return dict(
            val_loss=loss,
            eval_tok_per_s=tokens / sum(clock.seconds()),
            perplexity=math.exp(min(loss, 700)),
        )

    def generate(self) -> dict:
        """Return the speed of greedy decoding, and how near the answers are to the references."""
        n, size, examples = self.s.max_new_tokens, self.s.batch_size, self.data.val_examples
        encoder = self.data.encoder
        prompts = self.prompts()
        groups = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
        warmup = (groups[0], min(4, n))
        answers = self.subject.answers([warmup] + [(group, n) for group in groups])
        next(answers)
        clock, made = Clock(self.device), []
        for ids in answers:
            made += ids.tolist()
            clock.tick()
        found = dict(generate_tok_per_s=len(prompts) * n / sum(clock.seconds()))
        if examples:
            texts = [encoder.decode(ids) for ids in made]
            found |= metrics.scores(texts, [example['response'] for example in examples])
        return found

    def prompts(self) -> list[list[int]]:
        """Return a prompt for each validation document, with room for the answer after it."""
        T = max(1, self.s.block_size - self.s.max_new_tokens)
        if not self.data.val_examples:
            return [ids[: min(32, T)] for ids, _ in self.data.val.documents]
        encoded = [self.data.encoder.encode(example) for example in self.data.val_examples]
        return [prompt[-T:] for prompt, _ in encoded]

    def teacher_forced(self, batches) -> dict:
        """Return the scores of the likeliest tokens after the true tokens of each answer."""
        decode = self.data.encoder.decode
        texts, true_texts = [], []
        for batch in batches:
            likeliest = self.subject.likeliest(batch).cpu()
            for row, targets, lengths in zip(likeliest, batch.targets.cpu(), batch.lengths):
                for document, true in zip(row.split(lengths), targets.split(lengths)):
                    if (true >= 0).any():
                        predicted_ids, true_ids = metrics.predicted(document, true)
                        texts.append(decode(predicted_ids))
                        true_texts.append(decode(true_ids))
        if not texts:  # every document was cut before its answer
            return {}
        return metrics.scores(texts, true_texts)

    def profile(self, trace: Path, kernel: str) -> dict:
        """
        Run one more training step under torch's profiler.

        Writes a Chrome trace; returns the operators that take longest, and which attention ran.
        """
        from torch.profiler import ProfilerActivity

        on_gpu = self.device.type == 'cuda'
        activities = [ProfilerActivity.CPU]
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
        tuner = Finetuner(self.model, self.subject.loss, learning_rate=0.0)
        rows = self.data.train
        batch = rows.batch(next(rows.train_batches(0, self.s.batch_size)), self.device)
        with torch.profiler.profile(activities=activities) as profile:
            tuner.step([batch])
            timing.synchronize(self.device)
        trace = Path(trace)
        write_trace(profile, trace)
        events = profile.key_averages()
        ran = attention_of([event.key for event in events])
        return dict(
            top_operators=longest_operators(events, on_gpu),
            kernel_ran=ran,
            kernel_proved=ran in AS_ASKED[kernel],
            trace=f'{trace.parent.name}/{trace.name}',
        )


def write_trace(profile: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace, all of it or nothing; the profiler writes only to a name."""
    with writing(path), tempfile.TemporaryDirectory() as folder:
        made = Path(folder, path.name)
        profile.export_chrome_trace(str(made))
        copy_file(made, path)


def longest_operators(events, on_gpu: bool, most: int = 12) -> list[dict]:
    """Return name, ms and calls of the operators that take longest by themselves."""
    spent = []
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent.append((microseconds / 1e3, event.key[:90], event.count))
    spent.sort(reverse=True)
    return [dict(name=name, ms=round(ms, 3), calls=n) for ms, name, n in spent[:most] if ms > 0]


def attention_of(operators: list[str]) -> str:
    """
    Return which attention these operators are of.

    flex, cudnn, flash, efficient, math; eager for plain products without one of these; or none.
    """
    for words, attention in OPERATORS:
        if any(re.search(words, operator, re.IGNORECASE) for operator in operators):
            return attention
    return 'none'
