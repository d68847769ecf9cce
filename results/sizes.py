"""How large the losses of sp.py and kd2m.py are before training: what default weights rest on.

    python results/sizes.py --teacher-ckpt resnet56.pth --data-dir data --json results/sizes.json

A trained resnet56 and untrained students see the same augmented CIFAR-100 training images. Each
value is the mean over four batches of 64, without its weight.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import kd2m
import sp


@torch.no_grad()
def sizes(student, teacher, batches) -> dict:
    """Name of the loss -> its mean over the batches. KD2M's need embeddings of one dimension."""
    values = {}
    for images, labels in batches:
        student_logits, s = student(images, return_features=True)
        teacher_logits, t = teacher(images, return_features=True)
        terms = {
            "ce": F.cross_entropy(student_logits, labels),
            "sp": sp.sp_loss(s.maps[-1], t.maps[-1]),
            "cc": sp.cc_loss(s.embedding, t.embedding),
            "intra": sp.intra_loss(s.maps[-1], t.maps[-1]),
        }
        if len(s.maps) == len(t.maps):
            for a, b in zip(s.maps, t.maps):
                terms[f"at {a.shape[-1]}x{a.shape[-1]}"] = sp.at_loss(a, b)
        if s.embedding.shape == t.embedding.shape:
            for name, metric in kd2m.METRICS.items():
                more = [labels] if name.startswith("cw2") else []
                more += [student_logits, teacher_logits] if name.startswith("jw2") else []
                terms[name] = metric(s.embedding, t.embedding, *more)
        for name, term in terms.items():
            values.setdefault(name, []).append(term.item())
    return {name: float(f"{sum(v) / len(v):.4g}") for name, v in values.items()}


def table(found: dict) -> str:
    """The sizes as a Markdown table: a row per loss, a column per student."""
    students = found["sizes"]
    lines = [f"| loss | {' | '.join(students)} |", "|---" * (len(students) + 1) + "|"]
    for name in max(students.values(), key=len):
        cells = [f"{of[name]:g}" if name in of else "-" for of in students.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher-ckpt", required=True)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = ["--data-dir", options.data_dir, "--train-size", "10000", "--device", "cpu"]
    data = common.load_data(sp.parse_args(command))
    teacher = common.load_model("resnet56", options.teacher_ckpt).eval()
    passing = data.batches("train", 64, seed=0, augment=True)
    batches = [next(passing) for _ in range(4)]
    found = {"teacher": "resnet56", "teacher_hash": common.state_hash(teacher), "sizes": {}}
    for name in ("resnet20", "resnet8", "MobileNetV2"):
        torch.manual_seed(0)
        found["sizes"][name] = sizes(common.build_model(name, 100).train(), teacher, batches)
    print(table(found))
    if options.json:
        common.write_whole(options.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
