"""What tests/test_ranks.py runs in several processes, and in one, to compare the two.

Every case is three steps of a script's own `main`. Networks have no BatchNorm, which sees a
process's own images, so that nothing but rounding may differ from one process.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dcd
import kd2m
import nd
import sp

# 63 images in batches of 21: shares of 10 and 11.
QUICK = "--dataset shapes --train-size 63 --batch-size 21 --epochs 1 --teacher resnet8"
QUICK = f"{QUICK} --student resnet8 --lr 0.002 --device cpu".split()
CASES = {
    "ce": (nd, "--nd-weight 0 --kd-weight 0"),
    "kd++": (nd, "--kd-weight 1 --nd-weight 2 --norm-weight 1 --direction-weight 1"),
    "dkd++": (nd, "--base dkd"),
    "dist++": (nd, "--base dist"),
    "reviewkd++": (nd, "--base reviewkd"),
    "sp": (sp, "--kd-weight 1 --at-weight 1000 --sp-weight 100 --sp-maps all"),
    "cc": (sp, "--relation cc"),
    "intra": (sp, "--relation intra"),
    "dcd": (dcd, "--kd-weight 1"),
    "mse": (kd2m, "--metric mse --projector linear"),
    "jw2": (kd2m, "--metric jw2_empirical"),
    "cw2": (kd2m, "--metric cw2_gaussian"),
    "sliced_w2": (kd2m, "--metric sliced_w2"),
}
# Not to compare with one process, but everything that is trained has to stay alike.
SYNCHRONOUS = {
    "bf16": (sp, "--kd-weight 1 --precision bf16"),
    "local": (dcd, "--gather local"),
    "batchnorm and projector": (nd, "--student wrn_16_2"),
}


def few(draw):
    """Of `draw_shapes`: one that makes splits of 72 and 24 images of half the size."""
    return lambda count, seed, size: draw(72 if count > 1000 else 24, seed, size // 2)


def few_shapes():
    """From here on, in this process."""
    common.draw_shapes = few(common.draw_shapes)


def without_batchnorm(net):
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    return net


def run_case(folder, name):
    """-> the metrics of the epoch, what was trained, the gradients of the last step."""
    script, flags = (CASES | SYNCHRONOUS)[name]
    plain, trained = name in CASES, {}
    build, near_chance, review = common.build_model, common.near_chance, nd.ReviewKD

    def build_model(*args, **kwargs):
        return without_batchnorm(build(*args, **kwargs)) if plain else build(*args, **kwargs)

    def average_gradients(optimizer):
        common.average_gradients(optimizer)
        trained["all"] = [p for group in optimizer.param_groups for p in group["params"]]

    out = folder / name
    argv = [*QUICK, *flags.split(), "--out", str(out)]
    argv += ["--teacher-ckpt", str(folder / ("plain.pth" if plain else "teacher.pth"))]
    common.build_model = script.build_model = build_model
    common.near_chance = lambda *_: False  # a teacher that knows nothing will do
    nd.ReviewKD = lambda *widths: without_batchnorm(review(*widths))
    script.average_gradients = average_gradients
    try:
        script.program(argv)
    finally:
        common.build_model = script.build_model = build
        common.near_chance, script.average_gradients = near_chance, common.average_gradients
        nd.ReviewKD = review
    weights = [p.detach() for p in trained["all"]]
    gradients = [p.grad for p in trained["all"]]
    line = (out / "metrics.jsonl").read_text()
    return {"line": line, "weights": weights, "gradients": gradients}


def write_teachers(folder):
    torch.manual_seed(1)
    net = common.build_model("resnet8", 24)
    torch.save(net.state_dict(), folder / "teacher.pth")
    torch.save(without_batchnorm(net).state_dict(), folder / "plain.pth")


def exact(name):
    """A loss through `gather` in double precision, shares of 10 and 11: value and gradients."""
    draw = torch.Generator().manual_seed(0)
    student, teacher, logits = torch.randn(3, 21, 5, dtype=torch.float64, generator=draw)
    labels = torch.randint(0, 4, (21,), generator=draw)
    torch.manual_seed(0)
    before, heads = torch.nn.Linear(5, 5).double(), dcd.DCDLoss(5, 5, 4).double()
    args = type("", (), {"gather": "global"})
    mine = common.share(21)
    s, t = common.gather(args, before(student[mine]), teacher[mine])
    z, y = common.gather(args, logits[mine] + before(student[mine]), labels[mine])
    assert torch.equal(t, teacher) and torch.equal(y, labels)
    if name == "mean_over_ranks":
        loss = (before(student[mine]) ** 4).mean()
        loss = common.mean_over_ranks(args, loss, len(student[mine]))
    else:
        loss = EXACT[name](s, t, y, z, logits, heads)
    trained = [*before.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss.backward()
    common.average_gradients(optimizer)
    return {"loss": loss.detach(), "gradients": [p.grad for p in trained if p.grad is not None]}


EXACT = {
    "nd": lambda s, t, y, z, tz, heads: nd.nd_loss(s, t, t[:4], y),
    "kd": lambda s, t, y, z, tz, heads: nd.kd_loss(z, tz),
    "dkd": lambda s, t, y, z, tz, heads: nd.dkd_loss(z, tz, y),
    "dist": lambda s, t, y, z, tz, heads: nd.dist_loss(z, tz),
    "sp": lambda s, t, y, z, tz, heads: sp.sp_loss(s, t),
    "cc": lambda s, t, y, z, tz, heads: sp.cc_loss(s, t),
    "dcd": lambda s, t, y, z, tz, heads: heads(s, t),
    "mean_over_ranks": None,
}


def probe(folder):
    """A probe in train mode of a student with dropout, of which every process does all."""
    torch.manual_seed(1)
    torch.save(common.build_model("mobilenet_v3_small", 5).state_dict(), folder / "student.pt")
    found, finish = {}, common.Run.finish

    def spy(self, student, *rest, **more):
        found.update(student.state_dict())
        return finish(self, student, *rest, **more)

    command = "--transfer shapes --train-size 48 --batch-size 24 --epochs 1 --transfer-bn batch"
    command += " --student mobilenet_v3_small --device cpu --teacher resnet8 --student-ckpt"
    common.Run.finish = spy
    try:
        more = f"{folder}/student.pt --teacher-ckpt {folder}/teacher.pth --out {folder}/probe"
        dcd.program(f"{command} {more}".split())
    finally:
        common.Run.finish = finish
    return found["classifier.3.weight"]


def local_meter():
    """With --gather local a process adds its own share; the epoch's line is of all of them."""
    meter = common.Meter(argparse.Namespace(epochs=1, gather="local"), 0, 21)
    mine = common.share(21)
    logits = torch.eye(3)[torch.arange(21) % 3]
    labels, values = torch.zeros(21, dtype=torch.int64), torch.arange(21.0)
    meter.add(logits[mine], labels[mine], {"ce": values[mine].mean()})
    return {k: v for k, v in meter.close().items() if "second" not in k}


def of_metric(name):
    def loss(s, t, y, z, tz, heads):
        extra = [y] if name.startswith("cw2") else [z, tz] if name == "jw2_empirical" else []
        options = {"seed": 0} if name == "sliced_w2" else {}
        return kd2m.METRICS[name](s, t, *extra, **options)

    return loss


EXACT |= {name: of_metric(name) for name in kd2m.METRICS}


def program(argv):
    folder = Path(argv[0])
    results = {name: run_case(folder, name) for name in (*CASES, *SYNCHRONOUS)}
    results |= {f"exact {name}": exact(name) for name in EXACT}
    results["local meter"], results["probe"] = local_meter(), probe(folder)
    torch.save(results, folder / f"rank{common.rank()}.pt")
