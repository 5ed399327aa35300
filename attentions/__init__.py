"""
Every attention by its name: mha (also GQA and MQA) of model.py, mla of model_mla.py, and NAME of
each attentions/NAME.py.

Such a file is all that an attention needs. It holds one subclass of GPT or GPT_MLA with

    Config      a dataclass on GPTConfig or MLAConfig; the fields that it adds are settings of
                train.py, compare.py and bench.py, with their comments as --help
    Attention   a subclass of Attention; see there what to define and what is optional

and imports only torch, model.py, model_mla.py and other files of this folder.
docs/add_an_attention.md shows one.
"""

import importlib
import traceback
from pathlib import Path
from types import ModuleType

from model import GPT
from model_mla import GPT_MLA

MODELS: dict[str, type[GPT]] = dict(mha=GPT, mla=GPT_MLA)

# Files that could not be loaded: name -> one line with file, line and reason. The others work on.
BROKEN: dict[str, str] = {}


def model_in(module: ModuleType) -> type[GPT]:
    """Return the one model that a file of this folder defines. ValueError if it is not one."""
    models = []
    for value in vars(module).values():
        is_class = isinstance(value, type) and value.__module__ == module.__name__
        if is_class and issubclass(value, GPT):
            models.append(value)
    if len(models) != 1:
        raise ValueError(f'it defines {len(models)} subclasses of GPT, not one')
    return models[0]


def where_it_failed(error: Exception, path: Path) -> str:
    """Return file and line of an error in the file `path`, and the error in words."""
    line = getattr(error, 'lineno', None)
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == path:
            line = frame.lineno
    place = f'attentions/{path.name}' + (f', line {line}' if line else '')
    return f'{place}: {type(error).__name__}: {error}'


def load_folder(folder: Path) -> None:
    """Add the attention of every NAME.py in `folder` to MODELS, or to BROKEN."""
    for path in sorted(folder.glob('*.py')):
        name = path.stem
        if name.startswith('_') or name in MODELS:
            continue
        try:
            MODELS[name] = model_in(importlib.import_module(f'attentions.{name}'))
        except Exception as error:  # someone's unfinished file must not stop the other attentions
            BROKEN[name] = where_it_failed(error, path)


load_folder(Path(__file__).parent)
