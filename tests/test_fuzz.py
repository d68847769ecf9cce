"""Hostile arguments, drawn by hypothesis: an error of one line or the right result.

In a test run, the same few examples every time; more, and others, with

    python -m pytest tests/test_fuzz.py --hypothesis-profile long
"""

import copy
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import forget_what_was_loaded, module, same
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import common
import detect_nd
import sp

SCRIPTS = ["nd", "sp", "dcd", "kd2m", "detect_nd"]
WORDS = "resnet8 resnet56 vgg8 cifar100 shapes imagenet 0 1 2 -1 0.5 1e9 1e-400 nan inf 1e300 paper"
WORDS = WORDS.split() + ["kd", "cpu", "bf16", "w2_empirical", "", " ", "\0", "é", "--", "9" * 40]


def flags(script):
    """Every flag of a script, as its source has them."""
    code = Path(common.__file__).with_name(f"{script}.py").read_text()
    code += "" if script == "detect_nd" else Path(common.__file__).read_text()
    found = re.findall(r'"--([a-z0-9-]+)"', code)
    return sorted({f"--{name}" for name in found} - {"--bench-metrics"})  # which is no run


def command(script):
    word, flag = st.sampled_from(WORDS) | st.text(max_size=5), st.sampled_from(flags(script))
    part = st.tuples(flag) | st.tuples(flag, word)
    return st.tuples(st.just(script), st.lists(part | st.tuples(word), max_size=4))


@given(st.one_of([command(script) for script in SCRIPTS]))
def test_any_arguments_are_taken_or_refused_in_one_line(cwd, capsys, line):
    """Only the runs themselves are left out."""
    (script, arguments), launched = line, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", lambda _, args, *more, **named: launched.append(args))
        status = common.run_program(module(script).main, [w for part in arguments for w in part])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if status == 0:
        [args] = launched
        assert args.batch_size >= 2 and args.epochs >= 1 and args.lr > 0 and args.method
    else:
        assert status == 2 and not launched
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert captured.err.count("error: ") == 1
    assert not list(cwd.iterdir())


WHOLE = common.build_model("resnet8", 10).state_dict()
BUFFER = io.BytesIO()
torch.save(WHOLE, BUFFER)
CONTENT = BUFFER.getvalue()


@example(22, 1)  # "zipfiles that span multiple disks"
@given(st.integers(0, 4000) | st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_a_checkpoint_with_one_byte_changed_is_refused_or_the_same(cwd, position, change):
    content = bytearray(CONTENT)
    content[-1 - position] ^= change  # most are in the table of contents, at the end
    Path("x.pth").write_bytes(content)
    net = common.build_model("resnet8", 10)
    try:
        common.load_weights(net, "x.pth")
    except common.UserError as error:
        assert "x.pth" in str(error) and "\n" not in str(error)
    else:  # the change was between the parts of the archive
        assert same(net.state_dict(), WHOLE)


TABLE = {
    "images": [dict(id=i, file_name=f"{i}.png", width=8, height=6) for i in (1, 2, 3)],
    "categories": [dict(id=k, name=f"class{k}") for k in (1, 2)],
    "annotations": [
        dict(id=i, image_id=i, category_id=1 + i % 2, bbox=[1, 1, 4, 3], area=12, iscrowd=0)
        for i in (1, 2, 3)
    ],
}
PLACES = [(kind, key) for kind, entries in TABLE.items() for key in entries[0]]
GONE = object()
ODD = [GONE, None, -1, 0, 2, 7.5, 1e300, math.nan, math.inf, 2**70, True, "", "1", "2.0", "x", {}]
ODD = st.sampled_from([*ODD, [], "2.png", "no.png", "a/1.png", "\0"])
CHANGE = st.tuples(st.sampled_from(PLACES), st.integers(0, 2), ODD | st.lists(ODD, max_size=5))


@given(st.lists(CHANGE, max_size=3), st.booleans())
def test_any_coco_file_is_read_rightly_or_refused_in_one_line(cwd, capsys, changes, skip):
    table = copy.deepcopy(TABLE)
    for (kind, key), index, value in changes:
        entry = table[kind][index % len(table[kind])]
        value = [x for x in value if x is not GONE] if isinstance(value, list) else value
        entry.update({key: value}) if value is not GONE else entry.pop(key, None)
    Path("annotations").mkdir(exist_ok=True)
    Path("train2017").mkdir(exist_ok=True)
    Path("annotations/instances_train2017.json").write_text(json.dumps(table))
    for i in (1, 2, 3):
        Image.new("RGB", (8, 6)).save(f"train2017/{i}.png")
    try:
        images = detect_nd._read_split(Path(), "train2017", skip, False, 0)[3]
    except (common.UserError, OSError) as error:
        assert changes and "\n" not in str(error)
        return
    assert len({image["id"] for image in images}) == len(images) and (skip or len(images) == 3)
    for boxes, labels in ((image["boxes"], image["labels"]) for image in images):
        assert len(boxes) == len(labels) and set(labels.tolist()) <= {0, 1, 2, 2**62}
        assert (boxes[:, 2:] > boxes[:, :2]).all() and torch.isfinite(boxes).all()


def encoded(mode, ending="PNG"):
    Image.new(mode, (9, 7)).save(buffer := io.BytesIO(), ending)
    return buffer.getvalue()


GOOD = {"a.png": encoded("RGB"), "b.PNG": encoded("P"), "c.jpg": encoded("L", "JPEG")}
BAD = {"cut.png": encoded("RGB")[:45], "empty.jpg": b"", "deep.png": encoded("I;16")}
OTHER = {"text.txt": b"x", "no_ending": b"", ".hidden.png": encoded("RGB")}
FILES = GOOD | BAD | OTHER
TREE = st.tuples(*(st.sampled_from(x) for x in (["train", "val"], "xy", ["", "in"], list(FILES))))
ALWAYS = {(split, k, "", "a.png") for split in ("train", "val") for k in "xy"}


@given(st.sets(TREE, max_size=8), st.booleans())
def test_any_folder_is_read_wholly_or_refused_in_one_line(cwd, capsys, tree, skip):
    tree = tree | ALWAYS
    shutil.rmtree("tree", ignore_errors=True)
    for *folders, name in tree:
        folder = Path("tree", *folders)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(FILES[name])
    forget_what_was_loaded()
    argv = ["--dataset", "folder", "--data-dir", "tree", *["--skip-bad-images"] * skip]
    try:
        data = common.load_data(sp.parse_args(argv))
    except common.UserError as error:
        assert "\n" not in str(error) and not skip and any(name in BAD for *_, name in tree)
        return
    for split in ("train", "val"):
        wanted = [k for s, k, _, name in tree if s == split and name in GOOD]
        labels = (data.train if split == "train" else data.test).labels.tolist()
        assert sorted("xy"[label] for label in labels) == sorted(wanted)
    for *_, name in tree:
        assert (name in data.report) == (name not in ("a.png", ".hidden.png"))
