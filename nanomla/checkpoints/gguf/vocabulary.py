"""The vocabulary of a GGUF file: what llama.cpp needs of a byte-level BPE's tokenizer.json."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.checkpoints.tokens.chat import ChatTemplate
from nanomla.core.configurator import UserError

# Patterns by which pre-tokenizers cut a text, each within the pieces of the one before it.
DIGIT = r'\p{N}'
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN2 = LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')
# (patterns, whether a piece that is a token needs no merges) -> llama.cpp's name for the two
PRE_TOKENIZERS = {
    ((GPT2,), False): 'gpt-2',
    ((DIGIT, GPT2), False): 'smollm',
    ((LLAMA3,), True): 'llama-bpe',
    ((LLAMA3,), False): 'smaug-bpe',
    ((QWEN2,), False): 'qwen2',
}
MOST_ENDS = 3  # ids that end a text: a GGUF file names the end of a text, a turn and a message


@dataclass
class Vocabulary:
    """
    tokens: by id, in GPT-2's alphabet of bytes; types: gguf.TokenType of each
    merges: 'left right', the first to be made first
    ends: the ids that end a text
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    bos: int | None
    ends: list[int]
    chat_template: str | None


def vocabulary_of(tokenizer: HFTokenizer, size: int) -> Vocabulary:
    """
    Return the vocabulary of a model with `size` tokens, some of which may be unused.

    UserError for a tokenizer that llama.cpp would read as another one.
    """
    path = tokenizer.files[0]
    content = json.loads(tokenizer.bpe.to_str())
    check_model(content['model'], path)
    check_normalizer(content.get('normalizer'), path)
    if len(tokenizer.eos) > MOST_ENDS:
        raise UserError(
            f'{path}: {len(tokenizer.eos)} ids end a text, but a GGUF file names {MOST_ENDS} at '
            'most: leave some out of eos_token_id'
        )
    tokens, types = tokens_of(tokenizer, size)
    template = ChatTemplate.of(tokenizer)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[' '.join(pair) for pair in content['model']['merges']],
        pre_tokenizer=pre_tokenizer_of(content, path),
        bos=tokenizer.bos,
        ends=sorted(tokenizer.eos),
        chat_template=template.source if template else None,
    )


def tokens_of(tokenizer: HFTokenizer, size: int) -> tuple[list[str], list[int]]:
    """Return the tokens by their ids, and their types."""
    from gguf import TokenType

    tokens = [f'[PAD{i}]' for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in tokenizer.bpe.get_vocab(with_added_tokens=False).items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for i, token in tokenizer.bpe.get_added_tokens_decoder().items():
        tokens[i] = token.content
        types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return tokens, types


# -------------------------------------------------------------------------------------------------
# what llama.cpp reads as it is meant


def check_model(model: dict, path: Path) -> None:
    is_plain = not (model.get('byte_fallback') or model.get('dropout'))
    is_plain = is_plain and not model.get('continuing_subword_prefix')
    is_plain = is_plain and not model.get('end_of_word_suffix')
    if model.get('type') != 'BPE' or not is_plain:
        raise UserError(
            f'{path} is no byte-level BPE, and a GGUF file takes no other tokenizer from here: '
            'export a folder'
        )


def check_normalizer(normalizer: dict | None, path: Path) -> None:
    if normalizer is None:
        return
    if normalizer.get('type') != 'NFC':
        raise UserError(
            f'{path} changes texts first ({normalizer.get("type")}), which llama.cpp does not: '
            'export a folder'
        )
    print(
        f'{path}: texts become NFC first, which llama.cpp does not do: give it texts in NFC',
        file=sys.stderr,
    )


def pre_tokenizer_of(content: dict, path: Path) -> str:
    """Return llama.cpp's name for the way in which a tokenizer.json cuts a text before BPE."""
    patterns = tuple(patterns_of(content.get('pre_tokenizer')))
    ignore_merges = bool(content['model'].get('ignore_merges'))
    name = PRE_TOKENIZERS.get((patterns, ignore_merges))
    if name is None:
        known = ', '.join(PRE_TOKENIZERS.values())
        raise UserError(
            f'{path} cuts texts as none of the pre-tokenizers of llama.cpp that are known here '
            f'({known}): export a folder'
        )
    return name


def patterns_of(step: dict | None) -> list[str | None]:
    """Return the patterns of a pre-tokenizer; None among them for a step that is no pattern."""
    match step:
        case {'type': 'Sequence', 'pretokenizers': steps}:
            return sum(map(patterns_of, steps), [])
        case {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': uses_regex}:
            return [GPT2] if uses_regex else []
        case {'type': 'Digits', 'individual_digits': True}:
            return [DIGIT]
        case {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated'}:
            return [pattern] if not step.get('invert') else [None]
    return [None]
