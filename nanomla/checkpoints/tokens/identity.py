"""What decides how a tokenizer.json divides text, as one hash: files that share it are alike."""

import hashlib
import json

# Entries of tokenizer.json that decide which ids a text has. Padding, truncation and what is put
# around a text are not asked for; the decoder does not see the text.
DECIDING = ('added_tokens', 'normalizer', 'pre_tokenizer', 'model')


def identity_of(tokenizer_json: str) -> str:
    """
    Return the sha256 of vocabulary, merges, normalizer, pre-tokenizer and special tokens.

    tokenizer_json: as the `tokenizers` package writes what it has read, so that two spellings of
        one tokenizer are one
    """
    content = json.loads(tokenizer_json)
    deciding = {key: without_off(content.get(key)) for key in DECIDING}
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def without_off(entry: object) -> object:
    """
    Return an entry without what is switched off in its dicts.

    Versions of the package differ in which of these they write.
    """
    if isinstance(entry, list):
        return [without_off(part) for part in entry]
    if not isinstance(entry, dict):
        return entry
    kept = {key: without_off(value) for key, value in entry.items()}
    return {key: value for key, value in kept.items() if not is_off(value)}


def is_off(value: object) -> bool:
    # An id of 0 is none, though False == 0 for Python.
    return value is None or value is False or value in ('', [], {})
