"""Stop a run at random moments, resume it, and compare its end with that of a run left alone.

    python results/kill.py --kills 50 --json results/kills.json

Each trial starts a run of sp.py on synthetic images, stops it (SIGKILL or SIGTERM, at a random
moment within the length of a whole run), resumes it and stops it again, three times in all. Then it
resumes to the end. The student's weights and every logged number except times must be those of the
run that was never stopped. It takes minutes, so it is no test.
"""

import argparse
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

COMMAND = (
    "--dataset shapes --train-size 960 --teacher resnet8 --teacher-epochs 4 --student wrn_16_1"
    " --batch-size 24 --kd-weight 1 --epochs 3 --save-minutes 0.02 --out"
).split()


def start(*arguments):
    """A process that runs sp.py; forked, so that it need not import torch or draw the images."""

    def run():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os._exit(common.run_program(sp.main, [*COMMAND, *arguments]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def ending(out):
    """The weights and the logged numbers, without times, of a finished run."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    return torch.load(Path(out, "student.pt"), weights_only=True), timeless


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in b[0])


def measure(kills_wanted: int, seed: int) -> dict:
    rng = random.Random(seed)
    common.load_data(sp.parse_args([*COMMAND, "unused"]))  # kept in memory for the forked runs
    start("with_teacher").join()  # trains the teacher, which all later runs load
    began = time.perf_counter()
    start("whole").join()
    length, whole = time.perf_counter() - began, ending("whole")
    kills, trials, identical, within = {"SIGKILL": 0, "SIGTERM": 0}, 0, 0, 0
    while sum(kills.values()) < kills_wanted:
        out = f"trial{trials}"
        for kill in (True, True, True, False):
            resume = ["--resume"] if Path(out, ".lock").exists() else []  # has the run begun?
            process = start(out, *resume)
            if kill:
                time.sleep(rng.uniform(0, length))
                name = rng.choice(list(kills))
                os.kill(process.pid, getattr(signal, name))
                process.join()
                kills[name] += process.exitcode != 0  # 0: it had already finished
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
        "device": common.device_name(torch.device("cpu")),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=lambda path: Path(path).absolute())
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that forks must not have threads
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = measure(options.kills, options.seed)
    print(json.dumps(found, indent=1))
    if options.json:
        common.write_whole(options.json, (json.dumps(found, indent=1) + "\n").encode())
    return int(found["identical_endings"] != found["trials"])


if __name__ == "__main__":
    sys.exit(main())
