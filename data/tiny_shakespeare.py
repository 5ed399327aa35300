"""
The text of data/shakespeare_char and data/shakespeare: tiny Shakespeare, or a substitute.

Both datasets read data/shakespeare_char/input.txt. Where that is missing it is downloaded. Without
a network the English that ships inside every CPython takes its place for this run, about as long as
tiny Shakespeare: the language reference (pydoc_data) and the docstrings of the standard library.
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
from collections.abc import Iterator
from pathlib import Path

from nanomla.core.configurator import UserError
from nanomla.core.files import write_file

INPUT = Path(__file__).resolve().parent / 'shakespeare_char' / 'input.txt'
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SIZE = 1_115_394  # characters of tiny Shakespeare


def find_text(given: str = '') -> tuple[str, str]:
    """Return the text of the file `given`, else input.txt, else a download, else the stand-in.

    The second result is the words that name it.
    """
    path = Path(given) if given else INPUT
    if not given and not path.exists():
        problem = download(path)
        if problem:
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
    if is_tiny_shakespeare(raw):
        return text, 'tiny Shakespeare'
    return text, f'{path.name} (your own text)'


def is_tiny_shakespeare(raw: bytes) -> bool:
    return hashlib.sha256(raw).hexdigest() == SHA256


def download(path: Path) -> str:
    """Fetch tiny Shakespeare to `path`. Return what went wrong, '' when all is well."""
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

# Not in every installation, but for the last one, which says a sentence a hundred times.
SKIPPED = 'distutils ensurepip idlelib lib2to3 test tkinter turtledemo encodings'.split()
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


def reference_text() -> str:
    """
    Return plain English from this Python's own source files, which are parsed and never imported.

    The same text for the same Python version; no paragraph twice; printable ASCII and newlines.
    """
    seen, documents = set(), []
    for document in reference_documents():
        paragraphs = re.split(r'\n\s*\n', document.translate(ASCII))
        paragraphs = [textwrap.dedent(paragraph).strip() for paragraph in paragraphs]
        new = [p for p in dict.fromkeys(paragraphs) if p not in seen and is_prose(p)]
        seen.update(new)
        if new:
            documents.append('\n\n'.join(new) + '\n')
    if not documents:
        raise UserError(
            'there is no network, and this Python comes without the source of its library to '
            f'stand in: put a text at {INPUT} or give --input=FILE'
        )
    # A shuffle by checksum is the same everywhere. So the end, which validates, is like the rest.
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    return '\n'.join(documents)[:SIZE]


def reference_documents() -> Iterator[str]:
    """Yield the topics of Python's reference and each docstring of its standard library."""
    for path in library_files():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of escapes in old docstrings
            tree = ast.parse(path.read_bytes())
        has_topics = path.match('pydoc_data/topics.py')
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ''
            elif isinstance(node, ast.Dict) and has_topics:
                yield from ast.literal_eval(node).values()


def library_files() -> Iterator[Path]:
    """Yield the source files of the standard library, without its tests."""
    library = Path(sysconfig.get_path('stdlib'))
    for name in sorted(sys.stdlib_module_names - set(SKIPPED)):
        for path in [library / f'{name}.py', *sorted((library / name).rglob('*.py'))]:
            folders = set(path.relative_to(library).parts)
            if path.is_file() and not folders & {'test', 'tests', 'site-packages'}:
                yield path


def is_prose(paragraph: str) -> bool:
    """Return whether it reads as English sentences: no table, grammar, session or code."""
    if not paragraph.isascii() or '>>>' in paragraph or len(paragraph.split()) < 10:
        return False
    if paragraph[-1] not in '.:!?)' or not paragraph.replace('\n', ' ').isprintable():
        return False
    plain = sum(c.isalpha() or c in ' \n,.' for c in paragraph)
    return plain >= 0.9 * len(paragraph)
