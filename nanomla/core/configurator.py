"""
Settings from config files and --key=value: parsed with ast, never executed.

A script opens with its settings as a page of plain assignments and then hands them over:

    batch_size = 12  # sequences in a micro-batch
    config = configure(globals())

    $ python train.py config/x.py --batch_size=32 --compile=False    # left to right, later wins

The page is read from the script's source: a setting's type is the type of its default, and --help
shows its comment. The page ends at the first function or class, or at the call of configure, which
may stand in main(). A comment that does not fit beside the value may go on below it:

    path = (  # a file of your own, plain or packed;
        ''  # '' downloads the text
    )

With configure(globals(), classes='attentions') the fields of config classes in that folder, such as
`groups: int = 2  # ...` of a `class MineConfig(GPTConfig)`, are settings as well.

A config file holds `name = literal`, where arithmetic on literals and on other settings is fine,
and may hold `on_cpu = dict(name=literal, ...)`: values for a machine without a GPU. A setting whose
default is a list or a table takes lists and tables of such values, in any depth.
"""

import ast
import atexit
import contextlib
import difflib
import errno
import functools
import glob
import io
import operator
import os
import re
import sys
import textwrap
import tokenize
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
TRUTH = {'True': True, 'true': True, 'False': False, 'false': False}
# What ast.parse raises for odd text.
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
WIDTH = 100  # columns of --help


class UserError(ValueError):
    """What a person can get wrong: one line with what, where and what to do. Exit code 2."""

    exit_code = 2

    def __init__(self, message):
        super().__init__(_one_line(message))


class RunError(UserError):
    """What ends a run that was under way, such as a disk that is full. Exit code 1."""

    exit_code = 1


class Settings(dict):
    """
    The final value of every setting, by name. Pickled or copied it is a plain (ordered) dict.

    given: name -> where it was set, 'config/x.py:7' or '--batch_size=8'; a default is not in it
    files: the config files that were read, in order
    """

    def __init__(self, defaults: dict, script: dict):
        super().__init__(defaults)
        self.given = {}
        self.files = []
        self._defaults = dict(defaults)
        self._script = script
        self._on_cpu = {}  # name -> (value, where)
        self._adopted = {}  # name -> where

    def __reduce__(self):
        # The script's globals have no place in a checkpoint. Of all dicts that a call builds,
        # OrderedDict is the one that torch.load(weights_only=True) accepts.
        return OrderedDict, (dict(self),)

    def apply_on_cpu(self) -> dict:
        """
        Put the on_cpu values of the config files into the settings and the script's globals.

        For when the device turns out to be the CPU. What the command line sets stays. Returns the
        values that were put.
        """
        for name, (value, where) in self._on_cpu.items():
            self[name] = self._script[name] = value
            self.given[name] = where
        return {name: value for name, (value, _) in self._on_cpu.items()}

    def adopt(self, values: Mapping, where: str, but: Collection[str] = ()) -> None:
        """
        Give every setting that was not set its value in `values`, the settings of an earlier run.

        where: the file that they are from. but: settings that stay. Names in `values` that are no
        settings here are passed over. UserError for a value of another type.
        """
        for name in self:
            if name in values and name not in but and name not in self.given:
                value = _check_type(self, name, values[name], where)
                self[name] = self._script[name] = value
                self._adopted[name] = where

    def adopted(self, name: str) -> bool:
        """Return whether a setting has its value from the settings of an earlier run."""
        return name in self._adopted

    def differences(self, values: Mapping, but: Collection[str] = ()) -> str:
        """Return the settings that differ from `values`, as 'name=value (was other), ...'."""
        changes = []
        for name, value in self.items():
            if name in values and name not in but and values[name] != value:
                changes.append(f'{name}={value!r} (was {values[name]!r})')
        return ', '.join(changes)

    def checked(self, name: str, value, where: str):
        """
        Return `value` in the type of the setting `name`.

        UserError, which says `where`, when there is no such setting or the type does not fit.
        """
        _check_name(self, name, where)
        return _check_type(self, name, value, where)

    def echo(self) -> str:
        """Return the settings that are not at their default, a `name = value  (where)` a line."""
        lines = []
        for name, default in self._defaults.items():
            if self[name] != default:
                where = self.given.get(name) or self._adopted.get(name, 'the script')
                lines.append(f'{name} = {self[name]!r}  ({_short(where)})')
        return '\n'.join(lines) or '(every setting has its default value)'


def configure(
    settings: dict,
    argv: Sequence[str] | None = None,
    also: str | None = None,
    classes: str | None = None,
    takes: str = '[config/x.py ...]',
) -> Settings:
    """
    Read config files and --key=value into a script's settings.

    settings: the script's globals(); the final values are written back into it
    argv:     the arguments, sys.argv[1:] if None; --help or -h prints the settings and exits
    also:     a script in the same folder whose settings this script has, too ('train.py'); where
              both have one, its default is this script's
    classes:  a folder beside the script, of whose files the new fields of config classes are
              settings, too
    takes:    what the usage line of --help has between the script and [--key=value ...]

    Raises UserError. From here on, a UserError that nobody catches ends the script with one line on
    stderr and exit code 2, a RunError and what the machine lacks with one line and exit code 1, and
    a character that the output cannot show is printed as its escape.
    """
    assert '__file__' in settings, 'settings are read from a script: pass its globals()'
    sys.excepthook = _excepthook
    _prepare_output()
    argv = sys.argv[1:] if argv is None else list(argv)
    page, purpose = _read_page(settings['__file__'])
    folder = os.path.dirname(os.path.abspath(settings['__file__']))
    if also:
        borrowed, _ = _read_page(os.path.join(folder, also))
        page |= {name: setting for name, setting in borrowed.items() if name not in page}
    if classes:
        page |= _read_classes(os.path.join(folder, classes), page)
    config = Settings({name: setting.default for name, setting in page.items()}, settings)
    if '-h' in argv or '--help' in argv:
        try:
            _read_arguments(config, [arg for arg in argv if arg not in ('-h', '--help')])
            problem = None
        except UserError as error:  # help comes all the same
            problem = error
        _print_help(config, page, purpose, takes, problem)
        raise SystemExit(0)
    _read_arguments(config, argv)
    settings.update(config)
    return config


def _read_arguments(config: Settings, argv: Sequence[str]) -> None:
    for arg, following in zip(argv, [*argv[1:], '']):
        if arg.startswith('--'):
            _read_argument(config, arg, following)
        else:
            _read_file(config, arg)
    # A key on the command line beats on_cpu, also where a config file follows it.
    for arg in argv:
        if arg.startswith('--'):
            config._on_cpu.pop(arg[2:].partition('=')[0], None)


def _excepthook(kind, error, trace):
    """End the script: CPython takes its exit code from a SystemExit and prints nothing more."""
    if issubclass(kind, UserError):
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(error.exit_code)
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        raise SystemExit(130)
    if issubclass(kind, BrokenPipeError):  # the reader, such as `| head`, has seen enough
        discard(sys.stdout)
        raise SystemExit(0)
    if reason := machine_failure(error):
        if isinstance(error, OSError):
            discard(sys.stdout)  # what it still holds cannot be written either
        print(f'error: {reason}', file=sys.stderr)
        raise SystemExit(1)
    sys.__excepthook__(kind, error, trace)


# -------------------------------------------------------------------------------------------------
# what the machine lacks, and where the output cannot go

# Of torch, whose errors are RuntimeErrors.
TOO_LARGE = re.compile(
    r"can't allocate memory|out of memory|not enough memory|size calculation overflowed"
    r'|integer multiplication overflow|too large to fit|array is too big',
    re.IGNORECASE,
)
COMPILERS = ('torch._dynamo', 'torch._inductor')
NO_ROOM = {errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, 'EDQUOT', errno.ENOSPC)}


def machine_failure(error: BaseException) -> str:
    """Return in one line what the machine lacks, '' for an error of another kind."""
    reason = _short(error, 150)
    if isinstance(error, MemoryError):
        return 'out of memory: use a smaller model or a smaller batch'
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f'cannot write {error.filename or "the output"}: {error.strerror}'
    if type(error).__module__.startswith(COMPILERS):
        return f'torch.compile cannot work here ({reason}): use --compile=False'
    if isinstance(error, (RuntimeError, ValueError, OverflowError)) and TOO_LARGE.search(reason):
        return f'out of memory ({reason}): use a smaller model or a smaller batch'
    return ''


def _prepare_output() -> None:
    """Let any character be printed, and let a full disk be one line at the end of the process."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, 'w'))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    if not sys.stderr.isatty():
        # tqdm reads this when it is imported: the bars of libraries must not fill a log.
        os.environ.setdefault('TQDM_DELAY', '30')
        os.environ.setdefault('TQDM_MININTERVAL', '30')
    atexit.unregister(_flush_output)
    atexit.register(_flush_output)


def _flush_output() -> None:
    """Bring out what is still held, at the end of the process; 1 is its exit code if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        print(f'error: cannot write the output: {error.strerror}', file=sys.stderr, flush=True)
        os._exit(1)  # Python takes no exit code from here
    except ValueError:  # it is closed
        pass


def discard(stream: io.TextIOBase) -> None:
    """Let whatever a stream holds, and is given from now on, go nowhere."""
    with contextlib.suppress(OSError, ValueError):  # it has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


# -------------------------------------------------------------------------------------------------
# the script's page of settings


@dataclass
class _Setting:
    default: object
    comment: str
    heading: str  # of its group: the comment lines above the first setting of it


def _read_page(path: str) -> tuple[dict[str, _Setting], str]:
    """Return the settings of a script in their order, and its docstring's first paragraph."""
    with tokenize.open(path) as file:
        source = file.read()
    tree, comments = _parsed(source)
    lines = ['', *source.split('\n')]  # lines[1] is the first, as ast counts them
    page, heading = {}, ''
    for node in tree.body:
        if _ends_page(node):
            break
        name = _assigned_name(node)
        if name is None or name.startswith('_'):
            continue
        try:
            default = _evaluate_nested(node.value, {})
        except ValueError:  # not a literal: the script's own business
            continue
        heading = _heading(node, lines, comments) or heading
        page[name] = _Setting(default, _comment(node, lines, comments), heading)
    purpose = (ast.get_docstring(tree) or '').partition('\n\n')[0]
    return page, purpose


def _read_classes(folder: str, page: dict[str, _Setting]) -> dict[str, _Setting]:
    """
    Return the fields of config classes in a folder's files that are no settings of `page` yet.

    A config class is one on another class whose name ends in Config. A file that is no Python is
    left out: whoever asks for its class hears of it. UserError where two files mean different
    things by one name.
    """
    fields, owners = {}, {}
    for path in sorted(glob.glob(glob.escape(folder) + '/*.py')):
        try:
            found = _read_fields(path)
        except (OSError, *UNPARSABLE):
            continue
        for name, field in found.items():
            if name in page:  # another default for a setting that there is
                continue
            if name in fields and fields[name].default != field.default:
                raise UserError(
                    f'{path}: {name}={field.default!r}, but {owners[name]} has the default '
                    f'{fields[name].default!r}: give one of them another name'
                )
            if name not in fields:
                fields[name], owners[name] = field, path
    return fields


def _read_fields(path: str) -> dict[str, _Setting]:
    """Return the annotated fields, with defaults, of the config classes in a file."""
    with tokenize.open(path) as file:
        source = file.read()
    tree, comments = _parsed(source)
    lines = ['', *source.split('\n')]
    title = (ast.get_docstring(tree) or '').partition('\n')[0]
    heading = f'{os.path.basename(os.path.dirname(path))}/{os.path.basename(path)}: {title}'
    fields = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        if not any(ast.unparse(base).endswith('Config') for base in node.bases):
            continue
        for field in node.body:
            match field:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    pass
                case _:
                    continue
            try:
                default = _evaluate(value, {})
            except ValueError:  # no plain value, such as a tuple of ranks
                continue
            fields[name] = _Setting(default, _comment(field, lines, comments), heading)
    return fields


@functools.lru_cache(maxsize=64)  # a process that runs several scripts reads their pages again
def _parsed(source: str) -> tuple[ast.Module, dict[int, str]]:
    """Return the tree of a source, and line -> its comment, without the sign."""
    tree = ast.parse(source)
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('#').strip()
    return tree, comments


def _ends_page(node: ast.stmt) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return True
    calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return bool(calls & {'configure', 'configurator.configure'})


def _assigned_name(node: ast.stmt) -> str | None:
    """Return the name of a plain `name = value`, else None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        if isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
    return None


def _heading(node: ast.stmt, lines: list[str], comments: dict[int, str]) -> str:
    """Return the comment lines right above a statement, '' if there are none."""
    row = node.lineno - 1
    while row > 0 and not lines[row].strip():
        row -= 1
    heading = []
    while row in comments and lines[row][0] == '#':
        heading.insert(0, comments[row].strip('-= '))
        row -= 1
    return '\n'.join(filter(None, heading))


def _comment(node: ast.stmt, lines: list[str], comments: dict[int, str]) -> str:
    """Return the comments beside the lines of a statement, and indented ones that follow it."""
    rows = list(range(node.lineno, node.end_lineno + 1))
    row = node.end_lineno + 1
    while row in comments and lines[row][0].isspace() and lines[row].lstrip()[0] == '#':
        rows.append(row)
        row += 1
    return ' '.join(comments[row] for row in rows if comments.get(row))


def _command(script: dict) -> str:
    """Return how a script is started: by its file, or by its module where python -m started it."""
    spec = script.get('__spec__')
    if script.get('__name__') == '__main__' and spec is not None:
        return f'python -m {spec.name}'
    path, here = os.path.abspath(script['__file__']), os.path.join(os.getcwd(), '')
    if path.startswith(here):
        return f'python {path.removeprefix(here)}'
    return f'python {os.path.basename(path)}'


def _print_help(
    config: Settings,
    page: dict[str, _Setting],
    purpose: str,
    takes: str,
    problem: UserError | None,
) -> None:
    usage = f'usage: {_command(config._script)} {takes} [--key=value ...]'
    order = '(left to right, later wins)'
    if len(usage) + 4 + len(order) <= WIDTH:
        print(f'{usage}    {order}')
    else:
        print(f'{usage}\n    {order}')
    if purpose:
        print('\n' + textwrap.fill(purpose, WIDTH))
    keys = {name: f'  --{name}={setting.default!r}' for name, setting in page.items()}
    longest = max(map(len, keys.values()), default=0)
    margin = min(40, longest) + 2  # where the comments begin
    heading = None
    for name, setting in page.items():
        if setting.heading != heading:
            heading = setting.heading
            print('\n' + '\n'.join(textwrap.fill(line, WIDTH) for line in heading.split('\n')))
        notes = textwrap.wrap(setting.comment, WIDTH - margin)
        if config[name] != setting.default:
            now = f'now {config[name]!r}  ({_short(config.given[name])})'
            notes += textwrap.wrap(now, WIDTH - margin)
        if len(keys[name]) + 2 > margin:  # too long for its column: lines of its own
            print(textwrap.fill(keys[name], WIDTH, subsequent_indent='    '))
        else:
            first = notes.pop(0) if notes else ''
            print((keys[name].ljust(margin) + first).rstrip())
        for line in notes:
            print(' ' * margin + line)
    if problem:
        print('\n' + textwrap.fill(f'error: {problem}', WIDTH))


# -------------------------------------------------------------------------------------------------
# the command line


def _read_argument(config: Settings, arg: str, following: str) -> None:
    """Read one --key=value. `following` is the next argument: `--key value` gets a hint."""
    name, equals, text = arg[2:].partition('=')
    _check_name(config, name, _short(arg), '--')
    if not equals:
        value = _likely_value(config, name, following)
        raise UserError(f'{arg}: the value is missing; write {arg}={_short(value)}')
    value = _parse_value(text, type(config[name]))
    config[name] = _check_type(config, name, value, _short(arg))
    config.given[name] = arg


def _likely_value(config: Settings, name: str, following: str) -> str:
    """Return what a person who wrote `--key` without a value may have meant."""
    if type(config[name]) is bool:
        return following if following.lower() in ('true', 'false') else 'True'
    if not following or following.startswith('--'):
        return str(config[name])
    return following


def _parse_value(text: str, kind: type):
    """Return the value that `text` is for a setting of type `kind`; `text` itself if it is none."""
    if kind is str:
        return text
    if kind is bool:
        return TRUTH.get(text.strip(), text)
    evaluate = _evaluate_nested if kind in (list, dict) else _evaluate
    try:
        return evaluate(ast.parse(text.strip(), mode='eval').body, {})
    except UNPARSABLE:
        pass
    if kind is list:
        words = text.replace(' ', '')
        if words.startswith('[') and words.endswith(']'):
            words = words[1:-1]
        if re.fullmatch(r'[A-Za-z]\w*(,[A-Za-z]\w*)*', words):
            return words.split(',')  # --only=mha,mla: a shell takes quotes away
    return text


# -------------------------------------------------------------------------------------------------
# config files


def _read_file(config: Settings, path: str) -> None:
    """Read one config file, top to bottom. Its on_cpu values replace those of earlier files."""
    home = os.path.dirname(os.path.abspath(config._script['__file__']))
    source = _read_source(path, home)
    try:
        tree = ast.parse(source)
    except UNPARSABLE as error:
        line = getattr(error, 'lineno', None) or 1
        why = getattr(error, 'msg', None) or 'not Python text'
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
                on_cpu |= _read_on_cpu(config, table, source, path)
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


def _read_on_cpu(config: Settings, table: ast.expr, source: str, path: str) -> dict:
    """Return name -> (value, where) of `on_cpu = dict(name=literal, ...)`."""
    pairs = _pairs(table)
    if pairs is None:
        pairs = [(None, table)]
    values = {}
    for name, node in pairs:
        where = f'{path}:{node.lineno}'
        if name is None:
            raise UserError(f'{where}: write on_cpu = dict(name=literal, ...)')
        values[name] = _file_value(config, name, node, source, where), where
    return values


def _read_source(path: str, home: str) -> str:
    """
    Return the text of a config file.

    home: the script's folder, whose config/ offers the nearest names when there is no such file.
    """
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
        hint = _hint_at_file(path, home)
        raise UserError(f'{_short(path)}: no such config file; {hint}') from None
    except (OSError, ValueError) as error:
        why = getattr(error, 'strerror', None) or error
        raise UserError(
            f'{_short(path)}: cannot be read as a config file: {why}; check the path'
        ) from None


def _hint_at_file(path: str, home: str) -> str:
    """Return what to do about an argument that is no file."""
    if pair := re.fullmatch(r'-?([\w-]+)=(.*)', path, re.DOTALL):
        name, value = pair.groups()
        return f'to set a value write --{name.replace("-", "_")}={_short(value)}'
    folder = 'config' if os.path.isdir('config') else os.path.join(home, 'config')
    files = {}
    for file in sorted(glob.glob(glob.escape(folder) + '/*.py')):
        files[os.path.basename(file).removesuffix('.py')] = file
    word = os.path.basename(path).removesuffix('.py')
    near = _nearest(word, files, 3)
    if not near and word:
        near = [stem for stem in files if word in stem][:3]
    if not near:
        return 'check the path'
    return 'did you mean ' + ' or '.join(files[stem] for stem in near) + '?'


def _file_value(config: Settings, name: str, node: ast.expr, source: str, where: str):
    """Return the value of `name = node` in a config file, its name and type checked."""
    _check_name(config, name, where)
    evaluate = _evaluate_nested if type(config[name]) in (list, dict) else _evaluate
    try:
        value = evaluate(node, config)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: {name} = {_quote(source, node)}: {error}') from None
    return _check_type(config, name, value, where)


# -------------------------------------------------------------------------------------------------
# names, types and values


def _check_name(config: Settings, name: str, where: str, dashes: str = '') -> None:
    """Raise a UserError with the nearest name unless there is a setting `name`."""
    if name in config:
        return
    near = _nearest(name.replace('-', '_'), config)
    hint = f'did you mean {dashes}{near[0]}?' if near else '--help lists the settings'
    raise UserError(f'{where}: unknown setting {_short(name)!r}; {hint}')


def _check_type(config: Settings, name: str, value, where: str):
    """Return `value` in the type of the setting: an int becomes a float, nothing else changes."""
    kind = type(config[name])
    if type(value) is int and kind is float:
        return float(value)
    if kind is str and isinstance(value, str) and '\0' in value:
        raise UserError(f'{where}: {name} holds a null character, which no name or text may')
    if type(value) is not kind:
        given = f'{_short(repr(value))} ({type(value).__name__})'
        raise UserError(f'{where}: {name} takes {TAKES[kind]}, not {given}')
    if kind is int and not -(2**63) <= value < 2**63:  # torch takes no larger ones
        raise UserError(f'{where}: {name} takes a whole number of 64 bits at most')
    return value


def _evaluate(node: ast.expr, names: dict):
    """Return the value of a literal, a name or arithmetic. ValueError for anything else."""
    if isinstance(node, ast.Name):
        return _value_of(node.id, names)
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in ARITHMETIC:
        value = _calculate(node.op, [node.operand], names)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        value = _calculate(node.op, [node.left, node.right], names)
    else:
        value = None
    if type(value) not in TAKES:  # a call, a list, None, a complex number ...
        raise ValueError('a value is a literal or arithmetic on literals')
    if type(value) in (int, float) and abs(value) > sys.float_info.max:
        raise ValueError('the number is too large')
    return value


def _value_of(name: str, names: dict):
    if name in names:
        return names[name]
    hint = ''.join(f'; did you mean {near}?' for near in _nearest(name, names))
    raise ValueError(f'{name} is not a setting{hint}')


def _calculate(operation: ast.AST, parts: list[ast.expr], names: dict):
    numbers = [_evaluate(part, names) for part in parts]
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError('arithmetic takes numbers')
    if isinstance(operation, ast.Pow) and type(numbers[0]) is int:
        if numbers[0].bit_length() * numbers[1] > 1024:  # 9**9**9 would take all day
            raise ValueError('the number is too large')
    try:
        return ARITHMETIC[type(operation)](*numbers)
    except ArithmeticError as error:
        raise ValueError(error.args[-1]) from None


def _evaluate_nested(node: ast.expr, names: dict):
    """Return what `_evaluate` does, or a list of such values, or a table of them by text."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate_nested(item, names) for item in node.elts]
    pairs = _pairs(node)
    if pairs is None:
        return _evaluate(node, names)
    keys = [key for key, _ in pairs]
    if None in keys or len(set(keys)) < len(keys):
        raise ValueError('a table has texts as keys, each once: dict(name=value, ...)')
    return {key: _evaluate_nested(value, names) for key, value in pairs}


def _pairs(table: ast.expr) -> list[tuple[str | None, ast.expr]] | None:
    """
    Return the keys of dict(name=value, ...) or {key: value, ...} and the nodes of their values.

    A key that is no text is None. Returns None for what is no table.
    """
    match table:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
            return [(keyword.arg, keyword.value) for keyword in keywords]
        case ast.Dict(keys=keys, values=values):
            return list(zip(map(_text_of, keys), values))
    return None


def _text_of(key: ast.expr | None) -> str | None:
    value = getattr(key, 'value', None)
    return value if isinstance(value, str) else None


# -------------------------------------------------------------------------------------------------
# words


def _nearest(word: str, names: Iterable[str], n: int = 1) -> list[str]:
    """Return up to `n` of the names that are spelt like `word`, the nearest first."""
    lower = {name.lower(): name for name in names}
    return [lower[match] for match in difflib.get_close_matches(word.lower(), lower, n)]


def _one_line(text) -> str:
    return ' '.join(filter(None, (line.strip() for line in str(text).splitlines())))


def _short(text, limit: int = 80) -> str:
    text = _one_line(text)
    return text if len(text) <= limit else text[: limit - 3] + '...'


def _quote(source: str, node: ast.AST) -> str:
    return f'`{_short(ast.get_source_segment(source, node) or "", 60)}`'
