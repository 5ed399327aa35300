import pytest
from converting import SOURCES

from nanomla.conversion.calibration import measure


@pytest.fixture
def source(tiny, tokens):
    """source(name, **settings) -> a tiny model of SOURCES and its Moments."""

    def make(name='mha', **changes):
        model = tiny('mha', **SOURCES[name] | changes)
        return model, measure(model, tokens(24, B=30))

    return make
