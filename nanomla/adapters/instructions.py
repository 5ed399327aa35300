"""
Instructions and their answers: read from JSON lines, turned into tokens to learn from.

A line is {"system": ..., "question": ..., "response": ...}, as OpenOrca has it; "system" may be missing. Two ways
to make one text of it: 'marked' writes headings between the parts and ends with the end-of-text token, 'joined' is the
first study's bare concatenation of prompt and response.
"""

import json
from pathlib import Path

from nanomla.core.configurator import UserError
from nanomla.core.token_files import DATA
from nanomla.core.tokenizers import Tokenizer

TEMPLATES = ('marked', 'joined')
KEYS = ('system', 'question', 'response')


def examples(path, most=0):
    """The examples of a JSONL file, each a dict of KEYS, at most `most` (0 = all). UserError names the line that is none."""
    found = []
    try:
        with open(path, encoding='utf-8') as file:
            for number, line in enumerate(file, 1):
                if most and len(found) == most:
                    break
                if line.strip():
                    found.append(example(line, f'{path}:{number}'))
    except UnicodeDecodeError:
        raise UserError(f'{path} is not UTF-8 text') from None
    except OSError as error:
        raise UserError(
            f'cannot read {path}: {error.strerror}; make it with python data/openorca/prepare.py'
        ) from None
    if not found:
        raise UserError(f'{path} has no examples')
    return found


def example(line, where):
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(
            f'{where}: not JSON; a line is {{"question": ..., "response": ...}}'
        ) from None
    return checked(row, where)


def checked(row, where):
    """The row as a dict of KEYS, all texts. UserError: it has no question or no response."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: no object; a line is {{"question": ..., "response": ...}}')
    row = {key: row.get(key, '' if key == 'system' else None) for key in KEYS}
    for key, value in row.items():
        if not isinstance(value, str) or key != 'system' and not value.strip():
            raise UserError(
                f"{where}: '{key}' is {'missing or empty' if value is None or value == '' or isinstance(value, str) else 'no text'}"
            )
    return row


def folder_of(name):
    """The folder of a dataset of instructions: a path, or data/<name>."""
    folder = Path(name)
    return folder if (folder / 'train.jsonl').exists() else DATA / name


def prompt_of(row, template):
    if template == 'joined':
        return '\n'.join(part for part in (row['system'], row['question']) if part) + '\n'
    parts = [f'### System:\n{row["system"]}\n\n'] if row['system'] else []
    return ''.join([*parts, f'### Instruction:\n{row["question"]}\n\n### Response:\n'])


class Encoder:
    """Examples in the tokens of a model: of its own tokenizer, or bytes for a model that has none."""

    def __init__(self, tokenizer, vocab_size, template='marked', completion_only=True):
        if template not in TEMPLATES:
            raise UserError(f"template='{template}' is not known: use {' or '.join(TEMPLATES)}")
        if tokenizer is None and vocab_size < 256:
            raise UserError(
                f'the model has no tokenizer, and its vocabulary of {vocab_size} has no room for bytes'
            )
        self.tokenizer = tokenizer or Tokenizer(dict(tokenizer='bytes'))
        self.template, self.completion_only = template, completion_only
        self.name = 'bytes (the model has no tokenizer)' if tokenizer is None else tokenizer.name
        self.begin = [tokenizer.bos] if getattr(tokenizer, 'bos', None) is not None else []
        self.ends = sorted(
            getattr(tokenizer, 'eos', None) or [0]
        )  # NUL is the end of a text of bytes

    def encode(self, row):
        """(prompt ids, response ids with the end of text behind them, unless 'joined')."""
        prompt = self.begin + list(self.tokenizer.encode(prompt_of(row, self.template)))
        return prompt, list(self.tokenizer.encode(row['response'])) + (
            self.ends[:1] if self.template == 'marked' else []
        )

    def document(self, row):
        """(ids, targets): targets[t] is ids[t + 1], or -1 behind the end and, completion_only, within the prompt."""
        prompt, response = self.encode(row)
        ids = prompt + response
        targets = ids[1:] + [-1]
        if self.completion_only:
            targets[: len(prompt) - 1] = [-1] * (len(prompt) - 1)
        return ids, targets

    def decode(self, ids):
        """Text of token ids, up to the first end of text."""
        ids = [int(i) for i in ids]
        ends = [ids.index(end) for end in self.ends if end in ids]
        ids = ids[: min(ends, default=len(ids))]
        if self.tokenizer.name == 'bytes':
            return bytes(i for i in ids if i < 256).decode(errors='replace')
        return self.tokenizer.decode_bytes(ids).decode(errors='replace')
