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


def test_a_row_that_a_kill_has_cut_short_is_left_out_and_then_removed(tmp_path):
    """But never what is no piece of a row, or a row that lacks only its end."""
    path, rows = tmp_path / 'rows.jsonl', [dict(a=1), dict(a='x')]
    whole = files.jsonl(rows)
    last = len(files.jsonl(rows[:1]))
    for end in range(last, len(whole) + 1):
        path.write_text(whole[:end])
        read = files.read_appended(path)
        assert read == rows[: 1 + (end >= len(whole) - 1)]
        with files.appending(path) as file:
            file.write('{"b": 2}\n')
        assert files.read_jsonl(path) == [*read, dict(b=2)]
    for other in ('to do\nmore', 'more', '{"b": 1', '[1]\n', '{"a": \n{"a": 1}\n'):
        path.write_text(other)
        with pytest.raises(ValueError, match='rows.jsonl:1: not a JSON object'):
            files.read_appended(path, begin=b'{"a": ')


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


# -------------------------------------------------------------------------------------------------
# links, folders, logs


def test_a_link_is_replaced_and_never_written_through(tmp_path):
    target, link = tmp_path / 'target', tmp_path / 'link'
    target.write_text('theirs')
    link.symlink_to(target)
    files.write_file(link, 'mine')
    assert target.read_text() == 'theirs'
    assert link.read_text() == 'mine' and not link.is_symlink()


def test_a_link_at_the_name_of_the_file_aside_is_not_written_through(tmp_path):
    target, path = tmp_path / 'target', tmp_path / 'x.txt'
    target.write_text('theirs')
    files.beside(path).symlink_to(target)
    files.write_file(path, 'mine')
    assert target.read_text() == 'theirs' and path.read_text() == 'mine'


def test_a_file_is_written_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    """As on Windows, which opens no folder."""
    real = os.open

    def refuse_folders(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(13, 'Permission denied')
        return real(path, *args, **options)

    monkeypatch.setattr(os, 'open', refuse_folders)
    files.write_file(tmp_path / 'x.txt', 'new')
    with files.replacing_folder(tmp_path / 'folder') as aside:
        files.write_file(aside / 'y.txt', 'new')
    assert (tmp_path / 'x.txt').read_text() == (tmp_path / 'folder/y.txt').read_text() == 'new'


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    folder = tmp_path / 'new'
    with pytest.raises(ZeroDivisionError), files.replacing_folder(folder) as aside:
        (aside / 'x').write_text('half')
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with files.replacing_folder(folder) as aside:
        (aside / 'x').write_text('all')
        assert not folder.exists()
    assert os.listdir(tmp_path) == ['new'] and os.listdir(folder) == ['x']
    with pytest.raises(UserError, match='new is there already'):
        with files.replacing_folder(folder):
            pass
    assert (folder / 'x').read_text() == 'all'


def test_what_kills_have_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / 'ckpt.pt'
    for name in (
        'ckpt.pt.17.partial',
        'ckpt.pt.my.partial',
        'ckpt.pt.17.partial.txt',
        'a.1.partial',
    ):
        (tmp_path / name).touch()
    (tmp_path / 'ckpt.pt.18.partial').mkdir()
    (tmp_path / 'ckpt.pt.18.partial' / 'x').touch()
    files.remove_leftovers(path)
    left = ['a.1.partial', 'ckpt.pt.17.partial.txt', 'ckpt.pt.my.partial']
    assert sorted(os.listdir(tmp_path)) == left


def test_a_log_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / 'new' / 'log.jsonl'
    for before, after in (('', ''), ('a\nb\n', 'a\nb\n'), ('a\nb', 'a\n'), ('half', '')):
        path.parent.mkdir(exist_ok=True)
        path.write_text(before)
        with files.appending(path) as file:
            file.write('c\n')
        assert path.read_text() == after + 'c\n'
    long = 'x' * 200_000 + '\n'
    path.write_text(long + 'y' * 100_000)
    with files.appending(path) as file:
        file.write('c\n')
    assert path.read_text() == long + 'c\n'


def test_a_log_is_never_written_through_a_link_or_to_a_device(tmp_path):
    target, link = tmp_path / 'target', tmp_path / 'log.jsonl'
    target.write_text('theirs')
    link.symlink_to(target)
    with pytest.raises(UserError, match='symbolic link'):
        files.appending(link)
    assert target.read_text() == 'theirs'
    with pytest.raises(UserError, match='cannot write'):
        files.appending(tmp_path)


# -------------------------------------------------------------------------------------------------
# JSON and spreadsheets


def test_json_that_is_none_is_a_value_error(tmp_path):
    for text in (b'{', b'[' * 100_000, b'\xff', b'', b'1' * 5000):
        (tmp_path / 'x.json').write_bytes(text)
        with pytest.raises(ValueError):
            files.read_json(tmp_path / 'x.json')


def test_no_cell_of_a_csv_is_a_formula():
    texts = ['=1+1', '+1', '-1+1', '@SUM(A1)', '\tx', '\r=1', 'plain', '-0.5x']
    for text in texts:
        cell = files.csv_cell(text)
        assert cell == (text if text == 'plain' else "'" + text)
    assert files.csv_cell(-0.5) == -0.5 and files.csv_cell(None) is None
    assert files.csv_cell(['=1']) == "['=1']"
    assert files.csv_table([{'=cmd': 1}]).startswith("'=cmd")


@pytest.mark.parametrize('seconds_of_a_step, lines', [(0.02, 0), (60, 11)])
def test_a_progress_bar_in_a_log_is_a_few_lines(seconds_of_a_step, lines, capsys, monkeypatch):
    import tqdm.std

    now = [0.0]
    monkeypatch.setattr(tqdm.std, 'time', lambda: now[0])
    bar = files.progress_bar(1000, 'step')
    for _ in range(1000):
        now[0] += seconds_of_a_step
        bar.update()
    bar.close()
    assert capsys.readouterr().err.count('\r') <= lines
