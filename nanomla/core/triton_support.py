"""Where Triton runs, and a constant that its kernels share."""

import os
from importlib.util import find_spec

RUNS_ON = (
    ()
    if find_spec('triton') is None
    else ('cuda', 'cpu')
    if os.environ.get('TRITON_INTERPRET') == '1'
    else ('cuda',)
)


LOG2E = 1.4426950408889634
