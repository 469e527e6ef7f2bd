import os

import pytest


@pytest.fixture(autouse=True)
def _real_data(request):
    if request.node.get_closest_marker("data") and not os.environ.get("SIXFOLD_DATA"):
        pytest.skip("SIXFOLD_DATA is not set, and it names the folder of real data sets")
