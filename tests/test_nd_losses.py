"""Each loss of nd.py against an independent oracle: a literal loop in double precision.

The oracles work on Python lists of 0-dim float64 tensors, so that autograd gives their gradient
too, and share no line with nd.py.
"""

import math
import re
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import nd

B, D, K = 7, 5, 6


def case(seed=0, dtype=torch.float64, batch=B, width=D, classes=K, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).mul(scale).to(dtype)  # noqa: E731
    return {
        "s": draw(batch, width),
        "t": draw(batch, width),
        "c": draw(classes, width).abs(),
        "zs": draw(batch, classes),
        "zt": draw(batch, classes),
        "y": torch.randint(0, classes, (batch,), generator=g),
    }


# --- oracles: equations as loops -----------------------------------------------------------------


def dot(a, b):
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b):
        total = total + x * y
    return total


def length(a):
    return torch.sqrt(dot(a, a))


def oracle_nd(s, t, c, y):
    total = 0.0
    for i in range(len(y)):
        mean = c[y[i]]
        longest = max(length(s[i]), length(t[i]), key=lambda x: float(x.detach()))
        total = total + 1 - dot(s[i], mean) / length(mean) / longest
    return total / len(y)


def oracle_nd_identity(s, t, c, y):
    total = 0.0
    for i in range(len(y)):
        cos = dot(s[i], c[y[i]]) / (length(s[i]) * length(c[y[i]]))
        total = total + 1 - cos * min(1.0, float(length(s[i]).detach() / length(t[i])))
    return total / len(y)


def oracle_direction(s, c, y):
    total = 0.0
    for i in range(len(y)):
        total = total + 1 - dot(s[i], c[y[i]]) / (length(s[i]) * length(c[y[i]]))
    return total / len(y)


def oracle_norm(s, t):
    total = 0.0
    for i in range(len(s)):
        gap = 1 - length(s[i]) / length(t[i])
        total = total + (gap if gap > 0 else 0 * gap)
    return total / len(s)


def softmax(row, temperature):
    top = max(float(z.detach()) for z in row)
    powers = [torch.exp((z - top) / temperature) for z in row]
    mass = sum(powers)
    return [p / mass for p in powers]


def kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q))


def oracle_kd(zs, zt, temperature):
    total = 0.0
    for i in range(len(zs)):
        total = total + kl(softmax(zt[i], temperature), softmax(zs[i], temperature))
    return temperature**2 * total / len(zs)


def oracle_dkd(zs, zt, y, alpha, beta, temperature):
    total = 0.0
    for i in range(len(y)):
        p, q = softmax(zt[i], temperature), softmax(zs[i], temperature)
        rest = [k for k in range(len(p)) if k != y[i]]
        p_rest, q_rest = sum(p[k] for k in rest), sum(q[k] for k in rest)
        tckd = kl([p[y[i]], p_rest], [q[y[i]], q_rest])
        nckd = kl([p[k] / p_rest for k in rest], [q[k] / q_rest for k in rest])
        total = total + alpha * tckd + beta * nckd
    return temperature**2 * total / len(y)


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [x - mean_a for x in a], [x - mean_b for x in b]
    return dot(a, b) / (length(a) * length(b))


def oracle_dist(zs, zt, beta, gamma, temperature):
    p = [softmax(row, temperature) for row in zs]
    q = [softmax(row, temperature) for row in zt]
    rows = sum(pearson(p[i], q[i]) for i in range(len(p))) / len(p)
    columns = [([r[k] for r in p], [r[k] for r in q]) for k in range(len(p[0]))]
    columns = sum(pearson(a, b) for a, b in columns) / len(columns)
    return temperature**2 * (beta * (1 - rows) + gamma * (1 - columns))


def oracle_hcl(students, teachers):
    total = 0.0
    for s, t in zip(students, teachers):
        batch, channels, height, width = s.shape
        loss, weights = 0.0, 0.0
        sizes = [height] + [size for size in (4, 2, 1) if size < height]
        for order, size in enumerate(sizes):
            scale = 1 / 2**order
            cell, squares = height // size, 0.0
            for b in range(batch):
                for c in range(channels):
                    for i in range(size):
                        for j in range(size):
                            rows = slice(i * cell, (i + 1) * cell)
                            cols = slice(j * cell, (j + 1) * cell)
                            gap = (s[b, c, rows, cols] - t[b, c, rows, cols]).sum() / cell**2
                            squares = squares + gap * gap
            loss = loss + scale * squares / (batch * channels * size * size)
            weights += scale
        total = total + loss / weights
    return total


PAIRS = {  # name -> (loss of nd.py, oracle, which tensors, which of them is the student's)
    "nd": (nd.nd_loss, oracle_nd, ("s", "t", "c", "y")),
    "nd identity": (nd.nd_loss, oracle_nd_identity, ("s", "t", "c", "y")),
    "direction": (nd.direction_loss, oracle_direction, ("s", "c", "y")),
    "norm": (nd.norm_loss, oracle_norm, ("s", "t")),
    "kd": (lambda a, b: nd.kd_loss(a, b, 4.0), lambda a, b: oracle_kd(a, b, 4.0), ("zs", "zt")),
    "kd T=1": (lambda a, b: nd.kd_loss(a, b, 1.0), lambda a, b: oracle_kd(a, b, 1.0), ("zs", "zt")),
    "dkd": (
        lambda a, b, y: nd.dkd_loss(a, b, y, 2.5, 4.0, 3.0),
        lambda a, b, y: oracle_dkd(a, b, y, 2.5, 4.0, 3.0),
        ("zs", "zt", "y"),
    ),
    "dist": (
        lambda a, b: nd.dist_loss(a, b, 2.0, 0.5, 3.0),
        lambda a, b: oracle_dist(a, b, 2.0, 0.5, 3.0),
        ("zs", "zt"),
    ),
}


def value_and_gradient(loss, tensors):
    student = tensors[0].clone().requires_grad_()
    value = loss(student, *tensors[1:])
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_equal_the_oracle(name, seed):
    loss, oracle, needs = PAIRS[name]
    tensors = [case(seed)[k] for k in needs]
    value, gradient = value_and_gradient(loss, tensors)
    if name == "nd identity":  # min(1, ratio) is a constant there: compare the value alone
        assert torch.allclose(value, oracle(*tensors), rtol=1e-12)
        return
    expected, expected_gradient = value_and_gradient(oracle, tensors)
    assert value.shape == () and torch.allclose(value, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-13)
    assert gradient.abs().max() > 1e-4  # a comparison of zeros would show nothing


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "nd identity"])
def test_gradcheck(name):
    loss, _, needs = PAIRS[name]
    student, *others = [case(5)[k] for k in needs]
    assert gradcheck(lambda x: loss(x, *others), (student.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in PAIRS if n != "nd identity"])
def test_low_precision_inputs_are_computed_in_float32(name, dtype):
    loss, oracle, needs = PAIRS[name]
    tensors = [case(3, dtype)[k] for k in needs]
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    value, gradient = value_and_gradient(loss, tensors)
    expected, expected_gradient = value_and_gradient(oracle, exact)
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), expected, rtol=2e-5, atol=1e-6)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # the gradient itself is rounded to bf16
    assert torch.allclose(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance / 10)


def test_both_branches_of_the_maximum():
    """|s| < |t|: the gradient is -e / |t|. |s| >= |t|: a pure rotation, no component along s."""
    d = case(1)
    e = d["c"][d["y"]] / d["c"][d["y"]].norm(dim=1, keepdim=True)
    for ratio in (0.5, 2.0):
        t = d["t"] / d["t"].norm(dim=1, keepdim=True) * d["s"].norm(dim=1, keepdim=True) / ratio
        _, gradient = value_and_gradient(nd.nd_loss, [d["s"], t, d["c"], d["y"]])
        if ratio < 1:
            assert torch.allclose(gradient * B, -e / t.norm(dim=1, keepdim=True), rtol=1e-10)
        else:
            assert (gradient * d["s"]).sum(1).abs().max() < 1e-12
            assert gradient.abs().max() > 1e-3


def test_reached_target_is_zero_and_opposite_is_two():
    c = torch.rand(3, 4, dtype=torch.float64) + 0.1
    y = torch.tensor([0, 1, 2])
    assert nd.nd_loss(2 * c, c, c, y).abs() < 1e-12
    assert (nd.nd_loss(-2 * c, c, c, y) - 2).abs() < 1e-12
    assert (nd.nd_loss(0.25 * c, c, c, y) - 0.75).abs() < 1e-12
    assert (nd.norm_loss(0.25 * c, c) - 0.75).abs() < 1e-12 and nd.norm_loss(3 * c, c) == 0


def test_losses_of_a_perfect_student_are_zero():
    z = case(2)["zt"]
    for value in (nd.kd_loss(z, z), nd.dkd_loss(z, z, case(2)["y"]), nd.dist_loss(z, z)):
        assert value.abs() < 1e-10


def test_dkd_with_the_teachers_weight_is_kd():
    """KD = TCKD + (1 - p_true) NCKD, sample by sample: the identity DKD starts from."""
    d = case(4)
    for i in range(B):
        zs, zt, y = d["zs"][i : i + 1], d["zt"][i : i + 1], d["y"][i : i + 1]
        rest = 1 - F.softmax(zt / 4, 1)[0, y[0]]
        assert torch.allclose(nd.kd_loss(zs, zt), nd.dkd_loss(zs, zt, y, 1.0, float(rest)))


def test_no_gradient_reaches_the_teacher():
    d = case(0)
    for name, (loss, _, needs) in PAIRS.items():
        tensors = [d[k].clone().requires_grad_(d[k].is_floating_point()) for k in needs]
        loss(*tensors).backward()
        assert tensors[0].grad.abs().sum() > 0, name
        assert all(t.grad is None for t in tensors[1:]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10])
def test_extreme_inputs_stay_finite(classes, dtype):
    g = torch.Generator().manual_seed(0)
    zero = torch.zeros(4, classes)
    sign = torch.where(torch.rand(4, classes, generator=g) < 0.5, -1.0, 1.0)
    one_hot = F.one_hot(torch.arange(4) % classes, classes).float()
    hostile = [zero, 1e4 * sign, -1e4 * sign, 1e4 * one_hot, -1e4 * one_hot, 1e-30 * sign]
    y = torch.arange(4) % classes
    for s in hostile:
        for t in hostile:
            student, teacher = s.to(dtype).requires_grad_(), t.to(dtype)
            means = t[:1].expand(classes, classes).to(dtype)
            values = {
                "kd": nd.kd_loss(student, teacher),
                "dkd": nd.dkd_loss(student, teacher, y),
                "dist": nd.dist_loss(student, teacher),
                "nd": nd.nd_loss(student, teacher, means, y),
                "direction": nd.direction_loss(student, means, y),
                "norm": nd.norm_loss(student, teacher),
            }
            for name, value in values.items():
                gradient = torch.autograd.grad(value, student, retain_graph=True)[0]
                assert torch.isfinite(value) and torch.isfinite(gradient).all(), name
                assert value > -1e-3, name
                assert gradient.abs().max() < 1e6, name  # finite, but no explosion either
            assert values["nd"] <= 2.001 and values["direction"] <= 2.001


def test_zero_vectors_are_defined():
    """No direction to turn: the loss is 1. No norm to reach: the norm term is 0."""
    zero, means, y = torch.zeros(3, 4), torch.rand(5, 4), torch.tensor([0, 1, 2])
    student = zero.clone().requires_grad_()
    value = nd.nd_loss(student, zero, means, y)
    assert value == 1 and torch.autograd.grad(value, student)[0].abs().sum() == 0
    assert nd.nd_loss(student, torch.rand(3, 4), means, y) == 1
    assert nd.nd_loss(torch.rand(3, 4), zero, 0 * means, y) == 1  # a class mean of zero
    assert nd.norm_loss(zero, zero) == 0 and nd.direction_loss(zero, means, y) == 1


def test_huge_logits_match_the_closed_form():
    """Logits +-1e4, T = 4: the teacher is certain of the class that the student excludes."""
    student, teacher = torch.tensor([[-1e4, 1e4]]), torch.tensor([[1e4, -1e4]])
    assert math.isclose(nd.kd_loss(student, teacher), 16 * 2e4 / 4, rel_tol=1e-6)
    y = torch.tensor([0])
    assert math.isclose(nd.dkd_loss(student, teacher, y, 1.0, 8.0), 16 * 2e4 / 4, rel_tol=1e-6)


def test_dist_ignores_what_correlation_ignores():
    """Shifting a row of logits changes nothing; uniform predictions correlate with nothing."""
    d = case(6)
    moved = d["zs"] + torch.arange(B, dtype=torch.float64)[:, None]
    assert torch.allclose(nd.dist_loss(moved, d["zt"]), nd.dist_loss(d["zs"], d["zt"]))
    g = torch.Generator().manual_seed(0)
    for batch, classes in ((7, 6), (128, 10), (64, 100), (33, 1000), (2, 2)):
        teacher = torch.randn(batch, classes, generator=g)
        same_row = torch.randn(classes, generator=g).expand(batch, -1)
        for constant in (torch.zeros(batch, classes), same_row):  # every column is constant
            logits = constant.clone().requires_grad_()
            value = nd.dist_loss(logits, teacher)
            columns = value - nd.dist_loss(logits, teacher, gamma=0.0)
            assert torch.allclose(columns, torch.tensor(16.0))
            assert torch.autograd.grad(value, logits)[0].abs().max() < 10
        uniform = torch.zeros(batch, classes)
        assert torch.allclose(nd.dist_loss(uniform, teacher), torch.tensor(32.0))


@pytest.mark.parametrize("sizes", [(8, 4), (2, 1), (16,)])
def test_hcl_equals_the_oracle(sizes):
    g = torch.Generator().manual_seed(0)
    draw = lambda h: torch.randn(2, 3, h, h, generator=g, dtype=torch.float64)  # noqa: E731
    students, teachers = [draw(h) for h in sizes], [draw(h) for h in sizes]
    for s in students:
        s.requires_grad_()
    value, expected = nd.hcl_loss(students, teachers), oracle_hcl(students, teachers)
    assert torch.allclose(value, expected, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(value, students), torch.autograd.grad(expected, students)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-14)


def test_hcl_sends_no_gradient_to_the_teacher_and_takes_bf16():
    s = torch.randn(2, 3, 8, 8).bfloat16().requires_grad_()
    t = torch.randn(2, 3, 8, 8).bfloat16().requires_grad_()
    value = nd.hcl_loss([s], [t])
    value.backward()
    assert value.dtype == torch.float32 and t.grad is None and s.grad.abs().sum() > 0


def test_embeddings_of_other_shapes_are_refused_or_flattened():
    d = case()
    pooled = {k: v[:, :, None, None] for k, v in d.items() if k in ("s", "t")}
    assert nd.nd_loss(**named(pooled), **means(d)) == nd.nd_loss(**named(d), **means(d))
    assert nd.norm_loss(**named(pooled)) == nd.norm_loss(**named(d))
    assert nd.direction_loss(pooled["s"], d["c"], d["y"]) == nd.direction_loss(
        d["s"], d["c"], d["y"]
    )
    for t in (d["t"][:1], d["t"][:, :1], d["t"][:, :, None].expand(-1, -1, D)):
        for loss in (nd.norm_loss, lambda s, t: nd.nd_loss(s, t, d["c"], d["y"])):
            with pytest.raises(ValueError, match="project the student's"):
                loss(d["s"], t)


def named(d):
    return {"student_emb": d["s"], "teacher_emb": d["t"]}


def means(d):
    return {"class_means": d["c"], "labels": d["y"]}


def test_a_teacher_under_inference_mode():
    with torch.inference_mode():
        d = case(dtype=torch.float32)
        t, zt, c, maps = d["t"] + 0, d["zt"] + 0, d["c"] + 0, torch.randn(2, 3, 8, 8)
    d = case(dtype=torch.float32)
    x = torch.ones((), requires_grad=True)
    values = [
        nd.nd_loss(x * d["s"], t, c, d["y"]),
        nd.direction_loss(x * d["s"], c, d["y"]),
        nd.norm_loss(x * d["s"], t),
        nd.kd_loss(x * d["zs"], zt),
        nd.dkd_loss(x * d["zs"], zt, d["y"]),
        nd.dist_loss(x * d["zs"], zt),
        nd.hcl_loss([x * torch.randn(2, 3, 8, 8)], [maps]),
    ]
    sum(values).backward()
    assert maps.is_inference() and x.grad.isfinite()


def test_hcl_refuses_maps_of_other_shapes():
    for shape in ((2, 3, 1, 1), (1, 3, 8, 8), (2, 3, 8, 4)):
        with pytest.raises(ValueError, match="shapes"):
            nd.hcl_loss([torch.randn(2, 3, 8, 8)], [torch.randn(shape)])


def test_review_needs_a_map_a_level():
    module = nd.ReviewKD([4, 6], [5, 7], 3)
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    for maps in (
        ([student], [teacher]),
        ([student] * 2, [teacher]),
        ([student] * 3, [teacher] * 3),
    ):
        with pytest.raises(ValueError, match="needs one a level"):
            module(*maps)


def test_review_fuses_from_deep_to_shallow():
    """Two levels by hand: what the module returns, written out operation by operation."""
    torch.manual_seed(0)
    module = nd.ReviewKD([4, 6], [5, 7], 3).double().eval()
    student = [torch.randn(2, 4, 8, 8).double(), torch.randn(2, 6, 4, 4).double()]
    teacher = [torch.zeros(2, 5, 16, 16), torch.zeros(2, 7, 2, 2)]
    shallow, deep = module(student, teacher)
    assert shallow.shape == (2, 5, 16, 16) and deep.shape == (2, 7, 2, 2)

    def bn(layer, x):
        scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
        return (x - layer.running_mean[:, None, None]) * scale[:, None, None]

    def one_by_one(layer, x):
        out = torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x)
        return out if layer.bias is None else out + layer.bias[:, None, None]

    x = bn(module.inward[1][1], one_by_one(module.inward[1][0], student[1]))
    x = x[:, :, ::2, ::2]  # 4 -> 2, nearest
    expected = bn(module.outward[1][1], F.conv2d(x, module.outward[1][0].weight, padding=1))
    assert torch.allclose(deep, expected)
    residual = x.repeat_interleave(4, 2).repeat_interleave(4, 3)  # 2 -> 8, nearest
    x = bn(module.inward[0][1], one_by_one(module.inward[0][0], student[0]))
    gate = torch.sigmoid(one_by_one(module.gates[0], torch.cat([x, residual], 1)))
    x = x * gate[:, 0:1] + residual * gate[:, 1:2]
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 8 -> 16
    expected = bn(module.outward[0][1], F.conv2d(x, module.outward[0][0].weight, padding=1))
    assert torch.allclose(shallow, expected)


def test_shapes_that_would_broadcast_are_refused():
    d = case(0)
    first = slice(0, 1)
    wrong = [
        lambda: nd.kd_loss(d["zs"], d["zt"][:, first]),
        lambda: nd.dkd_loss(d["zs"], d["zt"][first], d["y"]),
        lambda: nd.dist_loss(d["zs"], d["zt"][first]),
        lambda: nd.nd_loss(d["s"], d["t"], d["c"][:, first], d["y"]),
        lambda: nd.nd_loss(d["s"], d["t"], d["c"], d["y"][:, None]),
        lambda: nd.direction_loss(d["s"], d["c"], d["y"][:, None]),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="must be the same"):
            call()


@pytest.mark.parametrize("label", [-100, 4])
def test_labels_out_of_range_are_refused(label):
    """-100, which cross-entropy ignores, would be a row counted from the end."""
    s, means = torch.randn(3, 5), torch.randn(4, 5)
    labels = torch.tensor([0, label, 1])
    for call in (
        lambda: nd.nd_loss(s, s, means, labels),
        lambda: nd.direction_loss(s, means, labels),
    ):
        with pytest.raises(IndexError):
            call()


def test_class_means_equal_a_loop_and_name_an_empty_class():
    class Teacher(torch.nn.Module):
        def forward(self, x, return_features=False):
            assert not self.training
            x = x.flatten(1)[:, :4]
            return x, type("Features", (), {"embedding": x})

    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(9, 3, 2, 2, generator=g), torch.arange(9) % 4) for _ in range(3)]
    teacher = Teacher().train()
    teacher.frozen = torch.nn.BatchNorm1d(2).eval()
    means = nd.compute_class_means(teacher, batches, 4)
    assert teacher.training and not teacher.frozen.training and means.dtype == torch.float32
    for k in range(4):
        rows = [
            x.flatten()[:4].double()
            for images, y in batches
            for x, label in zip(images, y)
            if label == k
        ]
        assert torch.allclose(means[k].double(), sum(rows) / len(rows), rtol=1e-6)
    with pytest.raises(ValueError, match="class 4"):
        nd.compute_class_means(teacher, batches, 5)


def test_class_means_hold_one_batch_at_a_time():
    """Of a thousand classes or a million images: the sums, and nothing of earlier batches."""
    alive = []

    def batches():
        for _ in range(20):
            images = torch.randn(4, 3, 2, 2)
            alive.append(weakref.ref(images))
            yield images, torch.arange(4)
            del images
            assert sum(ref() is not None for ref in alive) <= 1

    class Teacher(torch.nn.Module):
        def forward(self, x, return_features=False):
            return x, types.SimpleNamespace(embedding=x.flatten(1))

    nd.compute_class_means(Teacher(), batches(), 4)


def test_the_block_runs_alone():
    """Pasted into a file with only torch in scope, the block defines every loss and computes."""
    text = (Path(nd.__file__)).read_text()
    block = re.search(r"# --- copy from here.*?# --- to here", text, re.S).group()
    scope = {"torch": torch, "F": F}
    exec(block, scope)
    d = case(0)
    assert scope["nd_loss"](d["s"], d["t"], d["c"], d["y"]) == nd.nd_loss(
        d["s"], d["t"], d["c"], d["y"]
    )
    assert scope["dkd_loss"](d["zs"], d["zt"], d["y"]) == nd.dkd_loss(d["zs"], d["zt"], d["y"])
    assert scope["kd_loss"](d["zs"], d["zt"]) == nd.kd_loss(d["zs"], d["zt"])
    assert scope["dist_loss"](d["zs"], d["zt"]) == nd.dist_loss(d["zs"], d["zt"])
    assert scope["norm_loss"](d["s"], d["t"]) == nd.norm_loss(d["s"], d["t"])
    assert scope["direction_loss"](d["s"], d["c"], d["y"]) == nd.direction_loss(
        d["s"], d["c"], d["y"]
    )
    maps = [torch.randn(2, 4, 4, 4)]
    assert scope["hcl_loss"](scope["ReviewKD"]([4], [4], 2)(maps, maps), maps) > 0


def test_losses_inside_autocast_keep_their_precision():
    """Pasted into somebody's autocast region, a loss is still computed in float32."""
    d = case(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [nd.nd_loss(d["s"], d["t"], d["c"], d["y"]), nd.kd_loss(d["zs"], d["zt"])]
        inside += [nd.dkd_loss(d["zs"], d["zt"], d["y"]), nd.dist_loss(d["zs"], d["zt"])]
    outside = [nd.nd_loss(d["s"], d["t"], d["c"], d["y"]), nd.kd_loss(d["zs"], d["zt"])]
    outside += [nd.dkd_loss(d["zs"], d["zt"], d["y"]), nd.dist_loss(d["zs"], d["zt"])]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))
