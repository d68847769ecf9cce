"""Several processes (gloo, on the CPU) against one: losses, gradients, stops and resumes."""

import json
import multiprocessing
import os
import signal
import socket
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

SCRIPT = f"{QUICK} --epochs 4 --batch-size 6".split()


def pair(program, argv, cwd):
    """Two processes as torchrun would start them, forked: torch need not be imported again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = []
    for rank in (0, 1):
        process = fork.Process(target=child, args=(rank, port, program, argv, cwd))
        process.start()
        started.append(process)
    return started


def child(rank, port, program, argv, cwd):
    os.chdir(cwd)
    values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    os.environ.update({k: str(v) for k, v in values.items()}, MASTER_ADDR="127.0.0.1")
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    common._LOADED.clear()
    common._EVALUATED.clear()
    ranks.few_shapes()
    try:
        status = common.run_program(program, [str(a) for a in argv])
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 3
    os._exit(status)


def finish(started, cwd):
    """-> exit statuses, what both wrote to stderr."""
    for process in started:
        process.join(180)
        if process.is_alive():
            process.kill()
    errors = "".join((Path(cwd) / f"err{rank}").read_text() for rank in (0, 1))
    return [process.exitcode for process in started], errors


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What tests/ranks.py found: in one process, and in each of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder in (one, two):
        ranks.write_teachers(folder)
    started = pair(ranks.program, [two], two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "draw_shapes", ranks.few(common.draw_shapes))
        ranks.program([str(one)])
    assert finish(started, two) == ([0, 0], "")
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


def test_the_line_of_an_epoch_is_of_all_shares(outcomes):
    one, *both = (outcome["local meter"] for outcome in outcomes)
    assert one == {"epoch": 1, "ce": 10.0, "train_top1": 33.333}  # the mean of 0 to 20, 7 of 21
    assert both == [one, one]


def test_a_probe_is_the_same_in_every_process(outcomes):
    one, *both = (outcome["probe"] for outcome in outcomes)
    assert all(torch.equal(one, other) for other in both)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of two processes that nothing disturbed, started as people do."""
    folder = tmp_path_factory.mktemp("alone")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport common, sp\n"
    script += "draw, few = common.draw_shapes, {5000: 72, 1000: 24}  # as ranks.few\n"
    script += "common.draw_shapes = lambda count, seed, size: draw(few[count], seed, size // 2)\n"
    (folder / "script.py").write_text(script + "sys.exit(common.run_program(sp.program))\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["script.py", *SCRIPT, "--out", "a"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_files_and_lines_are_those_of_rank_0(alone):
    folder, out = alone
    assert result(folder / "a")["world_size"] == 2
    assert out.count("epoch   1/4") == 2  # the teacher's too
    assert out.count("| shapes, 48, 4 |") == 1
    names = {".lock", "last.pt", "metrics.jsonl", "result.json", "student.pt"}
    assert {p.name for p in (folder / "a").iterdir()} == names


def wait_for_epochs(count, folder, started):
    start = time.monotonic()
    while time.monotonic() - start < 120 and all(p.is_alive() for p in started):
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no epoch {count} in {folder}")


def test_one_rank_stops_and_all_resume_exactly(alone, monkeypatch):
    folder, _ = alone
    add = common.Meter.add

    def slowly(*a):  # so that the signal comes before the end
        time.sleep(0.05)
        add(*a)

    argv = [*SCRIPT, "--out", "stopped"]
    for number, rank, epochs in ((signal.SIGKILL, 1, 1), (signal.SIGTERM, 0, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(common.Meter, "add", slowly)
            started = pair(sp.program, argv, folder)
        wait_for_epochs(epochs, folder / "stopped", started)
        os.kill(started[rank].pid, number)
        statuses, errors = finish(started, folder)
        assert statuses == ([1, -9] if number == signal.SIGKILL else [143, 143])
        assert "Traceback" not in errors
        assert errors.count("stopped by signal 15") == (number == signal.SIGTERM)
        assert not (folder / "stopped" / "result.json").exists()
        argv = [*SCRIPT, "--out", "stopped", "--resume"]
    statuses, errors = finish(pair(sp.program, argv, folder), folder)
    assert statuses == [0, 0], errors
    assert same(weights(folder / "a" / "student.pt"), weights(folder / "stopped" / "student.pt"))
    whole, again = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(folder / name)]
        for name in ("a", "stopped")
    )
    assert whole == again


def test_another_number_of_processes_may_not_resume(alone, capsys, monkeypatch):
    folder, _ = alone
    monkeypatch.chdir(folder)
    (folder / "a" / "result.json").rename(folder / "a" / "result.aside")
    try:
        status = common.run_program(sp.program, [*SCRIPT, "--out", "a", "--resume"])
    finally:
        (folder / "a" / "result.aside").rename(folder / "a" / "result.json")
    assert status == 2
    assert "was started with 2 processes, here are 1" in capsys.readouterr().err


def test_more_processes_than_gpus(monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4), ("LOCAL_RANK", 3)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common.run_program(sp.program, ["--help"]) == 2
    assert "4 processes for 2 GPUs; --nproc_per_node=2" in capsys.readouterr().err
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("", (), {"uuid": "abc"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(common, "gather_objects", lambda mine: [mine, mine.replace("abc", "abd")])
    common._check_gpus()
    monkeypatch.setattr(common, "gather_objects", lambda mine: [mine, mine])
    with pytest.raises(common.UserError, match="two processes on one GPU"):
        common._check_gpus()


def test_processes_on_the_cpu_need_no_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("it looked for GPUs"))
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **_: started.extend(a))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for argv in (["--device", "cpu"], ["--epochs", "1", "--device=cpu"]):
        with common._processes(argv):
            pass
    assert started == ["gloo", "gloo"]


@pytest.mark.parametrize("wrong", ["--batch-size 3", "--epochs 0", "--teacher-ckpt absent.pth"])
def test_bad_input_is_one_line_whatever_the_number_of_processes(tmp_path, wrong):
    statuses, errors = finish(pair(sp.program, [*SCRIPT, *wrong.split()], tmp_path), tmp_path)
    assert 2 in statuses and 0 not in statuses
    assert errors.count("error:") == 1 and "Traceback" not in errors
