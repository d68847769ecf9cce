"""Every table of results/README.md, and every score in a docstring, is that of committed files."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import bench  # noqa: E402
import sizes  # noqa: E402
import table  # noqa: E402

README = (ROOT / "results" / "README.md").read_text()
PATTERN = r"<!-- ((?:--paired )?results/.+?) -->\n\n((?:\|.*\n)+)"
TABLES = dict(re.findall(PATTERN, README))  # source: table
RUNS = sorted(ROOT.glob("results/*/*.json"))


def files(source):
    patterns = source.removeprefix("--paired ").split()
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def load(path):
    return json.loads((ROOT / path).read_text())


@pytest.mark.parametrize("source", TABLES)
def test_a_table_is_that_of_its_files(source):
    path, _, part = source.partition(" ")
    if path == "results/bench.json":
        made = bench.table(load(path), part)
    elif path == "results/sizes.json":
        made = sizes.table(load(path))
    elif path == "--paired":
        made = table.paired(list(map(str, files(source))))
    else:
        made = table.table([table.read(str(path)) for path in files(source)])
    assert TABLES[source].strip() == made


def test_every_table_names_its_source_and_every_run_is_in_a_table():
    assert len(TABLES) == len(re.findall(r"^\|---", README, re.M))
    assert {path for source in TABLES for path in files(source)} >= set(RUNS)
    for folder in {path.parent.name for path in RUNS}:
        assert f"]({folder})" in README  # the text links to its files


@pytest.mark.parametrize("source", [s for s in TABLES if "*" in s and "imagenet" not in s])
def test_the_rows_of_a_table_can_be_compared(source):
    """One pair, recipe, data and teacher, and the same seeds for every method."""
    runs = [table.read(str(path)) for path in files(source)]
    assert len({table.setup(run) for run in runs}) == 1
    if source.startswith("--paired"):  # marks rows that lack a seed
        return
    seeds = {}
    for run in runs:
        row = run["method"], json.dumps(table.settings(run), sort_keys=True)
        seeds.setdefault(row, []).append(run["seed"])
    assert len({tuple(sorted(s)) for s in seeds.values()}) == 1


@pytest.mark.parametrize("script", ("nd", "sp", "dcd", "kd2m", "detect_nd"))
def test_scores_in_a_docstring_are_those_of_a_table(script):
    rows = " ".join(row for rows in TABLES.values() for row in rows.splitlines())
    doc = importlib.import_module(script).__doc__.replace("no distillation", "plain")
    scores = re.findall(r"(\S+)\s+(\d+\.\d\d)\s±\s+(\d\.\d\d)", doc)
    assert len(scores) >= 3
    for method, mean, spread in scores:
        assert f"| {method} | 3 | {mean} ± {spread} |" in rows, method


def test_numbers_on_the_front_page():
    """Its table of 24 epochs, the gains beside the scripts, and the first command's table."""
    text, means = (ROOT / "README.md").read_text(), {}
    rows = TABLES["--paired results/cifar100-24ep/resnet20-*.json"].splitlines()[2:]
    assert len(rows) == 6
    for row in rows:
        method, _, score, _, interval, _ = row.strip("| ").split(" | ")
        cells = re.escape(f"{score} |" if method == "KD" else f"{score} | {interval}")
        assert re.search(rf"^\| {re.escape(method)}( of .*)? \| {cells} \|", text, re.M), method
    for path in sorted(ROOT.glob("results/cifar100-24ep/resnet20-*.json")):
        means.setdefault(load(path)["method"], []).append(load(path)["student_top1"] / 3)
    gains = re.findall(r"\| ([\w+]+): (-?\d\.\d\d), (-?\d\.\d\d) \|", text)
    assert len(gains) == 4
    for method, *found in gains:
        assert found == [f"{sum(means[method]) - sum(means[name]):.2f}" for name in ("CE", "KD")]
    rows = TABLES["results/detect-shapes-9ep/*.json"].splitlines()[2:]
    ap = {cell[4].strip(): float(cell[6].split()[0]) for cell in (row.split("|") for row in rows)}
    assert f"AP {ap['KD++'] - ap['plain']:.2f} above none, {ap['KD'] - ap['KD++']:.2f}" in text
    rows = re.findall(r"^\| \S+ \| 5 \| .+$", text, re.M)
    assert len(rows) == 3 and all(row[:-1] in README for row in rows)


def run(method="KD", seed=0, top1=50.0, **more):
    args = {"batch_size": 64, "lr": 0.05, "kd_weight": 1.0, "out": f"runs/{method}-{seed}"}
    pair = {"dataset": "cifar100", "teacher": "resnet56", "student": "resnet8", "epochs": 15}
    scores = {"student_top1": top1, "teacher_top1": 70.0, "train_images": 10000, "args": args}
    return {"method": method, "seed": seed, **pair, **scores, **more}


def test_mean_spread_and_what_is_distinguishable():
    """By hand: 51 ± 1, 52 ± 2 and 54.5 ± 0.5; a gap of 2.5 is more than either spread."""
    values = {"KD": (50, 51, 52), "SP": (50, 52, 54), "DCD": (54, 54.5, 55), "ND": (53,)}
    runs = [run(m, s, float(v)) for m, top1 in values.items() for s, v in enumerate(top1)]
    other_lr = run("CE", 0, 51.0, args={"batch_size": 64, "lr": 0.1})
    lines = table.table([*runs, runs[0], other_lr]).splitlines()[2:]  # a run twice counts once
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[3][:2] == ["cifar100, 10,000, 15, 64, 0.05", "resnet56 (70.00)"]
    assert rows[4][:2] == ["cifar100, 10,000, 15, 64, 0.1", "resnet56 (70.00)"]
    assert [row[3:] for row in rows] == [
        ["KD", "3", "51.00 ± 1.00", "50.00, 52.00", "SP"],
        ["SP", "3", "52.00 ± 2.00", "50.00, 54.00", "KD"],
        ["DCD", "3", "54.50 ± 0.50", "54.00, 55.00", "-"],
        ["ND", "1", "53.00", "53.00, 53.00", "one run"],
        ["CE", "1", "51.00", "51.00, 51.00", "one run"],
    ]


def test_paired_differences(tmp_path):
    """By hand: KD lacks seed 0; gaps 2 and 3, so 2.5 ± 12.706 * 0.7071 / sqrt(2)."""
    values = {"KD": (50, 51, 52), "SP": (51, 53, 55), "DCD": (54,)}
    for method, scores in values.items():
        for seed, score in enumerate(scores):
            path = tmp_path / f"{method}{seed}.json"
            path.write_text(json.dumps(run(method, seed, float(score))))
            path.with_suffix(".jsonl").write_text(f'{{"test_top1": {score + 0.5}}}\n' * 2)
    (tmp_path / "KD0.json").unlink()
    rows = table.paired([str(path) for path in sorted(tmp_path.glob("*.json"))]).splitlines()[2:]
    assert rows == [
        "| DCD (fewer than 3 seeds) | 1 | 54.00 | - | - | 0.50 |",
        "| SP | 3 | 53.00 ± 2.00 | +2.00, +3.00 (seed 1, 2) | +2.50 [-3.85, +8.85]"
        " | 0.50, 0.50, 0.50 |",
        "| KD (fewer than 3 seeds) | 2 | 51.50 ± 0.71 | - | - | 0.50, 0.50 |",
    ]


def test_other_flags_make_another_row():
    runs = [run(args=dict(run()["args"], kd_weight=w, out=str(w))) for w in (1.0, 2.0)]
    rows = table.table(runs).splitlines()[2:]
    assert "| KD --kd-weight 1.0 | 1 |" in rows[0] and "| KD --kd-weight 2.0 | 1 |" in rows[1]
    assert "validation" in table.table([run(args={"val_size": 100})])


STRANGE = ["", "[]", "3", "null", "{}", "[" * 100_000, "\x00", '{"method": "KD"}']
STRANGE += [json.dumps(run(**change)) for change in (
    {"student_top1": None}, {"student_top1": "50"}, {"student_top1": float("nan")},
    {"student_top1": 1e9}, {"student_ap": 50.0}, {"teacher_top1": []}, {"teacher": 3},
    {"args": []}, {"epochs": "15"}, {"seed": [0]}, {"data_hash": {}}, {"world_size": "2"},
)]  # fmt: skip


@pytest.mark.parametrize("content", STRANGE)
def test_strange_files_are_refused_in_one_line(content, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(run()))
    bad.write_text(content)
    assert table.main([str(good)]) == 0 and "| KD | 1 | 50.00 |" in capsys.readouterr().out
    for path in (bad, tmp_path, tmp_path / "absent.json"):
        assert table.main([str(good), str(path)]) == 2
        assert re.fullmatch(rf"error: {re.escape(str(path))}: .+\n", capsys.readouterr().err)
    assert table.main([]) == 2 and capsys.readouterr().err.startswith("error: no files")
