"""
One HTML file on the attention heads of some models, which any browser opens by a double click.

    build.write('heads.html', report)

The page is written by hand: heads.html with its style and scripts, put together here into one file
that loads nothing from anywhere. `report` travels inside it as JSON. `?` marks what may be missing
or None.

    models: a list of
        name, kind ('MHA', 'GQA', 'MQA', 'MLA', ...), params, step?, tokens?, val_loss?, source,
        trained (bool), layers, heads, tokens_text (T texts: the sequence on the page)
        patterns_u8: pack_patterns(A), A being the attention of every head, in layer-major order
        scores: one dict a head: layer, head, label (of names.LABELS, or '') and the keys of
            names.SCORES; those of names.FAMILIES are a dict of score, null?, control?, gap?, low?,
            high?, others a number
        loss_by_position?: x, repeated, control (nats)
        icl_score? (nats), icl_positions? (early, late)
        group_ablation?: costs of groups of heads (names.group_tables reads its keys)
        warnings?: a list of sentences
        composition?: a list of from [layer, head], to [layer, head], kind ('Q', 'K', 'V'), value
        mla_split?: heads [[layer, head], ...], content_f16, rope_f16: pack_logits of the two parts
            of the scaled logits of those heads. A head of 128 tokens takes 44 kB, its pattern 11 kB
    checkpoints?: a list of name, tokens, step, the keys of names.CURVES?, and gaps? and scores?
        [checkpoint][layer][head]
    made: command, commit, date

Labels, scores and headings travel with the report from names.py: no script repeats them.

Letters: H heads, T tokens.
"""

import base64
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from nanomla.core.configurator import UserError
from nanomla.core.figures import COLORS
from nanomla.core.files import write_file
from nanomla.heads.page import names

FOLDER = Path(__file__).parent
COLORED_KINDS = ('mha', 'gqa', 'mqa', 'mla')
# Words that a reader may search for to see that nothing is loaded. Where a token, a path or a
# stretch of base64 spells one, its marked letter is written as JSON's \uXXXX: neither letter can
# end or begin an escape of its own.
MARKED = re.compile(r'(?P<before>ht(?=tp)|src(?==)|fe(?=tch))(?P<letter>.)', re.IGNORECASE)


# -------------------------------------------------------------------------------------------------
# numbers as text


def pack_patterns(patterns) -> str:
    """
    Return attention (H, T, T) as base64 of round(255 A): each head's lower triangle, row by row, so
    that row q has q + 1 bytes and a head T (T + 1) / 2.

    Takes a numpy array or a CPU tensor with values in [0, 1].
    """
    rows = lower_triangles(patterns)
    if rows.size:
        assert rows.min() >= -1e-3 and rows.max() <= 1 + 1e-3, 'attention lies in [0, 1]'
    levels = np.rint(255 * rows.clip(0, 1)).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode('ascii')


def pack_logits(logits) -> str:
    """Return logits (H, T, T) as base64 of little-endian float16, in pack_patterns' order."""
    halves = lower_triangles(logits).astype('<f2')
    return base64.b64encode(halves.tobytes()).decode('ascii')


def lower_triangles(values) -> np.ndarray:
    """Return the lower triangles (H, T (T + 1) / 2) of (H, T, T), as float32."""
    values = np.asarray(values, dtype=np.float32)
    assert values.ndim == 3 and values.shape[1] == values.shape[2], f'(H, T, T), not {values.shape}'
    return values[:, *np.tril_indices(values.shape[1])]


def check_sizes(model: dict) -> None:
    """Assert that the sizes of a model's entry agree."""
    T = len(model['tokens_text'])
    triangle = T * (T + 1) // 2
    heads = model['layers'] * model['heads']
    expected = {'patterns_u8': (model['patterns_u8'], heads * triangle)}
    split = model.get('mla_split')
    if split:
        for key in ('content_f16', 'rope_f16'):
            expected[key] = split[key], 2 * len(split['heads']) * triangle
    for key, (text, size) in expected.items():
        found = len(text) // 4 * 3 - text[-2:].count('=')
        assert found == size, f'{model["name"]}: {key} holds {found} bytes, not {size}'


def plain(value):
    """
    Return `value` as JSON knows it: NaN and infinities as None, six digits of a number, arrays of
    numpy and torch as lists.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f'{value:.6g}') if math.isfinite(value) else None
    if isinstance(value, (str, int)) or value is None:
        return value
    return plain(value.tolist())


def embed(report: dict) -> str:
    """
    Return `report` as JSON that may stand in an HTML <script>: ASCII, without <, > and &, and
    without the words that would look like a page that loads something.

    JSON.parse and json.loads give back the same values, floats to six digits.
    """
    text = json.dumps(plain(report), ensure_ascii=True, allow_nan=False, separators=(',', ':'))
    for letter in '<>&':
        text = text.replace(letter, f'\\u{ord(letter):04x}')

    def escape(found):
        return f'{found["before"]}\\u{ord(found["letter"]):04x}'

    return MARKED.sub(escape, text)


# -------------------------------------------------------------------------------------------------
# the page


def page(report: dict) -> str:
    """Return the page: heads.html with every {{name}} replaced, once, by what it names."""
    for model in report['models']:
        check_sizes(model)
    models = [for_page(model) for model in report['models']]
    data = report | dict(models=models, names=names.for_page(models))
    texts = dict(report=embed(data), colors=colors())

    def part(found):
        name = found[1]
        return texts[name] if name in texts else read_part(name).rstrip()

    return re.sub(r'\{\{([\w.]+)\}\}', part, read_part('heads.html'))


def for_page(model: dict) -> dict:
    """Return a `models` entry with its costs of groups as tables in words."""
    return model | dict(groups=names.group_tables(model.get('group_ablation') or {}))


def colors() -> str:
    """Return the colours of the attention kinds as CSS: those of the figures."""
    variables = [f'--{kind}: {COLORS[kind]};' for kind in COLORED_KINDS]
    return f':root {{ {" ".join(variables)} }}'


def read_part(name: str) -> str:
    """Return a part of the page; UserError where it cannot be read."""
    path = FOLDER / name
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise UserError(
            f'{path}: cannot read this part of the page ({error.strerror}); is the checkout whole?'
        ) from error


def write(path: str | os.PathLike, report: dict) -> None:
    """Write the page of `report`, whole or not at all. UserError when it cannot be written."""
    write_file(path, page(report))
