"""What holds for the losses whatever the inputs: bounds, invariances, limits, other libraries."""

import importlib
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import LOSSES, gromov_costs
from scipy.optimize import linear_sum_assignment

import dcd
import kd2m
import nd
import sp

METRICS = [name for name, case in LOSSES.items() if case.scripts == "kd2m"]


def inputs_of(name, batch=6, seed=0):
    return list(LOSSES[name].make(batch, 5, seed).values())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, relative=1e-9):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b, rtol=relative, atol=1e-12)


def value_and_gradient(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


def evaluated(name, inputs):
    case = LOSSES[name]
    loss = getattr(importlib.import_module(case.scripts.split()[0]), name.split()[0])
    return case.call(loss, inputs, case.options[0])


ZERO_AT_EQUALITY = ["norm_loss", "kd_loss", "dkd_loss", "hcl_loss"]
ZERO_AT_EQUALITY += ["sp_loss", "cc_loss", "intra_loss", "at_loss", *METRICS]


@pytest.mark.parametrize("name", ZERO_AT_EQUALITY)
def test_a_student_like_the_teacher_has_loss_zero_and_no_gradient(name):
    inputs = LOSSES[name].make(4, 3, 0)
    ours = {k: x.requires_grad_() for k, x in inputs.items() if k.startswith("student")}
    theirs = {k.replace("student", "teacher"): x.detach().clone() for k, x in ours.items()}
    value = evaluated(name, {**inputs, **theirs})
    value.backward()
    assert abs(value) < 1e-11 and all(x.grad.abs().max() < 1e-10 for x in ours.values())


class Embeds(torch.nn.Module):
    """A teacher whose embedding is the first numbers of the image."""

    def forward(self, x, return_features=False):
        assert not self.training and not torch.is_grad_enabled()
        return x, types.SimpleNamespace(embedding=x.flatten(1)[:, :4])


def test_class_means_equal_a_loop_and_name_an_empty_class():
    batches = [(normal(9, 3, 2, 2, seed=i).float(), torch.arange(9) % 4) for i in range(3)]
    buffer = torch.empty(9, 3, 2, 2)

    def in_one_buffer():  # as of a million images, no earlier batch can be looked at again
        for images, y in batches:
            yield buffer.copy_(images), y

    means = nd.compute_class_means(Embeds().train(), in_one_buffer(), 4)
    assert means.dtype == torch.float32
    for k in range(4):
        rows = [x.flatten()[:4].double() for images, y in batches for x in images[y == k]]
        assert close(means[k], sum(rows) / len(rows), 1e-6)
    own = nd.compute_class_means(Embeds(), batches, 4, embed=lambda net, x: net(x)[0].flatten(1))
    assert own.shape == (4, 12) and torch.equal(own[:, :4], means)
    with pytest.raises(ValueError, match="class 4"):
        nd.compute_class_means(Embeds(), batches, 5)


@pytest.mark.parametrize("loss", [sp.sp_loss, sp.cc_loss])
def test_scaling_rotating_and_permuting_change_nothing(loss):
    s, t, turn = normal(5, 48), normal(5, 32, seed=1), torch.linalg.qr(normal(48, 48))[0]
    order, reference = torch.tensor([3, 1, 4, 0, 2]), loss(s, t)
    for scale in (1e-25, 1e-8, 1e8, 1e25):
        assert close(loss(scale * s, t), reference) and close(loss(s, scale * t), reference)
        assert close(loss(scale * s.float(), t.float()), reference, 1e-4)
    assert close(loss(s @ turn, t), reference) and close(loss(s[order], t[order]), reference)
    assert not close(loss(s[order], t), reference, 1e-3)  # nor is it blind


@pytest.mark.parametrize("loss", [sp.intra_loss, sp.at_loss])
def test_the_scale_of_each_image_does_not_matter_inside_it(loss):
    s, t = inputs_of("at_loss", 5)
    scales = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6], dtype=torch.float64).view(5, 1, 1, 1)
    assert close(loss(s * scales, t), loss(s, t)) and close(loss(s, t * scales), loss(s, t))


@pytest.mark.parametrize("tau", [-1000.0, 1.0, 100.0, 1000.0])
def test_the_scale_stops_at_ten_without_gradient(tau):
    module = dcd.DCDLoss(4, 5, embed_dim=3, init_tau=tau)
    value = module(normal(6, 4).float(), normal(6, 5, seed=1).float())
    value.backward()
    assert value.isfinite() and module.tau.grad.isfinite()
    assert (module.tau.grad.abs() > 1e-9) == (tau == 1.0)


@pytest.mark.parametrize("batch", [2, 17, 64])
def test_transport_equals_pot(batch):
    import ot  # a second to import, which the other tests need not wait for

    s, t, zs, zt = (normal(batch, width, seed=i) for i, width in enumerate((8, 8, 5, 5)))
    y, n = torch.arange(batch) % 4, np.full(batch, 1 / batch)

    def emd(cost):
        return ot.emd2(np.full(len(cost), 1 / len(cost)), np.full(len(cost), 1 / len(cost)), cost)

    costs, label_costs = ot.dist(s.numpy(), t.numpy()), ot.dist(zs.numpy(), zt.numpy())
    assert close(kd2m.w2_empirical(s, t), emd(costs))
    assert close(kd2m.jw2_empirical(s, t, zs, zt, beta=3.0), emd(costs + 3 * label_costs))
    classes = [(y == label).nonzero().flatten().numpy() for label in y.unique()]
    expected = sum(emd(costs[np.ix_(rows, rows)]) for rows in classes)
    assert close(kd2m.cw2_empirical(s, t, y, "sum"), expected)
    lines = F.normalize(normal(8, 50, seed=9), dim=0).numpy()
    expected = ot.sliced_wasserstein_distance(s.numpy(), t.numpy(), projections=lines) ** 2
    assert close(kd2m.sliced_w2(s, t, 50, seed=9), expected)
    eps = 0.5 * costs.mean()

    def entropic(a, b):
        cost = ot.dist(a.numpy(), b.numpy())
        plan = ot.sinkhorn(n, n, cost, eps, numItermax=5000, stopThr=1e-13)
        return (plan * cost).sum() + eps * (plan * np.log(plan * batch**2)).sum()

    expected = entropic(s, t) - entropic(s, s) / 2 - entropic(t, t) / 2
    assert close(kd2m.sinkhorn(s, t, 0.5, tolerance=1e-12, iterations=5000), expected, 1e-7)


def test_sinkhorn_lies_between_transport_and_the_means():
    s, t = inputs_of("sinkhorn")
    for reg, limit, near in ((0.03, kd2m.w2_empirical, 0.01), (1e4, kd2m.mmd_linear, 1e-3)):
        value = kd2m.sinkhorn(s, t, reg, tolerance=1e-6, iterations=2000)
        assert close(value, limit(s, t), near)
    s, t = normal(64, 16), normal(64, 16, seed=1)
    value, gradient = value_and_gradient(lambda x: kd2m.sinkhorn(x, t), s)  # default tolerance
    to_the_end = lambda x: kd2m.sinkhorn(x, t, tolerance=1e-7, iterations=500)  # noqa: E731
    expected, exact = value_and_gradient(to_the_end, s)
    assert close(value, expected, 1e-3) and (gradient - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["cw2_empirical", "cw2_gaussian", "cw2_gaussian full"])
def test_labels_need_not_be_0_to_k(name):
    s, t, y = inputs_of(name)
    full = {"cov": "full"} if "full" in name else {}
    metric = getattr(kd2m, name.split()[0])
    for reduction in ("mean", "sum", "freq"):
        value = metric(s, t, y, reduction, **full)
        assert close(metric(s, t, 50 + 7 * y, reduction, **full), value)


@pytest.mark.parametrize("name", METRICS)
def test_distant_features_lose_no_digits(name):
    """1e4 away from the origin, where |a|^2 + |b|^2 - 2ab in float32 would be all rounding."""
    inputs = LOSSES[name].make(6, 3, 0)
    labels = {k: inputs.pop(k) for k in list(inputs) if k == "labels"}
    far = {k: (x + 1e4 * k.endswith("_emb")).float() for k, x in inputs.items()}
    near = {k: x.double() - 1e4 * k.endswith("_emb") for k, x in far.items()}
    by_means = name in ("w2_gaussian", "cw2_gaussian", "mmd_linear", "kl_gaussian", "hellinger")
    tolerance = 5e-3 if by_means else 1e-5  # the mean itself is rounded to 1e-3
    assert close(evaluated(name, far | labels), evaluated(name, near | labels), tolerance)


@pytest.mark.parametrize("name", ["w2_gaussian", "cw2_gaussian"])
def test_full_covariance_in_float32_with_fewer_samples_than_dimensions(name):
    """As in training: 64 samples, 100 dimensions with rectified zeros, three of them dead."""
    s, t = normal(64, 100).float().relu(), normal(64, 100, seed=1).float().relu()
    s[:, :3] = 0
    labels = [torch.arange(64) % 40] if name == "cw2_gaussian" else []
    metric = lambda s, t: getattr(kd2m, name)(s, t, *labels, cov="full")  # noqa: E731
    value, gradient = value_and_gradient(lambda x: metric(x, t), s)
    exact, expected = value_and_gradient(lambda x: metric(x, t.double()), s.double())
    assert value.dtype == gradient.dtype == torch.float32 and close(value, exact, 1e-6)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"cov": "full"}])
def test_a_collapsed_student_is_pulled_by_the_means_alone(options):
    t = normal(6, 4)
    s = torch.full_like(t, 0.7)
    gradient = value_and_gradient(lambda x: kd2m.w2_gaussian(x, t, **options), s)[1]
    assert close(gradient, 2 / 6 * (s.mean(0) - t.mean(0)).expand(6, -1))


def test_gromov_is_the_cost_of_an_assignment_that_no_step_improves():
    optimal = 0
    for seed in range(10):
        s, t = normal(5, 2, seed=seed), normal(5, 4, seed=seed + 100)
        costs = gromov_costs(s.tolist(), t.tolist())
        within_s, within_t = (((x[:, None] - x) ** 2).sum(2) for x in (s, t))
        for start in ("profile", "identity"):
            value = kd2m.gromov_w2(s, t, start).item()
            p = min(costs, key=lambda p: abs(costs[p] - value))  # noqa: B023
            assert math.isclose(costs[p], value, rel_tol=1e-10)
            step = linear_sum_assignment(-(within_s @ within_t[torch.tensor(p)]).numpy())[1]
            assert costs[tuple(step.tolist())] >= value - 1e-9
            optimal += math.isclose(min(costs.values()), value, rel_tol=1e-10)
        assert value <= costs[0, 1, 2, 3, 4] + 1e-9  # "identity" is never left upwards
    assert 0 < optimal < 20  # an upper bound: often reached, not always


def test_wrong_use_is_refused():
    s, t, y = inputs_of("cw2_gaussian")
    nan = torch.full_like(s, math.nan)
    for wrong in (
        lambda: kd2m.kl_gaussian(s[:1], t[:1]),  # one image has no variance
        lambda: kd2m.hellinger(s[:1], t[:1]),
        lambda: kd2m.w2_empirical(nan, t),  # no assignment
        lambda: kd2m.cw2_empirical(nan, t, y),
        lambda: kd2m.gromov_w2(s, nan),
        lambda: kd2m.cw2_empirical(s, t, y, "none"),
        lambda: kd2m.cw2_gaussian(s, t, y, "none"),
        lambda: kd2m.cw2_gaussian(s, t, y, cov="none"),
        lambda: kd2m.w2_gaussian(s, t, "none"),
        lambda: kd2m.kl_gaussian(s, t, "none"),
        lambda: kd2m.gromov_w2(s, t, "none"),
    ):
        with pytest.raises((ValueError, KeyError)):
            wrong()
    for name in ("kd_loss", "dkd_loss", "dist_loss"):
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError):
                getattr(nd, name)(*inputs_of(name), temperature=temperature)
