"""The figures of the README and of results/README.md, from the files beside them.

    python results/figures.py

writes PNG files into `results/figures/`: a figure of every experiment in TABLES, with a row for
each method, and those of ND. The other figures there were drawn by `--plot` of the scripts.

    python results/figures.py --measure-nd runs/nd-resnet14-resnet8-shapes-s0

measures the embeddings of a run with `--compare`, for the figure of what ND changes: it writes
`results/nd-embeddings.json`.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import table  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import nd  # noqa: E402

ROOT = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#777777",
)  # Okabe-Ito: colour-blind safe
TABLES = {  # name -> the files whose runs can be compared, and the title
    **{
        f"cifar100-24ep-{student}": (
            [f"cifar100-24ep/{student}-*.json"],
            f"CIFAR-100, all 50,000 images, 24 epochs, resnet56 -> {student}",
        )
        for student in ("resnet20", "resnet8")
    },
    "cifar100-10k-15ep": (
        ["cifar100-10k-15ep-sp-dcd/*.json", "cifar100-10k-15ep-kd2m/*.json"],
        "CIFAR-100, 10,000 images, 15 epochs, resnet56 -> resnet8",
    ),
}


def scores_by_method(patterns: list[str]) -> dict[str, dict[int, float]]:
    """Method -> seed -> top-1 % of the last epoch; the best mean first."""
    scores: dict[str, dict[int, float]] = {}
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            run = table.read(str(path))
            scores.setdefault(run["method"], {})[run["seed"]] = run["student_top1"]
    return dict(sorted(scores.items(), key=lambda row: -statistics.mean(row[1].values())))


def draw_table(patterns: list[str], title: str):
    """One row a method: a point for each seed and the mean; CE and KD as vertical lines."""
    scores = scores_by_method(patterns)
    if not {"CE", "KD"} <= scores.keys():
        return None
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.34 * len(scores)), layout="constrained")
    for name, colour in (("CE", GREY), ("KD", ORANGE)):
        mean = statistics.mean(scores[name].values())
        axes.axvline(mean, color=colour, linewidth=1.2, zorder=0)
        top = axes.get_xaxis_transform()  # x in data, y from 0 to 1
        axes.text(mean, 1.01, name, color=colour, fontsize=12, ha="center", transform=top)
    names = []
    for row, (method, by_seed) in enumerate(scores.items()):
        values = list(by_seed.values())
        heights = [row + 0.13 * (k % 3 - 1) * (len(values) > 1) for k in range(len(values))]
        axes.plot(values, heights, "o", color=BLUE, alpha=0.6, markersize=6)
        if len(values) > 1:
            axes.plot(statistics.mean(values), row, "|", color="black", markersize=14, mew=2)
        names.append(method if len(values) > 2 else f"{method} (n = {len(values)})")
    axes.set_yticks(range(len(names)), names, fontsize=12)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("top-1 % of the last epoch: seeds (dots) and their mean (bar)", fontsize=12)
    axes.tick_params(axis="x", labelsize=12)
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    return figure


def draw_nd_idea():
    """What ND asks of one embedding: turn towards the class mean, and become as long as t."""
    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    vectors = {  # text -> end of the vector, its colour, place of the text
        "e: direction of the class mean": ((4.2, 1.75), GREY, (4.3, 1.7)),
        "t: the teacher's embedding": ((3.0, 2.4), ORANGE, (3.1, 2.4)),
        "s: the student's": ((0.75, 1.5), BLUE, (-0.15, 1.85)),
    }
    for text, (end, colour, place) in vectors.items():
        style = dict(arrowstyle="-|>", color=colour, linewidth=2.2, shrinkA=0, shrinkB=0)
        axes.annotate("", end, (0, 0), arrowprops=style)
        axes.text(*place, text, color=colour, fontsize=13)
    scale = math.hypot(3.0, 2.4) / math.hypot(4.2, 1.75)  # |t| / |e|
    goal = (4.2 * scale, 1.75 * scale)
    curve = dict(arrowstyle="->", color=GREEN, linewidth=1.8, linestyle="--", shrinkB=6)
    curve |= dict(connectionstyle="arc3,rad=-0.15")
    axes.annotate("", goal, (0.75, 1.5), arrowprops=curve)
    axes.plot(*goal, "o", color=GREEN, markersize=9, zorder=3)
    axes.text(
        goal[0] - 0.1, goal[1] - 0.45, "nd = 0: turned and lengthened", color=GREEN, fontsize=13
    )
    axes.set(xlim=(-0.2, 7.4), ylim=(-0.05, 2.65), aspect="equal")
    axes.axis("off")
    return figure


@torch.no_grad()
def measure_nd(folder: Path) -> dict:
    """Method -> the two quantities that ND moves, for 500 test images: |s| / |t| and cos(s, e)."""
    result = json.loads((folder / "result.json").read_text())
    known = dict(mean=None, std=None) | result["args"]
    args = argparse.Namespace(**known | dict(resume=False, teacher_cache=None))
    data = common.load_data(args)
    teacher = common.load_teacher(common.build_for(data, args.teacher), args, data, nd.distill)
    batches = data.batches("train", 500)
    means = nd.compute_class_means(teacher, batches, data.num_classes)
    images, labels = next(data.batches("test", 500))
    t = teacher(images, return_features=True)[1].embedding
    e = means[labels]
    measured = {"teacher": (t, t)}
    for name, path in {"CE": folder / "ce", "KD": folder / "kd", result["method"]: folder}.items():
        student = common.load_model(args.student, path / "student.pt").to(data.device).eval()
        measured[name] = student(images, return_features=True)[1].embedding, t
    values = {}
    for name, (s, t) in measured.items():
        cosine = torch.cosine_similarity(s, e)
        ratio = s.norm(dim=1) / t.norm(dim=1)
        values[name] = {"cos": cosine.tolist(), "ratio": ratio.tolist()}
        values[name] = {k: [round(x, 3) for x in v] for k, v in values[name].items()}
    return values


def draw_nd(values: dict):
    """Two histograms: the length of the embeddings, and their direction."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    colours = dict(zip(values, ("black", GREY, ORANGE, BLUE)))
    for name, quantities in values.items():
        line = dict(histtype="step", linewidth=1.8, color=colours[name], label=name, density=True)
        right.hist(quantities["cos"], bins=[k / 40 for k in range(8, 41)], **line)
        if name != "teacher":  # its ratio is 1
            left.hist(quantities["ratio"], bins=[k / 40 for k in range(16, 65)], **line)
    left.axvline(1, color="black", linewidth=1)
    left.set_xlabel("length: |s| / |t|", fontsize=12)
    right.set_xlabel("direction: cos(s, class mean)", fontsize=12)
    right.legend(loc="upper left", fontsize=12, frameon=False)
    for axes in (left, right):
        axes.set_yticks([])
        axes.tick_params(axis="x", labelsize=12)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description="The figures in results/figures/.")
    parser.add_argument("--measure-nd", type=Path, metavar="DIR", help="a run of nd.py --compare")
    options = parser.parse_args()
    embeddings = ROOT / "nd-embeddings.json"
    if options.measure_nd:
        if not (options.measure_nd / "result.json").exists():
            parser.error(f"--measure-nd {options.measure_nd}: no result.json there")
        embeddings.write_text(json.dumps(measure_nd(options.measure_nd)) + "\n")
    (ROOT / "figures").mkdir(exist_ok=True)
    figures = {name: draw_table(*source) for name, source in TABLES.items()}
    figures["nd-idea"] = draw_nd_idea()
    figures["nd"] = draw_nd(json.loads(embeddings.read_text()))
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(ROOT / "figures" / f"{name}.png", dpi=130)
            print(f"results/figures/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
