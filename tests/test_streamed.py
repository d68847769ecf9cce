"""ImageNet's path: trees that are decoded in every pass, recipes, pretrained teachers."""

import multiprocessing
import os
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import TIMES, forked, lines, result, same, stop_in, weights
from PIL import Image

import common
import dcd
import kd2m
import nd
import sp

CPU = torch.device("cpu")
QUICK = "--dataset imagenet --data-dir tree --image-size 16 --teacher resnet8 --student resnet8"
QUICK = f"{QUICK} --epochs 2 --teacher-epochs 1 --batch-size 6 --workers 0".split()


@pytest.fixture
def tree(cwd):
    """30 train and 12 test images of three classes: sizes and forms as they come."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for k in range(3):
            folder = Path("tree") / split / f"n{k:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(30, 70, 2)
                noise = rng.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{split}{k}_{i}.JPEG", quality=95)
    return Path("tree")


def load(workers=0, size=32, **more):
    args = dict(dataset="imagenet", data_dir="tree", image_size=size, workers=workers)
    args |= dict(train_size=None, val_size=None)
    return common._imagenet(type("", (), args | more), CPU)


def everything(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


def test_a_test_image_is_resized_and_its_centre_cut(tree):
    data = load(size=28)
    images, labels = everything(data.batches("test", 5))
    files = sorted(tree.glob("val/*/*.JPEG"))
    assert len(images) == len(files) == 12 and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in common.IMAGENET_STATS)
    for image, path in zip(images, files):
        with Image.open(path) as file:
            width, height = file.size
            scale = 32 / min(width, height)
            size = (max(32, int(width * scale)), max(32, int(height * scale)))
            pixels = np.array(file.resize(size, Image.Resampling.BILINEAR))
        top, left = (round((side - 28) / 2) for side in pixels.shape[:2])
        wanted = torch.from_numpy(pixels[top : top + 28, left : left + 28]).permute(2, 0, 1) / 255
        torch.testing.assert_close(image, (wanted - mean) / std, rtol=0, atol=1e-5)


def test_batches_do_not_depend_on_the_workers(tree):
    options = dict(seed=3, augment=True)
    alone = everything(load(0).batches("train", 7, **options))
    several = everything(load(2).batches("train", 7, **options))
    assert torch.equal(alone[0], several[0]) and torch.equal(alone[1], several[1])
    assert alone[1].bincount().tolist() == [10, 10, 10]
    another = everything(load(0).batches("train", 7, seed=4, augment=True))
    assert not torch.equal(another[1], alone[1])


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="a Linux folder")
def test_little_shared_memory_will_do(tree, monkeypatch):
    options, sent = dict(seed=3, augment=True), []
    wanted = everything(load(1).batches("train", 7, **options))
    from_numpy = torch.from_numpy
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    monkeypatch.setattr(torch, "from_numpy", lambda x: sent.append(len(x)) or from_numpy(x))
    found = everything(load(1).batches("train", 7, **options))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert sent == [n for count in (7, 7, 7, 7, 2) for n in (count, count)]  # images, labels


def test_workers_start_while_signals_wait(tree, monkeypatch):
    loader, blocked = torch.utils.data.DataLoader, []

    def spy(self):
        blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return start(self)

    start = loader.__iter__
    monkeypatch.setattr(loader, "__iter__", spy)
    list(load(1).batches("test", 6))
    assert blocked[0] >= {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & blocked[0]


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers unpatched")
def test_a_killed_worker_is_one_line(tree, monkeypatch, capsys, any_teacher_passes):
    parent, read = os.getpid(), common.read_rgb

    def killed(path):
        if os.getpid() != parent and "train" in Path(path).parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    monkeypatch.setattr(common, "read_rgb", killed)
    command = [*QUICK, *"--kd-weight 0 --sp-weight 0 --workers 1".split()]
    assert common.run_program(sp.program, command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a process that decodes images was killed")


def test_other_pictures_or_sizes_are_other_data(tree):
    whole = load(0)
    assert load(0).fingerprint == whole.fingerprint != load(0, size=16).fingerprint
    Image.new("RGB", (40, 40)).save(tree / "train/n00000001/train1_3.JPEG")
    assert load(0).fingerprint != whole.fingerprint


def test_decoding_draws_nothing_from_the_run(tree, monkeypatch):
    torch.manual_seed(0)
    reseeded = "the GPUs' generators too"
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail(reseeded))
    before = torch.get_rng_state()
    everything(load(0).batches("train", 7, seed=3, augment=True))
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_is_cut_and_flipped_otherwise_in_each_pass(tree):
    """One picture, red at the left: crops of many sizes, half of them flipped."""
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(255, 0, 60)[None]
    for path in tree.glob("train/*/*.JPEG"):
        Image.fromarray(pixels).save(path, quality=95)
    data = load(0)
    images, _ = everything(data.batches("train", 30, seed=0, augment=True))
    more, _ = everything(data.batches("train", 30, seed=1, augment=True))
    slope = torch.cat([images, more])[:, 0].mean(1)  # [60,S]: red from left to right
    slope = slope[:, -1] - slope[:, 0]
    assert 15 < (slope > 0).sum() < 45  # flipped
    assert slope.abs().min() < 0.75 * slope.abs().max()  # wide and narrow parts
    assert len({round(s, 3) for s in slope.tolist()}) > 50


def test_the_rest_of_a_pass_is_the_end_of_the_whole(tree):
    options = dict(seed=3, augment=True)
    whole = list(load(0).batches("train", 7, **options))
    rest = list(load(0).batches("train", 7, first=2, **options))
    assert len(whole) == 5 and len(rest) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest))


def test_processes_share_every_batch(tree, monkeypatch):
    options = dict(seed=3, augment=True, shared=True)
    whole = list(load(0).batches("train", 7, **options))
    monkeypatch.setattr(common, "world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        shares.append(list(load(0).batches("train", 7, **options)))
    assert len(whole) == 5 and len(shares[0]) == len(shares[1]) == 4  # the last, of two: left out
    for batch, first, second in zip(whole, *shares):
        assert torch.equal(batch[0], torch.cat([first[0], second[0]]))
        assert torch.equal(batch[1], torch.cat([first[1], second[1]]))
        assert (len(first[1]), len(second[1])) == (3, 4)


def test_pictures_of_each_class(tree):
    data = load(0)
    images, labels = data.test_batch(per_class=2, classes=3)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    whole, _ = everything(data.batches("test", 5))
    assert torch.equal(images, whole[[0, 1, 4, 5, 8, 9]])
    assert torch.equal(data.first_images(3), whole[:3])


def test_a_part_of_the_training_images(tree):
    data = load(0, train_size=7)
    assert data.train.labels.bincount().tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    assert len(data.train.images) == 7 and data.fingerprint != load(0).fingerprint


def test_images_are_kept_out_of_training(tree):
    whole, data = load(0), load(0, val_size=5)
    assert sorted(data.train.images + data.test.images) == sorted(whole.train.images)
    assert data.test.labels.bincount().tolist() in ([2, 2, 1], [2, 1, 2], [1, 2, 2])
    of = dict(zip(whole.train.images, whole.train.labels.tolist()))
    assert [of[path] for path in data.test.images] == data.test.labels.tolist()


def test_a_damaged_image_is_named(tree, capsys, any_teacher_passes):
    (tree / "train/n00000001/train1_3.JPEG").write_bytes(b"nothing")
    assert common.run_program(sp.program, [*QUICK, *"--sp-weight 0 --workers 1".split()]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "train1_3.JPEG" in error and "Traceback" not in error


@pytest.mark.parametrize("script", [nd, sp, dcd, kd2m])
def test_every_script_runs_and_resumes_within_an_epoch(
    script, tree, monkeypatch, any_teacher_passes
):
    assert common.run_program(script.program, [*QUICK, "--out", "a"]) == 0
    r = result("a")
    assert (r["train_images"], r["test_images"], r["dataset"]) == (30, 12, "imagenet")
    with monkeypatch.context() as patch:
        stop_in(patch, 7)  # the second epoch's second step
        assert common.run_program(script.program, [*QUICK, "--out", "b"]) == 143
    assert common.read_checkpoint("b/last.pt")["step"] == 2
    assert common.run_program(script.program, [*QUICK, "--out", "b", "--resume"]) == 0
    assert same(weights("a/student.pt"), weights("b/student.pt"))
    timeless = [[{k: v for k, v in x.items() if k not in TIMES} for x in lines(p)] for p in "ab"]
    assert timeless[0] == timeless[1]


def test_a_signal_to_the_whole_job_saves(tree, monkeypatch, any_teacher_passes):
    """Schedulers signal every process of a job, so the workers that decode too."""
    command, sent = [*QUICK, "--workers", "1", "--out"], []
    assert common.run_program(sp.program, [*command, "a"]) == 0
    add = common.Meter.add

    def job(argv):
        os.setsid()  # a group of its own
        sp.program(argv)

    def signalled(self, *a):
        if self.epoch == 1 and not sent:
            sent.append(os.killpg(0, number))
            time.sleep(0.3)  # for the workers to die, if they do
        add(self, *a)

    monkeypatch.setattr(common.Meter, "add", signalled)
    number = signal.SIGHUP
    before = signal.signal(number, signal.SIG_IGN)  # as under nohup
    process = forked(job, shlex.join([*command, "b"]))
    signal.signal(number, before)
    process.join()
    assert process.exitcode == 0 and same(weights("a/student.pt"), weights("b/student.pt"))
    number = signal.SIGTERM
    process = forked(job, shlex.join([*command, "c"]))
    process.join()
    assert process.exitcode == 143 and common.read_checkpoint("c/last.pt")["step"] == 1
    monkeypatch.setattr(common.Meter, "add", add)
    assert common.run_program(sp.program, [*command, "c", "--resume"]) == 0
    assert same(weights("a/student.pt"), weights("c/student.pt"))


def test_class_means_of_a_streamed_set(tree):
    data = load(0)
    torch.manual_seed(0)
    teacher = common.build_model("resnet8", 3).eval()
    means = nd.compute_class_means(teacher, data.batches("train", 4), 3)
    images, labels = everything(data.batches("train", 4))
    with torch.no_grad():
        embedding = teacher(images, return_features=True)[1].embedding.double()
    for k in range(3):
        torch.testing.assert_close(means[k], embedding[labels == k].mean(0).float())


RECIPES = {
    nd: dict(epochs=100, batch_size=512, lr=0.2, weight_decay=1e-4, temperature=1.0, nesterov=True),
    sp: dict(epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4, nesterov=False),
    dcd: dict(epochs=120, batch_size=256, lr=0.1, weight_decay=1e-4, nesterov=False),
    kd2m: dict(epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4, nesterov=False),
}


@pytest.mark.parametrize("script", RECIPES)
def test_recipes(script):
    args = script.parse_args(["--dataset", "imagenet"])
    assert {k: getattr(args, k) for k in RECIPES[script]} == RECIPES[script]
    assert (args.teacher, args.student) == ("resnet34", "resnet18")
    assert script.parse_args(["--dataset", "imagenet", "--epochs", "3"]).epochs == 3


def test_nd_has_the_papers_weights(capsys):
    pairs = {("resnet34", "kd"): (2.5, 1.0), ("resnet50", "dkd"): (1.0, 2.0)}
    pairs |= {("resnet152", "kd"): (4.0, 2.0), ("resnet101", "reviewkd"): (3.0, 1.0)}
    for (teacher, base), wanted in pairs.items():
        args = nd.parse_args(["--dataset", "imagenet", "--teacher", teacher, "--base", base])
        assert (args.kd_weight, args.nd_weight) == wanted
    args = nd.parse_args(["--dataset", "imagenet", "--teacher", "resnext50_32x4d"])
    assert (args.kd_weight, args.nd_weight) == (2.5, 1.0)
    assert "so those of resnet34 resnet18" in capsys.readouterr().out


def test_drops_of_imagenet(tree, any_teacher_passes):
    """Ten epochs stand for a hundred: lr / 10 after 3, 6 and 9."""
    command = [*QUICK, *"--epochs 10 --train-size 6 --lr 0.01 --out a".split()]
    assert common.run_program(nd.program, command) == 0
    found = [line["lr"] for line in lines("a")]
    assert found == pytest.approx([0.01] * 3 + [1e-3] * 3 + [1e-4] * 3 + [1e-5])


def test_a_pretrained_teacher(tree, monkeypatch, capsys, any_teacher_passes):
    def get_model(name, weights=None, num_classes=1000):
        torch.manual_seed(5)
        asked.append((name, weights))
        return torchvision.models.resnet18(num_classes=num_classes)

    asked = []
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    for module in (common, sp):  # of a thousand images
        monkeypatch.setattr(module, "evaluate", lambda *_: 50.0)
    command = [*QUICK, "--teacher", "resnet18", "--pretrained-teacher", "--epochs", "1"]
    assert common.run_program(sp.program, command) == 2
    assert "1,000 classes, here are 3" in capsys.readouterr().err
    for split in ("train", "val"):
        for k in range(3, 1000):
            folder = tree / split / f"n{k:08d}"
            folder.mkdir()
            (folder / "0.JPEG").symlink_to(Path.cwd() / f"tree/{split}/n00000000/{split}0_0.JPEG")
    small = [*command, "--train-size", "1000", "--batch-size", "500", "--out", "a"]
    assert common.run_program(sp.program, small) == 0, capsys.readouterr().err
    torch.manual_seed(5)
    wanted = common.state_hash(torchvision.models.resnet18())
    assert result("a")["teacher_hash"] == wanted
    used = [weights for name, weights in asked if weights]
    assert used and all(str(w) == "ResNet18_Weights.IMAGENET1K_V1" for w in used)
    assert not list(Path("checkpoints").glob("*"))
    both = [*command, "--teacher-ckpt", "a/student.pt"]
    assert common.run_program(sp.program, both) == 2
    assert "choose one" in capsys.readouterr().err
