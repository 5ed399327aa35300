"""
The text behind data/shakespeare_char and data/shakespeare: tiny Shakespeare, or what stands in for it.

Both datasets read data/shakespeare_char/input.txt. Where that is missing it is downloaded, and without
a network the English that ships inside every CPython takes its place for this run: the language
reference (pydoc_data) and the docstrings of the standard library, about as long as tiny Shakespeare.
"""

import ast
import hashlib
import http.client
import re
import sys
import sysconfig
import textwrap
import urllib.request
import warnings
from pathlib import Path

from nanomla.core.configurator import UserError
from nanomla.core.files import write_file

INPUT = Path(__file__).resolve().parent / 'shakespeare_char' / 'input.txt'
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SIZE = 1_115_394  # characters of tiny Shakespeare


def find_text(given=''):
    """The text and the words that name it: the file `given`, else input.txt, else a download, else the stand-in."""
    path = Path(given) if given else INPUT
    if not given and not path.exists() and (problem := download(path)):
        stand_in = f'Python {sys.version_info.major}.{sys.version_info.minor} reference text'
        print(
            f'{problem}: taking the {stand_in} instead (or put a text of your own at {path})',
            file=sys.stderr,
        )
        return reference_text(), f'{stand_in} (stand-in: {problem})'
    try:
        raw = path.read_bytes()
        text = raw.decode()
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not UTF-8 text (byte {error.start}): save it as UTF-8, or use '
            'data/text/prepare.py --tokenizer=bytes'
        ) from None
    return text, 'tiny Shakespeare' if is_tiny_shakespeare(raw) else f'{path.name} (your own text)'


def is_tiny_shakespeare(raw):
    return hashlib.sha256(raw).hexdigest() == SHA256


def download(path):
    """Fetch tiny Shakespeare to `path`. Returns what went wrong, or '' when all is well."""
    try:
        with urllib.request.urlopen(URL, timeout=10) as answer:
            raw = answer.read(2 * SIZE)
    except (OSError, http.client.HTTPException):
        return 'no network for tiny Shakespeare'
    if not is_tiny_shakespeare(raw):
        return 'the download of tiny Shakespeare has a wrong checksum'
    write_file(path, raw)
    return ''


# -------------------------------------------------------------------------------------------------
# the stand-in

SKIPPED = {
    'distutils',
    'ensurepip',
    'idlelib',
    'lib2to3',
    'test',
    'tkinter',
    'turtledemo',  # not in every installation
    'encodings',
}  # a hundred times the same sentence
ASCII = str.maketrans(
    {
        '‘': "'",
        '’': "'",
        '“': '"',
        '”': '"',
        '–': '-',
        '—': '--',
        '…': '...',
        '\xa0': ' ',
        '\t': ' ',
    }
)


def reference_text():
    """
    Plain English from this Python's own source files, which are parsed and never imported: the same
    text for the same Python version, no paragraph twice, printable ASCII and newlines only.
    """
    seen, documents = set(), []
    for document in reference_documents():
        paragraphs = re.split(r'\n\s*\n', document.translate(ASCII))
        paragraphs = [textwrap.dedent(p).strip() for p in paragraphs]
        paragraphs = [p for p in dict.fromkeys(paragraphs) if is_prose(p) and p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            documents.append('\n\n'.join(paragraphs) + '\n')
    if not documents:
        raise UserError(
            'there is no network, and this Python comes without the source of its library to stand in: '
            f'put a text at {INPUT} or give --input=FILE'
        )
    # by checksum: a shuffle that is the same everywhere, so that the end, which validates, is like the rest
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    return '\n'.join(documents)[:SIZE]


def reference_documents():
    """The topics of Python's reference, then each docstring of its standard library."""
    library = Path(sysconfig.get_path('stdlib'))
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        for path in [library / f'{name}.py', *sorted((library / name).rglob('*.py'))]:
            if not path.is_file() or {'test', 'tests', 'site-packages'} & set(
                path.relative_to(library).parts
            ):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of escapes in old docstrings
                tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    yield ast.get_docstring(node) or ''
                elif isinstance(node, ast.Dict) and path.match('pydoc_data/topics.py'):
                    yield from ast.literal_eval(node).values()


def is_prose(paragraph):
    """Whether it reads as English sentences and not as a table, a grammar, a session or code."""
    if not paragraph.isascii() or '>>>' in paragraph or len(paragraph.split()) < 10:
        return False
    plain = sum(c.isalpha() or c in ' \n,.' for c in paragraph)
    return (
        paragraph[-1] in '.:!?)'
        and plain >= 0.9 * len(paragraph)
        and paragraph.replace('\n', ' ').isprintable()
    )
