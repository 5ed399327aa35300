"""
The plan of the project, read from the imports of every file.

Which folder may import which, what a person can copy into a project of their own, which packages
load late, and that nothing but the models asks for an attention by its name.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

MODELS = {'model', 'model_mla'}
SCRIPTS = {path.stem for path in ROOT.glob('*.py')} - MODELS
# Each folder of nanomla/ and what of this project it may import beside itself.
BASE = {'core', 'models'}
CONVERSION = BASE | {'attentions', 'training', 'inference', 'checkpoints'}
FOLDERS = {
    'core': set(),
    'training': BASE,
    'inference': BASE,
    'checkpoints': BASE | {'attentions'},
    'conversion': CONVERSION,
    'heads': CONVERSION | {'conversion'},
    'adapters': CONVERSION | {'conversion'},
    'evals': CONVERSION | {'conversion'},
    'benchmarks': CONVERSION | {'conversion'},
    'comparison': CONVERSION | {'conversion'},
}
MOST_AT_THE_TOP = 12
MOST_IN_A_FOLDER = 9
# Packages that take long to import or may be missing: imported inside of functions.
HEAVY = set(
    'accelerate bitsandbytes datasets flash_mla flashinfer gguf huggingface_hub jinja2 lm_eval '
    'matplotlib peft playwright rouge_score safetensors tiktoken tokenizers tqdm transformers '
    'triton wandb'.split()
)
# Where no attention is asked for by name. Checkpoints and conversion are about certain ones.
ENGINES = ['training', 'inference', 'heads', 'adapters', 'evals', 'benchmarks', 'comparison']
KINDS = {'mha', 'gqa', 'mqa', 'mla'}
ATTENTION_CLASSES = {'MultiHeadAttention', 'MultiHeadLatentAttention', 'GPT_MLA', 'MLAConfig'}


@dataclass(frozen=True)
class Import:
    module: str  # 'nanomla.core.files', 'model', 'torch'
    at_once: bool  # always with the file: neither inside a function nor under an `if`


def name_of(path: Path) -> str:
    """Return the dotted name of a file of this project, 'nanomla.core.files'."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


FILES = {
    name_of(path): path
    for path in [*sorted(ROOT.glob('*.py')), *sorted(ROOT.glob('nanomla/**/*.py'))]
}
ATTENTIONS = sorted(ROOT.glob('attentions/*.py'))
FILES |= {name_of(path): path for path in ATTENTIONS}
EVERYWHERE = [
    *FILES.values(),
    *sorted(ROOT.glob('data/**/*.py')),
    *sorted(ROOT.glob('assets/*.py')),
]
every_file = pytest.mark.parametrize('name', FILES)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


@cache
def imports(path: Path) -> frozenset[Import]:
    """Return every import of a file, wherever it stands."""
    return frozenset(found_below(tree_of(path), True))


def found_below(node: ast.AST, at_once: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, at_once)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, 'imports are absolute here'
        for alias in node.names:
            submodule = f'{node.module}.{alias.name}'
            yield Import(submodule if submodule in FILES else node.module, at_once)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.If)):
        at_once = False
    for child in ast.iter_child_nodes(node):
        yield from found_below(child, at_once)


def group_of(module: str) -> str | None:
    """Return the row of the plan that a module belongs to, None for other people's packages."""
    parts = module.split('.')
    if parts[0] == 'nanomla':
        return parts[1] if len(parts) > 1 else 'nanomla'
    if parts[0] in MODELS:
        return 'models'
    if parts[0] == 'attentions':
        return 'attentions'
    if parts[0] in SCRIPTS:
        return 'scripts'
    return None


def package_of(found: Import) -> str:
    return found.module.partition('.')[0]


def test_imports_are_read_wherever_they_stand(tmp_path):
    path = tmp_path / 'x.py'
    path.write_text(
        'import a.b, c\n'
        'if c:\n    from d.e import f\n'
        'try:\n    import g\nexcept ImportError:\n    pass\n'
        'class H:\n    import i\n    def j(self):\n        import k\n'
        'from nanomla.core import files\n'
    )
    now = {'a.b', 'c', 'g', 'i', 'nanomla.core.files'}
    assert {found.module for found in imports(path) if found.at_once} == now
    assert {found.module for found in imports(path) if not found.at_once} == {'d.e', 'k'}


# -------------------------------------------------------------------------------------------------
# folders


def test_ls_fits_a_screen():
    assert len(list(ROOT.glob('*.py'))) <= MOST_AT_THE_TOP


def test_every_folder_has_a_row_and_few_files():
    folders = {path.name for path in (ROOT / 'nanomla').iterdir() if list(path.rglob('*.py'))}
    assert folders == FOLDERS.keys()
    for folder in [path for path in (ROOT / 'nanomla').rglob('*') if path.is_dir()]:
        count = len(list(folder.glob('*.py')))
        assert count <= MOST_IN_A_FOLDER, f'{folder} has {count} files'


@every_file
def test_imports_run_down_the_plan(name):
    group = group_of(name)
    for found in imports(FILES[name]):
        target = group_of(found.module)
        if target is None:
            continue
        assert target != 'scripts', f'{name} imports the script {found.module}'
        if group in FOLDERS and target != group:
            assert target in FOLDERS[group], f'{name} may not import {found.module}'


def test_there_is_no_circle_not_even_a_late_one():
    following = {}
    for name, path in FILES.items():
        modules = {found.module for found in imports(path)}
        following[name] = sorted(modules & FILES.keys() - {name})
    done = set()

    def walk(name, trail):
        assert name not in trail, 'a circle: ' + ' -> '.join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for after in following[name]:
            walk(after, [*trail, name])
        done.add(name)

    for name in FILES:
        walk(name, [])


MODELS_MAY_IMPORT = {'model': set(), 'model_mla': {'model'}}
# Another file of the folder is copied with the one that needs it.
MODELS_MAY_IMPORT |= {name_of(path): MODELS | {'attentions'} for path in ATTENTIONS}


@pytest.mark.parametrize('name', MODELS_MAY_IMPORT)
def test_a_model_can_be_copied_into_a_project_of_ones_own(name):
    allowed = {'torch'} | MODELS_MAY_IMPORT[name] | sys.stdlib_module_names
    assert {package_of(found) for found in imports(FILES[name])} <= allowed


# -------------------------------------------------------------------------------------------------
# packages


@pytest.mark.parametrize('path', EVERYWHERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_load_late(path):
    at_once = {package_of(found) for found in imports(path) if found.at_once}
    if path.stem.endswith('_triton'):  # such a file of kernels is itself loaded late
        at_once -= {'triton'}
    assert not at_once & HEAVY
    modules = {found.module for found in imports(path) if found.at_once}
    assert not {module for module in modules if module.endswith('_triton')}


def test_the_configurator_needs_python_alone():
    path = ROOT / 'nanomla' / 'core' / 'configurator.py'
    assert {package_of(found) for found in imports(path)} <= sys.stdlib_module_names


TAKES = dict(  # scripts that need more than settings
    convert_mla='SOURCE [config/x.py ...]',
    bench='train | scale | race | decode [config/x.py ...]',
    bench_adapters='MODEL CONFIG.json OUT',
)


@pytest.mark.parametrize('script', sorted(SCRIPTS))
def test_help_comes_without_torch(script, tmp_path):
    command = [sys.executable, '-X', 'importtime', str(ROOT / f'{script}.py'), '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    usage = f'usage: python {script}.py {TAKES.get(script, "[config/x.py ...]")} [--key=value ...]'
    assert done.stdout.startswith(usage)
    assert len(done.stdout.splitlines()[0]) <= 100
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'nanomla.core.configurator' in loaded
    packages = {module.partition('.')[0] for module in loaded}
    assert not packages & ({'torch', 'numpy'} | HEAVY)


# -------------------------------------------------------------------------------------------------
# attentions


def compares_a_kind(node: ast.AST) -> bool:
    """Return whether this is `x == 'mla'` or `x in ('mha', 'mla')`."""
    if not isinstance(node, ast.Compare):
        return False
    if 'kernel' in ast.unparse(node):  # a row of a benchmark may be called mla
        return False
    sides = [node.left, *node.comparators]
    constants = [n.value for s in sides for n in ast.walk(s) if isinstance(n, ast.Constant)]
    return any(value in KINDS for value in constants if isinstance(value, str))


def names_an_attention(node: ast.AST) -> bool:
    """Return whether this is the name of a class of attention, or its import."""
    if isinstance(node, ast.Name):
        return node.id in ATTENTION_CLASSES
    if isinstance(node, ast.alias):
        return node.name in ATTENTION_CLASSES
    return isinstance(node, ast.Attribute) and node.attr in ATTENTION_CLASSES


@pytest.mark.parametrize(
    'name', [name for name in FILES if group_of(name) in {'scripts', *ENGINES}]
)
def test_no_attention_is_asked_for_by_name(name):
    for node in ast.walk(tree_of(FILES[name])):
        if compares_a_kind(node) or names_an_attention(node):
            raise AssertionError(f'{name}, line {node.lineno}: `{ast.unparse(node)}`')


# -------------------------------------------------------------------------------------------------
# what is written is written whole, and never through a link

WRITERS = {'nanomla.core.files', 'nanomla.core.token_files'}
WRITING_CALLS = {'write_text', 'write_bytes', 'copy', 'copyfile', 'copytree', 'move'}
# To no file of a person: a copy of standard input, a counter of the kernel, and the weights of an
# export, in a folder that has no name yet.
ELSEWHERE = [
    "open(copy, 'wb')",
    "Path('/proc/self/clear_refs').write_text('5')",
    "open(path, 'r+b')",
]


def writes_directly(node: ast.AST) -> bool:
    """Return whether this writes a file, by `open` or by a method of paths or of shutil."""
    if not isinstance(node, ast.Call):
        return False
    function, code = node.func, ast.unparse(node)
    if isinstance(function, ast.Attribute) and function.attr in WRITING_CALLS:
        of_files = function.attr.startswith('write_') or code.startswith('shutil.')
        return of_files and not code.startswith('token_files.')
    if code.startswith('open(os.devnull') or not code.startswith('open('):
        return False
    mode = ast.unparse(node.args[1]) if len(node.args) > 1 else ''
    return bool(set('wax+') & set(mode))


@pytest.mark.parametrize('path', EVERYWHERE, ids=name_of)
def test_files_are_written_by_the_safe_writers_alone(path):
    if name_of(path) in WRITERS:
        return
    direct = [ast.unparse(node) for node in ast.walk(tree_of(path)) if writes_directly(node)]
    assert [code for code in direct if code not in ELSEWHERE] == []


def test_what_writes_directly_is_found():
    for code in ("open(p, 'a')", "open(p, 'xb')", 'p.write_text(t)', 'shutil.copy(p, q)'):
        assert writes_directly(ast.parse(code, mode='eval').body), code
    for code in ('open(p)', "open(p, 'rb')", 'write_text(f, t)', 'p.copy(q)'):
        assert not writes_directly(ast.parse(code, mode='eval').body), code
