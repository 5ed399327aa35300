"""
Finetune OpenAI's GPT-2 XL on Shakespeare; --init_from=gpt2 for the small one, which a CPU takes.

    python train.py config/finetune_shakespeare.py --init_from=gpt2
"""

out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'
eval_interval = 5
eval_iters = 40
log_interval = 1

# Shakespeare has 301,966 tokens: one step reads 1 x 32 x 1024 = 32,768 of them, an epoch takes 9.2
# steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
dropout = 0.0

# the small GPT-2, and 1,024 tokens a step
on_cpu = dict(
    compile=False,
    init_from='gpt2',
    block_size=256,
    gradient_accumulation_steps=4,
    eval_iters=10,
)
