import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny, and a process runs on every core

import pytest  # noqa: E402


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to run in: `runs/`, `checkpoints/` and `data/` are made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
