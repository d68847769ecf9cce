"""Kill a run at random moments, resume it, and compare its end with that of a run left alone.

    python tests/kill.py --kills 50 --json results/kills.json

Each trial starts a run of sp.py on drawn images, kills it (SIGKILL or SIGTERM, at a moment drawn
over the length of a whole run), resumes it, kills it again, and so on, some three times; then it
resumes to the end. The weights and every logged number but times must be those of the run that was
left alone. Nothing here is a test: it takes minutes.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import sp

torch.set_num_threads(1)  # of a process that forks
draw_shapes = functools.cache(common.draw_shapes)  # once, for all runs
common.draw_shapes = lambda count, *rest: draw_shapes(min(count, 960), *rest)
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--kills", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--json", type=Path)
options = parser.parse_args()

COMMAND = "--dataset shapes --train-size 960 --teacher resnet8 --batch-size 24".split()
RUN = "--student wrn_16_1 --teacher-ckpt teacher.pth --kd-weight 1 --epochs 3".split()
RUN = [*COMMAND, *RUN, "--save-minutes", "0.02", "--out"]


def start(arguments):
    """A process that runs sp.py; forked, so that it need not import torch first."""

    def run():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os._exit(common.run_program(sp.program, arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def ending(out):
    """Weights and logged numbers of a finished run."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    return torch.load(Path(out, "student.pt"), weights_only=True), timeless


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in b[0])


def train_teacher():
    """Any teacher above chance."""
    command = [*COMMAND, *"--student resnet8 --teacher-epochs 1 --epochs 4 --out teacher".split()]
    start([*command, "--sp-weight", "0"]).join()
    os.rename("teacher/student.pt", "teacher.pth")


def main():
    draw = random.Random(options.seed)
    for split in (0, 1):
        common.draw_shapes(960, split, 32)
    train_teacher()
    began = time.perf_counter()
    start([*RUN, "whole"]).join()
    length, whole = time.perf_counter() - began, ending("whole")
    kills, trials, identical, within = {"SIGKILL": 0, "SIGTERM": 0}, 0, 0, 0
    while sum(kills.values()) < options.kills:
        out = f"trial{trials}"
        for kill in (True, True, True, False):
            resume = ["--resume"] if Path(out, ".lock").exists() else []
            process = start([*RUN, out, *resume])
            if kill:
                time.sleep(draw.uniform(0, length))
                name = draw.choice(list(kills))
                os.kill(process.pid, getattr(signal, name))
                process.join()
                kills[name] += process.exitcode != 0  # 0: it had ended before
                if Path(out, "last.pt").exists():
                    within += common.read_checkpoint(Path(out, "last.pt"))["step"] > 0
            process.join()
        trials += 1
        identical += process.exitcode == 0 and same(ending(out), whole)
        print(f"{sum(kills.values())} kills, {trials} trials, {identical} identical", flush=True)
    return {
        "kills": kills,
        "stopped_within_an_epoch": within,
        "trials": trials,
        "identical_endings": identical,
        "seconds_of_a_whole_run": round(length, 1),
        "device": common.device_name("auto"),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = main()
        os.chdir(here)
    print(json.dumps(found, indent=1))
    if options.json:
        common.write_whole(options.json, (json.dumps(found, indent=1) + "\n").encode())
    sys.exit(found["identical_endings"] != found["trials"])
