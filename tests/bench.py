"""Speed and memory of a training step of nd.py against the bare networks, in one process.

    python tests/bench.py                     resnet56 -> resnet20, batch 128
    python tests/bench.py --json results/bench-nd.json

The bare step is the student's forward and backward, the teacher's forward and the optimizer on
tensors that are ready: no loading, augmentation, distillation loss, metrics or schedule. Rounds of
bare steps and of real runs alternate, so that a noisy machine slows both; compare ratios, not
rates. Nothing here is a test: timings do not belong in tests.
"""

import argparse
import contextlib
import io
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
import nd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--teacher", default="resnet56")
parser.add_argument("--student", default="resnet20")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--json", type=Path)
options = parser.parse_args()
device = common.pick_device("auto")
images = torch.randn(options.batch_size, 3, 32, 32, device=device)
labels = torch.randint(0, 24, (options.batch_size,), device=device)


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(step, steps=options.steps):
    """Images per second over some steps."""
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return options.batch_size * steps / (time.perf_counter() - start)


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


def real_rate(base, nd_weight):
    """images/s that a run of nd.py reports for its second epoch."""
    command = f"--dataset shapes --teacher {options.teacher} --student {options.student} --epochs 2"
    command += f" --train-size {options.batch_size * options.steps} --teacher-ckpt teacher.pth"
    command += f" --batch-size {options.batch_size} --base {base} --nd-weight {nd_weight} --out o"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        nd.program(command.split())
    return json.loads(Path("o/metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]


def main():
    bare = {
        "bare, teacher folded": bare_step(fold=True),
        "bare, teacher as it is": bare_step(fold=False),
    }
    real = {"KD": ("kd", 0), "KD++": ("kd", 1), "DKD++": ("dkd", 1), "DIST++": ("dist", 1)}
    real["ReviewKD++"] = ("reviewkd", 1)
    layouts = {
        "student alone, fp32 contiguous": ("fp32", torch.contiguous_format),
        "student alone, fp32 channels-last": ("fp32", torch.channels_last),
        "student alone, bf16 channels-last": ("bf16", torch.channels_last),
    }
    layouts = {
        name: bare_step(False, precision, layout, teacher=False)
        for name, (precision, layout) in layouts.items()
    }
    rates = {name: [] for name in (*bare, *real, *layouts)}
    torch.save(common.build_model(options.teacher, 24).state_dict(), "teacher.pth")
    common.near_chance = lambda *_: False  # an untrained teacher costs as much as a trained one
    for _ in range(options.rounds):
        for name, step in (bare | layouts).items():
            rates[name].append(rate(step))
        for name, (base, nd_weight) in real.items():
            rates[name].append(real_rate(base, nd_weight))
    emb = [torch.randn(options.batch_size, 64, device=device, requires_grad=i == 0) for i in (0, 1)]
    means = torch.rand(24, 64, device=device)
    loss_only = rate(lambda: nd.nd_loss(*emb, means, labels).backward(), 200)
    start = time.perf_counter()
    common.draw_shapes(6000, 0)
    drawn = time.perf_counter() - start

    median = {name: statistics.median(values) for name, values in rates.items()}
    reference = median["bare, teacher folded"]
    pair = f"{options.teacher} -> {options.student}"
    print(f"{pair}, batch {options.batch_size}, {common.device_name('auto')}")
    print(f"{'':38s}{'images/s':>9s}  of bare   (rounds' lowest to highest)")
    for name, value in median.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:38s}{value:9.0f}  {value / reference:6.3f}   ({low:.0f} to {high:.0f})")
    gain = median["student alone, bf16 channels-last"] / median["student alone, fp32 contiguous"]
    print(f"bf16 channels-last / fp32 contiguous: {gain:.2f}")
    print(f"nd_loss forward and backward: {1e6 * options.batch_size / loss_only:.0f} us a batch")
    print(f"6,000 shapes drawn in {drawn:.2f} s; peak memory {common.peak_memory_mb('auto')} MB")
    return {
        "teacher": options.teacher,
        "student": options.student,
        "batch_size": options.batch_size,
        "device": common.device_name("auto"),
        "torch": torch.__version__,
        "images_per_second": {k: [round(v, 1) for v in values] for k, values in rates.items()},
        "nd_loss_us": round(1e6 * options.batch_size / loss_only, 1),
        "shapes_6000_seconds": round(drawn, 2),
        "peak_memory_mb": common.peak_memory_mb("auto"),
    }


if __name__ == "__main__":
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = main()
        os.chdir(here)
    if options.json:
        common.write_whole(options.json, (json.dumps(result, indent=1) + "\n").encode())
