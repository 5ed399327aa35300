"""
The tokens of a model's own tokenizer.json for data/*/prepare.py, made in several processes.

The text is cut into chunks where the tokens of both sides are those of the whole: a place is taken
when the tokenizer itself says so of the text around it, whatever its rules are.
"""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomla.checkpoints.hub import model_folder, read_json
from nanomla.checkpoints.tokenizer import HFTokenizer, read_tokenizer, read_tokenizer_config
from nanomla.core.configurator import UserError
from nanomla.core.files import copy_file
from nanomla.core.token_files import TokenWriter, in_order

# What ends a document in pretraining, by the families' names; the eos of a chat model ends a turn.
DOCUMENT_ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<｜end▁of▁sentence｜>')
AROUND = 200  # characters on either side of a cut that are looked at
FAR = 4000  # characters before the end of a chunk among which a cut is looked for
TRIALS = 200  # places that are tried
DOCUMENTS = 256  # that a process takes at a time


def open_model_tokenizer(name: str) -> HFTokenizer:
    """Return the tokenizer of a model: a folder with tokenizer.json, or a name on the hub."""
    if not os.path.isdir(name) and '/' not in name:
        raise UserError(
            f'--tokenizer={name} is neither the folder nor the name on the hub of a model with a '
            'tokenizer.json, nor what --help names'
        )
    folder = model_folder(name)
    config = {}
    if (folder / 'config.json').exists():
        config = read_json(folder / 'config.json')
    tokenizer = read_tokenizer(folder, config)
    if tokenizer is None:
        raise UserError(f'--tokenizer={name} has no tokenizer.json')
    return tokenizer


@dataclass
class DocumentCodec:
    """
    Documents as ids of a tokenizer.json.

    begin, end: ids around each document
    """

    tokenizer: HFTokenizer
    begin: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: HFTokenizer) -> 'DocumentCodec':
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        return cls(tokenizer, begin, document_end(tokenizer))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def meta(self) -> dict:
        """The entries of meta.json that say what the ids are."""
        return self.tokenizer.meta | dict(
            bos_token_id=self.tokenizer.bos, eos_token_id=sorted(self.tokenizer.eos)
        )

    def encode_array(self, text: str) -> np.ndarray:
        return self.tokenizer.encode_array(text)

    def pool(self, num_proc: int) -> Executor:
        """Return processes where `encode_part` and `encode_documents` use this codec."""
        num_proc = num_proc or os.cpu_count()
        if num_proc == 1:
            start_worker(self)
            return ThreadPoolExecutor(1)
        return ProcessPoolExecutor(
            num_proc,
            mp_context=multiprocessing.get_context('spawn'),
            initializer=start_process,
            initargs=(self,),
        )

    def copy_to(self, folder: str | Path) -> None:
        """Put the files of the tokenizer beside a dataset, so that its tokens can be read."""
        for file in self.tokenizer.files:
            target = Path(folder) / file.name
            if not target.exists() or not target.samefile(file):
                copy_file(file, target)

    def cut(self, text: str, most: int) -> tuple[int, int]:
        """
        Return where the first chunk of a longer text ends, at most `most` characters, and where
        the next one begins: behind a blank that the tokenizer puts in front of each text itself.
        """
        most = min(most, len(text) - AROUND)
        for tried, place in enumerate(cutting_places(text, most)):
            if tried == TRIALS:
                break
            left, right = text[max(0, place - AROUND) : place], text[place : place + AROUND]
            rest = right
            if self.tokenizer.leading_blank:
                rest = right.removeprefix(' ')
            parts = [*self.encode_array(left), *self.encode_array(rest)]
            if np.array_equal(parts, self.encode_array(left + right)):
                return place, place + len(right) - len(rest)
        return most, most


def document_end(tokenizer: HFTokenizer) -> list[int]:
    """Return the ids that end a document; [] where the tokenizer names none."""
    token = read_tokenizer_config(tokenizer.files).get('eos_token')
    if isinstance(token, dict):
        token = token.get('content')
    for name in (*DOCUMENT_ENDS, token):
        number = None if name is None else tokenizer.bpe.token_to_id(name)
        if number is not None:
            return [number]
    return sorted(tokenizer.eos)[:1]


def write_documents(
    folder: str | Path,
    codec: DocumentCodec,
    texts: dict[str, list[str]],
    meta: dict,
    num_proc: int = 0,
) -> dict:
    """
    Write a dataset of documents, split -> their texts, with the tokenizer beside it.

    meta: further entries of meta.json, `source` among them. Returns all of it.
    """
    digest = hashlib.sha256()
    with TokenWriter(folder, codec.vocab_size) as files:
        for split, documents in texts.items():
            for text in documents:
                digest.update(text.encode())
            parts = []
            for first in range(0, len(documents), DOCUMENTS):
                parts.append((first, documents[first : first + DOCUMENTS]))
            for _, encoded in in_order(encode_documents, parts, num_proc, codec.pool):
                for ids in encoded:
                    files.add(split, ids)
        codec.copy_to(folder)
        return files.publish(meta | codec.meta | dict(sha256=digest.hexdigest()))


def cutting_places(text: str, most: int) -> Iterator[int]:
    """Yield places up to `most`, the last first: before a line or a word, then anywhere."""
    for place in range(most, max(most - FAR, 0), -1):
        if text[place] in '\n ' and not text[place - 1].isspace():
            yield place
    yield from range(most, max(most - FAR, 0), -1)


# -------------------------------------------------------------------------------------------------
# in the processes

worker: DocumentCodec | None = None  # of this process


def start_worker(codec: DocumentCodec) -> None:
    global worker
    worker = codec


def start_process(codec: DocumentCodec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    start_worker(codec)


def encode_part(part: tuple[str, str | None]) -> tuple[str, int, np.ndarray]:
    """Return split, number of characters and ids of (split, text); None is between documents."""
    split, text = part
    if text is None:
        return split, 0, np.array(worker.end + worker.begin, np.int64)
    return split, len(text), worker.encode_array(text)


def encode_documents(numbered: tuple[int, list[str]]) -> tuple[int, list[np.ndarray]]:
    """
    Return the number as it is, and the ids of each document between what begins and ends one; none
    for an empty one.
    """
    first, texts = numbered
    encoded = []
    for text in texts:
        parts = [worker.begin, worker.encode_array(text), worker.end] if text else [[]]
        encoded.append(np.concatenate(parts).astype(np.int64))
    return first, encoded
