"""Files of weights: the layouts that load, and what is refused in one line without running code."""

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from helpers import Bomb, run, same, shapes

import common
from common import UserError, build_model, load_weights


def in_a_file(value, path="a.pth"):
    torch.save(value, path)
    return path


def under(prefix, state):
    return {prefix + k: v for k, v in state.items() if "num_batches" not in k}


def counted(state):  # as a counter of operations leaves them, in every layer
    number = torch.zeros(1, dtype=torch.float64)
    return state | {f"{k.rsplit('.', 1)[0]}.total_ops": number for k in state}


TEACHER = build_model("resnet14", 10).state_dict()
OPTIONS = argparse.Namespace(model="resnet8", lr=0.05, lr_decay_epochs=[150, 180, 210])
LAYOUTS = {  # who writes it -> what is in the file, from a state dict
    "plain": lambda t: t,
    "DataParallel": lambda t: under("module.", t),
    "torch.compile": lambda t: under("_orig_mod.", t),
    "both": lambda t: under("module._orig_mod.", t),
    "wrapped twice": lambda t: under("module.module.", t),
    "state_dict": lambda t: {"state_dict": under("module.", t), "epoch": 240},
    "Lightning": lambda t: {"state_dict": under("model.", t), "epoch": 3},
    "mdistiller": lambda t: {"model": under("module.student.", t), "best_acc": np.float64(71)},
    "mdistiller, all": lambda t: under("teacher.", TEACHER) | under("student.", t),
    "net": lambda t: {"net": under("module.", t), "acc": 91.2},
    "model_state_dict": lambda t: {"model_state_dict": t, "loss": torch.zeros(())},
    "teacher": lambda t: {"teacher": t, "log": [np.zeros(2), {"x": torch.ones(3)}]},
    "RepDistiller's last": lambda t: {"opt": OPTIONS, "model": t, "optimizer": {"state": {}}},
    "a list": lambda t: [t, 3],
    "among lists": lambda t: {"groups": [[k, [k]] for k in range(60)], "a": {"b": [[], [t]]}},
    "counters": counted,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_weights_finds_them_in_what_people_save(cwd, layout, capsys):
    net, other = build_model("resnet8", 10), build_model("resnet8", 10)
    load_weights(other, in_a_file(LAYOUTS[layout](net.state_dict())))
    assert same(net.state_dict(), other.state_dict()) and not capsys.readouterr().out


def test_of_several_that_fit_the_first_is_taken_and_said(cwd, capsys):
    net, average, other = (build_model("resnet8", 10) for _ in range(3))
    load_weights(other, in_a_file({"model": net.state_dict(), "ema": average.state_dict()}))
    assert same(net.state_dict(), other.state_dict()) and "model., ema." in capsys.readouterr().out


def test_a_namespace_with_code_in_it_is_refused(cwd):
    net = other = build_model("resnet8", 10)
    in_a_file({"opt": argparse.Namespace(x=Bomb()), "model": net.state_dict()}, "bad.pth")
    with pytest.raises(UserError, match="bad.pth"):
        load_weights(other, "bad.pth")
    assert not Path("exploded").exists()


def test_load_model_finds_the_number_of_classes(cwd):
    for name in ("resnet8", "MobileNetV2", "regnet_x_400mf"):
        net = build_model(name, 7)
        in_a_file({"model": net.state_dict()})
        before = torch.get_rng_state()
        loaded = common.load_model(name, "a.pth")
        assert same(loaded.state_dict(), net.state_dict())
        assert loaded.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    torch.set_rng_state(before)
    with pytest.raises(UserError, match="a.pth.*architecture"):
        common.load_model("wrn_16_1", "a.pth")


def refuse(content, words, path="bad.pth"):
    """The file with these bytes, or this saved value, is refused by one line that names it."""
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    else:
        in_a_file(content, path)
    with pytest.raises(UserError, match=words) as error:
        load_weights(build_model("resnet8", 10), path)
    assert path in str(error.value) and "\n" not in str(error.value)


def archived(kind, write):
    buffer = io.BytesIO()
    with kind(buffer, "w") as archive:
        getattr(archive, write)("teachers/resnet8.pth", b"weights")
    return buffer.getvalue()


def test_bad_checkpoints_are_refused(cwd):
    state = build_model("resnet8", 10).state_dict()
    for content, words in (
        (b"", "damaged"),
        (b"hello, I am text", "damaged"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (archived(zipfile.ZipFile, "writestr"), "an archive"),
        (build_model("resnet8", 100).state_dict(), "number of classes.*fc.weight"),
        (build_model("resnet14", 10).state_dict(), "another architecture"),
        (build_model("wrn_16_1", 10).state_dict(), "another architecture"),
        ({"model": {"fc.weight": torch.zeros(10, 64)}}, "another architecture"),
        (state | {"more": torch.zeros(1)}, "another architecture"),
        (state | {3: torch.zeros(1)}, "another architecture"),
        (state | {"fc.bias": "weights"}, "fc.bias"),
        (state | {"fc.bias": torch.zeros(10).to_sparse()}, "sparse"),
        *((state | {"fc.bias": torch.zeros(10).to(t)}, "meta") for t in (torch.int8, torch.cfloat)),
        (state | {"fc.bias": torch.zeros(10, device="meta")}, "meta"),
        (state | {"fc.bias": torch.full((10,), torch.inf)}, "infinite or nan"),
    ):
        refuse(content, words)
    for value in (None, True, 3.5, "text", [], [1, 2, 3], {}, {"epoch": 3}, {3: {"": None}}):
        for content in (value, {"model": value}, {"state_dict": {"model": value}}):
            refuse(content, "no state dict")
            refuse(pickle.dumps(content), "no state dict|damaged")
    with pytest.raises(UserError, match="no such file"):
        load_weights(build_model("resnet8", 10), "absent.pth")
    with pytest.raises(UserError, match="not a file"):
        load_weights(build_model("resnet8", 10), cwd)


def test_torn_files_and_flipped_bits_are_noticed(cwd):
    good = Path(in_a_file(build_model("resnet8", 10).state_dict())).read_bytes()
    for cut in range(1, len(good) - 1, len(good) // 25):
        refuse(good[:cut], "damaged|no state dict")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    refuse(bytes(flipped), "damaged")


def test_code_in_a_checkpoint_is_never_run(cwd):
    state = build_model("resnet8", 10).state_dict()
    options = argparse.Namespace(x=Bomb())
    for value in ({"model": state | {"x": Bomb()}}, {"model": state, "opt": options}, Bomb()):
        refuse(value, "state dict alone")
        refuse(pickle.dumps(value), "state dict alone|damaged")
    assert not Path("exploded").exists()


def test_state_hash_sees_every_tensor():
    net = build_model("resnet8", 10)
    hashes = {common.state_hash(net), common.state_hash(net)}
    net.bn1.running_mean[0] += 1e-6
    hashes.add(common.state_hash(net))
    net.bn1.num_batches_tracked += 1
    hashes.add(common.state_hash(net))
    assert len(hashes) == 3


def test_files_are_replaced_whole(cwd, monkeypatch):
    path = cwd / "new" / "f.pt"
    common.save_whole(path, {"a": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        common.save_whole(path, {"a": 2, "b": lambda: 0})
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=full))
    with pytest.raises(OSError):
        common.write_whole(path, b"other")
    assert common.read_checkpoint(path) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_what_is_cached_belongs_to_what_made_it(cwd, capsys):
    calls = []

    def value(**made_by):
        def compute():
            calls.append(made_by)
            return torch.full((2,), float(len(calls)))

        return common.cached(cwd / "c.pt", made_by, compute).tolist()

    assert value(teacher="a") == [1, 1] == value(teacher="a")
    assert value(teacher="b") == [2, 2] == value(teacher="b")
    assert value(teacher="b", data="c") == [3, 3]
    for damage in (b"torn", b"", (cwd / "c.pt").read_bytes()[:-20]):
        (cwd / "c.pt").write_bytes(damage)
        again = value(teacher="b", data="c")
        assert again == [len(calls)] * 2 and value(teacher="b", data="c") == again
    assert len(calls) == 6
    torch.save(Bomb(), cwd / "c.pt")
    assert value(teacher="b") == [7, 7] and not Path("exploded").exists()


def test_near_chance():
    """Below twice chance, but with less than ten classes below chance and 10 points."""
    for classes, least in ((100, 2), (10, 20), (4, 35), (2, 60)):
        assert common.near_chance(least - 0.1, classes)
        assert not common.near_chance(least + 0.1, classes)


def test_a_pretrained_teacher_is_torchvisions(quick, monkeypatch, capsys):
    """Published weights for 1,000 classes; nothing is written to checkpoints/."""
    asked, published = [], torchvision.models.mobilenet_v3_small()

    def download(self, *_, **__):
        asked.append(str(self))
        return published.state_dict()

    data = shapes()
    data.num_classes, data.classes = 1000, [str(k) for k in range(1000)]
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", download)
    monkeypatch.setattr(common, "load_data", lambda _: data)
    command = quick.replace("--teacher-ckpt teacher.pth", "--pretrained-teacher")
    assert run("sp", command, *"--teacher mobilenet_v3_small --relation cc".split()) == 0
    assert set(asked) == {"MobileNet_V3_Small_Weights.IMAGENET1K_V1"}
    saved = common.read_checkpoint("o/last.pt")["state"]
    assert saved["teacher"] == common.state_hash(published)
    assert not Path("checkpoints").exists()
