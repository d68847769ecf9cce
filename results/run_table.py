"""One recipe, every method: start, or continue, the runs of the CIFAR-100 table.

    python results/run_table.py                              all that is missing, one by one
    python results/run_table.py --only kd,kdpp --seeds 0 --cache cache
    python results/run_table.py --list                       what is there and what is missing
    python results/run_table.py --student resnet20 --compile on a GPU

Every row has RepDistiller's recipe (batch 64, learning rate 0.05, no Nesterov momentum, weight
decay 5e-4) at a tenth of its length (24 epochs, LR milestones at 15, 18 and 21), all 50,000
images, the published resnet56 as teacher, and the default weights of its method, untuned. A run
that was stopped continues. Each leaves its result and its log in `results/cifar100-24ep/`.

To add a row, add a line to ROWS. Several programs may work at a time, on different rows or seeds.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = (
    "--batch-size 64 --lr 0.05 --no-nesterov --weight-decay 0.0005"
    " --teacher resnet56 --pretrained-teacher"
)
ROWS = {  # name -> script and the flags of the method; in the order in which they are run
    "ce": ("sp", "--sp-weight 0"),
    "kd": ("sp", "--sp-weight 0 --kd-weight 1"),
    "kdpp": ("nd", ""),
    "dcd_kd": ("dcd", "--kd-weight 1"),
    "sp_kd": ("sp", "--kd-weight 1"),
    "mse": ("kd2m", "--metric mse"),
    "nd": ("nd", "--kd-weight 0"),
    "dkd": ("nd", "--base dkd --nd-weight 0"),
    "dkdpp": ("nd", "--base dkd"),
    "dist": ("nd", "--base dist --nd-weight 0"),
    "distpp": ("nd", "--base dist"),
    "dcd": ("dcd", ""),
    "cc": ("sp", "--relation cc"),
    "w2_empirical": ("kd2m", "--metric w2_empirical"),
    "cw2_empirical": ("kd2m", "--metric cw2_empirical"),
    "w2_gaussian": ("kd2m", "--metric w2_gaussian"),
    "mmd_rbf": ("kd2m", "--metric mmd_rbf"),
    "sp": ("sp", ""),
    "at": ("sp", "--sp-weight 0 --at-weight 1000"),
    "reviewkd": ("nd", "--base reviewkd --nd-weight 0"),
    "reviewkdpp": ("nd", "--base reviewkd"),
}

layout = argparse.RawTextHelpFormatter
parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
parser.add_argument("--only", help="names of rows, with commas (default: all)")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--student", default="resnet8", help="default: resnet8")
parser.add_argument("--epochs", default="24", help="default: 24; the recipe's own: 240")
parser.add_argument("--data-dir", default="data")
parser.add_argument("--runs", type=Path, default=Path("runs/table"), help="folder of the runs")
parser.add_argument("--cache", help="folder for the teacher's answers (--teacher-cache)")
parser.add_argument("--device", default="auto", help="default: auto")
parser.add_argument("--compile", action="store_true", help="as in the scripts; for GPUs")
parser.add_argument("--list", action="store_true", help="only say what is there")
options = parser.parse_args()
names = options.only.split(",") if options.only else list(ROWS)
if unknown := [name for name in names if name not in ROWS]:
    parser.error(f"--only {unknown[0]}: one of {', '.join(ROWS)}")
folder = ROOT / "results" / f"cifar100-{options.epochs}ep"
for name in names:
    for seed in options.seeds:
        script, flags = ROWS[name]
        target = folder / f"{options.student}-{name}-s{seed}"
        out = options.runs / options.epochs / target.name
        if target.with_suffix(".json").exists() or options.list:
            print(target.name, "is there" if target.with_suffix(".json").exists() else "missing")
            continue
        command = f"{script}.py {flags} {RECIPE} --epochs {options.epochs} --seed {seed}"
        command = [sys.executable, *shlex.split(command), "--student", options.student]
        command += ["--data-dir", options.data_dir, "--device", options.device]
        command += ["--compile"] * options.compile
        command += ["--out", str(out), *(["--resume"] if (out / "last.pt").exists() else [])]
        if options.cache and name != "ce":
            command += ["--teacher-cache", options.cache]
        print("+", *command[1:], flush=True)
        command[1] = str(ROOT / command[1])
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)
        folder.mkdir(exist_ok=True)
        shutil.copy(out / "metrics.jsonl", target.with_suffix(".jsonl"))
        shutil.copy(out / "result.json", target.with_suffix(".json"))
