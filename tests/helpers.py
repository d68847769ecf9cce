"""What the tests of whole runs share: commands of a second, files to load, ways to stop."""

import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common

ROOT = Path(common.__file__).parent
# A run of a second: two batches an epoch, the smallest networks.
QUICK = "--dataset shapes --train-size 48 --batch-size 24 --teacher resnet8 --student resnet8"
# The same with embeddings of different width.
WIDE = "--dataset shapes --train-size 48 --batch-size 24 --teacher wrn_16_2 --student resnet8"
TIMES = ("seconds", "images_per_second", "peak_memory_mb")


def result(out):
    return json.loads((Path(out) / "result.json").read_text())


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(path):
    state = torch.load(path, weights_only=True)
    return {k: v for k, v in state.get("model", state).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def teacher_file(path="teacher.pth", name="resnet8", classes=24):
    """A checkpoint in RepDistiller's layout, untrained."""
    torch.manual_seed(1)
    net = common.build_model(name, classes)
    torch.save({"epoch": 240, "model": net.state_dict(), "accuracy": torch.tensor(70.0)}, path)
    return path


class Tiny(torch.nn.Module):
    """The least that a script can train, for runs of hundreds of epochs."""

    name = "tiny"

    def __init__(self, classes):
        super().__init__()
        self.fc = torch.nn.Linear(3, classes)

    def forward(self, images, return_features=False):
        embedding = images.mean((2, 3))
        features = common.Features(embedding, [images], [images])
        return (self.fc(embedding), features) if return_features else self.fc(embedding)


def stop_in(monkeypatch, which_add):
    """Make the program receive SIGTERM at its n-th training step."""
    count = [0]
    add = common.Meter.add

    def stopping(self, *a, **k):
        count[0] += 1
        if count[0] == which_add:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, *a, **k)

    monkeypatch.setattr(common.Meter, "add", stopping)


def forked(program, command):
    """A process that runs the program with these arguments, as this one is patched by now."""

    def child():
        sys.exit(common.run_program(program, shlex.split(command)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def make_bad_files():
    """Here, in the current folder."""
    shutil.copytree(_bad_files().name, ".", dirs_exist_ok=True)


@functools.cache
def _bad_files():
    """Made once."""
    made = tempfile.TemporaryDirectory()
    here, net = Path(made.name), common.build_model("resnet8", 24)
    torch.save(net.state_dict(), here / "chance.pth")
    torch.save(net.state_dict() | {"fc.bias": torch.full((24,), torch.nan)}, here / "nan.pth")
    (here / "torn.pth").write_bytes((here / "chance.pth").read_bytes()[:5000])
    (here / "torn").mkdir()
    shutil.copy(here / "torn.pth", here / "torn/last.pt")
    torch.save({"model": net.state_dict(), "opt": Bomb()}, here / "code.pth")
    torch.save(common.build_model("resnet14", 24).state_dict(), here / "other.pth")
    torch.save(common.build_model("resnet8", 100).state_dict(), here / "classes.pth")
    for root in ("damaged", "classless"):
        for split in ("train", "val"):
            for name in ("a", "b"):
                folder = here / root / split / name
                folder.mkdir(parents=True)
                Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "0.png")
    (here / "damaged/train/a/0.png").write_bytes(b"\x89PNG nothing")
    (here / "classless/train/empty").mkdir()
    return made
