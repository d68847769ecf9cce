"""sp.py and dcd.py as people use them. What they share with nd.py is tested there in detail."""

import json
import math
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    QUICK,
    TIMES,
    WIDE,
    Tiny,
    lines,
    make_bad_files,
    result,
    same,
    stop_in,
    teacher_file,
    weights,
)
from PIL import Image

import common
import dcd
import nd
import sp

SCRIPTS = {"nd": nd, "sp": sp, "dcd": dcd}
pytestmark = pytest.mark.usefixtures("few_shapes")


def run(script, command, *more):
    return common.run_program(SCRIPTS[script].program, [*shlex.split(command), *more])


@pytest.fixture
def quick(cwd, any_teacher_passes):
    """One epoch of two steps with a teacher that is there."""
    teacher_file()
    return f"{QUICK} --epochs 1 --teacher-ckpt teacher.pth --out o"


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, method", [("sp", "SP"), ("dcd", "DCD")])
def test_one_command_trains_the_teacher_and_writes_the_run(cwd, script, method, capsys):
    assert run(script, WIDE, "--epochs", "2") == 0
    out = cwd / "runs" / f"{script}-wrn_16_2-resnet8-shapes-s0"
    names = {p.name for p in out.iterdir()}
    assert names == {"metrics.jsonl", "result.json", "student.pt", "last.pt", ".lock"}
    assert [line["epoch"] for line in lines(out)] == [1, 2]
    keys = ("ce", script, "train_top1", "test_top1", "lr", "seconds", "images_per_second")
    for line in lines(out):
        assert np.isfinite([line[key] for key in keys]).all()
    r = result(out)
    assert r["method"] == method and r["script"] == f"{script}.py" and r["teacher_top1"] is not None
    student = common.build_model("resnet8", 24)
    student.load_state_dict(weights(out / "student.pt"))  # the student alone, strictly
    assert "teacher wrn_16_2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, method, terms",
    [
        ("--relation cc", "CC", {"cc"}),
        ("--relation intra", "intra", {"intra"}),
        ("--sp-maps all", "SP", {"sp"}),
        ("--relation intra --sp-maps all", "intra", {"intra"}),
        ("--kd-weight 1 --at-weight 1000", "SP+KD+AT", {"sp", "kd", "at"}),
        ("--sp-weight 0 --at-weight 1000", "AT", {"at"}),
        ("--precision bf16 --kd-weight 1", "SP+KD", {"sp", "kd"}),
    ],
)
def test_the_family_of_sp(quick, options, method, terms):
    assert run("sp", quick, *options.split()) == 0
    line = lines("o")[0]
    assert result("o")["method"] == method
    assert {t for t in ("sp", "cc", "intra", "kd", "at") if t in line} == terms
    assert all(math.isfinite(line[t]) and line[t] > 0 for t in terms)


@pytest.mark.parametrize(
    "options",
    ["", "--terms contrastive", "--terms consistency", "--fixed-scale 0.07", "--precision bf16"],
)
def test_the_options_of_dcd(quick, options):
    assert run("dcd", quick, *options.split()) == 0
    line = lines("o")[0]
    assert math.isfinite(line["dcd"]) and line["dcd"] > 0
    expected = 1 / 0.07 if "fixed" in options else math.e  # moved a little in two steps
    assert line["scale"] == pytest.approx(expected, rel=0.1)
    if "contrastive" in options:
        assert line["dcd"] == pytest.approx(math.log(24), rel=0.2)


def test_several_maps_are_summed(quick):
    """--sp-maps all at the first step is the sum of sp_loss over the stages, from another start."""
    command = quick.replace("--batch-size 24", "--batch-size 48")  # a single step
    assert run("sp", command, "--sp-maps", "all") == 0
    args = sp.parse_args(shlex.split(command))
    data = common.load_data(args, torch.device("cpu"))
    images, _ = next(data.batches("train", 48, 0, augment=True))
    torch.manual_seed(0)
    student, teacher = common.build_model("resnet8", 24), common.build_model("resnet8", 24)
    common.load_weights(teacher, "teacher.pth")
    s, t = (net(images, return_features=True)[1].maps for net in (student, teacher.eval()))
    each = [sp.sp_loss(a, b).item() for a, b in zip(s, t)]
    assert len(each) == 3 and lines("o")[0]["sp"] == pytest.approx(sum(each), rel=1e-3)
    assert run("sp", command) == 0
    assert lines("o")[0]["sp"] == pytest.approx(each[-1], rel=1e-3)


def test_sp_weight_batch_multiplies_the_weight(quick):
    assert run("sp", quick, "--sp-weight-batch", "12") == 0  # batches of 24: twice the weight
    rescaled = weights("o/student.pt")
    assert run("sp", quick, "--sp-weight", "6000") == 0
    assert same(weights("o/student.pt"), rescaled)
    assert run("sp", quick) == 0
    assert not same(weights("o/student.pt"), rescaled)


@pytest.mark.parametrize(
    "script, flags, weights_of",
    [
        (
            "sp",
            "--ce-weight 0.5 --sp-weight 100 --kd-weight 2 --at-weight 30 --sp-weight-batch 48",
            lambda batch: {"ce": 0.5, "sp": 100 * batch / 48, "kd": 2, "at": 30},
        ),
        (
            "dcd",
            "--ce-weight 0.5 --dcd-weight 3 --kd-weight 2 --alpha 0.25",
            lambda batch: {"ce": 0.5, "dcd": 3, "kd": 2},
        ),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(quick, monkeypatch, script, flags, weights_of):
    """At every step, the last and smaller batch too; and options reach what they are for."""
    losses, seen, asked, maps = [], [], [], []
    backward, add, kd_loss = torch.Tensor.backward, common.Meter.add, nd.kd_loss

    def spy_backward(loss):
        losses.append(loss.item())
        backward(loss)

    def spy_add(self, logits, labels, terms):
        seen.append(
            (len(labels), {k: float(torch.as_tensor(v).detach()) for k, v in terms.items()})
        )
        add(self, logits, labels, terms)

    def spy_kd(student, teacher, temperature):
        asked.append(temperature)
        return kd_loss(student, teacher, temperature)

    monkeypatch.setattr(torch.Tensor, "backward", spy_backward)
    monkeypatch.setattr(common.Meter, "add", spy_add)
    monkeypatch.setattr(SCRIPTS[script], "kd_loss", spy_kd)
    at_loss, module = sp.at_loss, dcd.DCDLoss
    monkeypatch.setattr(sp, "at_loss", lambda s, t: maps.append(s.shape) or at_loss(s, t))
    alphas = []
    monkeypatch.setattr(
        dcd, "DCDLoss", lambda *a, **k: alphas.append(k["alpha"]) or module(*a, **k)
    )
    command = quick.replace("--train-size 48", "--train-size 40")
    assert run(script, f"{command} {flags} --temperature 3") == 0
    assert [batch for batch, _ in seen] == [24, 16] and len(losses) == 2 and asked == [3.0] * 2
    for loss, (batch, terms) in zip(losses, seen):
        wanted = sum(weight * terms[name] for name, weight in weights_of(batch).items())
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert all(terms[name] > 0 for name in weights_of(batch))
    if script == "sp":
        assert [shape[1] for shape in maps] == [16, 32, 64] * 2  # AT of every stage
    else:
        assert alphas == [0.25]


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_baselines_have_the_weights_that_stand_beside_the_method(monkeypatch, script):
    launched = []
    monkeypatch.setattr(SCRIPTS[script], "launch", lambda *a, **_: launched.append(a[2]))
    for given, ce_weight, kd_weight in (("", 1, 1), ("--kd-weight 2", 0.5, 2)):
        more = "--at-weight 7" if script == "sp" else ""
        assert run(script, f"{QUICK} --ce-weight 0.5 {given} {more}") == 0
        for name, wanted in (("ce", (1, 0)), ("kd", (ce_weight, kd_weight))):
            changes = launched[-1][name]
            assert (changes["ce_weight"], changes["kd_weight"]) == wanted
            off = {"sp_weight", "at_weight"} if script == "sp" else {"dcd_weight"}
            assert all(changes[key] == 0 for key in off)


def test_the_class_counts_of_teacher_and_student_widths_may_differ(cwd, any_teacher_passes):
    for script, teacher in (("sp", "vgg8"), ("dcd", "MobileNetV2")):
        teacher_file("teacher.pth", teacher)
        command = WIDE.replace("--teacher wrn_16_2", f"--teacher {teacher}")
        assert run(script, f"{command} --epochs 1 --teacher-ckpt teacher.pth --out o") == 0


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_weights_of_zero_are_plain_training_bit_for_bit(cwd, script, any_teacher_passes):
    """Against training written here from scratch, and against nd.py with the same recipe."""
    teacher_file()
    command = f"{QUICK} --epochs 3 --seed 5 --teacher-ckpt teacher.pth --out o"
    assert run(script, command, f"--{script}-weight", "0") == 0
    assert result("o")["method"] == "CE"
    data = common.load_data(nd.parse_args(shlex.split(QUICK)), torch.device("cpu"))
    torch.manual_seed(5)
    net = common.build_model("resnet8", 24).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4)
    step = 0
    for epoch in range(3):
        net.train()
        for images, labels in data.batches("train", 24, 5 * 100_003 + epoch, augment=True):
            drops = sum(8 * step >= 6 * k for k in (5, 6, 7))  # after 5/8, 6/8, 7/8 of 6 steps
            factor = 0.1**drops if script == "sp" else 1 / 10**drops
            optimizer.param_groups[0]["lr"] = 0.05 * factor
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step += 1
    assert same(weights("o/student.pt"), net.state_dict())
    recipe = "--lr 0.05 --no-nesterov --nd-weight 0 --kd-weight 0"
    assert run("nd", command, *recipe.split()) == 0
    assert all(
        torch.allclose(a, b, atol=1e-6) if a.is_floating_point() else torch.equal(a, b)
        for a, b in zip(weights("o/student.pt").values(), net.state_dict().values())
    )


def test_kd_alone_is_the_same_in_both_scripts(quick):
    assert run("sp", quick, "--sp-weight", "0", "--kd-weight", "1") == 0
    first = weights("o/student.pt")
    assert run("dcd", quick, "--dcd-weight", "0", "--kd-weight", "1") == 0
    assert result("o")["method"] == "KD" and same(weights("o/student.pt"), first)


def test_heads_and_tau_are_trained_decayed_and_not_exported(quick, monkeypatch):
    optimizers, sgd = [], torch.optim.SGD

    def spy(parameters, **options):
        optimizers.append(sgd(parameters, **options))
        return optimizers[-1]

    modules, kind = [], dcd.DCDLoss
    monkeypatch.setattr(torch.optim, "SGD", spy)
    monkeypatch.setattr(
        dcd, "DCDLoss", lambda *a, **k: modules.append(kind(*a, **k)) or modules[-1]
    )
    assert run("dcd", quick, "--epochs", "3", "--embed-dim", "16") == 0
    (group,), module = optimizers[0].param_groups, modules[0]
    assert group["weight_decay"] == 5e-4
    ids = [id(p) for p in group["params"]]
    named = dict(module.named_parameters())
    heads = {f"{h}_head.{p}" for h in ("student", "teacher") for p in ("weight", "bias")}
    assert set(named) == heads | {"tau"}
    assert all(ids.count(id(p)) == 1 for p in named.values())
    assert module.student_head.out_features == 16
    saved = torch.load("o/last.pt", weights_only=True)["state"]
    for name, value in named.items():
        assert torch.equal(saved["helpers"][f"dcd.{name}"], value)
        momentum = optimizers[0].state[value]["momentum_buffer"]
        assert momentum.abs().max() > 0, name  # a gradient reached it
    assert named["tau"].item() != 1.0
    assert weights("o/student.pt").keys() == common.build_model("resnet8", 24).state_dict().keys()


@pytest.mark.parametrize(
    "script, options, lr, length, drops, factor",
    [
        ("sp", "", 0.05, 240, (150, 180, 210), 0.1),
        ("dcd", "", 0.05, 240, (150, 180, 210), 0.1),
        ("sp", "--recipe paper --dataset shapes", 0.1, 200, (60, 120, 160), 0.2),
    ],
)
def test_schedules_at_full_length(
    cwd, monkeypatch, script, options, lr, length, drops, factor, any_teacher_passes
):
    teacher_file()
    seen, module = [], SCRIPTS[script]
    add = common.Meter.add

    def spy(self, *a):
        add(self, *a)
        frame = sys._getframe(1).f_locals
        seen.append((frame["epoch"], frame["optimizer"].param_groups[0]["lr"]))

    monkeypatch.setattr(common.Meter, "add", spy)
    monkeypatch.setattr(module, "evaluate", lambda *a: 0.0)
    monkeypatch.setattr(module, "build_model", lambda name, classes, *_: Tiny(classes))
    monkeypatch.setattr(common.Run, "_save", lambda *a: None)
    monkeypatch.setattr(common.Run, "_write_metrics", lambda *a: None)
    monkeypatch.setattr(common.Meter, "report", lambda *a: None)
    batch = (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    monkeypatch.setattr(common.Data, "batches", lambda *a, **k: iter([batch]))
    monkeypatch.setattr(common.Data, "steps", lambda *a: 1)
    zero = f"--{script}-weight 0"
    assert run(script, f"{QUICK} {options} {zero} --teacher-ckpt teacher.pth --out o") == 0
    assert len(seen) == length
    for epoch, rate in seen:
        assert rate == pytest.approx(lr * factor ** sum(epoch >= drop for drop in drops))


def test_recipes():
    args = sp.parse_args(["--recipe", "paper"])
    wanted = dict(dataset="cifar10", teacher="wrn_40_1", student="wrn_16_1", epochs=200)
    wanted |= dict(batch_size=128, lr=0.1, nesterov=True, weight_decay=5e-4, sp_weight=3000.0)
    assert {k: getattr(args, k) for k in wanted} == wanted
    args = sp.parse_args(["--recipe", "paper", "--dataset", "svhn", "--no-nesterov", "--lr", "1"])
    assert (args.dataset, args.nesterov, args.lr) == ("svhn", False, 1.0)
    for script, module in (("sp", sp), ("dcd", dcd)):
        args = module.parse_args(["--student", "ShuffleV1"])
        wanted = dict(dataset="cifar100", teacher="resnet56", epochs=240, batch_size=64, lr=0.01)
        wanted |= dict(teacher_lr=0.05, nesterov=False, momentum=0.9, kd_weight=0.0, script=script)
        assert {k: getattr(args, k) for k in wanted} == wanted


def test_compare_sets_ce_and_kd_beside_the_method(quick, capsys):
    for script, method in (("sp", "SP"), ("dcd", "DCD")):
        assert run(script, quick.replace("--out o", f"--out {script}"), "--compare") == 0
        assert result(f"{script}/ce")["method"] == "CE" and result(f"{script}/kd")["method"] == "KD"
        assert re.search(rf"\| {method} \| 1 \|", capsys.readouterr().out)
        assert "kd" not in lines(script)[0]
    assert same(weights("sp/ce/student.pt"), weights("dcd/ce/student.pt"))


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_resume_equals_uninterrupted(cwd, monkeypatch, script, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --epochs 2 --kd-weight 1 --teacher-ckpt teacher.pth --out"
    assert run(script, command, "whole") == 0
    for step in (2, 3):
        parts = f"parts{step}"
        with monkeypatch.context() as patch:
            stop_in(patch, step)
            assert run(script, command, parts) == 128 + signal.SIGTERM
        saved = common.read_checkpoint(f"{parts}/last.pt")
        # before the test of an epoch too, which may take long
        assert (saved["epoch"], saved["step"]) == {2: (0, 2), 3: (1, 1)}[step]
        assert run(script, command, parts, "--resume") == 0
        assert same(weights("whole/student.pt"), weights(f"{parts}/student.pt"))
        timeless = [[{k: v for k, v in x.items() if k not in TIMES} for x in lines(d)]
                    for d in ("whole", parts)]  # fmt: skip
        assert timeless[0] == timeless[1] and len(timeless[0]) == 2
        if script == "dcd":
            heads = [torch.load(f"{d}/last.pt", weights_only=True)["state"]["helpers"]
                     for d in ("whole", parts)]  # fmt: skip
            assert same(*heads) and "dcd.tau" in heads[0]


def test_a_teacher_serves_every_script_and_that_is_said(cwd, capsys):
    epochs = "--epochs 1 --teacher-epochs 1"
    assert run("nd", f"{QUICK} {epochs} --kd-weight 0 --nd-weight 0") == 0
    saved = weights("checkpoints/shapes_resnet8.pt")
    capsys.readouterr()
    for script in ("sp", "dcd"):
        assert run(script, f"{QUICK} {epochs}") == 0
        text = capsys.readouterr().out
        assert "note: checkpoints/shapes_resnet8.pt was trained with script nd" in text
        assert "lr 0.1 (asked: 0.05)" in text and "training it" not in text
        assert run(script, f"{QUICK} --epochs 1 --teacher-epochs 2") == 2  # not that
        assert "epochs 1 (asked: 2)" in capsys.readouterr().err
    assert same(weights("checkpoints/shapes_resnet8.pt"), saved)
    Path("checkpoints/shapes_resnet8.pt").unlink()
    assert run("sp", f"{QUICK} {epochs}") == 0
    for change in ("--recipe paper --dataset shapes --batch-size 24", "--teacher-lr 0.02"):
        assert run("sp", f"{QUICK} {epochs} {change}") == 2
        assert "trained otherwise" in capsys.readouterr().err


def test_pretrained_starts_from_torchvisions_weights(cwd, monkeypatch, capsys):
    asked, get_model = [], common.torchvision.models.get_model

    def without_download(name, weights=None, **options):
        asked.append((name, weights))
        return get_model(name, weights=None, **options)

    monkeypatch.setattr(common.torchvision.models, "get_model", without_download)
    command = QUICK.replace("resnet8", "mobilenet_v2")
    assert run("sp", f"{command} --epochs 1 --pretrained --train-size 24") == 0
    started = [str(weights) for _, weights in asked if weights]
    wanted = "MobileNet_V2_Weights.IMAGENET1K_V1"
    assert started == [wanted] * 2  # teacher and student, not the shapes' probe
    assert run("sp", f"{QUICK} --epochs 1 --pretrained") == 2
    assert "resnet8: no weights to download; --no-pretrained" in capsys.readouterr().err


# --- pictures ------------------------------------------------------------------------------------


def test_sp_draws_the_similarities(quick, monkeypatch):
    import matplotlib.axes

    drawn, imshow = [], matplotlib.axes.Axes.imshow

    def spy(axis, matrix, **options):
        drawn.append((axis, torch.as_tensor(matrix)))
        return imshow(axis, matrix, **options)

    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "imshow", spy)
        assert run("sp", quick, "--plot") == 0
    # teacher, plain student, student; the images sorted by class
    data = common.load_data(sp.parse_args(shlex.split(QUICK)), torch.device("cpu"))
    images, labels = data.test_batch(per_class=20, classes=10)
    assert labels.tolist() == sorted(labels.tolist()) and len(labels.unique()) == 10
    for (axis, matrix), path in zip(drawn, ("teacher.pth", "o/ce/student.pt", "o/student.pt")):
        net = common.build_model("resnet8", 24)
        common.load_weights(net, path)
        with torch.no_grad():
            last = net.eval()(images, return_features=True)[1].maps[-1]
        assert torch.allclose(matrix, sp._similarities(last.flatten(1)), atol=1e-4)
        assert len(axis.get_xticks()) == 10 and "\n" in axis.get_title()
    assert len(drawn) == 3
    assert Path("o/similarities.png").read_bytes().startswith(b"\x89PNG")
    assert result("o/ce")["method"] == "CE"  # the plain student of the picture
    before = weights("o/student.pt")
    Path("o/similarities.png").unlink()
    assert run("sp", quick, "--plot", "--resume") == 0  # drawn again, not trained again
    assert Path("o/similarities.png").exists() and same(weights("o/student.pt"), before)


def test_dcd_draws_the_correlation_gap_and_the_embeddings(quick, capsys):
    assert run("dcd", quick, "--plot", "--compare") == 0
    for out in ("o", "o/ce", "o/kd"):
        assert Path(out, "correlation_gap.png").read_bytes().startswith(b"\x89PNG")
        assert Path(out, "embeddings.png").read_bytes().startswith(b"\x89PNG")
        assert 0 < result(out)["correlation_gap"] < 3
    assert "correlation gap to the teacher: mean" in capsys.readouterr().out
    # the gap against a loop over images
    data = common.load_data(dcd.parse_args(shlex.split(QUICK)), torch.device("cpu"))
    relations = []
    for path in ("o/student.pt", "teacher.pth"):
        net = common.build_model("resnet8", 24)
        common.load_weights(net, path)
        rows = {k: [] for k in range(24)}
        for images, labels in data.batches("test", 1):
            with torch.no_grad():
                z = net.eval()(images)[0].double().numpy()
            rows[labels.item()].append((z - z.mean()) / z.std())
        relations.append(np.array([np.mean(rows[k], axis=0) for k in range(24)]))
    gap = np.abs(relations[0] - relations[1])
    np.fill_diagonal(gap, 0)
    assert result("o")["correlation_gap"] == pytest.approx(gap.mean(), abs=2e-4)


def test_the_pictures_of_dcd(cwd, monkeypatch):
    """Class names that matplotlib would read as formulas; a class without test images."""
    import matplotlib.axes

    rng = np.random.default_rng(0)
    for name, count in (("price_$5_$6", 6), ("_hidden", 1), ("plain", 6)):
        for split in ("train", "val"):
            folder = Path("tree") / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    teacher_file("teacher.pth", classes=3)
    monkeypatch.setattr(common, "near_chance", lambda *_: False)
    points, scatter = [], matplotlib.axes.Axes.scatter

    def spy(axis, x, y, **options):
        points.append((axis.get_title(), x, y))
        return scatter(axis, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "scatter", spy)
    command = "--dataset folder --data-dir tree --image-size 16 --teacher resnet8 --student resnet8"
    command += " --teacher-ckpt teacher.pth --epochs 1 --batch-size 4 --plot --out"
    assert run("dcd", command, "a") == 0
    # the plane of the largest variance: here against the eigenvalues of the covariance
    data = common.load_data(dcd.parse_args(shlex.split(f"{command} x")), torch.device("cpu"))
    images, _ = data.test_batch(per_class=100, classes=10)
    net = common.build_model("resnet8", 3)
    common.load_weights(net, "teacher.pth")
    with torch.no_grad():
        embedding = net.eval()(images, return_features=True)[1].embedding.numpy()
    largest = np.linalg.eigvalsh(np.cov(embedding.T, bias=True))[::-1][:2]
    x, y = (np.concatenate([p[k] for p in points[:3]]) for k in (1, 2))
    assert [x.var(), y.var()] == pytest.approx(largest.tolist(), rel=1e-3)
    assert run("dcd", command, "b", "--val-size", "3") == 0  # of the class of one image: none
    assert 0 < result("b")["correlation_gap"] < 3


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_plot_without_matplotlib_says_what_to_install(quick, script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run(script, quick, "--plot") == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not Path("o").exists()


# --- transfer ------------------------------------------------------------------------------------

TRANSFER = "--dataset cifar100 --transfer shapes --train-size 48 --batch-size 24 --epochs 2 --out o"


@pytest.mark.parametrize(
    "student, teacher, classifier, bn",
    [
        ("resnet8", "wrn_16_1", "fc", "eval"),
        ("resnet8", "wrn_16_1", "fc", "batch"),
        ("vgg8", "MobileNetV2", "classifier", "eval"),
        ("ShuffleV2", "resnet8", "linear", "eval"),
        ("mobilenet_v2", "resnet8", "classifier.1", "batch"),
    ],
)
def test_transfer_trains_the_classifiers_alone(cwd, student, teacher, classifier, bn):
    teacher_file("student.pt", student, 100)
    teacher_file("teacher.pth", teacher, 7)
    command = f"{TRANSFER} --student {student} --student-ckpt student.pt --transfer-bn {bn}"
    command += f" --teacher {teacher} --teacher-ckpt teacher.pth"
    assert run("dcd", command) == 0
    r = result("o")
    assert r["dataset"] == "shapes" and r["method"] == "probe of student" + " (batch)" * (
        bn == "batch"
    )
    assert r["teacher_top1"] == lines("o")[-1]["teacher_test_top1"]
    assert r["student_top1"] == lines("o")[-1]["test_top1"]
    groups = common.read_checkpoint("o/last.pt")["state"]["optimizer"]["param_groups"]
    rates = r["args"]["lr"], r["args"]["teacher_lr"]  # of MobileNets another
    assert [g["lr"] for g in groups] == [rate / 1000 for rate in rates]
    before, after = weights("student.pt"), weights("o/student.pt")
    assert before.keys() == after.keys() and after[f"{classifier}.weight"].shape[0] == 24
    for key, value in before.items():
        if key.startswith(classifier):
            assert after[key].shape != value.shape
        elif "running" in key or "num_batches" in key:
            assert torch.equal(after[key], value) == (bn == "eval"), key
        else:
            assert torch.equal(after[key], value), key
    if bn == "eval":  # and it is a usual checkpoint, for the new data
        assert run("dcd", f"--dataset shapes --student {student} --eval o/student.pt") == 0


def test_transfer_equals_a_probe_written_by_hand(cwd):
    teacher_file("student.pt", "resnet8", 100)
    assert run("dcd", f"{TRANSFER} --student resnet8 --student-ckpt student.pt --seed 3") == 0
    assert result("o")["teacher_top1"] is None
    data = common.load_data(dcd.parse_args(shlex.split(QUICK)), torch.device("cpu"))
    net = common.build_model("resnet8", 100)
    common.load_weights(net, "student.pt")
    net = net.to(memory_format=torch.channels_last).eval()
    torch.manual_seed(3)
    torch.nn.Linear(64, 24)  # draws that PyTorch makes for its own start
    weight, bias = 0.01 * torch.randn(24, 64), torch.zeros(24)
    weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], 0.05, 0.9, weight_decay=5e-4)
    step = 0
    for epoch in range(2):
        for images, labels in data.batches("train", 24, 3 * 100_003 + epoch, augment=True):
            now = 120 * step // 4
            optimizer.param_groups[0]["lr"] = 0.05 / 10 ** ((now >= 30) + (now >= 60) + (now >= 90))
            with torch.no_grad():
                x = net(images, return_features=True)[1].embedding
            optimizer.zero_grad()
            F.cross_entropy(x @ weight.T + bias, labels).backward()
            optimizer.step()
            step += 1
    assert torch.allclose(weights("o/student.pt")["fc.weight"], weight, atol=1e-5)


def test_a_probe_killed_before_its_first_save_draws_the_same_dropout(cwd, monkeypatch):
    teacher_file("student.pt", "mobilenet_v3_small", 100)
    command = f"{TRANSFER} --student mobilenet_v3_small --student-ckpt student.pt"
    command = f"{command} --teacher-ckpt {teacher_file('t.pth', 'resnet8', 100)} --teacher resnet8"
    command = command.replace("--epochs 2 --out o", "--epochs 1 --transfer-bn batch") + " --out"
    assert run("dcd", command, "whole") == 0

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Meter, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run("dcd", command, "parts")
    assert run("dcd", command, "parts", "--resume") == 0
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))


def test_a_network_without_maps_is_refused(quick, monkeypatch, capsys):
    probe = common.probe

    def without_maps(network, data):
        return probe(network, data)._replace(maps=[])

    monkeypatch.setattr(sp, "probe", without_maps)
    for flags in ("", "--sp-weight 0 --at-weight 1"):
        assert run("sp", quick, *flags.split()) == 2
        assert "resnet8 gives no maps, only an embedding" in capsys.readouterr().err
    assert run("sp", quick, "--relation", "cc") == 0


def test_transfer_finds_the_teacher_and_resumes(cwd, monkeypatch, capsys):
    Path("checkpoints").mkdir()
    teacher_file("checkpoints/cifar100_resnet8.pt", "resnet8", 100)
    teacher_file("student.pt", "wrn_16_1", 100)
    command = f"{TRANSFER} --teacher resnet8 --student wrn_16_1 --student-ckpt student.pt"
    command = command.replace("--out o", "")
    assert run("dcd", command, "--out", "whole") == 0
    assert result("whole")["teacher_top1"] is not None
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert run("dcd", command, "--out", "parts") == 128 + signal.SIGTERM
    assert run("dcd", command, "--out", "parts", "--resume") == 0
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert run("dcd", command, "--out", "other") == 128 + signal.SIGTERM
    torch.manual_seed(4)
    torch.save(common.build_model("wrn_16_1", 100).state_dict(), "student.pt")
    capsys.readouterr()
    assert run("dcd", command, "--out", "other", "--resume") == 2
    assert "student or teacher is not the one" in capsys.readouterr().err
    assert run("dcd", command, "--seeds", "0", "1") == 0
    place = Path("runs/dcd-transfer-shapes-of-student")
    assert {p.name for p in place.iterdir()} == {"s0", "s1"}
    text = capsys.readouterr().out
    assert re.search(r"\| probe of student \| 2 \|", text)  # one row, also where teachers differ
    # the classifier of the student starts and ends the same with and without a teacher beside it
    Path("checkpoints").rename("elsewhere")
    assert run("dcd", command, "--out", "alone") == 0
    assert same(weights(place / "s0/student.pt"), weights("alone/student.pt"))
    # a run's student is called by its method and its folder
    Path("a-run").mkdir()
    Path("student.pt").rename("a-run/student.pt")
    Path("a-run/result.json").write_text('{"method": "DCD+KD"}')
    assert run("dcd", command.replace("student.pt", "a-run/student.pt")) == 0
    assert result("runs/dcd-transfer-shapes-of-a-run-s0")["method"] == "probe of DCD+KD"
    # its result.json names the networks too, but what is asked for counts
    known = '{"method": "KD", "student": "wrn_16_1", "teacher": "resnet8"}'
    Path("a-run/result.json").write_text(known)
    probe = "--transfer stl10 --student-ckpt a-run/student.pt --teacher-ckpt t.pth"
    args = dcd.parse_args(probe.split())
    assert (args.student, args.teacher, args.method) == ("wrn_16_1", "resnet8", "probe of KD")
    args = dcd.parse_args(f"{probe} --student resnet20 --teacher MobileNetV2".split())
    assert (args.student, args.teacher) == ("resnet20", "MobileNetV2")
    # the paper's schedule, whatever the networks were trained on; a rate for each of the two
    wanted = dict(epochs=120, lr=0.05, teacher_lr=0.01, batch_size=64, weight_decay=5e-4)
    assert {k: getattr(args, k) for k in wanted} == wanted and args.image_size == 32
    args = dcd.parse_args(f"{probe} --dataset imagenet".split())
    assert (args.lr, args.epochs, args.batch_size, args.image_size) == (0.05, 120, 64, 224)
    args = dcd.parse_args("--transfer imagenet --student-ckpt a-run/student.pt".split())
    assert args.image_size == 32
    args = dcd.parse_args("--dataset imagenet --transfer stl10 --student-ckpt r.pt".split())
    assert (args.student, args.lr) == ("resnet18", 0.05)
    more = ', "dataset": "shapes", "args": {"image_size": 48}}'
    Path("a-run/result.json").write_text(known.replace("}", more))
    Path("checkpoints").mkdir()
    teacher_file("checkpoints/shapes_resnet8.pt", "resnet8", 100)
    args = dcd.parse_args("--transfer stl10 --student-ckpt a-run/student.pt".split())
    assert (args.teacher_ckpt, args.source) == ("checkpoints/shapes_resnet8.pt", "shapes")
    assert args.image_size == 48
    # below a run's folder: those of its seeds and baselines
    for folder in ("a-run/s1", "a-run/s1/ce"):
        args = dcd.parse_args(f"--transfer shapes --student-ckpt {folder}/student.pt".split())
        assert args.out == f"runs/dcd-transfer-shapes-of-{folder.replace('/', '-')}-s0"


# --- bad input -----------------------------------------------------------------------------------

BAD = {  # script and arguments -> words of the error
    "sp --batch-size 1": "--batch-size 1: a relation needs two",
    "dcd --batch-size 1": "--batch-size 1: a relation and BatchNorm need two",
    "dcd --transfer shapes --student-ckpt chance.pth --batch-size 1": "--batch-size 1",
    "dcd --transfer shapes --student-ckpt chance.pth --terms contrastive": "leave --terms out",
    "dcd --transfer shapes --student-ckpt chance.pth --kd-weight 1": "leave --kd-weight out",
    "dcd --transfer-bn batch": "--transfer-bn: only for --transfer",
    "dcd --dcd-weight 0 --fixed-scale 0.07": "--fixed-scale: has no use with --dcd-weight 0",
    "dcd --embed-dim 1000000000000000000": "--embed-dim.*from 1 to 65536",
    "dcd --student-ckpt chance.pth --plot": "--student-ckpt: only for --transfer",
    "dcd --transfer shapes --student-ckpt nan.pth": "nan.pth: some of its weights are infinite",
    "sp --sp-weight 0 --relation cc": "--relation: has no use with --sp-weight 0",
    "sp --sp-weight 0 --sp-maps all": "--sp-maps: has no use",
    "sp --kd-weight 1 --temperature 1e200": "--temperature.*to 1e12",
    "sp --lr 1e300": "--lr.*to 1e12",
    "sp --sp-maps all --student vgg8": "--sp-maps all.*resnet8 has 3",
    "sp --at-weight 1 --student vgg8": "--at-weight.*vgg8 has 4",
    "sp --sp-weight -1": "--sp-weight",
    "sp --relation at": "--relation",
    "sp --sp-weight-batch 0": "--sp-weight-batch",
    "sp --sp-weight-batch 64 --relation cc": "--sp-weight-batch",
    "sp --sp-maps all --relation cc": "--sp-maps: cc compares embeddings",
    "dcd --alpha 1 --terms contrastive": "--alpha: --terms contrastive has no second term",
    "dcd --transfer shapes --student-ckpt chance.pth --pretrained-teacher": "--pretrained-teacher",
    "sp --relation intra --teacher resnet18": "--relation intra.*only one",
    "sp --at-weight 1 --student resnet18 --teacher resnet34": "--at-weight.*only one",
    "sp --recipe fast": "--recipe",
    "sp --plot --sp-weight 0": "--plot",
    "sp --ce-weight 0": "--ce-weight 0",
    "dcd --ce-weight 0": "--ce-weight 0",
    "dcd --dcd-weight nan": "--dcd-weight",
    "dcd --fixed-scale 0": "--fixed-scale",
    "dcd --embed-dim 0": "--embed-dim",
    "dcd --terms all": "--terms",
    "dcd --transfer stl11": "--transfer.*stl10",
    "dcd --transfer shapes": "--student-ckpt",
    "dcd --transfer shapes --student-ckpt absent.pt": "absent.pt: no such file",
    "dcd --transfer shapes --student-ckpt torn.pth": "torn.pth",
    "dcd --transfer shapes --student-ckpt code.pth": "code.pth",
    "dcd --transfer shapes --student-ckpt other.pth": "other.pth.*architecture",
    "dcd --transfer shapes --student-ckpt chance.pth --compare": "--compare",
    "dcd --transfer shapes --student-ckpt chance.pth --eval chance.pth": "--eval",
    "dcd --student-ckpt chance.pth": "only for --transfer",
    "dcd --teacher-ckpt chance.pth": "near chance",
    "sp --resume": "nothing to resume",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_ends_in_one_line_and_status_2(cwd, arguments, capsys):
    make_bad_files()
    before = set(cwd.rglob("*"))
    script, *more = shlex.split(arguments)
    assert run(script, f"{QUICK} --epochs 1", *more) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0]
    assert re.search(BAD[arguments], errors[0]), errors[0]
    assert "Traceback" not in captured.err + captured.out
    assert not Path("exploded").exists() and before <= set(cwd.rglob("*"))


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_a_last_batch_of_one_is_dropped_and_that_is_said(quick, script, capsys):
    assert run(script, quick.replace("--train-size 48", "--train-size 49")) == 0
    assert "49 images in batches of 24 leave one over: it is left out" in capsys.readouterr().out
    assert run(script, quick) == 0
    assert "leave one over" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_a_batch_larger_than_the_data_is_one_batch_and_that_is_said(quick, script, capsys):
    assert run(script, quick.replace("--batch-size 24", "--batch-size 64")) == 0
    assert "there are 48 images, one batch an epoch" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sp", "dcd"])
def test_constant_features_train_on(quick, script):
    """A teacher that sees nothing: all its maps and embeddings are zero."""
    net = common.build_model("resnet8", 24)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("layer3"):
                parameter.zero_()
    torch.save(net.state_dict(), "teacher.pth")
    assert run(script, quick, "--kd-weight", "1") == 0
    assert all(math.isfinite(v) for v in lines("o")[0].values())
    json.dumps(result("o"), allow_nan=False)
