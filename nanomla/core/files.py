"""Files that a kill leaves old or new, never half; tables of results; locks; progress bars."""

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanomla.core.configurator import UserError

ROOT = Path(__file__).resolve().parents[2]  # the repository


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError inside the `with` into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        if error.errno == errno.ENOSPC:
            why = 'no space left on the device'
        raise UserError(f'cannot write {path}: {why}') from None


@contextmanager
def replacing(path: str | os.PathLike, mode: str = 'w') -> Iterator[io.IOBase]:
    """
    Open a file beside `path` that takes its place at the end of the `with`: all of it or nothing.

    Folders are made. The file is synced before it is renamed, and its folder after it where that
    works (not on Windows). UserError when it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    aside = path.with_name(f'{path.name}.{os.getpid()}.partial')
    text = dict(encoding='utf-8', newline='') if 'b' not in mode else {}
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        with suppress(OSError):  # it is gone where all went well
            aside.unlink()
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write all of `content` to `path` or nothing, as `replacing` does."""
    with replacing(path, 'wb' if isinstance(content, bytes) else 'w') as file:
        file.write(content)


# -------------------------------------------------------------------------------------------------
# rows: JSONL and CSV


def jsonl(rows: list[dict]) -> str:
    """Return the rows as JSON, one a line."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Return the rows of a JSONL file. A ValueError names the first line that is no JSON object."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding='utf-8').splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f'{path}:{number}: not a JSON object')
        rows.append(row)
    return rows


def csv_table(rows: list[dict]) -> str:
    """Return the rows as CSV with a header; keys of a nested dict are joined with an underscore."""
    flat = []
    for row in rows:
        cells = {}
        for key, value in row.items():
            if isinstance(value, dict):
                cells |= {f'{key}_{inner}': nested for inner, nested in value.items()}
            else:
                cells[key] = value
        flat.append(cells)
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


def progress_bar(total: int, unit: str, done: int = 0):
    """Return a tqdm bar on stderr: a line every half minute where that is no terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise UserError('the progress bar needs tqdm: pip install tqdm') from None
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, unit=unit, unit_scale=True, mininterval=interval)
