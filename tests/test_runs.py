"""nd.py as people use it: whole runs, their files, resuming, and how bad input ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    QUICK,
    ROOT,
    TIMES,
    WIDE,
    Tiny,
    forked,
    lines,
    make_bad_files,
    result,
    same,
    stop_in,
    teacher_file,
    weights,
)

import common
import nd

pytestmark = pytest.mark.usefixtures("few_shapes")


def run(command, *more):
    return common.run_program(nd.program, [*shlex.split(command), *more])


# --- a run and its files -------------------------------------------------------------------------


def test_one_command_trains_the_teacher_and_writes_the_run(cwd, capsys):
    assert run(QUICK, "--epochs", "2") == 0
    out = cwd / "runs" / "nd-resnet8-resnet8-shapes-s0"
    assert {p.name for p in out.iterdir()} == {
        "metrics.jsonl", "result.json", "student.pt", "last.pt", "class_means.pt", ".lock"
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for key in ("ce", "kd", "nd", "train_top1", "test_top1", "lr", "seconds", "images_per_second"):
        assert np.isfinite([line[key] for line in lines]).all(), key
    r = result(out)
    assert r["student_top1"] == lines[-1]["test_top1"] and r["method"] == "KD++" and r["seed"] == 0
    assert r["args"]["kd_weight"] == 1 and r["args"]["nd_weight"] == 2 and r["train_images"] == 48
    for key in ("argv", "versions", "device", "commit", "teacher_top1", "seconds", "teacher_hash"):
        assert key in r
    student = common.build_model("resnet8", 24)
    student.load_state_dict(weights(out / "student.pt"))  # the student alone, strictly
    saved = torch.load(cwd / "checkpoints" / "shapes_resnet8.pt", weights_only=True)
    assert saved["recipe"]["epochs"] == 2 and saved["recipe"]["images"] == 48
    assert saved["test_top1"] == r["teacher_top1"]
    text = capsys.readouterr().out
    assert "none known for resnet8 resnet8" in text and "teacher resnet8" in text
    # again: the teacher is reused, the result is the same
    assert run(QUICK, "--epochs", "2") == 0
    assert "training it" not in capsys.readouterr().out
    timeless = lambda d: {k: v for k, v in d.items() if k not in TIMES}  # noqa: E731
    assert timeless(result(out)) == timeless(r)


def test_another_teacher_recipe_is_never_reused(cwd, capsys):
    assert run(QUICK, "--epochs", "1", "--kd-weight", "0", "--nd-weight", "0") == 0
    for change, word in (("--teacher-epochs 2", "epochs"), ("--train-size 72", "images")):
        assert run(f"{QUICK} --epochs 1 --out b {change}") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error:") and word in error and "--teacher-ckpt" in error
    for change, word in (("--momentum 0.5", "momentum"), ("--precision bf16", "precision")):
        assert run(f"{QUICK} --epochs 1 --out b {change}") == 2
        assert word in capsys.readouterr().err
    assert run(f"{QUICK} --epochs 1 --seed 3") == 0  # the student's seed is not the teacher's


@pytest.mark.parametrize("base", list(nd.BASES))
def test_every_base_with_and_without_nd(cwd, base, any_teacher_passes):
    teacher_file()
    for extra, method in (("", nd.BASES[base] + "++"), ("--nd-weight 0", nd.BASES[base])):
        command = f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --base {base} {extra} --out o"
        assert run(command) == 0
        assert result("o")["method"] == method
        line = json.loads(Path("o/metrics.jsonl").read_text())
        assert np.isfinite(line[base]) and ("nd" in line) == (extra == "")


def test_ablations_stand_in_the_place_of_nd(cwd, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o --direction-weight 1"
    assert run(command, "--norm-weight", "1") == 0
    line = json.loads(Path("o/metrics.jsonl").read_text())
    assert "direction" in line and "norm" in line and "nd" not in line
    assert result("o")["method"] == "KD + direction + norm"
    assert run(command, "--nd-weight", "1", "--kd-weight", "0") == 0
    assert "nd" in json.loads(Path("o/metrics.jsonl").read_text())


@pytest.mark.parametrize("base", ["kd", "reviewkd"])
@pytest.mark.parametrize("student", ["wrn_16_2", "MobileNetV2"])
def test_different_widths_train_a_projector_that_is_not_exported(
    cwd, monkeypatch, student, base, any_teacher_passes
):
    teacher_file(
        "teacher.pth", "vgg8" if student == "MobileNetV2" and base == "reviewkd" else "resnet8"
    )
    teacher = "vgg8" if student == "MobileNetV2" and base == "reviewkd" else "resnet8"
    optimizers, made = [], []
    sgd, module_dict = torch.optim.SGD, torch.nn.ModuleDict

    def spy(parameters, **options):
        parameters = list(parameters)
        optimizers.append((parameters, [p.detach().clone() for p in parameters]))
        return sgd(parameters, **options)

    monkeypatch.setattr(torch.optim, "SGD", spy)
    monkeypatch.setattr(nd.nn, "ModuleDict", lambda: made.append(module_dict()) or made[-1])
    command = (
        f"--dataset shapes --train-size 48 --batch-size 24 --teacher {teacher} --student {student}"
    )
    assert run(f"{command} --epochs 1 --teacher-ckpt teacher.pth --base {base} --out o") == 0
    (parameters, before), helpers = optimizers[0], made[0]
    projector = helpers["projector"]
    assert [type(m).__name__ for m in projector] == ["BatchNorm1d", "Dropout", "Linear"]
    assert projector[1].p == 0.5
    ids = {id(p) for p in parameters}
    assert all(id(p) in ids for p in helpers.parameters())
    students = sum(p.numel() for p in common.build_model(student, 24).parameters())
    assert sum(p.numel() for p in parameters) == students + sum(
        p.numel() for p in helpers.parameters()
    )
    moved = {id(p): not torch.equal(p, old) for p, old in zip(parameters, before)}
    assert all(moved[id(p)] for p in projector.parameters())  # trained, not only listed
    assert all(moved.values())
    assert weights("o/student.pt").keys() == common.build_model(student, 24).state_dict().keys()


def test_same_width_needs_no_projector(cwd, monkeypatch, any_teacher_passes):
    teacher_file()
    made, module_dict = [], torch.nn.ModuleDict
    monkeypatch.setattr(nd.nn, "ModuleDict", lambda: made.append(module_dict()) or made[-1])
    assert run(f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o") == 0
    assert not list(made[0].parameters())


def test_all_weights_zero_is_plain_training_bit_for_bit(cwd, any_teacher_passes):
    """Against training written here from scratch, without a line of nd.py."""
    teacher_file()
    for base in ("kd", "reviewkd"):
        command = f"{QUICK} --epochs 3 --seed 5 --teacher-ckpt teacher.pth --out o --base {base}"
        assert run(command, "--kd-weight", "0", "--nd-weight", "0") == 0
        args = nd.parse_args(shlex.split(QUICK))
        data = common.load_data(args, torch.device("cpu"))
        torch.manual_seed(5)
        net = common.build_model("resnet8", 24).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        step = 0
        for epoch in range(3):
            net.train()
            for images, labels in data.batches("train", 24, 5 * 100_003 + epoch, augment=True):
                # 6 steps: drops after 5/8, 6/8 and 7/8 of them
                optimizer.param_groups[0]["lr"] = 0.1 / 10 ** sum(
                    8 * step >= 6 * k for k in (5, 6, 7)
                )
                optimizer.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                optimizer.step()
                step += 1
        assert same(weights("o/student.pt"), net.state_dict())
        assert "kd" not in Path("o/metrics.jsonl").read_text()


def test_schedule_at_240_epochs_is_the_published_one(cwd, monkeypatch, any_teacher_passes):
    """lr 0.1 until epoch 150, then 180, 210; warm-up of the base loss min(1, epoch / 20)."""
    teacher_file()
    seen = []

    class Short(nd.Meter):
        def __init__(self, epoch, epochs, images):
            super().__init__(epoch, epochs, images)

        def add(self, logits, labels, terms):
            super().add(logits, labels, terms)
            frame = sys._getframe(1).f_locals
            seen.append((frame["epoch"], frame["lr"], frame["warm_up"]))

    monkeypatch.setattr(nd, "Meter", Short)
    monkeypatch.setattr(nd, "evaluate", lambda *a: 0.0)
    monkeypatch.setattr(nd, "build_model", lambda name, classes, *_: Tiny(classes))
    monkeypatch.setattr(nd.Run, "_save", lambda *a: None)
    monkeypatch.setattr(nd.Run, "_write_metrics", lambda *a: None)
    monkeypatch.setattr(nd.Meter, "report", lambda *a: None)
    batch = (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    monkeypatch.setattr(common.Data, "batches", lambda *a, **k: iter([batch]))
    monkeypatch.setattr(common.Data, "steps", lambda *a: 1)
    assert run(f"{QUICK} --epochs 240 --teacher-ckpt teacher.pth --nd-weight 0 --out o") == 0
    assert len(seen) == 240
    for epoch, lr, warm_up in seen:
        drops = (epoch >= 150) + (epoch >= 180) + (epoch >= 210)
        assert lr == pytest.approx(0.1 * 0.1**drops) and warm_up == min(1, epoch / 20)


@pytest.mark.parametrize("base", nd.BASES)
def test_the_loss_is_the_weighted_sum_of_its_terms(cwd, monkeypatch, base, any_teacher_passes):
    """At every step; and the losses are given what is the student's, the teacher's, asked for."""
    teacher_file()
    saved = torch.load("teacher.pth", weights_only=True)
    saved["model"]["layer3.0.bn2.weight"] *= 20  # longer embeddings than the student's
    torch.save(saved, "teacher.pth")
    losses, seen, asked, embeddings, levels = [], [], [], [], []
    backward, add, own = torch.Tensor.backward, common.Meter.add, getattr(nd, f"{base}_loss", None)
    review, nd_loss, norm_loss = nd.ReviewKD.forward, nd.nd_loss, nd.norm_loss

    def spy_add(self, logits, labels, terms):
        seen.append({k: float(torch.as_tensor(v).detach()) for k, v in terms.items()})
        add(self, logits, labels, terms)

    def spy_base(student, teacher, *options, **named):
        assert student.requires_grad and not teacher.requires_grad
        asked.append([v for v in (*options, *named.values()) if not torch.is_tensor(v)])
        return own(student, teacher, *options, **named)

    def spy_review(self, student_maps, teacher_maps):
        levels.append((student_maps[:-1], teacher_maps[:-1]))
        return review(self, student_maps, teacher_maps)

    def spy_embeddings(loss):
        def spied(student, teacher, *more):
            embeddings.append((student, teacher))
            return loss(student, teacher, *more)

        return spied

    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss)
    )
    monkeypatch.setattr(common.Meter, "add", spy_add)
    monkeypatch.setattr(nd.ReviewKD, "forward", spy_review)
    monkeypatch.setattr(nd, "nd_loss", spy_embeddings(nd_loss))
    monkeypatch.setattr(nd, "norm_loss", spy_embeddings(norm_loss))
    if own:
        monkeypatch.setattr(nd, f"{base}_loss", spy_base)
    flags = "--ce-weight 0.5 --kd-weight 2 --nd-weight 3 --direction-weight 5 --norm-weight 7"
    flags += " --temperature 3" + " --dkd-alpha 1.5 --dkd-beta 6" * (base == "dkd")
    assert run(f"{QUICK} --epochs 2 --teacher-ckpt teacher.pth --base {base} {flags}") == 0
    assert len(losses) == len(seen) == 4
    for warm_up, loss, terms in zip((0, 1, 1, 1), losses, seen):  # 0, 60, 120, 180 of 240 epochs
        by_weight = {"ce": 0.5, base: warm_up * 2, "nd": 3, "direction": 5, "norm": 7}
        assert loss == pytest.approx(sum(w * terms[k] for k, w in by_weight.items()), rel=1e-5)
        assert all(terms[k] > 0 for k in by_weight)
    assert asked == [{"kd": [3.0], "dkd": [1.5, 6.0, 3.0], "dist": [3.0]}.get(base)] * 4 * bool(own)
    assert len(embeddings) == 8
    for student, teacher in embeddings:
        assert student.requires_grad and not teacher.requires_grad
        assert not torch.equal(student, teacher)
    assert len(levels) == 4 * (base == "reviewkd")
    for (
        student_maps,
        teacher_maps,
    ) in levels:  # the student's after their ReLU, the teacher's before
        assert all(m.min() >= 0 for m in student_maps) and all(m.min() < 0 for m in teacher_maps)


# KD++ kd, nd; DKD++ alpha, beta, nd; DIST++ kd, nd; ReviewKD++ kd, nd: of the paper's scripts
PAPER = """
resnet56   resnet20    1.0 2.0  2.5 4.0 3.5  2.0 1.0  1.2 1.0
resnet32x4 resnet8x4   3.5 2.0  2.0 8.0 0.5  1.5 4.0  8.0 1.0
wrn_40_2   wrn_40_1    1.0 1.5  1.0 6.0 1.0  2.5 3.0  5.0 4.0
ResNet50   MobileNetV2 3.0 0.5  0.5 8.0 1.0  7.0 1.0  6.0 2.0
resnet32x4 ShuffleV1   2.5 1.5  0.5 8.0 4.0  2.5 3.0  7.0 1.0
resnet32x4 ShuffleV2   4.0 0.5  0.5 6.0 0.5  3.0 4.0  8.0 1.5
"""


@pytest.mark.parametrize("row", PAPER.strip().splitlines())
def test_weights_and_rates_are_the_papers(row):
    teacher, student, *numbers = row.split()
    kd, nd_of_kd, alpha, beta, nd_of_dkd, dist, nd_of_dist, review, nd_of_review = map(
        float, numbers
    )
    wanted = {"kd": (kd, nd_of_kd), "dkd": (1.0, nd_of_dkd), "dist": (dist, nd_of_dist)}
    wanted["reviewkd"] = review, nd_of_review
    for base, weights_of_base in wanted.items():
        args = nd.parse_args(["--teacher", teacher, "--student", student, "--base", base])
        assert (args.kd_weight, args.nd_weight) == weights_of_base
        if base == "dkd":
            assert (args.dkd_alpha, args.dkd_beta) == (alpha, beta)
    assert args.lr == (0.02 if student.startswith(("Mobile", "Shuffle")) else 0.1)
    assert args.teacher_lr == 0.1 and nd.parse_args(["--dataset", "imagenet"]).lr == 0.2


def test_baselines_take_nothing_from_the_method(monkeypatch):
    """Or a table would list the same CE and KD runs again for every base."""
    given = []
    monkeypatch.setattr(nd, "launch", lambda _main, _args, baselines: given.append(baselines))
    nd.program(["--base", "dkd", "--nd-weight", "3"])
    nd.program([])
    assert given[0]["ce"] == given[1]["ce"] and given[0]["kd"] == given[1]["kd"]
    assert (given[0]["dkd"]["dkd_alpha"], given[0]["dkd"]["nd_weight"]) == (2.5, 0.0)


def test_what_a_narrow_terminal_cuts_is_not_the_time_left(cwd, capsys):
    assert run(QUICK, "--epochs", "1", "--kd-weight", "0", "--nd-weight", "0") == 0
    assert re.search(r"epoch +1/1 +\d+ images/s +\d+:\d\d left  ce \d", capsys.readouterr().out)


def test_augmented_class_means_see_every_image(cwd, monkeypatch, any_teacher_passes):
    """49 images in batches of 48: the one left over counts too."""
    teacher_file()
    seen, means = [], nd.compute_class_means

    def spy(teacher, batches, *more):
        return means(teacher, (seen.append(len(b[1])) or b for b in batches), *more)

    monkeypatch.setattr(nd, "compute_class_means", spy)
    batches = common.Data.batches
    small = lambda self, split, size, *a, **k: batches(self, split, min(size, 48), *a, **k)  # noqa: E731
    monkeypatch.setattr(common.Data, "batches", small)
    command = f"{QUICK} --train-size 49 --epochs 1 --teacher-ckpt teacher.pth"
    assert run(f"{command} --class-means augmented") == 0 and seen == [48, 1]


def test_the_teacher_is_untouched(cwd, monkeypatch, any_teacher_passes):
    teacher_file()
    content, caught, get = Path("teacher.pth").read_bytes(), [], nd.get_teacher

    def catch(*args):
        teacher = get(*args)
        caught.append((teacher.net, {k: v.clone() for k, v in teacher.net.state_dict().items()}))
        return teacher

    monkeypatch.setattr(nd, "get_teacher", catch)
    # without folding, so that its BatchNorm buffers are there to be touched
    monkeypatch.setattr(common, "fold_batchnorm", lambda net, _: net.eval().requires_grad_(False))
    assert run(f"{QUICK} --epochs 2 --teacher-ckpt teacher.pth --out o") == 0
    net, before = caught[0]
    assert any("running_mean" in k for k in before) and same(before, net.state_dict())
    assert not net.training and all(p.grad is None for p in net.parameters())
    assert Path("teacher.pth").read_bytes() == content


def test_class_means_belong_to_their_teacher(cwd, any_teacher_passes):
    teacher_file("a.pth")
    torch.manual_seed(9)
    torch.save(common.build_model("resnet8", 24).state_dict(), "b.pth")
    args = nd.parse_args(shlex.split(QUICK))
    data = common.load_data(args, torch.device("cpu"))

    class Folder:
        dir = cwd

    def means(path, **changes):
        args.teacher_ckpt = path
        vars(args).update(changes)
        return nd.load_class_means(args, data, common.get_teacher(args, data, None), Folder)

    first = means("a.pth")
    stamp = (cwd / "class_means.pt").stat().st_mtime_ns
    assert torch.equal(means("a.pth"), first)
    assert (cwd / "class_means.pt").stat().st_mtime_ns == stamp  # read, not computed
    assert not torch.allclose(means("b.pth"), first)
    assert torch.equal(means("a.pth"), first)
    augmented = means("a.pth", class_means="augmented")
    assert not torch.equal(augmented, first) and torch.allclose(
        augmented, first, rtol=0.5, atol=0.5
    )
    # the clean means against a loop over images
    net = common.build_model("resnet8", 24).eval()
    common.load_weights(net, "a.pth")
    images = (data.train.images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        rows = [net(x[None], return_features=True)[1].embedding[0] for x in images]
    for k in (0, 23):
        mine = torch.stack([r for r, y in zip(rows, data.train.labels) if y == k]).double().mean(0)
        assert torch.allclose(first[k].double(), mine, atol=1e-4)


def test_compare_and_seeds(cwd, capsys, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --compare --seeds 0 1 --out o"
    assert run(command) == 0
    methods = {
        (r["method"], r["seed"]): r
        for r in (json.loads(p.read_text()) for p in Path("o").rglob("result.json"))
    }
    assert set(methods) == {(m, s) for m in ("CE", "KD", "KD++") for s in (0, 1)}
    text = capsys.readouterr().out
    for method in ("CE", "KD", "KD++"):
        assert re.search(rf"\| {re.escape(method)} \| 2 \|.* ± ", text)
    # the method's run is the same with and without its comparison
    assert run(f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --seed 1 --out alone") == 0
    assert same(weights("o/s1/student.pt"), weights("alone/student.pt"))
    assert (
        run(f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --seed 1 --nd-weight 0 --out kd") == 0
    )
    assert same(weights("o/s1/kd/student.pt"), weights("kd/student.pt"))


def test_eval_prints_the_students_top1(cwd, capsys, any_teacher_passes):
    teacher_file()
    assert run(f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o") == 0
    capsys.readouterr()
    for name in ("student.pt", "last.pt"):
        assert run(f"{QUICK} --eval o/{name}") == 0
        assert f"test {result('o')['student_top1']:.2f} %" in capsys.readouterr().out


def test_bf16_trains_and_reports_finite_terms(cwd, monkeypatch, any_teacher_passes):
    teacher_file()
    nd_loss, seen = nd.nd_loss, []

    def spy(*a):
        value = nd_loss(*a)
        seen.append((a[0].dtype, a[1].dtype, value.dtype))
        return value

    monkeypatch.setattr(nd, "nd_loss", spy)
    for base in nd.BASES:
        command = f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o --precision bf16"
        assert run(command, "--base", base) == 0
        line = json.loads(Path("o/metrics.jsonl").read_text())
        assert np.isfinite([line["ce"], line[base], line["nd"]]).all()
    assert all(v.dtype != torch.bfloat16 for v in weights("o/student.pt").values())
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)}


def test_a_torchvision_pair(cwd, any_teacher_passes):
    teacher_file("teacher.pth", "resnet18")
    command = (
        "--dataset shapes --train-size 48 --batch-size 24 --teacher resnet18 --student resnet8"
    )
    assert run(f"{command} --teacher-ckpt teacher.pth --epochs 1 --out o") == 0


# --- stopping and going on -----------------------------------------------------------------------


def test_resume_equals_uninterrupted(cwd, monkeypatch, any_teacher_passes):
    """With a projector, so that its dropout needs the random state. Within and between epochs."""
    teacher_file(name="wrn_16_2")
    command = f"{WIDE} --epochs 3 --teacher-ckpt teacher.pth --out"
    assert run(command, "whole") == 0
    for step in (1, 4, 5):
        parts = f"parts{step}"
        with monkeypatch.context() as patch:
            stop_in(patch, step)
            assert run(command, parts) == 128 + signal.SIGTERM
        assert not Path(f"{parts}/result.json").exists()
        torch.load(f"{parts}/last.pt", weights_only=True)
        assert run(command, parts, "--resume") == 0
        assert same(weights("whole/student.pt"), weights(f"{parts}/student.pt"))
        assert timeless_lines("whole") == timeless_lines(parts) and len(lines(parts)) == 3
        assert not list(Path(parts).glob("*.tmp"))
    assert run(command, parts, "--resume") == 0  # nothing left to do
    assert same(weights("whole/student.pt"), weights(f"{parts}/student.pt"))


def test_a_stop_within_an_epoch_saves_the_step(cwd, monkeypatch, capsys, any_teacher_passes):
    teacher_file(name="wrn_16_2")
    command = f"{WIDE} --epochs 2 --batch-size 8 --teacher-ckpt teacher.pth --out"
    assert run(command, "whole") == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 6 + 4)
        assert run(command, "parts") == 143
    saved = torch.load("parts/last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 4)
    seen = []
    with monkeypatch.context() as patch:
        add = common.Meter.add
        patch.setattr(common.Meter, "add", lambda *a: seen.append(1) or add(*a))
        assert run(command, "parts", "--resume") == 0
    assert len(seen) == 2  # the two steps that were left
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))
    assert timeless_lines("whole") == timeless_lines("parts")


def timeless_lines(out):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(out)]


def test_a_second_signal_does_not_wait(cwd, monkeypatch, any_teacher_passes):
    teacher_file()
    add = common.Meter.add

    def twice(self, *a):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the same stop, delivered twice
        common._Signals.since -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on after the second signal")
        add(self, *a)

    with monkeypatch.context() as patch:
        patch.setattr(common.Meter, "add", twice)
        assert run(f"{QUICK} --teacher-ckpt teacher.pth --epochs 1 --out o") == 143
    assert torch.load("o/last.pt", weights_only=True)["step"] == 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    cwd, monkeypatch, capsys, any_teacher_passes
):
    teacher_file(name="wrn_16_2")
    command = f"{WIDE} --epochs 3 --teacher-ckpt teacher.pth --out"
    assert run(command, "whole") == 0 and not Path("whole/previous.pt").exists()

    def no_links(source, _):
        raise OSError(95, "not supported") if source.exists() else FileNotFoundError

    for damage in ("torn", "bit", "gone", "no links"):
        with monkeypatch.context() as patch:
            stop_in(patch, 5)  # in the third epoch
            if damage == "no links":
                patch.setattr(common.os, "link", no_links)
            assert run(command, damage) == 143
        last = Path(damage, "last.pt")
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            last.unlink()
        else:
            last.write_bytes(content if damage == "bit" else content[:5000])
        assert run(command, damage, "--resume") == 0
        assert f"going on from {damage}/previous.pt" in capsys.readouterr().err
        assert same(weights("whole/student.pt"), weights(f"{damage}/student.pt"))
        assert timeless_lines("whole") == timeless_lines(damage)


def test_the_one_good_checkpoint_outlives_a_failing_save(
    cwd, monkeypatch, capsys, any_teacher_passes
):
    """last.pt is damaged; going on from previous.pt, the disk is full."""
    teacher_file()
    command = f"{QUICK} --epochs 3 --teacher-ckpt teacher.pth --out"
    assert run(command, "whole") == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 5)
        assert run(command, "parts") == 143
    Path("parts/last.pt").write_bytes(b"damaged")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_whole", full)
        assert run(command, "parts", "--resume") == 2
    assert "No space left" in capsys.readouterr().err
    assert run(command, "parts", "--resume") == 0
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))


def test_what_has_no_deterministic_form_is_named(cwd, monkeypatch, capsys, any_teacher_passes):
    teacher_file()

    def kernel(*_):
        raise RuntimeError("some_backward_cuda does not have a deterministic implementation, but")

    monkeypatch.setattr(nd, "kd_loss", kernel)
    assert run(f"{QUICK} --teacher-ckpt teacher.pth --epochs 1 --out o") == 2
    assert "error: --deterministic: some_backward_cuda has no such form" in capsys.readouterr().err


def test_save_minutes_and_a_kill_within_an_epoch(cwd, monkeypatch, any_teacher_passes):
    """A process killed without warning after a save in the middle of an epoch."""
    teacher_file(name="wrn_16_2")
    command = f"{WIDE} --teacher-ckpt teacher.pth --epochs 2 --batch-size 8 --save-minutes 1e-9"
    save = common.Run._save

    def killed(self, objects, step=0, meter=None):
        save(self, objects, step, meter)
        if (len(self.history), step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "_save", killed)
        process = forked(nd.program, f"{command} --out o")
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load("o/last.pt", weights_only=True)["step"] == 3
    assert run(command, "--out", "o", "--resume") == 0
    assert run(command, "--out", "whole") == 0
    assert same(weights("whole/student.pt"), weights("o/student.pt"))


def test_tensorboard_gets_every_epoch(cwd, monkeypatch, capsys, any_teacher_passes):
    teacher_file()
    written = []

    class SummaryWriter:
        def __init__(self, folder, **options):
            Path(folder).mkdir(exist_ok=True)
            written.append(f"{folder} {options}")

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch, value))

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    command = f"{QUICK} --teacher-ckpt teacher.pth --epochs 2 --out o --tensorboard"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        assert run(command) == 0
    assert written[0] == "o/tensorboard {}"
    assert {(name, epoch) for name, epoch, _ in written[1:]} >= {
        (name, epoch) for name in ("ce", "kd", "nd", "test_top1", "lr") for epoch in (1, 2)
    }
    assert ("test_top1", 2, result("o")["student_top1"]) in written
    # resumed: the old lines are dropped and told again; started anew: they are set aside
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        stop_in(patch, 3)
        assert run(command) == 143
        assert Path("o/old1/tensorboard").exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        written.clear()
        assert run(command, "--resume") == 0
    assert written[0] == "o/tensorboard {'purge_step': 1}"
    assert {epoch for name, epoch, _ in written[1:] if name == "ce"} == {1, 2}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(command.replace("--out o", "--out p")) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not Path("p").exists()


def test_deterministic_switches_torch(cwd, any_teacher_passes):
    teacher_file()
    try:
        assert run(f"{QUICK} --teacher-ckpt teacher.pth --epochs 1 --out o --deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_compile_changes_neither_the_weights_nor_their_names(cwd, monkeypatch, any_teacher_passes):
    """With a backend that traces but runs the same operations, so that no compiler is needed."""
    teacher_file()
    assert run(f"{QUICK} --teacher-ckpt teacher.pth --epochs 1 --out a") == 0
    compile_, compiled = torch.compile, []

    def traced(network, dynamic):
        compiled.append(dynamic)
        return compile_(network, backend="eager", dynamic=dynamic)

    resets = []
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(compiled)))
    assert run(f"{QUICK} --teacher-ckpt teacher.pth --epochs 1 --out b --compile") == 0
    assert resets == [0]  # earlier runs' graphs are forgotten
    assert compiled == [False] * 2  # student and teacher: never one graph for all sizes
    assert same(weights("a/student.pt"), weights("b/student.pt"))
    assert not any("_orig_mod" in key for key in weights("b/student.pt"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stop_while_the_teacher_trains(cwd, monkeypatch, damaged):
    command = f"{QUICK} --epochs 3 --out"
    assert run(command, "whole") == 0
    (cwd / "checkpoints").rename(cwd / "checkpoints1")
    (cwd / "runs").rename(cwd / "runs1")
    with monkeypatch.context() as patch:
        stop_in(patch, 5)
        assert run(command, "parts") == 143
    assert not list(cwd.glob("checkpoints/*"))
    folder = Path("runs/teacher-shapes-resnet8")
    if damaged:  # then the checkpoint before serves, also as a program before --val-size wrote it
        saved = torch.load(folder / "previous.pt", weights_only=True)
        del saved["args"]["val_size"]
        torch.save(saved, folder / "previous.pt")
        (folder / "last.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        add, seen = common.Meter.add, []
        patch.setattr(common.Meter, "add", lambda *a: seen.append(1) or add(*a))
        assert run(command, "parts", "--resume") == 0
    assert len(seen) == (2 if damaged else 1) + 6  # the teacher's last steps, then the student
    assert same(weights("checkpoints1/shapes_resnet8.pt"), weights("checkpoints/shapes_resnet8.pt"))
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))


def test_a_kill_at_any_moment(cwd, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --teacher-ckpt teacher.pth --epochs 6 --out"
    process = forked(nd.program, f"{command} parts")
    metrics = Path("parts/metrics.jsonl")
    while process.is_alive() and not (metrics.exists() and len(lines("parts")) >= 2):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not Path("parts/result.json").exists()
    assert run(command, "parts", "--resume") == 0
    assert run(command, "whole") == 0
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))


def test_work_is_never_overwritten(cwd, monkeypatch, capsys, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --teacher-ckpt teacher.pth --out o"
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert run(command, "--epochs", "2") == 143
    assert run(command, "--epochs", "1") == 0
    assert torch.load("o/old1/last.pt", weights_only=True)["epoch"] == 1  # the stopped run
    assert torch.load("o/old1/previous.pt", weights_only=True)["epoch"] == 1
    for bad in ("--train-size 5", "--teacher-ckpt absent.pth", "--dataset folder --data-dir none"):
        assert run(command, *bad.split()) == 2
        assert result("o")["epochs"] == 1 and not Path("o/old2").exists()
    assert run(f"{command} --epochs 2 --compare") == 0
    assert result("o/old2")["epochs"] == 1 and {"ce", "kd"} < {p.name for p in Path("o").iterdir()}
    assert "kept in o/old2" in capsys.readouterr().err


def test_files_of_others_in_the_folder_stay(cwd, any_teacher_passes):
    teacher_file()
    Path("mine/x.tmp").mkdir(parents=True)
    for name in ("thesis.tmp", "photo.png", "curves.png", "student.pt.17.tmp"):
        Path("mine", name).write_text(name)
    assert run(f"{QUICK} --teacher-ckpt teacher.pth --epochs 1 --out mine") == 0
    names = {p.name for p in Path("mine").iterdir()}
    assert {"x.tmp", "thesis.tmp", "photo.png", "old1"} < names
    assert not {"curves.png", "student.pt.17.tmp"} & names  # an earlier run's
    assert [p.name for p in Path("mine/old1").iterdir()] == ["curves.png"]


def test_a_start_that_failed_is_said_when_resumed(cwd, capsys, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --epochs 1 --out o --teacher-ckpt"
    assert run(command, "absent.pth") == 2 and not Path("o").exists()
    teacher_file("other.pth", "resnet14")
    assert run(command, "other.pth") == 2
    assert run(command, "teacher.pth", "--resume") == 0
    assert "nothing was saved in o yet: from the start" in capsys.readouterr().err


@pytest.mark.parametrize("before", ["resnet14", "no teacher"])
def test_dropout_does_not_depend_on_what_was_built_before(cwd, before, any_teacher_passes):
    """A student with dropout and all weights 0, named beside another teacher, and without one."""
    teacher_file()
    teacher_file("other.pth", "resnet14")
    command = f"{QUICK} --student mobilenet_v3_small --epochs 1 --kd-weight 0 --nd-weight 0"
    assert run(f"{command} --teacher-ckpt teacher.pth --out a") == 0
    if before == "no teacher":
        args = nd.parse_args(shlex.split(f"{command} --out b"))
        args.teacher = None
        common.fill_image_size(args)
        nd.main(args)
    else:
        assert run(f"{command} --teacher resnet14 --teacher-ckpt other.pth --out b") == 0
    assert same(weights("a/student.pt"), weights("b/student.pt"))


def test_what_is_missing_is_found_before_the_data_is_read(cwd, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_data", lambda *_: pytest.fail("the data was read"))
    monkeypatch.setattr(nd, "load_data", lambda *_: pytest.fail("the data was read"))
    for more, words in (("--eval absent.pt", "absent.pt: no such"), ("--pretrained", "resnet8")):
        assert run(f"{QUICK} {more}") == 2
        assert words in capsys.readouterr().err


def test_a_teacher_that_could_not_be_kept_is_not_trained(cwd, monkeypatch, capsys):
    monkeypatch.setattr(common.os, "access", lambda *_: False)  # root may write everywhere
    assert run(f"{QUICK} --epochs 1") == 2
    assert "checkpoints/ cannot be written" in capsys.readouterr().err
    assert not Path("runs/teacher-shapes-resnet8").exists()


def test_review_needs_maps(cwd, monkeypatch, capsys):
    nothing = common.Features(torch.zeros(2, 64), [], [])
    monkeypatch.setattr(nd, "probe", lambda *_: nothing)
    assert run(f"{QUICK} --base reviewkd") == 2
    assert "--base reviewkd: this pair has 0 and 0 stages" in capsys.readouterr().err


def test_compile_without_a_compiler_is_one_line(cwd, monkeypatch, capsys, any_teacher_passes):
    def broken(*_, **__):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler\nand more")

    teacher_file()
    monkeypatch.setattr(torch, "compile", broken)
    assert run(f"{QUICK} --compile --teacher-ckpt teacher.pth --epochs 1") == 2
    assert capsys.readouterr().err.endswith(
        "error: torch.compile does not work here: no compiler\n"
    )


def test_resume_of_several_runs(cwd, monkeypatch, capsys, any_teacher_passes):
    """Finished ones are left alone, the stopped one goes on, the others start."""
    teacher_file()
    command = f"{QUICK} --epochs 2 --teacher-ckpt teacher.pth --compare --seeds 0 1 --out"
    assert run(command, "whole") == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 4 + 3)  # in the second epoch of the second run
        assert run(command, "o") == 143
    finished = Path("o/s0/result.json")  # the method comes first
    stamp = finished.stat().st_mtime_ns
    assert run(command, "o", "--resume") == 0
    assert finished.stat().st_mtime_ns == stamp
    for path in Path("whole").rglob("student.pt"):
        assert same(weights(path), weights("o" / path.relative_to("whole")))
    assert not list(Path("o").rglob("old1"))
    assert run(command, "elsewhere", "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err
    # a mistyped weight, which the baselines do not have: nothing is set aside
    assert run(command, "o", "--nd-weight", "1.5", "--resume") == 2
    assert "o/s0 was started with --nd-weight 2.0; give" in capsys.readouterr().err
    assert finished.stat().st_mtime_ns == stamp


def test_a_pair_that_does_not_fit_is_refused_before_the_teacher_is_trained(
    cwd, monkeypatch, capsys
):
    monkeypatch.setattr(common, "save_whole", lambda *a: pytest.fail("something was trained"))
    assert run(f"{QUICK} --epochs 1 --base reviewkd --student vgg8") == 2
    assert run(f"{QUICK} --epochs 1 --student alexnet") == 2
    assert "alexnet does not take 16-pixel images" in capsys.readouterr().err


def test_a_pair_that_does_not_fit_is_refused_before_the_baselines_too(
    cwd, capsys, any_teacher_passes
):
    teacher_file()
    command = f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o --compare"
    assert run(f"{command} --base reviewkd --student MobileNetV2") == 2
    assert "stages" in capsys.readouterr().err and not list(Path("o").rglob("student.pt"))
    assert run(f"{command} --seeds 3 1") == 0
    text = capsys.readouterr().out
    assert re.findall(r"^== (.*), seed (\d)", text, re.M) == [
        (method, seed) for seed in "31" for method in ("KD++", "CE", "KD")
    ]
    assert re.findall(r"^\| .* \| (\S+) \| 2 \|", text, re.M) == ["CE", "KD", "KD++"]


def test_the_teacher_is_saved_within_an_epoch_too(cwd, monkeypatch):
    steps, save = [], common.Run._save

    def spy(self, objects, step=0, meter=None):
        steps.append((self.args.method, step))
        save(self, objects, step, meter)

    monkeypatch.setattr(common.Run, "_save", spy)
    assert run(f"{QUICK} --epochs 1 --save-minutes 1e-9 --out o") == 0
    assert ("teacher", 1) in steps and ("KD++", 1) in steps


def test_weights_say_where_they_are_from(capsys):
    for command, words in {
        "": "(the paper's): kd_weight 1 nd_weight 2",
        "--base dkd --teacher resnet34 --student resnet18": "so those of resnet56 resnet20",
        "--dataset imagenet": "(the paper's): kd_weight 2.5 nd_weight 1",
        "--dataset imagenet --base dkd": "(the paper's): kd_weight 1 dkd_alpha 0.8 dkd_beta 0.5",
        "--dataset imagenet --base dist": "(none known for resnet34 resnet18, so those of resnet56"
        " resnet20): kd_weight 2 nd_weight 1",
        "--dataset imagenet --student alexnet": "so those of resnet34 resnet18): kd_weight 2.5",
    }.items():
        nd.parse_args(shlex.split(command))
        assert words in capsys.readouterr().out, command


def test_the_student_is_the_same_whether_the_teacher_was_there_or_not(cwd):
    command = f"{WIDE} --epochs 1 --out"
    assert run(command, "first") == 0  # trains the teacher
    assert run(command, "second") == 0  # loads it
    assert same(weights("first/student.pt"), weights("second/student.pt"))


def test_two_processes_cannot_share_a_folder(cwd, any_teacher_passes, capsys):
    teacher_file()
    Path("o").mkdir()
    code = "import fcntl, sys; f = open('o/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print('locked', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    command = f"{QUICK} --teacher-ckpt teacher.pth --out o --epochs 1"
    assert run(command) == 2
    assert "another process" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert run(command) == 0


def test_a_full_disk_ends_in_one_line(cwd, monkeypatch, capsys, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --teacher-ckpt teacher.pth --out o --epochs 3"
    save, count = common.os.fsync, [0]

    def full(handle):
        count[0] += 1
        if count[0] == 4:
            raise OSError(28, "No space left on device")
        save(handle)

    with monkeypatch.context() as patch:
        patch.setattr(common.os, "fsync", full)
        assert run(command) == 2
    assert "error: o/metrics.jsonl: No space left" in capsys.readouterr().err
    assert torch.load("o/last.pt", weights_only=True)["epoch"] == 1
    assert not list(Path("o").glob("*.tmp"))
    assert run(command, "--resume") == 0
    assert len(Path("o/metrics.jsonl").read_text().splitlines()) == 3


def test_resume_refuses_other_arguments(cwd, capsys, monkeypatch, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --epochs 2 --teacher-ckpt teacher.pth --out o"
    assert run(command) == 0
    for change in ("--lr 0.05", "--nd-weight 1", "--seed 1", "--temperature 2", "--precision bf16"):
        assert run(command, "--resume", *change.split()) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --resume") and change.split()[0] in error
    # a finished run too is of its teacher, wherever that lies; a damaged result is written again
    other, text = command.replace("teacher.pth", "other.pth"), Path("o/result.json").read_text()
    Path("other.pth").write_bytes(Path("teacher.pth").read_bytes())
    assert run(other, "--resume") == 0 and result("o")["args"]["teacher_ckpt"] == "other.pth"
    for damage in ("3", "[1]", '{"a": 1}', "[" * 100_000, text[:100]):
        Path("o/result.json").write_text(damage)
        assert run(command, "--resume") == 0 and result("o")["method"] == "KD++"
    torch.manual_seed(7)
    torch.save(common.build_model("resnet8", 24).state_dict(), "other.pth")
    capsys.readouterr()
    assert run(other, "--resume") == 2
    assert "the teacher is not the one" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert run(command, "--seed", "1") == 143
    good = common.read_checkpoint("o/last.pt")
    mine, half = good["ranks"][0], {"step": 1}
    capsys.readouterr()
    for broken in (
        {"epoch": 2},
        {"step": -1},
        {"history": "x"},
        {"ranks": [{}]},
        {"ranks": [mine | {"rng": torch.zeros(3)}]},
        {"ranks": [mine | {"python_rng": (1, 2)}]},
        half | {"ranks": [mine | {"meter": None}]},
        half | {"ranks": [mine | {"meter": {}}]},
    ):
        Path("o/previous.pt").unlink(missing_ok=True)
        torch.save(good | broken, "o/last.pt")
        assert run(command, "--seed", "1", "--resume") == 2, broken
        assert capsys.readouterr().err.startswith("error: ")
    torch.save(good, "o/last.pt")
    torch.manual_seed(7)
    torch.save(common.build_model("resnet8", 24).state_dict(), "teacher.pth")
    assert run(command, "--seed", "1", "--resume") == 2
    assert "the teacher is not the one" in capsys.readouterr().err


# --- bad input -----------------------------------------------------------------------------------

BAD = {  # arguments -> words of the error
    "--teacher resnet57": "--teacher.*resnet56",
    "--student mobilenetv2": "--student.*MobileNetV2",
    "--dataset cifar1000": "--dataset.*cifar100",
    "--epochs 0": "--epochs.*1 or more",
    "--epochs two": "--epochs.*invalid whole number",
    "--batch-size 1": "--batch-size",
    "--lr -0.1": "--lr",
    "--lr nan": "--lr",
    "--nd-weight -1": "--nd-weight",
    "--kd-weight inf": "--kd-weight",
    "--temperature 0": "--temperature",
    "--temperature 1e300": "--temperature.*to 1e12",
    "--eval ''": "--eval: must name a file",
    "--teacher-ckpt ''": "--teacher-ckpt: must name a file",
    "--out ''": "--out: must name a file",
    "--seed 7 --seeds 0 1": "--seed and --seeds: choose one",
    "--teacher-ckpt nan.pth": "nan.pth: some of its weights are infinite",
    "--base dkd --ce-weight 0 --dkd-alpha 0 --dkd-beta 0": "--ce-weight 0: nothing else",
    "--train-size 0": "--train-size",
    "--dkd-beta 2": "--dkd-alpha, --dkd-beta: only for --base dkd",
    "--eval chance.pth --seeds 0 1": "--eval: leave --compare, --seeds",
    "--train-size 5": "--train-size 5.*24",
    "--train-size 9999": "--train-size 9999",
    "--teacher-ckpt absent.pth": "absent.pth: no such file",
    "--teacher-ckpt torn.pth": "torn.pth",
    "--teacher-ckpt code.pth": "code.pth.*state dict alone",
    "--teacher-ckpt other.pth": "other.pth.*architecture",
    "--teacher-ckpt classes.pth": "classes.pth.*number of classes",
    "--teacher-ckpt chance.pth": "chance.pth.*near chance",
    "--resume": "--resume: nothing to resume",
    "--resume --out torn": "--resume|last.pt",
    "--eval absent.pt": "absent.pt",
    "--seeds one": "--seeds",
    "--seed -1": "--seed",
    "--seed 99999999999999999999": "--seed",
    "--image-size 0": "--image-size",
    "--image-size 1000000": "--image-size",
    "--frobnicate": "--frobnicate",
    "--epoch 3": "--epoch",
    "--base nd": "--base",
    "--dataset folder --data-dir nowhere": "--data-dir.*nowhere",
    "--dataset folder --data-dir damaged": "0.png",
    "--dataset folder --data-dir classless": "empty",
    "--ce-weight 0 --kd-weight 0 --nd-weight 0": "--ce-weight 0",
    "--student vit_b_16": "vit_b_16 does not take 16-pixel images",
    "--base reviewkd --student vgg8 --teacher-ckpt {good}": "--base reviewkd",
    "--device cuda": "--device cuda",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_ends_in_one_line_and_status_2(cwd, arguments, capsys, monkeypatch):
    if arguments == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    make_bad_files()
    if "{good}" in arguments:
        monkeypatch.setattr(common, "near_chance", lambda *a: False)
        arguments = arguments.format(good="chance.pth")
    before = {p for p in cwd.rglob("*") if "checkpoints" not in str(p)}
    start = time.monotonic()
    assert run(f"{QUICK} --epochs 1 {arguments}") == 2
    assert time.monotonic() - start < 30
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0]
    assert re.search(BAD.get(arguments, "--base reviewkd"), errors[0]), errors[0]
    assert not Path("exploded").exists()
    assert before <= set(cwd.rglob("*"))


def test_bad_input_from_the_shell(cwd):
    done = subprocess.run(
        [sys.executable, ROOT / "nd.py", "--teacher", "resnet55"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*--teacher.*resnet56.*\n", done.stderr)


def test_a_loss_that_is_not_finite_stops_and_is_named(cwd, monkeypatch, capsys, any_teacher_passes):
    teacher_file()
    calls, kd_loss = [0], nd.kd_loss

    def breaking(*a):
        calls[0] += 1
        return kd_loss(*a) * (float("nan") if calls[0] == 4 else 1)

    monkeypatch.setattr(nd, "kd_loss", breaking)
    assert run(f"{QUICK} --epochs 5 --teacher-ckpt teacher.pth --out o") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and "loss term kd " in error and "epoch 2" in error
    last = torch.load("o/last.pt", weights_only=True)
    assert last["epoch"] == 1  # the end of the epoch before
    assert all(torch.isfinite(v.float()).all() for v in last["state"]["student"].values())
    assert not Path("o/result.json").exists()


def test_divergence_is_caught(cwd, capsys, any_teacher_passes):
    teacher_file()
    assert run(f"{QUICK} --epochs 3 --teacher-ckpt teacher.pth --out o --lr 1e12") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and "--lr" in error
    assert torch.load("o/last.pt", weights_only=True)["epoch"] == 0
