"""kd2m.py as people use it. What it shares with the other scripts is tested with them in detail."""

import math
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import QUICK, TIMES, WIDE, lines, make_bad_files, result, same, stop_in, teacher_file
from helpers import weights as load

import common
import kd2m
import sp

pytestmark = pytest.mark.usefixtures("few_shapes")


def run(command, *more):
    return common.run_program(kd2m.program, [*shlex.split(command), *more])


@pytest.fixture
def quick(cwd, any_teacher_passes):
    """One epoch of two steps with a teacher that is there."""
    teacher_file()
    return f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o"


@pytest.mark.parametrize("metric", kd2m.METRICS)
def test_every_metric_trains(quick, metric, capsys):
    assert run(quick, "--metric", metric, "--batch-size", "48") == 0
    line, r = lines("o")[0], result("o")
    assert math.isfinite(line[metric]) and line[metric] > 0 and r["method"] == metric
    weight = kd2m.WEIGHTS[metric]
    assert r["args"]["metric_weight"] == weight
    assert f"weight of {metric}: {weight:g}" in capsys.readouterr().out
    assert line["ratio"] == pytest.approx(weight * line[metric] / line["ce"], rel=2e-3)


@pytest.mark.parametrize(
    "options, method",
    [
        ("--metric w2_gaussian --covariance full", "w2_gaussian full"),
        ("--metric cw2_gaussian --covariance full", "cw2_gaussian full"),
        ("--metric kl_gaussian --kl-direction both", "kl_gaussian both"),
        ("--metric kl_gaussian --kl-direction teacher", "kl_gaussian teacher"),
        ("--metric cw2_empirical --class-reduction freq", "cw2_empirical freq"),
        ("--metric mse --kd-weight 1 --precision bf16", "mse+KD"),
        ("--metric jw2_empirical --beta 0", "jw2_empirical"),
    ],
)
def test_the_options(quick, options, method):
    assert run(quick, *options.split()) == 0
    assert result("o")["method"] == method
    assert all(math.isfinite(v) for v in lines("o")[0].values())


def test_options_reach_the_metric(quick):
    """A single step from the same start: the logged value is that of the function."""
    command = quick.replace("--batch-size 24", "--batch-size 48")
    args = kd2m.parse_args(shlex.split(command))
    data = common.load_data(args, torch.device("cpu"))
    images, labels = next(data.batches("train", 48, 0, augment=True))
    torch.manual_seed(0)
    student, teacher = common.build_model("resnet8", 24), common.build_model("resnet8", 24)
    common.load_weights(teacher, "teacher.pth")
    with torch.no_grad():
        (zs, s), (zt, t) = (net(images, return_features=True) for net in (student, teacher.eval()))
    s, t = s.embedding, t.embedding
    cases = {
        "--metric cw2_gaussian --covariance full --class-reduction sum": kd2m.cw2_gaussian(
            s, t, labels, reduction="sum", cov="full"
        ),
        "--metric kl_gaussian --kl-direction teacher": kd2m.kl_gaussian(s, t, direction="teacher"),
        "--metric jw2_empirical --beta 0.5": kd2m.jw2_empirical(s, t, zs, zt, beta=0.5),
        "--metric w2_empirical --normalize-by-dim": kd2m.w2_empirical(s, t) / 64,
    }
    for options, value in cases.items():
        assert run(command, *options.split()) == 0
        assert result("o")["args"]["metric_weight"] == kd2m.WEIGHTS[options.split()[1]] * (
            64 if "by-dim" in options else 1
        )
        assert lines("o")[0][options.split()[1]] == pytest.approx(value.item(), rel=2e-3), options


def test_weight_zero_is_the_plain_training_of_the_other_scripts(quick):
    assert run(quick, "--metric-weight", "0") == 0
    plain = load("o/student.pt")
    assert result("o")["method"] == "CE"
    assert common.run_program(sp.program, [*shlex.split(quick), "--sp-weight", "0"]) == 0
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6)
               for a, b in zip(plain.values(), load("o/student.pt").values()))  # fmt: skip


def test_compare_adds_ce_kd_and_the_paired_control(quick, capsys):
    assert run(quick, "--compare") == 0
    text = capsys.readouterr().out
    assert all(f"| {m} | 1 |" in text for m in ("CE", "KD", "mse", "w2_empirical"))
    assert result("o/mse")["args"]["metric_weight"] == kd2m.WEIGHTS["mse"]
    # the control is the same run but for the metric
    more = "--kd-weight 0.5 --ce-weight 0.7 --metric-weight 0.1 --compare"
    assert run(quick, *more.split()) == 0
    control = result("o/mse")
    assert control["method"] == "mse+KD"
    assert [control["args"][k] for k in ("ce_weight", "kd_weight", "metric_weight")] == [
        0.7,
        0.5,
        0.1,
    ]
    assert [result("o/kd")["args"][k] for k in ("ce_weight", "kd_weight")] == [0.7, 0.5]
    assert result("o/ce")["args"]["ce_weight"] == 1.0


def test_different_widths(cwd, capsys, any_teacher_passes):
    teacher_file(name="wrn_16_2")
    command = f"{WIDE} --epochs 1 --teacher-ckpt teacher.pth --out o"
    assert run(command) == 2
    error = capsys.readouterr().err
    assert "resnet8's embedding is 64 wide" in error and "--projector linear" in error
    assert run(command, "--projector", "linear") == 0
    saved = torch.load("o/last.pt", weights_only=True)["state"]["helpers"]
    assert saved["projector.weight"].shape == (128, 64)
    student = common.build_model("resnet8", 24)
    student.load_state_dict(load("o/student.pt"))  # without the projector
    assert run(command, "--metric", "gromov_w2", "--compare") == 0
    assert result("o")["method"] == "gromov_w2" and not Path("o/mse").exists()


def test_the_control_trains_its_classifier(capsys, monkeypatch):
    """jw2_empirical trains one by the logits; mse would leave it as it was."""
    seen = []
    monkeypatch.setattr(kd2m, "launch", lambda main, args, baselines: seen.append(baselines["mse"]))
    command = "--metric jw2_empirical --ce-weight 0"
    assert run(command) == run(f"{command} --kd-weight 2") == run("--ce-weight 2") == 0
    assert [control["ce_weight"] for control in seen] == [1.0, 0.0, 2.0]
    for more in ("--metric-weight 0", "--beta 0"):
        assert run(f"{command} {more}") == 2
        assert "nothing else here trains the classifier" in capsys.readouterr().err


def test_resume_equals_uninterrupted(cwd, monkeypatch, any_teacher_passes):
    """With a projector, and random lines that need the random state."""
    teacher_file(name="wrn_16_2")
    command = f"{WIDE} --epochs 2 --projector linear --metric sliced_w2 --teacher-ckpt teacher.pth"
    assert run(command, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert run(command, "--out", "parts") == 128 + signal.SIGTERM
    assert run(command, "--out", "parts", "--resume") == 0
    assert same(load("whole/student.pt"), load("parts/student.pt"))
    timeless = [[{k: v for k, v in x.items() if k not in TIMES} for x in lines(d)]
                for d in ("whole", "parts")]  # fmt: skip
    assert timeless[0] == timeless[1] and len(timeless[0]) == 2


def test_recipe_paper(cwd, monkeypatch, any_teacher_passes):
    args = kd2m.parse_args(["--recipe", "paper", "--dataset", "svhn"])
    wanted = dict(teacher="resnet34", student="resnet18", epochs=15, batch_size=128, lr=0.01)
    wanted |= dict(weight_decay=0.0, nesterov=False, momentum=0.9, pretrained=True)
    wanted |= dict(metric_weight=1e-4, teacher_lr=0.01, dataset="svhn", class_reduction="sum")
    assert {k: getattr(args, k) for k in wanted} == wanted
    ours = kd2m.parse_args(["--recipe", "paper", "--metric", "sinkhorn"])
    assert ours.metric_weight == kd2m.WEIGHTS["sinkhorn"]
    # cosine, a step an epoch, the same for CE
    teacher_file()
    command = (
        f"{QUICK} --recipe paper --no-pretrained --teacher-ckpt teacher.pth --out o --epochs 5"
    )
    for more in ("--metric mse", "--metric-weight 0"):
        assert run(command, *more.split()) == 0
        rates = [line["lr"] for line in lines("o")]
        torch_optimizer = torch.optim.SGD([torch.zeros(1)], 0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch_optimizer, 5, 1e-4)
        for rate in rates:
            assert rate == pytest.approx(cosine.get_last_lr()[0])
            torch_optimizer.step()
            cosine.step()
        assert len(rates) == 5


def test_bench_metrics_prints_a_row_a_metric(cwd, capsys, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(kd2m.time, "perf_counter", lambda: next(clock) / 1000)  # 1 ms a call
    assert run("--bench-metrics") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(kd2m.METRICS) <= rows.keys()
    for name in kd2m.METRICS:
        _, value, shuffled, *rest = rows[name].split()
        assert float(value) > 0 and rest[-6:] == ["1.00"] * 6
        assert (shuffled == "no") == (name in ("mse",)), name
    assert "100 %" in rows["cw2_empirical"] or re.search(r"\d+ %", rows["cw2_empirical"])
    assert float(rows["mse"].split()[3 + 1]) == 1.0  # its gradient's cosine with itself


def test_plot(quick):
    for metric in ("w2_empirical", "gromov_w2"):
        assert run(quick, "--plot", "--metric", metric) == 0
        for name in ("features.png", "curves.png"):
            assert Path("o", name).read_bytes().startswith(b"\x89PNG")


BAD = {
    "--metric w2_empirica": "--metric.*w2_empirical",
    "--batch-size 1": "--batch-size 1",
    "--metric-weight -1": "--metric-weight",
    "--ce-weight 0": "--ce-weight 0",
    "--covariance half": "--covariance",
    "--metric kl_gaussian --covariance full": "--covariance: only for --metric w2_gaussian",
    "--beta 1": "--beta: only for --metric jw2_empirical",
    "--metric mmd_rbf --normalize-by-dim": "--normalize-by-dim",
    "--student wrn_16_2": "--projector linear",
    "--teacher-ckpt chance.pth": "near chance",
    "--resume": "nothing to resume",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_ends_in_one_line_and_status_2(cwd, arguments, capsys):
    make_bad_files()
    assert run(f"{QUICK} --epochs 1", *shlex.split(arguments)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0]
    assert re.search(BAD[arguments], errors[0]), errors[0]
    assert "Traceback" not in captured.err + captured.out


def test_nan_features_stop_the_run_and_the_metric_is_named(quick, capsys, monkeypatch):
    calls, metric = [0], kd2m.METRICS["w2_gaussian"]

    def breaking(student, teacher, **options):
        calls[0] += 1
        student = student * (float("nan") if calls[0] == 3 else 1)
        return metric(student, teacher, **options)

    monkeypatch.setitem(kd2m.METRICS, "w2_gaussian", breaking)
    assert run(quick, "--epochs", "3", "--metric", "w2_gaussian") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: --metric w2_gaussian: nan or infinity in the student's features"
    )
    assert torch.load("o/last.pt", weights_only=True)["epoch"] == 1


def test_a_small_last_batch(quick):
    for metric in ("w2_empirical", "cw2_gaussian", "kl_gaussian"):
        assert run(quick.replace("--train-size 48", "--train-size 50"), "--metric", metric) == 0
        assert all(math.isfinite(v) for v in lines("o")[0].values()), metric


def test_plot_without_matplotlib_says_what_to_install(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run(quick, "--plot") == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not Path("o").exists()
