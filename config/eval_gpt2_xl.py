"""OpenAI's GPT-2 xl: its loss on the validation split of OpenWebText."""

init_from = 'gpt2-xl'
eval_only = True
dataset = 'openwebtext'
batch_size = 8
eval_iters = 500  # batches; deterministic, evenly spaced windows

# ten windows: a rough estimate, in minutes
on_cpu = dict(compile=False, batch_size=1, eval_iters=10)
