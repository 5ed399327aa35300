"""Shared by the tests of this folder: errors of a person end in one line."""

import pytest

from nanomla.core.configurator import UserError


def refused(call, *args, match='.', **more):
    """Return the message of the UserError that the call has to raise: one line, not too long."""
    with pytest.raises(UserError, match=match) as error:
        call(*args, **more)
    message = str(error.value)
    assert '\n' not in message
    assert 20 < len(message) < 400
    return message
