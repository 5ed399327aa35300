"""
How long a save keeps training waiting: written in the background, and written at once.

    python -m nanomla.benchmarks.saving /tmp/saving            # GPT-2 124M with AdamW's moments
    python -m nanomla.benchmarks.saving /tmp/saving 24 2048    # layers and width: 1.3B

Writes ckpt.pt (weights) and last.pt (with moments) to a folder that has neither, three times, and
prints a row of JSON: the seconds to take memory for the copies, which happens while training goes
on, that training waits for the first copy and for a later one, until both files are on the disk,
and for a plain save of both.
"""

import json
import sys
import time
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints import native
from nanomla.core import devices
from nanomla.core.configurator import UserError
from nanomla.training.optim import OptimizerSettings, make_optimizers
from nanomla.training.run.saving import BackgroundSaver

FORM = 'python -m nanomla.benchmarks.saving FOLDER [LAYERS WIDTH]'


def read_arguments(words: list[str]) -> tuple[Path, int, int]:
    """Return the folder, the number of layers and the width. UserError where they are others."""
    if len(words) not in (1, 3) or words[0].startswith('-'):
        raise UserError(f'say where to write, and how large a model if you like: {FORM}')
    folder, shape = Path(words[0]), words[1:] or ['12', '768']
    if not all(word.isdecimal() and int(word) > 0 for word in shape) or int(shape[1]) % 64:
        raise UserError(
            f'LAYERS={shape[0]} WIDTH={shape[1]}: write whole numbers, the width a multiple of 64'
        )
    for name in ('ckpt.pt', 'last.pt'):
        if (folder / name).exists():
            raise UserError(f'{folder / name} is there already: name a new folder')
    return folder, int(shape[0]), int(shape[1])


def main(folder: Path, n_layer: int, n_embd: int) -> None:
    device = torch.device(devices.best_device())
    config = GPT.Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, vocab_size=50304)
    model = GPT(config).to(device)
    (optimizer,) = make_optimizers(model, OptimizerSettings('adamw', 1e-4, 0.0, 0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    weights = dict(kind='mha', model_args=native.model_args(model), model=model.state_dict())
    state = weights | dict(optimizers=[optimizer.state_dict()])
    files = {folder / 'ckpt.pt': weights, folder / 'last.pt': state}

    saver = BackgroundSaver(native.save)
    saver.reserve(files)
    reserved = timed(saver.wait, device)
    waited, written = [], []
    for _ in range(3):
        seconds = timed(lambda: saver.save(files), device)
        waited.append(seconds)
        written.append(seconds + timed(saver.wait, device))
    saver.close()
    plain = timed(lambda: [native.save(path, content) for path, content in files.items()], device)
    row = dict(
        params=model.num_params(),
        bytes=sum(path.stat().st_size for path in files),
        reserved=round(reserved, 3),
        first_copy=round(waited[0], 3),
        later_copy=round(min(waited[1:]), 3),
        until_written=round(min(written[1:]), 3),
        plain_save=round(plain, 3),
        device=devices.describe(device),
        torch=torch.__version__,
        commit=devices.commit(),
    )
    print(json.dumps(row))


def timed(action, device: torch.device) -> float:
    """Return the seconds that an action takes."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == '__main__':
    try:
        main(*read_arguments(sys.argv[1:]))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(error.exit_code)
