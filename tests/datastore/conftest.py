"""What these tests share. There are no packages here: the path lets them import `tiny_stores`."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def no_power_cut():
    """Stores by the hundred would wait for the disk; `test_writer` holds when it is waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
