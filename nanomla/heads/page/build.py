"""
One HTML file on the attention heads of some models, which any browser opens by a double click.

    head_page.write("heads.html", report)

The page, in page/, is written by hand: heads.html with its style and scripts, put together here into one
file that loads nothing from anywhere. `report` travels inside it as JSON. `?` marks what may be missing or None.

    models: a list of
        name, kind ('MHA', 'GQA', 'MQA', 'MLA'), params, step?, tokens?, val_loss?, source, trained (bool)
        layers, heads, tokens_text (T texts: the sequence on show)
        patterns_u8: pack_patterns(A), A being the attention of every head, in layer-major order
        scores: one dict a head: layer, head, label ('induction', 'previous', 'current', 'duplicate', 'first',
            'positional' or ''); under each of 'induction', 'previous', 'current', 'duplicate' and 'first'?
            a dict of score, null?, control?, gap?, low?, high?; on_text? likewise, for induction on held-out text; copying?, effective_copying?; zero_ablation?, mean_ablation?,
            pattern_ablation? (nats of loss that they add)
        loss_by_position?: x, repeated, control (nats); icl_score? (nats), icl_positions? (early, late);
        group_ablation? (any small dict)
        composition?: a list of from [layer, head], to [layer, head], kind ('Q', 'K', 'V'), value
        mla_split?: heads [[layer, head], ...], content_f16, rope_f16: pack_logits of the two parts of the
            scaled logits of those heads. A head of 128 tokens takes 44 kB, its pattern 11 kB.
    checkpoints?: a list of name, tokens, step, max_induction?, scores? [checkpoint][layer][head], icl?, repeat_loss?
    made: command, commit, date

Letters: H heads, T tokens.
"""

import base64
import contextlib
import json
import math
import os
import re

from nanomla.core.configurator import UserError
from nanomla.core.figures import COLORS

FOLDER = os.path.dirname(os.path.abspath(__file__))
KINDS = ('mha', 'gqa', 'mqa', 'mla')
# Words that a reader may search for to see that nothing is loaded. Where a token, a path or a stretch of base64
# spells one, its marked letter is written as JSON's \uXXXX: neither letter can end or begin an escape of its own.
MARKED = re.compile(r'(?P<before>ht(?=tp)|src(?==)|fe(?=tch))(?P<letter>.)', re.IGNORECASE)


def pack_patterns(patterns):
    """
    Attention (H, T, T) as base64 of round(255 A): each head's lower triangle, row by row, so that row q has
    q + 1 bytes and a head T (T + 1) / 2. Takes a numpy array or a CPU tensor with values in [0, 1].
    """
    import numpy as np

    rows = _triangles(patterns)
    assert rows.size == 0 or (rows.min() >= -1e-3 and rows.max() <= 1 + 1e-3), (
        'attention lies in [0, 1]'
    )
    return base64.b64encode(np.rint(255 * rows.clip(0, 1)).astype(np.uint8).tobytes()).decode(
        'ascii'
    )


def pack_logits(logits):
    """Logits (H, T, T) as base64 of little-endian float16, in pack_patterns' order."""
    return base64.b64encode(_triangles(logits).astype('<f2').tobytes()).decode('ascii')


def _triangles(values):
    """The lower triangles (H, T (T + 1) / 2) of (H, T, T), as float32."""
    import numpy as np

    values = np.asarray(values, dtype=np.float32)
    assert values.ndim == 3 and values.shape[1] == values.shape[2], f'(H, T, T), not {values.shape}'
    return values[:, *np.tril_indices(values.shape[1])]


def _check(model):
    """A model's sizes agree. Only a programmer can get this wrong."""
    triangle = len(model['tokens_text']) * (len(model['tokens_text']) + 1) // 2
    split = model.get('mla_split')
    packed = [('patterns_u8', model['patterns_u8'], model['layers'] * model['heads'])]
    packed += [
        (key, split[key], 2 * len(split['heads'])) for key in ('content_f16', 'rope_f16') if split
    ]
    for key, text, count in packed:
        size = len(text) // 4 * 3 - text[-2:].count('=')
        assert size == count * triangle, (
            f'{model["name"]}: {key} holds {size} bytes, not {count * triangle}'
        )


def _plain(value):
    """`value` as JSON knows it: NaN and infinities as None, six digits of a number, arrays of numpy and torch as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f'{value:.6g}') if math.isfinite(value) else None
    return _plain(value.tolist()) if hasattr(value, 'tolist') else value


def embed(report):
    """
    `report` as JSON that may stand in an HTML <script>: ASCII, without <, > and &, and without the words
    that would look like a page that loads something. JSON.parse and json.loads give back the same
    values, floats to six digits.
    """
    text = json.dumps(_plain(report), ensure_ascii=True, allow_nan=False, separators=(',', ':'))
    for letter in '<>&':
        text = text.replace(letter, f'\\u{ord(letter):04x}')
    return MARKED.sub(lambda found: f'{found["before"]}\\u{ord(found["letter"]):04x}', text)


def page(report):
    """The whole page as text: page/heads.html with every {{name}} replaced, once, by what it names."""
    for model in report['models']:
        _check(model)

    def part(found):
        name = found[1]
        if name == 'report':
            return embed(report)
        if name == 'colors':  # one source for the colours of the attention kinds
            return ':root { ' + ' '.join(f'--{kind}: {COLORS[kind]};' for kind in KINDS) + ' }'
        with open(os.path.join(FOLDER, name), encoding='utf-8') as file:
            return file.read().rstrip()

    try:
        with open(os.path.join(FOLDER, 'heads.html'), encoding='utf-8') as file:
            return re.sub(r'\{\{([\w.]+)\}\}', part, file.read())
    except OSError as error:
        raise UserError(
            f'{error.filename}: cannot read this part of the page ({error.strerror}); is the checkout whole?'
        ) from error


def write(path, report):
    """
    Write the page of `report` to `path`, whole or not at all: under a temporary name, then renamed.
    UserError when it cannot be written.
    """
    path = os.fspath(path)
    text = page(report)
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'w', encoding='utf-8', newline='\n') as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path}: cannot write the page ({error.strerror or error})') from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
