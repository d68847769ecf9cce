"""Stop runs at random moments, resume them, and compare their ends with runs left alone.

    python results/kill.py --kills 1000 --json results/kills.json
    mount -t tmpfs -o size=1g tmpfs small
    python results/kill.py --full-disk small --kills 200 --json results/full_disk.json

Every script in turn, and one with --teacher-cache, on synthetic data. A trial starts a run, stops
it at a random moment within the length of a whole run (SIGKILL, or SIGTERM, which half of the time
a second signal follows), resumes it and stops it again, three times in all. Then it resumes to the
end. The student's weights and every logged number except times must be those of the run that was
never stopped. Checkpoints are written after nearly every step, so that many stops meet one that is
being written. With --full-disk it is the file system that stops a run: a random part of what a
whole run needs is free, and everything again for the next attempt.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

SHORT = (
    "--dataset shapes --image-size 16 --train-size 240 --teacher resnet8 --teacher-epochs 1"
    " --student resnet8 --batch-size 24 --epochs 2 --save-minutes 0.0005 --device cpu"
)
DETECTION = (
    "--dataset shapes --image-size 64 --train-size 8 --epochs 2 --teacher-epochs 1 --batch-size 4"
    " --save-minutes 0.0005 --device cpu"
)
COMMANDS = {  # name of a trial's folder -> the command, without --out
    "nd": f"nd {SHORT} --student wrn_16_2",  # with a projector, which has dropout
    "sp": f"sp {SHORT} --kd-weight 1",
    "dcd": f"dcd {SHORT}",
    "kd2m": f"kd2m {SHORT} --metric sliced_w2",  # draws directions in every step
    "cache": f"dcd {SHORT} --kd-weight 1 --teacher-cache OUT-cache",  # a cache for every trial
    "detect_nd": f"detect_nd {DETECTION}",
}


LOGS = Path(tempfile.mkdtemp())


def start(command, out, *more):
    """A process that runs a script; forked, so that it need not import torch."""
    script, *flags = command.replace("OUT", out).split()

    def run():
        with open(LOGS / f"{out}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        main = importlib.import_module(script).main
        os._exit(common.run_program(main, [*flags, "--out", out, *more]))

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


def judge(found, process, out, whole):
    """Count a trial, and whether its run ended like the whole one."""
    found["trials"] += 1
    good = process.exitcode == 0 and same(ending(out), whole)
    found["identical"] += good
    if not good:
        print(f"{out}: not the same; its messages are in {LOGS}/{out}.log", flush=True)


def measure(name: str, kills_wanted: int, rng: random.Random) -> dict:
    command = COMMANDS[name]
    importlib.import_module(command.split()[0])
    start(command, f"{name}-first").join()  # trains the teacher, which all later runs load
    began = time.perf_counter()
    start(command, f"{name}-whole").join()
    length, whole = time.perf_counter() - began, ending(f"{name}-whole")
    found = dict(SIGKILL=0, SIGTERM=0, twice=0, within_an_epoch=0, trials=0, identical=0)
    while found["SIGKILL"] + found["SIGTERM"] < kills_wanted:
        out = f"{name}{found['trials']}"
        for kill in (True, True, True, False):
            resume = ["--resume"] if Path(out, ".lock").exists() else []  # has the run begun?
            process = start(command, out, *resume)
            if kill:
                process.join(rng.uniform(0, length))
                if process.exitcode == 0:  # it has ended; a whole run may take less by now
                    length *= 1.0 if resume else 0.9
                    continue
                if not process.is_alive():
                    raise RuntimeError(f"{out} failed; its messages are in {LOGS}/{out}.log")
                signals, second = [rng.choice(("SIGKILL", "SIGTERM"))], rng.random() < 0.5
                if signals == ["SIGTERM"] and second:
                    signals.append(rng.choice(("SIGKILL", "SIGTERM")))
                for number in signals:
                    os.kill(process.pid, getattr(signal, number))
                    time.sleep(rng.uniform(0, 0.05) if second else 0)
                process.join()
                if process.exitcode != 0:
                    found[signals[0]] += 1
                    found["twice"] += len(signals) == 2
                if Path(out, "last.pt").exists():
                    found["within_an_epoch"] += common.read_checkpoint(f"{out}/last.pt")["step"] > 0
            process.join()
        judge(found, process, out, whole)
    print(name, found, flush=True)
    return found | {"seconds_of_a_whole_run": round(length, 1)}


def with_a_full_disk(name: str, stops_wanted: int, rng: random.Random) -> dict:
    """As `measure`; the current folder lies on a file system of little room."""
    command = COMMANDS[name]
    importlib.import_module(command.split()[0])

    def clear():  # the teacher and the data are written anew in each trial
        for path in Path(".").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    clear()
    free = shutil.disk_usage(".").free
    start(command, f"{name}-whole").join()
    whole, needed = ending(f"{name}-whole"), free - shutil.disk_usage(".").free
    found = dict(stopped=0, finished=0, other_endings=0, trials=0, identical=0)
    while found["stopped"] < stops_wanted and found["trials"] < stops_wanted:
        out = f"{name}{found['trials']}"
        clear()
        for full in (True, True, True, False):
            if full:
                room = shutil.disk_usage(".").free - int(rng.uniform(0, 1.3 * needed))
                Path("ballast").write_bytes(bytes(max(0, room)))
            resume = ["--resume"] if Path(out, ".lock").exists() else []
            (process := start(command, out, *resume)).join()
            Path("ballast").unlink(missing_ok=True)
            if full:
                ending_of = {0: "finished", 2: "stopped"}.get(process.exitcode, "other_endings")
                found[ending_of] += 1
        judge(found, process, out, whole)
    print(name, found, flush=True)
    return found | {"bytes_of_a_whole_run": needed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--full-disk", metavar="DIR", help="a small file system; all in it is deleted"
    )
    parser.add_argument("--json", type=lambda path: Path(path).absolute())
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that forks must not have threads
    rng, share = random.Random(options.seed), -(-options.kills // len(options.only))
    os.chdir(options.full_disk or tempfile.mkdtemp())
    trial = with_a_full_disk if options.full_disk else measure
    found = dict(device=common.device_name(torch.device("cpu")), torch=torch.__version__)
    for name in options.only:
        found[name] = trial(name, share, rng)
        if options.json:  # what is done is kept if this is stopped
            common.write_whole(options.json, (json.dumps(found, indent=1) + "\n").encode())
    return int(any(found[name]["identical"] != found[name]["trials"] for name in options.only))


if __name__ == "__main__":
    sys.exit(main())
