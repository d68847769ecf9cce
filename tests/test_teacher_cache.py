"""--teacher-cache: the same bits with and without it, whatever state the cache is in."""

import hashlib
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import QUICK, run, same, stopped, teacher_file, timeless, weights

import common

pytestmark = pytest.mark.usefixtures("cwd", "few_shapes", "any_teacher_passes")
COMMAND = f"{QUICK} --epochs 2 --teacher-ckpt teacher.pth"
METHODS = {"nd": "", "sp": "--kd-weight 1", "dcd": "--kd-weight 1", "kd2m": "--metric mse"}


@pytest.fixture
def calls(monkeypatch):
    """How many images a teacher saw: resnet8's answers in eval mode, but for `build_for`'s two."""
    count, network = [], type(common.build_model("resnet8", 2))
    forward = network.forward

    def counting(self, x, return_features=False):
        if not self.training and return_features and len(x) > 2:
            count.append(len(x))
        return forward(self, x, return_features)

    monkeypatch.setattr(network, "forward", counting)
    return count


@pytest.mark.parametrize("script, flags", METHODS.items())
def test_filling_and_reading_change_no_bit(script, flags, calls, capsys):
    teacher_file()
    for out, cache in (("plain", ""), ("fill", "--teacher-cache c"), ("read", "--teacher-cache c")):
        calls.clear()
        assert run(script, f"{COMMAND} {flags} {cache} --out {out}") == 0
        assert same(weights("plain/student.pt"), weights(f"{out}/student.pt"))
        assert timeless("plain") == timeless(out)
    maps = script == "sp"  # which the cache does not hold
    assert (sum(calls) > 0) == maps
    assert ("holds no feature maps" in capsys.readouterr().out) == maps


def test_one_cache_serves_every_script_but_no_other_teacher_seed_or_batch(calls):
    teacher_file()
    assert run("dcd", f"{COMMAND} --teacher-cache c --out a") == 0
    calls.clear()
    assert run("kd2m", f"{COMMAND} --teacher-cache c --metric mse --out b") == 0
    assert not calls
    for other in ("--seed 1", "--batch-size 16", "--train-size 24"):
        assert run("dcd", f"{COMMAND} --teacher-cache c --out c1 {other}") == 0
    torch.manual_seed(9)
    torch.save(common.build_model("resnet8", 24).state_dict(), "teacher.pth")
    assert run("dcd", f"{COMMAND} --teacher-cache c --out d") == 0
    assert len([f for f in Path("c").iterdir() if f.is_dir()]) == 5
    assert run("dcd", f"{COMMAND} --out e") == 0
    assert same(weights("d/student.pt"), weights("e/student.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_mid_epoch_and_resumed(number):
    teacher_file()
    assert run("nd", f"{COMMAND} --out whole") == 0
    command = f"{COMMAND} --teacher-cache c --out o --save-minutes 0.0001"
    status = stopped("nd", command, step=3, number=number)
    assert status == (143 if number == signal.SIGTERM else -9)
    assert run("nd", f"{command} --resume") == 0
    assert same(weights("whole/student.pt"), weights("o/student.pt"))
    assert run("nd", f"{COMMAND} --teacher-cache c --out again") == 0  # fills what was left open
    assert same(weights("whole/student.pt"), weights("again/student.pt"))
    assert len(list(Path("c").glob("*/epoch*.bin"))) == 2


def test_a_torn_or_foreign_file_is_computed_again_and_said(capsys):
    teacher_file()
    assert run("dcd", f"{COMMAND} --teacher-cache c --out a") == 0
    for position in (-1, 0, 20, None):  # a number, the checksum, another number; cut off
        first, second = sorted(Path("c").glob("*/*.bin"))
        content = bytearray(second.read_bytes())
        if position is not None:
            content[position] ^= 1
        first.write_bytes(first.read_bytes()[:-100] if position else b"")
        second.write_bytes(content[: None if position is not None else 100])
        assert run("dcd", f"{COMMAND} --teacher-cache c --out b") == 0
        assert capsys.readouterr().err.count("is damaged and is computed again") == 2
        assert same(weights("a/student.pt"), weights("b/student.pt"))


def test_bad_folders_and_full_disks_are_one_line(monkeypatch, capsys):
    teacher_file()
    Path("file").write_text("")
    assert run("dcd", f"{COMMAND} --teacher-cache file/x --out o") == 2
    assert "file/x" in capsys.readouterr().err and not Path("o/last.pt").exists()
    usage = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run("dcd", f"{COMMAND} --teacher-cache c --out o") == 2
    assert "the disk has" in capsys.readouterr().err


def test_published_weights_come_from_the_hub_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(common, "RELEASE", "file:///nowhere")
    torch.save(common.build_model("resnet20", 24).state_dict(), "weights.pt")
    digest = hashlib.sha256(Path("weights.pt").read_bytes()).hexdigest()[:8]
    path = tmp_path / f"hub/checkpoints/shapes_resnet20-{digest}.pt"
    monkeypatch.setattr(common, "PUBLISHED", {"shapes_resnet20": digest})
    command = f"{QUICK} --epochs 1 --teacher resnet20 --pretrained-teacher --out o"
    assert run("nd", command) == 2
    assert f"{path.name}" in (line := capsys.readouterr().err) and str(path.parent) in line
    for content in (b"", b"hello"):
        path.write_bytes(content)
        assert run("nd", command) == 2
        assert f"{path}: damaged or another file" in capsys.readouterr().err
    shutil.copy("weights.pt", path)
    assert run("nd", command) == 0
    assert run("nd", command.replace("resnet20", "resnet14")) == 2
    assert "not shapes_resnet14; imagenet, or one of ['shapes_resnet20']" in capsys.readouterr().err
