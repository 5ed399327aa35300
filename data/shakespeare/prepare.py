"""
Tiny Shakespeare in GPT-2 tokens: writes train.bin, val.bin and meta.json into this folder.

The text is data/shakespeare_char/input.txt, which is downloaded when it is missing. Without a
network the language reference of your Python takes its place, and meta.json says so. A later run
with a network replaces it.
tiktoken needs its GPT-2 vocabulary: a network once, or TIKTOKEN_CACHE_DIR.

Tiny Shakespeare has 301,966 tokens to train on and 36,059 to validate.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, HERE.parents[:2])  # data/ and the repository

from tiny_shakespeare import find_text

from nanomla.core.configurator import configure
from nanomla.core.token_files import summary, write_text
from nanomla.training.next_steps import print_next_steps

input = ''  # a text file of your own ('' = tiny Shakespeare)
val_fraction = 0.1  # the share of the text, at its end, that validates

configure(globals())

text, source = find_text(input)
print(summary(HERE, write_text(HERE, text, 'gpt2', source, val_fraction)))
print_next_steps(['train.py', 'config/finetune_shakespeare.py', '--init_from=gpt2'])
