"""What the README and the docstrings say to type works, and what scripts repeat is alike."""

import ast
import os
import re
import runpy
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, teacher_file
from PIL import Image

import common
import dcd
import detect_nd
import kd2m
import nd
import sp

SCRIPTS = {"nd": nd, "sp": sp, "dcd": dcd, "kd2m": kd2m}
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.usefixtures("few_shapes")


SMALLER = dict.fromkeys(
    "resnet56 resnet20 resnet32x4 resnet8x4 resnet34 resnet18".split(), "resnet8"
)
SMALLER |= {
    "wrn_16_8": "wrn_16_1",
    "wrn_40_2": "wrn_16_1",
    "mobilenet_v3_large": "mobilenet_v3_small",
}


def commands():
    """(script, arguments) of every `python nd.py ...` that people are told to type."""
    found = set()
    for text in (README, *(module.__doc__ for module in SCRIPTS.values())):
        for script, line in re.findall(
            r"^\s*(?:.*(?:&&|;) *)?\S*python3? (\w+)\.py (.*)$", text, re.M
        ):
            if script in SCRIPTS:
                found.add((script, re.split(r"\s{3,}|\s+#", line)[0].strip()))
    found -= {(script, "--help") for script in SCRIPTS}  # tested below
    found -= {("kd2m", "--bench-metrics")}  # tested in test_kd2m_runs.py
    assert all(sum(name == script for name, _ in found) >= 3 for script in SCRIPTS)
    return sorted(found)


@pytest.mark.parametrize("script, command", commands())
def test_commands_run(cwd, script, command, capsys, any_teacher_passes, monkeypatch):
    """As printed, then shortened: one epoch of few images, trees of random pixels."""
    rng = np.random.default_rng(0)
    splits = {}
    for name in ("cifar10", "stl10", "svhn"):  # no files of these: what torchvision would read
        images = torch.from_numpy(rng.integers(0, 256, (60, 32, 32, 3), np.uint8))
        splits[name] = common.Split(images, torch.arange(60) % 10)
    build = common.build_model

    def smaller(name, num_classes, pretrained=False):  # and nothing is downloaded
        return build("resnet8" if num_classes == 1000 else SMALLER.get(name, name), num_classes)

    for module in (common, SCRIPTS[script]):
        monkeypatch.setattr(module, "build_model", smaller)
    monkeypatch.setattr(
        common,
        "_read_torchvision",
        lambda name, *_: (splits[name], splits[name], [str(k) for k in range(10)]),
    )
    for root in ("data/cifar100", "my-images")[: 1 + ("my-images" in command)]:
        for split in ("train", "test"):
            for k in range(20):
                folder = Path(root) / split / f"class{k:02d}"
                folder.mkdir(parents=True)
                for i in range(2):
                    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    if "imagenet" in command:
        for split in ("train", "val"):
            for k in range(1000):
                folder = Path("imagenet") / split / f"n{k:08d}"
                folder.mkdir(parents=True)
                os.link("data/cifar100/train/class00/0.png", folder / "0.png")
        command += " --image-size 16 --workers 0"
    for name in set(re.findall(r"[\w./-]+\.pth?\b", command)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        role = "teacher" if f"--teacher-ckpt {name}" in command else "student"
        network = re.search(rf"--{role} (\S+)", command)
        default = {"teacher": "resnet56", "student": "resnet20"}[role]
        teacher_file(name, network.group(1) if network else default, 20)
    command = re.sub(r"--train-size \d+", "", command)
    command = command.replace("--image-size 224", "")
    command = re.sub(r"--val-size \d+", "--val-size 20", command)
    command = command.replace("--seeds 0 1 2", "--seeds 1")
    command += " --epochs 1 --batch-size 20"
    command += "" if "--transfer" in command else " --teacher-epochs 1"
    command += " --train-size 48" if "shapes" in command else ""
    command += " --train-size 1000 --batch-size 500" if "imagenet" in command else ""
    program = SCRIPTS[script].program
    if "--resume" in command:  # of what?
        assert common.run_program(program, shlex.split(command.replace("--resume", ""))) == 0
    assert common.run_program(program, shlex.split(command)) == 0, capsys.readouterr().err


def test_commands_for_detection_are_understood():
    """Whole runs of them are in test_detect.py."""
    found = re.findall(r"^\s*python detect_nd\.py (.*)$", README + detect_nd.__doc__, re.M)
    lines = {re.split(r"\s{3,}|\s+#", line)[0].strip() for line in found} - {"--help"}
    assert len(lines) >= 3
    for line in lines:
        detect_nd.parse_args(shlex.split(line))


def test_the_command_for_several_processes_is_understood():
    """tests/test_ranks.py runs such commands."""
    [(script, flags)] = re.findall(r"^torchrun --nproc_per_node=\d+ (\w+)\.py (.*)$", README, re.M)
    assert SCRIPTS[script].parse_args(shlex.split(flags)).gather == "global"


def test_snippet_runs():
    scope = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S).group(1), scope)
    student, teacher = common.build_model("resnet8", 3), common.build_model("resnet8", 3)
    before = student.fc.weight.detach().clone()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    batches = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)] * 2
    scope["distill"](student, teacher, batches, optimizer, 3)
    assert not torch.equal(student.fc.weight, before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring(script, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_program(SCRIPTS[script].program, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and SCRIPTS[script].__doc__.strip() in text
    options = "--teacher --kd-weight --compare --seeds --resume --data-dir --nesterov --pretrained"
    assert all(option in text for option in options.split())


@pytest.mark.parametrize("script", [*SCRIPTS, "detect_nd"])
def test_importing_does_nothing(cwd, script, capfd):
    before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM), dict(os.environ)
    found = runpy.run_path(str(ROOT / f"{script}.py"), run_name=script)
    assert callable(found["kd_loss"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == before[1:]
    assert capfd.readouterr() == ("", "") and not list(cwd.iterdir())


def alike_blocks(script):
    text = (ROOT / f"{script}.py").read_text()
    found = re.findall(r"^ *# \[alike: (.+?)\]\n(.*?)^ *# \[end\]\n", text, re.S | re.M)
    assert len(found) == text.count("# [alike: ") == text.count("# [end]")
    return dict(found)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"nd"}))
def test_the_blocks_of_the_loop_meant_to_be_alike_are(script):
    wanted, blocks = alike_blocks("nd"), alike_blocks(script)
    assert list(wanted) == ["start", "teacher", "optimizer and epochs", "step"]
    assert blocks == wanted


def test_functions_of_the_same_name_are_the_same():
    """kd_loss and its like are repeated so that a block can be copied; here they are compared."""
    own = {"parse_args", "default_lr", "recipe_of", "method_name", "main", "program"}
    seen = {}
    scripts = [*SCRIPTS, "detect_nd"]
    for script in scripts:
        text = (ROOT / f"{script}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in own:
                seen.setdefault(node.name, {})[script] = ast.get_source_segment(text, node)
    assert len(seen["kd_loss"]) == len(seen["_full"]) == len(scripts)
    assert len(seen["nd_loss"]) == len(seen["hcl_loss"]) == 2
    for name, texts in seen.items():
        assert len(set(texts.values())) == 1, f"{name} differs between {' and '.join(texts)}"


def test_the_patent_is_mentioned_where_people_read():
    for text in (README, sp.__doc__):
        assert "11636337B2" in text and "commercial" in text
