"""Speed of a training step of each script, beside that of the bare networks.

    OMP_NUM_THREADS=1 python results/bench.py --json results/bench.json
    python results/bench.py --only detection --json results/bench.json     or training, metrics
    python results/bench.py --only compiled --batch-size 64 --json results/bench.json   on a GPU

A bare step is the student's forward and backward pass, the teacher's forward pass and the optimizer
on tensors that are ready: no loading, augmentation, distillation loss, metrics or schedule. Every
measurement stands between two bare steps, so that a busy machine slows both: compare these ratios,
not rates. On a CPU, time is that of the processor, without what other programs use.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import detect_nd
import kd2m

METHODS = {  # row of the table: script and flags
    "KD": "nd --nd-weight 0", "KD++": "nd", "DKD++": "nd --base dkd", "DIST++": "nd --base dist",
    "ReviewKD++": "nd --base reviewkd", "SP": "sp", "SP+KD": "sp --kd-weight 1", "DCD": "dcd",
    "DCD+KD": "dcd --kd-weight 1", "w2_empirical": "kd2m",
    "w2_gaussian": "kd2m --metric w2_gaussian",
    "KD, teacher cached": "nd --nd-weight 0 --teacher-cache cache",
    "KD++, teacher cached": "nd --teacher-cache cache",
}  # fmt: skip


def seconds(step, steps):
    """Of one step, the mean over `steps` of them."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def compare(bare, others, rounds):
    """Images per second of each, and the ratio to the bare steps just before and after."""
    rates, of_bare = {"bare": [bare()]}, {}
    for _ in range(rounds):
        for name, measure in others.items():
            rate = measure()
            rates["bare"].append(bare())
            rates.setdefault(name, []).append(rate)
            ratio = rate / statistics.mean(rates["bare"][-2:])
            of_bare.setdefault(name, []).append(round(ratio, 4))
    rates = {name: [round(rate, 2) for rate in values] for name, values in rates.items()}
    return {"images_per_second": rates, "of_bare": of_bare}


def rate_of_run(script, command, epochs=2):
    """What a run of the script reports: the median of the second half of its epochs."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        script.main([*command.split(), "--epochs", str(epochs), "--out", f"{out}/run"])
        lines = Path(out, "run/metrics.jsonl").read_text().splitlines()[epochs // 2 :]
    return statistics.median(json.loads(line)["images_per_second"] for line in lines)


def bare_step(options, device, layout=torch.channels_last, precision="fp32", teacher=True):
    """A function that measures training steps on random images."""
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, 32, 32, device=device).to(memory_format=layout)
    labels = torch.randint(0, 24, (options.batch_size,), device=device)
    student = common.build_model(options.student, 24).to(device, memory_format=layout)
    frozen = common.build_model(options.teacher, 24).to(device, memory_format=layout).eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = student(images)
            if teacher:
                with torch.no_grad():
                    frozen(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    step()  # the first one chooses algorithms
    return lambda: options.batch_size / seconds(step, options.steps)


def training(options, device):
    torch.save(common.build_model(options.teacher, 24).state_dict(), "teacher.pth")
    common.evaluate = lambda *_: 50.0  # not measured; and any teacher passes
    pair = dict(teacher=options.teacher, student=options.student, batch_size=options.batch_size)
    command = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in pair.items())
    command += f" --dataset shapes --train-size {options.batch_size * options.steps}"
    alone = functools.partial(bare_step, options, device, teacher=False)
    others = {
        "student alone, contiguous": alone(torch.contiguous_format),
        "student alone": alone(),
        "student alone, bf16": alone(precision="bf16"),
    }
    for name, method in METHODS.items():
        script, _, flags = method.partition(" ")
        run = importlib.import_module(script), f"{command} --teacher-ckpt teacher.pth {flags}"
        others[name] = functools.partial(rate_of_run, *run)
        if "--teacher-cache" in flags:
            rate_of_run(*run)  # fills the cache
    return pair | compare(bare_step(options, device), others, options.rounds)


def metrics(options, device):
    """KD2M's metrics on random features, forward and backward, and a bare step, in ms."""
    bare, times, rng = bare_step(options, device), {"step": []}, torch.Generator().manual_seed(0)
    labels = torch.randint(0, 100, (options.batch_size,), generator=rng).to(device)
    for dimension in (64, 512):
        t = torch.randn(options.batch_size, dimension, generator=rng).relu()
        s = (t + torch.randn(t.shape, generator=rng)).relu()
        head = torch.randn(dimension, 100, generator=rng) / dimension**0.5
        logits = [(s @ head).to(device), (t @ head).to(device)]
        s, t = s.to(device).requires_grad_(), t.to(device)
        for name, metric in kd2m.METRICS.items():
            more = {"cw2": [labels], "jw2": logits}.get(name[:3], [])
            cost = functools.partial(lambda metric, *x: metric(*x).backward(), metric, s, t, *more)
            for _ in range(options.rounds):
                times["step"].append(1000 * options.batch_size / bare())
                cost()
                times.setdefault(f"{name} {dimension}", []).append(1000 * seconds(cost, 5))
    return {"ms": {key: [round(ms, 3) for ms in values] for key, values in times.items()}}


def detection(options, device):
    """Runs on synthetic scenes; bare: the detector's step and the teacher's box branch."""
    args = detect_nd.parse_args(["--dataset", "shapes"])
    data = detect_nd.load_detection_data(args)
    torch.manual_seed(0)
    teacher = detect_nd.build_detector(args.teacher, data.num_classes, args)
    torch.save(teacher.state_dict(), "detector.pth")
    teacher = detect_nd.load_detector(args.teacher, data.num_classes, args, "detector.pth")
    teacher = teacher.to(device)
    student = detect_nd.build_detector(args.student, data.num_classes, args).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.001, 0.9, weight_decay=1e-4)
    batches = itertools.cycle(itertools.islice(data.train_batches(args.batch_size, 0), 10))

    def step():
        images, targets, _ = next(batches)
        losses, rois = detect_nd.training_pass(student, images, targets)
        with torch.no_grad():
            maps = teacher.backbone(rois.pixels)
            detect_nd.box_branch(teacher, maps, rois.boxes, rois.sizes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    step()
    detect_nd.evaluate_detector = lambda *_: (dict.fromkeys(detect_nd.AP_NAMES, 50.0), {})
    command = "--dataset shapes --teacher-ckpt detector.pth --train-size"
    command += f" {args.batch_size * options.steps}"
    methods = {"no distillation": "--nd-weight 0 --kd-weight 0", "KD": "--nd-weight 0"}
    methods |= {"KD++": "", "ReviewKD++": "--base reviewkd"}
    others = {
        name: functools.partial(rate_of_run, detect_nd, f"{command} {flags}")
        for name, flags in methods.items()
    }
    return compare(lambda: args.batch_size / seconds(step, options.steps), others, options.rounds)


def compiled(options, device):
    """Runs of KD++ without and with `--compile`, on random images of CIFAR-100's size."""
    torch.save(common.build_model(options.teacher, 100).state_dict(), "teacher.pth")
    common.near_chance = lambda *_: False  # any teacher passes
    images = torch.randint(0, 256, (8400, 32, 32, 3), dtype=torch.uint8)
    split = common.Split(images[:6400], torch.arange(6400) % 100)
    test = common.Split(images[6400:], torch.arange(2000) % 100)
    more = list(map(str, range(100))), common.STATS["cifar100"], 32, device, 0
    data = common.Data("cifar100", split, test, *more)
    common.load_data = lambda args: data
    rates = {}
    for flags in ("", "--compile"):
        command = f"--teacher {options.teacher} --student {options.student} --batch-size"
        command += f" {options.batch_size} --teacher-ckpt teacher.pth {flags}"
        rate = rate_of_run(importlib.import_module("nd"), command, options.epochs)
        rates[f"{flags[2:] or 'eager'}, batch {options.batch_size}"] = [rate]
    return {"images_per_second": rates}


def compiled_table(part):
    """Markdown: rates, and minutes for 240 epochs of 50,000 images."""
    lines = ["| step of KD++ | images/s | 240 epochs of CIFAR-100 |", "|---|---|---|"]
    for name, [rate] in part["images_per_second"].items():
        lines.append(f"| {name} | {rate:,.0f} | {240 * 50_000 / rate / 60:.1f} min |")
    return "\n".join(lines)


def rate_table(part):
    """Markdown: the median rates, and the ratios to the bare step."""
    rates = {name: statistics.median(values) for name, values in part["images_per_second"].items()}
    lines = ["| step | images/s | of bare | min, max |", "|---|---|---|---|"]
    bare = next(name for name in rates if name.startswith(("bare", "step on ready")))
    for name, rate in rates.items():
        ratios = part.get("of_bare", {}).get(name, [rate / rates[bare]])
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}" if len(ratios) > 1 else "-"
        lines.append(f"| {name} | {rate:.3g} | {statistics.median(ratios):.2f} | {spread} |")
    return "\n".join(lines)


def metric_table(part):
    """Markdown: the median times in two dimensions, and their shares of a bare step."""
    ms = {key: statistics.median(values) for key, values in part["ms"].items()}
    lines = ["| metric | ms, dimension 64 | ms, 512 | % of a step, 64 | 512 |", "|---" * 5 + "|"]
    for name in dict.fromkeys(key.split()[0] for key in ms if key != "step"):
        times = [ms[f"{name} 64"], ms[f"{name} 512"]]
        cells = [f"{x:.1f}" for x in (*times, *(100 * time / ms["step"] for time in times))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found, part):
    """A table of results/README.md, from what is in bench.json."""
    measured = found if part == "training" else found[part]
    tables = {"metrics": metric_table, "compiled": compiled_table}
    return tables.get(part.split()[0], rate_table)(measured)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8, help="of each run of --only compiled")
    parser.add_argument("--only", choices=("training", "metrics", "detection", "compiled"))
    parser.add_argument("--json", type=os.path.abspath, help="updated with what is measured")
    options = parser.parse_args()
    device = common.pick_device("auto")
    if device.type == "cpu":
        time.perf_counter = time.process_time
    found = json.loads(Path(options.json).read_text()) if os.path.exists(options.json or "") else {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        parts = [training, metrics, detection] + [compiled] * (device.type == "cuda")
        for measure in parts:
            name = measure.__name__
            if options.only in (None, name):
                name += f" {options.batch_size}" * (measure is compiled)  # of both sizes
                part = measure(options, device) | common.environment(device)
                found |= part if measure is training else {name: part}
                print(f"{name}\n\n{table(found, name)}\n", flush=True)
    if options.json:
        common.write_whole(Path(options.json), (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
