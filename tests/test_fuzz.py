"""Hostile arguments and files, drawn by hypothesis: an error of one line or the right result."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from helpers import module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common

SOME = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples every time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

FLAGS = """
--teacher --student --dataset --data-dir --image-size --train-size --val-size --epochs --lr
--batch-size --momentum --weight-decay --teacher-ckpt --teacher-epochs --teacher-lr --temperature
--ce-weight --kd-weight --nd-weight --sp-weight --dcd-weight --metric-weight --metric --relation
--base --terms --alpha --beta --seed --seeds --precision --device --save-minutes --out --resume
--compare --plot --deterministic --eval --workers --recipe --transfer --student-ckpt
--nesterov --no-nesterov --pretrained --compile
""".split()
WORDS = "resnet8 resnet56 vgg8 cifar100 shapes imagenet 0 1 2 -1 0.5 1e9 1e-400 nan inf 1e300 paper"
WORDS = WORDS.split() + ["kd", "cpu", "bf16", "w2_empirical", "", " ", "\0", "é", "--", "9" * 40]
arguments = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(FLAGS)),
        st.tuples(st.sampled_from(FLAGS), st.sampled_from(WORDS)),
        st.tuples(st.text(max_size=5)),
    ),
    max_size=5,
)


@SOME
@given(st.sampled_from(["nd", "sp", "dcd", "kd2m"]), arguments)
def test_any_arguments_are_taken_or_refused_in_one_line(cwd, capsys, script, arguments):
    """Only the runs themselves are left out."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", lambda _, args, *more, **named: launched.append(args))
        status = common.run_program(module(script).main, [w for part in arguments for w in part])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if status == 0:
        [args] = launched
        assert args.batch_size >= 2 and args.epochs >= 1 and args.lr > 0 and args.method
    else:
        assert status == 2 and not launched
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert captured.err.count("error: ") == 1
    assert not list(cwd.iterdir())


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


NET = common.build_model("resnet8", 5)
WHOLE = saved({"model": NET.state_dict()})
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)


@SOME
@given(
    st.one_of(
        st.integers(0, len(WHOLE) - 1).map(lambda length: WHOLE[:length]),
        st.binary(max_size=300),
        values.map(saved),
        values.map(lambda value: saved({"model": value})),
        values.map(pickle.dumps),
    )
)
def test_what_is_no_checkpoint_is_refused(cwd, content):
    Path("x.pt").write_bytes(content)
    with pytest.raises(common.UserError, match="x.pt") as error:
        common.load_weights(common.build_model("resnet8", 5), "x.pt")
    assert "\n" not in str(error.value)
