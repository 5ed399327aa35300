import copy

import pytest
from converting import SOURCES

from nanomla.conversion.calibration import measure

MEASURED = {}  # name of a source -> its Moments


@pytest.fixture
def source(tiny, tokens):
    """source(name, **settings) -> a tiny model of SOURCES and its Moments."""

    def make(name='mha', **changes):
        model = tiny('mha', **SOURCES[name] | changes)
        if changes:
            return model, measure(model, tokens(24, B=30))
        if name not in MEASURED:
            MEASURED[name] = measure(model, tokens(24, B=30))
        return model, copy.deepcopy(MEASURED[name])

    return make
