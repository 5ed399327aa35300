"""Files that a kill leaves old or new, tables of results, and locks."""

import csv
import os
import subprocess
import sys

import pytest
from helpers import ROOT, wait_until

from nanomla.core import files
from nanomla.core.configurator import UserError


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'x.txt'
    files.write_file(path, 'old')
    with files.replacing(path) as file:
        file.write('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and os.listdir(path.parent) == ['x.txt']
    files.write_file(path, b'\x00\xff')
    assert path.read_bytes() == b'\x00\xff'


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / 'x.txt'
    files.write_file(path, 'old')
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write('half')
        raise ZeroDivisionError
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['x.txt']


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / 'x.txt'
    files.write_file(path, 'old')
    with pytest.raises(UserError, match='cannot write .*y.txt'):
        files.write_file(path / 'y.txt', '')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot write .*x.txt: no space left on the device'):
        files.write_file(path, 'new')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['x.txt']


def test_the_text_is_utf8_whatever_the_locale(tmp_path):
    files.write_file(tmp_path / 'x.txt', 'café 日\n')
    assert (tmp_path / 'x.txt').read_bytes() == 'café 日\n'.encode()


# -------------------------------------------------------------------------------------------------
# tables


def test_rows_come_back_and_a_broken_line_is_named(tmp_path):
    rows = [dict(a=1, b='x'), dict(a=2.5, c=None)]
    path = tmp_path / 'rows.jsonl'
    files.write_file(path, files.jsonl(rows))
    assert files.read_jsonl(path) == rows
    for broken in ('{"a": 1', '[1]', '7'):
        files.write_file(path, files.jsonl(rows) + broken + '\n')
        with pytest.raises(ValueError, match='rows.jsonl:3: not a JSON object'):
            files.read_jsonl(path)


def test_a_csv_has_all_columns_and_flat_names():
    text = files.csv_table([dict(a=1, b=dict(c=2, d=3)), dict(a=4, e='x,y')])
    rows = list(csv.DictReader(text.splitlines()))
    assert rows[0] == dict(a='1', b_c='2', b_d='3', e='')
    assert rows[1] == dict(a='4', b_c='', b_d='', e='x,y')
    assert files.csv_table([]) == ''


def test_a_table_of_results_is_on_disk_after_every_row(tmp_path):
    table = files.ResultsTable(tmp_path / 'out', 'decode', dict(commit='abc'))
    row = table.add(batch=1, seconds=0.5)
    assert row == dict(commit='abc', batch=1, seconds=0.5)
    assert files.read_jsonl(tmp_path / 'out/decode.jsonl') == [row]
    assert (tmp_path / 'out/decode.csv').read_text().startswith('commit,batch,seconds')
    table.add(batch=2, seconds=0.7)
    assert table.find(batch=2)['seconds'] == 0.7 and table.find(batch=3) is None

    again = files.ResultsTable(tmp_path / 'out', 'decode', {}, keep=True)
    assert list(again) == list(table)
    assert list(files.ResultsTable(tmp_path / 'out', 'decode', {})) == []
    (tmp_path / 'out/decode.jsonl').write_text('oops\n')
    with pytest.raises(UserError, match='decode.jsonl:1: not a JSON object: name another'):
        files.ResultsTable(tmp_path / 'out', 'decode', {}, keep=True)


# -------------------------------------------------------------------------------------------------
# locks

HOLDER = """
import sys, time
from pathlib import Path
from nanomla.core import files
held = files.lock(sys.argv[1])
Path(sys.argv[2]).write_text(str(held is not None))
sys.stdin.read()
"""


def test_one_process_holds_a_folder_and_its_end_gives_it_back(tmp_path):
    folder, answer = tmp_path / 'run', tmp_path / 'answer'
    command = [sys.executable, '-c', HOLDER, str(folder), str(answer)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    try:
        wait_until(lambda: answer.exists() and answer.read_text(), holder)
        assert answer.read_text() == 'True'
        assert files.lock(folder) is None
        assert files.lock(folder, 'another') is not None
    finally:
        holder.kill()
        holder.wait()
    with files.lock(folder) as held:
        assert held is not None
    assert files.lock(folder) is not None


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write .*file'):
        files.lock(tmp_path / 'file')


# -------------------------------------------------------------------------------------------------
# tables for a terminal


def test_a_text_table_is_aligned_and_what_does_not_fit_follows_below_with_the_names():
    rows = [
        {'model': 'a', 'cache': 'dense', 'kind': 'mha', 'loss': '1.5', 'note': 'x' * 90},
        {'model': 'long name', 'cache': 'int8', 'kind': 'mla', 'loss': '10.25', 'note': ''},
    ]
    lines = files.text_table(rows, names=['model', 'cache'], left=['kind']).splitlines()
    assert lines[:4] == [
        'model      cache  kind   loss',
        'a          dense  mha     1.5',
        'long name  int8   mla   10.25',
        '',
    ]
    assert [line.split() for line in lines[4:]] == [
        ['model', 'cache', 'note'],
        ['a', 'dense', 'x' * 90],
        ['long', 'name', 'int8'],
    ]
    assert max(map(len, lines)) <= files.TABLE_WIDTH
