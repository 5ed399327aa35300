"""
Files: written whole or not at all, JSON and tables of results, locks, progress bars; other scripts.

Whatever this project writes goes through `replacing` (a file), `replacing_folder` (a folder) or
`appending` (a log; records of bytes): a kill leaves the old or the new, a full disk is one line,
and a symbolic link that stands in the way is never followed.
"""

import csv
import errno
import glob
import io
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanomla.core.configurator import UserError, discard

ROOT = Path(__file__).resolve().parents[2]  # the repository
FORMULA = ('=', '+', '-', '@', '\t', '\r')  # a spreadsheet runs a cell that begins with one
# In the environment of a script that another one has started and waits for.
STARTED_BY_A_SCRIPT = 'NANOMLA_STARTED_BY_A_SCRIPT'
TABLE_WIDTH = 120  # columns of a terminal that a table takes at most


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError inside the `with` into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        if error.errno == errno.ENOSPC:
            why = 'no space left on the device'
        if error.errno == errno.ELOOP:
            why = 'it is a symbolic link, which is never written through'
        raise UserError(f'cannot write {path}: {why}') from None


@contextmanager
def replacing(path: str | os.PathLike, mode: str = 'w') -> Iterator[io.IOBase]:
    """
    Open a file beside `path` that takes its place at the end of the `with`: all of it or nothing.

    mode: 'w', 'wb' or 'w+b'. Folders are made. The file is synced before it is renamed, and its
    folder after it where that works (not on Windows). A link at `path` is replaced, not followed.
    UserError when it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    aside = beside(path)
    text = dict(encoding='utf-8', newline='') if 'b' not in mode else {}
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)  # of a process with this number that was killed
            with open(aside, mode.replace('w', 'x'), **text) as file:  # x: never through a link
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        with suppress(OSError, ValueError):  # it is gone where all went well
            aside.unlink()
    sync_folder(path.parent)


def beside(path: Path) -> Path:
    """Return the name under which this process writes what will be `path`."""
    return path.with_name(f'{path.name}.{os.getpid()}.partial')


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what processes that were killed have left of writing `path`."""
    path = Path(path)
    for leftover in path.parent.glob(f'{glob.escape(path.name)}.*.partial'):
        number = leftover.name.removeprefix(f'{path.name}.').removesuffix('.partial')
        if number.isdigit() and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        elif number.isdigit():
            leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a renamed entry of a folder to the disk, where the system can (Windows cannot)."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def check_can_be_made(path: str | os.PathLike) -> None:
    """Raise a UserError where no file or folder can be made at `path`. Asked before long work."""
    above = Path(os.path.abspath(path)).parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(f'cannot write {path}: {above} is no folder; name another place')
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f'cannot write {path}: {above} is closed to you; name another place')


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write all of `content` to `path` or nothing, as `replacing` does."""
    with replacing(path, 'wb' if isinstance(content, bytes) else 'w') as file:
        file.write(content)


def copy_file(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Copy a file, all of it or nothing."""
    with replacing(path, 'wb') as file, open(source, 'rb') as original:
        shutil.copyfileobj(original, file)


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Make a folder beside `folder` that gets its name at the end of the `with`: all of it or nothing.

    UserError when `folder` is there already or cannot be written; then nothing is left of it.
    """
    folder = Path(os.path.normpath(folder))
    aside = beside(folder)
    if os.path.lexists(folder):
        raise UserError(f'{folder} is there already: name another folder, or remove it')
    try:
        with writing(folder):
            remove_leftovers(folder)
            aside.mkdir(parents=True)
            yield aside
            for file in aside.iterdir():
                with open(file, 'r+b') as opened:
                    os.fsync(opened.fileno())
            sync_folder(aside)
            os.rename(aside, folder)
    except UserError as error:
        # What is written in it is named by the place where it will be.
        message = str(error).replace(str(aside), str(folder))
        raise UserError(f'{message}; nothing is left of {folder}') from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # it is gone where all went well
    sync_folder(folder.parent)


def appending(path: str | os.PathLike) -> io.TextIOWrapper:
    """
    Open a text file to add lines to, made if missing with its folders.

    A last line that a kill has cut short is removed; a row that lacks only its end gets it.
    UserError where it cannot be written, or is a link or no file.
    """
    with writing(path):
        opened = open_to_append(Path(path))
        with open(opened, 'rb', closefd=False) as file:
            size = whole_lines(file)
            file.seek(size)
            is_row = parse_row(file.read()) is not None
        if is_row:
            os.write(opened, b'\n')
        else:
            os.truncate(opened, size)
        return open(opened, 'a', encoding='utf-8', newline='')


def appending_bytes(path: str | os.PathLike, size: int) -> io.BufferedWriter:
    """Open a file to add to, as `appending` does, and leave its first `size` bytes in it."""
    with writing(path):
        opened = open_to_append(Path(path))
        os.truncate(opened, size)
        return open(opened, 'ab')


def open_to_append(path: Path) -> int:
    """Return a descriptor of a file, made if missing with its folders. OSError for a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, 'O_BINARY', 0)
    opened = os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, 'it is no file')
    return opened


def whole_lines(file: io.BufferedReader) -> int:
    """Return how many bytes of a file are lines that have an end."""
    size = file.seek(0, os.SEEK_END)
    block = 2**16
    for begin in range((size - 1) // block * block, -1, -block):
        file.seek(begin)
        end = file.read(block).rfind(b'\n')
        if end >= 0:
            return begin + end + 1
    return 0


# -------------------------------------------------------------------------------------------------
# rows: JSON, JSONL and CSV


def parse_json(text: str | bytes) -> object:
    """Return what a JSON text says. ValueError for any text that is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None


def read_json(path: str | os.PathLike) -> object:
    """Return what a JSON file says. OSError or ValueError where it cannot be read or is none."""
    return parse_json(Path(path).read_bytes())


# rows: JSONL, CSV and text


def jsonl(rows: list[dict]) -> str:
    """Return the rows as JSON, one a line."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Return the rows of a JSONL file. A ValueError names the first line that is no JSON object."""
    # Lines end with \n alone: a text in JSON may hold other signs that Python counts as line ends.
    lines = Path(path).read_bytes().split(b'\n')
    if not lines[-1]:
        lines.pop()
    return rows_of(lines, path)


def read_appended(path: str | os.PathLike, begin: bytes = b'{"') -> list[dict]:
    """
    Return the rows of a JSONL file that `appending` adds to, but one that a kill has cut short.

    begin: of every row. A ValueError names the first line that is neither a row nor such a piece.
    """
    *lines, last = Path(path).read_bytes().split(b'\n')
    is_piece = parse_row(last) is None and last[: len(begin)] == begin[: len(last)]
    if not is_piece:
        lines.append(last)
    return rows_of(lines, path)


def rows_of(lines: list[bytes], path: str | os.PathLike) -> list[dict]:
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse_row(line)
        if row is None:
            raise ValueError(f'{path}:{number}: not a JSON object')
        rows.append(row)
    return rows


def parse_row(line: bytes) -> dict | None:
    """Return the JSON object of a line, None where it is none."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def csv_table(rows: list[dict]) -> str:
    """
    Return the rows as CSV with a header; keys of a nested dict are joined with an underscore.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    flat = []
    for row in rows:
        cells = {}
        for key, value in row.items():
            if isinstance(value, dict):
                cells |= {f'{key}_{inner}': nested for inner, nested in value.items()}
            else:
                cells[key] = value
        flat.append({csv_cell(key): csv_cell(value) for key, value in cells.items()})
    if not flat:
        return ''
    columns = {}  # all keys in the order in which they first appear
    for cells in flat:
        columns |= cells
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def csv_cell(value: object) -> object:
    """Return a value as a cell that no spreadsheet runs; lists and the like are texts, too."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def text_table(rows: list[dict[str, str]], names: list[str], left: Collection[str] = ()) -> str:
    """
    Return rows of cells, column -> text, as aligned columns of at most TABLE_WIDTH letters.

    What does not fit beside the columns before it follows below them, with the columns `names`
    again, which tell the rows apart. left: further columns that are aligned to the left.
    """
    widths = {}
    for row in rows:
        for column, cell in row.items():
            widths[column] = max(widths.get(column, len(column)), len(cell))
    parts = [[]]
    for column in widths:
        used = sum(widths[other] + 2 for other in parts[-1])
        if used + widths[column] > TABLE_WIDTH and set(parts[-1]) - set(names):
            parts.append([name for name in names if name in widths])
        parts[-1].append(column)
    lines = []
    for part in parts:
        for row in [{column: column for column in part}, *rows]:
            cells = []
            for column in part:
                align = str.ljust if column in names or column in left else str.rjust
                cells.append(align(row.get(column, ''), widths[column]))
            lines.append('  '.join(cells).rstrip())
        lines.append('')
    return '\n'.join(lines).rstrip('\n')


class ResultsTable(list):
    """
    The rows (dicts) of a measurement, in FOLDER/NAME.jsonl and FOLDER/NAME.csv after every row.

    facts: entries of every row, such as commit and device. keep: begin with the rows in the file.
    UserError where the files cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike, name: str, facts: dict, keep: bool = False):
        self.folder, self.name, self.facts = Path(folder), name, facts
        with writing(folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f'{name}.jsonl'
        if keep and file.exists():
            try:
                super().__init__(read_jsonl(file))
            except (OSError, ValueError) as error:
                raise UserError(f'{error}: name another --out_dir, or remove the file') from None

    def add(self, **row) -> dict:
        """Append a row to the table and to its files, and return it with the facts."""
        self.append(self.facts | row)
        write_file(self.folder / f'{self.name}.jsonl', jsonl(self))
        write_file(self.folder / f'{self.name}.csv', csv_table(self))
        return self[-1]

    def find(self, **key) -> dict | None:
        """Return the first row with all of these entries, or None."""
        for row in self:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        return None


# -------------------------------------------------------------------------------------------------
# locks and progress


class FolderLock:
    """A held lock. `release`, the end of a `with` or of the process gives it back."""

    def __init__(self, held: FileLock):
        self.held = held

    def release(self) -> None:
        self.held.release()

    def __enter__(self) -> 'FolderLock':
        return self

    def __exit__(self, *_) -> None:
        self.release()


def lock(folder: str | os.PathLike, name: str = 'lock', wait: bool = False) -> FolderLock | None:
    """Lock FOLDER/NAME for this process. None when another process has it, unless `wait`."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / name)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f'{folder / name} cannot be locked ({error}): name an --out_dir on a file system '
            'that has locks and can be written'
        ) from None
    return FolderLock(held)


def print_line(message: str) -> None:
    """
    Print a line for people. A reader that has gone or a full disk does not end what is under way:
    that is said once on stderr, and from then on nothing is printed.
    """
    try:
        print(message, flush=True)
    except OSError as error:
        discard(sys.stdout)
        with suppress(OSError):
            print(f'nothing more is printed: {error.strerror}', file=sys.stderr, flush=True)


def progress_bar(total: int, unit: str, done: int = 0):
    """
    Return a tqdm bar on stderr. Where that is no terminal but a log, nothing is written in the
    first half minute, and at most ten times after it.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise UserError('the progress bar needs tqdm: pip install tqdm') from None
    pace = dict(mininterval=0.2)
    if not sys.stderr.isatty():
        # Without a longest interval tqdm would look every ten seconds for steps to show.
        pace = dict(delay=30, mininterval=30, miniters=-(-total // 10), maxinterval=math.inf)
    return tqdm(total=total, initial=done, unit=unit, unit_scale=True, **pace)


# -------------------------------------------------------------------------------------------------
# other scripts of the repository


def run_script(script: str | os.PathLike, words: Iterable[str] = ()) -> None:
    """
    Run a script to its end; what it prints is shown.

    Where it fails, a SystemExit ends this script, too, with the same code and no message of its
    own: the one above says why.
    """
    command = [sys.executable, str(script), *words]
    ended = subprocess.run(command, env=os.environ | {STARTED_BY_A_SCRIPT: '1'})
    if ended.returncode:
        end_as(ended.returncode)


def end_as(code: int) -> None:
    """End this script as a process that it waited for, a signal (-N) as shells write it."""
    sys.exit(code if code > 0 else 128 - code)
