"""Four whole training steps of 15 methods against numbers made by the authors' published code, run
in float64 (published_steps.json).

Each script's own parse_args and distill run; only what is around them is replaced: data, networks,
teacher, class means and the run's chores. So a milestone, a warm-up, a weight, a feature map or the
mode of a BatchNorm that is not the published one is found. All in float64: in float32 rounding
grows to 1e-2 in four such steps.
"""

import copy
import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common

PUBLISHED = json.loads(Path(__file__).with_name("published_steps.json").read_text())
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
KD2M = ("w2_empirical", "w2_gaussian", "kl_gaussian", "mmd_linear", "mmd_rbf")
COMMANDS = {  # beside --dataset cifar100 --teacher resnet56 --student resnet20
    "nd_kd": "nd --base kd",
    "nd_dkd": "nd --base dkd",
    "nd_dist": "nd --base dist",
    "nd_reviewkd": "nd --base reviewkd",
    "sp": "sp",
    "sp_kd": "sp --kd-weight 1",
    "sp_at": "sp --sp-weight 0 --at-weight 1000",
    "sp_kd_only": "sp --sp-weight 0 --ce-weight 0.1 --kd-weight 0.9",
    "dcd": "dcd",
    "dcd_kd": "dcd --kd-weight 1",
    **{f"kd2m_{name}": f"kd2m --recipe paper --metric {name}" for name in KD2M},
}


@functools.cache
def batches():
    """Four batches of 16 drawn images with labels of 100 classes, normalised as CIFAR-100."""
    images = common.draw_shapes(64, 0, 32).images.permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (MEAN, STD))
    labels = torch.arange(64) * 37 % 100
    return list(zip(((images - mean) / std).split(16), labels.split(16)))


@functools.cache
def networks():
    """Teacher and student, drawn in float32 and cast; the teacher's BatchNorm saw the batches."""
    torch.manual_seed(5)
    teacher = common.build_model("resnet56", 100).double()
    norms = [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for images, _ in batches():
            teacher(images)
        teacher.fc.weight *= 8
    teacher.eval().requires_grad_(False)
    torch.manual_seed(0)
    student = common.build_model("resnet20", 100).double()
    for net in (teacher, student):
        net.embed_dim, net.stage_shapes = 64, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
        net.hash, net.top1 = "", 50.0
    return {"resnet56": teacher, "resnet20": student}


@functools.cache
def answer(batch):
    """What the frozen teacher says: the same for every method."""
    with torch.no_grad():
        return networks()["resnet56"](batches()[batch][0], return_features=True)


class FourSteps:
    """Stands in for common.Run: one step in each of four epochs of the recipe's run."""

    def __init__(self, args, data, figures=()):
        self.args, self.dir, self.history, self.logged = args, Path(), [], []
        self.total_steps, self.step_seed = args.epochs, 0

    def start(self, teacher, **objects):
        assert teacher is networks()["resnet56"] and not teacher.training
        self.objects = objects
        objects.get("auxiliary", torch.nn.Module()).double()

    def epochs(self):
        for batch, epoch in enumerate(self.epochs_to_take):
            self.batch, self.step = batch, epoch
            yield epoch

    def batches(self):
        yield batches()[self.batch]

    def ask_teacher(self, images, maps=False):
        assert images is batches()[self.batch][0]
        logits, features = answer(self.batch)
        return logits, features._replace(maps=[*features.maps], preact=[*features.preact])

    def all_gather(self, *tensors):
        return tensors

    def mean_over_ranks(self, loss, images):
        return loss

    def average_gradients(self, optimizer):
        pass

    def log(self, terms, labels, logits):
        lr = self.objects["optimizer"].param_groups[0]["lr"]
        self.logged.append({"lr": lr} | {k: torch.as_tensor(v).item() for k, v in terms.items()})

    def end_epoch(self, **scores):
        pass

    def finish(self, **more):
        return {"logged": self.logged, "student": self.objects["student"]}


def build_for(data, name, pretrained=False):
    torch.manual_seed(0)  # whatever is built next starts from here
    net = networks()[name]
    return net if name == "resnet56" else copy.deepcopy(net)


@pytest.fixture
def surroundings(monkeypatch):
    split = SimpleNamespace(labels=torch.cat([y for _, y in batches()]))
    data = SimpleNamespace(
        device=torch.device("cpu"), num_classes=100, image_size=32, fingerprint="", train=split,
        test=split, classes=[str(k) for k in range(100)], batches=lambda *_, **__: iter(()),
    )  # fmt: skip
    means = torch.rand(100, 64, generator=torch.Generator().manual_seed(7)).double()
    monkeypatch.setattr(common, "Run", FourSteps)
    monkeypatch.setattr(common, "load_data", lambda args: data)
    monkeypatch.setattr(common, "build_for", build_for)
    monkeypatch.setattr(common, "load_teacher", lambda teacher, *_: teacher)
    monkeypatch.setattr(common, "cached", lambda *_, **__: means)
    monkeypatch.setattr(common, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("method", PUBLISHED)
def test_four_steps_are_those_of_the_published_code(method, surroundings, monkeypatch):
    published = PUBLISHED[method]
    script, *flags = COMMANDS[method].split()
    monkeypatch.setattr(FourSteps, "epochs_to_take", published["epochs"], raising=False)
    module = importlib.import_module(script)
    pair = ["--dataset", "cifar100", "--teacher", "resnet56", "--student", "resnet20"]
    args = module.parse_args([*pair, *flags, "--device", "cpu"])
    before = common.state_hash(networks()["resnet56"])
    result = module.distill(args)
    assert common.state_hash(networks()["resnet56"]) == before  # the teacher does not learn

    close = 1e-6 if method == "kd2m_kl_gaussian" else 1e-9  # our floor of the variances
    logged, student = result["logged"], result["student"]
    assert [line["lr"] for line in logged] == pytest.approx(published["lr"], rel=1e-12)
    for name, values in published["terms"].items():
        if name == "base*warm*w":
            warm_up = [min(1.0, epoch / 20) for epoch in published["epochs"]]
            found = [w * args.kd_weight * line[args.base] for w, line in zip(warm_up, logged)]
        elif name == "nd*w":
            found = [args.nd_weight * line["nd"] for line in logged]
        else:
            found = [line[name] for line in logged]
        assert found == pytest.approx(values, rel=close), name
    norm = sum(p.detach().square().sum() for p in student.parameters()).sqrt()
    assert norm.item() == pytest.approx(published["parameter_norm"], rel=close)
    head = student.fc.weight[0, :4].tolist()
    assert head == pytest.approx(published["head_row_0"], rel=close)
