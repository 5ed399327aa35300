"""
Write text with a trained model, each token as soon as it is chosen.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --max_new_tokens=100
    git log -1 --format=%B | python sample.py --start=- --num_samples=1 --temperature=0

The text goes to stdout; what the model is, and any remark, to stderr.
"""
# model
out_dir = 'out'  # the run to sample from
init_from = 'resume'  # resume (out_dir/ckpt.pt) | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint file or folder, also of Llama or DeepSeek-V3
# text
start = '\n'  # the prompt: text, FILE:prompt.txt, or - for standard input; '' = the beginning of a text
num_samples = 3
max_new_tokens = 500  # tokens in a sample; <|endoftext|> ends it earlier
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model has it; more = wilder
top_k = 200  # choose among the k likeliest tokens; 0 = among all
top_p = 1.0  # choose among the fewest tokens that hold this share of the probability
seed = 1337  # sample i depends on (seed, i) only
# machine
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # of weights and arithmetic: auto | float32 | bfloat16 | float16
kernel = 'sdpa'  # attention: eager | sdpa | flash | cudnn

from configurator import UserError, configure
config = configure(globals())

# ---------------------------------------------------------------------------------------------------
import codecs
import math
import os
import sys
from pathlib import Path

import torch

import checkpoint
import dataset as datasets
import machine

device = machine.pick_device(device)
if device.type == 'cpu' and config.apply_on_cpu():
    device = torch.device('cpu')
for name, least in dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0).items():
    if config[name] < least:
        raise UserError(f'{name}={config[name]} must be at least {least}')
if not 0 < top_p <= 1:
    raise UserError(f'top_p={top_p} must be more than 0 and at most 1')
if kernel == 'flex':
    raise UserError('--kernel=flex is compiled for one length, and a text grows: use --kernel=sdpa')
path = os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from
if init_from == 'resume' and not os.path.exists(path):
    raise UserError(f'there is no {path}: train a model with `python train.py config/train_shakespeare_char.py --out_dir={out_dir}`, '
                    'or name one that you have by --out_dir or --init_from')


def vocabulary(content, size):
    """The meta of a model's `size` tokens: the checkpoint's own, or its dataset's (nanoGPT's holds none), or GPT-2's."""
    if 'tokenizer' in content.get('meta', {}):
        return content['meta']
    name = content.get('config', {}).get('dataset')
    if name and (datasets.find(name) / 'meta.json').exists():
        meta = datasets.read_meta(datasets.find(name))
        if size in (meta['vocab_size'], -(-meta['vocab_size'] // 64) * 64):  # as it is, or rounded up
            return meta
    if size in (50257, 50304):
        return dict(tokenizer='gpt2')
    hint = f"run the prepare.py of the dataset '{name}' that it was trained on" if name else 'GPT-2 has 50257'
    raise UserError(f'{path} does not say what its {size} tokens are: {hint}')


def read_prompt():
    if start != '-' and not start.startswith('FILE:'):
        return start
    try:
        return (sys.stdin.buffer.read() if start == '-' else Path(start[5:]).read_bytes()).decode('utf-8-sig')
    except (OSError, ValueError) as error:
        why = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
        raise UserError(f'--start={start} cannot be read: {why}') from None


# ---------------------------------------------------------------------------------------------------
model, content = checkpoint.load_model(path, dropout=0.0, kernel=kernel)
if 'codec' in content:  # another's model and its own tokenizer.json
    meta, codec = {}, content['codec']
    begin, ends = codec.bos, codec.eos
else:
    meta = vocabulary(content, model.config.vocab_size)
    codec = datasets.Tokenizer(meta)
    begin, ends = None, {codec.bpe.eot_token} if codec.name == 'gpt2' else set()  # <|endoftext|>, between documents
try:
    text = read_prompt()
    ids = ([] if begin is None else [begin]) + codec.encode(text or ('<|endoftext|>' if codec.name == 'gpt2' else '' if begin is not None else '\n'))
except UserError as error:
    raise UserError(f'--start: {error}') from None

model.stream = machine.pick_dtype(dtype, device)
model.to(device, model.stream).eval()
model.check_kernel(device)
trained = f"step {content['step']}, val loss {float(content.get('best_val_loss', math.nan)):.4f}; " if 'step' in content else ''
source = meta.get('source') or content.get('config', {}).get('dataset') or path
print(f'{checkpoint.kind_of(model).upper()}, {model.num_params() / 1e6:.2f}M parameters, {trained}{source}', file=sys.stderr)
if len(ids) > model.config.block_size:
    print(f'the prompt has {len(ids)} tokens: only the last {model.config.block_size} are read (block_size)', file=sys.stderr)

prompt, echo = torch.tensor([ids[-model.config.block_size:]], device=device), ids[ids[0] == begin or ids[0] in ends:]
generator = torch.Generator(device)
sys.stdout.reconfigure(errors='replace')  # where a character cannot be shown stands a ?
controls = dict.fromkeys({*range(32), *range(127, 160)} - set(b'\t\n\r'), '\ufffd') if sys.stdout.isatty() else {}  # not for a terminal


def write(text):
    sys.stdout.write(text.translate(controls))
    sys.stdout.flush()


try:
    for i in range(num_samples):
        write('\n---------------\n' if i else '')
        generator.manual_seed((seed * 1_000_003 + i) % 2 ** 63)
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may take several tokens
        write(decoder.decode(codec.decode_bytes(echo)))
        for token in model.generate(prompt, max_new_tokens, temperature, top_k, top_p, codec.vocab_size, generator):
            if token.item() in ends:
                break
            write(decoder.decode(codec.decode_bytes([token.item()])))
        write(decoder.decode(b'', final=True))
    write('\n')
except BrokenPipeError:  # the reader, such as `| head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
except KeyboardInterrupt:
    print(file=sys.stderr)  # what the configurator's hook says goes on a line of its own
    raise
