"""
Verify checkpoints before they are used: no byte has changed, and the content is what a checkpoint
holds.

torch.save writes a zip archive. `seal` adds checksums of all its bytes as the archive's comment,
which torch.load skips. nanoGPT's and older checkpoints have none: they are checked by the CRC-32
that the archive has of each of its records, at which torch.load does not look.

A safetensors file begins with the length of its header and the header, JSON that begins with
entries for anyone. `seal_tensors` puts a checksum of all that follows there; files of others have
none and are read as they are.
"""

import mmap
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import torch

from nanomla.core.checks import (
    ANYTHING,
    FLAG,
    TABLE,
    TEXT,
    Rule,
    check_entries,
    list_of,
    number,
    whole,
)
from nanomla.core.configurator import UserError
from nanomla.core.token_files import check_meta

CHUNK = 2**25  # bytes that have a checksum; in the files, so it stays
SEAL = b'nanomla-crc32'  # ends a file that has checksums of all its bytes
ARCHIVE = b'PK\x03\x04'  # begins an archive
COUNT_DIGITS = 6  # before it, how many checksums there are; before these, the checksums in hex
TENSORS_METADATA = dict(format='pt', nanomla='crc32 00000000')  # of a file before its checksum
TENSORS_BEGIN = 8  # bytes of the length before the header
TENSORS_HEAD = b'{"__metadata__":{"format":"pt","nanomla":"crc32 '
DIGITS_AT = TENSORS_BEGIN + len(TENSORS_HEAD)  # of the checksum
TENSORS_SUMMED = DIGITS_AT + 8  # where the bytes begin of which it is the checksum
TENSOR = Rule(lambda value: isinstance(value, torch.Tensor), 'a tensor')

# The entries of a checkpoint that scripts read; others may be anything.
ENTRIES = dict(
    model=TABLE,
    model_args=TABLE,
    kind=TEXT,
    step=whole(least=0),
    best_val_loss=number(),
    best_step=whole(least=0),
    seconds=number(least=0),
    meta=TABLE,
    config=TABLE,
    run_id=TEXT,
    launch=TEXT,
    tokens=whole(least=0),
    evaluated_step=whole(least=0),
    train_seconds=number(least=0),
    commit=TEXT,
    conversion=TABLE | None,
    pretrained=FLAG,
    optimizers=list_of(TABLE),
    scaler=TABLE,
    adapters=TABLE,
    average=list_of(TENSOR) | None,
)
# Of the state dict of an optimizer, of each of its groups, and of a gradient scaler.
OPTIMIZER = dict(state=TABLE, param_groups=list_of(TABLE))
GROUP = dict(params=list_of(whole(least=0)))
GROUP_MAY_HAVE = dict(param_names=list_of(TEXT) | None)
SCALER = dict(
    scale=number(),
    growth_factor=number(),
    backoff_factor=number(),
    growth_interval=whole(least=1),
    _growth_tracker=whole(least=0),
)
SETTINGS = dict(dataset=TEXT)  # of these, `config` may hold any
# Of a model's settings, by the type of their default.
SETTING_RULES = {
    bool: FLAG,
    int: whole(),
    float: number(),
    str: TEXT,
    tuple: list_of(number()),
}


# -------------------------------------------------------------------------------------------------
# bytes


def seal(file: BinaryIO) -> None:
    """Add checksums of all its bytes to an archive that torch.save has written to `file`."""
    file.flush()
    size = file.seek(0, os.SEEK_END)
    count = -(-size // CHUNK)
    length = 8 * count + COUNT_DIGITS + len(SEAL)
    # An archive without a comment ends with the comment's length.
    file.seek(size - 2)
    assert file.read(2) == b'\0\0' and length < 2**16, 'not an archive of torch.save'
    file.seek(size - 2)
    file.write(length.to_bytes(2, 'little'))
    file.flush()
    sums = checksums(file, 0, size)
    file.seek(size)
    file.write(b''.join(sums) + str(count).zfill(COUNT_DIGITS).encode() + SEAL)


def checksums(file: BinaryIO, begin: int, end: int) -> list[bytes]:
    """Return the CRC-32 of each CHUNK of a file from one place to another, as hex."""
    with mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) as content:
        # zlib works on large pieces without Python's lock.
        with memoryview(content) as view, ThreadPoolExecutor() as pool:
            chunks = [view[place : min(place + CHUNK, end)] for place in range(begin, end, CHUNK)]
            sums = [b'%08x' % crc for crc in pool.map(zlib.crc32, chunks)]
            for chunk in chunks:
                chunk.release()
    return sums


def check_bytes(path: Path) -> None:
    """
    Raise a UserError unless a checkpoint is as it was written.

    A file that is no archive, as torch once wrote them, has no checksums and passes.
    """
    try:
        with open(path, 'rb') as file:
            fine = is_as_written(file)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from None
    except Exception:  # zipfile raises many kinds
        fine = False
    if not fine:
        raise UserError(
            f'{path} is damaged: its bytes are not those that were written{way_out(path)}'
        )


def is_as_written(file: BinaryIO) -> bool:
    """Return whether the bytes of a checkpoint fit its checksums, or those of its records."""
    size = file.seek(0, os.SEEK_END)
    tail = COUNT_DIGITS + len(SEAL)
    file.seek(max(0, size - tail))
    end = file.read()
    if end.endswith(SEAL):
        count = int(end[:COUNT_DIGITS])
        size -= tail + 8 * count
        file.seek(size)
        return file.read(8 * count) == b''.join(checksums(file, 0, size))
    file.seek(0)
    if file.read(4) != ARCHIVE:
        return True
    with zipfile.ZipFile(file) as archive:
        return not archive.comment and archive.testzip() is None


def seal_tensors(path: Path) -> None:
    """Add its checksum to a safetensors file that was written with TENSORS_METADATA."""
    with open(path, 'r+b') as file:
        file.seek(TENSORS_BEGIN)
        head = TENSORS_HEAD + b'00000000"}'
        # safetensors writes the two entries in any order.
        assert sorted(file.read(len(head))) == sorted(head), 'not an export'
        file.seek(TENSORS_BEGIN)
        file.write(TENSORS_HEAD + checksum_of_tensors(file))


def checksum_of_tensors(file: BinaryIO) -> bytes:
    """Return the checksum of all bytes of a safetensors file behind those of its checksum."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    sums = checksums(file, TENSORS_SUMMED, size)
    file.seek(place)
    return b'%08x' % zlib.crc32(b''.join(sums))


def check_tensors(path: Path) -> None:
    """
    Raise a UserError unless a safetensors file of `seal_tensors` is as it was written.

    The length of the header is safetensors' to check: it fits no other header and no other file.
    """
    with open(path, 'rb') as file:
        head = file.read(TENSORS_SUMMED)[TENSORS_BEGIN:]
        # One byte may have changed in either word.
        if b'"nanomla"' not in head and b'"crc32 ' not in head:
            return
        fine = len(head) == TENSORS_SUMMED - TENSORS_BEGIN
        fine = fine and head == TENSORS_HEAD + checksum_of_tensors(file)
    if not fine:
        raise UserError(
            f'{path} is damaged: its bytes are not those that were written; '
            'take it from a copy, or export it again'
        )


def is_archive(path: str | Path) -> bool:
    """Return whether a file is a zip archive, and not of the kind that torch once wrote."""
    with open(path, 'rb') as file:
        return file.read(4) == ARCHIVE


def way_out(path: Path) -> str:
    """Return which other checkpoints of the run are there, for the end of a message."""
    candidates = [path.parent / 'ckpt.pt', path.parent / 'last.pt']
    candidates += sorted(path.parent.glob('step-*.pt'))[-1:]
    for name in ('ckpt.pt', 'last.pt'):  # of the last run before, as ids of runs sort by time
        candidates += sorted((path.parent / 'previous').glob(f'*/{name}'))[-1:]
    candidates += sorted(path.parent.glob('previous/*/ckpt.pt'))[-1:]
    others = [str(file) for file in candidates if file != path and os.path.isfile(file)]
    if not others:
        return '; take it from a copy, or train again'
    return f'; go on from {" or ".join(others)} by --init_from'


# -------------------------------------------------------------------------------------------------
# content


def checked_content(content: object, path: str | Path) -> dict:
    """
    Return the content of a checkpoint with the names of ours, or raise a UserError that says which
    entry is not what it should be.
    """
    tables = ('model', 'model_args')
    if not isinstance(content, dict) or not all(name in content for name in tables):
        raise UserError(
            f"{path} is no nanoMLA or nanoGPT checkpoint: it has no 'model' and 'model_args'"
        )
    content.setdefault('kind', 'mha')
    content.setdefault('step', content.get('iter_num', 0))  # nanoGPT's name
    loss = content.get('best_val_loss')
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # nanoGPT's is a tensor
        content['best_val_loss'] = loss.item()
    try:
        check_entries(content, ENTRIES)
        check_meta(content.get('meta', {}))
        check_entries(content.get('config', {}), SETTINGS)
        check_training_state(content)
    except ValueError as error:
        raise UserError(f'{path} is no checkpoint that can be used: {error}') from None
    return content


def check_training_state(content: dict) -> None:
    """Raise a ValueError unless optimizers and scaler have the form in which torch saves them."""
    for optimizer in content.get('optimizers', []):
        check_entries(optimizer, OPTIMIZER, needed=OPTIMIZER)
        if not all(isinstance(moments, dict) for moments in optimizer['state'].values()):
            raise ValueError('the moments of an optimizer are no tables')
        for group in optimizer['param_groups']:
            check_entries(group, GROUP | GROUP_MAY_HAVE, needed=GROUP)
    if content.get('scaler'):
        check_entries(content['scaler'], SCALER, needed=SCALER)


def check_model_args(args: dict, config_class: type, path: str | Path) -> None:
    """Raise a UserError unless `args` are fields of a model's config, each of its type."""
    rules = {}
    for field in fields(config_class):
        rules[field.name] = SETTING_RULES.get(type(field.default), ANYTHING)
    unknown = sorted(str(key) for key in args if key not in rules)
    if unknown:
        raise UserError(f'{path} has model settings that are not known here: {", ".join(unknown)}')
    try:
        check_entries(args, rules)
    except ValueError as error:
        raise UserError(f'{path} has model settings that do not fit: {error}') from None
