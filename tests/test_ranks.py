"""Several processes (gloo, on the CPU) against one: losses, gradients, stops and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from helpers import QUICK, ROOT, TIMES, lines, result, same, weights

import common
import sp

pytestmark = pytest.mark.xdist_group("ranks")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPT = f"sp.py {QUICK} --epochs 4 --batch-size 6".split()


def torchrun(arguments, cwd, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, **kwargs
    )


def finish(process):
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What tests/ranks.py found: in one process, and in each of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder in (one, two):
        ranks.write_teachers(folder)
    pair = torchrun(["tests/ranks.py", two], two)
    ranks.program([str(one)])
    status, _, err = finish(pair)
    assert status == 0, err
    files = one / "rank0.pt", two / "rank0.pt", two / "rank1.pt"
    return [torch.load(path, weights_only=True) for path in files]


@pytest.mark.parametrize("name", ranks.EXACT)
def test_a_loss_of_two_ranks_is_the_loss_of_the_whole_batch(outcomes, name):
    one, *both = (outcome[f"exact {name}"] for outcome in outcomes)
    assert any(g.abs().max() > 1e-4 for g in one["gradients"])
    for rank in both:
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=0, atol=1e-12)
        torch.testing.assert_close(rank["gradients"], one["gradients"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ranks.CASES)
def test_three_steps_of_a_script_are_those_of_one_process(outcomes, name):
    one, rank0, rank1 = (outcome[name] for outcome in outcomes)
    torch.testing.assert_close(rank0["weights"], one["weights"], rtol=0, atol=1e-6)
    torch.testing.assert_close(rank0["weights"], rank1["weights"], rtol=0, atol=0)
    assert any((g != 0).any() for g in one["gradients"] if g is not None)
    lines = [json.loads(outcome[name]["line"]) for outcome in outcomes[:2]]
    timeless = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    assert timeless[1] == pytest.approx(timeless[0], rel=1e-5)


@pytest.mark.parametrize("name", ranks.SYNCHRONOUS)
def test_what_is_trained_stays_the_same_on_every_rank(outcomes, name):
    one, rank0, rank1 = (outcome[name] for outcome in outcomes)
    torch.testing.assert_close(rank0["weights"], rank1["weights"], rtol=0, atol=0)
    assert not torch.equal(rank0["weights"][0], one["weights"][0])  # another computation


def test_local_relations_are_another_loss(outcomes):
    whole, local = (json.loads(outcomes[1][name]["line"])["dcd"] for name in ("dcd", "local"))
    assert local < whole - 0.3  # about log of half the batch: log 2 less


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    status, out, err = finish(torchrun([*SCRIPT, "--out", "a"], folder))
    assert status == 0, err
    return folder, out


def test_files_and_lines_are_those_of_rank_0(alone):
    folder, out = alone
    assert result(folder / "a")["world_size"] == 2
    assert out.count("epoch   1/4") == 2  # the teacher's too
    assert out.count("| shapes, 48, 4 |") == 1
    assert {p.name for p in (folder / "a").iterdir()} == {
        ".lock",
        "last.pt",
        "metrics.jsonl",
        "result.json",
        "student.pt",
    }


def wait_for_epochs(count, folder, process):
    start = time.monotonic()
    while time.monotonic() - start < 120 and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_one_rank_stops_and_all_resume_exactly(alone):
    folder, _ = alone
    out, resume = folder / "stopped", []
    for number, epochs in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        process = torchrun([*SCRIPT, "--out", out, *resume], folder)
        wait_for_epochs(epochs, out, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), number)
        status, _, err = finish(process)
        assert status and 'sp.py", line' not in err  # no traceback of ours
        assert ("stopped by signal 15" in err) == (number == signal.SIGTERM)
        assert not (out / "result.json").exists()
        resume = ["--resume"]
    status, _, err = finish(torchrun([*SCRIPT, "--out", out, "--resume"], folder))
    assert status == 0, err
    assert same(weights(folder / "a" / "student.pt"), weights(out / "student.pt"))
    whole, again = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(p)]
        for p in (folder / "a", out)
    )
    assert whole == again


def test_another_number_of_processes_may_not_resume(alone, capsys, monkeypatch):
    folder, _ = alone
    monkeypatch.chdir(folder)
    (folder / "a" / "result.json").rename(folder / "a" / "result.aside")
    try:
        status = common.run_program(sp.program, [*SCRIPT[1:], "--out", "a", "--resume"])
    finally:
        (folder / "a" / "result.aside").rename(folder / "a" / "result.json")
    assert status == 2
    assert "was started with 2 processes, here are 1" in capsys.readouterr().err


def test_bad_input_is_one_line_whatever_the_number_of_processes(tmp_path):
    status, _, err = finish(torchrun(["sp.py", *QUICK.split(), "--batch-size", "3"], tmp_path))
    assert status
    assert err.count("error:") - err.count("error: <") - err.count("traceback") <= 1
    assert err.count("error: --batch-size 3") == 1
