"""docs/architecture.md names files and functions that exist, and the walks can be followed."""

import ast
import re

import pytest
from helpers import ROOT

PAGE = (ROOT / 'docs' / 'architecture.md').read_text()
STEPS = re.findall(r'^\| `([\w/.]+\.py)` \| `([\w.]+)` \|', PAGE, re.M)
MOST_FILES = 5  # of one walk


def definition(file, name):
    """The node of a function, a class or Class.method in a file; None where it is missing."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split('.'):
        found = [node for node in body if getattr(node, 'name', None) == part]
        if not found:
            return None
        node, body = found[0], found[0].body
    return node


def function_of(node):
    """The function that a step means: of a class, its __init__."""
    if isinstance(node, ast.ClassDef):
        return next(item for item in node.body if getattr(item, 'name', '') == '__init__')
    return node


def test_there_are_four_walks():
    walks = PAGE.partition('## Four walks')[2].partition('## One contract')[0]
    assert walks.count('### ') == 4 and len(STEPS) >= 20
    for walk in walks.split('### ')[1:]:
        assert 3 <= len(set(re.findall(r'^\| `([\w/.]+\.py)`', walk, re.M))) <= MOST_FILES


@pytest.mark.parametrize('file, name', STEPS)
def test_every_step_of_a_walk_is_there(file, name):
    assert definition(file, name) is not None, f'{file} has no {name}'


# The tensors of a forward pass are documented by their shapes, as in nanoGPT.
TENSORS = {'x', 'q', 'k', 'v', 'rope', 'idx', 'targets', 'logits', 'draw', 'mask', 'norm'}


@pytest.mark.parametrize('file, name', STEPS)
def test_what_a_walk_calls_is_annotated(file, name):
    function = function_of(definition(file, name))
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    bare = [a.arg for a in arguments if a.annotation is None and a.arg not in TENSORS | {'self'}]
    assert not bare, f'{file}: {name} has parameters without a type: {", ".join(bare)}'


def test_every_folder_of_nanomla_has_a_row():
    folders = {path.name for path in (ROOT / 'nanomla').iterdir() if any(path.glob('*.py'))}
    assert folders - {'__pycache__'} == set(re.findall(r'^\| `nanomla/(\w+)/`', PAGE, re.M))
