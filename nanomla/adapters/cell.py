"""
One cell of the adapter benchmark: a model, a way to train it and an attention kernel, loaded, trained, evaluated,
made to answer and profiled. `Ours` and `Peer` (transformers + PEFT) go through the same measurement.

Legend: B rows of a batch, T tokens of a row.
"""

import gc
import math
import re
import statistics
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomla.adapters import instructions
from nanomla.adapters import lora as adapters
from nanomla.adapters import metrics as answers
from nanomla.adapters import step as finetuning
from nanomla.adapters.packing import Rows
from nanomla.adapters.peft_peer import PEER_KERNELS, Peer
from nanomla.adapters.step import NotHere
from nanomla.checkpoints import hf as deepseek
from nanomla.core import devices as machine
from nanomla.core import timing
from nanomla.core.configurator import UserError
from nanomla.core.timing import Clock, free_memory, matmul_rate, record_peak_memory
from nanomla.inference import generate as decoding
from nanomla.inference.cache import Cache

KERNELS = {  # what a cell may ask for -> the kernel of the attention modules
    'eager': 'eager',
    'sdpa': 'sdpa',
    'flash': 'flash',
    'cudnn': 'cudnn',
    'flex': 'flex',
    'paged': 'sdpa',  # generation from a paged cache
    'mla': 'sdpa',  # attention converted to MLA
    'latent': 'sdpa',
}  # an exhibit, not causal: what the first study called MLA
EVIDENCE = (  # what an operator of the profile says of the kernel; the first that is found counts
    ('flex', 'flex_attention'),
    ('cudnn', '_scaled_dot_product_cudnn|cudnn_generated.*sdpa'),
    ('flash', '_scaled_dot_product_flash|flash_attn::|pytorch_flash|flash_fwd'),
    ('efficient', '_scaled_dot_product_efficient|fmha_cutlass'),
    ('math', '_scaled_dot_product_attention_math'),
)
PROVES = dict(
    eager={'eager'},
    sdpa={'flash', 'cudnn', 'efficient', 'math'},
    flash={'flash'},
    cudnn={'cudnn'},
    flex={'flex'},
)


class Perceiver(nn.Module):
    """
    The block that the first study put in the place of attention and called MLA, kept as an exhibit: `n` learned latents attend
    over the whole sequence, then every token attends to the latents. No mask and no RoPE, weights at random: each
    token sees all that follow it, so its training loss is no language model's.
    """

    def __init__(self, config, n=64):
        super().__init__()
        C, self.kernel, self.n_head, self.qk_dim, self.v_dim = (
            config.n_embd,
            'sdpa',
            config.n_head,
            config.head_dim,
            config.head_dim,
        )
        self.latents = nn.Parameter(torch.randn(n, C) * C**-0.5)
        self.read, self.write = (
            nn.ParameterList([torch.randn(C, C) * C**-0.5 for _ in range(3)]) for _ in range(2)
        )

    def forward(self, x, rope, cache=None):
        def attend(weights, a, b):
            q, k, v = (
                F.linear(t, w.to(t.dtype)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                for t, w in zip((a, b, b), weights)
            )
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        latents = attend(self.read, self.latents.to(x.dtype).expand(len(x), -1, -1), x)
        return attend(self.write, x, latents)


def to_mla(model, rows, rank, rope_pairs):
    """
    The model with its attention converted (conversion.py): exact at rank 0 (full) and rope_pairs -1 (all, kept by each head),
    else rope_pairs pairs shared by all heads and a latent of `rank`. With `rows` of text it is calibrated on them.
    """
    from nanomla.conversion.calibration import measure
    from nanomla.conversion.convert import convert
    from nanomla.conversion.settings import ConversionSettings

    moments = measure(model, rows, batch_size=2) if rows is not None and rank else None
    if rope_pairs < 0:
        which = dict(rope_heads='own', rope='high')
    else:
        which = dict(rope_heads='shared', rope='turn' if moments else 'uniform')
    settings = ConversionSettings(
        kv_lora_rank=rank,
        rope_pairs=rope_pairs,
        low_rank='balanced' if moments else 'joint',
        **which,
    )
    mla, _ = convert(model, settings, moments)
    return mla


class Ours:
    """GPT, adapted as `kind` says, with the attention that `kernel` names."""

    def __init__(self, s, kind, kernel, device, stream, calibration_rows=None):
        self.s, self.kernel, self.device = s, kernel, device
        dtype = torch.float32 if kind == 'full' and s.master_weights else stream
        if s.model.startswith('random:'):
            with torch.device(device):
                model, self.tokenizer = deepseek.load(s.model, dtype=dtype)
        else:
            model, self.tokenizer = deepseek.load(s.model, dtype=dtype)
        model = model.to(device)
        model.stream = stream
        if s.block_size > model.config.block_size:
            raise UserError(
                f'block_size={s.block_size} is more than {s.model} was made for: {model.config.block_size}'
            )
        if kernel == 'mla':
            if stream != torch.float32:
                model.float()
            model = to_mla(model, calibration_rows, s.mla_rank, s.mla_rope_pairs).to(dtype)
        for block in model.transformer.h:
            if kernel == 'latent':
                with torch.device(device):
                    block.attn = Perceiver(model.config, s.latents).to(dtype)
            block.attn.kernel = KERNELS[kernel]
        if kernel != 'latent' and (
            reason := model.transformer.h[0].attn.reason_not_to_run(device, stream)
        ):
            raise NotHere(reason)
        self.causal = is_causal(model, device)
        targets = s.targets
        if kernel == 'latent' and targets != 'all':  # its projections learn themselves
            targets = ','.join(
                name
                for name in targets.split(',')
                if name.strip() not in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
            )
        self.model = adapters.adapt(
            model, kind, s.lora_r, s.lora_alpha, s.lora_dropout, targets, s.double_quant
        ).train()
        if kernel == 'latent':
            for block in model.transformer.h:
                block.attn.requires_grad_(True)  # new weights have to learn, whatever the adapter
        self.flops = finetuning.flops_per_token(model, s.block_size, kind)
        self.parameters = adapters.count(model)
        self.storage = adapters.storage(model)
        self.setting = ''

    def set_up(self, documents):
        s = self.s
        recompute = 'full' if s.recompute == 'selective' and self.kernel == 'flex' else s.recompute
        self.setting = finetuning.set_up(
            self.model,
            recompute,
            s.save_width,
            s.spared_layers,
            s.compile,
            documents,
            s.lora_dropout > 0,
        )

    def loss_of(self, model, batch, count):
        return finetuning.loss_of(model, batch, count, self.s.loss_chunk)

    def likeliest(self, batch):
        x = self.model.hidden(batch.idx, batch.documents)
        return torch.stack([self.model.lm_head(row).argmax(-1) for row in x])

    def answers(self, asked):
        """
        For each (prompts, n) of the list `asked`, one after the other: n greedy tokens behind each prompt, (B, n). The cache is dense,
        or paged as the cell asks; one serves them all, and on a GPU so does one recording of a step (decoding.Step).
        """
        cache, longest = None, max(max(map(len, prompts)) + n for prompts, n in asked)
        if self.kernel != 'latent':  # which has none
            cache = Cache.of(
                self.model,
                max(len(prompts) for prompts, _ in asked),
                longest,
                layout='paged' if self.kernel == 'paged' else 'dense',
                static=self.device.type == 'cuda',
            )
        self.cache = 'none' if cache is None else cache.layout
        attentions = [block.attn for block in self.model.transformer.h]
        for attention in attentions:  # flex is compiled for one length, and prompts have many
            attention.kernel = 'sdpa' if self.kernel == 'flex' else attention.kernel
        try:
            with (
                torch.compiler.set_stance('force_eager') if self.s.compile else nullcontext(),
                adapters.held_weights(self.model),
            ):
                for prompts, n in asked:
                    if cache is None:
                        prompts, rows = (
                            torch.tensor(
                                [prompt[-min(map(len, prompts)) :] for prompt in prompts],
                                device=self.device,
                            ),
                            None,
                        )
                    else:
                        rows = range(len(prompts))
                        for row in range(cache.rows):
                            cache.free(row)
                    yield torch.stack(
                        list(
                            decoding.generate(
                                self.model, prompts, n, temperature=0, cache=cache, rows=rows
                            )
                        ),
                        dim=1,
                    )
        finally:
            for attention in attentions:
                attention.kernel = KERNELS[self.kernel]


@torch.no_grad()
def is_causal(model, device):
    """Whether a change of the last token leaves all earlier logits as they are."""
    idx = (
        torch.arange(min(128, model.config.block_size), device=device)[None]
        % model.config.vocab_size
    )
    other = idx.clone()
    other[0, -1] = (other[0, -1] + 1) % model.config.vocab_size
    a, b = (model.lm_head(model.hidden(x))[0, :-1].float() for x in (idx, other))
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


# ---------------------------------------------------------------------------------------------------
# measuring


def data_of(s, tokenizer, vocab_size, folder, kernel=''):
    """Training rows, validation rows, the validation examples and their Encoder; examples are None for random tokens."""
    if s.data == 'random':
        made = torch.randint(
            vocab_size,
            (s.n_train + s.n_val, s.block_size),
            generator=torch.Generator().manual_seed(0),
        ).tolist()
        rows = [(ids, ids[1:] + [-1]) for ids in made]
        return (
            Rows(rows[: s.n_train], s.block_size, packed=False),
            Rows(rows[s.n_train :], s.block_size, packed=False),
            None,
            None,
        )
    encoder = instructions.Encoder(tokenizer, vocab_size, s.template, s.completion_only)
    read = {
        split: instructions.examples(folder / f'{split}.jsonl', most)
        for split, most in (('train', s.n_train), ('val', s.n_val))
    }
    train, val = (
        Rows(
            [encoder.document(row) for row in read[split]],
            s.block_size,
            s.packing,
            blocks=kernel == 'flex',
        )
        for split in ('train', 'val')
    )
    return train, val, read['val'], encoder


def measure(s, kind, kernel, peer, folder, trace, tell=lambda text: None):
    """
    The row of one cell: a dict of figures. s: the settings; folder: where train.jsonl and val.jsonl are; trace: the file for
    the profile. Raises NotHere and what goes wrong (torch.OutOfMemoryError among it).
    """
    device = machine.pick_device(s.device)
    stream = machine.pick_dtype(s.dtype, device)
    if peer and kernel not in PEER_KERNELS:
        raise NotHere('transformers has no such kernel')
    rate = matmul_rate(device, stream)
    row, memory, per_seed = {}, {}, []
    for number, seed in enumerate(range(s.seed, s.seed + s.seeds)):
        tell(f'seed {seed}')
        torch.manual_seed(seed)
        with record_peak_memory('load', memory, device):
            rows = None
            if kernel == 'mla' and s.data != 'random':
                rows = calibration_rows(s, folder, device)
            cell = (Peer if peer else Ours)(s, kind, kernel, device, stream, rows)
        if peer and not s.model.startswith('random:'):
            cell.tokenizer = deepseek.tokenizer_of(s.model, deepseek.read_shape(s.model))
        train, val, texts, encoder = data_of(
            s, cell.tokenizer, cell.model.config.vocab_size, folder, '' if peer else kernel
        )
        cell.set_up(documents=train.isolated)
        per_seed.append(one_seed(s, cell, train, val, texts, encoder, seed, memory, device, tell))
        if number == 0:
            row = dict(
                causal=cell.causal,
                trainable_parameters=cell.parameters[0],
                parameters=cell.parameters[1],
                storage_bytes_per_parameter=cell.storage,
                recompute=cell.setting,
                cache=cell.cache,
                cut_documents=train.cut,
                rows=len(train.rows),
                flops_per_token=cell.flops,
                tokenizer=encoder.name if encoder else 'random tokens',
            )
            if s.profile:
                tell('profiling')
                row |= profile(s, cell, train, trace, device, KERNELS[kernel])
        del cell
    row |= together(per_seed)
    row['limit_tok_per_s'] = rate / row['flops_per_token']
    row['percent_of_limit'] = 100 * row['train_tok_per_s'] / row['limit_tok_per_s']
    row |= {
        f'{name}_{what}_mib': round(size / 2**20)
        for name, sizes in memory.items()
        for what, size in zip(('allocated', 'reserved'), sizes)
    }
    return row | dict(
        matmul_tflops=rate / 1e12,
        seeds=s.seeds,
        device=machine.describe(device),
        dtype=str(stream)[6:],
        torch=torch.__version__,
    )


def calibration_rows(s, folder, device):
    """Training text in whole rows, for converting."""
    shape = deepseek.read_shape(s.model)
    tokenizer = deepseek.tokenizer_of(s.model, shape)
    train, *_ = data_of(s, tokenizer, shape['vocab_size'], folder)
    whole = Rows(train.documents, s.block_size, packed=True, isolated=False)
    return whole.batch(range(min(16, len(whole.rows))), device).idx


def one_seed(s, cell, train, val, texts, encoder, seed, memory, device, tell):
    """Train, evaluate and generate once: the figures of one seed."""
    found = {}
    val_batches = [val.batch(rows, device) for rows in val.all_batches(s.batch_size)]
    found['val_loss_before'] = finetuning.evaluate(cell.model, cell.loss_of, val_batches)
    order = train.train_batches(seed, s.batch_size)
    learning_rate = s.learning_rate or (2e-5 if cell.parameters[0] == cell.parameters[1] else 2e-4)
    tuner = finetuning.Finetuner(
        cell.model, cell.loss_of, learning_rate, s.weight_decay, s.grad_clip
    )
    epoch = math.ceil(len(train.rows) / (s.batch_size * s.accumulation))
    steps = s.steps or max(math.ceil(epoch * s.epochs), s.warmup_steps + 1)

    batches = [
        [train.batch(rows, device) for rows in islice(order, s.accumulation)] for _ in range(steps)
    ]  # before the clock starts
    losses = []
    free_memory(device, workspaces=True)
    gc.freeze()  # the garbage collector has only the steps' own objects to look through
    clock = Clock(device)
    for step in range(steps):
        tell(f'seed {seed}, step {step + 1} of {steps}')
        if step == s.warmup_steps:  # what compiles and allocates has done so
            measured = record_peak_memory('train', memory, device, clean=False)
            measured.__enter__()
        losses.append(tuner.step(batches[step]))
        clock.tick()
    timed = [b for some in batches[s.warmup_steps :] for b in some]
    tokens, samples = sum(b.tokens for b in timed), sum(b.samples for b in timed)
    every = clock.seconds()
    seconds = every[s.warmup_steps :]
    measured.__exit__(None, None, None)
    gc.unfreeze()
    losses = torch.stack(losses).tolist()
    found |= dict(
        train_tok_per_s=tokens / sum(seconds),
        train_samples_per_s=samples / sum(seconds),
        step_ms=1e3 * statistics.median(seconds),
        step_ms_all=[1e3 * t for t in seconds],
        warmup_ms=[1e3 * t for t in every[: s.warmup_steps]],
        train_loss=statistics.mean(losses[-epoch:]),
        first_loss=losses[0],
        steps=steps,
    )
    del tuner
    with record_peak_memory('eval', memory, device):
        finetuning.evaluate(cell.model, cell.loss_of, val_batches[:1])  # warm
        clock = Clock(device)
        found['val_loss'] = finetuning.evaluate(cell.model, cell.loss_of, val_batches)
        clock.tick()
        found |= dict(
            eval_tok_per_s=sum(b.tokens for b in val_batches) / sum(clock.seconds()),
            perplexity=math.exp(min(found['val_loss'], 700)),
        )
    with record_peak_memory('generate', memory, device), torch.no_grad():
        cell.model.eval()
        found |= generate(s, cell, val, texts, encoder, device)
        if texts:
            found |= {
                f'teacher_{name}': value
                for name, value in teacher_forced(cell, val_batches, val, encoder).items()
            }
        cell.model.train()
    return found


def generate(s, cell, val, texts, encoder, device):
    """Speed of greedy decoding, and how near the answers are to the references."""
    T = max(1, s.block_size - s.max_new_tokens)
    prompts = (
        [encoder.encode(row)[0][-T:] for row in texts]
        if texts
        else [ids[: min(32, T)] for ids, _ in val.documents]
    )
    groups = [prompts[at : at + s.batch_size] for at in range(0, len(prompts), s.batch_size)]
    told = cell.answers(
        [(groups[0], min(4, s.max_new_tokens))] + [(group, s.max_new_tokens) for group in groups]
    )
    next(told)  # warm
    clock, made = Clock(device), []
    for ids in told:
        made += ids.tolist()
        clock.tick()
    found = dict(generate_tok_per_s=len(prompts) * s.max_new_tokens / sum(clock.seconds()))
    return found | (
        answers.scores([encoder.decode(ids) for ids in made], [row['response'] for row in texts])
        if texts
        else {}
    )


def teacher_forced(cell, batches, val, encoder):
    """The metrics of what the model takes for likeliest behind each true token of the answer."""
    told, true, numbers = [], [], [i for row in val.rows for i in row]
    for batch in batches:
        likeliest = cell.likeliest(batch).cpu()
        for guess, target, lengths in zip(likeliest, batch.targets.cpu(), batch.lengths):
            for a, b in zip(guess.split(lengths), target.split(lengths)):
                if (b >= 0).any():
                    ids = answers.predicted(a, b)
                    told.append(encoder.decode(ids[0]))
                    true.append(encoder.decode(ids[1]))
    assert len(told) <= len(numbers)
    return answers.scores(told, true)


def together(per_seed):
    """Medians over seeds; of the speeds also least and most, of the step all steps of all seeds, one by one, too: a list a seed, and of its warm-up."""
    row = {
        name: statistics.median(seed[name] for seed in per_seed)
        for name in per_seed[0]
        if name not in ('step_ms_all', 'warmup_ms')
    }
    row |= {
        name: [[round(ms, 2) for ms in seed[name]] for seed in per_seed]
        for name in ('warmup_ms', 'step_ms_all')
    }
    every = [ms for seed in per_seed for ms in seed['step_ms_all']]
    row |= dict(step_ms=statistics.median(every), step_ms_least=min(every), step_ms_most=max(every))
    for name in ('train_tok_per_s', 'val_loss'):
        row |= {
            f'{name}_least': min(seed[name] for seed in per_seed),
            f'{name}_most': max(seed[name] for seed in per_seed),
        }
    return row


def profile(s, cell, train, trace, device, kernel):
    """One more training step under torch's profiler: a Chrome trace, the operators that take longest, and which attention ran."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == 'cuda'
    tuner = finetuning.Finetuner(cell.model, cell.loss_of, 0.0)
    batch = train.batch(next(train.train_batches(0, s.batch_size)), device)
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    ) as seen:
        tuner.step([batch])
        timing.synchronize(device)
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(trace))
    events = seen.key_averages()
    spent = sorted(
        ((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, e.key[:90], e.count)
        for e in events
    )[::-1]
    ran = attention_of([e.key for e in events])
    return dict(
        top_operators=[
            dict(name=name, ms=round(ms, 3), calls=n) for ms, name, n in spent[:12] if ms > 0
        ],
        kernel_ran=ran,
        kernel_proved=ran in PROVES[kernel],
        trace=f'{Path(trace).parent.name}/{Path(trace).name}',
    )


def attention_of(operators):
    """Which attention these operators are of: flex, cudnn, flash, efficient, math, or eager when there is none of these but a plain product."""
    return next(
        (name for name, words in EVIDENCE if any(re.search(words, op, re.I) for op in operators)),
        'eager' if any(re.search('bmm|matmul', op) for op in operators) else 'none',
    )
