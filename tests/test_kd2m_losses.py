"""Each metric of kd2m.py against an independent oracle: a literal loop over Python numbers.

The oracles share no line with kd2m.py: transport tries every permutation, gradients are central
differences of the oracle's value.
"""

import inspect
import itertools
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck

import kd2m
import nd

full_w2 = partial(kd2m.w2_gaussian, cov="full")
full_cw2 = partial(kd2m.cw2_gaussian, cov="full")


def case(kind="generic", seed=0, dtype=torch.float64):
    """Features, logits and labels of a small batch of the given kind."""
    batch, width = {"n < d": (4, 7), "two samples": (2, 3), "three samples": (3, 2)}.get(
        kind, (6, 4)
    )
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    s, t, zs, zt = draw(batch, width), draw(batch, width), draw(batch, 3), draw(batch, 3)
    s, t = 1.5 * s + 0.3, t - 0.2 * s
    if kind == "dead units":  # constant: two of the student, two of the teacher, one in common
        s[:, 0], s[:, 1], t[:, 1], t[:, 2] = 0.0, 0.7, 0.0, -0.4
    labels = {"singletons": [5, 2, 2, 0, 2, 3], "generic": [1, 4, 1, 4, 1, 1]}
    y = torch.tensor(labels.get(kind, [3, 3, 1, 1, 3, 1][:batch]))
    return {k: v.to(dtype) for k, v in dict(s=s, t=t, zs=zs, zt=zt).items()} | {"y": y}


# --- oracles: equations as loops over lists of numbers -------------------------------------------


def square(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b))


def assignment(cost):
    n = len(cost)
    return min(sum(cost[i][p[i]] for i in range(n)) / n for p in itertools.permutations(range(n)))


def oracle_mse(s, t):
    return sum(square(a, b) for a, b in zip(s, t)) / len(s)


def oracle_w2(s, t):
    return assignment([[square(a, b) for b in t] for a in s])


def oracle_jw2(s, t, zs, zt, beta=1.0):
    n = range(len(s))
    return assignment([[square(s[i], t[j]) + beta * square(zs[i], zt[j]) for j in n] for i in n])


def by_class(oracle, s, t, y, reduction):
    total = 0.0
    for label in set(y):
        rows = [i for i in range(len(y)) if y[i] == label]
        value = oracle([s[i] for i in rows], [t[i] for i in rows])
        share = {"mean": 1 / len(set(y)), "sum": 1.0, "freq": len(rows) / len(y)}[reduction]
        total += share * value
    return total


def moments(x):
    columns = list(zip(*x))
    means = [sum(c) / len(c) for c in columns]
    return means, [sum((v - m) ** 2 for v in c) / len(c) for c, m in zip(columns, means)]


def oracle_w2_diag(s, t):
    (ms, vs), (mt, vt) = moments(s), moments(t)
    return square(ms, mt) + sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(vs, vt))


def oracle_w2_full(s, t):
    """By the matrix square roots that kd2m.py avoids."""
    s, t = np.array(s), np.array(t)
    cov_s, cov_t = np.cov(s.T, bias=True), np.cov(t.T, bias=True)
    values, vectors = np.linalg.eigh(cov_s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_t @ root).clip(0)).sum()
    gap = ((s.mean(0) - t.mean(0)) ** 2).sum()
    return gap + np.trace(cov_s) + np.trace(cov_t) - 2 * cross


def floored(s, t):
    (ms, vs), (mt, vt) = moments(s), moments(t)
    least = 1e-3 * sum(vt) / len(vt)
    return ms, [max(v, least) for v in vs], mt, [max(v, least) for v in vt]


def oracle_kl(s, t, direction="student"):
    ms, vs, mt, vt = floored(s, t)
    if direction == "both":
        return oracle_kl(s, t, "student") + oracle_kl(s, t, "teacher")
    if direction == "teacher":
        ms, vs, mt, vt = mt, vt, ms, vs
    total = 0.0
    for a, v, b, w in zip(ms, vs, mt, vt):
        total += (v / w + (a - b) ** 2 / w - 1 + math.log(w) - math.log(v)) / 2
    return total


def oracle_hellinger(s, t):
    product = 1.0
    for a, v, b, w in zip(*floored(s, t)):
        overlap = math.sqrt(2 * math.sqrt(v * w) / (v + w))
        product *= overlap * math.exp(-((a - b) ** 2) / (4 * (v + w)))
    return -math.log(product)


def oracle_mmd_linear(s, t):
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))  # noqa: E731
    mean = lambda x, y: sum(dot(a, b) for a in x for b in y) / (len(x) * len(y))  # noqa: E731
    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


def mean_distance(s, t):
    distances = [math.sqrt(square(a, b)) for x, y in ((s, s), (t, t), (s, t)) for a in x for b in y]
    return sum(distances) / len(distances)


def oracle_mmd_rbf(s, t, bandwidth):
    def mean(x, y):
        kernels = [math.exp(-square(a, b) / (2 * bandwidth**2)) for a in x for b in y]
        return sum(kernels) / len(kernels)

    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


def mean_cost(s, t):
    return sum(square(a, b) for a in s for b in t) / len(s) ** 2


def oracle_sinkhorn(s, t, eps):
    """Each OT_eps as <plan, C> + eps KL(plan | product), from the scaled kernel, to the end."""

    def entropic(x, y):
        x, y = np.array(x), np.array(y)
        cost = ((x[:, None] - y[None]) ** 2).sum(2)
        kernel, n = np.exp(-cost / eps), len(x)
        u = v = np.ones(n)
        for _ in range(20000):
            before, u = u, 1 / (kernel @ v)
            v = 1 / (kernel.T @ u)
            if np.abs(u / before - 1).max() < 1e-14:
                break
        plan = u[:, None] * kernel * v / n
        return (plan * cost).sum() + eps * (plan * np.log(plan * n * n)).sum()

    return entropic(s, t) - entropic(s, s) / 2 - entropic(t, t) / 2


def oracle_sliced(s, t, lines):
    total = 0.0
    for line in lines:
        length = math.sqrt(sum(x * x for x in line))
        shadow = lambda x: [[sum(a * b for a, b in zip(row, line)) / length] for row in x]  # noqa: E731, B023
        total += oracle_w2(shadow(s), shadow(t))
    return total / len(lines)


def gromov_costs(s, t):
    """The objective at every permutation."""
    n = range(len(s))
    ds, dt = [[square(a, b) for b in s] for a in s], [[square(a, b) for b in t] for a in t]
    for p in itertools.permutations(n):
        yield p, sum((ds[i][j] - dt[p[i]][p[j]]) ** 2 for i in n for j in n) / len(s) ** 2


def gromov_at(s, t, pairing):
    return next(cost for p, cost in gromov_costs(s, t) if p == pairing)


# name -> (d -> metric as a function of the student's features, the same of the oracle). What the
# metric holds fixed for its gradient is computed once, at the point where the gradient is taken.


def with_labels(metric, oracle, reduction):
    return (
        lambda d: lambda s: metric(s, d["t"], d["y"], reduction),
        lambda d: lambda s: by_class(oracle, s, d["t"].tolist(), d["y"].tolist(), reduction),
    )


def plain(metric, oracle, fixed=None):
    def prepare(d):
        t = d["t"].tolist()
        extra = () if fixed is None else (fixed(d),)
        return lambda s: oracle(s, t, *extra)

    return lambda d: lambda s: metric(s, d["t"]), prepare


def lines_of(d):
    g = torch.Generator().manual_seed(7)
    return torch.randn(d["s"].shape[1], 5, generator=g, dtype=torch.float64).T.tolist()


PAIRS = {
    "mse": plain(kd2m.mse, oracle_mse),
    "w2_empirical": plain(kd2m.w2_empirical, oracle_w2),
    "jw2_empirical": (
        lambda d: lambda s: kd2m.jw2_empirical(s, d["t"], d["zs"], d["zt"], 0.7),
        lambda d: lambda s: oracle_jw2(s, *(d[k].tolist() for k in ("t", "zs", "zt")), 0.7),
    ),
    "w2_gaussian": plain(kd2m.w2_gaussian, oracle_w2_diag),
    "w2_gaussian full": plain(full_w2, oracle_w2_full),
    "mmd_linear": plain(kd2m.mmd_linear, oracle_mmd_linear),
    "mmd_rbf": plain(
        kd2m.mmd_rbf, oracle_mmd_rbf, lambda d: mean_distance(d["s"].tolist(), d["t"].tolist())
    ),
    "mmd_rbf 2": plain(partial(kd2m.mmd_rbf, bandwidth=2.0), oracle_mmd_rbf, lambda d: 2.0),
    "sinkhorn": plain(
        partial(kd2m.sinkhorn, reg=0.5, tolerance=1e-13, iterations=10000),
        oracle_sinkhorn,
        lambda d: 0.5 * mean_cost(d["s"].tolist(), d["t"].tolist()),
    ),
    "sliced_w2": plain(partial(kd2m.sliced_w2, projections=5, seed=7), oracle_sliced, lines_of),
    "hellinger": plain(kd2m.hellinger, oracle_hellinger),
}
for way in ("student", "teacher", "both"):
    PAIRS[f"kl_gaussian {way}"] = plain(
        partial(kd2m.kl_gaussian, direction=way), partial(oracle_kl, direction=way)
    )
for way in ("mean", "sum", "freq"):
    PAIRS[f"cw2_empirical {way}"] = with_labels(kd2m.cw2_empirical, oracle_w2, way)
    PAIRS[f"cw2_gaussian {way}"] = with_labels(kd2m.cw2_gaussian, oracle_w2_diag, way)
    PAIRS[f"cw2_gaussian full {way}"] = with_labels(full_cw2, oracle_w2_full, way)
KINDS = ("generic", "n < d", "dead units", "singletons", "two samples", "three samples")


def differences(function, x, step=1e-5):
    """Gradient of a function of a list of rows, by central differences."""
    rows, gradient = x.tolist(), torch.zeros_like(x)
    for i, row in enumerate(rows):
        for k, value in enumerate(row):
            row[k] = value + step
            above = function(rows)
            row[k] = value - step
            gradient[i, k] = (above - function(rows)) / (2 * step)
            row[k] = value
    return gradient


def value_and_gradient(loss, x):
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_equal_the_oracle(name, kind):
    d = case(kind)
    metric, oracle = (prepare(d) for prepare in PAIRS[name])
    value, gradient = value_and_gradient(metric, d["s"])
    # Singular covariances: the oracle's square roots of rounding, not the metric, are off by 1e-8.
    singular = "full" in name
    tolerance = 1e-6 if singular else 1e-12
    if name == "mmd_rbf":  # sqrt of rounding where a distance is 0
        tolerance = 1e-7
    expected = torch.tensor(oracle(d["s"].tolist()), dtype=torch.float64)
    assert value.shape == () and value.dtype == torch.float64
    assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance)
    if not singular:
        expected = differences(oracle, d["s"])
        assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-7)
    assert gradient.abs().max() > 1e-3  # a comparison of zeros would show nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in PAIRS if "full" in n] + ["gromov", "gromov identity"])
def test_gradient_equals_its_own_finite_differences(name, kind):
    """Where an oracle by square roots is too coarse, and for the pairing that a search found."""
    d = case(kind)
    if name.startswith("gromov"):
        start = "identity" if "identity" in name else "profile"
        metric = lambda s: kd2m.gromov_w2(s, d["t"], start)  # noqa: E731
    else:
        metric = PAIRS[name][0](d)
    _, gradient = value_and_gradient(metric, d["s"])
    s = d["s"]
    expected = differences(lambda rows: metric(s.new_tensor(rows)).item(), s)
    if name.startswith("gromov"):
        assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("mmd_rbf", "sinkhorn")])
def test_gradcheck(name):
    """Without the two that hold their scale fixed. Off the kinks, so the generic case."""
    d = case("generic", 3)
    assert gradcheck(PAIRS[name][0](d), (d["s"].requires_grad_(),))


# --- every metric, called by what it needs --------------------------------------------------------


def on(metric, *keys):
    return lambda d: metric(d["s"], *(d[k] for k in keys))


NEEDS = {
    "jw2_empirical": ("t", "zs", "zt"),
    "cw2_empirical": ("t", "y"),
    "cw2_gaussian": ("t", "y"),
}
EVERY = {name: on(metric, *NEEDS.get(name, ("t",))) for name, metric in kd2m.METRICS.items()}
EVERY |= {
    "sliced_w2": on(partial(kd2m.sliced_w2, seed=1), "t"),
    "w2_gaussian full": on(full_w2, "t"),
    "cw2_gaussian full": on(full_cw2, "t", "y"),
    "kl_gaussian teacher": on(partial(kd2m.kl_gaussian, direction="teacher"), "t"),
    "gromov_w2 identity": on(partial(kd2m.gromov_w2, start="identity"), "t"),
}
TWO_SAMPLES = [name for name in EVERY if name.startswith(("kl", "hellinger"))]


def gradient_of(name, d):
    return value_and_gradient(lambda s: EVERY[name](d | {"s": s}), d["s"])


def test_the_names_of_the_metrics():
    names = "mse w2_empirical cw2_empirical jw2_empirical w2_gaussian cw2_gaussian kl_gaussian"
    names += " mmd_linear mmd_rbf sinkhorn sliced_w2 hellinger gromov_w2"
    assert list(kd2m.METRICS) == names.split()
    for name, metric in kd2m.METRICS.items():
        assert metric.__name__ == name
        assert list(inspect.signature(metric).parameters)[:2] == ["student_emb", "teacher_emb"]


def test_what_nd_and_kd2m_share_is_the_same_text():
    for name in ("_full", "kd_loss"):
        assert inspect.getsource(getattr(kd2m, name)) == inspect.getsource(getattr(nd, name))


@pytest.mark.parametrize("batch", [2, 17, 64])
def test_transport_equals_pot(batch):
    import ot  # a second to import, which the other tests need not wait for

    g = torch.Generator().manual_seed(batch)
    s, t = (torch.randn(batch, 8, generator=g, dtype=torch.float64) for _ in range(2))
    zs, zt = (torch.randn(batch, 5, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.randint(0, 4, (batch,), generator=g)

    def emd(cost):
        n = len(cost)
        return ot.emd2(np.full(n, 1 / n), np.full(n, 1 / n), cost)

    costs, label_costs = ot.dist(s.numpy(), t.numpy()), ot.dist(zs.numpy(), zt.numpy())
    assert math.isclose(kd2m.w2_empirical(s, t), emd(costs), rel_tol=1e-9)
    joint = kd2m.jw2_empirical(s, t, zs, zt, beta=3.0)
    assert math.isclose(joint, emd(costs + 3 * label_costs), rel_tol=1e-9)
    classes = [(y == label).nonzero().flatten().numpy() for label in y.unique()]
    expected = sum(emd(costs[np.ix_(rows, rows)]) for rows in classes)
    assert math.isclose(kd2m.cw2_empirical(s, t, y, "sum"), expected, rel_tol=1e-9)
    lines = torch.randn(8, 50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    lines = (lines / lines.norm(dim=0)).numpy()
    expected = ot.sliced_wasserstein_distance(s.numpy(), t.numpy(), projections=lines) ** 2
    assert math.isclose(kd2m.sliced_w2(s, t, 50, seed=9), expected, rel_tol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "freq"])
def test_one_class_makes_the_conditional_form_the_plain_one(reduction):
    d = case()
    one = torch.full((6,), 9)
    pairs = [(kd2m.cw2_empirical, kd2m.w2_empirical), (kd2m.cw2_gaussian, kd2m.w2_gaussian)]
    for conditional, unconditional in [*pairs, (full_cw2, full_w2)]:
        value, gradient = value_and_gradient(
            lambda s: conditional(s, d["t"], one, reduction),  # noqa: B023
            d["s"],
        )
        expected = value_and_gradient(lambda s: unconditional(s, d["t"]), d["s"])  # noqa: B023
        assert torch.allclose(value, expected[0], rtol=1e-12)
        assert torch.allclose(gradient, expected[1], rtol=1e-9, atol=1e-12)


def test_classes_of_one_sample_make_the_conditional_form_mse():
    d = case() | {"y": torch.tensor([3, 1, 4, 0, 9, 2])}
    value, gradient = gradient_of("mse", d)
    for name in ("cw2_empirical", "cw2_gaussian", "cw2_gaussian full"):
        assert torch.allclose(gradient_of(name, d)[0], value, rtol=1e-12)
        assert torch.allclose(gradient_of(name, d)[1], gradient, rtol=1e-12)


def test_reductions_differ_by_what_they_say():
    d = case("singletons")
    for metric in (kd2m.cw2_empirical, kd2m.cw2_gaussian, full_cw2):
        mean, total = (metric(d["s"], d["t"], d["y"], r) for r in ("mean", "sum"))
        assert torch.allclose(4 * mean, total) and mean > 0  # four classes are present
        assert torch.equal(metric(d["s"], d["t"], d["y"]), mean)


def test_beta_zero_makes_the_joint_form_the_plain_one():
    d = case()
    zs = d["zs"].clone().requires_grad_()
    value, gradient = value_and_gradient(
        lambda s: kd2m.jw2_empirical(s, d["t"], zs, d["zt"], beta=0.0), d["s"]
    )
    assert torch.equal(value, kd2m.w2_empirical(d["s"], d["t"]))
    assert torch.equal(gradient, gradient_of("w2_empirical", d)[1])


def test_the_joint_form_learns_from_features_and_logits():
    d = case()
    s, zs = d["s"].clone().requires_grad_(), d["zs"].clone().requires_grad_()
    value = kd2m.jw2_empirical(s, d["t"], zs, d["zt"])
    grad_s, grad_zs = torch.autograd.grad(value, (s, zs))
    assert grad_s.abs().max() > 1e-2
    oracle = lambda z: oracle_jw2(*(x.tolist() for x in (d["s"], d["t"])), z, d["zt"].tolist())  # noqa: E731
    assert torch.allclose(grad_zs, differences(oracle, d["zs"]), rtol=1e-6, atol=1e-8)
    assert (kd2m.jw2_empirical(s, d["t"] + 1, zs, d["zt"]) - value).abs() > 1e-2
    assert (kd2m.jw2_empirical(s, d["t"], zs, d["zt"] + 1) - value).abs() > 1e-2


def test_a_large_beta_pairs_by_the_labels():
    """With one-hot labels in the place of logits, JW2 becomes the frequency-weighted CW2."""
    d = case("singletons")
    one_hot = F.one_hot(d["y"]).double()
    joint = kd2m.jw2_empirical(d["s"], d["t"], one_hot, one_hot, beta=1e4)
    assert torch.allclose(joint, kd2m.cw2_empirical(d["s"], d["t"], d["y"], "freq"))


def test_gaussians_of_one_dimension():
    """N(0.3, 1.2^2) and N(-0.5, 0.7^2), as two points each; the numbers are from quadrature."""
    p, q = (torch.from_numpy(np.array([[m - v], [m + v]])) for m, v in ((0.3, 1.2), (-0.5, 0.7)))
    y = torch.tensor([1, 1])
    exact = {
        0.89: [kd2m.w2_gaussian(p, q), full_w2(p, q), kd2m.cw2_gaussian(p, q, y)],
        1.0834524788591497: [kd2m.kl_gaussian(p, q), kd2m.kl_gaussian(q, p, "teacher")],
        1.514810090702948: [kd2m.kl_gaussian(p, q, "both"), kd2m.kl_gaussian(q, p, "both")],
        -math.log(1 - 0.14123902829034174): [kd2m.hellinger(p, q), kd2m.hellinger(q, p)],
        0.64: [kd2m.mmd_linear(p, q)],
    }
    for expected, values in exact.items():
        for value in values:
            assert math.isclose(value, expected, rel_tol=1e-12)


def test_the_chain_of_inequalities():
    g = torch.Generator().manual_seed(0)
    strict = torch.zeros(5, dtype=torch.long)
    for _ in range(200):
        batch, width = (int(torch.randint(1, high, (), generator=g)) for high in (13, 9))
        t = torch.randn(batch, width, generator=g, dtype=torch.float64)
        noise = torch.randn(batch, width, generator=g, dtype=torch.float64)
        s = (t + noise * torch.rand((), generator=g) * 2).relu() + 0.3
        y = torch.randint(0, 3, (batch,), generator=g)
        chain = [
            kd2m.mmd_linear(s, t),
            kd2m.w2_gaussian(s, t),
            full_w2(s, t),
            kd2m.w2_empirical(s, t),
            kd2m.cw2_empirical(s, t, y, "freq"),
            kd2m.mse(s, t),
        ]
        steps = torch.stack(chain).diff()
        assert (steps > -1e-12).all(), chain
        strict += steps > 1e-6
    assert (strict > 20).all()  # none of them is an equality


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_equal_clouds_are_at_distance_zero(name, kind, dtype):
    d = case(kind, 1, dtype)
    d = d | {"t": d["s"], "zt": d["zs"]}
    value, gradient = gradient_of(name, d)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-11
    assert value.abs() < tolerance and gradient.abs().max() < tolerance


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_teachers_rows_matters_for_mse_alone(name):
    d = case()
    order = torch.tensor([3, 5, 1, 0, 2, 4])
    if "cw2" in name:  # labels belong to both clouds: only within a class
        order = torch.tensor([2, 3, 4, 1, 5, 0])
        assert torch.equal(d["y"][order], d["y"])
    value, gradient = gradient_of(name, d)
    shuffled = gradient_of(name, d | {"t": d["t"][order], "zt": d["zt"][order]})
    if name in ("mse", "gromov_w2 identity"):
        assert (value - shuffled[0]).abs() > 0.05
    else:
        assert torch.allclose(value, shuffled[0], rtol=1e-10)
        assert torch.allclose(gradient, shuffled[1], rtol=1e-6, atol=1e-10)
    every = gradient_of(name, {k: v[order] for k, v in d.items()})  # all rows alike: no change
    assert torch.allclose(value, every[0], rtol=1e-10)
    assert torch.allclose(gradient[order], every[1], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_units(name):
    """Scaling both clouds by 3: 9 times as far, but for what is free of the unit or of power 4."""
    d = case()
    scaled = EVERY[name](d | {k: 3 * d[k] for k in ("s", "t", "zs", "zt")})
    power = 4 if "gromov" in name else 0 if name.startswith(("kl", "hell", "mmd_rbf")) else 2
    assert torch.allclose(scaled, 3**power * EVERY[name](d), rtol=1e-9)


# --- covariances ----------------------------------------------------------------------------------


def test_full_covariance_equals_matrix_square_roots():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=g, dtype=torch.float64)
    s, t = (torch.randn(40, 6, generator=g, dtype=torch.float64) for _ in range(2))
    s = s @ mix + 1
    cov_s, cov_t = np.cov(s.numpy().T, bias=True), np.cov(t.numpy().T, bias=True)
    root = scipy.linalg.sqrtm(cov_s)
    cross = np.trace(scipy.linalg.sqrtm(root @ cov_t @ root)).real
    expected = ((s - 0).mean(0) - t.mean(0)).square().sum() + np.trace(cov_s + cov_t) - 2 * cross
    assert math.isclose(full_w2(s, t), expected, rel_tol=1e-10)
    assert kd2m.w2_gaussian(s, t) < expected - 0.1  # here the diagonal is another thing
    # Gradient by the optimal map: 2/n (s_i - T(s_i)), T(x) = mu_T + M (x - mu_S)
    inverse = np.linalg.inv(root)
    middle = torch.from_numpy((inverse @ scipy.linalg.sqrtm(root @ cov_t @ root) @ inverse).real)
    mapped = t.mean(0) + (s - s.mean(0)) @ middle
    gradient = value_and_gradient(lambda x: full_w2(x, t), s)[1]
    assert torch.allclose(gradient, 2 / 40 * (s - mapped), rtol=1e-8, atol=1e-10)


def test_the_neighbouring_product_is_wrong():
    """|A^T B|_* depends on how rows are paired; |A B^T|_*, which belongs there, does not."""
    d = case()
    a, b = d["s"] - d["s"].mean(0), d["t"] - d["t"].mean(0)
    order = torch.tensor([3, 5, 1, 0, 2, 4])
    norm = lambda m: torch.linalg.matrix_norm(m, "nuc")  # noqa: E731
    assert (norm(a.T @ b) - norm(a.T @ b[order])).abs() > 0.1
    assert (norm(a @ b.T) - norm(a @ b[order].T)).abs() < 1e-12
    traces = (a.square() + b.square()).sum() / 6 + (d["s"].mean(0) - d["t"].mean(0)).square().sum()
    expected = oracle_w2_full(d["s"].tolist(), d["t"].tolist())
    assert (traces - 2 * norm(a.T @ b) / 6 - expected).abs() > 0.1
    assert (traces - 2 * norm(a @ b.T) / 6 - expected).abs() < 1e-10


def test_full_covariance_in_float32_with_fewer_samples_than_units():
    """As in training: 64 samples, 100 units with rectified zeros, three of them dead."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(64, 100, generator=g).relu()
    s = (t + 0.5 * torch.randn(64, 100, generator=g)).relu()
    s[:, :3] = 0
    for metric in (full_w2, lambda s, t: full_cw2(s, t, torch.arange(64) % 40)):
        value, gradient = value_and_gradient(lambda x: metric(x, t), s)  # noqa: B023
        exact, expected = value_and_gradient(lambda x: metric(x, t.double()), s.double())  # noqa: B023
        assert value.dtype == gradient.dtype == torch.float32
        assert torch.allclose(value.double(), exact, rtol=1e-6)
        assert torch.allclose(gradient.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["w2_gaussian", "w2_gaussian full", "cw2_gaussian"])
def test_a_collapsed_student_is_pulled_by_the_means_alone(name):
    d = case() | {"y": torch.zeros(6, dtype=torch.long)}
    d["s"] = torch.full_like(d["s"], 0.7)
    gradient = gradient_of(name, d)[1]
    expected = 2 / 6 * (d["s"].mean(0) - d["t"].mean(0)).expand(6, -1)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-10)


def test_the_floor_bounds_dead_units():
    """A unit dead in the teacher counts 1 / floor times as much as the teacher's mean unit."""
    d = case()
    d["t"][:, 0] = 0.5
    mean_var = d["t"].var(0, correction=0).mean()
    d["s"][:, 0] += 3
    before = kd2m.kl_gaussian(d["s"], d["t"], floor=1e-2)
    d["s"][:, 0] += 1
    gap = d["s"][:, 0].mean() - 0.5
    rise = (gap**2 - (gap - 1) ** 2) / (2 * 1e-2 * mean_var)
    assert torch.allclose(kd2m.kl_gaussian(d["s"], d["t"], floor=1e-2) - before, rise)


# --- additions of ours ----------------------------------------------------------------------------


def test_sinkhorn_lies_between_transport_and_the_means():
    d = case()
    sinkhorn = partial(kd2m.sinkhorn, tolerance=1e-9, iterations=10000)
    small, large = sinkhorn(d["s"], d["t"], 0.01), sinkhorn(d["s"], d["t"], 1e4)
    assert torch.allclose(small, kd2m.w2_empirical(d["s"], d["t"]), rtol=1e-3)
    assert torch.allclose(large, kd2m.mmd_linear(d["s"], d["t"]), rtol=1e-3)


def test_sinkhorn_with_the_default_tolerance_is_near_its_fixed_point():
    g = torch.Generator().manual_seed(0)
    t = torch.randn(64, 16, generator=g, dtype=torch.float64).relu()
    s = (t + torch.randn(64, 16, generator=g, dtype=torch.float64)).relu()
    value, gradient = value_and_gradient(lambda x: kd2m.sinkhorn(x, t), s)
    to_the_end = partial(kd2m.sinkhorn, tolerance=1e-10, iterations=5000)
    expected, exact = value_and_gradient(lambda x: to_the_end(x, t), s)
    assert torch.allclose(value, expected, rtol=1e-3)
    assert (gradient - exact).norm() < 0.03 * exact.norm()
    eps = 0.1 * mean_cost(s.tolist(), t.tolist())
    assert math.isclose(expected, oracle_sinkhorn(s.tolist(), t.tolist(), eps), rel_tol=1e-8)
    few = kd2m.sinkhorn(s, t, tolerance=0.0, iterations=3)
    assert torch.isfinite(few) and few > 0


def test_sliced_w2_draws_its_lines_as_asked():
    d = case()
    state = torch.get_rng_state()
    a, b = (kd2m.sliced_w2(d["s"], d["t"], seed=5) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
    assert a != kd2m.sliced_w2(d["s"], d["t"], seed=6)
    first, second = (kd2m.sliced_w2(d["s"], d["t"]) for _ in range(2))
    assert first != second
    torch.manual_seed(3)
    first = kd2m.sliced_w2(d["s"], d["t"])
    torch.manual_seed(3)
    assert first == kd2m.sliced_w2(d["s"], d["t"])
    shift = torch.tensor([3.0, 0.0, -1.0, 2.0]).double()  # its shadows average |shift|^2 / D
    moved = kd2m.sliced_w2(d["s"], d["s"] + shift, 20000, seed=0)
    assert math.isclose(moved, shift.square().sum() / 4, rel_tol=0.03)


def test_gromov_is_the_cost_of_a_pairing_that_no_step_improves():
    optimal = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        s, t = (torch.randn(5, w, generator=g, dtype=torch.float64) for w in (2, 4))
        costs = dict(gromov_costs(s.tolist(), t.tolist()))
        for start in ("profile", "identity"):
            value = kd2m.gromov_w2(s, t, start).item()
            pairing = min(costs, key=lambda p: abs(costs[p] - value))  # noqa: B023
            assert math.isclose(costs[pairing], value, rel_tol=1e-10)
            p = torch.tensor(pairing)
            within_s, within_t = (((x[:, None] - x) ** 2).sum(2) for x in (s, t))
            step = linear_sum_assignment(-(within_s @ within_t[p]).numpy())[1]
            assert costs[tuple(step.tolist())] >= value - 1e-9
            optimal += math.isclose(min(costs.values()), value, rel_tol=1e-10)
        assert value <= costs[0, 1, 2, 3, 4] + 1e-9  # the start "identity", never left upwards
    assert 10 < optimal < 40  # an upper bound: often reached, not always


def test_gromov_sees_through_rotation_shift_width_and_order():
    g = torch.Generator().manual_seed(0)
    s = torch.randn(12, 3, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    t = (F.pad(s, (0, 2)) @ turn + 7)[torch.randperm(12, generator=g)]
    value, gradient = value_and_gradient(lambda x: kd2m.gromov_w2(x, t), s)
    assert value < 1e-20 and gradient.abs().max() < 1e-10
    assert kd2m.gromov_w2(s, 2 * t) > 1


# --- precision, gradients, extremes, errors -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_low_precision_inputs_are_computed_in_float32_or_better(name, dtype):
    d = case("generic", 2, dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in d.items()}
    value, gradient = gradient_of(name, d)
    expected, expected_gradient = gradient_of(name, exact)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.allclose(value.double(), expected, rtol=2e-6, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the gradient itself is rounded
    assert torch.allclose(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("name", EVERY)
def test_distant_features_lose_no_digits(name):
    """1e4 away from the origin, where |a|^2 + |b|^2 - 2ab in float32 would be all rounding."""
    d = case(dtype=torch.float32)
    far = d | {k: d[k] + 1e4 for k in ("s", "t")}
    near = {k: v.double() if v.is_floating_point() else v for k, v in far.items()}
    near |= {k: near[k] - 1e4 for k in ("s", "t")}
    by_means = name in ("w2_gaussian", "cw2_gaussian", "mmd_linear", *TWO_SAMPLES)
    tolerance = 5e-3 if by_means else 1e-5  # the mean itself is rounded to 1e-3
    assert torch.allclose(EVERY[name](far).double(), EVERY[name](near), rtol=tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_nothing(name):
    """Pasted into somebody's autocast region, backward included, a metric keeps its precision."""
    d = case("generic", 4, torch.float32)
    value, gradient = gradient_of(name, d)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradient_of(name, d)
    assert torch.equal(value, inside[0]) and torch.equal(gradient, inside[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_a_teacher_under_inference_mode(name, dtype):
    d = case(dtype=dtype)
    teachers = [k for k in ("t", "zt") if k in d]
    with torch.inference_mode():
        d |= {k: d[k] + 0 for k in teachers}
    d["s"] = d["s"].requires_grad_()
    EVERY[name](d).backward()
    assert d["t"].is_inference() and d["s"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", EVERY)
def test_no_gradient_reaches_the_teacher(name):
    d = {k: v.requires_grad_(v.is_floating_point()) for k, v in case().items()}
    EVERY[name](d).backward()
    assert d["s"].grad.abs().sum() > 0
    assert d["t"].grad is None and d["zt"].grad is None
    assert (d["zs"].grad is not None) == (name == "jw2_empirical")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_extreme_inputs_stay_finite(name, dtype):
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4, generator=g)
    one_unit = torch.zeros(8, 4)
    one_unit[3, 2] = 1.0
    clouds = [0 * noise, 0 * noise + 0.7, 1e4 * noise, 1e4 + noise, noise.relu(), one_unit]
    clouds += [1e-10 * noise, 1e-20 * noise]
    groups = [torch.zeros(8), torch.arange(8) % 2, torch.arange(8), torch.arange(8).clamp_max(5)]
    for s in clouds:
        for t in clouds:
            for y in groups if "cw2" in name else groups[:1]:
                logits = {"zs": s, "zt": t}
                d = {k: v.to(dtype) for k, v in (dict(s=s, t=t) | logits).items()}
                value, gradient = gradient_of(name, d | {"y": y.long()})
                scale = 1 + float(kd2m.mse(d["s"], d["t"])) ** (2 if "gromov" in name else 1)
                assert torch.isfinite(value) and torch.isfinite(gradient).all()
                assert value > -1e-6 * scale


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_one(name):
    d = {k: v[:1] for k, v in case().items()}
    if name in TWO_SAMPLES:
        with pytest.raises(ValueError, match=f"{name.split()[0]}: needs a batch of 2 or more"):
            EVERY[name](d)
        return
    value, gradient = gradient_of(name, d)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    gap = (d["s"] - d["t"]).square().sum()
    if "w2" in name and not name.startswith(("jw2", "sliced", "gromov")):
        assert torch.allclose(value, gap)


@pytest.mark.parametrize("name", EVERY)
def test_bad_features_are_refused_by_name(name):
    d, metric = case(), name.split()[0]
    for bad in (math.nan, math.inf, -math.inf):
        for key, owner in (("s", "student"), ("t", "teacher")):
            x = d[key].clone()
            x[2, 1] = bad
            with pytest.raises(ValueError, match=f"^{metric}: nan or infinity in the {owner}'s f"):
                EVERY[name](d | {key: x})
    with pytest.raises(ValueError, match=f"^{metric}: needs features"):
        EVERY[name](d | {"t": d["t"][:5]})
    with pytest.raises(ValueError, match=f"^{metric}: needs features"):
        EVERY[name](d | {"s": d["s"][:, 0]})
    with pytest.raises(ValueError, match=f"^{metric}: needs a batch of . or more, not 0"):
        EVERY[name](d | {"s": d["s"][:0], "t": d["t"][:0]})
    if metric == "gromov_w2":
        assert EVERY[name](d | {"t": d["t"][:, :3]}) > 0
    else:
        with pytest.raises(ValueError, match=f"^{metric}: .* 4 wide, the teacher's 3; project"):
            EVERY[name](d | {"t": d["t"][:, :3]})


def test_bad_logits_labels_and_options_are_refused_by_name():
    d = case()
    jw2 = EVERY["jw2_empirical"]
    for change, text in (
        ({"zs": d["zs"] * math.nan}, "nan or infinity in the student's logits"),
        ({"zt": d["zt"] / 0}, "nan or infinity in the teacher's logits"),
        ({"zs": d["zs"][:, :2]}, "the student's logits are 2 wide, the teacher's 3$"),
        ({"zs": d["zs"][:1], "zt": d["zt"][:1]}, "6 rows of features, 1 of logits"),
    ):
        with pytest.raises(ValueError, match=f"^jw2_empirical: .*{text}"):
            jw2(d | change)
    for name in ("cw2_empirical", "cw2_gaussian", "cw2_gaussian full"):
        for labels, text in (
            (d["y"] - 2, "label -1 is negative"),
            (d["y"][:5], r"needs whole numbers \[6\] as labels, not \[5\]"),
            (d["y"].float(), "not .* torch.float32"),
            (d["y"][:, None], r"not \[6, 1\]"),
        ):
            with pytest.raises(ValueError, match=f"^{name.split()[0]}: .*{text}"):
                EVERY[name](d | {"y": labels})
    s, t, y = d["s"], d["t"], d["y"]
    for wrong in (
        lambda: kd2m.cw2_empirical(s, t, y, "none"),
        lambda: kd2m.cw2_gaussian(s, t, y, "none"),
        lambda: kd2m.cw2_gaussian(s, t, y, cov="none"),
        lambda: kd2m.w2_gaussian(s, t, "none"),
        lambda: kd2m.kl_gaussian(s, t, "none"),
        lambda: kd2m.gromov_w2(s, t, "none"),
    ):
        with pytest.raises(ValueError, match="='none'; choose from "):
            wrong()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type_and_size(dtype):
    d = case()
    for name in ("cw2_empirical", "cw2_gaussian", "cw2_gaussian full"):
        assert torch.equal(EVERY[name](d), EVERY[name](d | {"y": (d["y"] + 200).to(dtype)}))


def test_the_block_runs_alone():
    """Pasted into a file with only its three imports in scope, the block computes every metric."""
    text = Path(kd2m.__file__).read_text()
    block = re.search(r"# --- copy from here.*?# --- to here", text, re.S).group()
    scope = {"torch": torch, "F": F, "linear_sum_assignment": linear_sum_assignment}
    exec(block, scope)
    d = case()
    assert list(scope["METRICS"]) == list(kd2m.METRICS)
    for name in set(kd2m.METRICS) - {"sliced_w2"}:
        assert on(scope[name], *NEEDS.get(name, ("t",)))(d) == EVERY[name](d), name
    assert scope["sliced_w2"](d["s"], d["t"], seed=1) == EVERY["sliced_w2"](d)
    assert scope["kd_loss"](d["zs"], d["zt"]) == kd2m.kd_loss(d["zs"], d["zt"])
    for option in ("full", "diag"):
        assert scope["w2_gaussian"](d["s"], d["t"], option) == kd2m.w2_gaussian(
            d["s"], d["t"], option
        )
        scope["cw2_gaussian"](d["s"], d["t"], d["y"], cov=option)
