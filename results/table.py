"""A Markdown table of the results of many runs.

    python results/table.py results/*/*.json
    python results/table.py --paired results/cifar100-24ep/*.json

One row per method and setting, over its seeds: mean ± sample standard deviation of the test score
after the last epoch (top-1 accuracy or COCO AP, %), minimum and maximum. The last column lists the
methods of the same data, pair and recipe whose mean lies within the larger of the two standard
deviations. Runs of a method with different flags are rows of their own, named with those flags.

--paired: runs of one recipe, of which those with the same seed saw the same batches: differences to
KD for each seed, their mean with its 95 % confidence interval (Student's t of these differences),
and how far the best test epoch lies above the last, from the log (.jsonl) beside each file.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from scipy import stats

SCORES = {"top1": "top-1 %", "ap": "AP %"}
RECIPE = ("optimizer", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "precision")
FIELDS = dict(method=str, dataset=str, student=str, train_images=int, epochs=int, seed=int)
FIELDS |= dict.fromkeys(("teacher", "teacher_hash", "data_hash", "student_hash"), str | None)
FIELDS |= dict(args=dict, world_size=int | None)

# Arguments that do not change what a run computes; files are compared by the hash of their content.
NOT_SETTINGS = set(
    "seed seeds script method compare eval resume out device workers plot save_minutes tensorboard"
    " per_class predict train_teacher teacher_ckpt student_ckpt teacher_cache"
    " pretrained_teacher data_dir".split()
)


def read(path: str) -> dict:
    """The result in a file; a ValueError if it lacks what the table needs."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    for key, kind in FIELDS.items():
        if not isinstance(run, dict) or not isinstance(run.get(key), kind):
            raise ValueError(f"{path}: not the result of a run ({key!r} is missing or wrong)")
    scores = [run.get(f"student_{kind}") for kind in SCORES]
    known = [s for s in (*scores, run.get("teacher_top1"), run.get("teacher_ap")) if s is not None]
    numbers = all(isinstance(s, (int, float)) and 0 <= s <= 100 for s in known)
    if scores.count(None) != 1 or not numbers:
        raise ValueError(f"{path}: needs student_top1 or student_ap, and scores from 0 to 100")
    return run


def settings(run: dict) -> dict:
    """The arguments that the runs of a row share. None means that a flag was not used."""
    ranks = run.get("world_size") or 1
    without = NOT_SETTINGS | ({"gather"} if ranks == 1 else set())  # no effect on one rank
    used = {key: value for key, value in run["args"].items() if value is not None}
    return {"ranks": ranks, **{key: used[key] for key in used if key not in without}}


def teacher_score(run: dict) -> float | None:
    return run.get("teacher_top1", run.get("teacher_ap"))


def setup(run: dict) -> tuple:
    """What runs must share to be compared. The same weights of a teacher are the same teacher,
    though their score may differ by an image or two between processors."""
    recipe = [run["args"].get(key) for key in RECIPE]
    split = " (validation)" if run["args"].get("val_size") else ""
    data = f"{run['dataset']}{split}, {run['train_images']:,}, {run['epochs']}"
    data = f"{data}, {recipe[1]}, {recipe[2]}", run.get("data_hash"), str(recipe)
    return *data, run.get("teacher"), run.get("teacher_hash") or teacher_score(run), run["student"]


def table(results: list[dict]) -> str:
    """The rows in the order of `results`, all of which have the same kind of score."""
    kind = "top1" if results[0].get("student_top1") is not None else "ap"
    groups: dict[tuple, dict] = {}
    cells_of: dict[tuple, str] = {}
    for run in results:
        score = teacher_score(run)
        teacher = run.get("teacher") or "none"
        teacher += "" if score is None else f" ({score:.2f})"
        cells_of.setdefault(setup(run), f"{setup(run)[0]} | {teacher} | {run['student']}")
        key = setup(run), run["method"], json.dumps(settings(run), sort_keys=True)
        groups.setdefault(key, {})[run["seed"], run.get("student_hash")] = run[f"student_{kind}"]

    rows, setups = [], list(cells_of)
    ordered = sorted(groups.items(), key=lambda group: setups.index(group[0][0]))
    for (its_setup, method, its_settings), scores in ordered:
        alike = [json.loads(key[2]) for key in groups if key[:2] == (its_setup, method)]
        name, values = method, list(scores.values())
        for flag, value in json.loads(its_settings).items():
            if any(other.get(flag) != value for other in alike):
                name += f" --{flag.replace('_', '-')} {value}"
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows.append((its_setup, name, values, statistics.mean(values), spread))

    head = "| data, images, epochs, batch, lr | teacher | student | method | n | "
    lines = [f"{head}{SCORES[kind]} | min, max | not distinguishable from |", "|---" * 8 + "|"]
    for its_setup, name, values, mean, spread in rows:
        score, near = f"{mean:.2f}", ["one run"]
        if spread is not None:
            score += f" ± {spread:.2f}"
            others = [r for r in rows if r[0] == its_setup and r[1] != name and r[4] is not None]
            near = [r[1] for r in others if abs(mean - r[3]) <= max(spread, r[4])] or ["-"]
        cells = [cells_of[its_setup], name, str(len(values)), score]
        cells += [f"{min(values):.2f}, {max(values):.2f}", ", ".join(near)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paired(paths: list[str]) -> str:
    """The table of --paired; the best mean first. A row of fewer than three seeds is marked."""
    rows: dict[str, dict[int, dict]] = {}
    for path in paths:
        run, log = read(path), Path(path).with_suffix(".jsonl")
        if setup(run) != setup(read(paths[0])) or run.get("student_top1") is None:
            raise ValueError(f"{path}: of another recipe, pair or data than {paths[0]}")
        try:
            best = max(json.loads(line)["test_top1"] for line in log.read_text().splitlines())
            best = float(best)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{log}: not the log of a run ({error})") from None
        row = rows.setdefault(run["method"], {})
        if run["seed"] in row:
            raise ValueError(f"{path}: a second run of {run['method']}, seed {run['seed']}")
        row[run["seed"]] = run | {"best": best}

    def scores(method):
        return {seed: run["student_top1"] for seed, run in rows.get(method, {}).items()}

    lines = ["| method | n | top-1 %, last epoch | difference to KD, for each seed | mean [95 %] |"]
    lines[0] += " best minus last epoch, for each seed |"
    lines.append("|---" * 6 + "|")
    kd = scores("KD")
    for method in sorted(rows, key=lambda method: -statistics.mean(scores(method).values())):
        values = list(scores(method).values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        paired_seeds = sorted(scores(method).keys() & kd)
        gaps = [scores(method)[seed] - kd[seed] for seed in paired_seeds]
        differences = ", ".join(f"{gap:+.2f}" for gap in gaps) or "-"
        if 0 < len(gaps) < len(values):
            differences += f" (seed {', '.join(map(str, paired_seeds))})"
        interval = "-"
        if method != "KD" and len(gaps) > 1:
            half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
            mean = statistics.mean(gaps)
            interval = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        runs = [run for _, run in sorted(rows[method].items())]
        above = ", ".join(f"{run['best'] - run['student_top1']:.2f}" for run in runs)
        cells = [method if len(values) > 2 else f"{method} (fewer than 3 seeds)", str(len(values))]
        cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells.append("-" if method == "KD" else differences)
        lines.append(f"| {' | '.join([*cells, interval, above])} |")
    return "\n".join(lines)


def main(paths: list[str]) -> int:
    try:
        if {"-h", "--help"} & set(paths[:2]):
            print(__doc__)
            return 0
        set_aside = [path for path in paths if re.fullmatch(r"old\d+", Path(path).parent.name)]
        if set_aside:  # by a later run of the same name
            print(f"note: left out: {', '.join(set_aside)}", file=sys.stderr)
            paths = [path for path in paths if path not in set_aside]
        if not paths or paths == ["--paired"]:
            raise ValueError("no files given, try: python results/table.py results/*/*.json")
        if paths[0] == "--paired":
            print(paired(paths[1:]))
            return 0
        results = [read(path) for path in paths]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for kind in SCORES:
        if chosen := [run for run in results if run.get(f"student_{kind}") is not None]:
            print(table(chosen) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
