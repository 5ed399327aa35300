"""model.py and model_mla.py need torch alone: copied into an empty folder, they train there."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

TRAIN = """
import torch
from {module} import {name}

torch.manual_seed(0)
model = {name}({name}.Config(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=32{more}))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
idx = torch.randint(32, (4, 17))
losses = []
for _ in range(30):
    loss = model(idx[:, :-1], idx[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
"""


@pytest.mark.parametrize(
    'module, name, more',
    [('model', 'GPT', ''), ('model_mla', 'GPT_MLA', ', kv_lora_rank=8, qk_rope_head_dim=4')],
)
def test_a_model_trains_in_an_empty_folder(module, name, more, tmp_path, forked_python):
    for file in ('model.py', 'model_mla.py'):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / 'run.py').write_text(TRAIN.format(module=module, name=name, more=more))
    # Nothing of this repository can be imported but what lies there.
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, 'run.py'], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('change', [dict(n_head=3), dict(act='tanh'), dict(dropout=1.0)])
def test_settings_that_do_not_fit_raise_a_value_error_of_one_line(change):
    from model import GPTConfig

    with pytest.raises(ValueError) as error:
        GPTConfig(**dict(n_embd=32, n_head=2) | change)
    assert '\n' not in str(error.value)
