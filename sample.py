"""
Write text with a trained model, each token as soon as it is chosen.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --max_new_tokens=100
    git log -1 --format=%B | python sample.py --start=- --num_samples=1 --temperature=0
    python sample.py --prompts=questions.txt --batch_size=16 --jsonl=True > answers.jsonl

The text goes to stdout; what the model is, and any remark, to stderr.
"""

# model
out_dir = 'out'  # the run to sample from
init_from = 'resume'  # resume (out_dir/ckpt.pt) | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint file or folder, also of Llama or DeepSeek-V3
# text
start = (
    '\n'  # the prompt: text, FILE:prompt.txt, or - for standard input; '' = the beginning of a text
)
num_samples = 3  # of start
prompts = ''  # instead of start: a file with a prompt a line (- for standard input), one sample of each, in its order
batch_size = 8  # prompts decoded at a time: where one ends, the next takes its place
jsonl = False  # write prompts and their samples as JSON, {"prompt": ..., "text": ...} a line
max_new_tokens = 500  # tokens in a sample; <|endoftext|> ends it earlier
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model has it; more = wilder
stop = ''  # text that ends a sample and is left out of it; a JSON list for several: '["\n\n", "THE END"]'
top_k = 200  # choose among the k likeliest tokens; 0 = among all
top_p = 1.0  # choose among the fewest tokens that hold this share of the probability
seed = 1337  # sample i depends on (seed, i) only
# cache: what decoding remembers, so that a step runs one token
cache = 'dense'  # dense | paged | none: every step runs the whole text again
cache_dtype = 'auto'  # auto = that of the model | float32 | bfloat16 | float16 | int8 | int4
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
decode_kernel = 'auto'  # attention of a new token over the cache: auto | triton (reads it where it lies) | torch (gathers it first) | flex | flashinfer | flashmla
prefill_chunk = 0  # run prompts this many tokens at a time, for less memory; 0 = all at once
# machine
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # of weights and arithmetic: auto | float32 | bfloat16 | float16
kernel = 'sdpa'  # attention: eager | sdpa | flash | cudnn

from nanomla.core.configurator import UserError, configure

config = configure(globals())

# -------------------------------------------------------------------------------------------------
import json
import math
import os
import sys
from pathlib import Path

import torch

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import files
from nanomla.core.tokenizers import StreamDecoder
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate, prefill, serve

device = machine.pick_device(device)
if device.type == 'cpu' and config.apply_on_cpu():
    device = torch.device('cpu')
for name, least in dict(
    num_samples=1, max_new_tokens=1, temperature=0, top_k=0, batch_size=1, prefill_chunk=0
).items():
    if config[name] < least:
        raise UserError(f'{name}={config[name]} must be at least {least}')
if not 0 < top_p <= 1:
    raise UserError(f'top_p={top_p} must be more than 0 and at most 1')
if kernel == 'flex':
    raise UserError('--kernel=flex is compiled for one length, and a text grows: use --kernel=sdpa')
if cache not in ('none', 'dense', 'paged'):
    raise UserError(f'--cache={cache} is not known: use none, dense or paged')
if prompts and (cache == 'none' or 'start' in config.given):
    raise UserError(
        '--prompts are decoded together, which needs a cache: use --cache=dense or paged'
        if cache == 'none'
        else 'give one of --start and --prompts'
    )
path = os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from
if init_from == 'resume' and not os.path.exists(path):
    raise UserError(
        f'there is no {path}: train a model with `python train.py config/train_shakespeare_char.py --out_dir={out_dir}`, '
        'or name one that you have by --out_dir or --init_from'
    )


def read(name, option):
    try:
        return (sys.stdin.buffer.read() if name == '-' else Path(name).read_bytes()).decode(
            'utf-8-sig'
        )
    except (OSError, ValueError) as error:
        why = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
        raise UserError(f'{option} cannot be read: {why}') from None


def read_prompts():
    """[(text, where it is from)], at least one."""
    if not prompts:
        return [
            (
                read(start.removeprefix('FILE:'), f'--start={start}')
                if start == '-' or start.startswith('FILE:')
                else start,
                '--start',
            )
        ]
    lines = read(prompts, f'--prompts={prompts}').removesuffix('\n').split('\n')
    if lines == ['']:
        raise UserError(f'--prompts={prompts} holds no prompt: write one a line')
    return [(line.removesuffix('\r'), f'{prompts}:{n}') for n, line in enumerate(lines, 1)]


def read_stops():
    if not stop.startswith('['):
        return [stop] if stop else []
    try:
        stops = json.loads(stop)
    except ValueError:
        return [stop]  # a text that begins with a bracket
    if not all(isinstance(text, str) and text for text in stops):
        raise UserError(f'--stop={stop} must be a text, or a JSON list of texts that are not empty')
    return stops


# -------------------------------------------------------------------------------------------------
loaded = load.load_model(path, dropout=0.0, kernel=kernel)
model, content, meta = loaded.model, loaded.checkpoint, loaded.meta
text_codec = load.codec_of(loaded)
codec, begin, ends = text_codec.tokenizer, text_codec.begin, text_codec.ends
nothing = (
    '' if codec.name == 'hf' else '<|endoftext|>' if ends else '\n'
)  # what a text without a prompt begins with
asked, stops, texts = read_prompts(), read_stops(), []
for text, where in asked:
    try:
        ids = ([] if begin is None else [begin]) + codec.encode(text or nothing)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None
    if not ids:
        raise UserError(
            f'{where}: the prompt is empty, and this model has no token that begins a text: give it a few words'
        )
    texts.append(ids)

model.stream = machine.pick_dtype(dtype, device)
model.to(device, model.stream).eval()
model.check_kernel(device)
trained = (
    f'step {content["step"]}, val loss {float(content.get("best_val_loss", math.nan)):.4f}; '
    if 'step' in content
    else ''
)
source = meta.get('source') or content.get('config', {}).get('dataset') or path
block_size = model.config.block_size
read_of = [ids[-block_size:] for ids in texts]
longest = max(map(len, read_of))
if (
    model.config.pos == 'learned' and longest + max_new_tokens - 1 > block_size and cache != 'none'
):  # the last token is not run
    if prompts or 'cache' in config.given:
        where = next(where for ids, (_, where) in zip(read_of, asked) if len(ids) == longest)
        most, instead = block_size + 1 - longest, '' if prompts else '--cache=none, or '
        raise UserError(
            f'{where}: {longest} tokens and max_new_tokens={max_new_tokens} outgrow block_size={block_size}, where learned positions end: '
            f'use {instead}--max_new_tokens={most}' + ' or less, or shorter prompts' * bool(prompts)
        )
    cache = 'none'
held, cost = (
    None,
    'no cache'
    if 'cache' in config.given
    else f'no cache (the text may outgrow block_size={block_size}, where learned positions end)',
)
if cache != 'none':
    slots = (
        min(batch_size, len(texts)) if prompts else min(num_samples, 2)
    )  # the prompt stays in slot 0 when it is needed again
    held = Cache.of(
        model,
        slots,
        min(block_size, longest + max_new_tokens - 1),
        layout=cache,
        dtype=cache_dtype,
        page_size=page_size,
        static=device.type == 'cuda',
        kernel=decode_kernel,
    )
    cost = f'{cache} {held.dtype} cache, {(held.nbytes - held.window_bytes) / held.slots:,.0f} bytes a token'
    cost += (
        f' and {held.window_bytes / held.rows / 1024:,.0f} KiB for the last {held.window}'
        * bool(held.window_bytes)
    )
print(
    f'{checkpoint.kind_of(model).upper()}, {model.num_params() / 1e6:.2f}M parameters, {trained}{source}; {cost}',
    file=sys.stderr,
)
if cut := [len(ids) for ids in texts if len(ids) > block_size]:
    whose = f'{len(cut)} prompts have up to {max(cut)}' if prompts else f'the prompt has {cut[0]}'
    print(f'{whose} tokens: only the last {block_size} are read (block_size)', file=sys.stderr)
sys.stdout.reconfigure(errors='replace')  # where a character cannot be shown stands a ?
controls = (
    dict.fromkeys({*range(32), *range(127, 160)} - set(b'\t\n\r'), '\ufffd')
    if sys.stdout.isatty()
    else {}
)  # not for a terminal


def write(text):
    sys.stdout.write(text.translate(controls))
    sys.stdout.flush()


def seed_of(i):
    return (seed * 1_000_003 + i) % 2**63


def echo(ids):
    return codec.decode(
        ids[ids[0] == begin or ids[0] in ends :]
    )  # without the <|endoftext|> or the like that it may begin with


def tell_samples():
    prompt, generator = torch.tensor(read_of, device=device), torch.Generator(device)
    how = dict(cache=held, rows=[held.rows - 1], prefill_chunk=prefill_chunk) if held else {}
    if held and held.rows > 1 and longest > 1:
        prefill(model, [read_of[0][:-1]], held, [0], prefill_chunk)  # once for all samples
    for i in range(num_samples):
        write('\n---------------\n' * bool(i) + echo(texts[0]))
        if held and held.rows > 1:
            held.fork(0, 1)
        decoder = StreamDecoder(codec.decode_bytes, stops, ends)
        for token in generate(
            model,
            prompt,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            codec.vocab_size,
            generator.manual_seed(seed_of(i)),
            **how,
        ):
            write(decoder.add(token.item()))
            if decoder.stopped:
                break
        write(decoder.finish())
    write('\n')


def tell_prompts():
    decoders = [StreamDecoder(codec.decode_bytes, stops, ends) for _ in texts]
    said, done, next_one = [[] for _ in texts], set(), 0
    bar = files.progress_bar(len(texts), 'prompt') if sys.stderr.isatty() else None

    def tell(i, token):
        said[i].append(decoders[i].add(token))
        return decoders[i].stopped

    seeds = [seed_of(i) for i in range(len(texts))]
    for i in serve(
        model,
        read_of,
        held,
        max_new_tokens,
        tell,
        temperature,
        top_k,
        top_p,
        codec.vocab_size,
        seeds,
        prefill_chunk,
    ):
        done.add(i)
        if bar:
            bar.update()
        while next_one in done:  # in the order of the file
            text = ''.join(said[next_one]) + decoders[next_one].finish()
            line = json.dumps(dict(prompt=asked[next_one][0], text=text), ensure_ascii=False)
            write(
                (
                    line
                    if jsonl
                    else '---------------\n' * bool(next_one) + echo(texts[next_one]) + text
                )
                + '\n'
            )
            next_one += 1
    if bar:
        bar.close()


try:
    tell_prompts() if prompts else tell_samples()
except BrokenPipeError:  # the reader, such as `| head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
except KeyboardInterrupt:
    print(file=sys.stderr)  # what the configurator's hook says goes on a line of its own
    raise
