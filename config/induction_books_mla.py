"""
MLA, 122.7M parameters, on books.

    python train.py config/induction_books.py config/induction_books_mla.py
"""

out_dir = 'out-induction-books-mla'
attention = 'mla'
n_head = 6
head_dim = 128  # q and k: 96 without position + 32 with RoPE; v: 128
kv_lora_rank = 512
qk_rope_head_dim = 32

on_cpu = dict(n_head=4, head_dim=32, kv_lora_rank=64, qk_rope_head_dim=16)
