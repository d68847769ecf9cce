"""The four classification scripts as people use them: whole runs, their files, stops, bad input."""

import argparse
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUICK, WIDE, error_line, lines, module, result, run, same, stopped, weights

import common
import nd

SCRIPTS = ("nd", "sp", "dcd", "kd2m")
# What switches a script's own terms off, which is plain training.
PLAIN = {"nd": "--kd-weight 0 --nd-weight 0", "sp": "--sp-weight 0", "dcd": "--dcd-weight 0"}
PLAIN["kd2m"] = "--metric-weight 0"
# Something random in the step, and something trained beside the student where the method has that.
COMMANDS = {
    "nd": WIDE,  # a projector with dropout
    "sp": f"{QUICK} --relation cc",
    "dcd": WIDE,  # two heads
    "kd2m": f"{WIDE} --metric sliced_w2 --projector linear",  # random lines
}
every_script = pytest.mark.parametrize("script", SCRIPTS)
pytestmark = pytest.mark.usefixtures("few_shapes")


def parse(script, command):
    return module(script).parse_args(shlex.split(command))


def with_teacher(script):
    """The command above, with the file of a teacher."""
    name = COMMANDS[script].split("--teacher ")[1].split()[0]
    return f"{COMMANDS[script]} --teacher-ckpt {helpers.teacher_file(name=name)}"


# --- a run and its files -------------------------------------------------------------------------

OWN = {  # method, the terms of an epoch's line
    "nd": ("KD++", {"kd", "nd"}), "dcd": ("DCD", {"dcd", "scale", "tau"}),
    "sp": ("CC", {"cc"}), "kd2m": ("sliced_w2", {"sliced_w2", "ratio"}),
}  # fmt: skip


@every_script
def test_one_command_trains_the_teacher_and_writes_the_run(cwd, script, capsys):
    command, (method, terms) = f"{COMMANDS[script]} --epochs 2", OWN[script]
    returned = module(script).main(shlex.split(command))
    text, args = capsys.readouterr().out, parse(script, command)
    out = cwd / f"runs/{script}-{args.teacher}-{args.student}-shapes-s0"
    names = {"metrics.jsonl", "result.json", "student.pt", "last.pt"}
    names |= {"class_means.pt"} if script == "nd" else set()
    assert {path.name for path in out.iterdir()} - {".lock"} == names
    r = result(out)
    assert r == json.loads(json.dumps(returned))  # what main returns is what it wrote
    keys = {"epoch", "ce", *terms, "train_top1", "test_top1", "lr", *helpers.TIMES[:2]}
    for number, line in enumerate(lines(out), 1):
        assert line["epoch"] == number and line.keys() == keys and line["ce"] > 0
        assert np.isfinite(list(line.values())).all()
    assert number == 2 and r["student_top1"] == line["test_top1"]
    assert (r["method"], r["script"], r["seed"], r["epochs"]) == (method, f"{script}.py", 0, 2)
    assert (r["train_images"], r["test_images"], r["world_size"]) == (48, 24, 1)
    assert r["args"]["batch_size"] == 24 and r["args"]["temperature"] == 4
    kept = {"argv", "versions", "device", "commit", "teacher_hash", "data_hash"}
    assert kept | {*helpers.TIMES} < r.keys()
    student = common.build_model(args.student, 24)
    student.load_state_dict(weights(out / "student.pt"))  # the student alone, strictly
    saved = torch.load(f"checkpoints/shapes_{args.teacher}.pt", weights_only=True)
    assert saved["recipe"]["epochs"] == 2 and saved["recipe"]["images"] == 48
    assert saved["score"] == r["teacher_top1"]
    assert re.search(rf"teacher {args.teacher} .*test {r['teacher_top1']:.2f} %", text)
    assert re.search(rf"^\| {re.escape(method)} \| 1 \| {r['student_top1']:.2f} \|", text, re.M)

    # Again: the teacher is reused, the result is the same, and the first run is moved aside.
    before = (out / "student.pt").read_bytes()
    assert run(script, command) == 0
    captured = capsys.readouterr()
    assert "training it" not in captured.out and "old1" in captured.err
    assert helpers.timeless(out) == helpers.timeless(out / "old1")
    assert same(weights(out / "student.pt"), weights(out / "old1/student.pt"))
    assert (out / "old1/student.pt").read_bytes() == before
    for name in ("student.pt", "last.pt"):
        assert run(script, command, "--eval", str(out / name)) == 0
        assert f"test {r['student_top1']:.2f} %" in capsys.readouterr().out


@every_script
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_of_zero_are_plain_training_bit_for_bit(quick, script, name):
    """Against training written here from scratch, without a line of the script."""
    lr, nesterov = (0.1, True) if script == "nd" else (0.05, False)
    command = f"--epochs 3 --seed 5 {PLAIN[script]}" + " --optimizer adamw" * (name == "adamw")
    assert run(script, quick, *command.split()) == 0
    assert result("o")["method"] == "CE"
    assert not lines("o")[0].keys() & {"kd", "nd", "sp", "dcd", "w2_empirical"}
    data, step = helpers.shapes(train_size=48), 0
    torch.manual_seed(5)
    net = common.build_model("resnet8", 24).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=nesterov)
    if name == "adamw":
        optimizer = torch.optim.AdamW(net.parameters(), 5e-4, weight_decay=0.05)
    for epoch in range(3):
        net.train()
        for images, labels in data.batches("train", 24, 5 * 100_003 + epoch, augment=True):
            drops = sum(8 * step >= 6 * k for k in (5, 6, 7))  # after 5/8, 6/8, 7/8 of 6 steps
            now = lr * 0.1**drops if script == "sp" else lr / 10**drops
            if name == "adamw":  # of 7 parts, since both ends would be 0; 5 % of 6 steps are none
                now = 5e-4 * (0.5 + 0.5 * math.cos(math.pi * (step + 1) / 7))
            optimizer.param_groups[0]["lr"] = now
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step += 1
    assert same(weights("o/student.pt"), net.state_dict())


def test_adamw_warms_up_in_a_twentieth_of_the_run():
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    for step, lr in {0: 0.2 * 1.99951, 2: 0.6 * 1.99556, 4: 1.98769, 49: 1.0, 98: 0.000493}.items():
        run = types.SimpleNamespace(step=step, total_steps=99, args=argparse.Namespace(lr=2.0))
        common.set_lr(optimizer, 0.1, run)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-3)


BASELINES = {  # command -> the arguments of every run that it makes, the method's last
    "sp --kd-weight 2 --at-weight 7": {
        "ce": dict(ce_weight=1, kd_weight=0, sp_weight=0, at_weight=0),
        "kd": dict(ce_weight=0.5, kd_weight=2, sp_weight=0, at_weight=0),
        "": dict(ce_weight=0.5, kd_weight=2, sp_weight=3000, at_weight=7)},
    "dcd": {
        "ce": dict(ce_weight=1, kd_weight=0, dcd_weight=0),
        "kd": dict(ce_weight=1, kd_weight=1, dcd_weight=0),
        "": dict(ce_weight=0.5, kd_weight=0, dcd_weight=1)},
    "kd2m --kd-weight 2 --metric-weight 0.1": {
        "ce": dict(ce_weight=1, kd_weight=0, metric_weight=0),
        "kd": dict(ce_weight=0.5, kd_weight=2, metric_weight=0),
        "mse": dict(ce_weight=0.5, kd_weight=2, metric_weight=0.1, metric="mse"),
        "": dict(ce_weight=0.5, kd_weight=2, metric_weight=0.1, metric="w2_empirical")},
    "nd --base dkd --dkd-beta 3": {  # DKD alone has published weights of its own
        "ce": dict(ce_weight=1, kd_weight=0, nd_weight=0),
        "kd": dict(ce_weight=1, kd_weight=1, nd_weight=0, base="kd"),
        "dkd": dict(kd_weight=1, nd_weight=0, base="dkd", dkd_alpha=1, dkd_beta=3),
        "": dict(ce_weight=0.5, nd_weight=3.5, dkd_alpha=2.5, dkd_beta=3)},
}  # fmt: skip


@pytest.mark.parametrize("command", BASELINES)
def test_compare_trains_the_baselines_that_stand_beside_the_method(quick, command, capsys):
    script, *flags = command.split()
    assert run(script, f"{quick} --ce-weight 0.5 --compare", *flags) == 0
    text = capsys.readouterr().out
    for name, args in BASELINES[command].items():
        r = result(f"o/{name}")
        assert {key: r["args"][key] for key in args} == args, name
        assert f"| {r['method']} | 1 |" in text
    assert len(list(Path("o").rglob("result.json"))) == len(BASELINES[command])


def test_the_result_is_the_last_epoch(quick, monkeypatch):
    scores = iter((90.0, 50.0, 70.0, 60.0))
    monkeypatch.setattr(common, "evaluate", lambda *_: next(scores))
    assert run("sp", quick, "--epochs", "3") == 0
    assert result("o")["student_top1"] == 60.0 and result("o")["teacher_top1"] == 90.0


def test_importing_does_nothing_and_the_shell_gets_the_exit_status(cwd):
    code = f"""import os, runpy, sys
sys.path.insert(0, {str(helpers.ROOT)!r})
import nd, sp, dcd, kd2m, detect_nd
print(os.listdir(), flush=True)
sys.argv = [{str(helpers.ROOT / "sp.py")!r}, "--teacher", "resnet55"]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert re.fullmatch(r"error: .*--teacher.*resnet56.*", done.stderr.splitlines()[-1])


def test_a_teacher_serves_every_script_but_not_other_settings(cwd, capsys):
    assert run("nd", f"{QUICK} --epochs 1 {PLAIN['nd']}") == 0
    assert "warning:" in capsys.readouterr().err  # near chance, but it was trained as asked
    path = Path("checkpoints/shapes_resnet8.pt")
    content = path.read_bytes()
    for script in SCRIPTS:
        assert run(script, f"{QUICK} --epochs 1 --seed 3") == 0  # the student's seed
        text = capsys.readouterr().out
        assert "training it" not in text
        assert (f"{path} was trained with" in text) == (script != "nd")  # other optimizers
        for change in ("--teacher-epochs 2", "--train-size 72", "--precision bf16"):
            assert run(script, f"{QUICK} --epochs 1 {change}") == 2
            assert re.search(f"{path} was .*settings.*--teacher-ckpt", error_line(capsys))
    for change, words in (("--teacher-lr 0.02", "lr 0.1"), ("--momentum 0.5", "momentum 0.9")):
        assert run("nd", f"{QUICK} --epochs 1 {change}") == 2
        assert words in error_line(capsys)
    assert path.read_bytes() == content
    torch.save(weights(path), path)  # somebody's own file
    assert run("nd", f"{QUICK} --epochs 1") == 2
    assert f"{path} was trained with different settings" in error_line(capsys)


def test_a_stop_while_the_teacher_trains(cwd):
    command = f"{QUICK} --epochs 3 --out"
    assert stopped("sp", command, "parts", step=5) == 143
    assert not list(cwd.glob("checkpoints/*.pt"))
    assert run("sp", command, "parts") == 0  # goes on with the teacher, then starts the student
    Path("checkpoints").rename("first")
    Path("runs").rename("elsewhere")
    assert run("sp", command, "whole") == 0
    assert same(weights("first/shapes_resnet8.pt"), weights("checkpoints/shapes_resnet8.pt"))
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))


# --- what a step computes ------------------------------------------------------------------------


class Watch:
    """Records every training step of the runs that follow: modules, loss, terms, learning rate."""

    def __init__(self, monkeypatch):
        self.steps, self.check = [], lambda: None
        start, log, backward = common.Run.start, common.Meter.add, torch.Tensor.backward

        def spy_start(run, **objects):
            self.objects = objects
            beside = (objects.get(name) for name in ("student", "auxiliary", "projector"))
            self.modules = [m for m in beside if m is not None]
            start(run, **objects)
            self.before = [{k: v.clone() for k, v in m.state_dict().items()} for m in self.modules]

        def spy_backward(loss, *args, **options):
            self.loss = loss.item()
            backward(loss, *args, **options)

        def spy_log(meter, terms, samples, logits=None):
            lr = self.objects["optimizer"].param_groups[0]["lr"]
            step = dict(loss=self.loss, lr=lr, batch=len(samples), step=meter.run.step)
            step["terms"] = {k: float(torch.as_tensor(v).detach()) for k, v in terms.items()}
            self.steps.append(types.SimpleNamespace(**step))
            self.check()
            log(meter, terms, samples, logits)

        monkeypatch.setattr(common.Run, "start", spy_start)
        monkeypatch.setattr(common.Meter, "add", spy_log)
        monkeypatch.setattr(torch.Tensor, "backward", spy_backward)


@every_script
def test_modes_of_batchnorm_and_who_learns(cwd, monkeypatch, any_teacher_passes, script):
    """The student and what is trained beside it learn, in train mode; the teacher does not."""
    command, watch = with_teacher(script), Watch(monkeypatch)

    def check():
        teacher = watch.objects["teacher"]
        assert not any(m.training for m in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert all(m.training for net in watch.modules for m in net.modules())

    watch.check = check
    assert run(script, f"{command} --epochs 2 --out o") == 0 and len(watch.steps) == 4
    teacher = common.build_model(watch.objects["teacher"].name, 24)
    teacher.load_state_dict(weights("teacher.pth"))
    for net in (teacher, watch.objects["teacher"]):
        assert common.state_hash(net) == result("o")["teacher_hash"]

    # Every parameter is in the optimizer once and was moved by its gradient.
    optimizer = watch.objects["optimizer"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    own = [p for net in watch.modules for p in net.parameters()]
    assert sorted(map(id, trained)) == sorted(map(id, own))
    assert all(optimizer.state[p]["momentum_buffer"].abs().max() > 0 for p in own)
    assert all(group["weight_decay"] == 5e-4 for group in optimizer.param_groups)
    for before, net in zip(watch.before, watch.modules):
        still = [key for key, value in net.state_dict().items() if torch.equal(before[key], value)]
        assert not still
    counts = [v for k, v in weights("o/student.pt").items() if k.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {4}  # one forward pass a step, in train mode

    # What was trained beside the student is in last.pt, not in student.pt.
    assert weights("o/student.pt").keys() == watch.objects["student"].state_dict().keys()
    saved = torch.load("o/last.pt", weights_only=True)["state"]
    beside = {"auxiliary", "projector"} & watch.objects.keys()
    assert len(beside) == (script != "sp")
    assert all(saved[k] and same(saved[k], watch.objects[k].state_dict()) for k in beside)


ALL_OF_ND = "--ce-weight 0.5 --kd-weight 2 --nd-weight 3 --direction-weight 5 --norm-weight 7"
TERMS = {  # command -> the weight of each term
    **{
        f"nd --base {base} {more} {ALL_OF_ND} --temperature 3": {
            "ce": 0.5, base: 2, "nd": 3, "direction": 5, "norm": 7}
        for base, more in (("kd", ""), ("dkd", "--dkd-alpha 1.5 --dkd-beta 6"), ("dist", ""),
                           ("reviewkd", ""))
    },
    "sp --ce-weight 0.5 --sp-weight 100 --kd-weight 2 --at-weight 30 --temperature 3": {
        "ce": 0.5, "sp": 100, "kd": 2, "at": 30},
    "sp --relation cc --sp-weight 50": {"ce": 1, "cc": 50},
    "sp --relation intra --sp-weight 50 --sp-maps all": {"ce": 1, "intra": 50},
    "dcd --ce-weight 0.5 --dcd-weight 3 --kd-weight 2 --temperature 3": {
        "ce": 0.5, "dcd": 3, "kd": 2},
    "kd2m --ce-weight 0.5 --metric-weight 0.3 --kd-weight 2 --temperature 3": {
        "ce": 0.5, "w2_empirical": 0.3, "kd": 2},
}  # fmt: skip


@pytest.mark.parametrize("command", TERMS)
def test_the_loss_is_the_weighted_sum_of_its_terms(quick, monkeypatch, command):
    """At every step, the last and smaller batch too; and options reach the losses they are for."""
    script, *flags = command.split()
    saved = torch.load("teacher.pth", weights_only=True)
    saved["model"]["layer3.0.bn2.weight"] *= 20  # longer embeddings than the student's
    torch.save(saved, "teacher.pth")
    watch, given, options = Watch(monkeypatch), [], {"kd": [3.0], "dist": [3.0]}
    options["dkd"] = [1.5, 6.0, 3.0]
    named = options.keys() & TERMS[command].keys()

    def spied(loss):
        def spy(student, teacher, *more, **named):
            assert student.requires_grad and not teacher.requires_grad
            given.append([v for v in (*more, *named.values()) if not torch.is_tensor(v)])
            return loss(student, teacher, *more, **named)

        return spy

    for name in named:
        loss = getattr(module(script), f"{name}_loss")
        monkeypatch.setattr(module(script), f"{name}_loss", spied(loss))
    assert run(script, quick, "--train-size", "40", "--epochs", "2", *flags) == 0
    assert [step.batch for step in watch.steps] == [24, 16] * 2
    for step in watch.steps:  # the base loss of nd.py has no weight in the first: warm-up
        factors = dict(TERMS[command])
        factors |= {name: 0 for name in nd.BASES} if script == "nd" and step.step == 0 else {}
        total = sum(weight * step.terms.get(name, 0) for name, weight in factors.items())
        assert step.loss == pytest.approx(total, rel=1e-5)
        assert all(step.terms[name] > 0 for name in TERMS[command])
    assert given == [options[name] for name in named] * 4


@pytest.mark.parametrize(
    "command, lr, factor, milestones, length, warm_up",
    [
        ("nd", 0.1, 0.1, (150, 180, 210), 240, 20),
        ("sp", 0.05, 0.1, (150, 180, 210), 240, 0),
        ("sp --recipe paper --dataset shapes", 0.1, 0.2, (60, 120, 160), 200, 0),
        ("dcd --kd-weight 1", 0.05, 0.1, (150, 180, 210), 240, 0),
        ("kd2m", 0.05, 0.1, (150, 180, 210), 240, 0),
        ("nd --dataset imagenet", 0.2, 0.1, (30, 60, 90), 100, 5),
        ("sp --dataset imagenet", 0.1, 0.1, (30, 60, 90), 100, 0),
        ("dcd --dataset imagenet", 0.1, 0.1, (30, 60, 90), 120, 0),
        ("kd2m --dataset imagenet", 0.1, 0.1, (30, 60, 90), 100, 0),
    ],
)
def test_schedule(cwd, monkeypatch, command, lr, factor, milestones, length, warm_up):
    """Of one epoch with as many steps as the recipe has epochs: step k stands for epoch k."""
    script, *flags = command.split()
    data, images, labels = helpers.shapes(), torch.randn(4, 3, 8, 8), torch.arange(4)
    data.num_classes, data.steps = 4, lambda _: length
    data.batches = lambda *_, **__: iter([(images, labels)])
    data.train_batches = lambda *_: iter([(images, labels)] * length)
    monkeypatch.setattr(common, "load_data", lambda _: data)
    monkeypatch.setattr(common, "build_for", lambda *_: helpers.Tiny(4))
    monkeypatch.setattr(common, "load_teacher", lambda net, *_: net.eval().requires_grad_(False))
    monkeypatch.setattr(common, "evaluate", lambda *_: 0.0)
    watch, pair = Watch(monkeypatch), "--teacher resnet8 --student resnet8 --epochs 1 --out o"
    assert run(script, f"--dataset shapes {pair}", *flags) == 0
    assert [step.step for step in watch.steps] == list(range(length))
    for epoch, step in enumerate(watch.steps):
        drops = sum(epoch >= milestone for milestone in milestones)
        assert step.lr == pytest.approx(lr * factor**drops), epoch
        if script == "nd":
            base, args = step.terms["kd"] * min(1, epoch / warm_up), result("o")["args"]
            total = step.terms["ce"] + args["kd_weight"] * base
            total += args["nd_weight"] * step.terms["nd"]
            assert step.loss == pytest.approx(total, rel=1e-4, abs=1e-5), epoch


CIFAR = dict(teacher="resnet56", student="resnet20", epochs=240, weight_decay=5e-4, momentum=0.9)
IMAGENET = dict(teacher="resnet34", student="resnet18", weight_decay=1e-4)
RECIPES = {  # arguments -> what they stand for
    "nd": CIFAR | dict(batch_size=128, lr=0.1, nesterov=True, dataset="cifar100", teacher_lr=0.1),
    "nd --student ShuffleV1": dict(lr=0.02, teacher_lr=0.1),
    "nd --dataset imagenet": IMAGENET | dict(epochs=100, batch_size=512, lr=0.2, temperature=1.0),
    "sp": CIFAR | dict(batch_size=64, lr=0.05, nesterov=False, sp_weight=3000.0, kd_weight=0.0),
    "sp --recipe paper": dict(dataset="cifar10", teacher="wrn_40_1", student="wrn_16_1", lr=0.1,
                              epochs=200, batch_size=128, nesterov=True, weight_decay=5e-4),
    "sp --dataset imagenet --epochs 3": IMAGENET | dict(epochs=3, batch_size=256, lr=0.1),
    "dcd": CIFAR | dict(batch_size=64, lr=0.05, dcd_weight=1.0, kd_weight=0.0, alpha=0.5),
    "dcd --dataset imagenet": IMAGENET | dict(epochs=120, batch_size=256, lr=0.1),
    "kd2m": CIFAR | dict(batch_size=64, lr=0.05, metric="w2_empirical", class_reduction="mean"),
    "kd2m --recipe paper --dataset svhn": dict(
        teacher="resnet34", student="resnet18", epochs=15, batch_size=128, lr=0.01, momentum=0.9,
        weight_decay=0.0, pretrained=True, metric_weight=1e-4, class_reduction="sum"),
}  # fmt: skip


@pytest.mark.parametrize("command", RECIPES)
def test_recipes(command):
    args, wanted = parse(*f"{command} ".split(" ", 1)), RECIPES[command]
    assert {key: getattr(args, key) for key in wanted} == wanted


# KD++ kd, nd; DKD++ alpha, beta, nd; DIST++ kd, nd; ReviewKD++ kd, nd. CIFAR, then ImageNet.
PAPER = """
resnet56   resnet20    1.0 2.0  2.5 4.0 3.5  2.0 1.0  1.2 1.0
resnet32x4 resnet8x4   3.5 2.0  2.0 8.0 0.5  1.5 4.0  8.0 1.0
wrn_40_2   wrn_40_1    1.0 1.5  1.0 6.0 1.0  2.5 3.0  5.0 4.0
ResNet50   MobileNetV2 3.0 0.5  0.5 8.0 1.0  7.0 1.0  6.0 2.0
resnet32x4 ShuffleV1   2.5 1.5  0.5 8.0 4.0  2.5 3.0  7.0 1.0
resnet32x4 ShuffleV2   4.0 0.5  0.5 6.0 0.5  3.0 4.0  8.0 1.5
resnet34   resnet18    2.5 1.0  0.8 0.5 1.0  2.0 1.0  1.0 3.0
resnet50   resnet18    4.0 1.0  0.6 0.5 2.0  2.0 1.0  3.0 2.0
resnet101  resnet18    3.5 4.0  0.8 0.5 1.0  2.0 1.0  3.0 1.0
resnet152  resnet18    4.0 2.0  1.0 1.0 1.0  2.0 1.0  3.0 1.0
resnet50   MobileNetV1 4.0 1.0  0.8 1.0 1.0  2.0 1.0  8.0 4.0
vit_b_16   resnet18    2.0 1.0  1.4 0.5 2.0  2.0 1.0  1.0 1.0
"""


@pytest.mark.parametrize("number, row", [*enumerate(PAPER.strip().splitlines())])
def test_nds_weights_are_the_papers(number, row):
    dataset = "cifar100" if number < 6 else "imagenet"
    teacher, student, *numbers = row.split()
    kd, nd_kd, alpha, beta, nd_dkd, dist, nd_dist, review, nd_review = map(float, numbers)
    wanted = {"kd": (kd, nd_kd), "dist": (dist, nd_dist), "reviewkd": (review, nd_review)}
    wanted["dkd"] = 1.0, nd_dkd
    for base, weights_of_base in wanted.items():
        pair = f"--dataset {dataset} --teacher {teacher} --student {student}"
        args = parse("nd", f"{pair} --base {base}")
        assert (args.kd_weight, args.nd_weight) == weights_of_base
    assert (args.dkd_alpha, args.dkd_beta) == (alpha, beta)


def test_a_pair_that_is_not_in_the_paper_takes_the_first_row():
    for pair in ("resnet56 --student resnet14", "resnet50 --student resnet18"):  # of ImageNet
        other = parse("nd", f"--teacher {pair}")
        assert (other.kd_weight, other.nd_weight) == (1.0, 2.0)


def test_class_means_belong_to_their_teacher_and_images(quick, monkeypatch):
    """nd.py computes them once for each teacher and each kind of images, and then reads them."""
    compute, made, found = nd.compute_class_means, [], []

    def spy(teacher, batches, classes):
        seen = list(batches)
        made.append(sum(len(labels) for _, labels in seen))
        return compute(teacher, seen, classes)

    monkeypatch.setattr(nd, "compute_class_means", spy)
    state = {key: value * 1.1 for key, value in weights("teacher.pth").items()}
    torch.save(state, "other.pth")
    for more in ("", "", "--class-means augmented", "--teacher-ckpt other.pth"):
        assert run("nd", f"{quick} --train-size 49 {more}") == 0
        found.append(common.read_checkpoint("o/class_means.pt")["value"])
    assert made == [49] * 3  # every image, also the one that training leaves over
    assert [torch.equal(found[0], other) for other in found] == [True, True, False, False]


def test_options_reach_the_metric_of_kd2m(quick, monkeypatch):
    """The logged value of a single step is that of the function, at the metric's default weight."""
    kd2m, metrics = module("kd2m"), dict(module("kd2m").METRICS)
    wanted = {
        "cw2_gaussian --covariance full --class-reduction sum": dict(reduction="sum", cov="full"),
        "w2_gaussian --covariance full": dict(cov="full"),
        "kl_gaussian --kl-direction teacher": dict(direction="teacher"),
        "jw2_empirical --beta 0.5": dict(beta=0.5),
        "cw2_empirical --class-reduction freq": dict(reduction="freq"),
        "w2_empirical --normalize-by-dim": {},
        **{name: {} for name in ("mse", "mmd_linear", "mmd_rbf", "sinkhorn", "hellinger")},
    }
    for command, options in wanted.items():
        name, *flags = command.split()
        spy = mock.Mock(side_effect=metrics[name])
        monkeypatch.setitem(kd2m.METRICS, name, spy)
        assert run("kd2m", f"{quick} --batch-size 48 --metric {name}", *flags) == 0
        given = inspect.signature(metrics[name]).bind(*spy.call_args.args).arguments
        assert {key: given[key] for key in options} == options
        trained = {key for key, x in given.items() if getattr(x, "requires_grad", False)}
        assert trained == {key for key in given if key.startswith("student")}
        [line], dim = lines("o"), 64 if "--normalize-by-dim" in flags else 1
        weight = result("o")["args"]["metric_weight"]
        assert weight == kd2m.WEIGHTS[name] * dim
        assert line["ratio"] == pytest.approx(weight * line[name] / line["ce"], rel=2e-3)
        value = metrics[name](**given).item() / dim
        assert line[name] == pytest.approx(value, rel=1e-4), command


# --- stopping and going on -----------------------------------------------------------------------


@every_script
def test_resume_gives_the_same_student_bit_for_bit(cwd, script, any_teacher_passes):
    """Stopped by SIGTERM within and between epochs, and killed without warning."""
    command = f"{with_teacher(script)} --epochs 3" + " --optimizer adamw" * (script == "sp")
    assert run(script, command, "--out", "whole") == 0
    for step, saved, number, flags in (
        (3, (1, 1), signal.SIGTERM, ""),
        (4, (1, 2), signal.SIGTERM, ""),
        (5, (2, 0), signal.SIGKILL, ""),
        (6, (2, 1), signal.SIGKILL, "--save-minutes 1e-9"),
    ):
        out = f"parts{step}"
        more = ["--out", out, *flags.split()]
        status = stopped(script, command, *more, step=step, number=number)
        assert status == (-9 if number == signal.SIGKILL else 143)
        assert not Path(out, "result.json").exists()
        assert helpers.progress(out) == saved
        assert run(script, command, *more, "--resume") == 0
        assert same(weights("whole/student.pt"), weights(f"{out}/student.pt"))
        assert helpers.timeless("whole") == helpers.timeless(out) and len(lines(out)) == 3
        whole, parts = (common.read_checkpoint(f"{d}/last.pt")["state"] for d in ("whole", out))
        assert all(same(whole[k], parts[k]) for k in {"auxiliary", "projector"} & whole.keys())
        assert not list(Path(out).glob("*.tmp"))
    before = Path(out, "student.pt").read_bytes()
    Path(out, "student.pt").unlink()
    Path(out, "result.json").write_text("damaged")
    assert run(script, command, *more, "--resume") == 0  # nothing to train: its files again
    assert Path(out, "student.pt").read_bytes() == before and result(out)["epochs"] == 3
    kept = json.dumps(result(out) | {"commit": "earlier"})
    Path(out, "result.json").write_text(kept)
    assert run(script, command, *more, "--resume") == 0  # what is whole stays as it is
    assert Path(out, "result.json").read_text() == kept


def test_resume_refuses_what_is_another_run(quick, capsys):
    command = f"{quick} --epochs 2"
    assert run("nd", command) == 0
    for change in ("--lr 0.05", "--nd-weight 1", "--seed 1", "--temperature 2", "--precision bf16"):
        assert run("nd", command, "--resume", *change.split()) == 2
        line = error_line(capsys)
        assert line.startswith("error: --resume") and change.split()[0] in line
    # the teacher may lie elsewhere, but has to be the same
    Path("moved.pth").write_bytes(Path("teacher.pth").read_bytes())
    assert run("nd", f"{command} --teacher-ckpt moved.pth --resume") == 0
    torch.save(common.build_model("resnet8", 24).state_dict(), "teacher.pth")
    assert run("nd", f"{command} --resume") == 2
    assert "teacher" in error_line(capsys)
    Path("o/last.pt").write_bytes(Path("o/last.pt").read_bytes()[:5000])
    assert run("nd", f"{command} --resume") == 2
    assert "o/last.pt" in error_line(capsys)


def test_compare_and_seeds_and_their_resumption(quick, capsys):
    """Finished runs are left alone, the stopped one goes on, the others start."""
    command = f"{quick} --epochs 2 --compare --seeds 1 0"
    assert run("sp", command, "--out", "whole") == 0
    text, paths = capsys.readouterr().out, list(Path("whole").rglob("result.json"))
    found = {(r["method"], r["seed"]) for r in map(result, [path.parent for path in paths])}
    assert found == {(m, s) for m in ("CE", "KD", "SP") for s in (0, 1)} and len(paths) == 6
    for method in ("CE", "KD", "SP"):
        assert re.search(rf"^\| {method} \| 2 \| \d+\.\d\d ± \d+\.\d\d \|", text, re.M)
    # each run is the same with and without the others
    for more, out in (("", "s1"), ("--sp-weight 0 --kd-weight 1", "s1/kd"), (PLAIN["sp"], "s1/ce")):
        assert run("sp", f"{quick} --epochs 2 --seed 1 {more} --out alone") == 0
        assert same(weights(f"whole/{out}/student.pt"), weights("alone/student.pt"))
    assert stopped("sp", command, step=4 + 3) == 143  # in the second epoch of the second run
    assert run("sp", command, "--resume") == 0
    students = [path.with_name("student.pt").relative_to("whole") for path in paths]
    assert all(same(weights("whole" / path), weights("o" / path)) for path in students)
    capsys.readouterr()
    assert run("sp", command, "--resume", "--sp-weight", "1.5") == 2  # nothing is set aside
    assert "--sp-weight 3000.0" in error_line(capsys) and not list(Path("o").rglob("old1"))


def test_two_programs_cannot_share_a_folder(quick, capsys):
    Path("o").mkdir()
    code = "import fcntl, sys; f = open('o/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print('locked', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder = subprocess.Popen([sys.executable, "-S", "-c", code], **pipes)
    holder.stdout.readline()
    assert run("nd", quick) == 2
    assert "--out o" in error_line(capsys)
    holder.communicate()
    assert run("nd", quick) == 0


def test_a_run_is_set_aside_only_when_the_next_one_begins(quick, capsys):
    assert run("nd", quick) == 0
    for bad in ("--train-size 5", "--teacher-ckpt absent.pth", "--dataset folder --data-dir none"):
        assert run("nd", f"{quick} --epochs 2 {bad}") == 2
        assert result("o")["epochs"] == 1 and not Path("o/old1").exists()
    Path("o/notes.txt").write_text("mine")
    Path("o/student.pt.17.tmp").write_text("half-written by a killed run")
    assert run("nd", f"{quick} --epochs 2") == 0
    assert result("o/old1")["epochs"] == 1 and result("o")["epochs"] == 2
    assert Path("o/notes.txt").exists() and not Path("o/student.pt.17.tmp").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(quick, monkeypatch, capsys):
    answers = [None] * 4 + [OSError(28, "No space left on device")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mock.Mock(side_effect=answers))
        assert run("sp", f"{quick} --epochs 3") == 2
    assert re.search("o/.*: No space left", error_line(capsys))
    assert helpers.progress("o") >= (1, 0) and not list(Path("o").glob("*.tmp"))
    assert run("sp", f"{quick} --epochs 3 --resume") == 0 and len(lines("o")) == 3


# --- bad input -----------------------------------------------------------------------------------

EVERY = {  # arguments of any script -> words of the error
    "--teacher resnet57": "--teacher.*resnet56",
    "--student mobilenetv2": "--student.*MobileNetV2",
    "--dataset cifar1000": "--dataset.*cifar100",
    "--epochs 0": "--epochs",
    "--batch-size 1": "--batch-size: 1: must be from 2",
    "--lr nan": "--lr",
    "--kd-weight inf": "--kd-weight",
    "--image-size 1000000": "--image-size",
    "--frobnicate": "--frobnicate",
    "--out ''": "--out",
    "--teacher-ckpt absent.pth": "absent.pth: no such file",
    "--teacher-ckpt code.pth": "code.pth.*state dict alone",
    "--teacher-ckpt other.pth": "other.pth.*architecture",
    "--teacher-ckpt chance.pth": "chance.pth.*near chance",
    "--resume": "--resume: nothing to resume",
    "--eval absent.pt": "absent.pt: no such file",
    "--dataset folder --data-dir nowhere": "--data-dir.*nowhere",
}
ONE = {  # script and arguments -> words of the error
    "nd --student vit_b_16": "vit_b_16 does not take 16-pixel images",
    "nd --seed 7 --seeds 0 1": "--seeds: not allowed with argument --seed",
    "nd --ce-weight 0 --kd-weight 0 --nd-weight 0": "--ce-weight 0",
    "nd --base reviewkd --student vgg8": "--base reviewkd.*stages",
    "nd --teacher-ckpt chance.pth --pretrained-teacher": "--pretrained-teacher: not allowed with",
    "nd --pretrained-teacher": "--pretrained-teacher",
    "nd --pretrained": "resnet8: no weights to download",
    "sp --relation at": "--relation",
    "sp --sp-maps all --student vgg8": "--sp-maps all.*stages",
    "sp --at-weight 1 --student vgg8 --compare": "--at-weight.*stages",
    "sp --relation intra --teacher resnet18": "intra.*1x1",
    "sp --ce-weight 0": "--ce-weight 0",
    "nd --plot --nd-weight 0": "--plot",
    "nd --plot --student vgg8": "--plot.*equal dimension",
    "sp --plot --sp-weight 0": "--plot",
    "dcd --ce-weight 0": "--ce-weight 0",
    "dcd --embed-dim 1000000000000000000": "--embed-dim.*65536",
    "dcd --student-ckpt chance.pth": "--transfer",
    "dcd --transfer shapes": "--student-ckpt",
    "dcd --transfer shapes --student-ckpt chance.pth --optimizer adamw": "--transfer: SGD",
    "dcd --transfer shapes --student-ckpt absent.pt": "absent.pt: no such file",
    "dcd --transfer shapes --student-ckpt other.pth": "other.pth.*architecture",
    "kd2m --metric w2_empirica": "--metric.*w2_empirical",
    "kd2m --ce-weight 0": "--ce-weight 0",
    "kd2m --student wrn_16_2": "128 and 64.*--projector linear",
    "kd2m --student wrn_16_2 --metric gromov_w2 --plot": "--plot.*--projector linear",
}
# A script for each line of the first table, in turn.
BAD = {f"{SCRIPTS[k % 4]} {line}": words for k, (line, words) in enumerate(EVERY.items())} | ONE


@pytest.mark.parametrize("line", BAD)
def test_bad_input_ends_in_one_line_and_status_2(cwd, line, capsys):
    torch.manual_seed(1)
    net = common.build_model("resnet8", 24)
    torch.save(net.state_dict(), "chance.pth")
    torch.save({"model": net.state_dict(), "opt": helpers.Bomb()}, "code.pth")
    torch.save(common.build_model("resnet14", 24).state_dict(), "other.pth")
    before = set(cwd.rglob("*"))
    script, *arguments = shlex.split(line)
    assert run(script, f"{QUICK} --epochs 1", *arguments) == 2
    assert re.search(BAD[line], error_line(capsys))
    assert not Path("exploded").exists() and before <= set(cwd.rglob("*"))
    made = {path.name for path in set(cwd.rglob("*")) - before if path.is_file()}
    assert not {"student.pt", "last.pt", "result.json"} & made  # nothing was trained


def test_a_loss_that_is_not_finite_stops_and_is_named(quick, monkeypatch, capsys):
    for script in SCRIPTS:
        kd_loss, factors = module(script).kd_loss, iter((1, 1, 1, float("nan"), 1, 1))
        spoiled = lambda *args, f=kd_loss, factors=factors: f(*args) * next(factors)  # noqa: E731
        monkeypatch.setattr(module(script), "kd_loss", spoiled)
        assert run(script, f"{quick}/{script} --epochs 3 --kd-weight 1") == 2
        assert re.search("loss term kd .*epoch 2", error_line(capsys))
        assert helpers.progress(f"o/{script}") == (1, 0)  # the end of the epoch before
        saved = common.read_checkpoint(f"o/{script}/last.pt")["state"]["student"]
        assert all(torch.isfinite(value.float()).all() for value in saved.values())
    assert run("nd", f"{quick} --epochs 3 --lr 1e12 {PLAIN['nd']}") == 2  # divergence
    assert "--lr" in error_line(capsys) and helpers.progress("o") == (0, 0)


def test_exit_codes_of_what_is_not_the_users_fault(quick, monkeypatch, capsys):
    loss = mock.Mock()
    monkeypatch.setattr(nd, "kd_loss", loss)
    for error, words in (
        (MemoryError(), "out of memory: lower --batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --batch-size"),
        (RuntimeError("x_cuda does not have a deterministic implementation, but"), "x_cuda"),
        (common.UserError("a\nb\x1b[2Jc\x1e\x85d\u2028e"), "a b [2Jc d e"),
        (OSError(28, "No space left on device", "some/file"), "some/file: No space left"),
    ):
        loss.side_effect = error
        assert run("nd", quick) == 2
        assert words in error_line(capsys)
    loss.side_effect = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):  # a traceback, for the report of it
        run("nd", quick)
    for number in (signal.SIGINT, signal.SIGHUP):
        assert stopped("sp", f"{quick}/{number}", step=1, number=number) == 128 + number
    if not torch.cuda.is_available():
        assert run("sp", f"{quick} --device cuda") == 2 and "--device cuda" in error_line(capsys)


# --- other ways to run ---------------------------------------------------------------------------


def test_bf16_trains_on_float32_losses(quick, monkeypatch):
    monkeypatch.setattr(nd, "nd_loss", spy := mock.Mock(wraps=nd.nd_loss))
    commands = [f"nd --base {base}" for base in nd.BASES]
    commands += ["sp --kd-weight 1 --at-weight 1000", "dcd --kd-weight 1", "kd2m --metric mse"]
    for command in commands:
        script, *more = command.split()
        assert run(script, f"{quick} --batch-size 48 --precision bf16", *more) == 0
        assert all(np.isfinite(value) for value in lines("o")[0].values())
        assert all(v.dtype != torch.bfloat16 for v in weights("o/student.pt").values())
        with mock.patch("torch.nn.ModuleList.bfloat16") as rounded:  # the teacher stays float32
            assert run(script, f"{quick}/p --batch-size 48 --precision bf16", *more) == 0
        rounded.assert_called_once()
        assert same(weights("o/student.pt"), weights("o/p/student.pt"))
    assert {x.dtype for call in spy.call_args_list for x in call.args[:2]} == {torch.float32}


def test_deterministic_switches_torch(quick, monkeypatch):
    switch = mock.Mock()
    monkeypatch.setattr(torch, "use_deterministic_algorithms", switch)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert run("sp", f"{quick} --deterministic") == 0
    switch.assert_called_with(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_compile_changes_neither_the_weights_nor_their_names(quick, monkeypatch):
    """With a backend that traces but runs the same operations, so that no compiler is needed."""
    compile_, compiled = torch.compile, []

    def traced(network, **options):
        compiled.append(options)
        return compile_(network, backend="eager", **options)

    assert run("sp", f"{quick} --batch-size 48") == 0
    plain = weights("o/student.pt")
    monkeypatch.setattr(torch, "compile", traced)
    assert run("sp", f"{quick} --batch-size 48 --compile") == 0
    assert compiled == [{"dynamic": False, "mode": "reduce-overhead"}] * 2  # student, teacher
    assert same(plain, weights("o/student.pt"))


def test_tensorboard_gets_every_epoch(quick, monkeypatch, capsys):
    board, fake = mock.MagicMock(), types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = lambda folder, **_: board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert run("sp", f"{quick} --epochs 2 --tensorboard") == 0
    written = {call.args[::2]: call.args[1] for call in board.add_scalar.call_args_list}
    assert {(name, epoch) for name in ("ce", "sp", "lr") for epoch in (1, 2)} < written.keys()
    assert written["test_top1", 2] == result("o")["student_top1"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("sp", f"{quick} --tensorboard --out p") == 2
    assert "pip install tensorboard" in error_line(capsys)


def test_plots(quick, monkeypatch, capsys):
    files = {"nd": {"embeddings.png"}, "sp": {"similarities.png"}, "kd2m": {"features.png"}}
    files["dcd"], histograms = {"correlation_gap.png", "embeddings.png"}, []
    for script, names in files.items():
        with mock.patch("matplotlib.axes.Axes.hist", autospec=True) as hist:
            assert run(script, f"{quick}/{script} --plot") == 0
        histograms += hist.call_args_list
        found = list(Path("o", script).glob("*.png"))
        assert {path.name for path in found} == names
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    assert result("o/sp/ce")["method"] == "CE"  # the baseline of the figure
    # nd: lengths, and cosines to the class means, of the images of ten classes
    paths = ["teacher.pth", "o/nd/ce/student.pt", "o/nd/kd/student.pt", "o/nd/student.pt"]
    images, labels = helpers.shapes(train_size=48).test_batch(50, 10)
    m = common.read_checkpoint("o/nd/class_means.pt")["value"][labels]
    for path, name in zip(paths, ("teacher", "CE", "KD", "KD++")):
        s = common.load_model("resnet8", path).eval()(images, return_features=True)[1].embedding
        length = s.square().sum(1).sqrt()
        for x in (length, (s * m).sum(1) / length / m.square().sum(1).sqrt()):
            (_, found), style = histograms.pop(0)
            assert style["label"] == name and found == pytest.approx(x.tolist(), rel=1e-4)
    # the correlation gap against a loop over images
    relations = []
    for path in ("o/dcd/student.pt", "teacher.pth"):
        net, rows = common.load_model("resnet8", path).eval(), {k: [] for k in range(24)}
        for images, labels in helpers.shapes(train_size=48).batches("test", 1):
            z = net(images)[0].detach().double().numpy()
            rows[labels.item()].append((z - z.mean()) / z.std())
        relations.append(np.array([np.mean(rows[k], axis=0) for k in range(24)]))
    gap = np.abs(relations[0] - relations[1])
    np.fill_diagonal(gap, 0)
    assert result("o/dcd")["correlation_gap"] == pytest.approx(gap.mean(), abs=2e-4)
    assert run("nd", f"{quick}/p --lr 200") == run("nd", f"{quick}/p --lr 200 --plot --resume") == 0
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for script in files:
        assert run(script, f"{quick}/new-{script} --plot") == 2
        assert "pip install matplotlib" in error_line(capsys)
        assert not Path(f"o/new-{script}").exists()


TRANSFER = "--dataset cifar100 --transfer shapes --image-size 16 --train-size 48 --batch-size 24"
TRANSFER += " --epochs 2"


@pytest.mark.parametrize(
    "student, teacher, classifier, bn",
    [
        ("resnet8", "wrn_16_1", "fc", "eval"),
        ("vgg8", "MobileNetV2", "classifier", "eval"),
        ("mobilenet_v3_small", "resnet8", "classifier.3", "batch"),
    ],
)
def test_transfer_trains_the_classifiers_alone(cwd, student, teacher, classifier, bn):
    helpers.teacher_file("student.pt", student, 100)
    helpers.teacher_file("teacher.pth", teacher, 7)
    command = f"{TRANSFER} --student {student} --student-ckpt student.pt --transfer-bn {bn}"
    command += f" --teacher {teacher} --teacher-ckpt teacher.pth --out o"
    assert run("dcd", command) == 0
    r, line = result("o"), lines("o")[-1]
    assert r["dataset"] == "shapes" and r["method"].startswith("probe of student")
    assert r["teacher_top1"] == line["teacher_test_top1"]
    assert r["student_top1"] == line["test_top1"]
    before, after = weights("student.pt"), weights("o/student.pt")
    assert before.keys() == after.keys() and len(after[f"{classifier}.weight"]) == 24
    for key, value in before.items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(after[key], value) == (bn == "eval"), key
        elif not key.startswith(classifier + "."):
            assert torch.equal(after[key], value), key


def test_transfer_equals_a_probe_written_by_hand(cwd):
    helpers.teacher_file("student.pt", "resnet8", 100)
    command = f"{TRANSFER} --student resnet8 --student-ckpt student.pt --seed 3 --out o"
    assert run("dcd", command) == 0
    assert result("o")["teacher_top1"] is None
    data, net = helpers.shapes(train_size=48), common.load_model("resnet8", "student.pt")
    net = net.to(memory_format=torch.channels_last).eval()
    torch.manual_seed(3)
    torch.nn.Linear(64, 24)  # draws that PyTorch makes for its own start
    weight, bias = (0.01 * torch.randn(24, 64)).requires_grad_(), torch.zeros(24).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], 0.05, 0.9, weight_decay=5e-4)
    for step, lr in enumerate((0.05, 0.005, 5e-4, 5e-5)):  # 0, 30, 60, 90 of 120 epochs
        seed = 3 * 100_003 + step // 2
        images, labels = list(data.batches("train", 24, seed, augment=True))[step % 2]
        optimizer.param_groups[0]["lr"] = lr
        with torch.no_grad():
            x = net(images, return_features=True)[1].embedding
        optimizer.zero_grad()
        F.cross_entropy(x @ weight.T + bias, labels).backward()
        optimizer.step()
    assert torch.allclose(weights("o/student.pt")["fc.weight"], weight, atol=1e-5)


def test_transfer_finds_the_networks_and_resumes(cwd, capsys):
    Path("checkpoints").mkdir()
    Path("a-run").mkdir()
    helpers.teacher_file("checkpoints/cifar100_resnet8.pt", "resnet8", 100)
    helpers.teacher_file("a-run/student.pt", "wrn_16_1", 100)
    known = dict(method="DCD+KD", student="wrn_16_1", teacher="resnet8", dataset="cifar100")
    Path("a-run/result.json").write_text(json.dumps(known | {"args": {"image_size": 48}}))
    command = f"{TRANSFER} --student-ckpt a-run/student.pt"
    assert run("dcd", command, "--out", "whole") == 0
    r = result("whole")
    assert (r["student"], r["teacher"], r["method"]) == ("wrn_16_1", "resnet8", "probe of DCD+KD")
    assert stopped("dcd", command, "--out", "parts", step=3) == 143
    assert run("dcd", command, "--out", "parts", "--resume") == 0
    assert same(weights("whole/student.pt"), weights("parts/student.pt"))
    torch.save(common.build_model("wrn_16_1", 100).state_dict(), "a-run/student.pt")
    assert run("dcd", command, "--out", "parts", "--resume") == 2
    assert "--resume" in error_line(capsys)
