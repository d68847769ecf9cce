import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny, and a process runs on every core

import pytest  # noqa: E402

# `common` is imported in the fixtures: the process that hands out the tests need not load torch.


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to run in: `runs/`, `checkpoints/` and `data/` are made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What a crash of the machine would leave of a file is not what these tests are about."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def forget_loaded_data():
    import common

    common._LOADED.clear()
    common._EVALUATED.clear()


@pytest.fixture
def few_shapes(monkeypatch):
    """The splits of `shapes` cut to 72 and 24 images of half the size: tests need no accuracy."""
    import ranks

    import common

    monkeypatch.setattr(common, "draw_shapes", ranks.few(common.draw_shapes))


@pytest.fixture
def any_teacher_passes(monkeypatch):
    import common

    monkeypatch.setattr(common, "near_chance", lambda *a: False)
