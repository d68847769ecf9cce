"""What only a GPU can show. Skipped without one; python -m pytest -n 0 tests/test_gpu.py"""

import os
import signal

import numpy as np
import pytest
import torch
from helpers import QUICK, lines, result, run, same, signal_at, teacher_file, timeless, weights

import common

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = [needs_gpu, pytest.mark.usefixtures("few_shapes", "any_teacher_passes")]
COMMANDS = [
    "nd --norm-weight 1 --direction-weight 1 --nd-weight 1",
    *(f"nd --base {base}" for base in ("dkd", "dist", "reviewkd")),
    "sp --kd-weight 1 --at-weight 1000",
    *(f"sp --relation {relation}" for relation in ("cc", "intra")),
    "dcd --kd-weight 1",
    *(
        f"kd2m --metric {metric}"
        for metric in ("mse", "w2_empirical", "jw2_empirical", "sliced_w2")
    ),
    "kd2m --metric cw2_gaussian --covariance full",
]


@pytest.fixture
def gpu(cwd):
    """The arguments of one epoch of two steps."""
    teacher_file()
    return f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --device cuda --out o"


@pytest.fixture
def exact_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_step_is_that_of_the_cpu(gpu, exact_convolutions, command):
    script, *more = [*command.split(), "--batch-size", "48"]  # one step an epoch
    assert run(script, gpu, *more) == 0
    [on_gpu] = lines("o")
    assert run(script, gpu, *more, "--device", "cpu") == 0
    [on_cpu] = lines("o")
    terms = on_cpu.keys() - {"seconds", "images_per_second", "train_top1", "test_top1"}
    ours, expected = ({key: line[key] for key in terms} for line in (on_gpu, on_cpu))
    assert ours == pytest.approx(expected, rel=2e-3)
    assert "cpu" in result("o")["device"] and "cuda" not in str(weights("o/student.pt"))


def test_a_deterministic_run_resumes_to_the_same_bits(gpu, monkeypatch):
    command = f"{gpu} --epochs 3 --teacher wrn_16_2 --deterministic --teacher-ckpt wide.pth"
    teacher_file("wide.pth", "wrn_16_2")
    try:
        assert run("nd", command, "--out", "whole") == 0
        with monkeypatch.context() as patch:
            patch.setattr(common.Meter, "add", common.Meter.add)  # restored afterwards
            signal_at(3, signal.SIGTERM)  # within the second epoch
            assert run("nd", command, "--out", "parts") == 143
        assert run("nd", command, "--out", "parts", "--resume") == 0
        assert same(weights("whole/student.pt"), weights("parts/student.pt"))
        assert timeless("whole") == timeless("parts")
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_bf16(gpu, command):
    script, *more = command.split()
    assert run(script, f"{gpu} --precision bf16", *more) == 0
    [line] = lines("o")
    assert all(np.isfinite(value) for value in line.values())
    assert {v.dtype for v in weights("o/student.pt").values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("student", ["resnet8", "mobilenet_v3_small"])
def test_compile(gpu, student):
    """Of the zoo and of torchvision: close to the uncompiled run, and the same names of weights."""
    assert run("nd", f"{gpu} --student {student}") == 0
    plain, [line] = weights("o/student.pt"), lines("o")
    assert run("nd", f"{gpu} --student {student} --compile") == 0
    [compiled] = lines("o")
    assert weights("o/student.pt").keys() == plain.keys()
    assert compiled["ce"] == pytest.approx(line["ce"], rel=0.05)
    assert compiled["kd"] == pytest.approx(line["kd"], rel=0.05)


def test_one_rank_with_nccl(gpu):
    """All that several ranks do, over NCCL, in a world of one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    assert run("dcd", gpu, "--deterministic") == 0
    plain = weights("o/student.pt")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    try:
        assert run("dcd", gpu, "--deterministic") == 0
        x = torch.ones(2, device="cuda")
        torch.distributed.all_reduce(x)
        assert same(plain, weights("o/student.pt")) and x.tolist() == [1, 1]
    finally:
        torch.distributed.destroy_process_group()
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
