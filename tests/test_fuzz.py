"""Hostile arguments, drawn by hypothesis: an error of one line or the right result.

In a test run, the same few examples every time; more, and others, with

    python -m pytest tests/test_fuzz.py --hypothesis-profile long
"""

import io
from pathlib import Path

import pytest
import torch
from helpers import module, same
from hypothesis import given
from hypothesis import strategies as st

import common

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


WHOLE = common.build_model("resnet8", 10).state_dict()
BUFFER = io.BytesIO()
torch.save(WHOLE, BUFFER)
CONTENT = BUFFER.getvalue()


@given(st.integers(0, 4000) | st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_a_checkpoint_with_one_byte_changed_is_refused_or_the_same(cwd, position, change):
    content = bytearray(CONTENT)
    content[-1 - position] ^= change  # most are in the table of contents, at the end
    Path("x.pth").write_bytes(content)
    net = common.build_model("resnet8", 10)
    try:
        common.load_weights(net, "x.pth")
    except common.UserError as error:
        assert "x.pth" in str(error) and "\n" not in str(error)
    else:  # the change was between the parts of the archive
        assert same(net.state_dict(), WHOLE)
