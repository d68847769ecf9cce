"""The figures of the README and of results/README.md, from the files beside them.

    python results/figures.py

writes PNG files into `results/figures/`: a figure of every experiment in TABLES, with a row for
each method, and what ND asks for. The other figures there were drawn by `--plot` of the scripts.
"""

import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import table  # noqa: E402

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


def main() -> int:
    (ROOT / "figures").mkdir(exist_ok=True)
    figures = {name: draw_table(*source) for name, source in TABLES.items()}
    figures["nd-idea"] = draw_nd_idea()
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(ROOT / "figures" / f"{name}.png", dpi=130)
            print(f"results/figures/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
