"""Each loss of sp.py against an independent oracle: a literal loop in double precision.

The oracles work on lists of numbers (0-dim float64 tensors, so that autograd gives their gradient
too) and share no line with sp.py.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import sp


def maps(seed=0, batch=5, student=(3, 4, 4), teacher=(2, 4, 4), dtype=torch.float64):
    """Of a student and of a teacher; of both signs, as in a WRN."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, *shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in (student, teacher)
    ]


# --- oracles: equations as loops -----------------------------------------------------------------


def dot(a, b):
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b):
        total = total + x * y
    return total


def unit(row):
    length = torch.sqrt(dot(row, row))
    return [x / length for x in row]


def rows_of_gram(vectors):
    return [unit([dot(a, b) for b in vectors]) for a in vectors]


def mean_square(a, b):
    """(1 / N^2) sum_ij (a_ij - b_ij)^2 of two N x N matrices."""
    total = 0.0
    for row_a, row_b in zip(a, b, strict=True):
        for x, y in zip(row_a, row_b, strict=True):
            total = total + (x - y) ** 2
    return total / len(a) ** 2


def oracle_sp(s, t):
    return mean_square(*(rows_of_gram([list(x.reshape(-1)) for x in m]) for m in (s, t)))


def oracle_cc(s, t):
    def kernel(m):
        x = [unit(list(row.reshape(-1))) for row in m]
        rows = []
        for a in x:
            row = []
            for b in x:
                u = 2 * 0.4 * dot(a, b)  # exp(-0.4 |a - b|^2) = exp(-0.8) exp(u)
                row.append(math.exp(-0.8) * (1 + u + u * u / 2))
            rows.append(row)
        return rows

    return mean_square(kernel(s), kernel(t))


def shrink(image, height, width):
    """Average one image [C,H,W], H a multiple of height; -> nested lists [C][h][w]."""
    c, h, w = image.shape
    fy, fx = h // height, w // width
    result = []
    for k in range(c):
        plane = []
        for y in range(height):
            line = []
            for x in range(width):
                total = 0.0
                for dy in range(fy):
                    for dx in range(fx):
                        total = total + image[k, y * fy + dy, x * fx + dx]
                line.append(total / (fy * fx))
            plane.append(line)
        result.append(plane)
    return result


def smaller(s, t):
    return min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])


def oracle_intra(s, t):
    height, width = smaller(s, t)
    total = 0.0
    for i in range(len(s)):
        grams = []
        for image in (s[i], t[i]):
            planes = shrink(image, height, width)
            places = [[p[y][x] for p in planes] for y in range(height) for x in range(width)]
            grams.append(rows_of_gram(places))
        total = total + mean_square(*grams)
    return total / len(s)


def oracle_at(s, t):
    height, width = smaller(s, t)
    total = 0.0
    for i in range(len(s)):
        attention = []
        for image in (s[i], t[i]):
            planes = shrink(image, height, width)
            energy = [
                sum(p[y][x] ** 2 for p in planes) / len(planes)
                for y in range(height)
                for x in range(width)
            ]
            attention.append(unit(energy))
        total = total + sum((a - b) ** 2 for a, b in zip(*attention))
    return total / (len(s) * height * width)


LOSSES = {
    "sp": (sp.sp_loss, oracle_sp),
    "cc": (sp.cc_loss, oracle_cc),
    "intra": (sp.intra_loss, oracle_intra),
    "at": (sp.at_loss, oracle_at),
}
SHAPES = [((3, 4, 4), (2, 4, 4)), ((3, 4, 4), (2, 2, 2)), ((2, 2, 2), (4, 4, 4))]


def value_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_oracle(name, shapes):
    loss, oracle = LOSSES[name]
    for seed, batch in ((0, 5), (1, 2)):
        s, t = maps(seed, batch, *shapes)
        value, gradient = value_and_gradient(loss, s, t)
        expected, expected_gradient = value_and_gradient(oracle, s, t)
        assert value.shape == () and value > 1e-6
        assert torch.allclose(value, expected, rtol=1e-11, atol=1e-15)
        assert torch.allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-13)
        assert gradient.abs().max() > 1e-5  # a comparison of zeros would show nothing


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    s, t = maps(3, 4, (2, 2, 2), (3, 2, 2))
    assert gradcheck(lambda x: LOSSES[name][0](x, t), (s.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_inputs_are_computed_in_float32(name, dtype):
    loss, oracle = LOSSES[name]
    s, t = maps(2, dtype=dtype)
    value, gradient = value_and_gradient(loss, s, t)
    expected, expected_gradient = value_and_gradient(oracle, s.double(), t.double())
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), expected, rtol=1e-4, atol=1e-8)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2  # the gradient itself is rounded to bf16
    largest = expected_gradient.abs().max()
    assert (gradient.double() - expected_gradient).abs().max() < tolerance * largest


@pytest.mark.parametrize("name", LOSSES)
def test_inside_autocast_the_products_stay_in_float32(name):
    s, t = maps(2, dtype=torch.float32)
    value, gradient = value_and_gradient(LOSSES[name][0], s, t)
    s.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name][0](s, t)
    assert torch.equal(inside, value) and torch.equal(torch.autograd.grad(inside, s)[0], gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher_and_a_perfect_student_has_none(name):
    s, t = (x.requires_grad_() for x in maps())
    LOSSES[name][0](s, t).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    value, gradient = value_and_gradient(LOSSES[name][0], t.detach(), t)
    assert value == 0 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["sp", "cc"])
def test_scaling_rotating_and_permuting_change_nothing(name):
    loss = LOSSES[name][0]
    s, t = (x.flatten(1) for x in maps())
    g = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=g, dtype=torch.float64))[0]
    order = torch.randperm(5, generator=g)
    reference = loss(s, t)
    for scale in (1e-25, 1e-8, 1e8, 1e25):
        assert torch.allclose(loss(scale * s, t), reference, rtol=1e-9)
        assert torch.allclose(loss(s, scale * t), reference, rtol=1e-9)
    assert torch.allclose(loss(s @ rotation, t), reference, rtol=1e-9)
    assert torch.allclose(loss(s[order], t[order]), reference, rtol=1e-9)
    assert not torch.allclose(loss(s[order], t), reference, rtol=1e-3)  # nor is it blind


@pytest.mark.parametrize("name", ["intra", "at"])
def test_scale_of_each_image_does_not_matter_inside_it(name):
    s, t = maps()
    scales = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6], dtype=torch.float64).view(5, 1, 1, 1)
    for x, y in ((s * scales, t), (s, t * scales)):
        assert torch.allclose(LOSSES[name][0](x, y), LOSSES[name][0](s, t), rtol=1e-9)


def test_sp_is_at_most_two_over_the_batch_for_features_without_signs():
    for batch in (2, 3, 8, 64):
        for seed in range(20):
            s, t = (x.relu() for x in maps(seed, batch, (1, 2, 2), (1, 2, 2)))
            assert 0 <= sp.sp_loss(s, t) <= 2 / batch
    # two images that one network tells apart and the other does not
    apart = torch.eye(2, dtype=torch.float64)
    all_alike = torch.ones(2, 2, dtype=torch.float64)
    assert math.isclose(sp.sp_loss(apart, all_alike), 2 * (2 - math.sqrt(2)) / 4)
    # but: a bright image that looks like all others hides them in one network alone
    bright = torch.tensor([[1e6, 1e6], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert sp.sp_loss(bright, torch.eye(3, dtype=torch.float64)) > 0.9 * 4 / 9


def test_a_faint_image_counts_as_the_equation_says():
    """Far below the others of its batch, and orthogonal to them: still a row of length 1."""
    for faint in (1e-3, 1e-5, 1e-12):
        s, t = torch.eye(4, dtype=torch.float64), maps(batch=4)[1].flatten(1)
        s[2] *= faint
        assert torch.allclose(sp.sp_loss(s, t), oracle_sp(s, t), rtol=1e-9)
        inside, other = torch.eye(4, dtype=torch.float64), torch.ones(1, 3, 2, 2).double()
        inside[2] *= faint
        inside = inside.T.reshape(1, 4, 2, 2)  # four places of four channels
        assert torch.allclose(sp.intra_loss(inside, other), oracle_intra(inside, other), rtol=1e-9)


@pytest.mark.parametrize("order", [1, 3])
def test_the_order_of_the_series(order):
    s, t = maps()
    kernels = []
    for x in (s, t):
        rows = torch.stack([r / r.norm() for r in x.flatten(1)])
        products = [[float(a @ b) for b in rows] for a in rows]
        exponent = 0.8 * torch.tensor(products, dtype=torch.float64)
        series = sum(exponent**p / math.factorial(p) for p in range(order + 1))
        kernels.append(math.exp(-0.8) * series)
    wanted = (kernels[0] - kernels[1]).square().mean()
    assert torch.allclose(sp.cc_loss(s, t, gamma=0.4, order=order), wanted, rtol=1e-12)


def test_sp_uses_the_l2_norm_of_rows_of_the_raw_product():
    """Not L1, not cosines: two images, worked out by hand."""
    student = torch.tensor([[3.0, 0.0], [3.0, 4.0]], dtype=torch.float64)  # gram 9 9 / 9 25
    teacher = torch.eye(2, dtype=torch.float64)
    root = math.sqrt(81 + 625)
    expected = 2 * (1 - math.sqrt(0.5)) + (9 / root) ** 2 + (1 - 25 / root) ** 2
    assert math.isclose(sp.sp_loss(student, teacher), expected / 4, rel_tol=1e-12)


def test_the_weights_pull_falls_with_the_batch():
    """What the docstring says: on random non-negative features the value is about 1 / B."""
    values = []
    for batch in (32, 64, 128):
        pairs = [maps(seed, batch, (8, 2, 2), (8, 2, 2)) for seed in range(5)]
        values.append(sum(sp.sp_loss(s.relu(), t.relu()).item() for s, t in pairs))
    assert 1.7 < values[0] / values[1] < 2.3 and 1.7 < values[1] / values[2] < 2.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_inputs_stay_finite(name, dtype):
    ones = torch.ones(4, 2, 2, 2)
    sign = torch.where(torch.arange(32).view(4, 2, 2, 2) % 3 == 0, -1.0, 1.0)
    one_dead = sign * torch.tensor([0.0, 1, 1, 1]).view(4, 1, 1, 1)
    dead_unit = sign * torch.tensor([0.0, 1]).view(1, 2, 1, 1)
    hostile = [0 * ones, ones, 1e4 * sign, -1e4 * ones, 1e-12 * sign, one_dead, dead_unit]
    for s in hostile:
        for t in hostile:
            value, gradient = value_and_gradient(LOSSES[name][0], s.to(dtype), t.to(dtype))
            assert torch.isfinite(value) and torch.isfinite(gradient).all()
            assert 0 <= value < 3
            # of a scale-free loss it is of the order 1 / |features|
            assert gradient.abs().max() <= 100 / max(s.abs().max(), 1e-12)


def test_a_dead_image_has_a_zero_row_and_no_gradient():
    s, t = maps()
    s[2] = 0
    value, gradient = value_and_gradient(sp.sp_loss, s, t)
    g_s = F.normalize(s.flatten(1) @ s.flatten(1).T, dim=1)
    g_t = F.normalize(t.flatten(1) @ t.flatten(1).T, dim=1)
    assert (g_s[2] == 0).all() and math.isclose(value, (g_s - g_t).square().mean(), rel_tol=1e-9)
    assert torch.isfinite(gradient).all() and gradient[[0, 1, 3, 4]].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_tiny_and_huge_features_in_float32(name):
    s, t = maps(dtype=torch.float32)
    value, gradient = value_and_gradient(LOSSES[name][0], s, t)
    for scale in (1e-25, 1e-12, 1e12, 1e25):
        scaled = value_and_gradient(LOSSES[name][0], scale * s, t)
        assert torch.allclose(scaled[0], value, rtol=1e-4)
        assert torch.allclose(scaled[1].double() * scale, gradient.double(), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_another_batch_is_refused(name):
    s, t = maps()
    with pytest.raises(ValueError, match="a batch of 5 of the student, 1 of the teacher"):
        LOSSES[name][0](s, t[:1])


@pytest.mark.parametrize("name", ["intra", "at"])
def test_maps_without_places_are_refused(name):
    s, t = maps()
    for change in (lambda x: x.flatten(2), lambda x: x[:, :, 0, 0]):
        with pytest.raises(ValueError, match="must be .B,C,H,W."):
            LOSSES[name][0](change(s), change(t))


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_under_inference_mode(name):
    s, t = maps()
    with torch.inference_mode():
        t = t.float() + 0
    s = s.float().requires_grad_()
    LOSSES[name][0](s, t).backward()
    assert t.is_inference() and s.grad.abs().sum() > 0


def test_the_block_runs_alone():
    """Pasted into a file with only torch in scope, the block defines every loss and computes."""
    block = re.search(r"# --- copy from here.*?# --- to here", Path(sp.__file__).read_text(), re.S)
    scope = {"torch": torch, "F": F}
    exec(block.group(), scope)
    s, t = maps()
    for name in ("sp_loss", "cc_loss", "intra_loss", "at_loss"):
        assert scope[name](s, t) == getattr(sp, name)(s, t)
    assert scope["kd_loss"](s[:, 0, 0], t[:, 0, 0]) == sp.kd_loss(s[:, 0, 0], t[:, 0, 0])
