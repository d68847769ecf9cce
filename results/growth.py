"""Does a long run grow? Memory, open files and files on disk, early and late in small runs.

    python results/growth.py --json results/growth.json

Every script trains for 50 short epochs on synthetic data, each in a process of its own. Compared
are resident memory and open files after epochs 5 and 50, and the files in the run's folder before
and after five resumptions.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

SHORT = (
    "--dataset shapes --image-size 16 --train-size 96 --batch-size 24 --teacher resnet8"
    " --student resnet8 --teacher-epochs 1 --device cpu"
)
COMMANDS = {
    "nd": f"nd {SHORT}",
    "sp": f"sp {SHORT} --kd-weight 1 --at-weight 1000",
    "dcd": f"dcd {SHORT} --teacher-cache cache",
    "kd2m": f"kd2m {SHORT} --metric sinkhorn",
    "detect_nd": "detect_nd --dataset shapes --image-size 64 --train-size 8 --batch-size 4"
    " --teacher-epochs 1 --device cpu",
}


def count(name: str, epochs: int, results) -> None:
    """Train, and put (memory in MB, open files) of every epoch into `results`."""
    script, *flags = COMMANDS[name].split()
    end_epoch = common.Run.end_epoch

    def counting(run, **scores):
        end_epoch(run, **scores)
        if run.args.method != "teacher":
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            results.append((round(memory, 1), len(os.listdir("/proc/self/fd"))))

    common.Run.end_epoch = counting
    main = importlib.import_module(script).main
    common.run_program(main, [*flags, "--epochs", str(epochs), "--out", name])
    files = sorted(str(path) for path in Path(name).rglob("*"))
    for _ in range(5):  # of a finished run: it reads last.pt and writes the result again
        common.run_program(main, [*flags, "--epochs", str(epochs), "--out", name, "--resume"])
    results.append((len(files), len(list(Path(name).rglob("*")))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--json", type=lambda path: Path(path).absolute())
    options = parser.parse_args()
    os.chdir(tempfile.mkdtemp())
    found, context = {}, multiprocessing.get_context("spawn")
    for name in COMMANDS:
        with context.Manager() as manager:
            results = manager.list()
            process = context.Process(target=count, args=(name, options.epochs, results))
            process.start()
            process.join()
            *epochs, files = results
        early, late = epochs[min(4, len(epochs) - 1)], epochs[-1]
        found[name] = dict(
            memory_mb_epoch_5=early[0], memory_mb_last_epoch=late[0],
            memory_growth_percent=round(100 * (late[0] / early[0] - 1), 2),
            open_files_epoch_5=early[1], open_files_last_epoch=late[1],
            files_of_the_run=files[0], files_after_5_resumptions=files[1],
        )  # fmt: skip
        print(name, found[name], flush=True)
    content = dict(epochs=options.epochs, torch=torch.__version__, scripts=found)
    if options.json:
        common.write_whole(options.json, (json.dumps(content, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
