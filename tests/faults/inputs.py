"""What hypothesis makes up: command lines, config files, datasets and contents of checkpoints."""

import copy
import json
import os
import random
import string
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from faulty import damaged, damages
from helpers import ROOT
from hypothesis import strategies as st
from made_up_results import made_up

from model import GPT, GPTConfig
from nanomla.checkpoints import native
from nanomla.checkpoints.hub import tensors_in
from nanomla.checkpoints.load import codec_of, load_model
from nanomla.comparison.table import read, table
from nanomla.core import configurator, token_files
from nanomla.core.configurator import UserError
from nanomla.core.files import jsonl
from nanomla.training.batches import Dataset

OF_TRAIN = dict(also='train.py', classes='attentions')
# A script -> where else its settings are from.
SCRIPTS = {
    'train.py': dict(classes='attentions'),
    'sample.py': {},
    'eval.py': {},
    'compare.py': OF_TRAIN,
    'convert_mla.py': {},
    'find_induction_heads.py': {},
    'bench.py': OF_TRAIN,
    'bench_adapters.py': {},
    'data/text/prepare.py': {},
    'data/shakespeare/prepare.py': {},
    'data/shakespeare_char/prepare.py': {},
    'data/repeats/prepare.py': {},
    'data/repeats_fixed/prepare.py': {},
    'data/openwebtext/prepare.py': {},
    'data/openorca/prepare.py': {},
}
SHAPE = dict(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=4)

# -------------------------------------------------------------------------------------------------
# values


def is_key(value: object) -> bool:
    return not isinstance(value, bytes) and value == value


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ['', 'char', 'bytes', 'gpt2', 'mha', 'mla', '../x', '/dev/zero', '=1+1', 'é中']
    ),
    st.binary(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(SCALARS.filter(is_key), inner, max_size=4)
    ),
    max_leaves=8,
)
JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just('char')
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


# -------------------------------------------------------------------------------------------------
# command lines and config files


READ_PAGE, READ_CLASSES = lru_cache(configurator._read_page), configurator._read_classes
CLASSES = {}  # folder -> its fields, as they are where nothing else has them


def read_page(path: str):
    page, purpose = READ_PAGE(path)
    return dict(page), purpose


def read_classes(folder: str, page: dict) -> dict:
    if folder not in CLASSES:
        CLASSES[folder] = READ_CLASSES(folder, {})
    return {name: setting for name, setting in CLASSES[folder].items() if name not in page}


def read_scripts_once(patch) -> None:
    """Read the settings of each script once: they do not change, and it is what takes long."""
    patch.setattr(configurator, '_read_page', read_page)
    patch.setattr(configurator, '_read_classes', read_classes)


def names_of(script: str) -> list[str]:
    """Return the settings of a script."""
    names = []
    for name in (script, SCRIPTS[script].get('also')):
        if name:
            names += read_page(str(ROOT / name))[0]
    return names


ALL_NAMES = sorted({name for script in SCRIPTS for name in names_of(script)})
NAMES = st.one_of(st.sampled_from(ALL_NAMES), st.text(string.ascii_letters + '_-', max_size=8))
WORDS = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(['True', 'false', '', 'None', '1e999', '9**9**9', '2**40', '-0', '1_0', 'inf']),
    st.sampled_from(['[1,2]', '[a,b]', 'dict(a=1)', '{}', '{1: 2}', '[' * 99, '"x"', "f'{1}'"]),
    st.sampled_from(['__import__("os").abort()', 'open("x", "w")', 'n_layer * 2', 'lambda: 1']),
    st.text(max_size=12).filter(lambda text: '\0' not in text),
)
ARGUMENTS = st.one_of(
    st.builds('--{}={}'.format, NAMES, WORDS),
    st.builds('--{}'.format, NAMES),
    st.sampled_from(['--help', '-h', '--', '-', 'config/train_gpt2.py', 'config', 'no/such.py']),
    WORDS,
)
COMMAND_LINES = st.tuples(st.sampled_from(list(SCRIPTS)), st.lists(ARGUMENTS, max_size=4))

LINES = st.one_of(
    st.builds('{} = {}'.format, NAMES, WORDS),
    st.builds('on_cpu = dict({}={})'.format, NAMES, WORDS),
    st.builds('{} {}'.format, st.sampled_from(['import', 'del', 'print', '#', '"""']), WORDS),
    st.text(max_size=30),
)
CONFIG_FILES = st.one_of(
    st.lists(LINES, max_size=5).map(lambda lines: '\n'.join(lines).encode(errors='surrogatepass')),
    st.binary(max_size=60),
)


def check_command_line(script: str, arguments: list[str]) -> None:
    """Read a command line as a script does: settings, help, or one line."""
    script_globals = {'__file__': str(ROOT / script), '__name__': '__main__'}
    try:
        configurator.configure(script_globals, arguments, **SCRIPTS[script])
    except UserError as error:
        assert str(error) and '\n' not in str(error)
        assert len(str(error)) < 1000
    except SystemExit as end:
        assert end.code == 0 and {'-h', '--help'} & set(arguments)
    assert not os.path.exists('x')


def check_config_file(content: bytes, folder: Path) -> None:
    path = folder / 'config.py'
    path.write_bytes(content)
    check_command_line('train.py', [str(path)])


# -------------------------------------------------------------------------------------------------
# datasets

METAS = st.fixed_dictionaries(
    dict(tokenizer=st.sampled_from(['char', 'bytes', 'gpt3']), source=st.text(max_size=9)),
    optional=dict(
        dtype=st.sampled_from(['uint16', 'uint32', 'float64']),
        vocab_size=st.one_of(st.integers(1, 300), JSON_VALUES),
        chars=st.one_of(st.text(max_size=9), JSON_VALUES),
        train_tokens=JSON_VALUES,
        val_tokens=JSON_VALUES,
        val_crc32=JSON_VALUES,
        extra=JSON_VALUES,
    ),
)
META_FILES = st.one_of(
    METAS.map(lambda meta: json.dumps(meta).encode()),
    JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.sampled_from([b'[' * 10_000, b'NaN', b'{"a":' * 5000, b'\xff\xfe{}']),
)
DATASETS = st.tuples(META_FILES, st.binary(max_size=80), st.binary(max_size=80))


def check_dataset(meta: bytes, train: bytes, val: bytes, folder: Path) -> None:
    """Read a dataset as training does: batches whose tokens are in the vocabulary, or one line."""
    for name, content in (('meta.json', meta), ('train.bin', train), ('val.bin', val)):
        (folder / name).write_bytes(content)
    try:
        data = Dataset(folder, 4)
    except UserError as error:
        assert '\n' not in str(error) and str(folder) in str(error)
        return
    x, y = data.train_batch(0, 0, 2)
    assert 0 <= int(x.min()) and int(y.max()) < data.meta['vocab_size']
    assert len(list(data.val_batches(2))) > 0


def written_dataset(folder: Path) -> Path:
    token_files.write_text(folder, 'abcdefgh' * 30, 'char', 'letters')
    return folder


def read_dataset(folder: Path) -> np.ndarray:
    data = Dataset(folder, 4)
    return np.concatenate([data.tokens['train'], data.tokens['val']])


# -------------------------------------------------------------------------------------------------
# checkpoints


@lru_cache
def a_checkpoint() -> dict:
    """Return the content of a last.pt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    group = dict(params=[0], param_names=['transformer.wte.weight'], lr=1.0)
    return dict(
        kind='mha',
        model_args=native.model_args(model),
        model=model.state_dict(),
        step=7,
        best_val_loss=1.5,
        best_step=3,
        seconds=2.5,
        meta=dict(tokenizer='char', chars='abcdefgh', source='letters'),
        config=dict(dataset='letters', batch_size=2),
        optimizers=[dict(state={0: dict(exp_avg=torch.zeros(8, 4))}, param_groups=[group])],
        scaler={},
        average=None,
    )


TENSORS = st.sampled_from(
    [torch.zeros(0), torch.zeros(3), torch.ones(8, 4, dtype=torch.int64), torch.zeros(1).expand(9)]
)
PLACES = st.one_of(
    st.sampled_from([[name] for name in a_checkpoint()]),
    st.sampled_from([['model_args', name] for name in a_checkpoint()['model_args']]),
    st.sampled_from([['model', name] for name in a_checkpoint()['model']]),
    st.sampled_from([['meta', 'chars'], ['meta', 'tokenizer'], ['config', 'dataset']]),
    st.sampled_from([['optimizers', 0, 'state'], ['optimizers', 0, 'param_groups', 0, 'params']]),
    st.sampled_from([['surprise'], ['model', 'surprise'], ['model_args', 7]]),
)
REMOVED = object()
CHANGES = st.lists(
    st.tuples(PLACES, st.one_of(VALUES, TENSORS, st.just(REMOVED))), min_size=1, max_size=2
)


def changed_checkpoint(changes: list) -> dict:
    content = copy.deepcopy(a_checkpoint())
    for place, value in changes:
        table = content
        try:
            for name in place[:-1]:
                table = table[name]
            if value is REMOVED:
                table.pop(place[-1], None)
            else:
                table[place[-1]] = value
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError):
            continue  # an earlier change has taken the place away
    return content


def check_checkpoint(changes: list, folder: Path) -> None:
    """Load a checkpoint of odd content as scripts do: a model that runs, or one line."""
    path = folder / 'ckpt.pt'
    torch.save(changed_checkpoint(changes), path)
    try:
        loaded = load_model(path)
        codec = codec_of(loaded)
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 1000
        return
    assert loaded.step >= 0
    assert codec.tokenizer.vocab_size > 0
    with torch.no_grad():
        assert loaded.model(torch.zeros(1, 2, dtype=torch.long)).shape[-1] > 0


# -------------------------------------------------------------------------------------------------
# changed and missing bytes


def make_checkpoints(folder: Path) -> list[Path]:
    native.save(folder / 'last.pt', a_checkpoint())
    return [folder / 'last.pt']


def make_tokens(folder: Path) -> list[Path]:
    written_dataset(folder)
    return [folder / 'train.bin', folder / 'val.bin']


def make_hugging_face(folder: Path) -> list[Path]:
    """Write a tiny Llama in the Hugging Face layout."""
    from nanomla.checkpoints.export import export

    config = GPTConfig(**SHAPE, pos='rope', norm='rmsnorm', act='swiglu', bias=False)
    export(GPT(config), folder / 'llama')
    return sorted((folder / 'llama').iterdir())


def make_tensors(folder: Path) -> list[Path]:
    """Write the weights of an export, in two files."""
    from nanomla.checkpoints.export import export

    config = GPTConfig(**SHAPE, pos='rope', norm='rmsnorm', act='swiglu', bias=False)
    export(GPT(config), folder / 'llama', max_shard_size=400)
    return sorted((folder / 'llama').glob('*.safetensors'))[:2]


def make_results(folder: Path) -> list[Path]:
    results = made_up(dict(mha=[1.0, 1.1, 1.2], mla=[0.9, 1.0, 1.1]))
    contenders = [dict(event='contender') | about for about in results.contenders.values()]
    (folder / 'results.jsonl').write_text(jsonl([results.head, *contenders, *results.runs]))
    return [folder / 'results.jsonl']


def check_damage(path: Path, rng: random.Random, read: Callable, noticed: bool) -> None:
    """
    Damage a file, read it, and put it back.

    noticed: whether every change has to be an error of one line; else it may be read, too
    """
    whole = path.read_bytes()
    (damage,) = damages(len(whole), 1, rng)
    path.write_bytes(damaged(whole, *damage))
    try:
        read(path)
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 1000
    else:
        assert not noticed, f'{path.name}: {damage} was not noticed'
    finally:
        path.write_bytes(whole)


def read_results(path: Path) -> None:
    table(read(path))


# Kind of file -> its share, what writes it, and what reads a damaged one.
CORRUPTIBLE = {
    'checkpoints': (0.4, make_checkpoints, partial(check_damage, read=native.load, noticed=True)),
    'tokens': (
        0.3,
        make_tokens,
        partial(check_damage, read=lambda path: read_dataset(path.parent), noticed=True),
    ),
    'weights of exports': (
        0.1,
        make_tensors,
        partial(check_damage, read=tensors_in, noticed=True),
    ),
    'models of the Hugging Face layout': (
        0.1,
        make_hugging_face,
        partial(check_damage, read=lambda path: load_model(path.parent), noticed=False),
    ),
    'results of a comparison': (
        0.1,
        make_results,
        partial(check_damage, read=read_results, noticed=False),
    ),
}
