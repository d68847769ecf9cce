"""Two ranks (gloo, on the CPU) against one: losses, gradients, stops and resumes.

A case is three steps of a script's own `main`. Networks have no BatchNorm, which sees a rank's own
images, so that nothing but rounding may differ from one process.
"""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import helpers
import pytest
import torch
from helpers import QUICK, few, finish, lines, module, pair, progress, result, run, same, timeless

import common
import nd
import sp

# 63 images in batches of 21: shares of 10 and 11.
THREE_STEPS = "--dataset shapes --image-size 16 --train-size 63 --batch-size 21 --epochs 1"
THREE_STEPS += " --teacher resnet8 --student resnet8 --lr 0.002 --device cpu"
CASES = {
    "ce": "nd --nd-weight 0 --kd-weight 0",
    "kd++": "nd --kd-weight 1 --nd-weight 2 --norm-weight 1 --direction-weight 1",
    "dkd++": "nd --base dkd",
    "dist++": "nd --base dist",
    "reviewkd++": "nd --base reviewkd",
    "sp": "sp --kd-weight 1 --at-weight 1000 --sp-weight 100 --sp-maps all",
    "cc": "sp --relation cc",
    "intra": "sp --relation intra",
    "dcd": "dcd --kd-weight 1",
    "mse": "kd2m --metric mse --projector linear",
    "jw2": "kd2m --metric jw2_empirical",
    "cw2": "kd2m --metric cw2_gaussian",
    "sliced_w2": "kd2m --metric sliced_w2",
    "other initial weights": "sp --sp-weight 0",  # of rank 1, as on another kind of CPU
}
# Not to compare with one process, but everything that is trained has to stay alike.
SYNCHRONOUS = {"bf16": "sp --kd-weight 1 --precision bf16", "projector": "nd --student wrn_16_2"}


def without_batchnorm(net):
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(parent, name, torch.nn.Identity())
    return net


def run_case(folder, name):
    """-> what was trained, and the gradients of the last step."""
    script, *flags = (CASES | SYNCHRONOUS)[name].split()
    plain, trained = name in CASES, []

    def build_model(*args, **options):
        net = build(*args, **options)
        if name == "other initial weights" and common.rank() == 1:
            net.conv1.weight.data += 1
        return without_batchnorm(net) if plain else net

    def spy(run, optimizer):
        average(run, optimizer)
        trained[:] = [p for group in optimizer.param_groups for p in group["params"]]

    build, review, average = common.build_model, nd.ReviewKD, common.Run.average_gradients
    checkpoint = folder / ("plain.pth" if plain else "teacher.pth")
    argv = [*THREE_STEPS.split(), *flags, "--out", str(folder / name)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "build_model", build_model)
        patch.setattr(common, "near_chance", lambda *_: False)
        patch.setattr(common.Run, "average_gradients", spy)
        if plain:
            patch.setattr(nd, "ReviewKD", lambda *widths: without_batchnorm(review(*widths)))
        module(script).main([*argv, "--teacher-ckpt", str(checkpoint)])
    gradients = [p.grad for p in trained]
    return {"weights": [p.detach() for p in trained], "gradients": gradients}


def everything(argv):
    """What every rank computes, in a file for each."""
    folder = Path(argv[0])
    results = {name: run_case(folder, name) for name in (*CASES, *SYNCHRONOUS)}
    torch.save(results, folder / f"rank{common.rank()}.pt")


@pytest.fixture(scope="module")
def few_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "draw_shapes", few(common.draw_shapes))
        yield


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, few_shapes):
    """The folders and files of one process, and of each of two ranks."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder in (one, two):
        torch.manual_seed(1)
        net = common.build_model("resnet8", 24)
        torch.save(net.state_dict(), folder / "teacher.pth")
        torch.save(without_batchnorm(net).state_dict(), folder / "plain.pth")
    started = pair(everything, [two], two)
    everything([str(one)])
    assert finish(started, two) == ([0, 0], "")
    files = one / "rank0.pt", two / "rank0.pt", two / "rank1.pt"
    return one, two, [torch.load(path, weights_only=True) for path in files]


@pytest.mark.parametrize("name", CASES)
def test_three_steps_of_a_script_are_those_of_one_process(outcomes, name):
    folder_of_one, folder_of_two, files = outcomes
    one, rank0, rank1 = (outcome[name] for outcome in files)
    torch.testing.assert_close(rank0["weights"], one["weights"], rtol=0, atol=1e-6)
    torch.testing.assert_close(rank0["weights"], rank1["weights"], rtol=0, atol=0)
    assert any((g != 0).any() for g in one["gradients"] if g is not None)
    [mine], [whole] = timeless(folder_of_two / name), timeless(folder_of_one / name)
    assert mine == pytest.approx(whole, rel=1e-5)
    assert result(folder_of_two / name)["world_size"] == 2


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_what_is_trained_stays_the_same_on_every_rank(outcomes, name):
    one, rank0, rank1 = (outcome[name] for outcome in outcomes[2])
    torch.testing.assert_close(rank0["weights"], rank1["weights"], rtol=0, atol=0)
    assert not torch.equal(rank0["weights"][0], one["weights"][0])  # another computation


# --- runs as people start them -------------------------------------------------------------------

FOUR_EPOCHS = f"{QUICK} --epochs 4 --batch-size 6 --device cpu --teacher-ckpt teacher.pth".split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, few_shapes):
    """A run of two ranks that nothing disturbed. Its student has dropout, each rank its own."""
    folder = tmp_path_factory.mktemp("alone")
    helpers.teacher_file(folder / "teacher.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "near_chance", lambda *_: False)
        argv = [*FOUR_EPOCHS, "--student", "wrn_16_2"]
        assert finish(pair(nd.main, [*argv, "--out", "a"], folder), folder)[0] == [0, 0]
        yield folder, argv


def test_files_and_lines_are_those_of_rank_0(alone):
    folder, _ = alone
    assert result(folder / "a")["world_size"] == 2
    assert (folder / "out0").read_text().count("epoch   1/4") == 1
    assert (folder / "out1").read_text() == ""
    assert {"last.pt", "metrics.jsonl", "result.json"} < {p.name for p in (folder / "a").iterdir()}
    assert not list((folder / "a").glob("old*"))


def test_one_rank_stops_and_all_resume_exactly(alone, monkeypatch, capsys):
    folder, argv = alone
    argv, log = [*argv, "--out", "stopped"], common.Meter.add

    def slowly(*args):  # so that the signal comes before the end
        time.sleep(0.05)
        log(*args)

    for number, rank, epochs in ((signal.SIGKILL, 1, 1), (signal.SIGTERM, 0, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(common.Meter, "add", slowly)
            started = pair(nd.main, argv, folder)
        path, start = folder / "stopped/metrics.jsonl", time.monotonic()
        while not (path.exists() and len(lines(path.parent)) >= epochs):
            assert time.monotonic() - start < 120 and all(p.is_alive() for p in started)
            time.sleep(0.01)
        os.kill(started[rank].pid, number)
        statuses, errors = finish(started, folder)
        assert statuses == ([1, -9] if number == signal.SIGKILL else [143, 143])
        assert "Traceback" not in errors and errors.count("--resume continues") == 1
        assert not (folder / "stopped" / "result.json").exists()
        assert progress(folder / "stopped") < (4, 0)
        argv = [*argv, "--resume"] if "--resume" not in argv else argv
    statuses, errors = finish(pair(nd.main, argv, folder), folder)
    assert statuses == [0, 0], errors
    students = (helpers.weights(folder / out / "student.pt") for out in ("a", "stopped"))
    assert same(*students)
    assert timeless(folder / "a") == timeless(folder / "stopped")
    monkeypatch.chdir(folder)
    assert common.run_program(nd.main, argv) == 2  # one rank cannot go on where two stopped
    assert "ranks" in helpers.error_line(capsys)


BAD = {  # script and arguments -> word of the error
    "sp --batch-size 3": "--batch-size", "sp --epochs 0": "--epochs",
    "sp --teacher-ckpt absent.pth": "absent.pth",
    "dcd --transfer shapes --student-ckpt teacher.pth": "no torchrun",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_whatever_the_number_of_ranks(alone, line):
    folder, _ = alone
    script, *wrong = line.split()
    argv = [*FOUR_EPOCHS, *wrong, "--out", "bad"]
    statuses, errors = finish(pair(module(script).main, argv, folder), folder)
    assert 2 in statuses and 0 not in statuses
    assert errors.count("error:") == 1 and "Traceback" not in errors and BAD[line] in errors
    assert not (folder / "bad" / "last.pt").exists()


def test_ranks_with_other_data_or_teachers_are_refused(alone, monkeypatch):
    folder, _ = alone
    draw = common.draw_shapes
    argv = [*FOUR_EPOCHS, "--out", "bad"]

    def other(count, seed, size):
        return draw(count, seed + common.rank(), size)

    def spoiled(net, path, *more):
        load(net, path, *more)
        net.conv1.weight.data += common.rank()

    load = common.load_weights
    for name, replacement in (("draw_shapes", other), ("load_weights", spoiled)):
        with monkeypatch.context() as patch:
            patch.setattr(common, name, replacement)
            statuses, errors = finish(pair(sp.main, argv, folder), folder)
        assert 2 in statuses and 0 not in statuses
        assert errors.count("error:") == 1 and "ranks" in errors and "Traceback" not in errors
        assert not (folder / "bad" / "last.pt").exists()


def test_more_ranks_than_gpus(monkeypatch, capsys):
    names = "RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()
    for name, value in zip(names, (3, 4, 4, 3, "localhost", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    started, chosen = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **_: started.extend(a))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)

    def as_nccl_does(_):
        raise torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage\nDuplicate GPU")

    assert common.run_program(as_nccl_does, []) == 2 and chosen == [1] and "nccl" in started.pop()
    assert "--nproc_per_node must be the number of GPUs" in capsys.readouterr().err
    common.run_program(lambda _: None, ["--device", "cpu"])  # on the CPU, no GPU is needed
    common.run_program(lambda _: None, ["--device=cpu"])
    assert started == ["gloo", "gloo"]


def test_a_lost_rank_is_one_line_and_status_1(capsys):
    peer = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]"
    nccl = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0.")
    for error in (nccl, RuntimeError(peer)):
        assert common.run_program(mock.Mock(side_effect=error), []) == 1
        assert re.search("another rank.*--resume", helpers.error_line(capsys))


def test_what_a_cluster_sets_is_not_torchrun(quick, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("sp", quick) == 0 and result("o")["world_size"] == 1


def test_a_run_in_a_thread(quick):
    with ThreadPoolExecutor(1) as pool:  # as in a notebook or a server
        assert pool.submit(run, "sp", quick).result() == 0
