"""
The trap: repeated random texts of one length, so that a head can copy by counting places.

    python data/repeats_fixed/prepare.py

As data/repeats, but L is fixed. A model that was trained on it may look as if it had an induction
head, until something is put between the two copies: find_induction_heads.py calls such a head
positional.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, HERE.parents[:2])  # data/ and the repository

from repeated_text import RepeatedText

from nanomla.core.configurator import configure
from nanomla.core.token_files import summary
from nanomla.training.next_steps import dataset_option, print_next_steps

documents = 100000  # to train on; a tenth as many validate
symbols = 64  # different ones; the newline that begins a document is one more
length = 20  # L, of every document
seed = 1  # of the texts
out = ''  # the folder of the dataset ('' = data/repeats_fixed)

configure(globals())

text = RepeatedText(documents, symbols, length, length, seed)
folder = out or HERE
print(summary(folder, text.write(folder)))
print_next_steps(
    ['train.py', 'config/induction.py', 'config/induction_trap.py', *dataset_option(out)],
    ['find_induction_heads.py', '--sweep=out-induction-trap'],
)
