import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny, and a process runs on every core

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# `common` is imported in the fixtures: the process that hands out the tests need not load torch.

FUZZ = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
for profile in ("default", "ci"):  # "ci" is taken where $CI is set
    settings.register_profile(profile, max_examples=60, derandomize=True, **FUZZ)
settings.register_profile("long", max_examples=20_000, **FUZZ)


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to run in: `runs/`, `checkpoints/` and `data/` are made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """No data set is loaded yet, and nothing waits for the disk, as only a crash shows that."""
    import helpers

    helpers.forget_what_was_loaded()
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def few_shapes(monkeypatch):
    """The splits of `shapes` cut to 72 and 24 images: tests need no accuracy."""
    import helpers

    import common

    monkeypatch.setattr(common, "draw_shapes", helpers.few(common.draw_shapes))


@pytest.fixture
def any_teacher_passes(monkeypatch):
    import common

    monkeypatch.setattr(common, "near_chance", lambda *a: False)


@pytest.fixture
def quick(cwd, few_shapes, any_teacher_passes):
    """The arguments of a run of one epoch of two steps, with a teacher that is there."""
    from helpers import QUICK, teacher_file

    teacher_file()
    return f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o"
