"""No test leaves a governor at work."""

import pytest

from sixfold.governor.architect import ATTACHED


@pytest.fixture(autouse=True)
def let_go():
    """Detach whatever a test attached: an armed watch holds the compiler back."""
    yield
    for governor in list(ATTACHED):
        governor.detach()
