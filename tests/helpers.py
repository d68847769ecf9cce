"""What the tests of whole runs share: commands of a second, files to load, ways to stop a run."""

import functools
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common

ROOT = Path(common.__file__).parent
CPU = torch.device("cpu")
# A run of a second: two batches an epoch, the smallest networks.
SMALL = "--dataset shapes --image-size 16 --train-size 48 --batch-size 24"
QUICK = f"{SMALL} --teacher resnet8 --student resnet8"
WIDE = f"{SMALL} --teacher wrn_16_2 --student resnet8"  # embeddings of different width
TIMES = ("seconds", "images_per_second")


def module(script):
    return importlib.import_module(script)


def run(script, command, *more):
    """The exit status of `python <script>.py <command>`, run in this process."""
    return common.run_program(module(script).main, [*shlex.split(command), *more])


def result(out):
    return json.loads((Path(out) / "result.json").read_text())


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def timeless(out):
    """The metrics of a run without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(out)]


def error_line(capsys):
    """The one line that a failed command has written at last."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0], captured.err
    return errors[0]


def progress(out):
    """Of what can be resumed: whole epochs, and steps of the next one."""
    last = torch.load(Path(out) / "last.pt", weights_only=True)
    return len(last["history"]), last["step"]


def weights(path):
    state = torch.load(path, weights_only=True)
    return dict(state.get("model", state))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def few(draw):
    """Of `draw_shapes`: one that makes splits of 72 and 24 images."""
    return lambda count, seed, size=32: draw(72 if count > 1000 else 24, seed, size)


def shapes(**changes):
    """The synthetic data set, as a script loads it."""
    args = module("nd").parse_args(shlex.split(f"{QUICK} --workers 0"))
    args.train_size = None
    vars(args).update(changes)
    return common.load_data(args)


def teacher_file(path="teacher.pth", name="resnet8", classes=24):
    """A checkpoint in RepDistiller's layout, untrained."""
    torch.manual_seed(1)
    net = common.build_model(name, classes)
    torch.save({"epoch": 240, "model": net.state_dict(), "accuracy": torch.tensor(70.0)}, path)
    return path


def make_tree(root, classes=3, train=4, test=2, size=32, splits=("train", "val"), suffix="png"):
    """Images in an ImageFolder layout. size: of all images, or a range to draw from."""
    rng = np.random.default_rng(0)
    for split, count in zip(splits, (train, test)):
        for k in range(classes):
            folder = Path(root) / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                shape = rng.integers(*size, 2) if isinstance(size, tuple) else (size, size)
                pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}{k}_{i}.{suffix}")
    return Path(root)


class Tiny(torch.nn.Module):
    """The least that a script can train, for runs of hundreds of steps."""

    name, embed_dim, stage_shapes, hash, top1 = "tiny", 3, [(3, 8, 8)], "", 50.0

    def __init__(self, classes):
        super().__init__()
        self.fc = torch.nn.Linear(3, classes)

    def forward(self, images, return_features=False):
        embedding = images.mean((2, 3))
        features = common.Features(embedding, [images], [images])
        return (self.fc(embedding), features) if return_features else self.fc(embedding)


def signal_at(step, number, whole_group=False):
    """From here on, this process receives the signal in its training step of this number."""
    log, count = common.Meter.add, [0]

    def stopping(self, *args, **options):
        count[0] += 1
        if count[0] == step:
            os.kill(0 if whole_group else os.getpid(), number)
            time.sleep(0.3 * whole_group)  # for its children to die, if they do
        return log(self, *args, **options)

    common.Meter.add = stopping


def forked(main, argv, before=lambda: None):
    """A process that runs the program with these arguments, as this one is patched by now."""

    def child():
        status = 3
        try:
            before()
            status = common.run_program(main, [str(word) for word in argv])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def stopped(script, command, *more, step, number=signal.SIGTERM):
    """The exit status of a run that receives a signal in its training step of this number."""
    argv = [*shlex.split(command), *more]

    def before():
        if number != signal.SIGKILL:  # a shell lets its background jobs ignore SIGINT
            signal.signal(number, signal.SIG_DFL)
        signal_at(step, number)

    process = forked(module(script).main, argv, before)
    process.join(120)
    return process.exitcode


def pair(main, argv, folder):
    """Two ranks as torchrun would start them, forked: torch need not be imported again."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def before(rank):
        os.chdir(folder)
        places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it outlives both ranks
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        forget_what_was_loaded()

    started = [forked(main, argv, functools.partial(before, rank)) for rank in (0, 1)]
    started[0].store = store
    return started


def finish(started, folder):
    """-> exit statuses of the ranks, what both wrote to stderr."""
    for process in started:
        process.join(180)
        if process.is_alive():
            process.kill()
            process.join()
    errors = "".join((Path(folder) / f"err{rank}").read_text() for rank in (0, 1))
    return [process.exitcode for process in started], errors


def forget_what_was_loaded():
    """One process runs many tests, whose data have the same names."""
    for name in ("_LOADED", "_EVALUATED"):
        getattr(common, name, {}).clear()


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))
