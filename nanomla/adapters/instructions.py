"""
Instructions and their answers: read from JSON lines, turned into tokens to learn from.

A line is {"system": ..., "question": ..., "response": ...}, as OpenOrca has it; "system" may be
missing. Two templates make one text of it: 'marked' writes headings between the parts and ends with
the end-of-text token; 'joined' is the first study's bare concatenation of prompt and response.
"""

from collections.abc import Sequence
from pathlib import Path

from nanomla.core.checks import check_choice
from nanomla.core.configurator import UserError
from nanomla.core.files import parse_json
from nanomla.core.token_files import DATA
from nanomla.core.tokenizers import Tokenizer

TEMPLATES = ('marked', 'joined')
KEYS = ('system', 'question', 'response')
A_LINE = 'a line is {"question": ..., "response": ...}'


def read_examples(path: str | Path, most: int = 0) -> list[dict]:
    """
    Return the examples of a JSONL file, each a dict of KEYS, at most `most` (0 = all).

    UserError names the line that is none.
    """
    examples = []
    try:
        with open(path, encoding='utf-8') as file:
            for number, line in enumerate(file, 1):
                if most and len(examples) == most:
                    break
                if line.strip():
                    examples.append(parse_example(line, f'{path}:{number}'))
    except UnicodeDecodeError:
        raise UserError(f'{path} is not UTF-8 text') from None
    except OSError as error:
        raise UserError(
            f'cannot read {path}: {error.strerror}; make it with python data/openorca/prepare.py'
        ) from None
    if not examples:
        raise UserError(f'{path} has no examples')
    return examples


def parse_example(line: str, where: str) -> dict:
    try:
        row = parse_json(line)
    except ValueError:
        raise UserError(f'{where}: not JSON; {A_LINE}') from None
    return check_example(row, where)


def check_example(row: object, where: str) -> dict:
    """Return the row as a dict of KEYS, all texts. UserError: no question or no response."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: no object; {A_LINE}')
    example = {}
    for key in KEYS:
        value = row.get(key)
        if key == 'system' and key not in row:
            value = ''
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: '{key}' is no text")
        if value is None or (key != 'system' and not value.strip()):
            raise UserError(f"{where}: '{key}' is missing or empty")
        example[key] = value
    return example


def folder_of(name: str) -> Path:
    """Return the folder of a dataset of instructions: a path, or data/<name>."""
    if (Path(name) / 'train.jsonl').exists():
        return Path(name)
    return DATA / name


def prompt_of(example: dict, template: str) -> str:
    """Return the text in front of the response."""
    system, question = example['system'], example['question']
    if template == 'joined':
        return f'{system}\n{question}\n' if system else f'{question}\n'
    heading = f'### System:\n{system}\n\n' if system else ''
    return f'{heading}### Instruction:\n{question}\n\n### Response:\n'


class Encoder:
    """
    Examples in the tokens of a model: of its own tokenizer, or bytes for a model that has none.

    completion_only: nothing but the response is learned
    """

    def __init__(
        self,
        tokenizer,
        vocab_size: int,
        template: str = 'marked',
        completion_only: bool = True,
    ):
        check_choice('template', template, TEMPLATES)
        self.template, self.completion_only = template, completion_only
        if tokenizer is not None:
            self.tokenizer, self.name = tokenizer, tokenizer.name
            self.begin = [] if tokenizer.bos is None else [tokenizer.bos]
            self.ends = sorted(tokenizer.eos or [0])
            return
        if vocab_size < 256:
            raise UserError(
                f'the model has no tokenizer, and its vocabulary of {vocab_size} '
                'has no room for bytes'
            )
        self.tokenizer = Tokenizer(dict(tokenizer='bytes'))
        self.name = 'bytes (the model has no tokenizer)'
        self.begin, self.ends = [], [0]  # NUL ends a text of bytes

    def encode(self, example: dict) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt and of the response, which 'marked' ends with an end."""
        prompt = self.tokenizer.encode(prompt_of(example, self.template))
        response = list(self.tokenizer.encode(example['response']))
        if self.template == 'marked':
            response.append(self.ends[0])
        return [*self.begin, *prompt], response

    def document(self, example: dict) -> tuple[list[int], list[int]]:
        """
        Return ids and targets of an example.

        targets[t] is ids[t + 1]; it is -1 after the last token and, with completion_only, within
        the prompt.
        """
        prompt, response = self.encode(example)
        ids = prompt + response
        targets = ids[1:] + [-1]
        if self.completion_only:
            not_learned = len(prompt) - 1
            targets[:not_learned] = [-1] * not_learned
        return ids, targets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, up to the first end of text."""
        text = []
        for i in map(int, ids):
            if i in self.ends:
                break
            text.append(i)
        return self.tokenizer.decode_bytes(text).decode(errors='replace')
