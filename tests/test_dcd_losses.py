"""The losses of dcd.py against an independent oracle: a literal loop in double precision.

The oracles work on lists of numbers (0-dim float64 tensors, so that autograd gives their gradient
too) and share no line with dcd.py.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import dcd

B, DS, DT = 6, 4, 5


def embeddings(seed=0, batch=B, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, d, generator=g, dtype=torch.float64).to(dtype) for d in (DS, DT)]


def loss_module(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return dcd.DCDLoss(DS, DT, embed_dim=3, **options).to(dtype)


# --- oracle: equations as loops ------------------------------------------------------------------


def linear(layer, x):
    rows = []
    for weights, bias in zip(layer.weight, layer.bias):
        total = bias
        for w, value in zip(weights, x):
            total = total + w * value
        rows.append(total)
    return rows


def unit(v):
    length = torch.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def softmax(values):
    exps = [torch.exp(v) for v in values]
    return [e / sum(exps) for e in exps]


def oracle_terms(rows):
    """contrastive and consistency of a matrix given as a list of rows."""
    n = len(rows)
    p = [softmax(row) for row in rows]  # over teachers
    q = [softmax([rows[k][i] for k in range(n)]) for i in range(n)]  # over students
    contrastive = -sum(torch.log(p[i][i]) for i in range(n)) / n
    consistency = 0.0
    for i in range(n):
        for j in range(n):
            consistency = consistency + q[i][j] * (torch.log(q[i][j]) - torch.log(p[i][j]))
    return contrastive, consistency / n


def oracle(module, student, teacher, bias=0.0):
    s = [unit(linear(module.student_head, x)) for x in student]
    t = [unit(linear(module.teacher_head, x)) for x in teacher]
    scale = torch.exp(module.tau)
    scale = scale if float(scale.detach()) < 10 else torch.tensor(10.0, dtype=torch.float64)
    rows = [[scale * sum(x * y for x, y in zip(a, b)) + bias for b in t] for a in s]
    contrastive, consistency = oracle_terms(rows)
    return contrastive + 0.5 * consistency


def value_and_gradients(loss, module, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    wanted = [student, *module.parameters()]
    gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients)
    ]


@pytest.mark.parametrize("tau", [1.0, -2.0, 2.2, 3.0])
@pytest.mark.parametrize("batch", [2, B])
def test_value_and_every_gradient_equal_the_oracle(tau, batch):
    for seed in range(2):
        module = loss_module(seed, init_tau=tau)
        data = embeddings(seed, batch)
        value, gradients = value_and_gradients(module, module, *data)
        expected, wanted = value_and_gradients(
            lambda s, t, m=module: oracle(m, s, t), module, *data
        )
        assert value.shape == () and torch.allclose(value, expected, rtol=1e-11)
        for gradient, right in zip(gradients, wanted, strict=True):
            assert torch.allclose(gradient, right, rtol=1e-8, atol=1e-13)
        assert gradients[0].abs().max() > 1e-5
        names = ["student", *(name for name, _ in module.named_parameters())]
        moving = {name for name, g in zip(names, gradients) if g.abs().max() > 1e-9}
        heads = {f"{h}_head.{p}" for h in ("student", "teacher") for p in ("weight", "bias")}
        assert moving == {"student"} | heads | ({"tau"} if tau < math.log(10) else set())


@pytest.mark.parametrize("which", [0, 1])
def test_each_term_equals_its_loop(which):
    g = torch.Generator().manual_seed(3)
    matrix = (3 * torch.randn(5, 5, generator=g, dtype=torch.float64)).requires_grad_()
    value = (dcd.contrastive_loss, dcd.consistency_loss)[which](matrix)
    expected = oracle_terms([list(row) for row in matrix])[which]
    assert torch.allclose(value, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(v, matrix)[0] for v in (value, expected)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-14) and gradients[0].abs().max() > 1e-3
    options = dict(terms=("contrastive", "consistency")[which])
    module, data = loss_module(**options), embeddings()
    rows = [list(row) for row in module.similarity(*data)]
    assert torch.allclose(module(*data), oracle_terms(rows)[which], rtol=1e-11)


def test_alpha_and_the_largest_scale_are_used():
    s, t = embeddings()
    module = loss_module(alpha=3.0, max_scale=4.0, init_tau=9.0)
    similarity = module.similarity(s, t)
    parts = dcd.contrastive_loss(similarity), dcd.consistency_loss(similarity)
    assert torch.allclose(module(s, t), parts[0] + 3 * parts[1], rtol=1e-12)
    assert math.isclose(module.scale().item(), 4, rel_tol=1e-6)


def test_a_short_vector_has_a_direction():
    short = torch.tensor([[3e-6, 4e-6], [0.0, 1e-8]])
    assert torch.allclose(dcd._unit(short), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_gradcheck():
    module, (student, teacher) = loss_module(), embeddings()
    parameters = list(module.parameters())

    def loss(student, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (student, teacher))

    names = [name for name, _ in module.named_parameters()]
    assert gradcheck(loss, (student.requires_grad_(), *parameters))


def test_consistency_is_zero_for_a_symmetric_matrix_and_only_for_one():
    g = torch.Generator().manual_seed(0)
    matrix = 4 * torch.randn(8, 8, generator=g, dtype=torch.float64)
    symmetric = (matrix + matrix.T).requires_grad_()
    value = dcd.consistency_loss(symmetric)
    assert abs(value) < 1e-14 and torch.autograd.grad(value, symmetric)[0].abs().max() < 1e-14
    assert dcd.consistency_loss(matrix) > 0.1
    # its direction: the columns' distribution comes first in the KL
    assert not torch.allclose(dcd.consistency_loss(matrix), dcd.consistency_loss(matrix.T))


def test_a_bias_would_have_no_gradient():
    """The paper's trained offset cancels in every softmax: why there is none here."""
    module, data = loss_module(), embeddings()
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    matrix = module.similarity(*data).detach() + bias
    value = dcd.contrastive_loss(matrix) + 0.5 * dcd.consistency_loss(matrix)
    assert abs(torch.autograd.grad(value, bias)[0]) < 1e-15
    assert torch.allclose(oracle(module, *data, bias=37.5), oracle(module, *data), rtol=1e-12)
    parameters = {name for name, _ in module.named_parameters()}
    heads = {f"{h}_head.{p}" for h in ("student", "teacher") for p in ("weight", "bias")}
    assert parameters == heads | {"tau"}


def test_the_scale_saturates_at_ten_without_gradient():
    for tau, scale, moves in ((1.0, math.e, True), (2.30, math.exp(2.30), True), (2.31, 10, False),
                              (100.0, 10, False), (1000.0, 10, False)):  # fmt: skip
        module = loss_module(init_tau=tau)
        assert math.isclose(module.scale().detach(), scale, rel_tol=1e-6)
        module(*embeddings()).backward()
        assert torch.isfinite(module.tau.grad) and (module.tau.grad != 0) == moves


def test_fixed_scale_divides_by_the_temperature():
    module, data = loss_module(temperature=0.07), embeddings()
    cosine = module.similarity(*data) * 0.07
    s, t = module.student_head(data[0]), module.teacher_head(data[1])
    assert torch.allclose(cosine, F.cosine_similarity(s[:, None], t[None], dim=2), rtol=1e-10)
    module(*data).backward()
    assert module.tau.grad is None and module.student_head.weight.grad.abs().max() > 0


def test_a_cast_module_takes_any_input():
    data = embeddings()
    wanted = loss_module()(*data)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for inputs in (torch.float64, torch.float32, torch.bfloat16):
            value = loss_module(dtype=dtype)(*(x.to(inputs) for x in data))
            assert value.dtype in (torch.float32, torch.float64)
            assert torch.allclose(value.double(), wanted, rtol=0.1)


def test_wrong_use_is_refused():
    student, teacher = embeddings()
    tokens = student[:, None].expand(-1, len(student), -1)
    for s, t in (
        (student, teacher[:1]),
        (student, teacher[0]),
        (tokens, teacher),
        (tokens, tokens),
    ):
        with pytest.raises(ValueError, match=r"needs \[B,D\] of both"):
            loss_module()(s, t)
    with pytest.raises(ValueError, match="choose both"):
        loss_module(terms="contrast")


def test_a_teacher_under_inference_mode():
    module = loss_module().float()
    student, teacher = (x.float() for x in embeddings())
    with torch.inference_mode():
        teacher = teacher + 0
    module(student, teacher).backward()
    assert teacher.is_inference() and module.teacher_head.weight.grad.abs().sum() > 0


def test_the_largest_scale_is_a_number_whatever_the_default_device():
    with torch.device("meta"):
        assert dcd.DCDLoss(4, 4).max_tau == pytest.approx(math.log(10))


def test_known_values():
    """About log n for random features at a small scale; near its floor when aligned."""
    torch.manual_seed(0)
    module = dcd.DCDLoss(64, 64, init_tau=-3.0)
    value = module(torch.randn(64, 64), torch.randn(64, 64))
    assert abs(value - math.log(64)) < 0.02
    aligned = 10 * torch.eye(64, dtype=torch.float64)
    assert math.isclose(dcd.contrastive_loss(aligned), 0.0029, abs_tol=5e-5)
    chance = torch.zeros(64, 64, dtype=torch.float64)
    assert math.isclose(dcd.contrastive_loss(chance), math.log(64), rel_tol=1e-12)
    assert math.isclose(dcd.contrastive_loss(math.e * aligned / 10), 1.64, abs_tol=0.01)


def test_extra_parameters_are_those_of_the_paper():
    """128 (d_s + d_t) + 256 and tau; the paper counts one more, its bias."""
    for widths, count in (((256, 256), 65_794), ((64, 64), 16_642), ((1280, 2048), 426_242)):
        module = dcd.DCDLoss(*widths)
        assert sum(p.numel() for p in module.parameters()) == count - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    module, data = loss_module(dtype=torch.float32), embeddings(dtype=dtype)
    value, gradients = value_and_gradients(module, module, *data)
    exact = loss_module().double()
    exact.load_state_dict(module.state_dict())
    expected, wanted = value_and_gradients(exact, exact, *(x.double() for x in data))
    assert value.dtype == torch.float32 and torch.allclose(value.double(), expected, rtol=1e-5)
    for gradient, right in zip(gradients, wanted):
        largest = right.abs().max()
        assert (gradient.double() - right).abs().max() <= 1e-2 * largest


def test_inside_autocast_it_stays_in_float32():
    module, data = loss_module(dtype=torch.float32), embeddings(dtype=torch.float32)
    value, gradients = value_and_gradients(module, module, *data)
    data[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(*data)
    assert torch.equal(inside, value)
    inside = torch.autograd.grad(inside, [data[0], *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(inside, gradients))


def test_no_gradient_reaches_the_teachers_embedding():
    module, data = loss_module(), [x.requires_grad_() for x in embeddings()]
    module(*data).backward()
    assert data[0].grad.abs().sum() > 0 and data[1].grad is None


@pytest.mark.parametrize("terms", ["both", "contrastive", "consistency"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1e-4}, {"init_tau": 1000.0}])
def test_extreme_inputs_stay_finite(options, terms):
    ones, sign = torch.ones(4, 1), torch.tensor([[1.0], [-1], [1], [-1]])
    for dtype in (torch.float32, torch.bfloat16):
        module = loss_module(dtype=torch.float32, terms=terms, **options)
        for s in (0.0, 1e4, -1e4, 1e-30):
            for t in (0.0, 1e4, 1e-30):
                student = (s * sign.expand(4, DS)).to(dtype).requires_grad_()
                value = module(student, (t * ones.expand(4, DT)).to(dtype))
                value.backward()
                assert torch.isfinite(value) and torch.isfinite(student.grad).all()
                for p in module.parameters():
                    assert p.grad is None or torch.isfinite(p.grad).all()
    # heads that map everything to zero: no direction, no gradient, no nan
    module = loss_module(terms=terms)
    with torch.no_grad():
        for p in (*module.student_head.parameters(), *module.teacher_head.parameters()):
            p.zero_()
    value, gradients = value_and_gradients(module, module, *embeddings())
    assert math.isclose(value, 0 if terms == "consistency" else math.log(B), abs_tol=1e-12)
    assert all((g == 0).all() for g in gradients)


def test_the_block_runs_alone():
    """Pasted into a file with only torch in scope, the block defines every loss and computes."""
    block = re.search(r"# --- copy from here.*?# --- to here", Path(dcd.__file__).read_text(), re.S)
    scope = {"torch": torch, "F": F}
    exec(block.group(), scope)
    data = embeddings()
    torch.manual_seed(0)
    module = scope["DCDLoss"](DS, DT, embed_dim=3).double()
    assert module(*data) == loss_module()(*data)
    assert scope["kd_loss"](data[0], data[1][:, :DS]) == dcd.kd_loss(data[0], data[1][:, :DS])
