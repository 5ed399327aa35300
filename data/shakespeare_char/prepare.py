"""
Tiny Shakespeare, one token a character: train.bin, val.bin and meta.json in this folder.

The text is data/shakespeare_char/input.txt, which is downloaded when it is missing. Without a
network the language reference of your Python takes its place, and meta.json says so. A later run
with a network replaces it.

Tiny Shakespeare has 65 characters; 1,003,854 of its 1,115,394 train and 111,540 validate.
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
print(summary(HERE, write_text(HERE, text, 'char', source, val_fraction)))
print_next_steps(
    ['train.py', 'config/train_shakespeare_mla.py'],
    ['compare.py', 'config/compare_quick.py'],
)
