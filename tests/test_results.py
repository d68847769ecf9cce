"""Every table of the README is computed from results/*.json, and every result is whole."""

import json
import re
from pathlib import Path

import common

ROOT = Path(common.__file__).parent


def load(pattern):
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob(pattern))]


def test_readme_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- (results/\S+) -->\n\n(.*?)\n\n", text, re.S)
    assert blocks
    for pattern, printed in blocks:
        assert common.table(load(pattern)) == printed, f"python common.py {pattern}"


def test_docstring_numbers_are_those_of_the_results():
    """`CE 12.34 ± 0.56`, `KD ...` in a script's docstring against the main table's runs."""
    for script in ("nd",):
        doc = __import__(script).__doc__
        rows = re.findall(r"^ +(\S+) +(\d+\.\d\d) ± (\d\.\d\d)$", doc, re.M)
        assert len(rows) >= 3
        table = common.table(load("results/cifar100-*.json"))
        for method, mean, spread in rows:
            assert f"| {method} | 3 | {mean} ± {spread} |" in table, method


def test_results_are_of_the_same_recipe_seeds_and_data():
    results = load("results/cifar100-*.json")
    methods = {}
    for r in results:
        methods.setdefault(r["method"], []).append(r["seed"])
        for key in ("train_images", "epochs", "teacher_hash", "data_hash", "student"):
            assert r[key] == results[0][key]
        for key in ("lr", "batch_size", "weight_decay", "momentum", "precision"):
            assert r["args"][key] == results[0]["args"][key]
    assert {"CE", "KD", "KD++"} <= methods.keys()
    assert all(sorted(seeds) == [0, 1, 2] for seeds in methods.values())


def test_the_table_of_everything_prints(capsys):
    paths = [str(path) for path in sorted(ROOT.glob("results/*.json"))]
    assert common.run_program(common.print_table, paths) == 0
    captured = capsys.readouterr()
    assert (
        "| KD++ | 3 |" in captured.out and "bench-nd.json is not of a training run" in captured.err
    )
