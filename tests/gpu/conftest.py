"""Triton's kernels on a card, where there is one, and otherwise on the CPU under Triton's interpreter."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "needs Triton: pip install triton"
    elif not torch.cuda.is_available() and not INTERPRETED:
        missing = "needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1"
    for item in items:
        if missing and str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
