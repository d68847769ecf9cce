"""Data sets: order and augmentation, splits, image folders and their cache, ImageNet's stream."""

import argparse
import hashlib
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import struct
import zlib
from pathlib import Path
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
import torchvision
from helpers import forget_what_was_loaded, make_tree, result, run, same, shapes, stopped, weights
from PIL import Image

import common
import sp
from common import UserError


def load(**changes):
    """A data set, read anew."""
    args = dict(dataset="folder", data_dir="tree", image_size=32, train_size=None, val_size=None)
    args |= dict(mean=None, std=None)
    forget_what_was_loaded()
    return common.load_data(argparse.Namespace(**args | dict(workers=0, device="cpu") | changes))


def everything(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


def pixels(data, images):
    """What was normalised -> [B,S,S,3] uint8."""
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in common.STATS[data.name])
    return (images * std + mean).round().byte().permute(0, 2, 3, 1)


# --- synthetic images and batches ----------------------------------------------------------------


def test_shapes_are_the_images_that_committed_results_rest_on():
    digest = hashlib.sha256()
    for split in (common.draw_shapes(600, 0), common.draw_shapes(48, 1, 16)):
        digest.update(split.images.numpy())
        digest.update(split.labels.numpy())
    assert digest.hexdigest()[:16] == "296dfefa4c42ec83"
    images, labels = common.draw_shapes(1200, 7)
    assert labels.bincount().tolist() == [50] * 24 and len(common.SHAPE_CLASSES) == 24
    assert images.shape == (1200, 32, 32, 3) and images.dtype == torch.uint8
    assert len({image.tobytes() for image in images.numpy()}) == 1200  # no two alike


@pytest.mark.parametrize("dataset, flips", [("shapes", {False, True}), ("svhn", {False})])
def test_augmentation_equals_a_literal_loop(monkeypatch, dataset, flips):
    """Every image is a window of its zero-padded self, perhaps mirrored (but no digit is)."""
    split, seen = common.draw_shapes(64, 0), set()
    arrays = dict(data=split.images.permute(0, 3, 1, 2).numpy(), labels=split.labels.numpy() % 10)
    fake = mock.Mock(return_value=argparse.Namespace(**arrays))
    monkeypatch.setattr(torchvision.datasets, "SVHN", fake)
    data = load(dataset=dataset, train_size=64)
    for images, labels in data.batches("train", 16, seed=3, augment=True):
        for image, label in zip(pixels(data, images), labels):
            found = None
            for i in (data.train.labels == label).nonzero().flatten().tolist():
                padded = torch.zeros(40, 40, 3, dtype=torch.uint8)
                padded[4:36, 4:36] = data.train.images[i]
                windows = padded.unfold(0, 32, 1).unfold(1, 32, 1).permute(0, 1, 3, 4, 2)
                for flip in (False, True):
                    equal = (windows == (image.flip(1) if flip else image)).all((2, 3, 4))
                    if equal.any():
                        found = (i, *equal.nonzero()[0].tolist(), flip)
            assert found is not None
            seen.add(found)
    assert len({s[0] for s in seen}) == 64  # each image once
    assert {s[3] for s in seen} == flips and len({s[1:3] for s in seen}) > 30
    assert {s[1] for s in seen} == {s[2] for s in seen} == {*range(9)}  # every shift occurs


def test_pixels_are_normalised_as_the_field_does(few_shapes):
    assert common.STATS["cifar100"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert common.STATS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert common.STATS["svhn"] == ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    for name in ("imagenet", "folder"):
        assert common.STATS[name] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = shapes(train_size=60)
    images, labels = next(data.batches("train", 60))
    expected = (data.train.images.double() / 255 - 0.5) / 0.25
    assert torch.allclose(images.permute(0, 2, 3, 1).double(), expected, atol=1e-5)
    assert torch.equal(labels, data.train.labels)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_order_and_sizes_of_batches(few_shapes):
    data = shapes(train_size=60)
    one, two = (everything(data.batches("train", 32, seed=5))[1] for _ in range(2))
    other = everything(data.batches("train", 32, seed=6))[1]
    assert torch.equal(one, two) and not torch.equal(one, other) and len(one) == 60
    assert torch.equal(one.sort().values, data.train.labels.sort().values)
    whole = list(data.train_batches(8, 3, 0, 7))
    rest = list(data.train_batches(8, 3, 2, 5))
    assert [len(labels) for _, labels in whole] == [8] * 7 and len(rest) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:5], rest))
    data = shapes(train_size=33)  # a last batch of one is left out in training
    assert [len(labels) for _, labels in data.batches("train", 16, seed=0)] == [16, 16]
    assert [len(labels) for _, labels in data.batches("train", 16)] == [16, 16, 1]
    assert [data.steps(size) for size in (16, 11, 20, 64)] == [2, 3, 2, 1]


def test_evaluate_counts_the_largest_logit(few_shapes):
    data = shapes()
    torch.manual_seed(0)
    net = common.build_model("resnet8", 24)
    images, _ = next(data.batches("test", 24))
    with torch.no_grad():
        answers = net.eval()(images).tolist()
    said = [row.index(max(row)) for row in answers]
    wrong = [(k + 1) % 24 for k in said]
    data.test.labels.copy_(torch.tensor(said[:9] + wrong[9:]))
    args = argparse.Namespace(precision="fp32", device="cpu")
    assert common.evaluate(net.train(), data, args) == 37.5


# --- splits --------------------------------------------------------------------------------------


def test_train_size_is_even_over_classes_and_the_same_every_time(few_shapes):
    data = shapes(train_size=60)
    counts = data.train.labels.bincount(minlength=24)
    assert counts.min() == 2 and counts.max() == 3 and data.test_images == 24
    forget_what_was_loaded()
    assert shapes(train_size=60).fingerprint == data.fingerprint != shapes().fingerprint
    for size in (23, 73):
        with pytest.raises(UserError, match=f"--train-size {size}"):
            shapes(train_size=size)


def test_validation_images_come_from_the_training_set_alone(few_shapes):
    whole, usual = shapes(), shapes(train_size=30)
    data = shapes(train_size=30, val_size=24)
    assert torch.equal(data.train.images, usual.train.images)  # the same images to learn from
    assert data.test.labels.bincount().tolist() == [1] * 24
    known = {image.numpy().tobytes(): k for k, image in enumerate(whole.train.images)}
    held_out = [known[image.numpy().tobytes()] for image in data.test.images]
    assert torch.equal(whole.train.labels[held_out], data.test.labels)
    trained = {known[image.numpy().tobytes()] for image in data.train.images}
    assert len(set(held_out)) == 24 and not trained & set(held_out)
    assert shapes(val_size=24).train_images == 48
    for size in (23, 25):
        with pytest.raises(UserError, match=f"--val-size {size}"):
            shapes(val_size=size)
    with pytest.raises(UserError, match="--train-size 50"):
        shapes(train_size=50, val_size=24)


# --- image folders -------------------------------------------------------------------------------


def test_a_folder_is_decoded_once(cwd, capsys):
    tree = make_tree("tree")
    first = load()
    capsys.readouterr()
    assert load(workers=2).fingerprint == first.fingerprint
    assert "decoding" not in capsys.readouterr().out
    path = tree / "train/class1/train1_2.png"
    assert np.array_equal(first.train.images[6].numpy(), np.asarray(Image.open(path)))
    assert first.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and first.num_classes == 3
    # whatever changes a file makes another data set
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    second = load()
    assert second.fingerprint != first.fingerprint and second.train.images[6].sum() == 0
    for a, b in (("class0", "x"), ("class1", "class0"), ("x", "class1")):  # only paths differ
        (tree / "train" / a).rename(tree / "train" / b)
    images = load().train.images
    assert torch.equal(images[:8], torch.cat([second.train.images[4:8], second.train.images[:4]]))
    assert load(image_size=24).train.images.shape == (12, 24, 24, 3)


def test_images_of_every_mode(cwd, capsys):
    """Other sizes, grey and CMYK; what is left out or changed is counted, and hidden is nothing."""
    folder = make_tree("tree", size=40) / "train/class0"
    Image.fromarray(np.zeros((20, 50), np.uint8)).save(folder / "grey.png")
    Image.new("CMYK", (64, 48)).save(folder / "ink.jpg")
    (folder / "._0.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image")
    (folder.parent / ".cache").mkdir()
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (40, 40)).save(folder / ".ipynb_checkpoints/0.png")
    for name in ("a.gif", "b.jfif", "c.bmp"):
        Image.new("RGB", (40, 40)).save(folder / name, "jpeg" if "jfif" in name else None)
    (folder / "bad.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match="bad.jpg.*--skip-bad-images"):
        load()
    data = load(skip_bad_images=True)
    assert data.classes == ["class0", "class1", "class2"] and data.train_images == 17
    assert data.train.images.shape == (17, 32, 32, 3)
    said = capsys.readouterr().out
    for words in ("train: 17 images", "1 left out, not images (tree/train/class0/notes.txt)"):
        assert words in said
    for kind in ("left out, unreadable: {}bad.jpg", "L turned to RGB: {}grey.png"):
        assert f"train: {kind.format('tree/train/class0/')}\n" in data.report
    assert len(data.report.splitlines()) == 5  # and a palette, and the ink


def test_exif_says_which_side_is_up(cwd):
    exif = Image.Exif()
    exif[274] = 6
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:, 20:] = 255
    Image.fromarray(picture).save(make_tree("tree", size=40) / "val/class0/a.png", exif=exif)
    first = load().test.images[0].float()
    assert first[:12].mean() < 5 and first[-12:].mean() > 250


@pytest.mark.parametrize("layout", ["valid", "none"])
def test_other_names_of_the_splits(cwd, layout):
    tree = make_tree("tree")
    (tree / "val").rename(tree / "valid")
    if layout == "valid":
        assert load().test_images == 6
        return
    data = load(data_dir="tree/train", val_size=3)
    assert data.test_images == 3 and data.train_images == 9
    with pytest.raises(UserError, match="tree/train/train"):
        load(data_dir="tree/train")


def test_more_than_eight_bits_are_refused_never_clipped(cwd):
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    files = {"a.png": ramp, "b.pgm": ramp, "c.tif": ramp.astype(">u2"), "d.tif": ramp / 1.0}
    for name, values in (files | {"e.tif": ramp.astype(np.int32)}).items():
        values = values.astype(np.float32) if values.dtype == np.float64 else values
        Image.fromarray(values).save(name)
        with pytest.raises(UserError, match=f"{name}.*more than 8 bits"):
            common.read_rgb(name)


def test_sixteen_bits_a_colour_are_refused_too(cwd):
    """Pillow would cut them to 8 without a word."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header, rows = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), (b"\0" + bytes(12)) * 2
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    Path("a.png").write_bytes(content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="a.png.*more than 8 bits"):
        common.read_rgb("a.png")


def test_bad_folders_are_named(cwd):
    def fails(words):
        with pytest.raises((UserError, OSError), match=words) as error:
            load()
        assert "\n" not in str(error.value)

    fails("--data-dir.*train")
    tree = make_tree("tree")
    (tree / "train/empty").mkdir()
    fails("empty")
    (tree / "train/empty").rmdir()
    bad = tree / "train/class0/bad.png"
    bad.write_bytes((tree / "train/class0/train0_0.png").read_bytes()[:300])
    fails("bad.png")
    bad.unlink()
    bad.symlink_to("nowhere")
    fails("bad.png")
    bad.unlink()
    os.mkfifo(bad)  # nobody writes to it: not to be waited for
    fails("bad.png")
    bad.unlink()
    (tree / "val/class2").rename(tree / "val/class9")
    fails("class2|class9")


def test_tiny_imagenet_as_it_is_published(cwd, capsys):
    with pytest.raises(UserError, match="unpack https.*tiny-imagenet-200.zip in data/"):
        load(dataset="tinyimagenet", data_dir="data")
    tree = make_tree("data/tiny-imagenet-200", size=64, suffix="JPEG")
    ids = ["n02", "n01", "n10"]  # of class0, 1 and 2; classes are in the order of the ids
    (tree / "wnids.txt").write_text("\n".join(ids))
    (tree / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn09\tcat\nn02\tbull\n")
    rows, images = [], tree / "val/images"
    images.mkdir()
    for k, name in enumerate(ids):
        (tree / f"train/class{k}").rename(tree / f"train/{name}")
        (tree / f"train/{name}/images").mkdir()
        for path in sorted((tree / f"train/{name}").glob("*.JPEG")):
            path.rename(path.parent / "images" / path.name)
        (tree / f"train/{name}/{name}_boxes.txt").write_text("")
        for path in sorted((tree / f"val/class{k}").iterdir()):
            rows.append(f"{path.name}\t{name}\t0\t0\t9\t9")
            path.rename(images / path.name)
        (tree / f"val/class{k}").rmdir()
    (tree / "val/val_annotations.txt").write_text("\n".join(rows[::-1]) + "\n")
    Image.open(images / "val1_0.JPEG").convert("L").save(images / "val1_0.JPEG")  # some are grey
    data = load(dataset="tinyimagenet", data_dir="data", image_size=None)
    assert data.classes == ["goldfish", "bull", "n10"] and data.image_size == 64
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.images.shape[1] == 64
    printed = capsys.readouterr().out
    assert "train: 12 images; 3 left out, not images (" in printed and "n01_boxes.txt" in printed
    assert f"val: 6 images; 1 L turned to RGB ({images / 'val1_0.JPEG'})\n" in printed
    small = load(dataset="tinyimagenet", data_dir="data")  # as for dcd.py --transfer
    assert small.image_size == 32 and small.num_classes == 3


def test_own_mean_and_standard_deviation(cwd):
    make_tree("tree")
    usual, own = load(), load(mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.3])
    images, _ = everything(own.batches("test", 4))
    raw = pixels(usual, everything(usual.batches("test", 4))[0]) / 255
    wanted = (raw - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(images, wanted.permute(0, 3, 1, 2), rtol=0, atol=1e-4)
    assert own.fingerprint != usual.fingerprint  # teachers and caches are of other inputs
    assert load(mean=[0.485, 0.456, 0.406]).fingerprint == usual.fingerprint


def test_no_data_and_no_network(cwd, monkeypatch):
    for error, words in (
        (OSError("no route to host"), "--dataset svhn.*no route.*--dataset shapes needs no files"),
        (ModuleNotFoundError("No module named 'scipy'"), "No module named 'scipy'"),
    ):
        monkeypatch.setattr(torchvision.datasets, "SVHN", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match=words):
            load(dataset="svhn")


def test_official_cifar_files(cwd, monkeypatch):
    """The layout of cifar-100-python, written here; only its checksums are not the real ones."""
    folder, rng = Path("data/cifar-100-python"), np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", 200), ("test", 100)):
        rows = rng.integers(0, 256, (count, 3072), np.uint8)
        labels = [i % 100 for i in range(count)]
        (folder / split).write_bytes(pickle.dumps({"data": rows, "fine_labels": labels}))
    names = [f"c{i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    data = load(dataset="cifar100", data_dir="data")
    assert data.train.images.shape == (200, 32, 32, 3) and data.num_classes == 100
    first = pickle.loads((folder / "train").read_bytes())["data"][0].reshape(3, 32, 32)
    assert np.array_equal(data.train.images[0].permute(2, 0, 1).numpy(), first)


# --- ImageNet: decoded in every pass -------------------------------------------------------------

STREAM = "--dataset imagenet --data-dir tree --image-size 16 --teacher resnet8 --student resnet8"
STREAM += " --epochs 2 --teacher-epochs 1 --batch-size 6"
OPTIONS = dict(seed=3, augment=True)


@pytest.fixture
def tree(cwd):
    """30 train and 12 test images of three classes: sizes and forms as they come."""
    return make_tree("tree", train=10, test=4, size=(30, 70), suffix="JPEG")


def stream(**changes):
    return load(**dict(dataset="imagenet") | changes)


def test_a_test_image_is_resized_and_its_centre_cut(tree):
    images, labels = everything(stream(image_size=28).batches("test", 5))
    files = sorted(tree.glob("val/*/*.JPEG"))
    assert len(images) == len(files) == 12 and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in common.STATS["imagenet"])
    for image, path in zip(images, files):
        with Image.open(path) as file:
            scale = 32 / min(file.size)
            size = [max(32, int(side * scale)) for side in file.size]
            values = np.array(file.resize(size, Image.Resampling.BILINEAR))
        top, left = (round((side - 28) / 2) for side in values.shape[:2])
        wanted = torch.from_numpy(values[top : top + 28, left : left + 28]).permute(2, 0, 1) / 255
        torch.testing.assert_close(image, (wanted - mean) / std, rtol=0, atol=1e-5)


def test_batches_do_not_depend_on_the_workers(tree):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = everything(stream().batches("train", 7, **OPTIONS))
    several = everything(stream(workers=2).batches("train", 7, **OPTIONS))
    assert torch.equal(alone[0], several[0]) and torch.equal(alone[1], several[1])
    assert alone[1].bincount().tolist() == [10, 10, 10]
    another = everything(stream().batches("train", 7, seed=4, augment=True))
    assert not torch.equal(another[1], alone[1])
    assert torch.equal(before, torch.get_rng_state())  # decoding draws nothing from the run
    rest = list(stream().batches("train", 7, first=2, **OPTIONS))
    assert torch.equal(everything(rest)[0], alone[0][14:]) and len(rest) == 3


def test_an_image_is_cut_and_flipped_otherwise_in_each_pass(tree):
    """One image, red at the left: crops of many sizes, half of them flipped."""
    values = np.zeros((60, 60, 3), np.uint8)
    values[:, :, 0] = np.linspace(255, 0, 60)[None]
    for path in tree.glob("train/*/*.JPEG"):
        Image.fromarray(values).save(path, quality=95)
    data = stream()
    passes = [everything(data.batches("train", 30, seed=s, augment=True))[0] for s in (0, 1)]
    slope = torch.cat(passes)[:, 0].mean(1)  # [60,S]: red from left to right
    slope = slope[:, -1] - slope[:, 0]
    assert 15 < (slope > 0).sum() < 45  # flipped
    assert slope.abs().min() < 0.75 * slope.abs().max()  # wide and narrow parts
    assert len({round(s, 3) for s in slope.tolist()}) > 50


@pytest.mark.parametrize("script", ["nd", "sp", "dcd", "kd2m"])
def test_every_script_streams_and_resumes_within_an_epoch(script, tree, any_teacher_passes):
    command = f"{STREAM} --workers 0 --out"
    assert run(script, command, "a") == 0
    r = result("a")
    assert (r["train_images"], r["test_images"], r["dataset"]) == (30, 12, "imagenet")
    assert stopped(script, command, "b", step=7) == 143  # the second epoch's second step
    assert run(script, command, "b", "--resume") == 0
    assert same(weights("a/student.pt"), weights("b/student.pt"))
    assert helpers.timeless("a") == helpers.timeless("b")


def test_a_damaged_image_is_named(tree, capsys, any_teacher_passes):
    name = "train1_3.JPEG"
    (tree / "train/class1" / name).write_bytes(b"nothing")
    for workers in "01":
        assert run("sp", f"{STREAM} --sp-weight 0 --workers {workers}") == 2
        assert name in helpers.error_line(capsys)
    data = stream(skip_bad_images=True)  # left out before the training begins
    assert data.train_images == 29 and name not in "".join(data.train.images)
    assert "left out, unreadable" in data.report and name in data.report


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers unpatched")
def test_a_killed_worker_is_one_line(tree, monkeypatch, capsys, any_teacher_passes):
    parent, read = os.getpid(), common.read_rgb

    def killed(path):
        if os.getpid() != parent and "train" in Path(path).parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    monkeypatch.setattr(common, "read_rgb", killed)
    assert run("sp", f"{STREAM} --sp-weight 0 --workers 1") == 2
    assert re.search("a DataLoader worker was killed.*--workers", helpers.error_line(capsys))


def test_a_signal_to_the_whole_job_saves(tree, any_teacher_passes):
    """Schedulers signal every process of a job, so the workers that decode too."""
    command = f"{STREAM} --workers 1 --sp-weight 0 --out"
    assert run("sp", command, "a") == 0

    def before():
        os.setsid()  # a group of its own
        helpers.signal_at(6, signal.SIGTERM, whole_group=True)

    process = helpers.forked(sp.main, shlex.split(f"{command} c"), before)
    process.join(120)
    assert process.exitcode == 143
    assert run("sp", command, "c", "--resume") == 0
    assert same(weights("a/student.pt"), weights("c/student.pt"))
