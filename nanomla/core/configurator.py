"""Settings from config files and --key=value: parsed with ast, never executed.

A script opens with its settings as a page of plain assignments and then hands them over:

    batch_size = 12  # sequences in a micro-batch
    config = configure(globals())

    $ python train.py config/x.py --batch_size=32 --compile=False    # left to right, later wins

The page is read from the script's source, so a setting's type is the type of its default, and --help
shows its comment. A config file holds `name = literal`, where arithmetic on literals and on other
settings is fine, and may hold `on_cpu = dict(name=literal, ...)`: values for a machine without a GPU.
A setting whose default is a list or a table takes lists and tables of such values, in any depth.
"""

import ast
import difflib
import glob
import io
import operator
import os
import re
import sys
import textwrap
import tokenize
from collections import OrderedDict

TAKES = {
    int: 'a whole number (int)',
    float: 'a number (float)',
    bool: 'True or False (bool)',
    str: 'quoted text (str)',
    list: 'a list, [...]',
    dict: 'a table, dict(name=value, ...)',
}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
UNPARSABLE = (
    SyntaxError,
    ValueError,
    RecursionError,
    MemoryError,
)  # what ast.parse makes of odd text


class UserError(ValueError):
    """What a person can get wrong, in one line: what, where, what to do. Ends a script with code 2."""

    def __init__(self, message):
        super().__init__(_one_line(message))


class Settings(dict):
    """The final value of every setting, by name. Pickled or copied it is a plain (ordered) dict.

    given: name -> where it was set, 'config/x.py:7' or '--batch_size=8'; a default is not in it
    files: the config files that were read, in order
    """

    def __init__(self, defaults, script):
        super().__init__(defaults)
        self.given, self.files = {}, []
        self._defaults, self._script = dict(defaults), script
        self._on_cpu = {}  # name -> (value, where)

    def __reduce__(self):
        # The script's globals have no place in a checkpoint; of all dicts built by a call, OrderedDict is
        # the one that torch.load(weights_only=True) takes.
        return OrderedDict, (dict(self),)

    def apply_on_cpu(self):
        """For when the device turns out to be the CPU: puts the on_cpu values of the config files into
        the settings and into the script's globals, and returns them. Command-line keys stay as they are."""
        for name, (value, where) in self._on_cpu.items():
            self[name] = self._script[name] = value
            self.given[name] = where
        return {name: value for name, (value, _) in self._on_cpu.items()}

    def checked(self, name, value, where):
        """`value` in the type of the setting `name`; UserError, with `where` it was found, when it has another or the setting does not exist."""
        _check_name(self, name, where)
        return _check_type(self, name, value, where)

    def echo(self):
        """The settings that differ from the script's defaults, one `name = value  (where)` a line."""
        return (
            '\n'.join(
                f'{name} = {self[name]!r}  ({_short(self.given.get(name, "the script"))})'
                for name, default in self._defaults.items()
                if self[name] != default
            )
            or '(every setting has its default value)'
        )


def configure(settings, argv=None, also=None):
    """Reads config files and --key=value into a script's settings.

    settings: the script's globals(); the final values are written back into it
    also:     a script in the same folder whose page of settings is this script's, too ('train.py'); the
              script's own defaults come first
    argv:     the arguments, sys.argv[1:] if None; --help or -h among them prints the settings and exits
    Returns Settings. Raises UserError, and sees to it that one which reaches the top, from here or from
    anywhere later, ends the script with one line and exit code 2.
    """
    assert '__file__' in settings, (
        'settings are read from the source of a script: pass its globals()'
    )
    sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else list(argv)
    page, purpose = _read_page(settings['__file__'])
    if also:
        borrowed, _ = _read_page(
            os.path.join(os.path.dirname(os.path.abspath(settings['__file__'])), also)
        )
        page |= {name: entry for name, entry in borrowed.items() if name not in page}
    config = Settings({name: default for name, (default, _, _) in page.items()}, settings)
    wants_help, problem = '-h' in argv or '--help' in argv, None
    try:
        for arg, following in zip(argv, argv[1:] + ['']):
            if arg in ('-h', '--help'):
                continue
            elif arg.startswith('--'):
                _read_argument(config, arg, following)
            else:
                _read_file(config, arg)
    except UserError as error:
        if not wants_help:
            raise
        problem = error
    for arg in argv:  # a key on the command line beats on_cpu, wherever it stands
        if arg.startswith('--'):
            config._on_cpu.pop(arg[2:].partition('=')[0], None)
    if wants_help:
        _print_help(config, page, purpose, problem)
        raise SystemExit(0)
    settings.update(config)
    return config


def _excepthook(kind, error, trace):
    if issubclass(kind, UserError):
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(2)  # CPython honours SystemExit from the hook and prints nothing more
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        raise SystemExit(130)
    if issubclass(kind, BrokenPipeError):  # the reader, such as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    sys.__excepthook__(kind, error, trace)


# ---- the script's page of settings ----


def _read_page(path):
    """-> {name: (default, comment, heading)} in the page's order, and the docstring's first paragraph."""
    with tokenize.open(path) as file:
        source = file.read()
    tree, lines = ast.parse(source), [''] + source.split('\n')  # lines[1] is the first
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        t.start[0]: t.string.lstrip('#').strip() for t in tokens if t.type == tokenize.COMMENT
    }
    page, heading = {}, ''
    for node in tree.body:
        calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
        if calls & {'configure', 'configurator.configure'}:
            break
        if not (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id[0] != '_'
        ):
            continue
        try:
            default = _evaluate_nested(node.value, {})
        except ValueError:  # not a literal: the script's own business
            continue
        row, above = node.lineno - 1, []
        while row > 0 and not lines[row].strip():
            row -= 1
        while row in comments and lines[row][0] == '#':
            above.insert(0, comments[row].strip('-= '))
            row -= 1
        heading = '\n'.join(filter(None, above)) or heading
        row, comment = node.end_lineno + 1, [comments.get(node.end_lineno, '')]
        while row in comments and lines[row][0].isspace() and lines[row].lstrip()[0] == '#':
            comment.append(comments[row])  # an indented comment goes on with the one above it
            row += 1
        page[node.targets[0].id] = default, ' '.join(comment).strip(), heading
    return page, (ast.get_docstring(tree) or '').partition('\n\n')[0]


def _print_help(config, page, purpose, problem):
    script = os.path.basename(config._script['__file__'])
    print(
        f'usage: python {script} [config/x.py ...] [--key=value ...]    (left to right, later wins)'
    )
    if purpose:
        print('\n' + textwrap.fill(purpose, 100))
    keys = {name: f'  --{name}={default!r}' for name, (default, _, _) in page.items()}
    margin = min(40, max(map(len, keys.values()), default=0)) + 2  # where the comments begin
    shown = None
    for name, (default, comment, heading) in page.items():
        if heading != shown:
            print('\n' + '\n'.join(textwrap.fill(line, 100) for line in heading.split('\n')))
            shown = heading
        notes = textwrap.wrap(comment, 100 - margin)
        if config[name] != default:
            notes += textwrap.wrap(
                f'now {config[name]!r}  ({_short(config.given[name])})', 100 - margin
            )
        if len(keys[name]) + 2 > margin:  # too long for its column: lines of its own
            print(textwrap.fill(keys[name], 100, subsequent_indent='    '))
        else:
            print((keys[name].ljust(margin) + (notes.pop(0) if notes else '')).rstrip())
        for line in notes:
            print(' ' * margin + line)
    if problem:
        print('\n' + textwrap.fill(f'error: {problem}', 100))


# ---- what a person gives ----


def _read_argument(config, arg, following):
    """One --key=value; `following` is the argument after it, for when `--key value` was written."""
    name, equals, text = arg[2:].partition('=')
    _check_name(config, name, _short(arg), '--')
    kind = type(config[name])
    if not equals:
        if kind is bool and following.lower() not in ('true', 'false'):
            following = 'True'
        elif not following or following.startswith('--'):
            following = str(config[name])
        raise UserError(f'{arg}: the value is missing; write {arg}={_short(following)}')
    value = text
    if kind is bool:
        value = {'True': True, 'true': True, 'False': False, 'false': False}.get(text.strip(), text)
    elif kind is not str:
        try:
            evaluate = _evaluate_nested if kind in (list, dict) else _evaluate
            value = evaluate(ast.parse(text.strip(), mode='eval').body, {})
        except UNPARSABLE:
            pass  # stays text, which is no number
        words = text.replace(' ', '')
        words = words[1:-1] if words[:1] + words[-1:] == '[]' else words
        if kind is list and value is text and re.fullmatch(r'[A-Za-z]\w*(,[A-Za-z]\w*)*', words):
            value = words.split(',')  # --only=mha,mla: a shell takes quotes away
    config[name] = _check_type(config, name, value, _short(arg))
    config.given[name] = arg


def _read_file(config, path):
    """One config file, top to bottom. Its on_cpu values replace those of earlier files."""
    source = _read_source(path, os.path.dirname(os.path.abspath(config._script['__file__'])))
    try:
        tree = ast.parse(source)
    except UNPARSABLE as error:
        line, why = (
            getattr(error, 'lineno', None) or 1,
            getattr(error, 'msg', None) or 'not Python text',
        )
        raise UserError(
            f'{path}:{line}: syntax error, {why}; write `name = literal` lines'
        ) from None
    config.files.append(path)
    on_cpu = {}
    for node in tree.body:
        where = f'{path}:{node.lineno}'
        match node:
            case ast.Expr(value=ast.Constant(value=str())) if node is tree.body[0]:
                pass  # the docstring
            case ast.Assign(targets=[ast.Name(id='on_cpu')], value=table):
                for name, value in [(None, table)] if (pairs := _pairs(table)) is None else pairs:
                    where = f'{path}:{value.lineno}'
                    if not isinstance(name, str):
                        raise UserError(f'{where}: write on_cpu = dict(name=literal, ...)')
                    on_cpu[name] = _file_value(config, name, value, source, where), where
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                config[name] = _file_value(config, name, value, source, where)
                config.given[name] = where
                config._on_cpu.pop(name, None)  # an earlier file's
            case _:
                raise UserError(
                    f'{where}: {_quote(source, node)} cannot stand in a config file; it is not '
                    'executed and holds only `name = literal` lines'
                )
    config._on_cpu.update(on_cpu)


def _read_source(path, home):
    """-> the text of a config file. home: the script's folder, whose config/ offers names near a wrong one."""
    try:
        with open(path, 'rb') as file:
            data = file.read()
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise UserError(f'{path}:{line}: not UTF-8 text; save the config file as UTF-8') from None
    except IsADirectoryError:
        raise UserError(f'{path}: is a directory; name a config file in it') from None
    except (FileNotFoundError, NotADirectoryError):
        hint = 'check the path'
    except (OSError, ValueError) as error:
        why = getattr(error, 'strerror', None) or error
        raise UserError(
            f'{_short(path)}: cannot be read as a config file: {why}; check the path'
        ) from None
    if pair := re.fullmatch(r'-?([\w-]+)=(.*)', path, re.DOTALL):
        hint = f'to set a value write --{pair[1].replace("-", "_")}={_short(pair[2])}'
    else:
        folder = 'config' if os.path.isdir('config') else os.path.join(home, 'config')
        files = {
            os.path.basename(p)[:-3]: p for p in sorted(glob.glob(glob.escape(folder) + '/*.py'))
        }
        word = os.path.basename(path).removesuffix('.py')
        near = _nearest(word, files, 3) or [stem for stem in files if word and word in stem][:3]
        if near:
            hint = 'did you mean ' + ' or '.join(files[stem] for stem in near) + '?'
    raise UserError(f'{_short(path)}: no such config file; {hint}')


def _file_value(config, name, node, source, where):
    """-> the value of `name = node` in a config file, its name and type checked."""
    _check_name(config, name, where)
    try:
        value = (_evaluate_nested if type(config[name]) in (list, dict) else _evaluate)(
            node, config
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: {name} = {_quote(source, node)}: {error}') from None
    return _check_type(config, name, value, where)


def _check_name(config, name, where, dashes=''):
    if name not in config:
        near = _nearest(name.replace('-', '_'), config)
        hint = f'did you mean {dashes}{near[0]}?' if near else '--help lists the settings'
        raise UserError(f'{where}: unknown setting {_short(name)!r}; {hint}')


def _check_type(config, name, value, where):
    """-> value in the type of the setting's default: a whole number is a fine float, nothing else bends."""
    kind = type(config[name])
    if type(value) is int and kind is float:
        return float(value)
    if type(value) is not kind:
        given = f'{_short(repr(value))} ({type(value).__name__})'
        raise UserError(f'{where}: {name} takes {TAKES[kind]}, not {given}')
    return value


def _evaluate(node, names):
    """The value of a literal, of one of `names`, or of arithmetic on them. ValueError: it is none of these."""
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        hint = ''.join(f'; did you mean {near}?' for near in _nearest(node.id, names))
        raise ValueError(f'{node.id} is not a setting{hint}')
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, (ast.UnaryOp, ast.BinOp)) and type(node.op) in ARITHMETIC:
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        numbers = [_evaluate(part, names) for part in parts]
        if not all(type(x) in (int, float) for x in numbers):
            raise ValueError('arithmetic takes numbers')
        power = isinstance(node.op, ast.Pow) and type(numbers[0]) is int
        if power and numbers[0].bit_length() * numbers[1] > 1024:  # 9**9**9 would take all day
            raise ValueError('the number is too large')
        try:
            value = ARITHMETIC[type(node.op)](*numbers)
        except ArithmeticError as error:
            raise ValueError(error.args[-1]) from None
    else:
        value = None
    if type(value) not in TAKES:  # a call, a list, None, a complex number ...
        raise ValueError('a value is a literal or arithmetic on literals')
    if type(value) in (int, float) and abs(value) > sys.float_info.max:
        raise ValueError('the number is too large')
    return value


def _pairs(table):
    """dict(name=value, ...) or {key: value, ...} as (key, value's node) pairs; a key that is no text is None. None: it is no table."""
    match table:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=pairs):
            return [(pair.arg, pair.value) for pair in pairs]
        case ast.Dict(keys=keys, values=values):
            keys = [getattr(key, 'value', None) for key in keys]
            return [
                (key if isinstance(key, str) else None, value) for key, value in zip(keys, values)
            ]


def _evaluate_nested(node, names):
    """Like _evaluate; also lists of such values, and tables of them with texts as keys."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate_nested(item, names) for item in node.elts]
    if (pairs := _pairs(node)) is None:
        return _evaluate(node, names)
    if None in (keys := [key for key, _ in pairs]) or len(set(keys)) < len(keys):
        raise ValueError('a table has texts as keys, each once: dict(name=value, ...)')
    return {key: _evaluate_nested(value, names) for key, value in pairs}


# ---- words ----


def _nearest(word, names, n=1):
    lower = {name.lower(): name for name in names}
    return [lower[match] for match in difflib.get_close_matches(word.lower(), lower, n)]


def _one_line(text):
    return ' '.join(filter(None, (line.strip() for line in str(text).splitlines())))


def _short(text, limit=80):
    text = _one_line(text)
    return text if len(text) <= limit else text[: limit - 3] + '...'


def _quote(source, node):
    return f'`{_short(ast.get_source_segment(source, node) or "", 60)}`'
