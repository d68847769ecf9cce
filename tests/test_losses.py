"""One contract for all losses: each against its oracle, on hostile inputs, and lifted out alone."""

import ast
import contextlib
import functools
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import LOSSES, gradients, is_teachers, value
from scipy.optimize import linear_sum_assignment

ROOT = Path(__file__).parent.parent
SCRIPTS = ("nd", "sp", "dcd", "kd2m", "detect_nd")
VARIANTS = [(n, s, k) for n, c in LOSSES.items() for s in c.seeds for k in range(len(c.options))]
PLACES = [(script, name) for name, case in LOSSES.items() for script in case.scripts.split()]
WITH_LABELS = [name for name, case in LOSSES.items() if "labels" in case.shapes]


def the_loss(name, script=None):
    module = importlib.import_module(script or LOSSES[name].scripts.split()[0])
    return getattr(module, name.split()[0])


@functools.cache
def expected(name, seed, number):
    """The inputs, and the oracle's value and gradients."""
    case = LOSSES[name]
    inputs, options = case.make(case.batch, 4, seed), case.options[number]
    return inputs, value(case, inputs, options), gradients(case, inputs, options)


def cast(inputs, dtype):
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}


def value_and_gradients(name, loss, inputs, options, autocast=False):
    """Gradients of all inputs that have one; every input of floats asks for it."""
    inputs = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        result = LOSSES[name].call(loss, inputs, options)
    result.backward()
    return result.detach(), {k: x.grad for k, x in inputs.items() if x.grad is not None}


def assert_equal_to_oracle(name, loss, seed, number, dtype, tolerance):
    inputs, wanted, slopes = expected(name, seed, number)
    options = LOSSES[name].options[number]
    result, found = value_and_gradients(name, loss, cast(inputs, dtype), options)
    rough = 1e-7 if LOSSES[name].rough else 0.0
    assert result.shape == () and result.dtype == dtype
    assert abs(result.item() - wanted) <= (tolerance + rough) * (abs(wanted) + 0.01)
    assert set(found) <= set(slopes)  # no other: none reaches the teacher
    for key, slope in slopes.items():  # tau has none where a temperature is given
        error = (found.get(key, torch.zeros(())).double() - slope).abs().max()
        assert error <= (100 * tolerance + 2e-6 + 1e3 * rough) * slope.abs().max() + 1e-9, key
    assert max(slope.abs().max() for slope in slopes.values()) > 1e-4  # zeros would show nothing


@pytest.mark.parametrize("name, seed, number", VARIANTS)
def test_value_and_gradient_equal_the_oracle(name, seed, number):
    assert_equal_to_oracle(name, the_loss(name), seed, number, torch.float64, 1e-11)
    single = 1e-2 if LOSSES[name].options[number].get("temperature") == 3000 else 2e-5
    assert_equal_to_oracle(name, the_loss(name), seed, number, torch.float32, single)


CHANGES = {
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.7),
    "huge": lambda x: 1e4 * x,
    "opposite": lambda x: -1e4 * x.sign(),
    "tiny": lambda x: 1e-20 * x,
    "short": lambda x: 1e-8 * x,
    "one number": lambda x: x * (torch.arange(x.numel()).reshape(x.shape) == 1),
    "rectified": lambda x: x.relu(),
}


def hostile_inputs(name, batch, classes, changes=CHANGES):
    """Each change of the student's inputs, the teacher's, both, and all, trained parameters too."""
    ordinary = LOSSES[name].make(max(batch, LOSSES[name].least), classes, 0)
    theirs = {k for k in ordinary if is_teachers(k)}
    floats = {k for k, x in ordinary.items() if x.is_floating_point()}
    ours = {k for k in floats - theirs if "." not in k and k != "tau"}
    for change in changes:
        for keys in {frozenset(x) for x in (ours, theirs, ours | theirs, floats) if x}:
            yield {k: CHANGES[change](x) if k in keys else x for k, x in ordinary.items()}


@pytest.mark.parametrize("batch, classes", [(4, 2), (1, 3)])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_inputs_give_finite_values_and_gradients(name, batch, classes):
    for inputs in hostile_inputs(name, batch, classes):
        for options in LOSSES[name].options:
            options = {} if "tolerance" in options else options
            inputs = cast(inputs, torch.float32)
            result, found = value_and_gradients(name, the_loss(name), inputs, options)
            assert result.isfinite() and all(x.isfinite().all() for x in found.values())


BY_LENGTH = ("nd_loss", "direction_loss", "norm_loss")  # below 1e-7 a vector counts as zero
EXACT = ("kd_loss", "dkd_loss", "dist_loss", "sp_loss", "cc_loss", "at_loss", "hcl_loss", "mse")
EXACT += ("w2_empirical", "w2_gaussian", "kl_gaussian", "mmd_linear", "hellinger")


@pytest.mark.parametrize("name", [*BY_LENGTH, *EXACT])
def test_extreme_inputs_give_the_oracles_value(name):
    """What zeros or certainty count is part of the definition; and a zero has no steep slope."""
    changes = [c for c in CHANGES if name not in BY_LENGTH or c not in ("tiny", "short")]
    for inputs in hostile_inputs(name, 4, 3, changes):
        result, found = value_and_gradients(name, the_loss(name), inputs, {})
        wanted = value(LOSSES[name], inputs, {})
        assert abs(result.item() - wanted) <= 1e-9 * abs(wanted) + 1e-12
    if name in BY_LENGTH or "map" in str(LOSSES[name].shapes):
        for inputs in hostile_inputs(name, 4, 3, ("zero", "one number")):
            _, found = value_and_gradients(name, the_loss(name), cast(inputs, torch.float32), {})
            assert all(x.abs().max() < 1e3 for x in found.values())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ReviewKD"])
def test_autocast_changes_nothing(name):
    """Pasted into somebody's autocast region, a loss of float32 inputs keeps its precision.
    (ReviewKD is a network, to be run under autocast.)"""
    inputs, options = cast(expected(name, 0, 0)[0], torch.float32), LOSSES[name].options[0]
    outside = value_and_gradients(name, the_loss(name), inputs, options)
    inside = value_and_gradients(name, the_loss(name), inputs, options, autocast=True)
    assert inside[0].dtype == torch.float32 and torch.equal(outside[0], inside[0])
    assert all(torch.equal(slope, inside[1][key]) for key, slope in outside[1].items())


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_under_inference_mode(name):
    """Tensors that autograd must not save: what is trained on them has to copy them."""
    inputs, wanted, _ = expected(name, 0, 0)
    with torch.inference_mode():
        theirs = {k: x + 0 for k, x in inputs.items() if is_teachers(k)}
    ours = {k: x.clone() for k, x in inputs.items() if k not in theirs}
    for x in ours.values():
        x.requires_grad_(x.is_floating_point())
    options = LOSSES[name].options[0]
    result = LOSSES[name].call(the_loss(name), {**inputs, **theirs, **ours}, options)
    result.backward()
    assert abs(result.item() - wanted) <= 1e-6 * abs(wanted)


def wrong_shapes(name):
    """Inputs that PyTorch would broadcast, or reduce over the wrong dimension."""
    inputs = LOSSES[name].make(LOSSES[name].batch, 4, 0)
    for key in [k for k in inputs if k.startswith("teacher_") and "head" not in k]:
        yield "one row of the teacher", {**inputs, key: inputs[key][:1]}
        if not LOSSES[name].widths and inputs[key].shape[1] > 1:
            yield "one column of the teacher", {**inputs, key: inputs[key][:, :1]}
    logits = {k: x for k, x in inputs.items() if k.endswith("_logits")}
    if logits:
        yield "logits of one image", {**inputs, **{k: x[0] for k, x in logits.items()}}
        for tail in ((3,), (2, 2)):
            spread = {k: x.view(*x.shape, *[1] * len(tail)).expand(*x.shape, *tail)
                      for k, x in logits.items()}  # fmt: skip
            yield "logits at several positions", {**inputs, **spread}
    if "labels" in inputs:
        yield "a column of labels", {**inputs, "labels": inputs["labels"][:, None]}
        yield "one label", {**inputs, "labels": inputs["labels"][:1]}
    if "class_means" in inputs:
        yield "a column of means", {**inputs, "class_means": inputs["class_means"][:, :1]}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ReviewKD"])
def test_shapes_that_would_broadcast_are_refused(name):
    for what, inputs in wrong_shapes(name):
        by_torch = (IndexError, RuntimeError) if "label" in what else ()
        with pytest.raises((ValueError, *by_torch)):
            LOSSES[name].call(the_loss(name), inputs, LOSSES[name].options[0])
            print(f"accepted: {what}")


def test_maps_must_come_in_pairs():
    maps, module = [torch.randn(2, 4, 4, 4)], the_loss("ReviewKD")([4, 4], [4, 4], 2)
    for ours, theirs in ((maps, 2 * maps), (2 * maps, maps), (3 * maps, 3 * maps)):
        with pytest.raises(ValueError):
            module(ours, theirs)
    for theirs in ([], 2 * maps):
        with pytest.raises(ValueError):
            the_loss("hcl_loss")(maps, theirs)
    for name in ("intra_loss", "at_loss"):  # positions are needed
        for change in (lambda x: x.flatten(2), lambda x: x[:, :, 0, 0]):
            with pytest.raises(ValueError):
                the_loss(name)(change(maps[0]), change(maps[0]))


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_of_any_integer_type_but_none_from_the_end(name):
    """-100 is what cross-entropy ignores, -1 what data sets without labels hold."""
    inputs, _, _ = expected(name, 0, 0)
    result, _ = value_and_gradients(name, the_loss(name), inputs, {})
    other = {**inputs, "labels": inputs["labels"].int()}
    assert torch.equal(result, value_and_gradients(name, the_loss(name), other, {})[0])
    for label in (-1, -100):
        wrong = torch.where(torch.arange(len(inputs["labels"])) == 2, label, inputs["labels"])
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            LOSSES[name].call(the_loss(name), {**inputs, "labels": wrong}, {})


# --- Lifted out alone -----------------------------------------------------------------------------


@functools.cache
def definitions(script):
    """Functions and classes at the top level: name -> (node, source)."""
    text = (ROOT / f"{script}.py").read_text()
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: (node, ast.get_source_segment(text, node)) for node in nodes}


def needed(script, name):
    """The definitions that a loss names, and those that these name, itself first."""
    names, seen = [name], []
    while names:
        current = names.pop()
        if current in definitions(script) and current not in seen:
            seen.append(current)
            node, _ = definitions(script)[current]
            names += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return seen


@pytest.mark.parametrize("script, name", PLACES)
def test_it_runs_lifted_out_alone(script, name):
    function = name.split()[0]
    along = {"DCDLoss": {"contrastive_loss", "consistency_loss"}}.get(function, set())
    helpers = set(needed(script, function)) - {function} - along
    assert all(helper.startswith("_") for helper in helpers), helpers
    assert len(helpers) <= (2 if script == "kd2m" else 1), helpers
    scope = {"torch": torch, "F": F}
    if script == "kd2m":
        scope["linear_sum_assignment"] = linear_sum_assignment
    for part in needed(script, function):
        exec(definitions(script)[part][1], scope)
    assert_equal_to_oracle(name, scope[function], 0, 0, torch.float64, 1e-11)


def test_functions_of_the_same_name_are_the_same_text():
    own = {"parse_args", "main", "distill"}
    texts = {}
    for script in SCRIPTS:
        for name, (_, text) in definitions(script).items():
            texts.setdefault(name, set()).add(text)
    assert not {name for name, versions in texts.items() if len(versions) > 1} - own


def test_every_public_loss_has_an_oracle_and_a_documented_signature():
    for script in SCRIPTS:
        found = {name for name in definitions(script) if name.endswith("_loss") and name[0] != "_"}
        found -= {"roi_nd_loss"}  # picks rows for nd_loss
        found |= set(getattr(importlib.import_module(script), "METRICS", {}))
        assert found <= {name.split()[0] for place, name in PLACES if place == script}
    for script, name in PLACES:
        loss = the_loss(name, script)
        assert loss.__name__ == name.split()[0] and inspect.getdoc(loss)
        arguments = list(inspect.signature(loss).parameters.values())
        assert all(x.annotation is not inspect.Parameter.empty for x in arguments), name
