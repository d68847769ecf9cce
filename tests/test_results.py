"""Every table of the README is computed from results/*.json, and every result is whole."""

import json
import re
import statistics
from pathlib import Path

import pytest

import common
import kd2m
import sp

ROOT = Path(common.__file__).parent


def load(pattern):
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob(pattern))]


def test_readme_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- (results/.+?) -->\n\n(.*?)\n\n", text, re.S)
    assert blocks
    for patterns, printed in blocks:
        found = [result for pattern in patterns.split() for result in load(pattern)]
        assert common.table(found) == printed, f"python common.py {patterns}"


# Runs that are compared with each other, and the methods that must be among them.
COMPARED = {
    "cifar100-resnet56-resnet8": {"CE", "KD", "KD++"},
    "shapes-resnet14-resnet8": {"CE", "KD", "KD++"},
    "relations-resnet56-resnet8": {"CE", "KD", "SP", "SP+KD", "DCD", "DCD+KD"},
    "relations-resnet56-MobileNetV2": {"CE", "KD", "SP", "SP+KD", "DCD", "DCD+KD"},
    "heldout-resnet56-resnet8": {"CE", "KD", "DCD", "DCD+KD"},
    "transfer-resnet56-resnet8": {"probe of CE", "probe of KD", "probe of DCD", "probe of DCD+KD"},
    "distributions-resnet56-resnet8": {"mse", "w2_empirical", "cw2_empirical", "jw2_empirical"}
    | {"w2_gaussian", "cw2_gaussian", "kl_gaussian", "mmd_linear", "mmd_rbf"},
    "detect-shapes-resnet18-mobilenet_v2": {"plain", "KD", "ND", "KD++", "ReviewKD++"},
}
MAIN_TABLE = {  # script -> the runs whose numbers its docstring prints
    "nd": ["cifar100-resnet56-resnet8-*"],
    "sp": ["relations-resnet56-resnet8-*"],
    "dcd": ["relations-resnet56-resnet8-*"],
    "kd2m": ["distributions-resnet56-resnet8-*", "relations-resnet56-resnet8-[ck][ed]-s*"],
    "detect_nd": ["detect-shapes-resnet18-mobilenet_v2-*"],
}


@pytest.mark.parametrize("script", MAIN_TABLE)
def test_docstring_numbers_are_those_of_the_results(script):
    """`CE 12.34 ± 0.56`, `KD ...` in a script's docstring against the main table's runs."""
    doc = __import__(script).__doc__
    rows = re.findall(r"(\S+) +(\d+\.\d\d) ± (\d\.\d\d)(?=    |$)", doc, re.M)
    assert len(rows) >= (11 if script == "kd2m" else 3)
    table = common.table([r for name in MAIN_TABLE[script] for r in load(f"results/{name}.json")])
    for method, mean, spread in rows:
        assert f"| {method} | 3 | {mean} ± {spread} |" in table, method


def test_what_the_readme_says_of_kd2m():
    found = {}
    for name in MAIN_TABLE["kd2m"]:
        for r in load(f"results/{name}.json"):
            found.setdefault(r["method"], []).append(r["student_top1"])
            assert (
                r["train_images"] == 10000 and r["epochs"] == 15 and r["args"]["batch_size"] == 64
            )
            assert r["args"].get("metric_weight", 0) == kd2m.WEIGHTS.get(r["method"], 0)

    def above(a, b):  # told apart, as in the table
        gap = statistics.mean(found[a]) - statistics.mean(found[b])
        return gap > max(statistics.stdev(found[m]) for m in (a, b))

    by_pairs, between = {"mse", "cw2_empirical", "cw2_gaussian"}, {"jw2_empirical", "mmd_linear"}
    below = {"mmd_rbf", "w2_gaussian", "kl_gaussian"}
    assert set(found) == by_pairs | between | below | {"w2_empirical", "CE", "KD"}
    assert all(len(values) == 3 for values in found.values())
    assert min(min(found[m]) for m in by_pairs) > max(found["KD"])
    assert not any(above(a, b) for a in by_pairs for b in by_pairs)
    assert all(above(m, "CE") and above("KD", m) for m in between)
    assert not above("w2_empirical", "CE") and not above("CE", "w2_empirical")
    assert all(above("CE", m) for m in below)


def test_what_the_readme_says_of_kd2ms_weights():
    found, results = {}, load("results/weights-*.json")
    for r in results:
        found.setdefault(r["method"], {})[r["args"].get("metric_weight")] = r["student_top1"]
        assert (r["args"]["val_size"], r["test_images"], r["args"]["seed"]) == (10000, 10000, 0)
        for key in ("train_images", "epochs", "data_hash", "teacher_hash"):
            assert r[key] == results[0][key]
    assert found.keys() == {"CE", "KD", "mse", "w2_gaussian"}
    [ce] = found["CE"].values()
    for metric in ("mse", "w2_gaussian"):
        default, by_weight = kd2m.WEIGHTS[metric], found[metric]
        times = {round(weight / default, 6): top1 for weight, top1 in by_weight.items()}
        assert times.keys() == {0.01, 0.1, 1, 10, 100}  # four decades
        if metric == "mse":
            assert max(times, key=times.get) == 10 and times[100] < times[10] - 5
        else:
            assert abs(max(times.values()) - ce) < 1.3 and times[1] < ce
            assert max(times, key=times.get) <= 0.1 and times[10] < ce / 1.9
    spread = [r["student_top1"] for r in load("results/distributions-*-w2_gaussian-s?.json")]
    assert round(statistics.stdev(spread), 1) == 1.3


def test_what_the_readme_says_of_sps_weights():
    results = load("results/spweights-*.json")
    for r in results:
        assert (r["args"]["val_size"], r["test_images"], r["args"]["seed"]) == (10000, 10000, 0)
        for key in ("train_images", "epochs", "data_hash", "teacher_hash", "student"):
            assert r[key] == results[0][key]
    found = {r["args"]["sp_weight"]: r["student_top1"] for r in results}
    assert found.keys() == {0, 30, 300, 3000}
    assert found[0] > found[30] > found[300] > found[3000]  # the less, the nearer; none gains


def test_what_the_readme_says_of_mobilenet():
    found = {}
    for r in load("results/relations-resnet56-MobileNetV2-*.json"):
        found.setdefault(r["method"], []).append(r["student_top1"])
        assert (r["train_images"], r["epochs"], r["args"]["lr"]) == (10000, 15, 0.01)
        assert r["args"].get("sp_weight", 0) in (0, 3000)

    def above(a, b):
        gap = statistics.mean(found[a]) - statistics.mean(found[b])
        return gap > max(statistics.stdev(found[m]) for m in (a, b))

    assert above("DCD", "CE") and above("KD", "CE")
    assert not above("DCD", "KD") and not above("KD", "DCD")
    assert above("DCD+KD", "DCD") and above("DCD+KD", "KD")
    assert max(found["SP"]) < min(found["CE"]) and above("KD", "SP+KD")
    for script in ("sp", "dcd"):
        [line] = re.findall("To MobileNetV2.*:(.*)\\(README", __import__(script).__doc__)
        numbers = dict(re.findall(r"(\S+) (\d+\.\d\d)", line))
        assert numbers.keys() == {"CE", "KD", script.upper(), f"{script.upper()}+KD"}
        for method, value in numbers.items():
            assert f"{statistics.mean(found[method]):.2f}" == value
    size = load("results/sizes.json")[0]["sizes"]["MobileNetV2"]
    assert 3000 * size["sp"] == pytest.approx(12, abs=0.7)
    assert size["ce"] == pytest.approx(5, abs=0.5)


def test_what_the_readme_says_of_transfer():
    found = {}
    for r in load("results/transfer-*.json"):
        found.setdefault(r["method"].removeprefix("probe of "), []).append(r["student_top1"])
        assert (r["train_images"], r["test_images"], r["epochs"]) == (2000, 2000, 30)
    for r in load("results/heldout-*.json"):
        assert (r["train_images"], r["test_images"], r["epochs"]) == (4000, 8000, 15)

    def above(a, b):
        gap = statistics.mean(found[a]) - statistics.mean(found[b])
        return gap > max(statistics.stdev(found[m]) for m in (a, b))

    assert all(above(m, "CE") for m in ("KD", "DCD", "DCD+KD")) and above("DCD+KD", "KD")
    assert not any(above(*pair) for pair in (("DCD", "KD"), ("DCD+KD", "DCD"), ("KD", "DCD")))


def test_what_the_readme_says_of_the_drawn_set():
    text = " ".join((ROOT / "README.md").read_text().split())
    two, one = load("results/shapes-*-s0.json"), load("results/onethread-*-s0.json")
    for said, threads, results in (("alone it is seed 0:", 2, two), ("command printed", 1, one)):
        top1 = {r["method"]: r["student_top1"] for r in results}
        assert f"{said} CE {top1['CE']}, KD {top1['KD']}, KD++ {top1['KD++']}" in text
        assert all(f"cpu, {threads} threads" in r["device"] for r in results)
        assert all(r["data_hash"] == two[0]["data_hash"] for r in results)


@pytest.mark.parametrize("family", COMPARED)
def test_compared_results_are_of_the_same_recipe_seeds_and_data(family):
    results, methods = load(f"results/{family}-*.json"), {}
    for r in results:
        methods.setdefault(r["method"], []).append(r["seed"])
        for key in ("train_images", "epochs", "teacher_hash", "data_hash", "student"):
            assert r[key] == results[0][key]
        for key in ("lr", "batch_size", "weight_decay", "momentum", "precision"):
            assert r["args"][key] == results[0]["args"][key]
    assert COMPARED[family] <= methods.keys()
    assert all(sorted(seeds) == [0, 1, 2] for seeds in methods.values())


def test_the_table_of_everything_prints(capsys):
    paths = [str(path) for path in sorted(ROOT.glob("results/*.json"))]
    assert common.run_program(common.print_table, paths) == 0
    captured = capsys.readouterr()
    assert "| KD++ | 3 |" in captured.out and "bench.json is not of a training run" in captured.err


def test_readme_speed_and_differences_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    bench = load("results/bench.json")[0]
    detection = bench["detection"]
    median = {k: statistics.median(v) for k, v in detection["images_per_second"].items()}
    bare = median.pop("bare")
    assert f"| bare | {bare:.1f} | 1.00 |" in text and bare > 0
    for name, value in median.items():
        assert f"| {name} | {value:.1f} | {value / bare:.2f} |" in text, name
    assert detection["what"] in text and f"Peak memory {detection['peak_memory_mb']} MB" in text
    median = {k: statistics.median(v) for k, v in bench["images_per_second"].items()}
    for name, value in median.items():
        ratios = bench["of_bare"].get(name, [1.0])
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        assert f"| {name} | {value:.0f} | {middle:.2f} | {low:.2f}, {high:.2f} |" in text, name
    assert f"medians of {len(bench['of_bare']['KD'])} rounds on a noisy machine" in text
    methods = {k: v for k, v in bench["of_bare"].items() if "," not in k and k != "ReviewKD++"}
    slowest = min(statistics.median(v) for v in methods.values())
    assert len(methods) == 10 and f"keep {slowest:.2f} of the bare rate at least" in text
    assert f"{bench['bf16_gain']:.2f} times fp32 contiguous" in text
    products = bench["sp_loss_ms"] / bench["sp_products_ms"]
    assert f"takes {products:.1f} times its two matrix products" in " ".join(text.split())
    assert products <= 2
    assert f"Peak memory {bench['peak_memory_mb']} MB" in text
    top1 = {(r["method"], r["seed"]): r["student_top1"] for r in load("results/cifar100-*.json")}
    gains = [f"{top1['KD++', seed] - top1['KD', seed]:.1f}" for seed in (0, 1, 2)]
    assert f"(by {gains[0]}, {gains[1]} and {gains[2]} points)" in text


def test_what_the_readme_says_of_metrics_and_loading():
    text, bench = (ROOT / "README.md").read_text(), load("results/bench.json")[0]
    median = {k: statistics.median(v) for k, v in bench["metrics"]["ms"].items()}
    for name, (narrow, wide) in bench["metrics"]["share_of_a_step"].items():
        row = f"| {name} | {median[f'{name} 64']:.1f} | {median[f'{name} 512']:.1f} |"
        assert f"{row} {100 * narrow:.1f}, {100 * wide:.1f} |" in text
        assert max(narrow, wide) <= 0.0105 or name in kd2m.OURS
    loading = bench["loading"]["images_per_second"]
    decoding, ready, files = (
        statistics.median(loading[name])
        for name in ("decoding alone", "step on ready tensors", "step on decoded files")
    )
    assert f"{decoding:.0f} images/s" in text and files > 0.9 * ready
    assert "some 50 times as fast" in text and 45 < decoding / ready < 55
    assert f"{files:.1f} images/s from files, {ready:.1f} on ready tensors" in text


def test_what_the_readme_says_of_kills():
    text = " ".join((ROOT / "README.md").read_text().split())
    kills = load("results/kills.json")[0]
    count = sum(kills["kills"].values())
    assert count >= 50 and kills["identical_endings"] == kills["trials"]
    assert f"{count} times in {kills['trials']} runs" in text


def test_what_the_readme_says_of_detection_on_drawn_scenes():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = {}
    for r in load("results/detect-shapes-*.json"):
        found.setdefault(r["method"], []).append(r["student_ap"])
    mean = {method: statistics.mean(values) for method, values in found.items()}
    assert {m for m in mean if mean[m] > mean["plain"]} == {"KD"}
    assert "All but KD are below it in the mean" in text
    apart = max(max(values) - min(values) for values in found.values())
    assert f"the seeds alone differ by up to {apart:.0f} points" in text


def test_what_the_readme_says_of_the_run_on_real_images():
    text = " ".join((ROOT / "README.md").read_text().split())
    epochs = load("results/coco128-epochs.json")[0]["epochs"]["KD++"]
    for term in ("cls", "objectness", "nd", "kd"):
        first, *_, last = epochs[term]
        assert last < first and f"{term} from {first:.2f} to {last:.2f}" in text
    assert f"box rose from {epochs['box'][0]:.2f} to {epochs['box'][-1]:.2f}" in text
    for r in load("results/detect-coco128-*.json"):
        assert r["dataset"] == "coco" and r["train_images"] == 94 and r["val_images"] == 32


def test_what_the_readme_says_of_imagenet():
    found = load("results/imagenet-sample-*.json")
    assert {r["script"] for r in found} == {"nd.py", "sp.py", "dcd.py", "kd2m.py"}
    for r in found:
        assert (r["dataset"], r["train_images"], r["test_images"]) == ("imagenet", 1000, 1000)
        assert (r["epochs"], r["args"]["image_size"]) == (1, 64) and r["student_top1"] < 1


def test_default_weights_and_printed_sizes_are_those_measured():
    """What the docstrings say of values before training, and of the weights taken from them."""
    sizes = load("results/sizes.json")[0]["sizes"]
    default = sizes["resnet20"]
    assert default["ce"] == pytest.approx(4.8, abs=0.05)
    terms = {name: kd2m.WEIGHTS[name] * default[name] for name in kd2m.METRICS}
    assert all(1.5 <= term <= 7.3 for term in terms.values()), terms
    relations = {name: weight * default[name] for name, (_, weight) in sp.RELATIONS.items()}
    assert all(4 <= term <= 6 for term in relations.values()), relations
    assert default["sp"] == pytest.approx(0.0015, rel=0.1)
    assert default["intra"] == pytest.approx(0.005, rel=0.1)
    assert sizes["MobileNetV2"]["sp"] == pytest.approx(0.004, rel=0.05)
    assert sizes["MobileNetV2"]["intra"] == pytest.approx(0.17, rel=0.05)
    assert default["at 32x32"] == pytest.approx(3e-4, rel=0.2)
    assert default["at 8x8"] == pytest.approx(1e-2, rel=0.2)
    assert all(0.0049 <= of["cc"] <= 0.06 for of in sizes.values())
