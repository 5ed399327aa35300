"""
MHA with RoPE, 123.6M parameters, on books.

    python train.py config/induction_books.py config/induction_books_mha.py
"""

out_dir = 'out-induction-books-mha'
pos = 'rope'
