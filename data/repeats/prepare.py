"""
Repeated random texts, on which a transformer learns to copy.

    python data/repeats/prepare.py --documents=200000

Each document is a line: a newline, L different symbols in random order, the same L symbols again.
L is drawn anew for each, so that no head can copy by counting places. train.bin, val.bin and
meta.json go to this folder, or to --out. A symbol is a character, so that a prompt can be typed.
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
shortest = 8  # L is drawn from shortest to longest, both included
longest = 31
seed = 1  # of the texts
out = ''  # the folder of the dataset ('' = data/repeats, which is --dataset=repeats in train.py)

configure(globals())

text = RepeatedText(documents, symbols, shortest, longest, seed)
folder = out or HERE
print(summary(folder, text.write(folder)))
print_next_steps(
    ['train.py', 'config/induction.py', 'config/induction_mla.py', *dataset_option(out)],
    ['find_induction_heads.py', '--sweep=out-induction-mla'],
)
