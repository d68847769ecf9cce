"""How large the losses of sp.py and kd2m.py are before training: what their weights come from.

    python tests/sizes.py --teacher-ckpt resnet56.pth --data-dir data --json results/sizes.json

A trained resnet56 and untrained students, both seeing the same augmented CIFAR-100 training images,
the mean of four batches of 64.
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

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--teacher-ckpt", required=True)
parser.add_argument("--data-dir", default="data")
parser.add_argument("--json", type=Path)
options = parser.parse_args()


@torch.no_grad()
def sizes(student, teacher, batches):
    """-> name of the loss: its mean over the batches. Embeddings 64 wide only: kd2m.py's too."""
    sums = {}
    for images, labels in batches:
        (zs, s), (zt, t) = (net(images, return_features=True) for net in (student, teacher))
        values = {"ce": F.cross_entropy(zs, labels)}
        values["sp"] = sp.sp_loss(s.maps[-1], t.maps[-1])
        values["cc"] = sp.cc_loss(s.embedding, t.embedding)
        values["intra"] = sp.intra_loss(s.maps[-1], t.maps[-1])
        if len(s.maps) == len(t.maps):
            pairs = zip(s.maps, t.maps)
            values |= {f"at {a.shape[-1]}x{a.shape[-1]}": sp.at_loss(a, b) for a, b in pairs}
        for name, metric in kd2m.METRICS.items() if s.embedding.shape == t.embedding.shape else ():
            inputs = [s.embedding, t.embedding]
            inputs += [labels] * name.startswith("cw2") + [zs, zt] * (name == "jw2_empirical")
            values[name] = metric(*inputs)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() / len(batches)
    return {name: float(f"{value:.4g}") for name, value in sums.items()}


arguments = ["--data-dir", options.data_dir, "--train-size", "10000"]
data = common.load_data(sp.parse_args(arguments), torch.device("cpu"))
teacher = common.load_model("resnet56", options.teacher_ckpt).eval()
passing = data.batches("train", 64, seed=0, augment=True)
batches = [next(passing) for _ in range(4)]
found = {"teacher": "resnet56", "teacher_hash": common.state_hash(teacher), "sizes": {}}
for name in ("resnet20", "resnet8", "MobileNetV2"):
    torch.manual_seed(0)
    found["sizes"][name] = sizes(common.build_model(name, 100).train(), teacher, batches)
print(json.dumps(found, indent=1))
if options.json:
    common.write_whole(options.json, (json.dumps(found, indent=1) + "\n").encode())
