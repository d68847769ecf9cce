"""Networks, data and the chores of a run: what a paper's methods section would not mention.

Read a method script (`nd.py`) first; it calls what it needs from here as `common.something`. In
order: errors, signals and exit codes; several ranks; the zoo of networks; networks by name;
checkpoints; data; loading; synthetic images; files of a run; evaluation, figures and the teacher;
the command line. Nothing in here knows any distillation loss.
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import errno
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

try:
    import fcntl
except ImportError:  # Windows: no lock on the run's folder
    fcntl = None

# --- Errors, signals and exit codes ----------------------------------------------------------
# A user sees one line that says what to do, never a traceback. A run that is asked to stop saves
# everything first; files are only ever replaced whole, so that even SIGKILL loses minutes at most.


class UserError(ValueError):
    """Something the user can fix: one line that names the flag or file and says what to do."""


class Stopped(BaseException):
    """A signal asked the program to end."""


# waiting: a step is under way, so a signal is noted in `pending` and obeyed after the step.
# saved: there is something to resume.
_signals = argparse.Namespace(waiting=False, pending=0, saved=False)
_STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def _on_signal(number, _frame):
    if not _signals.waiting:
        raise Stopped(number)
    _signals.pending = _signals.pending or number


_LOST_RANK = "another rank has stopped, so all stop; --resume continues"
_ADVICE = {  # words of an error that is not a bug of this program -> what the user reads before it
    "out of memory|allocate memory|ALLOC_FAILED|MemoryError": "out of memory: lower --batch-size,"
    " --train-size or --image-size",
    "DataLoader worker .pid": "a DataLoader worker was killed, possibly out of memory; reduce"
    " --workers and continue with --resume",
    "deterministic implementation": "--deterministic is not possible on this GPU",
    "torch._dynamo|torch._inductor": "torch.compile does not work here; leave --compile out",
    "ncclInvalidUsage": "two ranks cannot share a GPU; --nproc_per_node must be the number of GPUs",
    r"closed by peer|reset by peer|Broken pipe|Dist\w*Error": _LOST_RANK,
}


def run_program(main, argv: list[str] | None = None) -> int:
    """Call `main(argv)` and turn how it ends into an exit status.
    Returns: 0 done; 2 bad input, with one `error:` line on stderr; 1 another rank was lost;
        128 + n ended by signal n, with everything saved. A bug is a traceback, and 1."""
    _signals.waiting, _signals.pending, _signals.saved, status = False, 0, False, 2
    for stream in (sys.stdout, sys.stderr):  # file names need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # Python allows no handlers outside the main thread
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, _on_signal)
    try:
        with join_ranks(sys.argv[1:] if argv is None else argv):
            main(argv)
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = error.filename or ("the output" if error.errno == errno.ENOSPC else "")
        message = f"{where}: {error.strerror or error}".removeprefix(": ")
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__} {error}".splitlines()
        origin = f"{type(error).__module__}.{' '.join(text)}"
        advice = [line for words, line in _ADVICE.items() if re.search(words, origin)]
        if not advice:
            raise
        message, status = f"{advice[0]} ({text[0]})", 1 if advice[0] == _LOST_RANK else 2
    except Stopped as stop:
        if rank() == 0:
            then = "; --resume continues" if _signals.saved else ""
            print(f"\nstopped by signal {stop.args[0]}{then}", file=sys.stderr)
        return 128 + stop.args[0]
    with contextlib.suppress(dist.DistError):  # the rank that keeps the count has spoken, and gone
        # All ranks meet the same bad input, and the first that comes here says so.
        if world() == 1 or dist.distributed_c10d._get_default_store().add("errors", 1) == 1:
            line = re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]+", " ", message)  # of file names, too
            print(f"error: {line}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """argparse with errors of one `error:` line, and no abbreviated flags."""

    def __init__(self, script: str, description: str):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)
        self.set_defaults(script=script)

    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


# --- Several ranks, one per GPU: `torchrun --nproc_per_node=N nd.py ...` ---------------------
# Losses between samples need the whole batch, so this is not DistributedDataParallel. Every rank
# takes its share of each batch; `Run.all_gather` brings together what losses compare, so that every
# rank computes the loss of the whole batch; `Run.average_gradients` then combines the gradients.


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def join_ranks(argv: list[str]):
    """Join the other ranks, if torchrun started this one. In the body only rank 0 prints."""
    names = "RANK LOCAL_RANK MASTER_ADDR MASTER_PORT".split()  # a cluster may set WORLD_SIZE only
    if os.environ.get("WORLD_SIZE", "1") == "1" or not all(name in os.environ for name in names):
        yield
        return
    on_cpu, gpus = "--device cpu" in " ".join(argv).replace("=", " "), torch.cuda.device_count()
    backend = "gloo" if on_cpu or not gpus else "cpu:gloo,cuda:nccl"
    # One rank may read data for hours while the others wait. torchrun ends all when one dies.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if backend != "gloo":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)  # a rank may see its own only
    with open(os.devnull, "w", errors="replace") as nowhere:
        out, err = (nowhere, nowhere) if rank() > 0 else (sys.stdout, sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    dist.destroy_process_group()  # not after an error: the other ranks might never get here


def gather_objects(value) -> list:
    """The value of every rank, by rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return once every rank has come here."""
    gather_objects(None)


@contextlib.contextmanager
def one_rank_first():
    """The first rank of each machine runs the body, then the others, which find its files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or world() == 1
    for turn_of_first in (True, False):
        if first == turn_of_first:
            yield
        wait_for_all()


def share(count: int) -> slice:
    """Which of `count` things this rank takes: the shares differ by one at most."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)


def broadcast(tensors) -> None:
    """Overwrite each tensor by that of rank 0."""
    for tensor in tensors if world() > 1 else ():
        dist.broadcast(tensor.detach(), 0)


# --- Networks: the 22 of the RepDistiller zoo for 32-pixel images, and two more --------------
# Attribute names are those of the published checkpoints, so that state dicts load key for key.
# Every block returns its value BEFORE the last ReLU and the network applies the ReLU, because some
# methods (ReviewKD) compare that value. Every network ends in a global average pool.


class Features(NamedTuple):
    """Intermediate outputs of a network."""

    embedding: Tensor  # [B,D], the input of the classifier
    maps: list[Tensor]  # the feature maps at the end of each stage, shallow to deep, each [B,C,H,W]
    preact: list[Tensor]  # the same before the activation, where the family has one there


def _conv(c_in, c_out, size, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)


def _stage(block, count, c_in, width, stride, *more):
    """Blocks in a row: the first changes the number of channels and the resolution."""
    blocks = [block(width if i else c_in, width, 1 if i else stride, *more) for i in range(count)]
    return nn.Sequential(*blocks)


def _init_he(net, classifier=None):
    """He initialisation, fan-out, of every convolution; of the classifier N(0, 0.01^2)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if classifier is not None:
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


class ZooNet(nn.Module):
    """Each family defines `features(x)`; its classifier is the last of its children."""

    def forward(self, x, return_features=False):
        x, maps, preact = self.features(x)
        embedding = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = [*self.children()][-1](embedding)
        return (logits, Features(embedding, maps, preact)) if return_features else logits


class Block(nn.Module):
    """Convolutions, each with BatchNorm: conv1, bn1, conv2, ... shapes: `_conv`'s arguments."""

    def __init__(self, *shapes):
        super().__init__()
        for i, shape in enumerate(shapes, 1):
            setattr(self, f"conv{i}", _conv(*shape))
            setattr(self, f"bn{i}", nn.BatchNorm2d(shape[1]))

    def step(self, i, x):
        return getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))


def _shortcut(c_in, c_out, stride):
    """The identity where shapes agree, else a 1x1 convolution with BatchNorm ("option B")."""
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class BasicBlock(Block):
    def __init__(self, c_in, width, stride):
        super().__init__((c_in, width, 3, stride), (width, width, 3))
        self.downsample = _shortcut(c_in, width, stride)

    def forward(self, x):
        return self.step(2, F.relu(self.step(1, x))) + self.downsample(x)


class Bottleneck(Block):
    def __init__(self, c_in, width, stride):
        mid = width // 4
        super().__init__((c_in, mid, 1), (mid, mid, 3, stride), (mid, width, 1))
        self.shortcut = _shortcut(c_in, width, stride)

    def forward(self, x):
        out = F.relu(self.step(2, F.relu(self.step(1, x))))
        return self.step(3, out) + self.shortcut(x)


def _shuffle(x, groups):
    """Channel shuffle: interleave the channels of the groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(Block):
    def __init__(self, c_in, width, stride):
        c_out = width - c_in if stride == 2 else width  # at stride 2 the input is concatenated
        mid, groups = c_out // 4, 1 if c_in == 24 else 3  # the stem's 24 channels are not grouped
        grouped = (c_in, mid, 1, 1, groups), (mid, mid, 3, stride, mid), (mid, c_out, 1, 1, 3)
        super().__init__(*grouped)
        self.stride, self.groups = stride, groups

    def forward(self, x):
        out = _shuffle(F.relu(self.step(1, x)), self.groups)
        out = self.step(3, F.relu(self.step(2, out)))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
        return out + x


class ShuffleUnitV2(Block):
    """Half the channels pass through untouched; at stride 2 two branches see the whole input."""

    def __init__(self, c_in, width, stride):
        half, seen = width // 2, c_in if stride == 2 else width // 2
        left = [(c_in, c_in, 3, 2, c_in), (c_in, half, 1)] if stride == 2 else []
        right = [(seen, half, 1), (half, half, 3, stride, half), (half, half, 1)]
        super().__init__(*left, *right)
        self.stride = stride

    def forward(self, x):
        if self.stride == 2:
            left, right, first = F.relu(self.step(2, self.step(1, x))), x, 3
        else:
            (left, right), first = x.chunk(2, 1), 1
        right = self.step(first + 1, F.relu(self.step(first, right)))
        right = F.relu(self.step(first + 2, right))
        return _shuffle(torch.cat([left, right], 1), 2)


class StageNet(ZooNet):
    """Stages of one kind of block, each twice as wide as the last: ResNets and ShuffleNets. With a
    tail (ShuffleNet v2), the blocks end activated and another convolution follows."""

    def __init__(self, block, stem, width, counts, tail, num_classes):
        super().__init__()
        resnet = block in (BasicBlock, Bottleneck)
        self.conv1, self.bn1 = _conv(3, stem, 3 if resnet else 1), nn.BatchNorm2d(stem)
        self.num_stages, self.tail, c_in = len(counts), tail, stem
        for i, count in enumerate(counts):
            stride = 1 if resnet and i == 0 else 2
            setattr(self, f"layer{i + 1}", _stage(block, count, c_in, width, stride))
            c_in, width = width, 2 * width
        if tail:
            self.conv2, self.bn2 = _conv(c_in, tail, 1), nn.BatchNorm2d(tail)
        head_name = "fc" if block is BasicBlock else "linear"
        setattr(self, head_name, nn.Linear(tail or c_in, num_classes))
        if resnet:
            _init_he(self)

    def features(self, x):
        x, maps, preact = F.relu(self.bn1(self.conv1(x))), [], []
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                before = block(x)
                x = before if self.tail else F.relu(before)
            maps.append(x)
            preact.append(before)
        if self.tail:
            x = F.relu(self.bn2(self.conv2(x)))
        return x, maps, preact


class WideUnit(nn.Module):
    """Pre-activation unit: returns the running sum, and its input after BatchNorm."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), _conv(c_in, c_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), _conv(c_out, c_out, 3)
        # Without BatchNorm, and on the activated input.
        self.convShortcut = _conv(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x):
        normed = self.bn1(x)
        activated = F.relu(normed)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated)), normed


class WideResNet(ZooNet):
    """WRN-depth-k. A map is a stage's running sum, `preact` that after the next BatchNorm."""

    def __init__(self, depth, k, num_classes):
        super().__init__()
        self.conv1, c_in = _conv(3, 16, 3), 16
        for i, width in enumerate((16 * k, 32 * k, 64 * k)):
            stage = _stage(WideUnit, (depth - 4) // 6, c_in, width, 2 if i else 1)
            setattr(self, f"block{i + 1}", nn.ModuleDict({"layer": stage}))
            c_in = width
        self.bn1, self.fc = nn.BatchNorm2d(c_in), nn.Linear(c_in, num_classes)
        _init_he(self)
        nn.init.zeros_(self.fc.bias)

    def features(self, x):
        x, maps, preact = self.conv1(x), [], []
        for stage in (self.block1, self.block2, self.block3):
            for i, unit in enumerate(stage["layer"]):
                x, normed = unit(x)
                if i == 0:
                    preact.append(normed)
            maps.append(x)
        preact = [*preact[1:], self.bn1(x)]
        return F.relu(preact[-1]), maps, preact


class VGG(ZooNet):
    """VGG with BatchNorm and one linear classifier; no pooling after the fourth block."""

    def __init__(self, counts, num_classes):
        super().__init__()
        c_in = 3
        for i, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512))):
            layers = []
            for _ in range(count):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c_in = width
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))  # `features` has the last ReLU
        self.classifier = nn.Linear(512, num_classes)
        _init_he(self, self.classifier)

    def features(self, x):
        maps, preact = [], []
        for i in range(5):
            before = getattr(self, f"block{i}")(x)
            x = F.relu(before)
            maps.append(x)
            preact.append(before)
            if i < 3:
                x = F.max_pool2d(x, 2)
        return x, maps[1:], preact[1:]  # RepDistiller counts the first block as the stem


def _layer(*shape):
    """A convolution with BatchNorm, activated. shape: `_conv`'s arguments."""
    return nn.Sequential(_conv(*shape), nn.BatchNorm2d(shape[1]), nn.ReLU())


class InvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        mid = c_in * expansion
        wide = *_layer(c_in, mid, 1), *_layer(mid, mid, 3, stride, mid)
        self.conv = nn.Sequential(*wide, _conv(mid, c_out, 1), nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        return self.conv(x) + x if self.residual else self.conv(x)


class MobileNetV2(ZooNet):
    """Half width ("mobile_half"), plain ReLU. Stages end linearly, so maps and preact are equal."""

    groups = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2))
    groups += ((6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))  # expansion, width, count, stride

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = _layer(3, 16, 3, 2)
        self.blocks, c_in = nn.ModuleList(), 16
        for expansion, width, count, stride in self.groups:
            self.blocks.append(_stage(InvertedResidual, count, c_in, width, stride, expansion))
            c_in = width
        self.conv2 = _layer(c_in, 1280, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        _init_he(self, self.classifier[0])

    def features(self, x):
        outputs = [self.conv1(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        maps = [outputs[i] for i in (2, 3, 5, 7)]
        return self.conv2(outputs[-1]), maps, maps


class MobileNetV1(ZooNet):
    """For ImageNet: a convolution and 13 depthwise-separable blocks. `preact` is activated too."""

    def __init__(self, num_classes):
        super().__init__()
        self.model, c_in = nn.Sequential(_layer(3, 32, 3, 2)), 32
        for i, width in enumerate([64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]):
            stride = 2 if i in (1, 3, 5, 11) else 1
            depthwise = _layer(c_in, c_in, 3, stride, c_in)
            self.model.append(nn.Sequential(*depthwise, *_layer(c_in, width, 1)))
            c_in = width
        self.fc = nn.Linear(c_in, num_classes)

    def features(self, x):
        outputs = [x := layer(x) for layer in self.model]
        maps = [outputs[i] for i in (3, 5, 11, 13)]  # the last at each resolution
        return x, maps, maps


def _resnet(depth, stem, width):
    return StageNet, BasicBlock, stem, width, [(depth - 2) // 6] * 3, 0


ZOO = {  # name -> class, and its arguments before the number of classes
    **{f"resnet{depth}": _resnet(depth, 16, 16) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _resnet(depth, 32, 64) for depth in (8, 32)},
    **{f"wrn_{depth}_{k}": (WideResNet, depth, k) for depth in (16, 40) for k in (1, 2)},
    "wrn_16_8": (WideResNet, 16, 8),
    "ResNet50": (StageNet, Bottleneck, 64, 256, (3, 4, 6, 3), 0),
    "vgg8": (VGG, (1, 1, 1, 1, 1)),
    "vgg11": (VGG, (1, 1, 2, 2, 2)),
    "vgg13": (VGG, (2, 2, 2, 2, 2)),
    "vgg16": (VGG, (2, 2, 3, 3, 3)),
    "vgg19": (VGG, (2, 2, 4, 4, 4)),
    "MobileNetV1": (MobileNetV1,),
    "MobileNetV2": (MobileNetV2,),
    "ShuffleV1": (StageNet, ShuffleUnitV1, 24, 240, (4, 8, 4), 0),
    "ShuffleV2": (StageNet, ShuffleUnitV2, 24, 116, (4, 8, 4), 1024),
}


# --- Networks by name: the zoo's and torchvision's classifiers -------------------------------
# Every network answers `network(x)` with logits and `network(x, return_features=True)` with
# (logits, Features). In torchvision's, forward hooks record these; state dicts stay torchvision's.


def model_names() -> list[str]:
    """Every name that `build_model` takes: the zoo's first, then torchvision's classifiers."""
    names = torchvision.models.list_models(module=torchvision.models)
    # squeezenet classifies by a convolution: no embedding. The others have several classifiers.
    odd = ("squeezenet", "googlenet", "inception")
    return [*ZOO, *(n for n in names if n not in ZOO and not n.startswith(odd))]


def build_model(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """A network by name, with random weights, or with torchvision's ImageNet weights (downloaded)
    and, unless there are 1,000 classes, a new classifier. UserError: there are none."""
    if name in ZOO:
        if pretrained:
            raise UserError(f"{name}: no weights to download; use --no-pretrained")
        kind, *sizes = ZOO[name]
        net = kind(*sizes, num_classes)
        net.name = name
        return net
    if name not in model_names():
        raise UserError(f"unknown model '{name}'{nearest(name, model_names())}")
    if not pretrained:
        return _with_features(torchvision.models.get_model(name, num_classes=num_classes), name)
    weights = torchvision.models.get_model_weights(name)
    weights = getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)  # the older, as in papers
    try:
        with one_rank_first():  # one download
            net = torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        raise UserError(f"cannot download the weights of {name}: {error}") from None
    if num_classes != 1000:
        new_classifier(net, num_classes)
    return _with_features(net, name)


def _with_features(net, name):
    """Give a torchvision classifier the argument `return_features`. Its feature maps are the
    outputs of `layer1..4`, else the last output at each resolution among the parts of its body."""
    head, stages = _head_path(net), [n for n, _ in net.named_children() if re.match(r"layer\d", n)]
    body = [n for n in ("features", "trunk_output", "layers", "blocks") if hasattr(net, n)]
    ends = (nn.AdaptiveAvgPool2d, nn.Dropout, nn.Linear)
    parts = net.get_submodule(".".join(body)).named_children()  # with no such name: the network's
    taps = stages or [".".join((*body, n)) for n, part in parts if not isinstance(part, ends)]
    taps = [] if hasattr(net, "conv_proj") else taps  # conv_proj: a vision transformer's
    channels_last = type(net).__name__ == "SwinTransformer"

    def record(module, inputs, output):
        module.seen = (inputs[0], output)  # on the module: a deep copy of the network has its own

    class WithFeatures(type(net)):
        def forward(self, x, return_features=False):
            logits = super().forward(x)
            recorded = [self.get_submodule(path) for path in (*taps, head)]
            embedding, maps = recorded[-1].seen[0], [module.seen[1] for module in recorded[:-1]]
            for module in recorded:
                module.seen = None  # frees the tensors
            maps = [m.permute(0, 3, 1, 2) if channels_last else m for m in maps if m.dim() == 4]
            if not stages:
                maps = list({m.shape[-1]: m for m in maps}.values())
            return (logits, Features(embedding, maps, maps)) if return_features else logits

    net.__class__, net.name = WithFeatures, name
    for module in map(net.get_submodule, (*taps, head)):
        module.register_forward_hook(record)
    return net


def _head_path(net):
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]


def new_classifier(net: nn.Module, num_classes: int) -> nn.Linear:
    """Start the linear classifier anew, as PyTorch initialises one, for `num_classes`; -> it."""
    head = net.get_submodule(_head_path(net))
    new = nn.Linear(head.in_features, num_classes)
    head.weight, head.bias, head.out_features = new.weight, new.bias, num_classes
    return head


def build_for(data: "Data", name: str, pretrained: bool = False) -> nn.Module:
    """`build_model` for the classes of a data set, and `try_on` its images."""
    return try_on(build_model(name, data.num_classes, pretrained), data)


@torch.no_grad()
def try_on(net: nn.Module, data: "Data") -> nn.Module:
    """Set `.embed_dim` and `.stage_shapes`, [(C, H, W), ...], by a trial. UserError: wrong size."""
    images, _ = next(data.batches("test", 2, last=1))
    try:
        features = net.eval()(images.to(next(net.parameters()).device), return_features=True)[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        problem = f"{data.image_size}-pixel images (--image-size): {str(error).splitlines()[0]}"
        raise UserError(f"{net.name} does not take {problem}") from None
    net.embed_dim = features.embedding.shape[1]
    net.stage_shapes = [tuple(m.shape[1:]) for m in features.maps]
    return net.train()


def load_model(name: str, path: str | Path) -> nn.Module:
    """The network `name` with the weights in `path`, and with as many classes as these have."""
    net = build_model(name, 2)
    state = read_state_dict(path, net.state_dict())
    weight = state.get(_head_path(net) + ".weight")
    if weight is not None and weight.dim() == 2:
        new_classifier(net, len(weight))
    load_weights(net, path, state)
    return net


def nearest(word: str, words: list[str]) -> str:
    """The end of an error message: the words most like an unknown one, whatever their case."""
    by_lower = {other.lower(): other for other in words}
    close = difflib.get_close_matches(word.lower(), by_lower, cutoff=0)
    return f": did you mean {', '.join(by_lower[other] for other in close)}?"


# --- Checkpoints -----------------------------------------------------------------------------
# Reading weights runs no code from the file, and one that is damaged or of another network ends in
# one line of error. Where in the file they are, under which prefix, is found by trying what fits.


def read_checkpoint(path: str | Path):
    """`torch.load` that runs no code from the file. UserError: missing, damaged, or not weights."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("not a file" if path.exists() else "no such file"))
    # What others save beside the weights: command lines and scores. These types are plain data.
    harmless = [argparse.Namespace, np.dtype, np.ndarray]
    harmless += [type(np.dtype(kind)) for kind in "?bBhHiIlLefd"]
    for function in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]):
        for core in ("core", "_core"):  # NumPy 1 and 2
            harmless.append((function, f"numpy.{core}.multiarray.{function.__name__}"))
    try:
        if path.suffix == ".safetensors":
            return optional("safetensors.torch", str(path)).load_file(path)
        if zipfile.is_zipfile(path):  # torch.load looks at no checksum, and folders give it noise
            archive = zipfile.ZipFile(path)
            if archive.testzip() or any(part.external_attr & 16 for part in archive.infolist()):
                raise ValueError("a checksum is wrong, or a part is marked as a folder")
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # on pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # torch.load documents no set of errors for a damaged file
        raise UserError(f"{path}: {_what_is_wrong(path, error)}") from None


def _what_is_wrong(path, error):
    start = path.read_bytes()[:100].lstrip()
    if start.startswith((b"<", b"version https://git-lfs")):
        return "a web page or a pointer of Git LFS, and no checkpoint: download the file itself"
    plain_zip = start.startswith(b"PK") and b"data.pkl" not in path.read_bytes()
    if tarfile.is_tarfile(path) or plain_zip:
        return "an archive: unpack it, and name the checkpoint in it"
    if "GLOBAL" in str(error):
        return "holds Python objects, which would run as code; save its state dict alone"
    return "damaged, half-written or not a checkpoint; replace it"


def read_state_dict(path: str | Path, wanted: dict) -> dict:
    """The state dict in a checkpoint that fits `wanted`, the network's own, best. What comes before
    the names of weights, such as `module.`, is taken off; whole numbers and float64 that the
    network does not have are counters, and left out. UserError: the file holds no tensors."""
    found, contents, seen = [], [("", read_checkpoint(path))], set()
    for where, content in contents:  # the list grows while it is read: all that is inside comes on
        if not isinstance(content, (dict, list, tuple)) or id(content) in seen:
            continue
        seen.add(id(content))  # of the object itself, which `contents` keeps alive
        content = content if isinstance(content, dict) else dict(enumerate(content))
        contents += [(f"{where}{key}.", value) for key, value in content.items()]
        tensors = {str(k): v for k, v in content.items() if torch.is_tensor(v) and not v.is_nested}
        first = next(iter(wanted))
        prefixes = [key.removesuffix(first) for key in tensors if key.endswith(first)]
        for prefix in dict.fromkeys(["", *prefixes] if tensors else []):
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            kinds = (torch.float32, torch.float16, torch.bfloat16)
            state = {k: v for k, v in state.items() if k in wanted or v.dtype in kinds}
            fit = [k for k, v in wanted.items() if k in state and state[k].shape == v.shape]
            found.append((len(fit) - len(state.keys() - wanted), where + prefix, state))
    if not found:
        raise UserError(f"{path}: holds no state dict")
    highest = max(score for score, _, _ in found)
    best = [(name, state) for score, name, state in found if score == highest]
    if len(best) > 1 and highest > 0:
        names = ", ".join(name or "the file itself" for name, _ in best)
        print(f"note: {path}: several state dicts fit ({names}); the first is used")
    return best[0][1]


def load_weights(model: nn.Module, path: str | Path, state: dict | None = None) -> None:
    """Load a checkpoint strictly; BatchNorm's `num_batches_tracked` may be missing. UserError: it
    does not fit, or is not finite. state: what `read_state_dict` gave before."""
    wanted = model.state_dict()
    counters = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    state = counters | (state or read_state_dict(path, wanted))
    for key in [*wanted, *sorted(state.keys() - wanted.keys())]:
        found, expected = (list(d[key].shape) if key in d else "absent" for d in (state, wanted))
        if found != expected:
            misfit = f"{key} is {found}, in {getattr(model, 'name', 'this network')} {expected}"
            raise UserError(f"{path}: another architecture or number of classes: {misfit}")
    odd = {v.layout != torch.strided or v.is_complex() or v.is_meta for v in state.values()}
    odd |= {wanted[k].is_floating_point() > v.is_floating_point() for k, v in state.items()}
    if True in odd or not all(torch.isfinite(v.float()).all() for v in state.values()):
        raise UserError(f"{path}: weights are integers, sparse, complex, meta, infinite or nan")
    model.load_state_dict(state)


def state_hash(model: nn.Module) -> str:
    """16 hex digits that identify the weights: SHA-256 over every tensor of the state dict."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --- Data: a whole set as uint8 on the device, or ImageNet decoded by workers ----------------
# Small sets lie on the device and are augmented there, a batch at a time, which no DataLoader can
# match in speed. Everything random is drawn on the CPU from the seed of the pass: the same seed
# gives the same batches on CPU and GPU, with any number of workers, and from any batch on.

STATS = {  # mean and standard deviation of the training pixels, R G B, as commonly used
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    **dict.fromkeys(("imagenet", "folder"), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Split(NamedTuple):
    images: Tensor | np.ndarray  # [N,S,S,3] uint8, or paths of files
    labels: Tensor  # [N] int64


class Data:
    """A data set on the device. `batches` yields normalised images [B,3,S,S] and labels [B]."""

    report = ""  # what is odd in the files, a line each

    def __init__(self, name, train, test, classes, stats, image_size, device, workers):
        self.name, self.classes, self.num_classes = name, classes, len(classes)
        self.image_size, self.device = image_size, device
        self.workers = cores() if workers is None else workers
        self.train_images, self.test_images = len(train.labels), len(test.labels)
        self.fingerprint = self._digest(train, test)[:16]
        splits = [[x.to(device) if torch.is_tensor(x) else x for x in s] for s in (train, test)]
        self.train, self.test = (Split(*split) for split in splits)
        mean, std = (torch.tensor(s, device=device).view(1, 3, 1, 1) for s in stats)
        self.mean, self.std = mean * 255, std * 255
        self.pad = image_size // 8  # 4 at 32 pixels
        self.may_flip = name != "svhn"  # a mirrored digit is another digit

    def _digest(self, train, test):
        digest = hashlib.sha256()
        for tensor in (*train, *test):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def steps(self, batch_size: int) -> int:
        """Batches in a shuffled pass. UserError: too few images for the ranks."""
        least = 2 * world()
        if min(self.train_images, batch_size) < least:
            raise UserError(f"--batch-size: {world()} ranks need {least} or more images in a batch")
        full, rest = divmod(self.train_images, batch_size)
        return full + (rest >= least)

    def train_batches(self, batch_size: int, seed: int, first: int = 0, last: int | None = None):
        """Batches `first` to `last` - 1 of a shuffled, augmented pass: this rank's part of each."""
        return self.batches("train", batch_size, seed, True, first, last, shared=True)

    def batches(self, split, size, seed=None, augment=False, first=0, last=None, shared=False):
        """One pass over "train" or "test", or its batches `first` to `last` - 1. Shuffled, it lacks
        a last batch too small for BatchNorm: of one image (shared: of less than two per rank).
        Args: size: images in a batch; seed: of order and augmentation (None: in order); augment:
            zero padding by an eighth, random crop and flip; shared: this rank's part of each."""
        count, shuffled = len(getattr(self, split).labels), seed is not None
        rng = torch.Generator().manual_seed(seed or 0)
        order = torch.randperm(count, generator=rng) if shuffled else torch.arange(count)
        least = (2 * world() if shared else 2) if shuffled else 1
        parts = [range(count)[k : k + size] for k in range(0, count, size)][first:last]
        parts = [part for part in parts if len(part) >= least]
        if shared:
            parts = [part[share(len(part))] for part in parts]
        parts = [slice(part.start, part.stop) for part in parts if part]  # of the order
        return self._pass(split, order, parts, rng, augment)

    def _pass(self, split, order, parts, rng, augment):
        images, labels = getattr(self, split)
        count, size, pad = len(order), self.image_size, self.pad
        shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=rng)
        flip = (torch.rand(count, 1, generator=rng) < 0.5) & self.may_flip
        order, shift, flip = (t.to(self.device) for t in (order, shift, flip))
        grid = torch.arange(size, device=self.device)
        for part in parts:
            x, y = images[order[part]], labels[order[part]]  # [B,S,S,3], [B]
            if augment:
                rows = shift[0, part] + grid  # [B,S], in the padded image
                cols = shift[1, part] + torch.where(flip[part], size - 1 - grid, grid)
                which = torch.arange(len(y), device=self.device)[:, None, None]
                x = F.pad(x, (0, 0, pad, pad, pad, pad))[which, rows[:, :, None], cols[:, None]]
            yield self._normalised(x), y

    def _normalised(self, images):  # [B,S,S,3] uint8 -> [B,3,S,S], channels last in memory
        return images.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std)

    def test_batch(self, per_class: int, classes: int) -> tuple[Tensor, Tensor]:
        """The first test images of each of the first classes, sorted by class, for figures."""
        of_class = [(self.test.labels == k).nonzero().flatten() for k in range(classes)]
        order = torch.cat([index[:per_class] for index in of_class]).cpu()
        return next(self._pass("test", order, [slice(0, len(order))], torch.Generator(), False))


class StreamedData(Data):
    """A set too large to hold in memory: workers decode the files in every pass. Training: a random
    part of each image and a flip. Testing: resized to 8/7 of the size, and the centre of that."""

    def _digest(self, train, test):  # of all names and some sizes: to read all takes too long
        digest = hashlib.sha256(str(self.image_size).encode())
        for files, labels in (train, test):
            names = (f"{Path(path).name} {label}" for path, label in zip(files, labels.tolist()))
            digest.update(os.fsencode("\n".join(names)))
            some = files[:: max(1, len(files) // 1000)]
            digest.update(str([os.stat(path).st_size for path in some]).encode())
        return digest.hexdigest()

    def _pass(self, split, order, parts, rng, augment):
        files, labels = getattr(self, split)
        # What is random of an image depends on the seed of the pass, not on the workers.
        seeds = torch.randint(2**31, order.shape, generator=rng)
        decoder = _Decoder(files, labels.cpu(), order, seeds, self.image_size, augment)
        workers = min(self.workers, len(parts)) if len(parts) > 1 else 0
        # batch_size=None: the data set makes the batches, so that a worker decodes a whole one.
        for images, labels in read_in_workers(decoder, workers, batch_size=None, sampler=parts):
            if isinstance(images, str):
                raise UserError(f"{images}, or leave it out by --skip-bad-images")
            yield self._normalised(images.to(self.device)), labels.to(self.device)


class _Decoder:
    """[a slice of the pass] -> images [B,S,S,3] uint8, or the error of one, and labels [B]."""

    def __init__(self, files, labels, order, seeds, size, augment):
        self.files, self.labels, self.order, self.seeds = files, labels, order, seeds
        steps = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        if augment:
            steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose(steps)

    def __getitem__(self, part):
        images = []
        for k, seed in zip(self.order[part].tolist(), self.seeds[part].tolist()):
            try:
                image = read_rgb(self.files[k])
            except UserError as error:
                return str(error), None
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # the CPU's: a GPU's is the run's
                images.append(np.array(self.transform(image)))
        return np.stack(images), self.labels[self.order[part]].numpy()


def read_in_workers(dataset, workers: int, **plan):
    """What a DataLoader yields, as lists. The data set makes numpy arrays, which workers send
    through pipes (tensors need shared memory); these are forked, to inherit the list of files."""
    plan |= dict(num_workers=workers, collate_fn=list, worker_init_fn=_ignore_signals)
    plan["generator"] = torch.Generator()  # its own, or it would draw from the run's
    plan["multiprocessing_context"] = "fork" if workers and sys.platform == "linux" else None
    for batch in torch.utils.data.DataLoader(dataset, **plan):
        yield [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch]


def _ignore_signals(_worker):
    """A signal may reach all processes of a job: the program saves, then ends its workers."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def cores() -> int:
    """How many processors this rank may use: the ranks of one machine share them."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- Loading: from --dataset and --data-dir to a Data ----------------------------------------
# Whatever the source (torchvision's files, an ImageFolder layout, the synthetic images), the result
# is two splits with class labels. Bad input is found here, before any long work.

TINY_IMAGENET = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDERS = dict(imagenet="", folder="", cifar100="cifar100", tinyimagenet="tiny-imagenet-200")
_LOADED: dict = {}  # the last data set, for the next run in this process
_EVALUATED: dict = {}  # and the scores of teachers


def load_data(args) -> Data:
    """The data set of the command line, on its device. UserError: it cannot be read."""
    if args.image_size is None:
        args.image_size = {"imagenet": 224, "tinyimagenet": 64}.get(args.dataset, 32)
    device = pick_device(args.device)
    names = "dataset data_dir image_size mean std train_size val_size skip_bad_images".split()
    key = str([device, *(getattr(args, name, None) for name in names)])
    if key not in _LOADED:
        _LOADED.clear()
        if args.val_size:
            print(f"note: --val-size: 'test' is a held-out split of {args.val_size} images")
        with one_rank_first():  # downloads and decodes
            _LOADED[key] = _read_data(args, device)
    return _LOADED[key]


def _read_data(args, device):
    size, root, name, report = args.image_size, Path(args.data_dir), args.dataset, ""
    if name == "shapes":
        train, test, classes = draw_shapes(5000, 0, size), draw_shapes(1000, 1, size), SHAPE_CLASSES
    elif name in FOLDERS and (name != "cifar100" or (root / "cifar100" / "train").is_dir()):
        train, test, classes, report = _read_folders(root / FOLDERS[name], args)
    else:
        train, test, classes = _read_torchvision(name, args.data_dir, size)
    train, test = _chosen(args, train, test, len(classes))
    kind = StreamedData if name == "imagenet" else Data
    stats = tuple(args.mean or STATS[name][0]), tuple(args.std or STATS[name][1])
    data = kind(name, train, test, classes, stats, size, device, args.workers)
    data.report = report
    if stats != STATS[name]:  # other pixels for the networks
        data.fingerprint = hashlib.sha256(f"{data.fingerprint}{stats}".encode()).hexdigest()[:16]
    for label in set(range(len(classes))) - set(train.labels.tolist()):
        raise UserError(f"--data-dir: class {classes[label]} has no readable training image")
    return data


def _chosen(args, train, test, num_classes):
    """The splits under --train-size and --val-size: the same for every seed, classes balanced."""
    if not args.train_size and not args.val_size:
        return train, test

    def first(flag, count, index):
        if not num_classes <= count <= len(index):
            raise UserError(f"{flag} {count}: must be from {num_classes} to {len(index)}")
        return index[:count]

    def part(index):
        index = index.sort().values
        return Split(train.images[index.numpy()], train.labels[index])

    labels, counts = train.labels, train.labels.bincount(minlength=num_classes)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class, place = order[torch.argsort(labels[order], stable=True)], torch.empty_like(order)
    place[by_class] = torch.cat([torch.arange(n) for n in counts.tolist()])  # within its class
    order = torch.argsort(place, stable=True)  # one of each class, then another of each, ...
    if args.val_size:  # from the other end of each class, and half of it at most
        from_end = counts[labels] - 1 - place
        held_out = torch.argsort(from_end, stable=True)
        held_out = held_out[(place > from_end)[held_out]]
        held_out = first("--val-size", args.val_size, held_out)
        test, order = part(held_out), order[~torch.isin(order, held_out)]
    if args.train_size:
        order = first("--train-size", args.train_size, order)
    return part(order), test


def _read_torchvision(name, root, size):
    splits, is_cifar = [], name.startswith("cifar")
    for split in ("train", "test"):
        options = {"train": split == "train"} if is_cifar else {"split": split}
        try:
            data = getattr(torchvision.datasets, name.upper())(root, download=True, **options)
        except Exception as error:  # each set fails in its own way; none leaves usable data
            reason = [*str(error).splitlines(), type(error).__name__][0]
            advice = f"put its official files under {root}/; --dataset shapes needs no files"
            raise UserError(f"--dataset {name}: {reason}; {advice}") from None
        pixels = torch.as_tensor(np.asarray(data.data))
        pixels = pixels.permute(0, 3, 1, 2) if is_cifar else pixels  # [N,3,S,S]
        chunks = (chunk.float() for chunk in pixels.split(1000))
        resized = [transforms.functional.resize(x, [size, size]).round().byte() for x in chunks]
        images = torch.cat(resized).permute(0, 2, 3, 1).contiguous()
        labels = torch.as_tensor(np.asarray(data.targets if is_cifar else data.labels))
        splits.append(Split(images, labels.long()))
    return *splits, list(getattr(data, "classes", map(str, range(10))))


def _read_folders(root, args):
    """Both splits of an ImageFolder layout, ImageNet as paths; the class names; what is odd."""
    test = next((name for name in ("val", "valid", "test") if (root / name).is_dir()), "val")
    folders = {"train": root / "train", test: root / test}
    if not folders["train"].is_dir() and args.val_size:  # no splits: the classes lie here
        folders = {"train": root}
    odd = {split: {} for split in folders}
    found = {split: _files_by_class(path, odd[split]) for split, path in folders.items()}
    table = root / "val/val_annotations.txt"
    if table.exists() and (root / "val/images").is_dir():  # Tiny ImageNet's: file, class, a box
        found["val"] = {}
        for file, k in re.findall(r"^(\S+)\t(\S+)", table.read_text(errors="replace"), re.M):
            found["val"].setdefault(k, []).append(str(root / "val/images" / file))
    classes, splits, report = sorted({k for by_class in found.values() for k in by_class}), [], ""
    lacking = [k for k in classes if not all(by_class.get(k) for by_class in found.values())]
    if lacking or len(classes) < 2:
        missing = ", ".join(lacking) or "at least two classes are needed"
        where = f"{root}/train/<class>/, {root}/val/<class>/"
        tiny = args.dataset == "tinyimagenet"
        advice = f"unpack {TINY_IMAGENET} in {root.parent}/" if tiny else "shapes needs no files"
        raise UserError(f"--data-dir: no images in {where}: {missing} ({advice})")
    for split, by_class in found.items():
        paths = [path for k in classes for path in by_class[k]]
        labels = torch.tensor([label for label, k in enumerate(classes) for _ in by_class[k]])
        splits.append(_read_images(np.array(paths, object), labels, args, odd[split]))
        report += say_what_is_odd(split, len(splits[-1].labels), odd[split])
    if (words := root / "words.txt").exists():  # Tiny ImageNet's names of its classes
        named = dict(re.findall(r"^(\S+)\t(.+)", words.read_text(errors="replace"), re.M))
        classes = [named.get(k, k).split(",")[0] for k in classes]
    return splits[0], splits[-1], classes, report


def _files_by_class(root, odd):
    """Class -> its images' paths, in torchvision's order, hidden ones left out; others -> `odd`."""
    extensions = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    by_class = {path.name: [] for path in root.glob("[!.]*") if path.is_dir()}
    for name, paths in by_class.items():
        everything = glob.glob(f"{glob.escape(str(root / name))}/**/*", recursive=True)
        for path in sorted(everything, key=os.path.split):
            if os.path.splitext(path)[1].lower() in extensions:
                paths.append(path)
            elif not os.path.isdir(path):
                odd.setdefault("left out, not images", []).append(path)
    return by_class


def say_what_is_odd(split: str, count: int, odd: dict[str, list[str]]) -> str:
    """Print one line about the files of a split. Returns: all of it, a line each, for the run."""
    odd = {what: names for what, names in odd.items() if names}
    kinds = [f"{len(names):,} {what} ({', '.join(names[:3])})" for what, names in odd.items()]
    if kinds:
        print("; ".join([f"{split}: {count:,} images", *kinds]), flush=True)
    return "".join(f"{split}: {what}: {name}\n" for what, names in odd.items() for name in names)


def _read_images(paths, labels, args, odd):
    """A split: all images as one tensor, the centre square of each, scaled to the image size.
    ImageNet's stay paths, and are read here only to find what --skip-bad-images leaves out."""
    in_memory, skip = args.dataset != "imagenet", getattr(args, "skip_bad_images", False)
    if not in_memory and not skip:
        return Split(paths, labels)
    size, kept = (args.image_size, args.image_size), []
    images = torch.empty(len(paths) * in_memory, *size, 3, dtype=torch.uint8)

    def read(path):
        try:
            image = read_rgb(path)
        except UserError as error:
            return error, ["left out, unreadable"]
        fitted = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(fitted)), image.info["remarks"]

    with ThreadPoolExecutor(max(1, cores() if args.workers is None else args.workers)) as pool:
        for index, (image, remarks) in enumerate(pool.map(read, paths)):
            for remark in remarks:
                odd.setdefault(remark, []).append(paths[index])
            if isinstance(image, UserError):
                if not skip:
                    raise UserError(f"{image}, or leave it out by --skip-bad-images")
                continue
            if in_memory:
                images[len(kept)] = image
            kept.append(index)
    return Split(images[: len(kept)] if in_memory else paths[kept], labels[kept])


def read_rgb(path, upright: bool = True) -> Image.Image:
    """Any image of 8 bits as RGB; `.info["remarks"]`: what was changed. UserError: unreadable.
    upright: turned as its EXIF data says, and not as stored."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file")
        with Image.open(path) as file:
            # Which of its values is white? convert() would clip them, or cut them to 8 bits.
            if file.mode[0] in "IF" or ";16" in str(file.tile):
                raise ValueError("more than 8 bits a channel: convert it to 8")
            turned = upright and file.getexif().get(274, 1) in range(2, 9)  # 274: orientation
            image = (ImageOps.exif_transpose(file) if turned else file).convert("RGB")
            remarks = ["turned upright, as their EXIF data says"] if turned else []
            image.info["remarks"] = remarks + [f"{file.mode} turned to RGB"] * (file.mode != "RGB")
            return image
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UserError(f"{path}: cannot be read as an image ({error}); replace it") from None


# --- Synthetic images: a data set without files ----------------------------------------------
# `--dataset shapes` runs anywhere, in minutes. Committed results rest on it: no pixel may change.

SHAPES = ("disc", "triangle", "square", "star", "cross", "ring")
TEXTURES = ("plain", "stripes", "checks", "dots")
SHAPE_CLASSES = [f"{texture}-{shape}" for shape in SHAPES for texture in TEXTURES]


def shape_outlines():
    """Of each shape: the radius at 256 angles from -pi to pi [6,256] and that of its hole [6]."""
    angles = np.linspace(-np.pi, np.pi, 256, endpoint=False, dtype=np.float32)

    def polygon(corners):
        step = 2 * np.pi / corners
        return np.cos(step / 2) / np.cos(np.mod(angles, step) - step / 2)

    star = 0.7 + 0.3 * np.cos(5 * angles)
    near = np.minimum(np.abs(np.cos(angles)), np.abs(np.sin(angles)))  # cross: bars of half-width
    far = np.maximum(np.abs(np.cos(angles)), np.abs(np.sin(angles)))
    cross = np.minimum(0.35 / np.maximum(near, 1e-3), 1 / far)
    ones = np.ones_like(angles)
    outlines = np.stack([ones, 1.2 * polygon(3), polygon(4), star, cross, ones]).astype(np.float32)
    return outlines, np.array([0, 0, 0, 0, 0, 0.55], np.float32)


def draw_shapes(count: int, seed: int, size: int = 32) -> Split:
    """One textured shape per image, 24 balanced classes (6 shapes x 4 textures). Colour, position,
    size, rotation, brightness gradient, clutter and noise vary with the seed."""
    rng = np.random.default_rng(seed)
    outlines, holes = shape_outlines()
    labels = rng.permutation(np.arange(count) % len(SHAPE_CLASSES))
    images = np.empty((count, size, size, 3), np.uint8)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1  # pixel centres in -1..1
    for start in range(0, count, 500):  # in chunks that stay in the processor's cache
        label = labels[start : start + 500]
        n = len(label)
        shape, texture = label // len(TEXTURES), label % len(TEXTURES)

        def uniform(low, high, *tail, n=n):
            return rng.uniform(low, high, (n, *tail)).astype(np.float32)

        # Background: two colours blended along a random direction.
        turn = uniform(0, 2 * np.pi, 1, 1)
        ramp = 0.5 + 0.35 * (np.cos(turn) * axis[:, None] + np.sin(turn) * axis)
        first, second = uniform(0.1, 0.6, 1, 1, 3), uniform(0.1, 0.6, 1, 1, 3)
        canvas = first + ramp[..., None] * (second - first)
        # Clutter: a bar across the image behind the shape, and one in front of it.
        bars = []
        for _ in range(2):
            turn, offset = uniform(0, np.pi, 1, 1), uniform(-0.9, 0.9, 1, 1)
            distance = np.abs(np.cos(turn) * axis[:, None] + np.sin(turn) * axis - offset)
            bars.append((distance < uniform(0.02, 0.09, 1, 1), uniform(0, 1, 1, 1, 3)))
        (mask, colour), (front, front_colour) = bars
        canvas = np.where(mask[..., None], colour, canvas)
        # The shape, in its own turned and scaled coordinates u, v.
        radius, turn = uniform(0.45, 0.75, 1, 1), uniform(-np.pi, np.pi, 1, 1)
        y = axis[:, None] - uniform(-0.3, 0.3, 1, 1)
        x = axis - uniform(-0.3, 0.3, 1, 1)
        u = (np.cos(turn) * x + np.sin(turn) * y) / radius
        v = (np.cos(turn) * y - np.sin(turn) * x) / radius
        rho = np.sqrt(u * u + v * v)
        bin_ = ((np.arctan2(v, u) + np.pi) * (256 / (2 * np.pi))).astype(np.int32) % 256
        inside = (rho < outlines[shape[:, None, None], bin_]) & (rho > holes[shape][:, None, None])
        # Its texture: which of two colours a pixel has.
        pitch = uniform(5, 7, 1, 1)
        su, sv = np.sin(pitch * u), np.sin(pitch * v)
        kinds = np.stack([np.zeros_like(inside), su > 0, su * sv > 0, su + sv > 0.9])
        one, other = uniform(0.5, 1, 1, 1, 3), uniform(0, 0.3, 1, 1, 3)
        painted = np.where(kinds[texture, np.arange(n)][..., None], other, one)
        canvas = np.where(inside[..., None], painted, canvas)
        canvas = np.where(front[..., None], front_colour, canvas)
        canvas += rng.standard_normal(canvas.shape, np.float32) * uniform(0.02, 0.06, 1, 1, 1)
        images[start : start + n] = (canvas.clip(0, 1) * 255).astype(np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


# --- Files of a run: replaced whole or not at all --------------------------------------------
# Training is long and machines stop. Whatever is written is written beside its target, synced and
# renamed, and a run continues with --resume to the same bits as if it had never stopped.


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the target, sync, then rename over it: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_whole(path: Path, state) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def cached(path: Path | None, made_by, compute, *args):
    """The value in the file at `path` if it was `made_by` the very same things; else what
    `compute(*args)` returns on all ranks together, which is saved there (None: nowhere)."""
    saved = None
    with contextlib.suppress(UserError):  # a missing or damaged file is made anew
        saved = read_checkpoint(path) if path and rank() == 0 else None
    saved = gather_objects(saved)[0]
    if isinstance(saved, dict) and saved.get("made_by") == made_by:
        return saved["value"]
    value = compute(*args)
    try:
        if path and rank() == 0:
            save_whole(path, {"made_by": made_by, "value": value})
    except OSError as error:
        print(f"note: {path} cannot be written ({error}), so it is not cached", file=sys.stderr)
    return value


# What may differ under --resume: it decides nothing, or names files whose content is compared.
FREE = """resume out device workers compare seeds eval script method plot save_minutes tensorboard
per_class predict train_teacher teacher_ckpt student_ckpt pretrained_teacher teacher_cache data_dir
skip_bad_images""".split()
RUN_FILES = ("last.pt", "metrics.jsonl", "result.json", "student.pt", "data_report.txt")


def lasting(args) -> dict:
    """What decides the outcome of a run: its arguments and the number of ranks."""
    return {k: v for k, v in vars(args).items() if k not in FREE} | {"ranks": world()}


def _changed(saved: dict, wanted: dict) -> list[str]:
    """Names of what differs; a flag that did not exist yet was not given."""
    return [k for k, v in wanted.items() if (saved[k] != v if k in saved else v)]


def read_last(path: Path) -> dict:
    """A run's `last.pt`. Raises: UserError if it is something else."""
    saved = read_checkpoint(path)
    parts = dict(step=int, state=dict, args=dict, history=list, ranks=list)
    if not isinstance(saved, dict) or any(type(saved.get(k)) is not t for k, t in parts.items()):
        raise UserError(f"{path}: not a run's last.pt; move its folder away to start again")
    return saved


class TeacherCache:
    """The teacher's logits and embeddings for every batch, on disk: computed once, then read. The
    folder's name is a hash of all that decides them: another teacher's cache is never read."""

    STEPS = 32  # in a file: a checksum, then their outputs as float32; an epoch's last has fewer

    def __init__(self, args, data, teacher, epochs: int):
        key = [3, teacher.hash, data.name, data.fingerprint, data.image_size, args.seed]
        key += [args.batch_size, args.precision, rank(), world(), torch.__version__]
        key += [device_name(data.device), args.compile]  # on which the bits depend
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder, self.path, self.device = Path(args.teacher_cache, name), None, data.device
        self.steps, self.widths = data.steps(args.batch_size), [data.num_classes, teacher.embed_dim]
        self.shape = (math.ceil(args.batch_size / world()), sum(self.widths))  # of a step, at most
        paths = {self._path(epoch, n) for epoch in range(epochs) for n in range(self.steps)}
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = len(paths - set(self.folder.iterdir())) / len(paths)
        if missing and not os.access(self.folder, os.W_OK):
            raise UserError(f"--teacher-cache {self.folder}: cannot be written")
        free = shutil.disk_usage(self.folder).free / 1e9
        whole = 4e-9 * epochs * self.steps * math.prod(self.shape)
        size = f"{whole:.2f} GB a rank, of which {100 * missing:.0f} % are still to compute"
        print(f"teacher cache: {self.folder}, {size}", flush=True)
        if missing * whole * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > free:
            raise UserError(f"--teacher-cache: the disk has {free:.2f} GB free; use another folder")

    def _path(self, epoch, number):
        return self.folder / f"epoch{epoch}-{number // self.STEPS}.bin"

    def _open(self, path, count):
        """Read the outputs of `count` steps, if they are there."""
        self.path, self.missing, self.outputs = path, count, torch.zeros(count, *self.shape)
        if path.exists():
            content = bytearray(path.read_bytes())
            checksum, content = content[:4], content[4:]
            whole = len(content) == self.outputs.nbytes
            if whole and checksum == zlib.crc32(content).to_bytes(4, "big"):
                self.outputs = torch.frombuffer(content, dtype=torch.float32).view_as(self.outputs)
                self.missing = 0
            else:
                print(f"note: {path} is damaged and is computed again", file=sys.stderr)

    def ask(self, teacher, images, epoch: int, number: int):
        """The outputs for batch `number` of an epoch."""
        path, slot = self._path(epoch, number), number % self.STEPS
        if path != self.path:
            self._open(path, min(self.STEPS, self.steps - number + slot))
        output = self.outputs[slot, : len(images)]
        if not self.missing:
            logits, embedding = output.to(self.device).split(self.widths, 1)
            return logits, Features(embedding, [], [])
        logits, features = teacher(images, return_features=True)
        output.copy_(torch.cat([logits.float(), features.embedding.float()], 1))
        self.missing -= 1
        if not self.missing:  # not after a resume in between: a later run fills that in
            content = self.outputs.numpy().tobytes()
            write_whole(self.path, zlib.crc32(content).to_bytes(4, "big") + content)
        return logits, features


class Run:
    """One training run: its folder, its steps and its log.

    The folder `--out` holds `last.pt` (all that is needed to resume; saved after every epoch, every
    --save-minutes and when a signal asks for a stop), `metrics.jsonl`, and at the end `result.json`
    and `student.pt`. All ranks read; rank 0 writes.

    Args: args: the command line; data: from `load_data`; figures: PNG files that the script draws.
    Raises: UserError (no run to resume, or another; a folder in use). Attributes: step, from 0, of
        total_steps; history, by epoch; step_seed, of every seed and step; teacher, for steps."""

    def __init__(self, args, data, figures: tuple[str, ...] = ()):
        self.args, self.data, self.dir = args, data, Path(args.out)
        self.files, self.last = (*RUN_FILES, *figures), self.dir / "last.pt"
        self.steps = data.steps(args.batch_size)  # in a whole epoch
        self.total_steps = getattr(args, "iterations", None) or args.epochs * self.steps
        self.num_epochs = math.ceil(self.total_steps / self.steps)  # --iterations: the last is cut
        self.history, self.step, self.done_in_epoch = [], 0, 0
        self.cache = self.board = self.saved = self.saved_meter = None
        wait_for_all()  # nobody reads what an earlier run is still writing
        if args.resume and self.last.exists():
            self.saved = read_last(self.last)
            old, now = self.saved["args"], lasting(args)
            if new := _changed(old, now):
                was = ", ".join(f"--{k.replace('_', '-')} {old.get(k)} (now {now[k]})" for k in new)
                raise UserError(f"--resume: {self.dir} was started with {was}: give the same again")
        elif args.resume and not (self.dir / ".lock").exists():
            raise UserError(f"--resume: nothing to resume in {self.dir} (no last.pt)")
        wait_for_all()
        if rank() == 0:
            self._claim()

    def _claim(self):
        """Lock the folder until the process ends, and clear what a killed run left half-written."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.dir / ".lock", "w")  # its presence says that a run was started here
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # other errors: a file system that has no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"--out {self.dir}: another program is at work there") from None
        for name in (*self.files, "class_means.pt"):
            for half_written in self.dir.glob(f"{name}.*.tmp"):
                half_written.unlink()
        if self.args.tensorboard:
            board = optional("torch.utils.tensorboard", "--tensorboard")
            self.board = board.SummaryWriter(self.dir / "tensorboard", flush_secs=10)

    def start(self, teacher: nn.Module | None = None, **objects) -> None:
        """Begin, or continue under --resume. objects: `student`, other modules and the `optimizer`,
        whose state is saved; other values, and the teacher, must be the same in a resumed run."""
        args, self.teacher = self.args, teacher
        teacher_hash = None if teacher is None else teacher.hash
        self.objects = objects | {"data": self.data.fingerprint, "teacher": teacher_hash}
        if len(set(gather_objects((self.data.fingerprint, teacher_hash)))) > 1:
            raise UserError("torchrun: the data or the teacher differs between ranks")
        if teacher is not None and getattr(args, "teacher_cache", None):
            self.cache = TeacherCache(args, self.data, teacher, self.num_epochs)
        # Dropout: the same whatever was built before, and each rank's own for its own images.
        torch.manual_seed((args.seed + 7919 * rank()) % 2**63)
        if self.saved is not None:
            self._restore()
        else:
            if rank() == 0:
                self._set_aside()
            for module in objects.values():
                if isinstance(module, nn.Module):  # all ranks begin with the weights of rank 0
                    broadcast([*module.parameters(), *module.buffers()])
            self._save()
        _signals.saved = True
        if teacher is not None and args.precision == "bf16":  # rounded once, not in every step
            self.teacher = copy.deepcopy(teacher)
            layers = [m for m in self.teacher.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
            nn.ModuleList(layers).bfloat16()
        if getattr(args, "compile", False):
            torch.compiler.reset()  # a resumed run must not inherit the kernels of an earlier one
            for network in filter(None, (objects["student"], self.teacher)):
                network.compile(dynamic=False, mode="reduce-overhead")  # with CUDA graphs

    def _set_aside(self):
        """Move the files of an earlier run to a folder old1, old2, ...: nothing is overwritten."""
        if earlier := [name for name in self.files if (self.dir / name).exists()]:
            taken = [int(p.name[3:]) for p in self.dir.glob("old*") if p.name[3:].isdigit()]
            aside = self.dir / f"old{max(taken, default=0) + 1}"
            aside.mkdir()
            for name in earlier:
                (self.dir / name).rename(aside / name)
            print(f"note: the run that was in {self.dir} is kept in {aside}", file=sys.stderr)

    def _restore(self):
        saved, self.saved = self.saved, None
        try:
            mine = saved["ranks"][rank()]
            for name, value in self.objects.items():
                state = saved["state"][name]
                if hasattr(value, "load_state_dict"):
                    value.load_state_dict(state)
                elif value != state:
                    raise ValueError(f"the {name} is another one")
            torch.set_rng_state(mine["rng"])
            if mine["cuda_rng"] is not None and self.data.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda_rng"])
            self.saved_meter = mine["meter"]
        except Exception as error:  # whatever else such a file may hold
            reason = [*str(error).splitlines(), ""][0]
            raise UserError(f"--resume: {self.last} is of another run: {reason}") from None
        self.history, self.done_in_epoch = saved["history"], saved["step"]
        self.last_save = time.monotonic()

    def _save(self, step=0, meter=None):
        state = {}
        for name, value in self.objects.items():
            state[name] = value.state_dict() if hasattr(value, "state_dict") else value
            tensors = state[name].values() if isinstance(value, nn.Module) else ()
            finite = [torch.isfinite(tensor).all() for tensor in tensors]  # read together: one wait
            if finite and not torch.stack(finite).all():
                raise diverged(f"a weight of the {name}", len(self.history) + (meter is not None))
        cuda_rng = torch.cuda.get_rng_state() if self.data.device.type == "cuda" else None
        mine = dict(meter=meter and meter.state(), rng=torch.get_rng_state(), cuda_rng=cuda_rng)
        ranks = gather_objects(mine)
        self.last_save = time.monotonic()
        if rank() == 0:
            content = dict(step=step, state=state, ranks=ranks, history=self.history)
            save_whole(self.last, content | {"args": lasting(self.args)})

    def epochs(self):
        """The numbers of the epochs still to do, from 0."""
        for epoch in range(len(self.history), self.num_epochs):
            self.epoch = epoch
            yield epoch

    def batches(self):
        """This rank's part of every batch of the epoch that is still to do. After a step everything
        is saved if --save-minutes have passed or a signal came, which then ends the program."""
        first = self.done_in_epoch
        last = min(self.steps, self.total_steps - self.epoch * self.steps)
        self.meter, self.saved_meter = Meter(self, self.saved_meter), None
        self.log = self.meter.add  # what the scripts call in every step
        seed = self.args.seed * 100_003 + self.epoch  # another for every seed and epoch
        _signals.waiting, self.step = True, self.epoch * self.steps + first - 1
        batches = self.data.train_batches(self.args.batch_size, seed, first, last)
        for number, batch in enumerate(batches, first):
            self.step = self.epoch * self.steps + number
            self.step_seed = seed * self.steps + number
            yield batch
            late = time.monotonic() - self.last_save > 60 * self.args.save_minutes
            save, stop = map(max, zip(*gather_objects((late, _signals.pending))))  # all agree
            if stop or (save and number + 1 < last):  # else end_epoch saves, after the test
                self._save(number + 1, self.meter)
            if stop:
                raise Stopped(stop)
        self.done_in_epoch = 0
        self.metrics = self.meter.close()

    @torch.no_grad()
    def ask_teacher(self, images: Tensor, maps: bool = False):
        """The teacher's (logits, Features) for this batch. maps: feature maps too (not cached)."""
        if maps and self.cache is not None:
            print("note: --teacher-cache holds no feature maps, so the teacher runs in every step")
            self.cache = None
        if self.cache is None:
            return self.teacher(images, return_features=True)
        return self.cache.ask(self.teacher, images, self.epoch, self.step % self.steps)

    def all_gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the whole batch [B,...], from this rank's share of it [b,...]; half
        precision becomes float32. Differentiable, for losses that all ranks compute alike."""
        half = (torch.bfloat16, torch.float16)
        tensors = tuple(t.float() if t.dtype in half else t for t in tensors)
        if world() == 1:
            return tensors
        total, gathered = sum(gather_objects(len(tensors[0]))), []
        mine = share(total)
        for tensor in tensors:
            whole = tensor.new_zeros(total, *tensor.shape[1:])
            whole[mine] = tensor.detach()
            dist.all_reduce(whole)  # the shares differ in size, and each is zero elsewhere
            # The loss of every rank has a gradient for these rows: as many as there are ranks.
            whole[mine] = tensor + (world() - 1) * (tensor - tensor.detach())
            gathered.append(whole)
        return tuple(gathered)

    def mean_over_ranks(self, loss: Tensor, images: int) -> Tensor:
        """The loss of the whole batch, from the mean over this rank's `images`: differentiable, for
        losses of one image at a time, whose inputs would be large to all-gather."""
        if world() == 1:
            return loss
        [losses] = self.all_gather(loss.expand(images))  # one for each image
        return losses.mean()

    def average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Give everything that the optimizer trains the mean of the ranks' gradients."""
        if world() > 1:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in trained if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= world()
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
                gradient.copy_(mean.view_as(gradient))

    def end_epoch(self, **scores) -> None:
        """Print and keep the epoch's metrics and scores, and everything needed to go on."""
        lr = self.objects["optimizer"].param_groups[0]["lr"]
        first = next(iter(scores))  # of detection's many
        self.meter.show(self.metrics | {first: scores[first], "lr": lr})
        self.history.append(self.metrics | scores | {"lr": lr})
        self._save()
        self._write_logs()
        for name, value in self.history[-1].items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, self.epoch + 1)
        if stop := max(gather_objects(_signals.pending)):
            raise Stopped(stop)
        _signals.waiting = False

    def _write_logs(self):
        if rank() == 0:
            lines = "".join(json.dumps(line) + "\n" for line in self.history)
            write_whole(self.dir / "metrics.jsonl", lines.encode())
            if self.data.report:
                write_whole(self.dir / "data_report.txt", self.data.report.encode())

    def finish(self, **more) -> dict:
        """Write `student.pt` and `result.json`, with `more` in it. Returns: the result."""
        args, data, lines = self.args, self.data, self.history
        seconds = sum(line["seconds"] for line in lines)
        rate = sum(line["images_per_second"] * line["seconds"] for line in lines) / seconds
        result = {name: getattr(args, name) for name in ("method", "dataset", "teacher", "student")}
        result |= dict(seed=args.seed, epochs=self.num_epochs, world_size=world())
        result |= dict(train_images=data.train_images, test_images=data.test_images)
        result |= dict(data_hash=data.fingerprint, teacher_hash=self.objects["teacher"])
        if "test_top1" in lines[-1]:
            teacher_top1 = getattr(self.teacher, "top1", None)
            result |= dict(student_top1=lines[-1]["test_top1"], teacher_top1=teacher_top1)
        kept = {k: v for k, v in vars(args).items() if k not in ("resume", "compare", "seeds")}
        result |= more | dict(seconds=round(seconds, 3), images_per_second=round(rate, 1))
        result |= dict(script=f"{args.script}.py", argv=sys.argv[1:], args=kept)
        result |= environment(data.device)
        self._write_logs()  # again: a stop may have come between last.pt and it
        if rank() == 0:
            student = self.objects["student"].state_dict()
            save_whole(self.dir / "student.pt", {k: v.cpu() for k, v in student.items()})
            path = self.dir / "result.json"
            try:  # a finished run that was resumed keeps the commit and the machine of its training
                json.loads(path.read_text())
            except (OSError, ValueError):
                write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
        wait_for_all()  # the files are there
        return result


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def environment(device) -> dict:
    """What a result needs beside its arguments to be understood, and perhaps repeated."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    modules = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32  # of convolutions, under fp32
    versions = {"python": sys.version.split()[0]} | modules
    return dict(commit=commit, versions=versions, device=device_name(device), tf32=tf32)


def diverged(what: str, epoch: int) -> UserError:
    advice = "lower --lr (of a teacher: --teacher-lr) or the weight of a loss"
    return UserError(f"{what} became infinite or nan in epoch {epoch}: {advice}, and start again")


class Meter:
    """Means of the loss terms over an epoch, the progress line, and the watch for nan. The values
    stay on the device and are read together twice a second, so that a GPU is rarely waited for."""

    def __init__(self, run, saved: dict | None):
        self.run, self.rows, self.shown = run, [], time.perf_counter()
        self.saved = saved or dict(images=0, sums=0.0, names=(), seconds=0.0, of_this_rank=False)
        vars(self).update(self.saved)
        self.start = self.shown - self.seconds
        self.live = bool(sys.stdout) and sys.stdout.isatty()

    def state(self) -> dict:
        """What a checkpoint within an epoch needs of it."""
        self.read()
        self.seconds = time.perf_counter() - self.start
        return {name: getattr(self, name) for name in self.saved}

    @torch.no_grad()
    def add(self, terms: dict, samples, logits: Tensor | None = None) -> None:
        """Count one step. terms: name -> a scalar tensor (a plain number is a term that is off);
        samples: labels [B], or image ids (detection); logits [B,K]: for the training accuracy."""
        row = {name: value.float() for name, value in terms.items() if torch.is_tensor(value)}
        self.names = tuple(row)
        if logits is not None:
            row["correct"] = (logits.argmax(1) == samples).float().mean()
        self.rows.append((len(samples), torch.stack([*row.values()])))
        self.of_this_rank = logits is None  # detection: its losses are not of the whole batch
        if self.of_this_rank:  # steps are slow, and single images can be the cause of nan
            self.read(f" of images {', '.join(map(str, samples))}")
        if time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            self.read()
            if self.live:
                self.show(self.metrics(), end="")

    def read(self, where: str = "") -> None:
        """Add up the rows so far. Raises: UserError if a loss term is infinite or nan."""
        if not self.rows:
            return
        counts, rows = zip(*self.rows)
        rows = torch.stack(rows).cpu().double()  # [steps, terms]
        broken = ~torch.isfinite(rows)
        if broken.any():
            first = broken[broken.any(1)][0]  # later terms break because the weights did
            names = [name for name, bad in zip(self.names, first.tolist()) if bad]
            print("\n" * self.live, end="", flush=True)
            raise diverged(f"the loss term {' and '.join(names)}{where}", self.run.epoch + 1)
        self.sums = self.sums + (rows * torch.tensor(counts)[:, None]).sum(0)
        self.images, self.rows = self.images + sum(counts), []

    def metrics(self) -> dict:
        """The means so far, train top-1 in % (not in detection), seconds and images/s."""
        means = (self.sums / self.images).tolist()
        metrics = {"epoch": self.run.epoch + 1}
        metrics |= {name: float(f"{mean:.6g}") for name, mean in zip(self.names, means)}
        if len(means) > len(self.names):
            metrics["train_top1"] = round(100 * means[-1], 3)
        seconds = time.perf_counter() - self.start
        rate = round(self.images / seconds, 1)
        return metrics | {"seconds": round(seconds, 3), "images_per_second": rate}

    def close(self) -> dict:
        """The metrics of the whole epoch, over all ranks."""
        self.read()
        if self.of_this_rank:
            sum_over_ranks(self.sums)
            self.images = sum(gather_objects(self.images))
        return self.metrics()

    def show(self, metrics: dict, end: str = "\n") -> None:
        """Print the progress line: how fast first, since a terminal may cut the rest."""
        run, values = self.run, dict(metrics)
        seconds, rate = values.pop("seconds"), values.pop("images_per_second")
        left = int((run.total_steps - run.step - 1) * seconds / (run.step % run.steps + 1))
        line = f"epoch {values.pop('epoch'):3d}/{run.num_epochs}  {rate:6g} images/s"
        line += f"  {datetime.timedelta(seconds=left)} left  "
        line += "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not end:  # \r cannot go back over a line that was wrapped
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line}\x1b[K" if self.live else line, end=end, flush=True)


# --- Evaluation, figures and the teacher -----------------------------------------------------
# Every script evaluates alike, and every method must be able to name its teacher: one from a file,
# one with published weights, or one that the script trains first and every later run reuses.


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises: UserError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    counts = dict(cpu=1, cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()))
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) or int(index or 0) >= counts[kind]:
        raise UserError(f"--device {name}: PyTorch sees no such device; use --device cpu or auto")
    if kind == "cuda":  # what asks for "the" GPU must mean this one
        torch.cuda.set_device(int(index or torch.cuda.current_device()))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def autocast(args):
    """bfloat16 for convolutions and matrix products under --precision bf16, else nothing."""
    device = pick_device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")


def sgd_or_adamw(args, parameters) -> torch.optim.Optimizer:
    """SGD, as in the papers, or AdamW (--optimizer) for parameters or groups of them."""
    fused = pick_device(args.device).type == "cuda"  # all parameters in one kernel
    options = dict(weight_decay=args.weight_decay, fused=fused or None)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, args.lr, **options)
    return torch.optim.SGD(parameters, args.lr, args.momentum, nesterov=args.nesterov, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, run=None) -> None:
    """Give every parameter group this learning rate. AdamW has a schedule of its own, ours: linear
    warm-up in the first 5 % of the run's steps, times half a cosine that ends at 0."""
    if isinstance(optimizer, torch.optim.AdamW):
        done = (run.step + 1) / (run.total_steps + 1)
        lr = run.args.lr * min(1.0, 20 * done) * (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, args) -> float:
    """Top-1 accuracy on the test split, in %. Leaves the model in eval mode. The ranks share the
    images; BatchNorm's statistics, of which every rank has its own, are those of rank 0."""
    model.eval()
    broadcast(model.buffers())
    correct = torch.zeros((), dtype=torch.int64, device=data.device)
    for images, labels in data.batches("test", 500, shared=True):
        with autocast(args):
            correct += (model(images).argmax(1) == labels).sum()
    sum_over_ranks(correct)
    return round(100 * int(correct) / len(data.test.labels), 3)


def optional(module: str, asked_by: str):
    """A module that only one flag needs. Raises: UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = "tensorboard" if "tensorboard" in module else module.split(".")[0]
        raise UserError(f"{asked_by} needs {name}: pip install {name}") from None


def pyplot(asked_by: str = "--plot"):
    """matplotlib's pyplot, drawing into files. Raises: UserError if it is not installed."""
    plt = optional("matplotlib.pyplot", asked_by)
    plt.switch_backend("agg")
    plt.rcParams["text.parse_math"] = False  # in a class name, $ is a letter
    return plt


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG (rank 0 only) and close it."""
    if rank() == 0:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        write_whole(path, buffer.getvalue())
        print(f"figure: {path}", flush=True)
    pyplot().close(figure)


def load_teacher(teacher: nn.Module, args, data: Data, distill) -> nn.Module:
    """Give the teacher its weights, freeze it and evaluate it. The weights are those of
    --teacher-ckpt; with --pretrained-teacher the published ones; else those in `checkpoints/`,
    where a teacher is trained first, by `distill` without a teacher.
    Args: teacher: from `build_for`; distill: the calling script's own function.
    Returns: the teacher on the device, in eval mode, with `.top1` (%) and `.hash` of its weights.
    Raises: UserError if weights do not fit, are near chance or were trained with other settings."""
    path = Path(args.teacher_ckpt or f"checkpoints/{args.dataset}_{args.teacher}.pt")
    if args.pretrained_teacher and data.num_classes == 1000:
        path, teacher = "torchvision", build_for(data, args.teacher, pretrained=True)
    elif args.pretrained_teacher:
        path = _published(f"{args.dataset}_{args.teacher}")
    elif not args.teacher_ckpt:
        new = {k: v if k in TEACHER_KEEPS.split() else 0.0 for k, v in vars(args).items()}
        new |= dict(student=args.teacher, teacher=None, teacher_ckpt=None, method="teacher")
        new |= dict(ce_weight=1.0, lr=args.teacher_lr, epochs=args.teacher_epochs)
        new |= dict(seed=0)  # whatever the students' seeds: all of them learn from one teacher
        new |= dict(out=f"runs/teacher-{args.dataset}-{args.teacher}", resume=False)
        teacher_checkpoint(path, argparse.Namespace(**new), data, distill)
    if path != "torchvision":
        load_weights(teacher, path)
    teacher = teacher.to(data.device, memory_format=torch.channels_last).requires_grad_(False)
    teacher.hash = state_hash(teacher)
    key = (teacher.hash, data.fingerprint, args.precision, device_name(data.device))
    if key not in _EVALUATED:
        file = args.teacher_cache and Path(args.teacher_cache, f"top1-{'-'.join(key[:2])}.pt")
        _EVALUATED[key] = cached(file, key, evaluate, teacher, data, args)
        print(f"teacher {args.teacher} from {path}: test {_EVALUATED[key]:.2f} %", flush=True)
        if near_chance(_EVALUATED[key], data.num_classes):
            problem = f"{path}: {_EVALUATED[key]:.2f} % on the test images is near chance"
            if args.teacher_ckpt or args.pretrained_teacher:
                raise UserError(f"{problem}: untrained, or of other classes or preprocessing?")
            print(f"warning: {problem}: train it longer (--teacher-epochs)", file=sys.stderr)
    teacher.top1 = _EVALUATED[key]
    return teacher.eval()


# Published weights of CIFAR teachers (BSD-3), and how the SHA-256 of each file begins.
RELEASE = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet"
PUBLISHED = dict(name.split("-") for name in """cifar100_resnet20-23dac2f1
cifar100_resnet32-84213ce6 cifar100_resnet44-ffe32858 cifar100_resnet56-f2eff4c8
cifar10_resnet20-4118986f cifar10_resnet32-ef93fc4d cifar10_resnet44-2a3cabcb
cifar10_resnet56-187c023a""".split())  # fmt: skip


def _published(name: str) -> Path:
    """The file of published weights in PyTorch's hub cache, downloaded if it is not there."""
    if name not in PUBLISHED:
        raise UserError(f"--pretrained-teacher: not {name}; imagenet, or one of {list(PUBLISHED)}")
    file = f"{name}-{PUBLISHED[name]}.pt"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        with one_rank_first():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(f"{RELEASE}/{file}", str(path), progress=False)
    except OSError as error:
        todo = f"({error}); put that file into {path.parent}"
        raise UserError(f"cannot download {RELEASE}/{file} {todo}") from None
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(PUBLISHED[name]):
        raise UserError(f"{path}: damaged or another file; delete it")
    return path


def near_chance(top1: float, num_classes: int) -> bool:
    """Below twice chance, or below chance + 10 points where that is lower (few classes)."""
    return top1 < min(200 / num_classes, 100 / num_classes + 10)


# What a teacher's training shares with its student's; all else is off, such as the method's losses.
TEACHER_OPTIMIZER = "recipe optimizer lr batch_size momentum nesterov weight_decay"
TEACHER_KEEPS = f"""{TEACHER_OPTIMIZER} script dataset data_dir image_size mean std train_size
val_size skip_bad_images precision device workers compile pretrained save_minutes tensorboard"""
# What decides its weights, besides the data; recorded in its checkpoint.
TEACHER_RECIPE = f"{TEACHER_OPTIMIZER} student epochs seed precision image_size pretrained script"


def teacher_checkpoint(path: Path, args, data, train, more_recipe: tuple[str, ...] = ()) -> None:
    """Make sure that `path` holds a teacher trained with `args`, by `train(args)` if there is none.
    more_recipe: further arguments that decide its weights. UserError: it had other settings."""
    recipe = {name: getattr(args, name, None) for name in [*TEACHER_RECIPE.split(), *more_recipe]}
    recipe |= {"data": data.fingerprint, "images": data.train_images}
    if not gather_objects(path.exists())[0]:
        print(f"teacher: no {path}; training it for {args.epochs} epochs", flush=True)
        if rank() == 0:
            path.parent.mkdir(exist_ok=True)
        with contextlib.suppress(UserError):  # continue with a teacher that was stopped half-way
            last = read_last(Path(args.out) / "last.pt")
            same_data = last["state"].get("data") == data.fingerprint
            args.resume = same_data and not _changed(last["args"], lasting(args))
        result = train(args)
        if rank() == 0:
            weights = read_checkpoint(Path(args.out) / "student.pt")
            score = result.get("student_top1", result.get("student_ap"))
            save_whole(path, {"model": weights, "recipe": recipe, "score": score})
        wait_for_all()
    saved = read_checkpoint(path)
    saved = saved.get("recipe") if isinstance(saved, dict) else None
    saved = saved if isinstance(saved, dict) else {}
    other = {k: f"{k} {saved.get(k)} (asked: {v})" for k, v in recipe.items() if saved.get(k) != v}
    if "script" in other and saved.get("script"):
        # Another method's script has its own optimizer by default: its teacher serves all scripts.
        different = [other.pop(k) for k in ["script", *TEACHER_OPTIMIZER.split()] if k in other]
        print(f"note: {path} was trained with {', '.join(different)}; used as it is", flush=True)
    if other:
        advice = f"Match them, pass --teacher-ckpt {path} to accept it, or delete it to retrain"
        problem = f"{path} was trained with different settings: {', '.join(other.values())}"
        raise UserError(f"{problem}. {advice}")


# --- The command line ------------------------------------------------------------------------
# The flags that all scripts share, checked as they are read, and the runs that one command asks
# for: one for each seed (--seeds) and for each baseline (--compare).


def number(kind, low: float, high: float):
    """An argparse type: an int or float from `low` to `high`."""

    def check(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to {high:g}")
        return kind(text)

    check.__name__ = "whole number" if kind is int else "number"  # "invalid number value"
    return check


positive_int, seed = number(int, 1, 2**31 - 1), number(int, 0, 2**31 - 1)
positive, weight = number(float, 1e-12, 1e12), number(float, 0, 1e30)  # float32 can square those
YesNo = argparse.BooleanOptionalAction


def file_path(text: str) -> str:
    """An argparse type. An empty name is a variable of the shell that was not set."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must name a file or folder")
    return os.path.expanduser(text)  # after = the shell leaves ~ as it is


def one_of(kind: str, names: list[str]):
    """An argparse type: one of `names`, else an error that offers the nearest."""

    def check(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} '{text}'{nearest(text, names)}")
        return text

    return check


# fmt: off
def add_recipe_arguments(parser: argparse.ArgumentParser, recipes: dict) -> None:
    """The pair and the optimizer; the defaults in the help texts are those of the recipes."""

    def default(name):
        values = {key: recipe[name] for key, recipe in recipes.items() if name in recipe}
        first, *others = values
        texts = [f"{key}: {values[key]}" for key in others if values[key] != values[first]]
        return f"(default: {'; '.join([str(values[first]), *texts])})"

    network = dict(type=one_of("model", model_names()), metavar="NAME")
    count, real = dict(type=positive_int, metavar="N"), dict(type=positive, metavar="X")
    add = parser.add_argument_group("recipe").add_argument
    add("--teacher", **network, help=f"network {default('teacher')}")
    add("--student", **network, help=f"network {default('student')}")
    add("--epochs", **count, help=f"LR milestones and warm-up scale with it {default('epochs')}")
    add("--batch-size", type=number(int, 2, 2**31 - 1), metavar="N",
        help=f"images a step; BatchNorm needs two {default('batch_size')}")
    add("--lr", **real, help=f"learning rate {default('lr')},"
        f" for MobileNet and ShuffleNet {default('small_lr')}")
    add("--optimizer", choices=("sgd", "adamw"), help="adamw: for transformers; with warm-up and"
        " cosine decay, lr 0.0005, weight decay 0.05 (default: sgd)")
    momentum = number(float, 0, 0.9999)
    add("--momentum", type=momentum, default=0.9, metavar="X", help="of SGD (default: 0.9)")
    add("--nesterov", action=YesNo, help=f"Nesterov momentum {default('nesterov')}")
    add("--weight-decay", type=weight, metavar="X", help=f"weight decay {default('weight_decay')}")
    add("--pretrained", action=YesNo, help="start from ImageNet weights (default: the recipe's)")
    add("--teacher-epochs", **count, help="for training the teacher (default: --epochs)")
    add("--teacher-lr", **real, help="for training the teacher (default: the recipe's, not --lr)")


def fill_recipe(args, recipe: dict) -> None:
    """Give every flag that the command line left open the recipe's value."""
    if args.eval and not args.student:  # the result beside the checkpoint knows the network
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            beside = Path(args.eval).with_name("result.json").read_text()
            args.student = json.loads(beside)["student"]

    args.optimizer = None if args.optimizer == "sgd" else args.optimizer  # the default
    if args.optimizer:  # AdamW: ours, as usual for transformers; the papers have SGD alone
        recipe = recipe | dict(lr=5e-4, small_lr=5e-4, weight_decay=0.05)

    def default_lr(network):
        small = network.lower().startswith(("mobile", "shuffle"))
        return recipe.get("small_lr", recipe["lr"]) if small else recipe["lr"]

    for name, value in {"pretrained": False, **recipe}.items():
        if name != "lr" and getattr(args, name, 0) is None:
            setattr(args, name, value)
    args.lr = args.lr or default_lr(args.student)
    args.teacher_lr = args.teacher_lr or default_lr(args.teacher)
    args.teacher_epochs = args.teacher_epochs or args.epochs
    args.nesterov = args.nesterov and args.momentum > 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, teacher weights, files and hardware: what a methods section would not mention."""
    group = parser.add_argument_group("data and teacher")
    add, count = group.add_argument, dict(type=positive_int, metavar="N")
    add("--dataset", type=one_of("data set", list(STATS)), default="cifar100", metavar="NAME",
        help=f"{', '.join(STATS)}; shapes is synthetic, without files (default: cifar100)")
    folder, size = dict(type=file_path, metavar="DIR"), number(int, 8, 4096)
    add("--data-dir", **folder, default="data", help="folder of the data (default: data)")
    add("--image-size", type=size, metavar="N", help="pixels (default: 32; imagenet: 224)")
    channels = dict(nargs=3, metavar=("R", "G", "B"))
    add("--mean", type=number(float, 0, 1), **channels, help="of pixels (default: the data set's)")
    add("--std", type=number(float, 0.001, 1), **channels, help="likewise, standard deviation")
    add("--train-size", **count, help="train on N images, as many of each class (default: all)")
    add("--val-size", **count, help="hold N training images out and test on them,"
        " to choose weights without the test set (default: off)")
    one = group.add_mutually_exclusive_group().add_argument
    one("--teacher-ckpt", type=file_path, metavar="FILE", help="the teacher's weights, such as"
        " RepDistiller's (default: checkpoints/<dataset>_<teacher>.pt, trained first)")
    one("--pretrained-teacher", action="store_true", help="published weights for the teacher:"
        " torchvision's for imagenet; resnet20, 32, 44 and 56 for cifar100 and cifar10")
    add("--teacher-cache", **folder, help="write the teacher's logits and embeddings of every batch"
        " once, and read them in later runs (default: off)")
    group = parser.add_argument_group("run")
    add_file_arguments(group)
    add = group.add_argument
    add("--compile", action="store_true", help="torch.compile both networks: slow start, for GPUs")
    add("--workers", type=number(int, 0, 256), metavar="N", help="to decode (default: all cores)")


def add_file_arguments(group) -> None:
    """Seeds, hardware and files, for classification and detection, into a group of a parser."""
    add = group.add_argument
    one = group.add_mutually_exclusive_group().add_argument
    one("--seed", type=seed, default=0, metavar="N", help="of all that is random (default: 0)")
    one("--seeds", type=seed, nargs="+", metavar="N", help="one run for each; prints mean, spread")
    add("--compare", action="store_true", help="train the baselines too, such as CE alone and KD")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, with losses"
        " in float32 (default: fp32; on GPUs convolutions may use TF32)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:N or mps (default: auto)")
    add("--skip-bad-images", action="store_true", help="leave out what cannot be read, and say it")
    add("--save-minutes", type=positive, default=15.0, metavar="X", help="X minutes between saves"
        " within an epoch (default: 15)")
    add("--out", type=file_path, metavar="DIR", help="folder of the run (default:"
        " runs/<script>-<teacher>-<student>-<dataset>-s<seed>)")
    add("--resume", action="store_true", help="continue a stopped run")
    add("--deterministic", action="store_true", help="the same bits in every run on a GPU; slower")
    add("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    add("--eval", type=file_path, metavar="FILE", help="only test this student checkpoint")
# fmt: on


def launch(distill, args, baselines: dict, needed: tuple[str, ...] = ()):
    """Run `distill(args)` for every seed and, with --compare, for every baseline; print a summary.
    Args: baselines: name -> the arguments that make it, such as {"ce": {"kd_weight": 0.0, ...}};
        needed: those that are run without --compare too, and first; others come after the method.
    Returns: the result of the run, or a list of them if there are several."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # wanted by cuBLAS for that
        torch.use_deterministic_algorithms(True)
    elif pick_device(args.device).type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are the same at every step
    if args.precision == "bf16" and pick_device(args.device).type == "cpu":
        with contextlib.suppress(OSError):  # only Linux has this file
            if "bf16" not in Path("/proc/cpuinfo").read_text():
                print("note: bf16 is slow here: this processor has no bfloat16 instructions")
    for path in filter(None, (args.eval, args.teacher_ckpt)):
        read_checkpoint(path)  # fail before the data is read
    if args.eval:
        data = load_data(args)
        student = build_for(data, args.student)
        load_weights(student, args.eval)
        top1 = evaluate(student.to(data.device, memory_format=torch.channels_last), data, args)
        return print(f"{args.student} from {args.eval}: test {top1:.2f} %")
    if getattr(args, "plot", False):
        pyplot()  # fail now, not after the training
    runs, results = _planned_runs(args, baselines, needed), []
    for run in runs:
        if len(runs) > 1:
            print(f"\n== {run.method}, seed {run.seed}: {run.out}", flush=True)
        results.append(distill(run))
    results.sort(key=lambda result: result["method"] == args.method)  # baselines first
    print("\n" + summary(results))
    return results if len(results) > 1 else results[0]


def _planned_runs(args, baselines, needed):
    """The arguments of every run, in their order."""
    runs, baselines = [], {"": {}} | baselines  # the method itself changes nothing
    names = [*needed, *(name for name in baselines if args.compare or not name)]
    for seed_ in dict.fromkeys(args.seeds or [args.seed]):
        pair = f"{args.teacher}-{args.student}-{args.dataset}"
        out = Path(args.out or f"runs/{args.script}-{pair}-s{seed_}")
        out = out / f"s{seed_}" if args.out and args.seeds else out
        for name in dict.fromkeys(names):
            if baselines[name].get("method") != args.method:
                new = baselines[name] | dict(seed=seed_, out=str(out / name))
                runs.append(argparse.Namespace(**vars(args) | new))
    begun = {run.out for run in runs if (Path(run.out) / ".lock").exists()}
    for run in runs if args.resume and begun else ():  # if none was, the first of them says so
        run.resume = run.out in begun  # the others start now
    wait_for_all()
    return runs


def summary(results: list[dict]) -> str:
    """A Markdown table of the runs of one command: a row a method, last epoch, mean and spread."""
    first = results[0]
    score, unit = ("student_top1", "top-1 %") if "student_top1" in first else ("student_ap", "AP")
    top = first.get(score.replace("student", "teacher"))
    teacher = f"{first['teacher']} ({top:.2f})" if first["teacher"] else "no teacher"
    data = f"{first['dataset']}, {first['train_images']:,} training images"
    lines = [f"{data}, {first['epochs']} epochs, {teacher} -> {first['student']}\n"]
    lines.append(f"| method | n | {unit} | lowest, highest |\n|---|---|---|---|")
    for method in dict.fromkeys(result["method"] for result in results):
        values = [result[score] for result in results if result["method"] == method]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        mean, extremes = statistics.mean(values), f"{min(values):.2f}, {max(values):.2f}"
        lines.append(f"| {method} | {len(values)} | {mean:.2f}{spread} | {extremes} |")
    return "\n".join(lines)
