"""Speed and memory of a training step of each script against the bare networks, in one process.

    OMP_NUM_THREADS=1 python tests/bench.py   resnet56 -> resnet20, batch 128; on a CPU, one thread
    python tests/bench.py --json results/bench.json
    python tests/bench.py --only detection --json results/bench.json      or training, metrics
    python tests/bench.py --only loading --imagenet DIR                   with train/ and val/

The bare step is the student's forward and backward, the teacher's forward and the optimizer on
tensors that are ready: no loading, augmentation, distillation loss, metrics or schedule. Bare steps
come right before and after whatever is compared with them, so that a noisy machine slows both;
compare those ratios, not rates. For detect_nd.py the bare step is the plain detector's, and the
teacher's backbone and box branch on the same regions. Nothing here is a test: timings do not
belong in tests.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dcd
import detect_nd
import kd2m
import nd
import sp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--teacher", default="resnet56")
parser.add_argument("--student", default="resnet20")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--only", choices=("training", "metrics", "detection", "loading"))
parser.add_argument("--imagenet", type=os.path.abspath, help="a folder with train/ and val/")
parser.add_argument("--json", type=Path, help="written, or its part of what is in there")
options = parser.parse_args()
device = common.pick_device("auto")
images = torch.randn(options.batch_size, 3, 32, 32, device=device)
labels = torch.randint(0, 24, (options.batch_size,), device=device)


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step, steps):
    """Of one step, the mean over some."""
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def rate(step, steps=options.steps):
    """Images per second over some steps."""
    return options.batch_size / seconds(step, steps)


def bare_step(fold, precision="fp32", layout=torch.channels_last, teacher=True):
    torch.manual_seed(0)
    student = common.build_model(options.student, 24).to(device, memory_format=layout)
    net = common.build_model(options.teacher, 24).to(device).eval().requires_grad_(False)
    net = (common.fold_batchnorm(net, images[:2]) if fold else net).to(memory_format=layout)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    x = images.contiguous(memory_format=layout)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = student(x)
            if teacher:
                with torch.no_grad():
                    net(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    step()  # the first one chooses algorithms
    return step


def real_rate(script, arguments):
    """images/s that a run of the script reports for its second epoch."""
    command = f"--dataset shapes --teacher {options.teacher} --student {options.student} --epochs 2"
    command += f" --train-size {options.batch_size * options.steps} --teacher-ckpt teacher.pth"
    command += f" --batch-size {options.batch_size} --out o {arguments}"
    return last_epochs_rate(script, command)


def last_epochs_rate(script, command):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script.program(command.split())
    return json.loads(Path("o/metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]


def sp_against_bare_products():
    """Milliseconds, forward and backward: sp_loss, and nothing but its two products Q Q^T."""
    student, teacher = (torch.randn(256, 64, 8, 8, device=device) for _ in range(2))
    student, q_s = student.requires_grad_(), student.flatten(1).requires_grad_()
    q_t = teacher.flatten(1)

    def products():
        return (q_s @ q_s.T).sum() + (q_t @ q_t.T).sum()

    times = {"sp_loss": [], "products": []}
    for _ in range(2 * options.rounds):
        times["sp_loss"].append(seconds(lambda: sp.sp_loss(student, teacher).backward(), 20))
        times["products"].append(seconds(lambda: products().backward(), 20))
    return [1000 * statistics.median(values) for values in times.values()]


def by_processor_time(part):
    """On a CPU in images a second of the processor, so that other programs do not count."""

    def measured():
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        with unittest.mock.patch.object(time, "perf_counter", clock):
            return part()

    return measured


@by_processor_time
def training():
    bare = {
        "bare, teacher folded": bare_step(fold=True),
        "bare, teacher as it is": bare_step(fold=False),
    }
    real = {
        "KD": (nd, "--nd-weight 0"),
        "KD++": (nd, ""),
        "DKD++": (nd, "--base dkd"),
        "DIST++": (nd, "--base dist"),
        "ReviewKD++": (nd, "--base reviewkd"),
        "SP": (sp, ""),
        "SP+KD": (sp, "--kd-weight 1"),
        "DCD": (dcd, ""),
        "DCD+KD": (dcd, "--kd-weight 1"),
        "w2_empirical": (kd2m, ""),
        "w2_gaussian": (kd2m, "--metric w2_gaussian"),
    }
    layouts = {
        "student alone, fp32 contiguous": ("fp32", torch.contiguous_format),
        "student alone, fp32 channels-last": ("fp32", torch.channels_last),
        "student alone, bf16 channels-last": ("bf16", torch.channels_last),
    }
    for name, (precision, layout) in layouts.items():
        bare[name] = bare_step(False, precision, layout, teacher=False)
    step, of_bare = bare["bare, teacher folded"], {}
    rates = {name: [] for name in bare}
    torch.save(common.build_model(options.teacher, 24).state_dict(), "teacher.pth")
    common.near_chance = lambda *_: False  # an untrained teacher costs as much as a trained one
    for script in (nd, sp, dcd, kd2m):
        script.evaluate = lambda *_: 0.0  # the rate is of training
    measure = {name: functools.partial(rate, other) for name, other in bare.items()}
    measure |= {name: functools.partial(real_rate, *run) for name, run in real.items()}
    del measure["bare, teacher folded"]
    before = rate(step)
    for _ in range(options.rounds):
        for name, work in measure.items():
            value, after = work(), rate(step)
            rates["bare, teacher folded"].append(after)
            rates.setdefault(name, []).append(value)
            of_bare.setdefault(name, []).append(round(2 * value / (before + after), 4))
            before = after
    emb = [torch.randn(options.batch_size, 64, device=device, requires_grad=i == 0) for i in (0, 1)]
    means = torch.rand(24, 64, device=device)
    loss_only = seconds(lambda: nd.nd_loss(*emb, means, labels).backward(), 200)
    sp_ms, products_ms = sp_against_bare_products()
    start = time.perf_counter()
    common.draw_shapes(6000, 0)
    drawn = time.perf_counter() - start

    median = {name: statistics.median(values) for name, values in rates.items()}
    pair = f"{options.teacher} -> {options.student}"
    print(f"{pair}, batch {options.batch_size}, {common.device_name('auto')}")
    print(f"{'':38s}{'images/s':>9s}  of bare   (rounds' lowest to highest)")
    for name, value in median.items():
        ratios = of_bare.get(name, [1.0])
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name:38s}{value:9.0f}  {middle:6.3f}   ({low:.3f} to {high:.3f})")
    pairs = zip(*(of_bare[f"student alone, {how}"] for how in ("bf16 channels-last",
                                                              "fp32 contiguous")))  # fmt: skip
    gain = statistics.median(a / b for a, b in pairs)
    print(f"bf16 channels-last / fp32 contiguous: {gain:.2f}")
    print(f"nd_loss forward and backward: {1e6 * loss_only:.0f} us a batch")
    print(f"sp_loss on [256,64,8,8]: {sp_ms:.2f} ms, its two products alone {products_ms:.2f} ms")
    print(f"6,000 shapes drawn in {drawn:.2f} s; peak memory {common.peak_memory_mb('auto')} MB")
    return {
        "teacher": options.teacher,
        "student": options.student,
        "batch_size": options.batch_size,
        "device": common.device_name("auto"),
        "torch": torch.__version__,
        "images_per_second": {k: [round(v, 1) for v in values] for k, values in rates.items()},
        "of_bare": of_bare,
        "bf16_gain": round(gain, 4),
        "nd_loss_us": round(1e6 * loss_only, 1),
        "sp_loss_ms": round(sp_ms, 3),
        "sp_products_ms": round(products_ms, 3),
        "shapes_6000_seconds": round(drawn, 2),
        "peak_memory_mb": common.peak_memory_mb("auto"),
    }


def metric_costs():
    """KD2M's metrics on drawn clouds: ms forward and backward, and their share of a bare step."""
    step, shares = bare_step(fold=True), {}
    args = kd2m.parse_args([])
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 100, (options.batch_size,), generator=draw).to(device)
    clouds, times = {}, {"step": []}
    for width in (64, 512):
        teacher = torch.randn(options.batch_size, width, generator=draw).relu()
        student = (teacher + torch.randn(teacher.shape, generator=draw)).relu()
        head = torch.randn(width, 100, generator=draw) / width**0.5
        cloud = student, teacher, labels, student @ head, teacher @ head
        clouds[width] = [x.to(device) for x in cloud]

    def cost(width):
        student, *others = clouds[width]
        student = student.clone().requires_grad_()
        kd2m.feature_distance(args, student, *others).backward()

    for _ in range(options.rounds):
        times["step"].append(seconds(step, 3))
        for args.metric in kd2m.METRICS:
            for width in clouds:
                cost(width)
                name, work = f"{args.metric} {width}", functools.partial(cost, width)
                times.setdefault(name, []).append(seconds(work, 5))
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"KD2M's metrics at batch {options.batch_size}, forward and backward, width 64 and 512:")
    for name in kd2m.METRICS:
        ms = [1000 * median[f"{name} {width}"] for width in clouds]
        shares[name] = [round(x / 1000 / median["step"], 4) for x in ms]
        percents = "".join(f"{100 * share:8.1f} %" for share in shares[name])
        print(f"{name:15}{ms[0]:9.2f}{ms[1]:9.2f} ms {percents} of a bare step")
    return {
        "metrics": {
            "ms": {k: [round(1000 * v, 3) for v in vs] for k, vs in times.items()},
            "share_of_a_step": shares,
            "device": common.device_name("auto"),
        }
    }


def loading():
    """ImageNet files: does decoding, by one worker with a core to itself, hold up the step?"""
    args = dict(dataset="imagenet", data_dir=options.imagenet, image_size=224)
    args |= dict(train_size=None, val_size=None)
    data = common._imagenet(argparse.Namespace(**args, workers=1), device)
    threads, size = torch.get_num_threads(), 16
    torch.set_num_threads(max(1, threads - 1))
    student, teacher = (common.build_model(f"resnet{n}", data.num_classes) for n in (18, 34))
    student = student.to(device, memory_format=torch.channels_last)
    teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    teacher = common.fold_batchnorm(teacher, data.first_images())
    optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9)

    def step(images, labels):
        with torch.no_grad():
            teacher(images)
        optimizer.zero_grad()
        F.cross_entropy(student(images), labels).backward()
        optimizer.step()

    def rate_of(batches, count, work):
        next(batches)  # the worker has started
        wait()
        start = time.perf_counter()
        for images, labels in itertools.islice(batches, count):
            work(images, labels)
        wait()
        return size * count / (time.perf_counter() - start)

    def files(seed):
        return data.batches("train", size, seed=seed, augment=True)

    ready = next(files(0))
    rates = {"decoding alone": [], "step on ready tensors": [], "step on decoded files": []}
    for k in range(options.rounds):
        rates["decoding alone"].append(rate_of(files(k), 30, lambda *_: None))
        rates["step on ready tensors"].append(rate_of(itertools.repeat(ready), 4, step))
        rates["step on decoded files"].append(rate_of(files(k), 4, step))
    torch.set_num_threads(threads)
    median = {name: statistics.median(values) for name, values in rates.items()}
    print("loading: resnet34 -> resnet18 at 224 pixels, one worker process")
    for name, value in median.items():
        print(f"{name:38s}{value:9.1f} images/s")
    ratio = median["step on decoded files"] / median["step on ready tensors"]
    print(f"decoded / ready: {ratio:.3f}")
    return {
        "loading": {
            "images_per_second": {k: [round(v, 2) for v in vs] for k, vs in rates.items()},
            "device": common.device_name("auto"),
        }
    }


@by_processor_time
def detection():
    """Runs of detect_nd.py on drawn scenes against the plain detector's bare step."""
    args = detect_nd.parse_args(["--dataset", "shapes"])
    data = common.load_detection_data(args, device)
    torch.manual_seed(0)
    teacher = common.build_detector(args.teacher, data.num_classes, args)
    torch.save(teacher.state_dict(), "detector.pth")
    teacher = common.load_detector(args.teacher, data.num_classes, args, "detector.pth").to(device)
    student = common.build_detector(args.student, data.num_classes, args).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.001, 0.9, weight_decay=1e-4)
    batches = itertools.cycle(itertools.islice(data.batches("train", args.batch_size, 0), 10))

    def step(with_teacher):
        losses, seen = detect_nd.training_pass(student, *next(batches)[:2])
        if with_teacher:
            with torch.no_grad():
                maps = teacher.backbone(seen.pixels)
                detect_nd.box_branch(teacher, maps, seen.boxes, seen.sizes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    bare = {"bare": True, "bare, without the teacher": False}
    real = {
        "plain": "--nd-weight 0 --kd-weight 0",
        "KD": "--nd-weight 0",
        "KD++": "",
        "ReviewKD++": "--base reviewkd",
    }
    command = "--dataset shapes --teacher-ckpt detector.pth --epochs 2 --out o"
    command += f" --train-size {args.batch_size * options.steps}"
    common.hopeless = lambda ap: False
    nothing = dict.fromkeys(common.AP_NAMES, 0.0)  # the rate is of training
    common.evaluate_detector = detect_nd.evaluate_detector = lambda *_: nothing
    rates = {name: [] for name in (*bare, *real)}
    for with_teacher in bare.values():
        step(with_teacher)  # the first one chooses algorithms
    for _ in range(options.rounds):
        for name, with_teacher in bare.items():
            time_of_step = seconds(lambda: step(with_teacher), options.steps)  # noqa: B023
            rates[name].append(args.batch_size / time_of_step)
        for name, weights in real.items():
            rates[name].append(last_epochs_rate(detect_nd, f"{command} {weights}"))
    median = {name: statistics.median(values) for name, values in rates.items()}
    reference = median["bare"]
    what = f"{args.teacher} -> {args.student}, {args.image_size} pixels, batch {args.batch_size}"
    print(f"detection: {what}, {common.device_name('auto')}")
    for name, value in median.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:38s}{value:9.1f}  {value / reference:6.3f}   ({low:.1f} to {high:.1f})")
    print(f"peak memory {common.peak_memory_mb('auto')} MB")
    return {
        "detection": {
            "what": what,
            "device": common.device_name("auto"),
            "torch": torch.__version__,
            "images_per_second": {k: [round(v, 2) for v in vs] for k, vs in rates.items()},
            "peak_memory_mb": common.peak_memory_mb("auto"),
        }
    }


if __name__ == "__main__":
    here, result = Path.cwd(), {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        parts = dict(training=training, metrics=metric_costs, detection=detection, loading=loading)
        if not options.imagenet:
            del parts["loading"]
        for name, part in parts.items():
            if options.only in (None, name):
                result |= part()
        os.chdir(here)
    if options.json:
        common.write_whole(options.json, (json.dumps(result, indent=1) + "\n").encode())
