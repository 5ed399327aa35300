"""
Write text with a trained model, each token as soon as it is chosen.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --max_new_tokens=100
    python sample.py --init_from=my_chat_model --chat=True
    git log -1 --format=%B | python sample.py --start=- --num_samples=1 --temperature=0
    python sample.py --prompts=questions.txt --batch_size=16 --jsonl=True > answers.jsonl

The text goes to stdout; what the model is, and any remark, to stderr.
"""

# model
out_dir = 'out'  # the run to sample from
init_from = 'resume'  # resume (out_dir/ckpt.pt) | gpt2 to gpt2-xl | a checkpoint or model folder
# text
start = '\n'  # the prompt: text, FILE:prompt.txt, or - (standard input); '' = beginning of a text
num_samples = 3  # of start
prompts = ''  # instead of start: a file with a prompt a line (- for standard input), a sample each
batch_size = 8  # prompts decoded at a time: where one ends, the next takes its place
chat = False  # the prompt is a question in the model's chat template; without one, a conversation
system = ''  # with chat: the message that a conversation begins with; '' = the template's own
jsonl = False  # write prompts and their samples as JSON, {"prompt": ..., "text": ...} a line
max_new_tokens = 500  # tokens in a sample; <|endoftext|> ends it earlier
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model has it; more = wilder
stop = ''  # text that ends a sample and is left out of it; several: '["\n\n", "THE END"]'
top_k = 200  # choose among the k likeliest tokens; 0 = among all
top_p = 1.0  # choose among the fewest tokens that hold this share of the probability
seed = 1337  # sample i depends on (seed, i) only
# cache: what decoding remembers, so that a step runs one token
cache = 'dense'  # dense | paged | none: every step runs the whole text again
cache_dtype = 'auto'  # auto = that of the model | float32 | bfloat16 | float16 | int8 | int4
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
decode_kernel = 'auto'  # of a new token: auto | triton | torch | flex | flashinfer | flashmla
prefill_chunk = 0  # run prompts this many tokens at a time, for less memory; 0 = all at once
# machine
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # of weights and arithmetic: auto | float32 | bfloat16 | float16
kernel = 'sdpa'  # attention: eager | sdpa | flash | cudnn

from nanomla.core.configurator import UserError, configure

if __name__ == '__main__':
    config = configure(globals())  # before the imports below, so that --help is quick

# -------------------------------------------------------------------------------------------------
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints.load import LoadedModel, TextCodec, codec_of, load_model, meta_of
from nanomla.checkpoints.tokens.chat import chat_template_of, encode_chat
from nanomla.core.checks import check_choice, check_range, settings_errors
from nanomla.core.devices import pick_device, pick_dtype
from nanomla.core.files import progress_bar
from nanomla.core.tokenizers import StreamDecoder
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate, prefill, serve
from nanomla.inference.quantize import BITS, FULL

SAMPLES_APART = '---------------\n'
LONGEST_CONVERSATION = 4096  # tokens in the cache, where the model has so many positions


@dataclass
class Prompt:
    text: str
    where: str  # where it is from, for messages
    ids: list[int]


def check_settings(given: dict) -> None:
    """Raise a UserError for settings that do not fit, or do not fit together."""
    check_range('num_samples', num_samples, least=1)
    check_range('max_new_tokens', max_new_tokens, least=1)
    check_range('batch_size', batch_size, least=1)
    check_range('temperature', temperature, least=0)
    check_range('top_k', top_k, least=0)
    check_range('top_p', top_p, above=0, most=1)
    check_range('prefill_chunk', prefill_chunk, least=0)
    check_choice('--cache', cache, ('none', 'dense', 'paged'))
    check_choice('cache_dtype', cache_dtype, ('auto', *FULL, *BITS))
    if kernel == 'flex':
        raise UserError(
            '--kernel=flex is compiled for one length, and a text grows: use --kernel=sdpa'
        )
    if prompts and cache == 'none':
        raise UserError(
            '--prompts are decoded together, which needs a cache: use --cache=dense or paged'
        )
    if prompts and 'start' in given:
        raise UserError('give one of --start and --prompts')
    if chat and cache == 'none' and not prompts and 'start' not in given:
        raise UserError('a conversation needs a cache: use --cache=dense or paged')
    if system and not chat:
        raise UserError('--system begins a conversation: use it with --chat=True')


def model_path() -> str:
    """Return what to load; UserError where a run has no checkpoint."""
    if init_from != 'resume':
        return init_from
    path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.exists(path):
        raise UserError(
            f'there is no {path}: train a model with `python train.py '
            f'config/train_shakespeare_char.py --out_dir={out_dir}`, '
            'or name one that you have by --out_dir or --init_from'
        )
    return path


# -------------------------------------------------------------------------------------------------
# prompts


def read_text(name: str, option: str) -> str:
    """Read a file, or standard input for '-', as UTF-8."""
    try:
        data = sys.stdin.buffer.read() if name == '-' else Path(name).read_bytes()
        return data.decode('utf-8-sig')
    except OSError as error:
        raise UserError(f'{option} cannot be read: {error.strerror}') from None
    except ValueError:
        raise UserError(f'{option} cannot be read: it is not UTF-8 text') from None


def read_prompts() -> list[tuple[str, str]]:
    """Return (text, where it is from) of each prompt, at least one."""
    if not prompts:
        if start == '-' or start.startswith('FILE:'):
            return [(read_text(start.removeprefix('FILE:'), f'--start={start}'), '--start')]
        return [(start, '--start')]
    lines = read_text(prompts, f'--prompts={prompts}').removesuffix('\n').split('\n')
    if lines == ['']:
        raise UserError(f'--prompts={prompts} holds no prompt: write one a line')
    return [(line.removesuffix('\r'), f'{prompts}:{n}') for n, line in enumerate(lines, 1)]


def read_stops() -> list[str]:
    """Return the texts that end a sample."""
    if not stop.startswith('['):
        return [stop] if stop else []
    try:
        stops = json.loads(stop)
    except ValueError:
        return [stop]  # a text that begins with a bracket
    if not all(isinstance(text, str) and text for text in stops):
        raise UserError(f'--stop={stop} must be a text, or a JSON list of texts that are not empty')
    return stops


def encode_questions(codec: TextCodec, model: str) -> list[Prompt]:
    """Turn the prompts into ids, each a question in the model's chat template."""
    template = chat_template_of(codec.tokenizer, model)
    encoded = []
    for text, where in read_prompts():
        messages = [*first_messages(), dict(role='user', content=text)]
        encoded.append(Prompt(text, where, encode_chat(codec.tokenizer, template, messages)))
    return encoded


def first_messages() -> list[dict]:
    return [dict(role='system', content=system)] if system else []


def encode_prompts(codec: TextCodec) -> list[Prompt]:
    """Turn the prompts into ids; an empty one begins as texts of this model begin."""
    tokenizer = codec.tokenizer
    if tokenizer.name == 'hf':
        empty = ''
    elif codec.ends:
        empty = '<|endoftext|>'
    else:
        empty = '\n'
    encoded = []
    for text, where in read_prompts():
        try:
            ids = tokenizer.encode(text or empty)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
        if codec.begin is not None:
            ids = [codec.begin, *ids]
        if not ids:
            raise UserError(
                f'{where}: the prompt is empty, and this model has no token that begins a text: '
                'give it a few words'
            )
        encoded.append(Prompt(text, where, ids))
    return encoded


# -------------------------------------------------------------------------------------------------
# model and cache


def check_length(model: GPT, longest: int, asked: list[Prompt], cache_given: bool) -> bool:
    """
    Return whether a cache can be used: texts with learned positions end at block_size (the last
    token is not run). UserError where a person asked for a cache all the same.
    """
    block_size = model.config.block_size
    if model.config.pos != 'learned' or longest + max_new_tokens - 1 <= block_size:
        return True
    if prompts or cache_given:
        where = next(p.where for p in asked if len(p.ids[-block_size:]) == longest)
        most = block_size + 1 - longest
        advice = f'use --cache=none, or --max_new_tokens={most}'
        if prompts:
            advice = f'use --max_new_tokens={most} or less, or shorter prompts'
        raise UserError(
            f'{where}: {longest} tokens and max_new_tokens={max_new_tokens} outgrow '
            f'block_size={block_size}, where learned positions end: {advice}'
        )
    return False


def make_cache(model: GPT, longest: int, number_of_prompts: int) -> Cache:
    rows = min(num_samples, 2)  # the prompt stays in row 0 when it is needed again
    if prompts:
        rows = min(batch_size, number_of_prompts)
    return Cache.of(
        model,
        rows,
        min(model.config.block_size, longest + max_new_tokens - 1),
        layout=cache,
        dtype=cache_dtype,
        page_size=page_size,
        static=model.lm_head.weight.is_cuda,
        kernel=decode_kernel,
    )


def describe_cache(memory: Cache | None, block_size: int) -> str:
    if memory is None and cache == 'none':
        return 'no cache'
    if memory is None:
        return (
            f'no cache (the text may outgrow block_size={block_size}, where learned positions end)'
        )
    bytes_per_token = (memory.nbytes - memory.window_bytes) / memory.slots
    text = f'{cache} {memory.dtype} cache, {bytes_per_token:,.0f} bytes a token'
    if memory.window_bytes:
        kib = memory.window_bytes / memory.rows / 1024
        text += f' and {kib:,.0f} KiB for the last {memory.window}'
    return text


def describe_model(loaded: LoadedModel) -> str:
    model = loaded.model
    parts = f'{model.config.label}, {model.num_params() / 1e6:.2f}M parameters, '
    if loaded.step is not None:
        val_loss = float(loaded.checkpoint.get('best_val_loss', math.nan))
        parts += f'step {loaded.step}, val loss {val_loss:.4f}; '
    meta = loaded.meta if loaded.tokenizer else meta_of(loaded)
    return parts + (meta.get('source') or loaded.settings.get('dataset') or loaded.path)


def log(message: str) -> None:
    print(message, file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# writing


def write(text: str) -> None:
    """Write to stdout; to a terminal without control characters, which could do anything there."""
    if sys.stdout.isatty():
        text = text.translate(CONTROL_CHARACTERS)
    sys.stdout.write(text)
    sys.stdout.flush()


CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - set(b'\t\n\r'), '\ufffd')


def seed_of(i: int) -> int:
    return (seed * 1_000_003 + i) % 2**63


def echo(ids: list[int], codec: TextCodec) -> str:
    """Return a prompt as text, without the <|endoftext|> or the like that it may begin with."""
    if ids[0] == codec.begin or ids[0] in codec.ends:
        ids = ids[1:]
    return codec.tokenizer.decode(ids)


def sampling_options(codec: TextCodec) -> dict:
    return dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=codec.tokenizer.vocab_size,
        prefill_chunk=prefill_chunk,
    )


def write_samples(model: GPT, codec: TextCodec, prompt: Prompt, memory: Cache | None) -> None:
    """Write num_samples continuations of one prompt, each token as soon as it is chosen."""
    device = model.lm_head.weight.device
    ids = prompt.ids[-model.config.block_size :]
    options = sampling_options(codec)
    shared = memory is not None and memory.rows > 1  # row 0 keeps the prompt, row 1 goes on
    if memory is not None:
        options |= dict(cache=memory, rows=[memory.rows - 1])
    if shared and len(ids) > 1:
        prefill(model, [ids[:-1]], memory, [0], prefill_chunk)  # once for all samples
    generator = torch.Generator(device)
    stops = read_stops()
    for i in range(num_samples):
        if i > 0:
            write('\n' + SAMPLES_APART)
        if not chat:
            write(echo(prompt.ids, codec))
        if shared:
            memory.fork(0, 1)
        decoder = StreamDecoder(codec.tokenizer.decode_bytes, stops, codec.ends)
        tokens = generate(
            model,
            torch.tensor([ids], device=device),
            max_new_tokens,
            generator=generator.manual_seed(seed_of(i)),
            **options,
        )
        for token in tokens:
            write(decoder.add(token.item()))
            if decoder.stopped:
                break
        write(decoder.finish())
    write('\n')


def write_answers(model: GPT, codec: TextCodec, asked: list[Prompt], memory: Cache) -> None:
    """Write one continuation of each prompt, in the order of the file."""
    stops = read_stops()
    decoders = [StreamDecoder(codec.tokenizer.decode_bytes, stops, codec.ends) for _ in asked]
    parts = [[] for _ in asked]
    ended, next_one = set(), 0
    bar = progress_bar(len(asked), 'prompt') if sys.stderr.isatty() else None

    def on_token(i, token):
        parts[i].append(decoders[i].add(token))
        return decoders[i].stopped

    for i in serve(
        model,
        [prompt.ids[-model.config.block_size :] for prompt in asked],
        memory,
        max_new_tokens,
        on_token,
        seeds=[seed_of(i) for i in range(len(asked))],
        **sampling_options(codec),
    ):
        ended.add(i)
        if bar:
            bar.update()
        while next_one in ended:
            prompt, text = asked[next_one], ''.join(parts[next_one]) + decoders[next_one].finish()
            if jsonl:
                line = json.dumps(dict(prompt=prompt.text, text=text), ensure_ascii=False)
            else:
                line = text if chat else echo(prompt.ids, codec) + text
                if next_one > 0:
                    line = SAMPLES_APART + line
            write(line + '\n')
            next_one += 1
    if bar:
        bar.close()


def converse(model: GPT, codec: TextCodec, name: str) -> None:
    """Answer line by line what comes on standard input, until it ends."""
    template, messages = chat_template_of(codec.tokenizer, name), first_messages()
    size = min(model.config.block_size, LONGEST_CONVERSATION)
    options = dict(layout=cache, dtype=cache_dtype, page_size=page_size, kernel=decode_kernel)
    memory = Cache.of(model, 1, size, static=model.lm_head.weight.is_cuda, **options)
    generator = torch.Generator(memory.device).manual_seed(seed)
    for question in questions():
        messages.append(dict(role='user', content=question))
        ids = encode_chat(codec.tokenizer, template, messages)
        room = size + 1 - len(ids)  # the last token is not run
        if room < 1:
            raise UserError(
                f'the conversation has {len(ids)} tokens, and there is room for {size}: begin anew'
            )
        memory.free(0)
        decoder = StreamDecoder(codec.tokenizer.decode_bytes, read_stops(), codec.ends)
        answer = ''
        tokens = generate(
            model,
            [ids],
            min(max_new_tokens, room),
            cache=memory,
            generator=generator,
            **sampling_options(codec),
        )
        for token in tokens:
            text = decoder.add(token.item())
            write(text)
            answer += text
            if decoder.stopped:
                break
        rest = decoder.finish()
        write(rest + '\n')
        messages.append(dict(role='assistant', content=answer + rest))


def questions() -> Iterator[str]:
    """Yield the lines of standard input that say something; a terminal shows a prompt."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print('> ', end='', file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def main() -> None:
    target = pick_device(device)
    if target.type == 'cpu':
        config.apply_on_cpu()
    check_settings(config.given)
    loaded = load_model(model_path(), dropout=0.0, kernel=kernel)
    model, codec = loaded.model, codec_of(loaded)
    talks = chat and not prompts and 'start' not in config.given
    if talks:
        asked = []
        chat_template_of(codec.tokenizer, loaded.path)
    elif chat:
        asked = encode_questions(codec, loaded.path)
    else:
        asked = encode_prompts(codec)
    model.stream = pick_dtype(dtype, target)
    model.to(target, model.stream).eval()
    with settings_errors():
        model.check_kernel(target)
    if talks:
        log(describe_model(loaded))
        converse(model, codec, loaded.path)
        return
    block_size = model.config.block_size
    longest = max(min(len(prompt.ids), block_size) for prompt in asked)
    memory = None
    if cache != 'none' and check_length(model, longest, asked, 'cache' in config.given):
        memory = make_cache(model, longest, len(asked))
    log(describe_model(loaded))
    log(describe_cache(memory, block_size))
    too_long = [len(prompt.ids) for prompt in asked if len(prompt.ids) > block_size]
    if too_long:
        which = f'the prompt has {too_long[0]}'
        if prompts:
            which = f'{len(too_long)} prompts have up to {max(too_long)}'
        log(f'{which} tokens: only the last {block_size} are read (block_size)')
    sys.stdout.reconfigure(errors='replace')  # a character that cannot be shown becomes a ?
    try:
        if prompts:
            write_answers(model, codec, asked, memory)
        else:
            write_samples(model, codec, asked[0], memory)
    except BrokenPipeError:  # the reader, such as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        log('')  # the configurator's message goes on a line of its own
        raise


if __name__ == '__main__':
    main()
