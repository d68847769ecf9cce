"""detect_nd.py: training pass, COCO's layout, AP, whole runs. Its losses: in test_losses.py."""

import argparse
import copy
import functools
import hashlib
import json
import math
import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import error_line, finish, lines, pair, progress, result, same, stopped, timeless
from PIL import Image

import common
import detect_nd

# A run of a second: eight images of 32 pixels, a narrow FPN.
SMALL = "--dataset shapes --data-dir drawn --image-size 32 --regions 16 --fpn-width 16"
SMALL += " --teacher mobilenet_v2 --student mobilenet_v2 --train-size 8 --batch-size 4"
WEIGHTS = dict(nd=3.0, kd=20.0, reviewkd=2.0)
PLAIN = "--nd-weight 0 --kd-weight 0"
COCO = "--data-dir coco --image-size 64 --workers 0"
TERMS = ("cls", "box", "objectness", "rpn_box")
LOSSES = ("classifier", "box_reg", "objectness", "rpn_box_reg")  # torchvision's names, in our order
SPLITS = {"train2017": "train", "val2017": "valid"}  # the names of COCO and of Roboflow
TURNED = Image.Exif()
TURNED[0x0112] = 6  # as telephones store a picture taken upright
run = functools.partial(helpers.run, "detect_nd")


def parsed(command=SMALL):
    return detect_nd.parse_args(shlex.split(command))


def load(command):
    return detect_nd.load_detection_data(parsed(command))


@pytest.fixture(autouse=True)
def nothing_is_there(cwd, monkeypatch):
    """Few synthetic scenes, a teacher that need not find them, and no data read before."""
    monkeypatch.setattr(detect_nd, "SCENES", {"train2017": 9, "val2017": 9})
    monkeypatch.setattr(detect_nd, "LOWEST_TEACHER_AP", -1.0)
    monkeypatch.setattr(detect_nd, "_TEACHER_AP", {})
    detect_nd._read_once.cache_clear()


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(detect_nd.build_detector("mobilenet_v2", 7, parsed()).state_dict(), path)
    return path


@pytest.fixture
def quick(teacher_file):
    """The arguments of a run of a second, with a teacher that is there."""
    Path("teacher.pth").write_bytes(teacher_file.read_bytes())
    return f"{SMALL} --teacher-ckpt teacher.pth"


def write_coco(table):
    """A data set in COCO's layout, in the folder coco: images of noise."""
    for split in ("train2017", "val2017"):
        Path("coco", split).mkdir(parents=True)
        for image in table["images"]:
            shape = image["height"], image["width"], 3
            pixels = np.random.default_rng(image["id"]).integers(0, 255, shape, np.uint8)
            Image.fromarray(pixels).save(Path("coco", split, image["file_name"]))
        path = Path(f"coco/annotations/instances_{split}.json")
        common.write_whole(path, json.dumps(table).encode())


def coco_table(**names):
    """Four images, one of them without boxes; the first and the last category have boxes."""
    names = names or dict(a=3, b=7, c=90)
    first, *_, last = names.values()
    boxes = [(10, first, [4, 5, 20, 30]), (10, last, [30, 2, 40, 20])]  # beyond the right edge
    boxes += [(10, first, [0, 0, 64, 48]), (11, last, [8, 8, 24, 24])]  # the first is a crowd
    boxes += [(11, last, [5, 5, 0, 10]), (11, first, [70, 5, 10, 10])]  # no area; outside
    boxes += [(13, first, [2, 2, 30, 40]), (13, last, [0.1, 0.1, 0.5, 0.4])]  # below one pixel
    annotations = [dict(zip(("image_id", "category_id", "bbox"), box)) for box in boxes]
    annotations[2]["iscrowd"] = 1
    sizes = {10: (64, 48), 11: (64, 64), 12: (64, 64), 13: (48, 64)}
    images = [dict(id=i, file_name=f"{i}.png", width=w, height=h) for i, (w, h) in sizes.items()]
    categories = [dict(id=i, name=name) for name, i in names.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def some_images():
    """Of three sizes; the last is without boxes."""
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, h, w, generator=rng) for h, w in ((64, 80), (70, 64), (64, 64))]
    boxes = [[[4.0, 5, 30, 40], [20, 20, 60, 50]], [[10.0, 10, 40, 60]], []]
    boxes = [torch.tensor(b).view(-1, 4) for b in boxes]
    return images, [{"boxes": b, "labels": torch.arange(1, len(b) + 1)} for b in boxes]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_training_pass_is_torchvisions(name):
    """Losses, gradients, random draws and BatchNorm's statistics."""
    torch.manual_seed(0)
    student = detect_nd.build_detector(name, 7, parsed()).train()
    student.transform.min_size = (48, 64, 96)  # one is drawn: the choice must not differ
    theirs = copy.deepcopy(student)
    torch.manual_seed(5)
    losses = theirs(*some_images())
    wanted = [torch.get_rng_state(), *(losses[f"loss_{loss}"] for loss in LOSSES)]
    torch.manual_seed(5)
    losses, sampled = detect_nd.training_pass(student, *some_images())
    found = [torch.get_rng_state(), *losses.values()]
    for net, end in ((theirs, wanted), (student, found)):
        end += [*torch.autograd.grad(sum(end[1:]), [*net.parameters()]), *net.buffers()]
    assert all(map(torch.equal, found, wanted))
    assert tuple(losses) == TERMS
    assert len(sampled.labels) == len(sampled.emb) == sum(map(len, sampled.boxes)) <= 3 * 16
    assert sampled.labels.max() == 2 and not sampled.labels[-len(sampled.boxes[2]) :].any()
    widths = [maps.shape[-1] for maps in sampled.feature_maps.values()]
    assert widths == [math.ceil(sampled.pixels.shape[-1] / s) for s in (4, 8, 16, 32, 64)]


def test_boxes_keep_their_digits_under_bf16(quick):
    """Coordinates near 1000 are steps of 4 or 8 in bfloat16."""
    torch.manual_seed(0)
    student = detect_nd.build_detector("mobilenet_v2", 7, parsed()).train()
    student.transform.max_size = 1024
    boxes = torch.tensor([[1003.3, 5.7, 1014.9, 17.2], [10.1, 2.3, 300.7, 30.9]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}]
    with torch.autocast("cpu", torch.bfloat16):
        losses, sampled = detect_nd.training_pass(student, [torch.rand(3, 32, 1024)], targets)
        found = student.eval()([torch.rand(3, 32, 32)])[0]["boxes"]
    assert all((sampled.boxes[0] == box).all(1).any() for box in boxes)  # ground truth is sampled
    for numbers in (found, sampled.boxes[0], sampled.emb, sampled.logits, *losses.values()):
        assert numbers.dtype == torch.float32 and numbers.isfinite().all()
    assert run(f"{quick} --precision bf16 --train-size 4 --epochs 1 --out o") == 0
    assert math.isfinite(lines("o")[0]["nd"] + lines("o")[0]["kd"])


@pytest.fixture
def published(cwd, monkeypatch):
    """Stands in for a download: torchvision finds these weights in its folder, or none."""
    offline, hub = Mock(side_effect=OSError("no network")), cwd / "hub/checkpoints"
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub.parent))
    return lambda weights, net: common.save_whole(hub / Path(weights.url).name, net.state_dict())


def test_torchvisions_teacher_for_coco(published):
    """Its weights, anchors and BatchNorm, so its answers, and its numbering of classes."""
    torch.manual_seed(0)
    build = functools.partial(torchvision.models.get_model, "fasterrcnn_resnet50_fpn")
    net = build(weights=None, weights_backbone=None)
    published(detect_nd.COCO_WEIGHTS, net)
    theirs = build(weights="COCO_V1", min_size=64).eval()
    write_coco(coco_table(person=1, toothbrush=90))
    args, data = parsed(COCO), load(COCO)
    assert data.num_classes == 91 and data.train[0]["labels"].tolist() == [1, 90]
    ours = detect_nd.load_teacher(args, data, None)
    assert same(ours.state_dict(), theirs.state_dict())
    images = theirs.transform(some_images()[0])[0]
    with torch.no_grad():
        maps, wanted = ours.backbone(images.tensors), theirs.backbone(images.tensors)
        boxes, expected = ours.rpn(images, maps)[0], theirs.rpn(images, wanted)[0]
    assert len(maps) == 5 and same(maps, wanted)
    assert all(map(torch.equal, boxes, expected))


def test_batchnorm_is_frozen_in_pretrained_backbones_and_trained_from_scratch(published):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    published(torchvision.models.ResNet18_Weights.IMAGENET1K_V1, theirs)
    for pretrained in (True, False):
        args = parsed(f"{SMALL} --{'' if pretrained else 'no-'}pretrained-backbone")
        net = detect_nd.build_detector("resnet18", 7, args).train()
        body = net.backbone.body
        before = {name: value.clone() for name, value in body.state_dict().items()}
        losses, _ = detect_nd.training_pass(net, *some_images())
        sum(losses.values()).backward()
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
        moved = {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
        if pretrained:  # stem and first stage keep ImageNet's weights too
            assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in before.items())
            convolutions = {k for k, p in theirs.named_parameters() if p.dim() == 4}
            before = {k for k in convolutions if not k.startswith(("conv1", "layer1"))}
        assert moved == set(before)


FORMS = dict(id="{}.0".format, width=lambda _: None, file_name="C:\\train2017\\{}".format)
TEXTS = dict(bbox=lambda box: [*map(str, box)], iscrowd=lambda flag: flag, image_id=str)
TABLES = (  # of which entries all are changed, how, what befalls the files, what is said
    ("images", {}, "", "1 boxes in 0..1, below one pixel: normalised? (annotations[7]"),
    ("images", FORMS, "", "4 images without width and height"),
    ("images", dict(file_name=lambda name: name.replace("10", "\u00e9")), "accents", ""),
    ("images", {}, "turned", ""),
    ("images", {}, "Roboflow", ""),
    ("annotations", TEXTS, "", "whose iscrowd had to be converted"),
)


@pytest.mark.parametrize("kind, changes, move, words", TABLES)
def test_coco_as_tools_export_it(kind, changes, move, words, capsys):
    """With gaps of ids, a crowd and boxes without area; all forms are read as the plain one is."""
    write_coco(table := coco_table())
    pixels = [np.array(Image.open(f"coco/val2017/{i}.png")) for i in (10, 11, 13)]
    for entry in table[kind]:
        entry.update({key: change(entry.get(key)) for key, change in changes.items()})
    for split in SPLITS:
        file, path = Path(f"coco/annotations/instances_{split}.json"), Path("coco", split, "10.png")
        file.write_text(json.dumps(table))
        if move == "accents":
            path.rename(path.with_name("e\u0301.png"))
        elif move == "turned":  # as a telephone stores it; the annotation is of the upright picture
            Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=TURNED)
        elif move == "Roboflow":
            file.rename(path.parent.rename(Path("coco", SPLITS[split])) / "_annotations.coco.json")
    data = load(COCO)
    text = capsys.readouterr().out
    assert "3 crowds or boxes without area, not trained on" in text and words in text
    assert data.classes == ["__background__", "a", "b", "c"] and data.num_classes == 4
    assert data.category_ids == [None, 3, 7, 90]
    assert [image["id"] for image in data.train] == [10, 11, 13]
    assert [image["id"] for image in data.val] == [10, 11, 12, 13]
    [*images], [target, *_], _ = next(data.batches(data.train, 3))
    assert target["boxes"].tolist() == [[4, 5, 24, 35], [30, 2, 64, 22]]
    assert target["labels"].tolist() == [1, 3]
    assert all(np.array_equal(i.permute(1, 2, 0) * 255, p) for i, p in zip(images, pixels))
    assert [image["id"] for image in load(f"{COCO} --keep-empty").train] == [10, 11, 12, 13]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_are_flipped_with_their_pixels(workers):
    write_coco(coco_table())
    data, flips = load(f"{COCO} --workers {workers}"), []
    plain = {i: (x, t["boxes"]) for [x], [t], [i] in data.batches(data.train, 1)}
    for seed in range(2):
        for [image], [target], [image_id] in data.train_batches(1, seed, 0, 3):
            pixels, boxes = plain[image_id]
            flips.append(not torch.equal(image, pixels))
            if flips[-1]:
                assert torch.equal(image.flip(2), pixels)
                x1, y1, x2, y2 = boxes.unbind(1)
                boxes = torch.stack([image.shape[2] - x2, y1, image.shape[2] - x1, y2], 1)
            assert torch.equal(target["boxes"], boxes)
    assert set(flips) == {False, True}


def test_batches_are_of_one_orientation_and_shared_by_the_ranks(monkeypatch):
    size = {k: (8, 12) if k % 5 < 3 else (12, 8) for k in range(30)}
    images = [dict(id=k, file_name=f"{k}.png", width=w, height=h) for k, (w, h) in size.items()]
    boxes = [dict(image_id=k, category_id=1, bbox=[1, 1, 6, 6]) for k in size]
    write_coco(dict(images=images, annotations=boxes, categories=[dict(id=1, name="a")]))
    data = load(COCO)

    def ids(batch_size, seed=7, first=0, last=99):
        return [batch[2] for batch in data.train_batches(batch_size, seed, first, last)]

    epoch = ids(4)
    assert sorted(sum(epoch, [])) == [*size] and data.steps(4) == len(epoch) == 8
    assert sum(len({size[k][0] > size[k][1] for k in batch}) > 1 for batch in epoch) <= 1
    assert epoch == ids(4) != ids(4, seed=8) and ids(4, first=3, last=5) == epoch[3:5]
    assert data.steps(29) == 1  # one image over: left out
    in_order, shares = ids(5), []
    monkeypatch.setattr(common, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        shares.append(ids(5))
    assert [sum(parts, []) for parts in zip(*shares)] == in_order  # of every batch a part
    assert [[len(part) for part in share] for share in shares] == [[1] * 6, [2] * 6, [2] * 6]


def test_scenes_are_bit_for_bit_what_they_were():
    """Committed results rest on these images."""
    data, digest = load("--dataset shapes --image-size 64"), hashlib.sha256()
    for [image], [target], _ in data.batches(data.train + data.val[:3], 1):
        for numbers in (image.mul(255).byte(), target["boxes"], target["labels"]):
            digest.update(numbers.numpy().tobytes())
    assert digest.hexdigest()[:16] == "eebcc3ba1fe41d7c"


def test_ap_is_pycocotools():
    """On random detections, through the labels and the box format of a detector."""
    coco, cocoeval = map(pytest.importorskip, ("pycocotools.coco", "pycocotools.cocoeval"))
    rng, ids = np.random.default_rng(0), np.array([0, 4, 9])
    image = np.repeat(np.arange(11), 6)  # the twelfth has no boxes
    boxes = np.hstack([rng.uniform(0, 250, (66, 2)), rng.uniform(8, 200, (66, 2))])
    guesses = (boxes + boxes[:, 2:3] * rng.normal(0, 0.06, (66, 4))).clip(2)
    labels, wrong = rng.integers(0, 3, (2, 66))
    said, scores = np.where(rng.random(66) < 0.8, labels, wrong), rng.random(66)
    names = ("image_id", "category_id", "bbox", "area", "iscrowd")
    columns = image, ids[labels], boxes, boxes[:, 2:].prod(1), (rng.random(66) < 0.15).astype(int)
    rows = enumerate(zip(*(column.tolist() for column in columns)), 1)
    truth = [dict(zip(names, row), id=number) for number, row in rows]
    rows = zip(*(column.tolist() for column in (image, ids[said], guesses, scores)))
    found = [dict(zip((*names[:3], "score"), row)) for row in rows]
    images = [dict(id=i, width=640, height=480, file_name=f"{i}.png") for i in range(12)]
    categories = [dict(id=i, name=f"c{i}") for i in ids.tolist()]
    write_coco(dict(images=images, annotations=truth, categories=categories))
    theirs = coco.COCO("coco/annotations/instances_val2017.json")
    evaluator = cocoeval.COCOeval(theirs, theirs.loadRes(found), "bbox")
    for step in (evaluator.evaluate, evaluator.accumulate, evaluator.summarize):
        step()
    corners = np.hstack([guesses[:, :2], guesses[:, :2] + guesses[:, 2:]])
    columns = dict(boxes=corners, labels=said + 1, scores=scores)
    answers = [{k: torch.tensor(v[image == i]) for k, v in columns.items()} for i in range(12)]
    model, answers = torch.nn.Identity(), iter(answers + 12 * answers[-1:])
    model.forward = lambda images: [next(answers) for _ in images]
    args, data = parsed(COCO), load(COCO)
    scores, by_class = detect_nd.evaluate_detector(model, data, args)
    assert tuple(scores) == detect_nd.AP_NAMES and 5 < scores["AP"] < 95
    assert [*scores.values()] == pytest.approx(100 * evaluator.stats[:6], abs=2e-3)
    precision = 100 * evaluator.eval["precision"][:, :, :, 0, -1].mean((0, 1))
    assert by_class == pytest.approx(dict(zip(ids.tolist(), precision)), abs=2e-3)
    assert detect_nd.evaluate_detector(model, data, args)[0]["AP"] == 0  # nothing found


def test_one_command_trains_the_teacher_and_reuses_it(capsys):
    command = f"{SMALL} --iterations 2 --teacher-epochs 1"
    assert stopped("detect_nd", command, step=1) == 143 and run(command) == 0  # goes on with it
    out = Path("runs/detect_nd-mobilenet_v2-mobilenet_v2-shapes-s0")
    r, [line] = result(out), lines(out)
    assert r["method"] == "KD++" and "reviewkd" not in line
    assert r["ap"].items() <= line.items() and {*TERMS, "nd", "kd", "lr"} < line.keys()
    assert run(f"--eval {out}/student.pt --dataset shapes --data-dir drawn --per-class") == 0
    text = capsys.readouterr().out
    assert f"student.pt: {r['ap']}" in text and "--fpn-width 16" in text and "  ring: " in text
    # The teacher is there now, and one of another recipe is not taken for it.
    assert run(command, "--resume") == 0 and "training it" not in capsys.readouterr().out
    assert run(command, "--smallest-anchor", "8", "--out", "o") == 2
    assert "smallest_anchor 16 (asked: 8)" in error_line(capsys)


def test_weights_of_zero_are_the_plain_detector_bit_for_bit(quick):
    """And the plain detector is torchvision's, trained by SGD with warm-up and milestones."""
    command = f"{quick} --iterations 3 --seed 3 --lr 0.02 {PLAIN} --out o"
    assert run(command) == 0 and result("o")["method"] == "plain"
    data = load(command)
    torch.manual_seed(3)
    net = detect_nd.build_detector("mobilenet_v2", 7, parsed())
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, 0.9, weight_decay=1e-4)
    for step, lr in enumerate((0.02 * 0.001, 0.02, 0.02 / 10)):
        number = step % 2  # of the batch in its epoch
        [(images, targets, _)] = data.train_batches(4, 300_009 + step // 2, number, number + 1)
        optimizer.param_groups[0]["lr"] = lr
        losses = net.train()(images, targets)
        optimizer.zero_grad()
        sum(losses[f"loss_{name}"] for name in LOSSES).backward()
        optimizer.step()
    assert same(helpers.weights("o/student.pt"), net.state_dict())


@pytest.mark.parametrize("steps, rates", [
    (180, {0: 1e-5, 9: 0.005005, 18: 0.01, 119: 0.01, 120: 1e-3, 159: 1e-3, 160: 1e-4, 179: 1e-4}),
    (12_000, {0: 1e-5, 500: 0.005005, 1000: 0.01, 1001: 0.01}),
])  # fmt: skip
def test_schedule(quick, monkeypatch, steps, rates):
    """Milestones at 120 and 160 of 180 parts; a warm-up over a tenth, at most 1000 steps."""
    net, seen, nothing = torch.nn.Linear(1, 1), [], dict.fromkeys(detect_nd.AP_NAMES, 0.0)

    def set_lr(_, lr):
        seen.append(lr)
        if len(seen) > max(rates):
            raise common.UserError("seen enough")

    monkeypatch.setattr(common, "set_lr", set_lr)
    patch = functools.partial(monkeypatch.setattr, detect_nd)
    patch("build_detector", lambda *_: net)
    patch("training_pass", lambda *_: (dict.fromkeys(TERMS, net.weight.sum()), None))
    patch("evaluate_detector", lambda *_: (nothing, {}))
    command = f"{quick} --batch-size 1 --iterations {steps} --lr 0.01 {PLAIN} --out o"
    with pytest.raises(common.UserError, match="seen enough"):
        detect_nd.distill(argparse.Namespace(**vars(parsed(command)) | dict(teacher=None)))
    assert {step: seen[step] for step in rates} == pytest.approx(rates)


def keep_gradients(argv):
    """`detect_nd.main`; the gradients of its step and its teacher, in a file a rank."""
    average = common.Run.average_gradients

    def spy(run, optimizer):
        average(run, optimizer)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        assert not (run.teacher.training or any(p.requires_grad for p in run.teacher.parameters()))
        kept = dict(gradients=[p.grad for p in trained], teacher=run.teacher.state_dict())
        torch.save(kept, f"kept{common.rank()}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "average_gradients", spy)
        detect_nd.main(argv)


def gradients_by_hand(args, teacher, means, images, targets, draws):
    """Of the first step, all terms at once, by name. draws: the seed of the RoIs."""
    torch.manual_seed(4)
    student = detect_nd.build_detector("mobilenet_v2", 7, args).train()
    review = detect_nd.ReviewKD([16] * 5, [16] * 5, 16)
    torch.manual_seed(draws)
    losses, seen = detect_nd.training_pass(student, images, targets)
    with torch.no_grad():
        t_maps = teacher.backbone(seen.pixels)
        t, t_logits, _ = detect_nd.box_branch(teacher, t_maps, seen.boxes, seen.sizes)
    nd, labels = [], seen.labels.tolist()
    for s_row, t_row, label in zip(seen.emb, t, labels):
        if label in means and (label or not args.nd_foreground_only):
            length = (s_row.norm() / t_row.norm()).clamp(max=1)
            nd.append(1 - F.cosine_similarity(s_row, means[label], dim=0) * length)
    assert 0 < len(nd) < len(labels)
    p, q = t_logits.softmax(1), seen.logits.softmax(1)
    kd = (p * (p / q).log()).sum(1).mean()
    if args.base == "dkd":  # over all RoIs: the background is a class
        kd = detect_nd.dkd_loss(seen.logits, t_logits, seen.labels, 1.0, 0.25, temperature=1.0)
    t_maps = list(t_maps.values())
    fused = review(list(seen.feature_maps.values()), t_maps)
    loss = sum(losses.values()) + WEIGHTS["nd"] * sum(nd) / len(nd)
    loss = loss + WEIGHTS["kd"] * kd + WEIGHTS["reviewkd"] * detect_nd.hcl_loss(fused, t_maps)
    loss.backward()
    nets = torch.nn.ModuleDict(dict(student=student, review=review))
    return {name: p.grad for name, p in nets.named_parameters()}


@pytest.mark.parametrize("ranks, flag", [(1, ""), (2, "--nd-foreground-only --base dkd")])
def test_a_step_is_the_one_written_by_hand(quick, ranks, flag):
    """Terms, weights, temperature, pixels, RoIs, class means, the mean over ranks, and AP."""
    command = f"{quick} {flag} --iterations 1 --seed 4 --class-means-images 2 --device cpu --out o"
    command += "".join(f" --{name}-weight {value}" for name, value in WEIGHTS.items())
    if ranks == 1:
        keep_gradients(shlex.split(command))
    else:
        started = pair(keep_gradients, shlex.split(command), Path.cwd())
        assert finish(started, Path.cwd()) == ([0, 0], "") and not Path("out1").read_text()
    args, data = parsed(command), load(command)
    teacher = detect_nd.load_detector("mobilenet_v2", 7, args, "teacher.pth")
    # Class means of two images: classes without RoIs are absent.
    torch.manual_seed(0)
    [(images, targets, _)] = data.batches(data.train[:2], 4)
    batch, targets = teacher.transform(images, targets)
    maps = teacher.backbone(batch.tensors)
    proposals, _ = teacher.rpn(batch, maps)
    boxes, _, labels, _ = teacher.roi_heads.select_training_samples(proposals, targets)
    emb, _, _ = detect_nd.box_branch(teacher, maps, boxes, batch.image_sizes)
    labels = torch.cat(labels)
    means = {label: emb[labels == label].mean(0) for label in labels.unique().tolist()}
    [(images, targets, _)] = data.train_batches(4, 400_012, 0, 1)
    by_hand = functools.partial(gradients_by_hand, args, teacher, means)
    parts = [slice(4 * rank // ranks, 4 * (rank + 1) // ranks) for rank in range(ranks)]
    by_rank = [by_hand(images[p], targets[p], 4 + 7919 * rank) for rank, p in enumerate(parts)]
    for rank in range(ranks):
        kept = torch.load(f"kept{rank}.pt", weights_only=True)
        assert same(kept["teacher"], teacher.state_dict())
        found = dict(zip(by_rank[0], kept["gradients"], strict=True))
        for part in ("backbone.body", "backbone.fpn", "rpn", "box_head", "box_pred", "review"):
            names = [name for name in found if part in name]
            wanted = torch.cat([sum(g[n] for g in by_rank).flatten() / ranks for n in names])
            error = torch.cat([found[name].flatten() for name in names]) - wanted
            assert error.norm() < 2e-3 * wanted.norm(), part
    scores, _ = detect_nd.evaluate_detector(teacher, data, args)
    assert result("o")["teacher_ap"] == scores["AP"] > 0  # that of one process, to the digit
    assert lines("o")[0].keys() & {"nd", "kd", "dkd", "reviewkd"} == {"nd", args.base, "reviewkd"}


def test_resume_within_and_at_the_end_of_an_epoch(quick):
    """Three steps: an epoch of two, and a cut one."""
    command = f"{quick} --iterations 3 --base reviewkd --out"
    assert run(command, "whole") == 0
    for step in (1, 2):
        out = f"stopped{step}"
        assert stopped("detect_nd", command, out, step=step) == 143
        assert progress(out) == (0, step) and run(command, out, "--resume") == 0
        assert same(helpers.weights("whole/student.pt"), helpers.weights(f"{out}/student.pt"))
        assert timeless(out) == timeless("whole")


def test_bad_images_are_errors_or_skipped(quick, capsys):
    folder = detect_nd.draw_scenes(Path("drawn"), 32) / "train2017"
    command = quick.replace("--dataset shapes --data-dir drawn", f"--data-dir {folder.parent}")
    command += f" --workers 0 --epochs 1 --no-pretrained-backbone {PLAIN} --out o"
    size = r"width and height are \(30, 30\), its annotation says \(32, 32\)"
    good = (path := folder / "000004.png").read_bytes()
    spoils = {"no such image": path.unlink, "cannot be": lambda: path.write_bytes(good[:300])}
    spoils[size] = lambda: Image.new("RGB", (30, 30)).save(path)
    for words, spoil in spoils.items():
        spoil()
        assert run(command) == 2
        assert re.search(f"000004.png: {words}.*; --skip-bad-images", error_line(capsys))
        data = load(f"{command} --skip-bad-images")
        assert f"2017: 8 images; 1 left out, unreadable ({path}: " in capsys.readouterr().out
        assert data.bad_images == 1 and 4 not in [image["id"] for image in data.train]
        path.write_bytes(good)
    path.unlink()
    assert run(f"{command} --skip-bad-images") == 0
    assert f"unreadable: {path}: " in Path("o/data_report.txt").read_text()


@pytest.mark.parametrize("base, runs", [  # of each run: method, weights of ND, KD or DKD, ReviewKD
    ("dkd --kd-weight 2", "plain 0 0 0, KD 0 1 0, DKD 0 2 0, DKD++ 1.5 2 0"),
    ("reviewkd --reviewkd-weight 3", "plain 0 0 0, KD 0 1 0, ReviewKD 0 0 3, ReviewKD++ 1.5 0 3"),
])  # fmt: skip
def test_compare_plot_and_predict(quick, capsys, base, runs):
    done = detect_nd.main(f"{quick} --base {base} --iterations 1 --out o --compare --plot".split())
    row = "{method} {nd_weight:g} {kd_weight:g} {reviewkd_weight:g}"
    assert ", ".join(row.format(**r["args"]) for r in done) == runs
    assert "kd" in lines("o/kd")[0] and "dkd" not in lines("o/kd")[0]
    table = re.findall(r"^\| (\S+) \| (?:1|n \| AP) \|", capsys.readouterr().out, re.M)
    assert table == ["method", *re.findall(r"[A-Za-z]\S*", runs)]
    assert Image.open("o/detections.png").width > 500
    Image.new("CMYK", (70, 80)).save("mine.jpg", exif=TURNED)
    Image.new("L", (70, 80)).save("mine.png")
    assert run("--eval o/student.pt --predict mine.jpg mine.png --out boxes") == 0
    drawn, other = Image.open("boxes/mine-boxes.png"), Image.open("boxes/mine-boxes-2.png")
    assert drawn.mode == "RGB" and drawn.width > drawn.height and other.width < other.height
    args = parsed("--base dkd --teacher resnet101 --student resnet50")
    assert (args.method, args.nd_weight, args.kd_weight) == ("DKD++", 1, 1)
    alone = "--base reviewkd --nd-weight 0 --teacher resnet50 --student mobilenet_v2"
    assert parsed(alone).reviewkd_weight == 2.0  # with ND: 2.2


BAD_INPUT = (  # of which entries of a table the first is changed, how, and what the error says
    ("table", dict(categories=None), "not COCO's instances format: .*NoneType"),
    ("table", dict(annotations=[]), "train2017.json: no image has a box"),
    ("annotations", dict(category_id=4), r"annotations\[0\].* category_id: 4 is not among"),
    ("annotations", dict(image_id=99), r"annotations\[0\].* image_id: 99 is not among"),
    ("annotations", dict(bbox=[1, 2, 3, math.nan]), r"annotations\[0\].* bbox: .*NaN"),
    ("annotations", dict(bbox=[1, 2, 3]), r"annotations\[0\].* bbox: not enough values"),
    ("annotations", dict(bbox=None, id=5), r"train2017.json: annotations\[0\] \(5\) bbox: missing"),
    ("images", dict(width=2**70), r"images\[0\].* width: 1180591620717411303424 is too large"),
    ("annotations", dict(iscrowd="no"), r"annotations\[0\].* iscrowd: .*'no'"),
    ("images", dict(id="ten"), r"images\[0\] \(10.png\) id: .*'ten'"),
    ("images", dict(id=11), r"images\[1\] \(11.png\) id: 11 is that of images\[0\] \(10.png\) too"),
    ("images", dict(file_name="x/11.png"), "images 10 and 11 are one file: .*11.png"),
    ("categories", dict(id=7), r"categories\[1\] .*id: 7 is that of categories\[0\]"),
    ("categories", dict(name="x"), "instances_train2017.json and .*val2017.json .*categories"),
    ("table", {}, "torchvision has resnet50 alone.*--teacher-ckpt"),  # for COCO's categories
    (f"--plot {PLAIN}", None, "--plot"),  # from here on: arguments
    ("--base reviewkd --batch-size 1", None, "--batch-size"),
    ("--teacher-ckpt torn.pth", None, "torn.pth: damaged"),
    ("--teacher resnet18", None, "teacher.pth: another architecture"),
    ("--seed 1", None, "teacher.pth detects nothing"),
    ("", None, r"the loss term kd of images \d, \d, \d, \d became infinite or nan in epoch 1:"),
    ("--image-size 16", None, "--image-size 16"),
    ("--dataset coco", None, "--data-dir: no drawn/annotations/instances_train2017.json"),
    ("--pretrained-backbone", None, "download https://.*mobilenet_v2.*hub/checkpoints"),
)


@pytest.mark.parametrize("where, changes, words", BAD_INPUT)
def test_bad_input_ends_in_status_2(quick, published, monkeypatch, capsys, where, changes, words):
    Path("torn.pth").write_bytes(Path("teacher.pth").read_bytes()[:5000])
    monkeypatch.setattr(detect_nd, "LOWEST_TEACHER_AP", 101.0 if where == "--seed 1" else -1.0)
    monkeypatch.setattr(detect_nd, "kd_loss", lambda *a, **k: torch.tensor(math.nan))
    command = f"{quick} {where}"
    if changes is not None:
        write_coco(table := coco_table())
        (table if where == "table" else table[where][0]).update(changes)
        Path("coco/annotations/instances_train2017.json").write_text(json.dumps(table))
        command = f"{COCO} --no-pretrained-backbone"
    assert run(command, "--out", "o") == 2
    assert re.search(words, error_line(capsys))
