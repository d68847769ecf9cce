"""Broken and hostile files, drawn by hypothesis: an error of one line or the right result."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUICK, result, same, teacher_file, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import nd

SOME = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples every time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.usefixtures("few_shapes")


def net(name="resnet8", classes=5):
    torch.manual_seed(0)
    return common.build_model(name, classes)


def checkpoint():
    buffer = io.BytesIO()
    torch.save({"model": net().state_dict()}, buffer)
    return buffer.getvalue()


WHOLE = checkpoint()


def loads_right_or_is_refused(content):
    """-> whether it was loaded; then with the very weights that were saved."""
    Path("x.pt").write_bytes(content)
    model = common.build_model("resnet8", 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        common.load_weights(model, "x.pt")
    except common.UserError as error:
        assert "x.pt" in str(error) and "\n" not in str(error)
        assert same(model.state_dict(), before)  # not half of it
        return False
    assert same(model.state_dict(), net().state_dict())
    return True


@SOME
@given(st.integers(0, len(WHOLE) - 1))
def test_a_checkpoint_cut_anywhere(cwd, length):
    assert not loads_right_or_is_refused(WHOLE[:length])


@SOME
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
def test_a_checkpoint_with_a_flipped_bit(cwd, place, bit):
    content = bytearray(WHOLE)
    content[place] ^= 1 << bit
    loads_right_or_is_refused(bytes(content))


@SOME
@given(st.binary(max_size=300))
def test_any_bytes_are_no_checkpoint(cwd, content):
    assert not loads_right_or_is_refused(content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
    assert not loads_right_or_is_refused(buffer.getvalue())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)


@SOME
@given(values, st.sampled_from(["", "model", "state_dict", "student", "state"]))
def test_a_foreign_checkpoint(cwd, value, key):
    buffer = io.BytesIO()
    torch.save({key: value} if key else value, buffer)
    assert not loads_right_or_is_refused(buffer.getvalue())
    assert not loads_right_or_is_refused(pickle.dumps(value))


@SOME
@given(
    st.sampled_from(sorted(net().state_dict())), st.sampled_from(["gone", "shape", "other", "text"])
)
def test_one_entry_wrong(cwd, name, how):
    state = net().state_dict()
    old = state.pop(name)
    if how == "shape":
        state[name] = torch.zeros(*old.shape, 2)
    elif how == "other":
        state[name + "x"] = old
    elif how == "text":
        state[name] = "weights"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    loaded = loads_right_or_is_refused(buffer.getvalue())
    assert loaded == (how == "gone" and name.endswith("num_batches_tracked"))


class Exploding:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize("place", ["model", "extra", "bare"])
def test_code_in_a_checkpoint_is_never_run(cwd, place):
    state = net().state_dict()
    value = {
        "model": {"model": {**state, "x": Exploding()}},
        "extra": {"model": state, "e": Exploding()},
        "bare": Exploding(),
    }[place]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    assert not loads_right_or_is_refused(buffer.getvalue())
    assert not loads_right_or_is_refused(pickle.dumps(value))
    assert not Path("exploded").exists()


# --- image trees ---------------------------------------------------------------------------------


def picture(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    "png": picture("PNG"),
    "jpg": picture("JPEG"),
    "webp": picture("WEBP"),
    "bmp": picture("BMP"),
}


@SOME
@given(st.sampled_from(sorted(PICTURES)), st.floats(0, 1, exclude_max=True))
def test_an_image_cut_anywhere(cwd, kind, share):
    content = PICTURES[kind]
    path = Path(f"x.{kind}")
    path.write_bytes(content[: int(share * len(content))])
    try:
        decoded = common._decode(str(path), 32)
    except common.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    path.write_bytes(content)  # nothing that matters was cut off
    assert np.array_equal(decoded, common._decode(str(path), 32))


def tree(root="tree", classes=("a", "b")):
    for split in ("train", "val"):
        for name in classes:
            folder = Path(root, split, name)
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(2):
                (folder / f"{i}.png").write_bytes(PICTURES["png"])
    return Path(root)


letters = st.characters(codec="utf-8", exclude_characters="/\x00", exclude_categories=("Cs",))
names = st.text(letters, min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))


@SOME
@given(names, st.sampled_from(["", "train", "val", "train/a", "val/b"]), st.binary(max_size=9))
def test_stray_files_are_ignored_or_named(tmp_path_factory, monkeypatch, name, where, content):
    monkeypatch.chdir(tmp_path_factory.mktemp("tree"))
    root = tree()
    try:
        (root / where / name).write_bytes(content)
    except OSError:  # a name that this file system does not take, or that is taken
        return
    try:
        train, test, classes = common._read_trees(root, 32, 1)
    except common.UserError as error:  # its name says that it is an image, and it is none
        assert name.lower().endswith(common.torchvision.datasets.folder.IMG_EXTENSIONS)
        assert "\n" not in str(error).replace(name, "")
        return
    assert classes == ["a", "b"] and len(train.labels) == 4 == len(test.labels)


@SOME
@given(names.filter(lambda n: n[0] != "." and n not in "ab"), st.sampled_from(["train", "val"]))
def test_a_class_in_one_split_only_is_named(tmp_path_factory, monkeypatch, name, split):
    monkeypatch.chdir(tmp_path_factory.mktemp("tree"))
    root = tree()
    try:
        (root / split / name).mkdir()
        (root / split / name / "0.png").write_bytes(PICTURES["png"])
    except OSError:
        return
    with pytest.raises(common.UserError, match="every class needs images in both"):
        common._read_trees(root, 32, 1)


@pytest.mark.parametrize("how", ["dangling link", "no permission"])
def test_an_unreadable_image_is_named(cwd, how, capsys):
    path = tree() / "train/a/0.png"
    if how == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        path.chmod(0)
    else:
        path.unlink()
        path.symlink_to("nowhere")
    command = "--dataset folder --data-dir tree --teacher resnet8 --student resnet8 --epochs 1"
    assert common.run_program(nd.program, command.split()) == 2
    assert "tree/train/a/0.png" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_cache_of_decoded_images_is_made_again(cwd):
    root = tree()
    whole, _, _ = common._read_trees(root, 32, 1)
    cache = root / ".decoded-train-32.pt"
    content = cache.read_bytes()
    for damaged in (content[:100], content[:-10], b"", bytes(len(content))):
        cache.write_bytes(damaged)
        again, _, _ = common._read_trees(root, 32, 1)
        assert torch.equal(again.images, whole.images)


# --- files of a run ------------------------------------------------------------------------------


@SOME
@given(st.floats(0, 1, exclude_max=True))
def test_a_result_cut_anywhere_is_named_by_the_table(cwd, share):
    whole = {"method": "KD", "dataset": "d", "train_images": 9, "epochs": 1, "teacher": "t",
             "student": "s", "teacher_top1": 1.0, "student_top1": 2.0}  # fmt: skip
    text = json.dumps(whole)
    Path("r.json").write_text(text[: int(share * len(text))])
    with pytest.raises(common.UserError, match="r.json"):
        common.print_table(["r.json"])


def test_damaged_files_of_a_finished_run_are_written_again(cwd, any_teacher_passes):
    teacher_file()
    command = f"{QUICK} --epochs 2 --teacher-ckpt teacher.pth --out o".split()
    assert common.run_program(nd.program, command) == 0
    before, lines = result("o"), Path("o/metrics.jsonl").read_text()
    student = weights("o/student.pt")
    Path("o/result.json").write_text(json.dumps(before)[:100])
    Path("o/metrics.jsonl").write_text(lines[: len(lines) // 2])
    Path("o/student.pt").unlink()
    assert common.run_program(nd.program, [*command, "--resume"]) == 0
    assert Path("o/metrics.jsonl").read_text() == lines and same(weights("o/student.pt"), student)
    assert result("o")["student_top1"] == before["student_top1"]
