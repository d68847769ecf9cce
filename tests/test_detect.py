"""detect_nd.py: reading COCO's layout, the losses, whole runs. Small images, small networks."""

import ast
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, TIMES, lines, result, same, weights
from PIL import Image
from test_ranks import finish, pair

import common
import detect_nd

CPU = torch.device("cpu")
# A run of a second: eight images of 32 pixels, a narrow FPN.
SMALL = "--dataset shapes --data-dir drawn --image-size 32"
SMALL += " --teacher mobilenet_v2 --student mobilenet_v2"
SMALL += " --regions 16 --fpn-width 16 --train-size 8 --batch-size 4 --epochs 1 --out o"


hopeless = common.hopeless


def run(command, *more):
    return common.run_program(detect_nd.program, [*shlex.split(command), *more])


@pytest.fixture
def few_scenes(cwd, monkeypatch):
    monkeypatch.setattr(common, "SCENES", {"train2017": 9, "val2017": 3})
    monkeypatch.setattr(common, "hopeless", lambda ap: False)
    return cwd


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(common.build_detector("mobilenet_v2", 7, parsed()).state_dict(), path)
    return path


@pytest.fixture
def quick(few_scenes, teacher_file):
    """A command of a second, with a teacher that is there."""
    shutil.copy(teacher_file, "teacher.pth")
    return SMALL + " --teacher-ckpt teacher.pth"


@pytest.fixture
def unsaved(monkeypatch):
    """Without last.pt, of 50 MB."""
    monkeypatch.setattr(common.Run, "_save", lambda *a, **k: None)


def parsed(command=SMALL, **changes):
    args = detect_nd.parse_args(shlex.split(command))
    vars(args).update(changes)
    return args


def write_coco(root, table, split, sizes=None, modes=None):
    """A split in COCO's layout; images of noise, of these (width, height) and modes by id."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    for image in table["images"]:
        pixels = np.random.default_rng(image["id"]).integers(
            0, 255, (image["height"], image["width"], 3), np.uint8
        )
        picture = Image.fromarray(pixels).convert((modes or {}).get(image["id"], "RGB"))
        picture.save(root / split / image["file_name"])
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))


def coco_table(categories=((3, "a"), (7, "b"), (90, "c"))):
    """Four images, one of them without boxes, two categories with boxes."""
    first, second = categories[0][0], categories[-1][0]
    boxes = [
        (10, first, [4, 5, 20, 30], 0),
        (10, second, [30, 2, 40, 20], 0),  # reaches beyond the right edge
        (10, first, [0, 0, 64, 48], 1),  # a crowd
        (11, second, [8, 8, 24, 24], 0),
        (11, second, [5, 5, 0, 10], 0),  # no area
        (11, first, [70, 5, 10, 10], 0),  # outside
        (13, first, [2, 2, 30, 40], 0),
    ]
    annotations = [
        dict(id=k, image_id=i, category_id=c, bbox=b, iscrowd=crowd, area=b[2] * b[3])
        for k, (i, c, b, crowd) in enumerate(boxes)
    ]
    shapes = {10: (64, 48), 11: (64, 64), 12: (64, 64), 13: (48, 64)}
    images = [
        dict(id=i, file_name=f"{i}.png" if i != 11 else "11.jpg", width=w, height=h)
        for i, (w, h) in shapes.items()
    ]
    return dict(
        images=images,
        annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in categories],
    )


@pytest.fixture
def coco(cwd):
    write_coco(Path("coco"), coco_table(), "train2017", modes={10: "L", 11: "CMYK", 13: "P"})
    write_coco(Path("coco"), coco_table(), "val2017")
    return "--data-dir coco --image-size 64 --regions 16 --fpn-width 16 --no-pretrained-backbone"


# --- the losses ----------------------------------------------------------------------------------


def test_functions_are_those_of_nd():
    wanted = {"_full", "_alike", "_unit", "_rows", "nd_loss", "kd_loss", "ReviewKD", "hcl_loss"}
    texts = []
    for script in ("nd.py", "detect_nd.py"):
        text = (ROOT / script).read_text()
        texts.append({
            node.name: ast.get_source_segment(text, node)
            for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        })  # fmt: skip
    own = {"parse_args", "method_name", "main", "program"}
    assert texts[0].keys() & texts[1].keys() - own == wanted
    assert all(texts[0][name] == texts[1][name] for name in wanted)


def test_the_copied_block_needs_torch_alone():
    text = (ROOT / "detect_nd.py").read_text()
    block = re.search(r"# --- copy from here -+\n(.*)# --- to here -", text, re.S).group(1)
    scope = {"torch": torch, "F": F}
    exec(block, scope)
    assert scope["nd_loss"](torch.eye(2), torch.eye(2), torch.eye(2), torch.tensor([0, 1])) == 0


def some_images(with_empty=True):
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, h, w, generator=rng) for h, w in ((64, 80), (70, 64), (64, 64))]
    boxes = [[[4.0, 5, 30, 40], [20, 20, 60, 50]], [[10.0, 10, 40, 60]], [[1.0, 1, 30, 30]]]
    targets = [
        {"boxes": torch.tensor(b), "labels": torch.tensor([k % 6 + 1 for k in range(len(b))])}
        for b in boxes
    ]
    if with_empty:
        targets[2] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, targets


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_training_pass_is_torchvisions(name):
    torch.manual_seed(0)
    student = common.build_detector(name, 7, parsed()).train()
    student.transform.min_size = (48, 64, 96)  # several sizes: the choice must not differ
    images, targets = some_images()
    torch.manual_seed(5)
    buffers = {k: v.clone() for k, v in student.state_dict().items()}
    wanted = student(images, targets)
    state = torch.get_rng_state()
    student.load_state_dict(buffers)
    torch.manual_seed(5)
    losses, sampled = detect_nd.training_pass(student, images, targets)
    assert torch.equal(torch.get_rng_state(), state)
    names = dict(cls="classifier", box="box_reg", objectness="objectness", rpn_box="rpn_box_reg")
    assert losses.keys() == names.keys()
    for key, value in losses.items():
        assert torch.equal(value, wanted[f"loss_{names[key]}"]), key
    assert len(sampled.labels) == len(sampled.emb) == sum(map(len, sampled.boxes)) <= 3 * 16
    assert sampled.emb.shape[1] == 1024 and sampled.logits.shape[1] == 7
    assert (sampled.labels[-len(sampled.boxes[2]) :] == 0).all()  # no foreground there


def test_boxes_keep_their_digits_under_bf16():
    """Coordinates near 1000 are steps of 4 or 8 in bfloat16."""
    torch.manual_seed(0)
    student = common.build_detector("mobilenet_v2", 7, parsed(image_size=128)).train()
    student.transform.max_size = 1024
    boxes = torch.tensor([[1003.3, 51.7, 1014.9, 67.2], [10.1, 20.3, 300.7, 100.9]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}]
    with torch.autocast("cpu", torch.bfloat16):
        losses, sampled = detect_nd.training_pass(student, [torch.rand(3, 128, 1024)], targets)
    assert sampled.boxes[0].dtype == torch.float32
    for box in boxes:  # the truth is among the regions
        assert (sampled.boxes[0] == box).all(1).any()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        [found] = student.eval()([torch.rand(3, 256, 256)])
    assert found["boxes"].dtype == torch.float32


def test_workers_hold_and_send_no_tensors_but_images(coco):
    """Each would keep a file open, and thousands of images exhaust a process's files."""
    data = common.load_detection_data(parsed(coco), CPU)
    decoder = common._Decoder(data.train)
    assert not any(torch.is_tensor(x) for file in decoder.files for x in file)
    assert all(torch.is_tensor(decoder[i, flip]) for i in range(3) for flip in (False, True))


def literal_nd(s, t, means, labels):
    each = []
    for i, y in enumerate(labels):
        e = means[y] / np.linalg.norm(means[y])
        each.append(1 - s[i] @ e / max(np.linalg.norm(s[i]), np.linalg.norm(t[i])))
    return np.mean(each)


@pytest.mark.parametrize("foreground_only", [False, True])
def test_nd_over_regions_against_a_loop(foreground_only):
    rng = np.random.default_rng(0)
    s, t, means = rng.normal(size=(40, 8)), rng.normal(size=(40, 8)), rng.normal(size=(5, 8))
    labels = rng.integers(0, 5, 40)
    counts = torch.tensor([9, 4, 0, 1, 2])  # class 2 was never seen
    means[2] = 0
    keep = (labels != 2) & ((labels > 0) | (not foreground_only))
    emb = torch.tensor(s, requires_grad=True)
    rest = [None] * 3
    sampled = detect_nd.Sampled(*rest, torch.tensor(labels), None, emb, None)
    means_ = torch.tensor(means)
    loss = detect_nd.region_nd(sampled, torch.tensor(t), means_, counts, foreground_only)
    assert loss.item() == pytest.approx(literal_nd(s[keep], t[keep], means, labels[keep]), 1e-12)
    loss.backward()
    assert ((emb.grad.abs().sum(1) > 0).numpy() == keep).all()


def test_nd_without_a_region_that_counts_is_zero_and_zero_features_are_finite():
    emb = torch.zeros(3, 8, requires_grad=True)
    none = detect_nd.Sampled(None, None, None, torch.zeros(3, dtype=torch.int64), None, emb, None)
    means, counts = torch.ones(2, 8), torch.ones(2)
    assert detect_nd.region_nd(none, torch.ones(3, 8), means, counts, True).item() == 0
    loss = detect_nd.region_nd(none, torch.zeros(3, 8), means, counts, False)
    loss.backward()
    assert loss.item() == 1 and torch.equal(emb.grad, torch.zeros(3, 8))


def test_class_means_of_regions_against_a_loop(few_scenes, monkeypatch):
    torch.manual_seed(0)
    teacher = common.build_detector("resnet18", 7, parsed(), frozen_norm=True).eval()
    teacher.requires_grad_(False)
    seen, heads = [], teacher.roi_heads
    select = heads.select_training_samples

    def spy(proposals, targets):
        boxes, matched, labels, offsets = select(proposals, targets)
        seen.append((boxes, labels))
        return boxes, matched, labels, offsets

    monkeypatch.setattr(heads, "select_training_samples", spy)
    images, targets = some_images()
    batches = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    means, counts = detect_nd.region_class_means(teacher, batches, 7)
    rows = {k: [] for k in range(7)}
    for (pictures, _), (boxes, labels) in zip(batches, seen):
        batch, _ = teacher.transform(pictures)
        maps = teacher.backbone(batch.tensors)
        for image, size in enumerate(batch.image_sizes):
            one = {k: v[image : image + 1] for k, v in maps.items()}
            emb = heads.box_head(heads.box_roi_pool(one, [boxes[image]], [size]))
            for vector, label in zip(emb.double(), labels[image].tolist()):
                rows[label].append(vector)
    assert counts.tolist() == [len(rows[k]) for k in range(7)] and counts[0] > 0 < counts[1]
    for k in range(7):
        wanted = torch.stack(rows[k]).mean(0) if rows[k] else torch.zeros(1024)
        assert torch.allclose(means[k].double(), wanted.double(), rtol=1e-4, atol=1e-6)
    assert means.dtype == torch.float32 and (counts == 0).any()


def test_class_means_are_kept_and_say_what_they_never_saw(quick, capsys):
    args = parsed(quick, class_means_images=1)
    data = common.load_detection_data(args, CPU)
    teacher = common.get_teacher_detector(args, data, None)

    def means(**changes):
        return detect_nd.load_region_means(parsed(quick, **changes), data, teacher)

    first, counts = means(class_means_images=1)
    seen = {k for k in range(1, 7) if counts[k]}
    assert set() < seen <= set(data.train[0].labels.tolist()) and counts[0] > 0
    absent = [data.classes[k] for k in range(1, 7) if k not in seen]
    assert f"no region of {', '.join(absent)}; they are left out" in capsys.readouterr().out
    (file,) = Path("checkpoints").glob("region-means-*.pt")
    stamp = file.stat().st_mtime_ns
    again, _ = means(class_means_images=1)
    assert torch.equal(again, first) and file.stat().st_mtime_ns == stamp
    assert "one pass of the teacher" not in capsys.readouterr().out
    _, more = means()
    assert more.sum() > counts.sum() and file.stat().st_mtime_ns != stamp
    data.train = data.train[:3]  # as another --train-size
    _, fewer = means()
    assert fewer.sum() < more.sum()


def test_class_means_are_summed_in_double_precision():
    """Half a million regions: in single precision the sum would be off from the third digit on."""
    emb = torch.full((500_000, 1), 0.1)

    class Predictor(torch.nn.Module):
        cls_score = torch.nn.Linear(1, 1)

        def forward(self, emb):
            return None, None

    heads = types.SimpleNamespace(
        select_training_samples=lambda *a: (None, None, [torch.zeros(len(emb), dtype=int)], None),
        box_roi_pool=lambda *a: emb,
        box_head=lambda x: x,
        box_predictor=Predictor(),
    )
    batch = types.SimpleNamespace(tensors=None, image_sizes=None)
    teacher = types.SimpleNamespace(
        transform=lambda *a: (batch, None),
        backbone=lambda x: None,
        rpn=lambda *a: (None, None),
        roi_heads=heads,
    )
    means, counts = detect_nd.region_class_means(teacher, [(None, None)] * 2, 1)
    assert counts.item() == 1_000_000 and means.item() == pytest.approx(0.1, rel=1e-7)


# --- data ----------------------------------------------------------------------------------------


def test_coco_layout_with_gaps_crowds_and_odd_boxes(coco, capsys):
    args = parsed(coco)
    data = common.load_detection_data(args, CPU)
    text = capsys.readouterr().out
    assert "train2017: not trained on: 1 crowd regions, 2 boxes without area" in text
    assert "train2017: 1 images without boxes are left out" in text
    assert data.classes == ["__background__", "a", "b", "c"] and data.num_classes == 4
    assert data.category_ids == [None, 3, 7, 90]
    assert [s.image_id for s in data.train] == [10, 11, 13]
    assert [s.image_id for s in data.val] == [10, 11, 12, 13]
    assert data.train[0].boxes.tolist() == [[4, 5, 24, 35], [30, 2, 64, 22]]
    assert data.train[0].labels.tolist() == [1, 3]
    truth = data.truth["annotations"]  # whole, with the crowd, numbered from 1
    assert len(truth) == 7 and truth[2]["iscrowd"] == 1 and truth[0]["id"] == 1
    images = [image for batch in data.batches("train", 2) for image in batch[0]]
    assert [tuple(i.shape) for i in images] == [(3, 48, 64), (3, 64, 64), (3, 64, 48)]
    assert all(0 <= i.min() and 0.5 < i.max() <= 1 for i in images)
    assert torch.equal(images[0][0], images[0][1])  # grey


@pytest.mark.parametrize(
    "categories, classes",
    [
        ([(1, "person"), (90, "toothbrush")], 91),  # COCO's own: numbered as torchvision's weights
        ([(0, "person"), (5, "dog"), (6, "cat")], 4),
        ([(1, "dog"), (2, "cat")], 3),
    ],
)
def test_labels(cwd, categories, classes):
    for split in ("train2017", "val2017"):
        write_coco(Path("coco"), coco_table(categories), split)
    data = common.load_detection_data(parsed("--data-dir coco"), CPU)
    assert data.num_classes == classes
    labels = torch.cat([s.labels for s in data.train]).tolist()
    names = {data.classes[label] for label in labels}
    assert min(labels) > 0 and names == {categories[0][1], categories[-1][1]}
    assert {data.category_ids[k] for k in labels} == {categories[0][0], categories[-1][0]}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_flip_boxes_with_pixels_and_do_not_depend_on_workers(coco):
    args = parsed(coco)
    data = common.load_detection_data(args, CPU)
    by_id = {s.image_id: s for s in data.train}
    plain = {i: x for xs, _, ids in data.batches("train", 1) for x, i in zip(xs, ids)}
    flips = 0
    for seed in range(4):
        data.workers = 0
        state = torch.get_rng_state()
        here = list(data.batches("train", 1, seed))
        if seed == 0:
            data.workers = 2
            assert [ids for *_, ids in data.batches("train", 1, seed)] == [i for *_, i in here]
        assert torch.equal(torch.get_rng_state(), state)  # a run's own draws stay its own
        for (image,), (target,), (image_id,) in here:
            boxes, width = by_id[image_id].boxes, by_id[image_id].width
            if not torch.equal(image, plain[image_id]):
                flips += 1
                assert torch.equal(image.flip(2), plain[image_id])
                x1, y1, x2, y2 = boxes.unbind(1)
                boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
            assert torch.equal(target["boxes"], boxes)
    assert 0 < flips < 12


def test_batches_hold_images_of_one_orientation_and_are_shared(few_scenes, monkeypatch):
    data = common.load_detection_data(parsed(), CPU)
    drawn = data.train * 3
    odd = [s._replace(width=100 + 50 * (i % 3 == 0), height=120) for i, s in enumerate(data.train)]
    data.train = (odd * 4)[:30]  # 12 wide and 18 tall
    keys = data._batches(data.train, 4, 7)
    assert sorted(i for batch in keys for i, _ in batch) == list(range(30))
    assert data.steps(4) == len(keys) == 8
    kinds = [{data.train[i].width for i, _ in batch} for batch in keys]
    assert sum(len(kind) > 1 for kind in kinds) <= 1
    assert keys == data._batches(data.train, 4, 7) != data._batches(data.train, 4, 8)
    data.train = data.train[:9]
    assert data.steps(4) == 2  # one over: left out
    monkeypatch.setattr(common, "world", lambda: 3)
    data.train = odd[:6] * 3
    assert data.steps(12) == 2 and data.steps(13) == 1  # 12 and 6; 13, and 5: less than two each
    with pytest.raises(common.UserError, match="--batch-size 2 .* 3 processes need one each"):
        data.steps(2)
    data.train, shares = drawn[:18], []
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        for seed in (None, 0):
            shares.append([ids for *_, ids in data.batches("train", 7, seed, shared=True)])
    for whole, parts in zip((None, 0), (shares[::2], shares[1::2])):
        batches = [ids for *_, ids in data.batches("train", 7, whole)]
        if whole is None:  # a part of the batches
            assert sum(parts, []) == batches and [len(p) for p in parts] == [1, 1, 1]
        else:  # a part of every batch
            assert [sum(ids, []) for ids in zip(*parts)] == batches
            assert [len(ids) for part in parts for ids in part] == [2, 2, 2, 2, 3, 3]


def test_scenes_are_drawn_once_and_alike(few_scenes, monkeypatch):
    folder = common.draw_scenes(Path("a"), 64)
    before = (folder / "annotations/instances_val2017.json").stat().st_mtime_ns
    again, other = common.draw_scenes(Path("a"), 64), common.draw_scenes(Path("b"), 64)
    with monkeypatch.context() as patch:  # two processes at once: the other is faster
        write = Path.rename
        patch.setattr(
            Path, "rename", lambda old, new: shutil.copytree(old, new) and write(old, new)
        )
        both = common.draw_scenes(Path("c"), 64)
    assert len(list(both.rglob("*.png"))) == 12 and os.listdir("c") == [both.name]
    assert (again / "annotations/instances_val2017.json").stat().st_mtime_ns == before
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    assert len(names) == 9 + 3 + 2
    assert all((folder / n).read_bytes() == (other / n).read_bytes() for n in names)
    table = json.loads((folder / "annotations/instances_train2017.json").read_text())
    assert [c["name"] for c in table["categories"]] == list(common.SHAPES)
    per_image = np.bincount([a["image_id"] for a in table["annotations"]], minlength=9)
    assert per_image.min() >= 2 and per_image.max() <= 5
    for a in table["annotations"]:
        x, y, w, h = a["bbox"]
        assert 0 <= x < x + w <= 64 and 0 <= y < y + h <= 64 and min(w, h) > 8


# --- average precision ---------------------------------------------------------------------------


def test_ap_is_pycocotools(capsys):
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    images = [dict(id=i, width=640, height=480, file_name="") for i in range(12)]
    annotations, found = [], []
    for i in range(11):  # the last image has no boxes
        for _ in range(rng.integers(1, 7)):
            category, side = int(rng.choice([0, 4, 9])), rng.uniform(8, 200, 2)
            box = [*rng.uniform(0, 250, 2).tolist(), *side.tolist()]
            crowd = int(rng.random() < 0.15)
            annotations.append(dict(image_id=i, category_id=category, bbox=box, iscrowd=crowd))
            for _ in range(rng.integers(0, 3)):
                moved = (np.array(box) + rng.normal(0, 0.06, 4) * box[2]).tolist()
                moved[2:] = [max(2.0, v) for v in moved[2:]]
                guess = category if rng.random() < 0.8 else int(rng.choice([0, 4, 9]))
                entry = dict(image_id=i, category_id=guess, bbox=moved)
                found.append(entry | dict(score=float(rng.random())))
    found.append(dict(image_id=11, category_id=4, bbox=[5, 5, 50, 50], score=0.9))
    categories = {k: f"c{k}" for k in (0, 4, 9)}
    truth = common._truth((categories, {i["id"]: i for i in images}, annotations), set(range(12)))
    theirs = pycocotools.COCO()
    theirs.dataset = json.loads(json.dumps(truth))
    theirs.createIndex()
    evaluator = COCOeval(theirs, theirs.loadRes([dict(d) for d in found]), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    wanted = [100 * v for v in evaluator.stats[:6]]
    scores, by_class = common.coco_ap(truth, found)
    assert list(scores.values()) == pytest.approx(wanted, abs=2e-3) and 5 < scores["AP"] < 95
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    for k, category in enumerate((0, 4, 9)):
        assert by_class[category] == pytest.approx(100 * precision[:, :, k].mean(), abs=2e-3)
    nothing, _ = common.coco_ap(truth, [])
    assert nothing["AP"] == 0


# --- runs ----------------------------------------------------------------------------------------


def test_one_command_trains_the_teacher_and_writes_the_run(few_scenes, capsys, monkeypatch):
    command = SMALL.replace("--out o", "--student resnet18 --class-means-images 5")
    with monkeypatch.context() as patch:
        stop_in(patch, 3)  # in the teacher's second epoch
        assert run(command, "--epochs", "2") == 128 + signal.SIGTERM
    capsys.readouterr()
    assert run(command, "--epochs", "2") == 0  # goes on with that teacher
    out = Path("runs/detect_nd-mobilenet_v2-resnet18-shapes-s0")
    assert {p.name for p in out.iterdir()} == {
        *("metrics.jsonl", "result.json", "student.pt", "last.pt", ".lock")
    }
    r, text = result(out), capsys.readouterr().out
    assert r["method"] == "KD++" and r["script"] == "detect_nd.py" and r["train_images"] == 8
    assert r["student_ap"] == lines(out)[-1]["AP"] and set(r["ap"]) == set(common.AP_NAMES)
    for line in lines(out):
        keys = ("cls", "box", "objectness", "rpn_box", "nd", "kd", "lr", "images_per_second", "AP")
        assert np.isfinite([line[key] for key in keys]).all() and "reviewkd" not in line
    shown = text.index("teacher mobilenet_v2 from checkpoints")  # before the student's first step
    assert text.index("epoch   2/2") < shown < text.index("epoch   1/2")
    student = common.build_detector("resnet18", 7, parsed())
    student.load_state_dict(weights(out / "student.pt"))  # the student alone, strictly
    saved = torch.load(out / "last.pt", weights_only=True)["state"]
    assert saved.keys() == {"student", "helpers", "optimizer", "data", "teacher"}
    assert saved["teacher"] == r["teacher_hash"] and not saved["helpers"]
    # its AP, from the file; the settings are those of the run
    assert run(f"--eval {out}/student.pt --dataset shapes --data-dir drawn --per-class") == 0
    text = capsys.readouterr().out
    assert common.ap_line(r["ap"]) in text and "--fpn-width 16" in text and "ring" in text
    # the teacher is there now, and one of another recipe is not taken for it
    assert run(command, "--epochs", "2", "--resume") == 0
    assert run(command, "--epochs", "2", "--teacher-epochs", "3") == 2
    assert "epochs 2 (asked: 3)" in capsys.readouterr().err


def test_weights_of_zero_are_the_plain_detector_bit_for_bit(quick, unsaved):
    command = f"{quick} --epochs 2 --seed 3 --nd-weight 0 --kd-weight 0 --lr 0.02"
    assert run(command) == 0 and result("o")["method"] == "plain"
    args = parsed(command)
    data = common.load_detection_data(args, CPU)
    torch.manual_seed(3)
    net = common.build_detector("mobilenet_v2", 7, args)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, 0.9, weight_decay=1e-4)
    step = 0
    for epoch in range(2):
        net.train()
        for images, targets, _ in data.batches("train", 4, 3 * 100_003 + epoch):
            lr = 0.02 / 10 ** ((step / 4 >= 2 / 3) + (step / 4 >= 8 / 9))
            optimizer.param_groups[0]["lr"] = lr * (0.001 if step == 0 else 1)  # warm-up
            losses = net(images, targets)
            order = ("classifier", "box_reg", "objectness", "rpn_box_reg")
            optimizer.zero_grad()
            sum(losses[f"loss_{name}"] for name in order).backward()
            optimizer.step()
            step += 1
    assert same(weights("o/student.pt"), net.state_dict())


WEIGHTS = dict(nd=3.0, kd=20.0, reviewkd=2.0)
STEP = "--iterations 1 --momentum 0 --weight-decay 0 --lr 5 --seed 4"
STEP += "".join(f" --{name}-weight {value}" for name, value in WEIGHTS.items())


def gradients_by_hand(args, means, counts, part=slice(None), draws=4):
    """Of the first step, all terms at once: torchvision's detector and the formulas.

    part: of the batch's images. draws: the seed of the regions.
    """
    data = common.load_detection_data(args, CPU)
    teacher = common.load_detector("mobilenet_v2", 7, args, "teacher.pth")
    torch.manual_seed(4)
    student = common.build_detector("mobilenet_v2", 7, args).train()
    review = detect_nd.ReviewKD([16] * 5, [16] * 5, 16)
    both = torch.nn.ModuleDict({"student": student, "review": review})
    before = {k: v.detach().clone() for k, v in both.named_parameters()}
    torch.manual_seed(draws)
    images, targets, _ = next(iter(data.batches("train", 4, 4 * 100_003)))
    images, targets = student.transform(images[part], targets[part])
    maps = student.backbone(images.tensors)
    proposals, losses = student.rpn(images, maps, targets)
    heads = student.roi_heads
    boxes, _, labels, offsets = heads.select_training_samples(proposals, targets)

    def branch(heads, maps):
        emb = heads.box_head(heads.box_roi_pool(maps, boxes, images.image_sizes))
        return emb, *heads.box_predictor(emb)

    s, s_logits, regressed = branch(heads, maps)
    with torch.no_grad():
        t_maps = teacher.backbone(images.tensors)
        t, t_logits, _ = branch(teacher.roi_heads, t_maps)
    fastrcnn_loss = torchvision.models.detection.roi_heads.fastrcnn_loss
    loss = sum(losses.values()) + sum(fastrcnn_loss(s_logits, regressed, labels, offsets))
    y = torch.cat(labels)
    assert (y == 0).any() and (y > 0).any()
    keep = (counts[y] > 0) & ((y > 0) | (not args.nd_foreground_only))
    cos = F.cosine_similarity(s, means[y], eps=1e-12)
    nd = 1 - cos * (s.norm(dim=1) / t.norm(dim=1)).clamp(max=1)
    p, q = t_logits.softmax(1), s_logits.softmax(1)
    fused = review(list(maps.values()), list(t_maps.values()))
    loss = loss + WEIGHTS["nd"] * nd[keep].mean()
    loss = loss + WEIGHTS["kd"] * (p * (p / q).log()).sum(1).mean()
    loss = loss + WEIGHTS["reviewkd"] * detect_nd.hcl_loss(fused, list(t_maps.values()))
    loss.backward()
    return before, {name: p.grad for name, p in both.named_parameters()}


def assert_moved_along(before, gradients):
    """At the first step of the warm-up a thousandth of the learning rate counts."""
    saved = torch.load("o/last.pt", weights_only=True)["state"]
    after = {f"student.{name}": value for name, value in weights("o/student.pt").items()}
    after |= saved["helpers"]
    parts = ("backbone.body", "backbone.fpn", "rpn", "roi_heads.box_head", "roi_heads.box_p")
    for part in ("review", *(f"student.{part}" for part in parts)):
        names = [name for name in before if name.startswith(part)]
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names])
        wanted = torch.cat([-0.005 * gradients[name].flatten() for name in names])
        assert (moved - wanted).norm() < 2e-3 * wanted.norm() > 0, part


@pytest.mark.parametrize("foreground_only", [False, True])
def test_a_step_is_the_one_written_by_hand(quick, foreground_only):
    command = quick.replace("--epochs 1", STEP) + " --nd-foreground-only" * foreground_only
    assert run(command) == 0
    args = parsed(command)
    data = common.load_detection_data(args, CPU)
    teacher = common.load_detector("mobilenet_v2", 7, args, "teacher.pth")
    torch.manual_seed(0)
    means = detect_nd.region_class_means(teacher, data.batches("train", 4), 7)
    assert_moved_along(*gradients_by_hand(args, *means))


def test_two_ranks(quick, monkeypatch):
    """A step is the mean of the two halves' gradients; AP is that of one process, to the digit."""
    monkeypatch.setattr(common, "SCENES", {"train2017": 9, "val2017": 9})
    command = quick.replace("--epochs 1", STEP)
    args = parsed(command)
    data = common.load_detection_data(args, CPU)
    here = Path.cwd()
    assert finish(pair(detect_nd.program, shlex.split(command), here), here) == ([0, 0], "")
    out = Path("out0").read_text()
    assert result("o")["world_size"] == 2 and out.count("epoch   1/1") == 1
    assert not Path("out1").read_text()
    # class means: each rank took one of the two batches, and drew from the same seed
    teacher = common.load_detector("mobilenet_v2", 7, args, "teacher.pth")
    sums, seen = 0, 0
    for batch in data.batches("train", 4):
        torch.manual_seed(0)
        part, count = detect_nd.region_class_means(teacher, [batch], 7)
        sums, seen = sums + part.double() * count[:, None], seen + count
    [file] = Path("checkpoints").glob("region-means-*.pt")
    kept = torch.load(file, weights_only=True)["value"]
    assert torch.equal(kept["counts"], seen)
    assert torch.allclose(kept["means"].double() * seen[:, None], sums, rtol=1e-5, atol=1e-5)
    # the step
    halves = [
        gradients_by_hand(args, kept["means"], seen, part, draws)
        for part, draws in ((slice(0, 2), 4), (slice(2, 4), 4 + 7919))
    ]
    (before, first), (_, second) = halves
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert_moved_along(before, mean)
    # the detections: of three batches each rank took some
    teacher_ap = common.evaluate_detector(teacher, data, args)
    assert f"teacher.pth: {common.ap_line(teacher_ap)}\n" in out
    assert result("o")["teacher_ap"] == teacher_ap["AP"] > 0
    found = common.detect(teacher, data, args)
    for share in (slice(0, 4), slice(4, 9)):
        of_share = [f for f in found if f["image_id"] in range(9)[share]]
        assert common.coco_ap(data.truth, of_share)[0] != teacher_ap
    student = common.load_detector("mobilenet_v2", 7, args, "o/student.pt")
    assert common.evaluate_detector(student, data, args) == result("o")["ap"]


def test_schedule_and_warm_up(quick, monkeypatch):
    """Of 180 steps: drops at 120 and 160, warm-up over 18. Of more than 10,000: over 1000."""
    net = torch.nn.Linear(1, 1)
    term = dict.fromkeys(("cls", "box", "objectness", "rpn_box"), net.weight.sum())
    rates, steps = [], 60

    class Watch(common.DetectionMeter):
        def add(self, terms, image_ids):
            frame = sys._getframe(1).f_locals
            rates.append([group["lr"] for group in frame["optimizer"].param_groups])
            term.update(dict.fromkeys(term, net.weight.sum()))
            super().add(terms, image_ids)
            if len(rates) == 1100:
                raise common.Stopped(15)

    monkeypatch.setattr(detect_nd, "DetectionMeter", Watch)
    monkeypatch.setattr(detect_nd, "build_detector", lambda *a: net)
    monkeypatch.setattr(detect_nd, "training_pass", lambda *a: (dict(term), None))
    monkeypatch.setattr(
        detect_nd, "evaluate_detector", lambda *a: dict.fromkeys(common.AP_NAMES, 0.0)
    )
    monkeypatch.setattr(common.DetectionData, "steps", lambda *a: steps)
    monkeypatch.setattr(
        common.DetectionData, "batches", lambda *a, **k: iter([([], [], [0])] * steps)
    )
    args = parsed(f"{quick} --lr 0.01 --nd-weight 0 --kd-weight 0", teacher=None, epochs=3)
    detect_nd.main(args)
    wanted = [0.01 / (1 if k < 120 else 10 if k < 160 else 100) for k in range(180)]
    wanted = [lr * min(1, 0.001 + 0.999 * k / 18) for k, lr in enumerate(wanted)]
    assert [lr for (lr,) in rates] == pytest.approx(wanted)
    rates.clear()
    steps, args.epochs = 12_000, 1
    with pytest.raises(common.Stopped):
        detect_nd.main(args)
    assert [rates[k][0] for k in (0, 500, 1000, 1099)] == pytest.approx(
        [0.00001, 0.005005, 0.01, 0.01]
    )


def test_the_teacher_is_shown_the_students_pixels_and_regions_and_stays(
    quick, unsaved, monkeypatch
):
    calls, nets, pixels = [], {}, []
    branch, build = detect_nd.box_branch, common.load_detector

    def spy(detector, maps, boxes, sizes):
        calls.append((detector, boxes, sizes, maps))
        return branch(detector, maps, boxes, sizes)

    def loaded(*a):
        net = nets["teacher"] = build(*a)
        net.backbone.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0]))
        return net

    def passed(student, images, targets):
        losses, sampled = training_pass(student, images, targets)
        seen.append(sampled)
        return losses, sampled

    seen, training_pass = [], detect_nd.training_pass
    monkeypatch.setattr(detect_nd, "training_pass", passed)
    monkeypatch.setattr(detect_nd, "box_branch", spy)
    monkeypatch.setattr(common, "load_detector", loaded)
    assert run(f"{quick} --reviewkd-weight 1 --nd-weight 0") == 0
    teacher = nets["teacher"]
    assert len(seen) == 2 and len(calls) == 4  # once each: the student's features serve all
    for step, sampled in enumerate(seen):
        (student, boxes, sizes, _), (other, teacher_boxes, teacher_sizes, maps) = calls[
            2 * step : 2 * step + 2
        ]
        assert other is teacher and student is not teacher
        assert teacher_boxes is boxes and teacher_sizes is sizes
        assert any(sampled.pixels is x for x in pixels)
        assert len(maps) == 5
    fresh = build("mobilenet_v2", 7, parsed(), "teacher.pth")
    assert same(teacher.state_dict(), fresh.state_dict())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    line = lines("o")[0]
    assert "reviewkd" in line and "kd" in line and "nd" not in line


@pytest.mark.parametrize(
    "options, method, terms",
    [
        ("--base reviewkd", "ReviewKD++", {"nd", "reviewkd"}),
        ("--kd-weight 0 --nd-foreground-only", "ND on foreground", {"nd"}),
        ("--precision bf16", "KD++", {"nd", "kd"}),
    ],
)
def test_the_family(quick, unsaved, options, method, terms):
    assert run(quick, *options.split()) == 0
    line = lines("o")[0]
    assert result("o")["method"] == method
    assert {t for t in ("nd", "kd", "reviewkd") if t in line} == terms
    assert all(math.isfinite(line[t]) and line[t] > 0 for t in terms)
    assert not any(key.startswith("review") for key in weights("o/student.pt"))


@pytest.mark.parametrize(
    "pair, kdpp, reviewkdpp, reviewkd",
    [
        ("resnet101 resnet18", (1.5, 1.0), (1.5, 1.2), 1.2),
        ("resnet101 resnet50", (1.0, 1.0), (1.0, 1.4), 1.0),
        ("resnet50 mobilenet_v2", (1.0, 1.0), (1.5, 2.2), 2.0),
    ],
)
def test_weights_are_the_papers(pair, kdpp, reviewkdpp, reviewkd, monkeypatch):
    """And those of the baselines that --compare trains."""
    teacher, student = pair.split()
    command = f"--dataset shapes --teacher {teacher} --student {student}"
    args = parsed(command)
    assert (args.nd_weight, args.kd_weight, args.reviewkd_weight) == (*kdpp, 0)
    assert args.method == "KD++"
    args = parsed(f"{command} --base reviewkd")
    assert (args.nd_weight, args.reviewkd_weight, args.kd_weight) == (*reviewkdpp, 0)
    assert args.method == "ReviewKD++"
    asked = {}
    monkeypatch.setattr(
        detect_nd, "launch", lambda _, args, baselines, needed: asked.update(baselines)
    )
    detect_nd.program(shlex.split(f"{command} --base reviewkd --nd-foreground-only"))
    off = dict(nd_weight=0, kd_weight=0, reviewkd_weight=0, nd_foreground_only=False, plot=())
    assert asked == {
        "plain": off | dict(method="plain"),
        "kd": off | dict(method="KD", kd_weight=kdpp[1]),
        "reviewkd": off | dict(method="ReviewKD", reviewkd_weight=reviewkd),
    }
    detect_nd.program(shlex.split(f"{command} --kd-weight 7"))
    assert asked["kd"]["kd_weight"] == 7  # the same as beside ND


def test_weights_in_the_readme_are_the_scripts():
    text = (ROOT / "README.md").read_text()
    for names, (kdpp, reviewkdpp, reviewkd) in detect_nd.PAIR_WEIGHTS.items():
        numbers = [f"{a:g}, {b:g}" for a, b in (kdpp, reviewkdpp)]
        assert f"| {names} | {numbers[0]} | {numbers[1]} | {reviewkd:g} |" in text


def test_weights_left_open(capsys):
    parsed("--teacher resnet50 --student mobilenet_v2")
    assert "weights (the paper's)" in capsys.readouterr().out
    args = parsed("")
    assert (args.nd_weight, args.kd_weight, args.reviewkd_weight) == (1.5, 1, 0)
    assert (args.epochs, args.batch_size, args.lr, args.regions) == (12, 8, 0.01, 512)
    assert args.pretrained_backbone and not args.train_teacher
    assert "none known for resnet50 resnet18" in capsys.readouterr().out
    assert not parsed("--no-pretrained-backbone").pretrained_backbone


def test_a_short_run_learns(few_scenes, unsaved, monkeypatch):
    """To find the shapes of 4 scenes: AP 30 to 35 by three seeds, 0 with labels drawn at random."""
    monkeypatch.setattr(common, "SCENES", {"train2017": 4, "val2017": 1})
    command = f"--data-dir {common.draw_scenes(Path('drawn'), 64)} --val-split train2017 --out o"
    command += " --student mobilenet_v2 --image-size 64 --regions 32 --smallest-anchor 16"
    command += " --fpn-width 32 --no-pretrained-backbone --workers 0"
    args = parsed(f"{command} --epochs 24 --batch-size 2 --lr 0.02 --nd-weight 0 --kd-weight 0")
    args.teacher = None
    nothing = dict.fromkeys(common.AP_NAMES, 0.0)
    monkeypatch.setattr(detect_nd, "evaluate_detector", lambda *a: nothing)
    detect_nd.main(args)
    data = common.load_detection_data(args, CPU)
    torch.manual_seed(0)
    untrained = common.build_detector("mobilenet_v2", 7, args)
    trained = common.load_detector("mobilenet_v2", 7, args, "o/student.pt")
    bar = 15
    assert common.evaluate_detector(untrained, data, args)["AP"] < bar / 4
    assert common.evaluate_detector(trained, data, args)["AP"] > bar


def stop_in(monkeypatch, step):
    count, add = [0], common.DetectionMeter.add

    def stopping(self, *a):
        count[0] += 1
        if count[0] == step:
            signal.raise_signal(signal.SIGTERM)
        return add(self, *a)

    monkeypatch.setattr(common.DetectionMeter, "add", stopping)


def test_resume_equals_uninterrupted(quick, monkeypatch):
    command = f"{quick} --epochs 2 --base reviewkd".replace("--out o", "") + " --out"
    assert run(command, "whole") == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert run(command, "parts") == 128 + signal.SIGTERM
    saved = torch.load("parts/last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 1)
    with monkeypatch.context() as patch:
        seen = count_steps(patch)
        assert run(command, "parts", "--resume") == 0
    assert len(seen) == 1  # the step that was left
    assert_ended_alike("whole", "parts", epochs=2)


def assert_ended_alike(*runs, epochs):
    assert same(*(weights(f"{d}/student.pt") for d in runs))
    timeless = [[{k: v for k, v in x.items() if k not in TIMES} for x in lines(d)] for d in runs]
    assert timeless[0] == timeless[1] and len(timeless[0]) == epochs


def count_steps(monkeypatch):
    seen, add = [], common.DetectionMeter.add
    monkeypatch.setattr(
        common.DetectionMeter,
        "add",
        lambda meter, terms, ids: seen.append(ids) or add(meter, terms, ids),
    )
    return seen


def test_iterations_end_within_an_epoch_and_resume(quick, monkeypatch):
    command = quick.replace("--epochs 1 --out o", "--iterations 3 --lr 0.02") + " --out"
    with monkeypatch.context() as patch:
        seen = count_steps(patch)
        assert run(command, "whole") == 0
    assert [len(ids) for ids in seen] == [4, 4, 4]
    # the drops at 2/3 and 8/9 of the three steps: before the third
    assert [line["lr"] for line in lines("whole")] == pytest.approx([0.02, 0.002])
    assert result("whole")["epochs"] == 2 and result("whole")["args"]["iterations"] == 3
    with monkeypatch.context() as patch:
        stop_in(patch, 1)
        assert run(command, "parts") == 128 + signal.SIGTERM
    assert run(command, "parts", "--resume") == 0
    assert_ended_alike("whole", "parts", epochs=2)


def test_resume_within_an_epoch_with_bad_images(quick, monkeypatch, capsys):
    """From what --save-minutes left behind: 7 of 9 images are good: 3 batches of 2."""
    assert parsed().save_minutes == 15
    scenes = common.draw_scenes(Path("drawn"), 32)
    torn = scenes / "train2017/000004.png"
    torn.write_bytes(torn.read_bytes()[:300])
    (scenes / "train2017/000007.png").unlink()
    command = quick.replace("--dataset shapes --data-dir drawn", f"--data-dir {scenes}")
    command = command.replace("--train-size 8 --batch-size 4", "--batch-size 2 --workers 0")
    command = command.replace("--out o", "") + " --lr 0.02 --smallest-anchor 16 --skip-bad-images"
    command += " --no-pretrained-backbone --out"
    assert run(command, "whole") == 0
    captured = capsys.readouterr()
    assert "000004.png: cannot be read" in captured.err and "2 bad images" in captured.out
    assert result("whole")["bad_images"] == 2 and result("whole")["train_images"] == 7
    save = common.Run._save

    def killed(self, objects, step=0, meter=None):
        save(self, objects, step, meter)
        if step == 2:
            raise common.Stopped(signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "_save", killed)
        assert run(command, "parts", "--save-minutes", "1e-9") == 128 + signal.SIGKILL
    seen = count_steps(monkeypatch)
    assert run(command, "parts", "--resume") == 0
    assert len(seen) == 1 and len(seen[0]) == 2
    assert_ended_alike("whole", "parts", epochs=1)


def test_compare_and_plot_and_predict(quick, unsaved, capsys):
    more = "--base", "reviewkd", "--reviewkd-weight", "3"
    assert run(quick, *more, "--compare", "--plot") == 0
    assert result("o/plain")["method"] == "plain" and result("o/kd")["method"] == "KD"
    alone = result("o/reviewkd")["args"]
    assert alone["reviewkd_weight"] == 3 and alone["nd_weight"] == 0
    assert Path("o/detections.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert re.search(r"\| method \| n \| AP \|", text)
    assert re.search(r"\| ReviewKD\+\+ \| 1 \|", text)
    lying = Image.Exif()
    lying[0x0112] = 6  # as telephones store a picture taken upright
    Image.new("CMYK", (70, 80)).save("mine.jpg", exif=lying)
    assert run("--eval o/student.pt --predict mine.jpg --out drawn") == 0
    drawn = Image.open("drawn/mine-boxes.png")
    assert drawn.mode == "RGB" and drawn.width > drawn.height
    assert common.run_program(common.print_table, ["o/result.json", "o/kd/result.json"]) == 0


def test_seeds(quick, unsaved, capsys):
    assert run(quick, "--seeds", "0", "1") == 0
    assert [result(f"o/s{k}")["seed"] for k in (0, 1)] == [0, 1]
    assert not same(weights("o/s0/student.pt"), weights("o/s1/student.pt"))
    text = capsys.readouterr().out
    assert re.search(r"\| KD\+\+ \| 2 \| \d+\.\d\d ± ", text)
    assert text.count("class means of regions: one pass") == 1  # the teacher's: for both
    assert run(quick.replace("--out o", "--out alone --seed 1")) == 0
    assert same(weights("o/s1/student.pt"), weights("alone/student.pt"))


def test_box_features_of_zero_train_on(quick, unsaved):
    """A teacher whose regions all look the same: zero."""
    net = torch.load("teacher.pth", weights_only=True)
    for name in net:
        if name.startswith("roi_heads.box_head.fc7"):
            net[name].zero_()
    torch.save(net, "teacher.pth")
    assert run(quick, "--base", "reviewkd", "--kd-weight", "1") == 0
    line = lines("o")[0]
    assert line["nd"] == pytest.approx(1) and all(
        math.isfinite(line[k]) for k in ("kd", "reviewkd")
    )


def test_a_loss_that_is_not_finite_names_the_term_and_the_images(quick, monkeypatch, capsys):
    monkeypatch.setattr(detect_nd, "kd_loss", lambda *a, **k: torch.tensor(math.nan))
    assert run(quick) == 2
    error = capsys.readouterr().err
    assert re.search(r"the loss term kd became infinite or nan in epoch 1, images \d, \d", error)


# --- bad input -----------------------------------------------------------------------------------


def spoil(what):
    table = coco_table()
    path = Path("coco/annotations/instances_train2017.json")
    if what == "missing image":
        Path("coco/train2017/10.png").unlink()
    elif what == "torn image":
        file = Path("coco/train2017/11.jpg")
        file.write_bytes(file.read_bytes()[:700])
    elif what == "other size":
        Image.new("RGB", (30, 30)).save("coco/train2017/10.png")
    elif what == "not json":
        path.write_text('{"images": [')
    elif what == "no file":
        path.unlink()
    elif what == "no categories":
        path.write_text(json.dumps({k: table[k] for k in ("images", "annotations")}))
    else:
        if what == "unknown category":
            table["annotations"][0]["category_id"] = 4
        elif what == "unknown image":
            table["annotations"][3]["image_id"] = 99
        elif what == "short box":
            table["annotations"][3]["bbox"] = [1, 2, 3]
        elif what == "nan box":
            table["annotations"][3]["bbox"] = [1, 2, 3, math.nan]
        elif what == "other categories":
            table["categories"][1]["name"] = "x"
        elif what.endswith("no boxes"):
            table["annotations"] = []
        elif what == "words for numbers":
            table["images"][0]["id"] = "10"
        if what.startswith("val"):
            path = path.with_name("instances_val2017.json")
        path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    "what, words",
    {
        "missing image": "10.png: no such image.*1 missing.*--skip-bad-images",
        "torn image": "11.jpg: cannot be read as an image.*--skip-bad-images",
        "other size": "10.png: is 30x30, its annotation says 64x48.*--skip-bad-images",
        "not json": "instances_train2017.json: not COCO's",
        "no file": "--data-dir: cannot read coco/annotations/instances_train2017.json",
        "no categories": "instances_train2017.json: not COCO's.*categories",
        "unknown category": "annotation 0: category_id 4 is not in the file",
        "unknown image": "annotation 3: image_id 99 is not in the file",
        "short box": "instances_train2017.json: not COCO's",
        "nan box": "annotation 3: bbox .* not finite",
        "other categories": "train2017 and val2017 list different categories",
        "no boxes": "train2017: no image with a box",
        "val: no boxes": "val2017: no boxes to compare with",
        "words for numbers": "instances_train2017.json: not COCO's.*whole number",
    }.items(),
)
def test_a_bad_data_set_ends_in_one_line_and_status_2(
    coco, unsaved, what, words, capsys, monkeypatch
):
    monkeypatch.setattr(
        detect_nd, "evaluate_detector", lambda *a: dict.fromkeys(common.AP_NAMES, 0)
    )
    spoil(what)
    args = parsed(f"{coco} --epochs 1 --batch-size 3 --out o --workers 0")
    vars(args).update(teacher=None, nd_weight=0.0, kd_weight=0.0, method="plain")
    assert common.run_program(lambda _: detect_nd.main(args)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and re.search(words, errors[0]), captured.err
    if "--skip-bad-images" in words:
        args.skip_bad_images = True
        assert common.run_program(lambda _: detect_nd.main(args)) == 0
        captured = capsys.readouterr()
        assert "note: 1 bad images are left out" in captured.out and result("o")["bad_images"] == 1
        named = re.findall(
            r"note: coco/train2017/(1\d)\.\w+: (?:is|cannot)\b.*: left out", captured.err
        )
        assert named == {"missing image": [], "torn image": ["11"], "other size": ["10"]}[what]


BAD = {
    "--teacher resnet19": "--teacher.*resnet18",
    "--nd-weight -1": "--nd-weight",
    "--predict a.png": "--predict.*--eval",
    "--plot --nd-weight 0 --kd-weight 0": "--plot",
    "--base reviewkd --batch-size 1": "--batch-size 1",
    "--teacher-ckpt absent.pt": "absent.pt: no such file",
    "--teacher-ckpt torn.pth": "torn.pth",
    "--teacher-ckpt teacher.pth --teacher resnet18": "teacher.pth",
    "--eval other.pth": "other.pth: a detector of 5 classes",
    "--eval teacher.pth --resume": "--resume and --eval",
    "--teacher-ckpt other.pth": "other.pth: a detector of 5 classes with the background.*has 7",
    "--teacher-ckpt wide.pth": "wide.pth: .* this network's is",
    "--train-size 99": "--train-size 99: there are 9",
    "--image-size 16": "--image-size 16",
    "--eval absent.pt": "absent.pt: no such file",
    "--eval teacher.pth --predict absent.png": "absent.png",
    "--resume": "nothing to resume",
    "--seed -1": "--seed",
    "--iterations 3": "--epochs and --iterations",
    "--iterations 0": "--iterations",
    "--dataset coco": "--data-dir: cannot read drawn/annotations/instances_train2017.json",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_ends_in_one_line_and_status_2(quick, arguments, capsys):
    args = parsed()
    if "other" in arguments:
        torch.save(common.build_detector("mobilenet_v2", 5, args).state_dict(), "other.pth")
    args.fpn_width = 32
    Path("torn.pth").write_bytes(Path("teacher.pth").read_bytes()[:5000])
    if "wide" in arguments:
        torch.save(common.build_detector("mobilenet_v2", 7, args).state_dict(), "wide.pth")
    assert run(quick, *shlex.split(arguments)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0]
    assert re.search(BAD[arguments], errors[0]), errors[0]


def test_a_loaded_teacher_that_finds_nothing_is_refused(quick, monkeypatch, capsys):
    assert hopeless(0.3) and not hopeless(12.0)
    monkeypatch.setattr(common, "hopeless", lambda ap: True)
    assert run(quick) == 2
    assert re.search(r"error: teacher.pth: AP \d\.\d\d", capsys.readouterr().err)


def test_no_weights_for_the_teacher(coco, capsys):
    assert run(f"{coco} --teacher resnet101 --out o") == 2
    assert "no detector for resnet101; give --teacher-ckpt" in capsys.readouterr().err
    assert run(f"{coco} --out o") == 2
    assert "no detector for these categories" in capsys.readouterr().err


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert detect_nd.__doc__.strip() in text and "--nd-foreground-only" in text


def test_backbones():
    """Levels of 256 channels at strides 4 to 64; torchvision's weights of resnet50 would fit."""
    for name in ("resnet34", "mobilenet_v2"):
        net = common.build_detector(name, 91, parsed("--dataset coco --image-size 64"), True)
        with torch.no_grad():
            maps = net.backbone(torch.zeros(1, 3, 64, 64))
        assert [tuple(m.shape[1:]) for m in maps.values()] == [
            (256, s, s) for s in (16, 8, 4, 2, 1)
        ]
    with torch.device("meta"):
        ours = common.build_detector("resnet50", 91, parsed("--dataset coco"), True)
        theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None
        )
    wanted = {k: v.shape for k, v in theirs.state_dict().items() if "num_batches" not in k}
    assert {k: v.shape for k, v in ours.state_dict().items()} == wanted
