"""
Heal a model that convert_mla.py made: a few steps on the text it comes from.

The rate is constant after a warmup and decays linearly at the end, as MHA2MLA's does.

    python train.py config/heal_mla.py --init_from=out-mla --dataset=shakespeare_char
    python train.py config/heal_mla.py --teacher=out-shakespeare-char
    python train.py config/heal_mla.py --teacher=out-shakespeare-char --teacher_cache=predictions
    python train.py config/heal_mla.py --train_only=attn
"""

out_dir = 'out-healed'
init_from = 'out-mla'
dataset = 'shakespeare_char'  # what the source was trained on

distill = 0.9  # with --teacher: the source's predictions say more than the next token alone
gradient_accumulation_steps = 1
batch_size = 16
max_iters = 200  # 5 % of the steps of a source that was trained for 4,000
learning_rate = 1e-3
weight_decay = 0.0
schedule = 'wsd'
warmup_iters = 10
cooldown = 0.5  # the last half of the steps decays to zero
min_lr = 0.0

eval_interval = 50
eval_iters = 200
log_interval = 10
sample_tokens = 0

on_cpu = dict(compile=False)
