"""What README and docstrings say to type works, and what they promise of the code is true."""

import hashlib
import importlib
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUICK, ROOT, lines, teacher_file
from PIL import Image

import common

SCRIPTS = ("nd", "sp", "dcd", "kd2m")
MODULES = {name: importlib.import_module(name) for name in (*SCRIPTS, "detect_nd")}
README = (ROOT / "README.md").read_text()
TEXTS = [README, *(module.__doc__ for module in MODULES.values())]
LARGE = "resnet56 resnet20 resnet32x4 resnet8x4 resnet34 resnet18 wrn_16_8 wrn_40_2".split()
SMALLER = dict.fromkeys(LARGE, "resnet8") | {"mobilenet_v3_large": "mobilenet_v3_small"}


def commands():
    """(script, arguments) of every command that people are told to type."""
    found = set()
    for text in TEXTS:
        # In a code block, the docstring's indented lines, or `...` of a table.
        for script, line in re.findall(r"python3? (\w+)\.py ([^`\n]*)", text):
            found.add((script, re.split(r"\s{3,}|\s+#", line)[0].strip()))
    elsewhere = ("--help", "--bench-metrics")  # tested below and in test_scripts.py
    found = sorted(c for c in found if c[0] in MODULES and c[1] not in elsewhere)
    assert {script for script, _ in found} == set(MODULES)
    return found


@pytest.mark.parametrize("script, command", [c for c in commands() if c[0] in SCRIPTS])
def test_commands_run(cwd, few_shapes, any_teacher_passes, monkeypatch, capsys, script, command):
    """As printed, then shortened: one epoch of few images, files of random pixels."""
    module = MODULES[script]
    rng = np.random.default_rng(0)
    splits = {}
    for name in ("cifar10", "stl10", "svhn"):  # no files of these: what torchvision would read
        images = torch.from_numpy(rng.integers(0, 256, (60, 32, 32, 3), np.uint8))
        splits[name] = common.Split(images, torch.arange(60) % 10)
    build = common.build_model

    def smaller(name, num_classes, pretrained=False):  # and nothing is downloaded
        return build("resnet8" if num_classes == 1000 else SMALLER.get(name, name), num_classes)

    monkeypatch.setattr(common, "build_model", smaller)
    read = lambda name, *_: (splits[name], splits[name], list("0123456789"))  # noqa: E731
    monkeypatch.setattr(common, "_read_torchvision", read)
    for root in ("data/cifar100", "my-images")[: 1 + ("my-images" in command)]:
        make_images(root, rng)
    if "imagenet" in command:
        for split in ("train", "val"):
            for k in range(1000):
                folder = Path("imagenet") / split / f"n{k:08d}"
                folder.mkdir(parents=True)
                os.link("data/cifar100/train/class00/0.png", folder / "0.png")
        command += " --image-size 16 --workers 0"
    if "--pretrained-teacher --teacher" in command:
        monkeypatch.setenv("TORCH_HOME", str(cwd))
        Path("hub/checkpoints").mkdir(parents=True)
        content = Path(teacher_file(classes=20)).read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:8]
        Path(f"hub/checkpoints/cifar100_resnet56-{digest}.pt").write_bytes(content)
        monkeypatch.setattr(common, "PUBLISHED", {"cifar100_resnet56": digest})
    for name in set(re.findall(r"[\w./-]+\.pth?\b", command)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        network = re.search(r"--student (\S+)", command) if "student" in name else None
        teacher_file(name, SMALLER.get(network.group(1)) if network else "resnet8", 20)
    command = re.sub(r"--val-size \d+", "--val-size 20", command)
    command = command.replace("--image-size 224", "").replace("--seeds 0 1 2", "--seeds 1")
    command += " --epochs 1 --batch-size " + ("500" if "imagenet" in command else "20")
    command += "" if "--transfer" in command else " --teacher-epochs 1"
    command += " --train-size 48" if "shapes" in command else ""
    command += " --train-size 1000" if "imagenet" in command else ""
    if "--resume" in command:  # of what?
        first = shlex.split(command.replace("--resume", ""))
        assert common.run_program(module.main, first) == 0
    assert common.run_program(module.main, shlex.split(command)) == 0, capsys.readouterr().err


def make_images(root, rng):
    for split in ("train", "test"):
        for k in range(20):
            folder = Path(root) / split / f"class{k:02d}"
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def test_commands_for_detection_are_understood():
    """Whole runs of them are in test_detect.py."""
    for script, command in commands():
        if script == "detect_nd":
            MODULES[script].parse_args(shlex.split(command))


def test_the_command_for_several_gpus_is_understood():
    """tests/test_ranks.py runs such commands."""
    found = re.findall(r"torchrun --nproc_per_node=\d+ (\w+)\.py ([^`\n]*)", README)
    for script, flags in found:
        assert MODULES[script].parse_args(shlex.split(flags)).resume is False
    assert found


def test_the_loop_in_the_readme_runs():
    scope = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S).group(1), scope)
    student, teacher = common.build_model("resnet8", 3), common.build_model("resnet8", 3)
    before = student.fc.weight.detach().clone()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    batches = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)] * 2
    means = scope["compute_class_means"](teacher, batches, 3)
    scope["train_epoch"](student, teacher, batches, optimizer, means)
    assert not torch.equal(student.fc.weight, before)


def test_a_method_of_ones_own(cwd, few_shapes, any_teacher_passes, monkeypatch):
    """The five steps of the README, with a toy loss."""
    source = (ROOT / "sp.py").read_text()
    start = source.index("def sp_loss")
    toy = "def my_loss(s, t):\n    return F.mse_loss(s.mean((2, 3)), t.detach().mean((2, 3)))"
    source = source[:start] + toy + source[source.index("\n\n\n", start) :]
    assert 'common.Parser("sp", __doc__)' in source
    for old, new in (
        ('Parser("sp"', 'Parser("my"'),
        ("sp_loss(", "my_loss("),
        ('"sp": "SP"', '"sp": "MY"'),
        ("sp_weight", "my_weight"),
        ("--sp-weight", "--my-weight"),
    ):
        source = source.replace(old, new)
    Path("my.py").write_text(source)
    monkeypatch.syspath_prepend(str(cwd))
    results = importlib.import_module("my").main(f"{QUICK} --epochs 1 --compare --out o".split())
    assert [r["method"] for r in results] == ["CE", "KD", "MY"]
    assert "sp" in lines("o")[0] and "sp" not in lines("o/kd")[0]
    assert results[2]["script"] == "my.py"


@pytest.mark.parametrize("script", MODULES)
def test_help_begins_with_the_docstring_and_names_defaults(script, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_program(MODULES[script].main, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and MODULES[script].__doc__.strip() in text
    for option in "--teacher --kd-weight --compare --seeds --resume --data-dir --out".split():
        assert option in text
    assert text.count("(default: ") + text.count("(default:\n") > 15
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("script", MODULES)
def test_the_order_of_a_script(script):
    """Docstring, loss by line 60, one flat run, the command line last; lengths as promised."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    first_loss = next(i for i, line in enumerate(lines, 1) if re.match(r"(def|class) ", line))
    assert first_loss <= 65 and len(MODULES[script].__doc__.splitlines()) <= 42
    names = re.findall(r"^(?:def|class) (\w+)", "\n".join(lines), re.M)
    assert names.index("kd_loss") < names.index("distill") < names.index("parse_args")
    assert names.index("parse_args") < names.index("main")
    assert lines[-2:] == ['if __name__ == "__main__":', "    sys.exit(common.run_program(main))"]
    longest = dict(nd=430, sp=330, dcd=420, kd2m=620, detect_nd=950)
    assert len(lines) <= longest[script] and max(map(len, lines)) <= 100


def test_common_knows_no_method():
    text = (ROOT / "common.py").read_text()
    assert not re.search(r"^\s*(import|from) (nd|sp|dcd|kd2m|detect_nd)\b", text, re.M)
    assert not re.search(r"\b(nd|sp|dcd|metric|reviewkd)_(weight|loss)\b", text)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "results/README.md", ROOT / "results/running.md"):
        text = re.sub(r"`[^`\n]*`|```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_patent_is_mentioned_where_people_read():
    for text in (README, MODULES["sp"].__doc__):
        assert "11636337B2" in text and "commercial" in text
