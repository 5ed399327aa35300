"""Writing files so that a kill leaves the old one or the new one; locks, rows and progress."""

import csv
import io
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from nanomla.core.configurator import UserError


@contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from None


def write_atomically(path, content):
    partial = path.with_name(path.name + '.partial')
    with writing(path):
        partial.write_bytes(content)
        partial.replace(path)


def progress_bar(total, unit, done=0):
    """A bar with the time left on stderr; a line every half minute where that is no terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise UserError('the progress bar needs tqdm: pip install tqdm') from None
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )


class Rows(list):
    """
    The rows (dicts) of a measurement, in FOLDER/NAME.jsonl and .csv, which are whole after every row. With `keep`
    it begins with the rows that are there. `facts` are part of every row. UserError where it cannot write.
    """

    def __init__(self, folder, name, facts, keep=False):
        self.folder, self.name, self.facts = Path(folder), name, facts
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--out_dir={folder} cannot be made: {error.strerror}') from None
        if keep and (file := self.folder / f'{name}.jsonl').exists():
            try:
                super().__init__(json.loads(line) for line in file.read_text().splitlines())
            except ValueError:
                raise UserError(
                    f'--keep=True: {file} holds no rows of JSON: name another --out_dir'
                ) from None

    def add(self, **row):
        self.append(self.facts | row)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for row in self for key in row)))
        writer.writeheader()
        writer.writerows(self)
        for ending, text in (
            ('jsonl', ''.join(json.dumps(row) + '\n' for row in self)),
            ('csv', table.getvalue()),
        ):
            file = self.folder / f'{self.name}.{ending}'
            partial = file.with_name(file.name + '.partial')
            try:
                partial.write_text(text)
                os.replace(partial, file)
            except OSError as error:
                raise UserError(f'cannot write {file}: {error.strerror}') from None
        return self[-1]

    def find(self, **key):
        """The first row that says all of `key`, or None."""
        return next(
            (row for row in self if all(row.get(name) == value for name, value in key.items())),
            None,
        )


def write(path, text):
    """All of `text` to `path`, whose folders are made, or nothing."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
        partial.write_text(text, encoding='utf-8')
        os.replace(partial, path)


def lock(folder, wait=False):
    """A file that keeps everybody else out of `folder` while it is open (by this process or one that inherits it); None when somebody has it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / 'lock', 'a')
    try:
        import fcntl
    except ImportError:  # Windows: nobody else may look
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except BlockingIOError:
        file.close()
    except OSError as error:
        raise UserError(
            f'{folder} is on a file system without locks ({error.strerror}): name an --out_dir on another one'
        ) from None


def write_text(path, text):
    """`text` to `path`, whole or not at all."""
    partial = f'{path}.partial'
    try:
        with open(partial, 'w', encoding='utf-8', newline='') as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from None


def table(rows):
    """Dicts as CSV, nested ones with joined names."""
    if not rows:
        return ''
    flat = [
        {
            f'{key}_{inner}' if inner else key: value
            for key, entry in row.items()
            for inner, value in (entry.items() if isinstance(entry, dict) else [('', entry)])
        }
        for row in rows
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
