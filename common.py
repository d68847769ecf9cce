"""Networks, data and the chores around a run: what a paper's methods section would not mention.

Read a method script (`nd.py`) first; it imports what it needs from here by name. In order:

  errors and exit codes      UserError, run_program
  several processes          gather, average_gradients (torchrun)
  networks                   build_model, load_weights, fold_batchnorm, model_names
  data                       load_data (CIFAR and its like, image trees, ImageNet, drawn `shapes`)
  the teacher                get_teacher: load it, or train it first and keep it
  detection                  build_detector, load_detection_data (COCO's layout), evaluate_detector
  files of a run             Run (resume, metrics, result), Meter (loss terms, progress line)
  command line               add_run_arguments, check_arguments, launch (--seeds, --compare)

`python common.py results/*.json` prints the table of those runs: n, mean and spread.
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

# ---------------------------------------------------------------------------------------------
# Errors and exit codes
# ---------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend: one line that names the flag or file and says what to do."""


class Stopped(BaseException):
    """A signal asked the program to end."""


class _Signals:
    """A signal stops the program at once; between Run.steps and Run.end_epoch, after the next save.

    A second signal, later than a second (schedulers may deliver one stop twice), does not wait.
    """

    wait, pending, since = False, None, 0.0


def _on_signal(number, _frame):
    if not _Signals.wait or (_Signals.pending and time.monotonic() - _Signals.since > 1):
        raise Stopped(number)
    if not _Signals.pending:
        _Signals.pending, _Signals.since = number, time.monotonic()


def run_program(program, argv: list[str] | None = None) -> int:
    """Call `program(argv)` and turn how it ends into an exit status.

    0: done. 2: bad input, one `error:` line on stderr. 128 + n: ended by signal n; what was saved
    stays whole, because files are only ever replaced by complete ones.
    """
    _Signals.wait, _Signals.pending = False, None
    for stream in (sys.stdout, sys.stderr):  # file names need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _on_signal)
    try:
        with _processes(sys.argv[1:] if argv is None else argv):
            program(argv)
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = error.filename or ("the output" if error.errno == errno.ENOSPC else "")
        message = f"{where}: {error.strerror or error}".removeprefix(": ")
    except (MemoryError, torch.OutOfMemoryError):
        message = "out of memory: lower --batch-size, --train-size or --image-size"
    except RuntimeError as error:
        if any(words in str(error) for words in _LOST):
            if rank() == 0:
                print("another process has stopped, and so all; --resume goes on", file=sys.stderr)
            return 1
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = [*str(error).splitlines(), type(error).__name__][0]
            message = f"torch.compile does not work here: {reason}"
        elif "does not have a deterministic implementation" in str(error):
            message = f"--deterministic: {str(error).split(' ')[0]} has no such form on this GPU"
        elif "DataLoader worker (pid" in str(error):
            message = "a process that decodes images was killed, for want of memory perhaps: lower"
            message += " --workers; --resume goes on"
        elif not any(words in str(error) for words in _NO_MEMORY):
            raise
        else:
            message = "out of memory: lower --batch-size, --train-size or --image-size"
    except Stopped as stop:
        if rank() == 0:
            go_on = "" if "--eval" in (argv or sys.argv) else "; --resume goes on"
            print(f"\nstopped by signal {stop.args[0]}{go_on}", file=sys.stderr)
        return 128 + stop.args[0]
    if _first_to_fail():
        print("error: " + message.replace("\n", " "), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that begins `error:`, and no abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


# ---------------------------------------------------------------------------------------------
# Several processes, one a GPU: `torchrun --nproc_per_node=N nd.py ...`
#
# All of them run the same script on the same data. Each sees its share of the images of a batch;
# `gather` brings what the losses compare together, so that every process computes the loss of the
# whole batch; `average_gradients` then makes one gradient of what each found for its own images.
# Process 0 alone prints and writes files. With one process nothing here does anything.
# ---------------------------------------------------------------------------------------------


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")
_LOST = ("closed by peer", "reset by peer", "Broken pipe")  # torch: another process is gone


@contextlib.contextmanager
def _processes(argv):
    """Join the other processes, if torchrun started this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and "--device cpu" not in " ".join(argv).replace("=", " "):
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if 1 < gpus < here:  # with one, every process may have been given its own
            raise UserError(f"torchrun: {here} processes for {gpus} GPUs; --nproc_per_node={gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
        backend = "cpu:gloo,cuda:nccl"
    # One process may load data for hours while the others wait; torchrun ends all if one dies.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if backend != "gloo":
        _check_gpus()
    with contextlib.ExitStack() as quiet:
        if rank() > 0:
            nowhere = quiet.enter_context(open(os.devnull, "w", errors="replace"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()  # after an error the others may not come, so only here


def _check_gpus():
    """UserError: two processes on one GPU, which nccl refuses later in words of its own."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    if len(set(gather_objects(f"{platform.node()} {gpu}"))) < world():
        raise UserError("torchrun: two processes on one GPU; lower --nproc_per_node")


def _first_to_fail():
    """All processes meet the same bad input: one of them says so."""
    if world() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("errors", 1) == 1
    except RuntimeError:
        return rank() == 0


def gather_objects(value) -> list:
    """Every process's value, by rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    gather_objects(None)


@contextlib.contextmanager
def one_rank_first():
    """The first process of each machine does the body, then the others: to find its files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or world() == 1
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()
    wait_for_all()


def share(count: int) -> slice:
    """Which of `count` things this process takes: the shares differ by one at most."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def _counts(count):
    """Everybody's count. Not through the GPU, which would have to finish its work first."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([count]))
    return [int(c) for c in counts]


def _highest(*numbers):
    """Of every number the highest that a process has: to agree on what to do."""
    if world() == 1:
        return numbers
    agreed = torch.tensor(numbers)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


class _Gather(torch.autograd.Function):
    """Rows of all processes. Backward: each process's loss has a gradient for every row; they are
    summed, and a process takes those of its own rows."""

    @staticmethod
    def forward(ctx, rows, counts):
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # all must send as much
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[rank()], None


def gather(args, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors for the whole batch, from the shares [b,...] of all processes -> [B,...].

    Differentiable: after `average_gradients` every parameter, before the gathering or after it,
    has the gradient that one process would find for the whole batch; bfloat16 becomes float32. With
    --gather local, or one process: the tensors as they are.
    """
    if world() == 1 or args.gather == "local":
        return tensors
    counts = _counts(len(tensors[0]))
    wide = (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)
    return tuple(_Gather.apply(tensor, counts) for tensor in wide)


def mean_over_ranks(args, loss: Tensor, images: int) -> Tensor:
    """The whole batch's loss, from the mean over this process's `images` of it: for losses that
    look at one image at a time, whose inputs would be large to gather."""
    if world() == 1 or args.gather == "local":
        return loss
    counts = _counts(images)
    weights = torch.tensor(counts, dtype=loss.dtype, device=loss.device) / sum(counts)
    return (gather(args, loss[None])[0] * weights).sum()


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give all that the optimizer trains the mean of the processes' gradients."""
    if world() > 1:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]  # the same ones everywhere
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= world()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


# ---------------------------------------------------------------------------------------------
# Networks: the 22 of the RepDistiller zoo for 32-pixel images, and wrn_16_8
#
# Attribute names are those of the published checkpoints, so that their state dicts load key for
# key. Every block returns its value BEFORE the last ReLU and the network applies it, because some
# methods (ReviewKD) compare that value. Every network ends in a global average pool.
# ---------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """What a network saw on the way.

    embedding: [B,D], the input of the classifier. maps: the stage outputs from shallow to deep,
    each [B,C,H,W]. preact: the same before the activation, where the family has one there.
    """

    embedding: Tensor
    maps: list[Tensor]
    preact: list[Tensor]


def _conv(c_in, c_out, size, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)


def _pool(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _init_he(net):
    """He initialisation, fan-out, of every convolution: what the zoo's ResNets, WRNs, VGGs use."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    shortcut_name, head_name, expansion = "downsample", "fc", 1

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = _conv(c_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        _add_shortcut(self, c_in, width, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + getattr(self, self.shortcut_name)(x)


class Bottleneck(nn.Module):
    shortcut_name, head_name, expansion = "shortcut", "linear", 4

    def __init__(self, c_in, width, stride):
        super().__init__()
        mid = width // self.expansion
        self.conv1, self.bn1 = _conv(c_in, mid, 1), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _conv(mid, mid, 3, stride), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = _conv(mid, width, 1), nn.BatchNorm2d(width)
        _add_shortcut(self, c_in, width, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + getattr(self, self.shortcut_name)(x)


def _add_shortcut(block, c_in, c_out, stride):
    """The identity where shapes agree, else a 1x1 convolution with BatchNorm ("option B")."""
    shortcut = nn.Sequential()
    if stride != 1 or c_in != c_out:
        shortcut = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
    setattr(block, block.shortcut_name, shortcut)


def _shuffle(x, groups):
    """Channel shuffle: interleave the channels of the groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(nn.Module):
    head_name = "linear"

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.stride = stride
        c_out = width - c_in if stride == 2 else width  # at stride 2 the input is concatenated
        mid = c_out // 4
        self.groups = 1 if c_in == 24 else 3  # the stem's 24 channels are not grouped
        self.conv1, self.bn1 = _conv(c_in, mid, 1, groups=self.groups), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = _conv(mid, c_out, 1, groups=3), nn.BatchNorm2d(c_out)

    def forward(self, x):
        out = _shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
        return out + x


class StageNet(nn.Module):
    """Stem, stages of one kind of block, classifier: all ResNets and ShuffleNet v1."""

    def __init__(self, block, counts, widths, strides, stem, num_classes):
        super().__init__()
        stem_size = 1 if block is ShuffleUnitV1 else 3
        self.conv1, self.bn1 = _conv(3, stem, stem_size), nn.BatchNorm2d(stem)
        self.num_stages, self.head_name, c_in = len(counts), block.head_name, stem
        for stage, (count, width, stride) in enumerate(zip(counts, widths, strides), 1):
            blocks = [block(c_in, width, stride)]
            blocks += [block(width, width, 1) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            c_in = width
        setattr(self, self.head_name, nn.Linear(c_in, num_classes))
        if block is not ShuffleUnitV1:
            _init_he(self)

    def forward(self, x, return_features=False):
        x = F.relu(self.bn1(self.conv1(x)))
        maps, preact = [], []
        for stage in range(1, self.num_stages + 1):
            for block in getattr(self, f"layer{stage}"):
                before = block(x)
                x = F.relu(before)
            maps.append(x)
            preact.append(before)
        embedding = _pool(x)
        logits = getattr(self, self.head_name)(embedding)
        return (logits, Features(embedding, maps, preact)) if return_features else logits


class WideUnit(nn.Module):
    """Pre-activation unit: takes the running sum x and relu(bn1(x)), returns the new sum."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), _conv(c_in, c_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), _conv(c_out, c_out, 3)
        if c_in != c_out:
            self.convShortcut = _conv(c_in, c_out, 1, stride)  # bare, on the activated input
        self.same_width = c_in == c_out

    def forward(self, x, activated):
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.same_width else self.convShortcut(activated))


class WideGroup(nn.Module):  # only there for the published key names, `block1.layer.0...`
    def __init__(self, units):
        super().__init__()
        self.layer = nn.Sequential(*units)


class WideResNet(nn.Module):
    """WRN-depth-k. The map of a stage is its sum; `preact` is that sum after the next BatchNorm."""

    def __init__(self, depth, k, num_classes):
        super().__init__()
        self.conv1, c_in = _conv(3, 16, 3), 16
        for stage, (width, stride) in enumerate(((16 * k, 1), (32 * k, 2), (64 * k, 2)), 1):
            units = [WideUnit(c_in, width, stride)]
            units += [WideUnit(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
            setattr(self, f"block{stage}", WideGroup(units))
            c_in = width
        self.bn1 = nn.BatchNorm2d(c_in)
        self.fc = nn.Linear(c_in, num_classes)
        _init_he(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x, return_features=False):
        x = self.conv1(x)
        maps, preact = [], []
        for stage, group in enumerate((self.block1, self.block2, self.block3)):
            for i, unit in enumerate(group.layer):
                normed = unit.bn1(x)
                if stage > 0 and i == 0:
                    preact.append(normed)
                x = unit(x, F.relu(normed))
            maps.append(x)
        preact.append(self.bn1(x))
        embedding = _pool(F.relu(preact[-1]))
        logits = self.fc(embedding)
        return (logits, Features(embedding, maps, preact)) if return_features else logits


class VGG(nn.Module):
    """VGG with BatchNorm and one linear classifier; no pooling after the fourth block."""

    def __init__(self, convs_per_block, num_classes):
        super().__init__()
        c_in = 3
        for i, (count, width) in enumerate(zip(convs_per_block, (64, 128, 256, 512, 512))):
            layers = []
            for _ in range(count):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c_in = width
            setattr(
                self, f"block{i}", nn.Sequential(*layers[:-1])
            )  # the last ReLU is applied below
        self.classifier = nn.Linear(512, num_classes)
        _init_he(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x, return_features=False):
        maps, preact = [], []
        for i in range(5):
            before = getattr(self, f"block{i}")(x)
            x = F.relu(before)
            maps.append(x)
            preact.append(before)
            if i < 3:
                x = F.max_pool2d(x, 2)
        embedding = _pool(x)
        logits = self.classifier(embedding)
        # The zoo counts the first block as the stem, so the stages are the other four.
        return (logits, Features(embedding, maps[1:], preact[1:])) if return_features else logits


class InvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        mid = c_in * expansion
        self.conv = nn.Sequential(
            *(_conv(c_in, mid, 1), nn.BatchNorm2d(mid), nn.ReLU()),
            *(_conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid), nn.ReLU()),
            *(_conv(mid, c_out, 1), nn.BatchNorm2d(c_out)),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        return self.conv(x) + x if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Half width ("mobile_half"), plain ReLU; its stage outputs are linear: maps == preact."""

    groups = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2))
    groups += ((6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))  # expansion, width, repeats, stride

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Sequential(_conv(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
        blocks, c_in = [], 16
        for expansion, width, repeats, stride in self.groups:
            group = [InvertedResidual(c_in, width, stride, expansion)]
            group += [InvertedResidual(width, width, 1, expansion) for _ in range(repeats - 1)]
            blocks.append(nn.Sequential(*group))
            c_in = width
        self.blocks = nn.ModuleList(blocks)
        self.conv2 = nn.Sequential(_conv(c_in, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        _init_he(self)
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def forward(self, x, return_features=False):
        x = self.conv1(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        embedding = _pool(self.conv2(x))
        logits = self.classifier(embedding)
        maps = [outputs[i] for i in (1, 2, 4, 6)]
        return (logits, Features(embedding, maps, maps)) if return_features else logits


class ShuffleUnitV2(nn.Module):
    """Half the channels pass through untouched; the shuffle mixes the halves."""

    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x):
        kept, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        out = F.relu(self.bn3(self.conv3(out)))
        return _shuffle(torch.cat([kept, out], 1), 2)


class ShuffleDownV2(nn.Module):
    """Stride 2: both branches see the whole input (1, 2: left; 3, 4, 5: right)."""

    def __init__(self, c_in, width):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _conv(c_in, c_in, 3, 2, groups=c_in), nn.BatchNorm2d(c_in)
        self.conv2, self.bn2 = _conv(c_in, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(c_in, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x):
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return _shuffle(torch.cat([left, right], 1), 2)


class ShuffleV2(nn.Module):
    """Width 1. Its units activate before they shuffle, so maps stand in for preact."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1, c_in = _conv(3, 24, 1), nn.BatchNorm2d(24), 24
        for stage, (width, repeats) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            units = [ShuffleDownV2(c_in, width)] + [ShuffleUnitV2(width) for _ in range(repeats)]
            setattr(self, f"layer{stage}", nn.Sequential(*units))
            c_in = width
        self.conv2, self.bn2 = _conv(464, 1024, 1), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x, return_features=False):
        x = F.relu(self.bn1(self.conv1(x)))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
            maps.append(x)
        embedding = _pool(F.relu(self.bn2(self.conv2(x))))
        logits = self.linear(embedding)
        return (logits, Features(embedding, maps, maps)) if return_features else logits


def _resnet(depth, stem, widths):
    count = (depth - 2) // 6
    return lambda k: StageNet(BasicBlock, [count] * 3, widths, (1, 2, 2), stem, k)


def _wrn(depth, width):
    return lambda k: WideResNet(depth, width, k)


def _vgg(*convs_per_block):
    return lambda k: VGG(convs_per_block, k)


ZOO = {  # name -> constructor of the number of classes
    **{f"resnet{d}": _resnet(d, 16, (16, 32, 64)) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": _resnet(d, 32, (64, 128, 256)) for d in (8, 32)},
    **{f"wrn_{d}_{k}": _wrn(d, k) for d in (16, 40) for k in (1, 2)},
    "wrn_16_8": _wrn(16, 8),
    "ResNet50": lambda k: StageNet(
        Bottleneck, (3, 4, 6, 3), (256, 512, 1024, 2048), (1, 2, 2, 2), 64, k
    ),
    "vgg8": _vgg(1, 1, 1, 1, 1),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": lambda k: StageNet(ShuffleUnitV1, (4, 8, 4), (240, 480, 960), (2, 2, 2), 24, k),
    "ShuffleV2": ShuffleV2,
}


def model_names() -> list[str]:
    """Every name `build_model` takes: the zoo's first, then torchvision's classifiers."""
    names = torchvision.models.list_models(module=torchvision.models)
    # squeezenet classifies by a convolution: it has no embedding. vgg11, 13, 16, 19: the zoo's.
    return [*ZOO, *(n for n in names if n not in ZOO and not n.startswith("squeezenet"))]


def build_model(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """A network by name, one of `model_names()`.

    `model(x)` is logits [B,K]; `model(x, return_features=True)` is `(logits, Features)`. State
    dicts are those of RepDistiller or of torchvision. `pretrained`: torchvision's ImageNet weights
    (downloaded), with a new classifier unless there are 1,000 classes. UserError: unknown name.
    """
    if name in ZOO:
        if pretrained:
            raise UserError(f"{name}: no weights to download; --no-pretrained does without")
        net = ZOO[name](num_classes)
        net.name = name
        return net
    if name not in model_names():
        raise UserError(f"unknown model '{name}'{nearest(name, model_names())}")
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if not pretrained:
        options["num_classes"] = num_classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on how to initialise googlenet faster
        try:
            weights = None
            if pretrained:  # the older weights, where there are two: those that papers start from
                known = torchvision.models.get_model_weights(name)
                weights = getattr(known, "IMAGENET1K_V1", known.DEFAULT)
            net = torchvision.models.get_model(name, weights=weights, **options)
        except OSError as error:
            raise UserError(f"cannot download the weights of {name}: {error}") from None
    return _with_features(net, name, num_classes)


def _with_features(net, name, num_classes):
    """Give a torchvision classifier the `return_features` argument; its state dict stays as it is.

    The embedding is the input of the last linear layer. The maps are the outputs of `layer1..4`
    where there are such, else the last output at each resolution among the parts of its body. A
    vision transformer keeps tokens, and has none.
    """
    head_path = _head_path(net)
    if net.get_submodule(head_path).out_features != num_classes:
        new_classifier(net, num_classes)
    stages = [n for n, _ in net.named_children() if re.fullmatch(r"layer\d", n)]
    body = [name for name in ("features", "trunk_output", "layers", "blocks") if hasattr(net, name)]
    parts = net.get_submodule(".".join(body)).named_children()  # with no such name: the network's
    ends = (nn.AdaptiveAvgPool2d, nn.Dropout, nn.Linear)
    taps = stages or [".".join((*body, n)) for n, part in parts if not isinstance(part, ends)]
    taps = [] if hasattr(net, "conv_proj") else taps  # a vision transformer's
    channels_last = type(net).__name__ == "SwinTransformer"

    class WithFeatures(type(net)):
        def forward(self, x, return_features=False):
            if not return_features:
                return super().forward(x)
            seen = []  # (input, output) of every tap, then of the head
            hooks = [  # modules are looked up here, so that a deep copy hooks its own
                self.get_submodule(path).register_forward_hook(
                    lambda _module, inputs, output: seen.append((inputs[0], output))
                )
                for path in (*taps, head_path)
            ]
            try:
                logits = super().forward(x)
            finally:
                for hook in hooks:
                    hook.remove()
            maps = [output for _, output in seen[:-1] if output.dim() == 4]
            maps = [m.permute(0, 3, 1, 2) if channels_last else m for m in maps]
            if not stages:
                maps = list({m.shape[-1]: m for m in maps}.values())
            return logits, Features(seen[-1][0], maps, maps)

    net.__class__, net.name = WithFeatures, name
    return net


def _head_path(net):
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]


def new_classifier(net: nn.Module, num_classes: int) -> nn.Linear:
    """Put a new linear classifier, as PyTorch starts it, in the place of the old one; -> it."""
    path = _head_path(net)
    parent, _, leaf = path.rpartition(".")
    head = nn.Linear(net.get_submodule(path).in_features, num_classes)
    setattr(net.get_submodule(parent), leaf, head)
    return head


def load_model(name: str, path: str | Path) -> nn.Module:
    """The network `name` with the weights in `path`, with as many classes as those are for.

    UserError: as `load_weights`.
    """
    with torch.random.fork_rng(devices=[]):  # one only to see what the classifier is called
        key = _head_path(build_model(name, 2)) + ".weight"
    weights = _state_dict(path).get(key)
    net = build_model(name, len(weights) if torch.is_tensor(weights) and weights.dim() else 2)
    load_weights(net, path)
    return net


def nearest(word: str, words: list[str]) -> str:
    spelled: dict = {}
    for name in words:
        spelled.setdefault(name.casefold().replace("-", "_"), []).append(name)
    close = difflib.get_close_matches(word.casefold().replace("-", "_"), spelled, 3, 0.4)
    close = [name for spelling in close for name in spelled[spelling]]
    return f": did you mean {', '.join(close)}?" if close else f": one of {', '.join(words[:30])}"


def read_checkpoint(path: str | Path):
    """`torch.load` that runs no code from the file. UserError: missing, torn, or not weights."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("not a file" if path.exists() else "no such file"))
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("a checksum is wrong")  # torch.load does not look at them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # torch.load names no set of errors for a torn file
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(  # GLOBAL: the name of a class or function to call
                f"{path}: holds Python objects besides tensors, which loading would run as code;"
                " save its state dict alone"
            ) from None
        raise UserError(f"{path}: damaged, half-written or not a checkpoint; replace it") from None


def load_weights(model: nn.Module, path: str | Path, state: dict | None = None) -> None:
    """Load a checkpoint into `model`, strictly, running no code from the file.

    Takes a plain state dict, or a dict that holds one under `model`, `state_dict` or `student`;
    `module.` prefixes are dropped; BatchNorm's `num_batches_tracked` may be missing (old files).
    state: what was read from `path`, if something was done to it.
    UserError: no such file, half-written, another architecture, another number of classes.
    """
    state, wanted = state or _state_dict(path), model.state_dict()
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = wanted[key]
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        which = f"lacks {missing[0]}" if missing else f"has {extra[0]} too"
        raise UserError(
            f"{path}: weights of another architecture: it {which}"
            f" ({len(missing)} missing, {len(extra)} unexpected); name the network it is of"
        )
    for key, value in wanted.items():
        if not torch.is_tensor(state[key]) or state[key].shape != value.shape:
            raise UserError(
                f"{path}: {key} is {list(getattr(state[key], 'shape', []))}, this network's is"
                f" {list(value.shape)}: another architecture or number of classes"
            )
    try:
        model.load_state_dict(state)
        finite = all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    except RuntimeError:  # sparse, quantised
        raise UserError(f"{path}: its tensors are not plain numbers; save a usual one") from None
    if not finite:
        raise UserError(f"{path}: some of its weights are infinite or nan")


def _state_dict(path):
    state = read_checkpoint(path)
    for key in ("model", "state_dict", "student", "state", "student"):  # "state": a run's last.pt
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: holds no state dict (looked under model, state_dict, student)")
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def state_hash(model: nn.Module) -> str:
    """A name for these very weights: 16 hex digits over every tensor of the state dict."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def fold_batchnorm(model: nn.Module, example: Tensor) -> nn.Module:
    """A frozen copy in eval mode, each BatchNorm folded into the convolution before it.

    For inference only: w' = w * g / sqrt(v + eps), b' = (b - m) * g / sqrt(v + eps) + beta.
    `example` [B,3,H,W] runs through the copy once. A convolution is folded only if the autograd
    graph of that run shows that nothing but the BatchNorm reads its output.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    makers, pairs = {}, []
    hooks = [
        conv.register_forward_hook(lambda conv, _, output: makers.update({output.grad_fn: conv}))
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
    ]
    hooks += [
        bn.register_forward_pre_hook(lambda bn, inputs: pairs.append((inputs[0].grad_fn, bn)))
        for bn in model.modules()
        if isinstance(bn, nn.BatchNorm2d)
    ]
    with torch.enable_grad():
        logits, seen = model(example, return_features=True)
        outputs = (logits, seen.embedding, *seen.maps, *seen.preact)
        nodes = [sum(output.sum() for output in outputs).grad_fn]
    for hook in hooks:
        hook.remove()
    readers = Counter()
    while nodes:
        inputs = [node for node, _ in nodes.pop().next_functions if node is not None]
        nodes += [node for node in dict.fromkeys(inputs) if node not in readers]
        readers.update(inputs)
    names, calls = {m: name for name, m in model.named_modules()}, Counter(makers.values())
    for node, bn in pairs:
        conv = makers.get(node)
        if conv is not None and readers[node] == calls[conv] == 1:
            fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn)
            for module, new in ((conv, fused), (bn, nn.Identity())):
                parent, _, leaf = names[module].rpartition(".")
                setattr(model.get_submodule(parent), leaf, new)
    return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Data: whole sets as uint8 on the device, augmented there in batches, no worker processes; and
# ImageNet, decoded by workers
# ---------------------------------------------------------------------------------------------

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATS = {  # mean and standard deviation of the training pixels, R G B, as the field uses them
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "imagenet": IMAGENET_STATS,
    "folder": IMAGENET_STATS,
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Split(NamedTuple):
    images: Tensor | list[str]  # [N,S,S,3] uint8, or the files
    labels: Tensor  # [N] int64


class Data:
    """A data set on the device. `batches` yields normalised images [B,3,S,S] and labels [B]."""

    def __init__(self, name: str, train: Split, test: Split, classes: list[str], device):
        digest = hashlib.sha256()
        for tensor in (*train, *test):
            digest.update(tensor.contiguous().numpy())
        self._describe(name, classes, train.images.shape[1], digest, device)
        self.train = Split(*(t.to(device) for t in train))
        self.test = Split(*(t.to(device) for t in test))

    def _describe(self, name, classes, image_size, digest, device):
        self.name, self.classes, self.num_classes = name, classes, len(classes)
        self.fingerprint, self.image_size, self.device = digest.hexdigest()[:16], image_size, device
        mean, std = (torch.tensor(s, device=device).view(1, 3, 1, 1) for s in STATS[name])
        self.mean, self.std = mean * 255, std * 255
        self.pad = self.image_size // 8  # 4 at 32 pixels
        self.may_flip = name != "svhn"  # a mirrored digit is another digit

    def steps(self, batch_size: int) -> int:
        """Batches in a shuffled pass. Says so if they are not what the command line suggests."""
        count, least = len(self.train.labels), 2 * world()
        if min(count, batch_size) < least:
            raise UserError(
                f"--batch-size {batch_size} of {count} images: {world()} processes need {least} or"
                " more, two each"
            )
        full, rest = divmod(count, batch_size)
        if 0 < rest < least:
            over = "one over: it is" if rest == 1 else f"{rest} over: they are"
            print(f"note: {count} images in batches of {batch_size} leave {over} left out")
        if not full:
            print(f"note: --batch-size {batch_size}: there are {count} images, one batch an epoch")
        return full + (rest >= least)

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int | None = None,
        augment: bool = False,
        first: int = 0,
        shared: bool = False,
    ):
        """One pass, or the rest of one from batch `first` on. With a seed the order is shuffled;
        the same seed gives the same batches.

        augment: zero padding by an eighth and a random crop, and a flip with probability 1/2, each
        image on its own. Everything random is drawn on the CPU at the start of the pass, so CPU
        and GPU see the same batches. A last batch of one image is left out when shuffling, since
        neither BatchNorm nor a loss between samples is defined on it. shared: of every batch this
        process's part alone; a shuffled last batch of less than two images for each is left out.
        """
        count = len(getattr(self, split).labels)
        rng = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(count) if seed is None else torch.randperm(count, generator=rng)
        parts = _parts(count, batch_size, first, seed is not None, shared)
        return self._pass(split, order, parts, rng, augment)

    def _pass(self, split, order, parts, rng, augment):
        """The batches: of each part, a slice of the order, the images and labels."""
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

    def first_images(self, count: int = 2) -> Tensor:
        """The first test images, to try a network on."""
        return self._normalised(self.test.images[:count])

    def test_batch(self, per_class: int, classes: int) -> tuple[Tensor, Tensor]:
        """The first test images of each of the first classes, sorted by class, for pictures."""
        index = self._of_each_class(per_class, classes)
        return self._normalised(self.test.images[index]), self.test.labels[index]

    def _of_each_class(self, per_class, classes):
        labels = self.test.labels
        index = [(labels == k).nonzero().flatten()[:per_class] for k in range(self.num_classes)]
        return torch.cat(index[:classes])


def _parts(count, batch_size, first, shuffled, shared):
    """Of each batch from `first` on, the slice of the pass that this process takes."""
    for start in range(first * batch_size, count, batch_size):
        part = range(start, min(start + batch_size, count))
        if shuffled and len(part) < (2 * world() if shared else 2):
            return
        part = part[share(len(part))] if shared else part
        if part:  # else there are more processes than images
            yield slice(part.start, part.stop)


class StreamedData(Data):
    """A set too large to hold: files decoded in every pass, by worker processes.

    Training: a random part of the image (a twelfth to all of its area), resized, and a flip.
    Testing: the shorter side resized to 8/7 of the size, and the centre of that.
    """

    def __init__(self, name, train, test, classes, image_size, workers, device):
        # Of all names and some sizes: a million files are not read twice.
        digest = hashlib.sha256(str(image_size).encode())
        for files, labels in (train, test):
            names = (f"{Path(path).name} {label}" for path, label in zip(files, labels.tolist()))
            digest.update(os.fsencode("\n".join(names)))
            some = files[:: max(1, len(files) // 1000)]
            digest.update(str([os.stat(path).st_size for path in some]).encode())
        self._describe(name, classes, image_size, digest, device)
        self.train, self.test = (Split(s.images, s.labels.to(device)) for s in (train, test))
        self.workers = cores() if workers is None else workers

    def _pass(self, split, order, parts, rng, augment):
        """What is random of an image depends on the seed of the pass, not on the workers."""
        draws = torch.randint(2**31, order.shape, generator=rng) if augment else None
        parts = list(parts)
        most = max((part.stop - part.start for part in parts), default=0)
        loader = _in_workers(
            self._files(split, order, draws),
            min(self.workers, len(parts)),
            most * 3 * self.image_size**2,
            batch_size=None,  # the data set itself makes batches: a worker decodes a whole one
            sampler=parts,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            if isinstance(images, str):
                raise UserError(images)
            images, labels = (x.to(self.device, non_blocking=True) for x in (images, labels))
            yield self._normalised(images), labels

    def _files(self, split, order, draws=None):
        files, labels = getattr(self, split)
        return _Files(files, labels.cpu(), order, draws, self.image_size)

    def _decoded(self, order):
        images, _ = self._files("test", order)[:]
        if isinstance(images, str):
            raise UserError(images)
        return self._normalised(images.to(self.device))

    def first_images(self, count: int = 2) -> Tensor:
        return self._decoded(torch.arange(min(count, len(self.test.labels))))

    def test_batch(self, per_class: int, classes: int) -> tuple[Tensor, Tensor]:
        index = self._of_each_class(per_class, classes)
        return self._decoded(index.cpu()), self.test.labels[index]


def _in_workers(dataset, workers, batch_bytes, **plan):
    """What torch's DataLoader yields, as lists; it stops for no signal (see `_ignore_signals`).

    Workers hand tensors over in shared memory; of that Docker gives 64 MB, and a batch that does
    not fit never arrives. Then they send arrays through their pipes.
    """
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    workers_here = workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    loader = torch.utils.data.DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=list if shared > 4 * workers_here * batch_bytes else _arrays,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own, or it would draw from the run's
        **plan,
    )
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # until the workers ignore them
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for batch in batches:
        yield [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch]


def _arrays(batch):
    return [x.numpy() if torch.is_tensor(x) else x for x in batch]


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _ignore_signals(_worker):
    """The program itself deals with a signal, which may reach all processes of a job. Its workers
    end when it tells them to, or when they find it gone."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


class _Files(torch.utils.data.Dataset):
    """[a slice of the pass] -> images [B,S,S,3] uint8, or what is wrong with one, and labels [B].

    order: the indices of the pass. draws: a seed for each of them, to augment it; or None.
    """

    def __init__(self, files, labels, order, draws, size):
        self.files, self.labels, self.order, self.draws = files, labels, order, draws
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        if draws is None:
            steps = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        self.size, self.transform = size, transforms.Compose(steps)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, part):
        order = self.order[part]
        images = torch.empty(len(order), self.size, self.size, 3, dtype=torch.uint8)
        for row, k in enumerate(order.tolist()):
            try:
                image = read_rgb(self.files[k])
            except UserError as error:
                return str(error), None
            with torch.random.fork_rng(devices=[]):
                if self.draws is not None:  # the CPU's generator alone: a GPU's is the run's
                    torch.default_generator.manual_seed(int(self.draws[part][row]))
                images[row] = torch.from_numpy(np.array(self.transform(image)))
        return images, self.labels[order]


def cores() -> int:
    """How many processors this process may use; those of one machine share them."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    found = len(affinity(0)) if affinity else os.cpu_count()
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load_data(args, device) -> Data:
    """The data set that the command line asks for; kept, so that several runs load it once."""
    fill_image_size(args)
    key = (args.dataset, args.data_dir, args.image_size, args.train_size, args.val_size)
    key += (str(device),)
    if key not in _LOADED:
        _LOADED.clear()
        if args.val_size:
            print(f"note: --val-size: 'test' is of {args.val_size} images kept out of training")
        with one_rank_first():  # downloads and decodes
            _LOADED[key] = _load_data(args, device)
    return _LOADED[key]


_LOADED: dict = {}


def fill_image_size(args) -> None:
    """The data set's own, where none is asked for."""
    if args.dataset in STATS and args.image_size is None:
        args.image_size = 224 if args.dataset == "imagenet" else 32


def _load_data(args, device):
    size = args.image_size
    if args.dataset == "shapes":
        train, test, classes = draw_shapes(5000, 0, size), draw_shapes(1000, 1, size), SHAPE_CLASSES
    elif args.dataset == "imagenet":
        return _imagenet(args, device)
    elif args.dataset == "folder":
        train, test, classes = _read_trees(Path(args.data_dir), size, args.workers)
    elif args.dataset == "cifar100" and (Path(args.data_dir) / "cifar100" / "train").is_dir():
        train, test, classes = _read_trees(Path(args.data_dir) / "cifar100", size, args.workers)
    else:
        train, test, classes = _read_torchvision(args.dataset, args.data_dir, size)
    train, test = _chosen(args, train, test, len(classes))
    return Data(args.dataset, train, test, classes, device)


def _chosen(args, train, test, num_classes):
    """The splits that --train-size and --val-size leave: the same for every seed, classes even."""
    if not args.train_size and not args.val_size:
        return train, test
    labels = train.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = labels.bincount(minlength=num_classes).tolist()
    place, from_end = torch.empty_like(order), torch.empty_like(order)  # within its class
    place[by_class] = torch.cat([torch.arange(n) for n in counts])
    from_end[by_class] = torch.cat([torch.arange(n).flip(0) for n in counts])
    order = torch.argsort(place, stable=True)  # one of each class, then another of each, ...
    if args.val_size:  # from the other end of each class, and half of it at most
        kept_out = torch.argsort(from_end, stable=True)
        kept_out = kept_out[(place > from_end)[kept_out]]
        _check_count("--val-size", args.val_size, num_classes, len(kept_out), "half of each class")
        test = _part(train, kept_out[: args.val_size])
        order = order[~torch.isin(order, kept_out[: args.val_size])]
    if args.train_size:
        _check_count("--train-size", args.train_size, num_classes, len(order), "all")
        order = order[: args.train_size]
    return _part(train, order), test


def _check_count(flag_name, count, least, most, which):
    if not least <= count <= most:
        raise UserError(
            f"{flag_name} {count}: must be from {least} (one a class) to {most} ({which})"
        )


def _part(split, index):
    index = index.sort().values
    if torch.is_tensor(split.images):
        return Split(split.images[index], split.labels[index])
    return Split([split.images[k] for k in index.tolist()], split.labels[index])


def _imagenet(args, device):
    sets, _ = _trees(Path(args.data_dir))
    splits = []
    for tree in sets:
        files, labels = zip(*tree.samples)
        splits.append(Split(list(files), torch.tensor(labels)))
    classes, size = sets[0].classes, args.image_size
    train, test = _chosen(args, *splits, len(classes))
    return StreamedData("imagenet", train, test, classes, size, args.workers, device)


def _read_torchvision(name, root, size):
    sets, kwargs = torchvision.datasets, ({"train": True}, {"train": False})
    kind = {"cifar100": sets.CIFAR100, "cifar10": sets.CIFAR10, "svhn": sets.SVHN}
    if name in ("svhn", "stl10"):
        kwargs = ({"split": "train"}, {"split": "test"})
    wanted = {"cifar100": "cifar-100-python/", "cifar10": "cifar-10-batches-py/"}
    wanted |= {"svhn": "train_32x32.mat and test_32x32.mat", "stl10": "stl10_binary/"}
    splits = []
    for options in kwargs:
        try:
            data = kind.get(name, sets.STL10)(root, download=True, **options)
        except ImportError:
            raise UserError(f"--dataset {name} needs scipy: pip install scipy") from None
        except Exception as error:  # each set fails in its own way; none leaves usable data
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            there = Path(root, wanted[name].split()[0]).exists()
            advice = "replace" if there else "put"
            raise UserError(
                f"--dataset {name}: cannot read or download it ({reason}); {advice} {wanted[name]}"
                f" under {root}/ or name another --data-dir; --dataset shapes needs no files"
            ) from None
        pixels = torch.as_tensor(np.asarray(data.data))
        if name in ("svhn", "stl10"):
            pixels = pixels.permute(0, 2, 3, 1)
        labels = torch.as_tensor(
            np.asarray(data.targets if hasattr(data, "targets") else data.labels)
        )
        splits.append(Split(_resize(pixels, size), labels.long()))
    classes = getattr(data, "classes", [str(k) for k in range(10)])
    return *splits, list(classes)


def _resize(images, size):
    if images.shape[1] == size:
        return images.contiguous()
    resized = []
    for chunk in images.split(1000):  # [N,S,S,3] uint8
        x = F.interpolate(
            chunk.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True
        )
        resized.append(x.round().clamp(0, 255).byte().permute(0, 2, 3, 1))
    return torch.cat(resized).contiguous()


class _Tree(torchvision.datasets.ImageFolder):
    def find_classes(self, directory):
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and e.name[0] != ".")
        if not names:
            raise FileNotFoundError("no class folders")
        return names, {name: label for label, name in enumerate(names)}


def _is_image(path):
    extensions = torchvision.datasets.folder.IMG_EXTENSIONS
    return path.lower().endswith(extensions) and not os.path.basename(path).startswith(".")


def _trees(root):
    """The two splits as torchvision reads them, and their folders."""
    train_dir = root / "train"
    test_dir = next((d for d in (root / "val", root / "test") if d.is_dir()), root / "val")
    sets = []
    for folder in (train_dir, test_dir):
        if not folder.is_dir():
            raise UserError(
                f"--data-dir: no {folder}; wanted {root}/train/<class>/*.png and"
                f" {root}/val/<class>/*.png (--dataset shapes needs no files)"
            )
        try:
            sets.append(_Tree(str(folder), is_valid_file=_is_image))
        except FileNotFoundError as error:  # no class folders, or one without images
            reason = str(error).splitlines()[0].rstrip(". ")
            raise UserError(f"{folder}: {reason}: add images or remove the folder") from None
    if len(sets[0].classes) < 2:
        raise UserError(f"{train_dir}: one class only; there must be two or more class folders")
    if sets[0].classes != sets[1].classes:
        odd = sorted(set(sets[0].classes) ^ set(sets[1].classes))[0]
        raise UserError(
            f"{root}: class '{odd}' is in one of {train_dir.name}/ and"
            f" {test_dir.name}/ only; every class needs images in both"
        )
    return sets, (train_dir, test_dir)


def _read_trees(root, size, workers):
    sets, folders = _trees(root)
    splits = [
        _decoded(data.samples, size, workers, root / f".decoded-{folder.name}-{size}.pt")
        for data, folder in zip(sets, folders)
    ]
    return *splits, sets[0].classes


def _decoded(samples, size, workers, cache):
    """Every image of a tree as one tensor: decoded once, then read from the cache beside it."""
    need = len(samples) * size * size * 3
    if need > 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UserError(
            f"--image-size {size}: {len(samples)} images take {need / 1e9:.0f} GB decoded, more"
            " than a quarter of this machine's memory; choose a smaller size"
        )
    listing = hashlib.sha256()
    for path, label in samples:
        stat = os.stat(path)
        if not S_ISREG(stat.st_mode):
            raise UserError(f"{path}: not a file; remove it")
        where = os.path.relpath(path, cache.parent)
        stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        listing.update(os.fsencode(f"{where} {label} {stamp}\n"))

    def decode_all():
        print(f"decoding {len(samples)} images, once: {cache}", flush=True)
        images = torch.empty(len(samples), size, size, 3, dtype=torch.uint8)

        def decode(i):
            images[i] = torch.from_numpy(_decode(samples[i][0], size))

        threads = min(cores(), 64) if workers is None else max(1, workers)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, range(len(samples))))
        return images

    images = kept(cache, {"listing": listing.hexdigest()}, decode_all, together=False)
    return Split(images, torch.tensor([label for _, label in samples]))


def read_rgb(path, upright: bool = False) -> Image.Image:
    """Any image as RGB: grey, palette, CMYK, 16 bits. UserError: it cannot be read.

    upright: turned as its EXIF data says, and not as it is stored, which annotations refer to.
    """
    try:
        with Image.open(path) as file:
            file = ImageOps.exif_transpose(file) if upright else file
            if file.mode[0] in "IF":  # convert() would clip 16 bits instead of scaling them
                values, deep = np.asarray(file), file.format in ("PNG", "PPM")
                if file.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("it is unclear which of its values is white")
                deep = deep or file.mode != "I" or values.max() > 255  # else 8 bits in 32
                file = Image.fromarray((values >> 8 if deep else values).astype(np.uint8))
            return file.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UserError(
            f"{path}: cannot be read as an image ({error}); replace or remove it"
        ) from None


def _decode(path, size):
    """Shorter side to `size`, centre square."""
    image = read_rgb(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


SHAPES = ("disc", "triangle", "square", "star", "cross", "ring")
TEXTURES = ("plain", "stripes", "checks", "dots")
SHAPE_CLASSES = [f"{texture}-{shape}" for shape in SHAPES for texture in TEXTURES]


def _outlines():
    """Of each shape: the radius at 256 angles from -pi to pi [6,256], and that of its hole [6]."""
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
    """The embedded data set: one textured shape an image, 24 classes (6 shapes x 4 textures).

    Drawn by numpy, the same on every call with the same seed. Colour, place, size, rotation,
    brightness gradient, clutter and noise vary. Labels are balanced.
    """
    rng = np.random.default_rng(seed)
    outlines, holes = _outlines()
    labels = rng.permutation(np.arange(count) % len(SHAPE_CLASSES))
    images = np.empty((count, size, size, 3), np.uint8)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1  # pixel centres in -1..1
    for start in range(0, count, 500):  # in chunks that stay in the cache
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
        # Clutter: bars across the image, behind the shape and (the last) in front of it.
        bars = []
        for _ in range(2):
            turn, offset = uniform(0, np.pi, 1, 1), uniform(-0.9, 0.9, 1, 1)
            distance = np.abs(np.cos(turn) * axis[:, None] + np.sin(turn) * axis - offset)
            bars.append((distance < uniform(0.02, 0.09, 1, 1), uniform(0, 1, 1, 1, 3)))
        for mask, colour in bars[:-1]:
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
        wave_u, wave_v = np.sin(pitch * u), np.sin(pitch * v)
        kinds = np.stack([
            np.zeros_like(inside), wave_u > 0, wave_u * wave_v > 0, wave_u + wave_v > 0.9
        ])  # fmt: skip
        second_colour = kinds[texture, np.arange(n)]
        one, other = uniform(0.5, 1, 1, 1, 3), uniform(0, 0.3, 1, 1, 3)
        painted = np.where(second_colour[..., None], other, one)
        canvas = np.where(inside[..., None], painted, canvas)
        mask, colour = bars[-1]
        canvas = np.where(mask[..., None], colour, canvas)
        canvas += rng.standard_normal(canvas.shape, np.float32) * uniform(0.02, 0.06, 1, 1, 1)
        images[start : start + n] = (canvas.clip(0, 1) * 255).astype(np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


# ---------------------------------------------------------------------------------------------
# Files: replaced whole or not at all
# ---------------------------------------------------------------------------------------------


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
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk names none
        raise


def save_whole(path: Path, state) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def kept(path: Path, made_by: dict, compute, together: bool = True):
    """What `compute()` returns, or the file at `path` if that was made by the very same things.

    together: several processes look for one file, that of process 0, and compute as one.
    """
    saved, writes = None, rank() == 0 or not together
    if path.is_file() and writes:
        with contextlib.suppress(UserError):  # a torn file is made again
            saved = read_checkpoint(path)
    if together:
        saved = gather_objects(saved)[0]
    if isinstance(saved, dict) and saved.get("made_by") == made_by:
        return saved["value"]
    value = compute()
    try:
        if writes:
            save_whole(path, {"made_by": made_by, "value": value})
    except OSError as error:
        print(f"note: {path} cannot be written ({error}): not kept", file=sys.stderr)
    return value


# Arguments that may differ between a run and its resumption: they do not change what is computed.
FREE = {"resume", "out", "device", "workers", "compare", "seeds", "eval"}
FREE |= {"script", "method", "plot", "save_minutes", "tensorboard"}
FREE |= {"per_class", "predict", "train_teacher"}
# What is in these files is compared by its hash.
BY_HASH = {"teacher_ckpt", "student_ckpt", "pretrained_teacher", "data_dir"}
FREE |= BY_HASH


def lasting(args) -> dict:
    """The arguments that decide what a run computes."""
    return {k: v for k, v in vars(args).items() if k not in FREE}


def _changed(saved: dict, wanted: dict) -> list[str]:
    """Names of the arguments that differ; a flag that did not exist yet was not given."""
    return [k for k, v in wanted.items() if (saved[k] != v if k in saved else v)]


FILES = ("last.pt", "metrics.jsonl", "result.json", "student.pt")
SET_ASIDE = ("previous.pt", "tensorboard")  # these too, where they are
PICTURES = ("similarities.png", "correlation_gap.png", "embeddings.png", "features.png")
PICTURES += ("curves.png", "detections.png")


class Run:
    """The folder of one run: `last.pt` to resume, `metrics.jsonl`, `result.json`, `student.pt`.

    `last.pt` is saved after every epoch, every --save-minutes and when a signal asks for a stop;
    `previous.pt` is the one before, should the disk damage the last. Of several processes all
    read, and process 0 writes.
    `args.plot`, where a script has it: names of the pictures that belong to the run too.
    """

    def __init__(self, args):
        self.args, self.dir, self.history = args, Path(args.out), []
        self.last, self.saved, self.done = self.dir / "last.pt", None, None
        self.damaged = False  # last.pt is, and previous.pt all there is
        self.previous, self.step = self.dir / "previous.pt", 0  # steps done in this epoch
        self.last_save = time.monotonic()
        self.on_gpu = pick_device(args.device).type == "cuda"
        self.lock = self.board = None
        wait_for_all()  # nobody reads what an earlier run is still writing
        self._look(args)
        wait_for_all()
        if rank() == 0:
            self._claim(args)

    def _look(self, args):
        """What does the folder hold?"""
        lock = self.dir / ".lock"  # the sign that a run was started here
        if args.resume and (self.last.exists() or self.previous.exists()):
            self.saved = self._read()
            saved, wanted = self.saved["args"], lasting(args)
            changed = _changed(saved, wanted)
            if changed:
                was = ", ".join(f"{flag(k)} {saved[k]}" if k in saved else f"no {flag(k)}"
                                for k in changed)  # fmt: skip
                raise UserError(
                    f"--resume: {self.dir} was started with {was}; give the same again, or move"
                    " that folder away"
                )
            if len(self.saved["ranks"]) != world():
                raise UserError(
                    f"--resume: {self.dir} was started with {len(self.saved['ranks'])} processes,"
                    f" here are {world()}; start as many again"
                )
            files = [self.dir / name for name in (*FILES, *(getattr(args, "plot", None) or ()))]
            if self.saved["epoch"] == args.epochs and all(path.exists() for path in files):
                self.done = self._result()
        elif args.resume and not lock.exists():
            raise UserError(f"--resume: nothing to resume in {self.dir} (no last.pt)")

    def _result(self):
        """What the finished run found, if that is whole and of the files that are named now."""
        with contextlib.suppress(*NOT_A_RESULT):
            result = json.loads((self.dir / "result.json").read_text())
            table([result])
            then, now = (
                [os.path.realpath(v) if isinstance(v := args.get(k), str) else v for k in BY_HASH]
                for args in (result["args"], vars(self.args))
            )
            if then == now:
                return result
        return None  # `restore` compares what is in the files, and it is written again

    def _claim(self, args):
        if getattr(args, "tensorboard", None):
            _summary_writer()  # is it there?
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.dir / ".lock", "w")  # held until the process ends
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # others: a file system without locks, where we do without
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"--out {self.dir}: another process is at work there") from None
        for name in (*FILES, *PICTURES, "class_means.pt"):
            for half_written in self.dir.glob(f"{name}.*.tmp"):
                half_written.unlink()
        if self.args.resume and self.saved is None:
            print(f"note: nothing was saved in {self.dir} yet: from the start", file=sys.stderr)

    def restore(self, **objects) -> int:
        """Load what `end_epoch` saved into the objects, and the random state; -> first epoch to do.

        Of a fresh run it saves the start, so that there is always something whole to resume from.
        Files of an earlier run are not lost: they move to a folder `old1`, `old2`, ...
        """
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if self.saved is None:
            if rank() == 0:
                self._set_aside()
                self._open_board()
            else:  # dropout and the like: drawn by each process for its own images
                torch.manual_seed((torch.initial_seed() + 7919 * rank()) % 2**63)
            self._save(objects)
            return 0
        for name, value in objects.items():
            saved = self.saved["state"].get(name)
            if not hasattr(value, "load_state_dict"):
                if value != saved:
                    raise UserError(
                        f"--resume: the {name} is not the one {self.last} began with; give that,"
                        " or start anew without --resume"
                    )
            else:
                try:
                    value.load_state_dict(saved)
                except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
                    raise UserError(f"--resume: {self.last} does not hold this {name}") from None
        mine = self.saved["ranks"][rank()]
        try:
            torch.set_rng_state(mine["rng"])
            random.setstate(mine["python_rng"])
        except (RuntimeError, ValueError, TypeError, AttributeError):
            raise UserError(f"--resume: {self.last} does not hold random states") from None
        if mine["cuda_rng"] is not None and self.on_gpu:
            torch.cuda.set_rng_state(mine["cuda_rng"])
        self.history, self.step = self.saved["history"], self.saved["step"]
        self.last_save = time.monotonic()
        if rank() == 0:
            self._open_board()
        return self.saved["epoch"]

    def _open_board(self):
        """TensorBoard's; of a resumed run it is told everything again, lest an epoch be missing."""
        if getattr(self.args, "tensorboard", None):
            purge = {"purge_step": 1} if self.history else {}
            self.board = _summary_writer()(self.dir / "tensorboard", **purge)
            for metrics in self.history:
                self._show(metrics)

    def _show(self, metrics):
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, metrics["epoch"])
        self.board.flush()

    def _set_aside(self):
        names = (*SET_ASIDE, *FILES, *PICTURES)
        if old := [path for path in map(self.dir.joinpath, names) if path.exists()]:
            number = 1
            while (aside := self.dir / f"old{number}").exists():
                number += 1
            aside.mkdir()
            for path in old:
                path.rename(aside / path.name)
            print(f"note: the run that was in {self.dir} is kept in {aside}", file=sys.stderr)

    def _read(self):
        try:
            return _read_last(self.last)
        except UserError as error:
            if not self.previous.exists():
                raise
            saved = _read_last(self.previous)
            print(f"note: {error}; going on from {self.previous}", file=sys.stderr)
            self.damaged = True
            return saved

    def _save(self, objects, step=0, meter=None):
        for name, value in objects.items():
            tensors = value.state_dict().values() if isinstance(value, nn.Module) else ()
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                raise UserError(
                    f"weights of the {name} became infinite or nan in epoch"
                    f" {len(self.history) + (meter is not None)}: lower --lr or --teacher-lr;"
                    f" {self.last} holds the last good state"
                )
        mine = {
            "meter": meter and meter.state(),
            "rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
            "cuda_rng": torch.cuda.get_rng_state() if self.on_gpu else None,
        }
        ranks = gather_objects(mine)
        self.last_save = time.monotonic()
        if rank() > 0:
            return
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in objects.items()}
        if not self.damaged:
            self.previous.unlink(missing_ok=True)
            try:
                os.link(self.last, self.previous)
            except FileNotFoundError:  # the first
                pass
            except OSError:  # a disk without links
                self.last.replace(self.previous)
        save_whole(
            self.last,
            {
                "epoch": len(self.history),
                "step": step,
                "state": state,
                "args": lasting(self.args),
                "history": self.history,
                "ranks": ranks,
            },
        )
        self.damaged = False

    def steps(self, batches, steps: int, meter, objects: dict):
        """Number and batch of each step of an epoch, of which `self.step` are already done.

        After a step, if --save-minutes have passed or a signal came, everything is saved (the
        objects, the meter); after a signal the program then stops.
        """
        if self.step:
            mine = self.saved["ranks"][rank()]["meter"]
            try:
                meter.restore(mine, pick_device(self.args.device))
            except (AttributeError, KeyError, TypeError):
                raise UserError(f"--resume: {self.last} does not hold half an epoch") from None
        minutes = getattr(self.args, "save_minutes", None) or math.inf
        _Signals.wait = True
        for step, batch in enumerate(batches, self.step):
            yield step, batch
            late = time.monotonic() - self.last_save > 60 * minutes
            save, stop = _highest(int(late), _Signals.pending or 0)
            if stop or (save and step + 1 < steps):  # end_epoch saves, after the test
                meter.check()
                self._save(objects, step + 1, meter)
                if stop:
                    raise Stopped(stop)
        self.step = 0

    def end_epoch(self, metrics: dict, **objects) -> None:
        """Keep the epoch: its metrics line and everything needed to go on from here."""
        self.history.append(metrics)
        self._save(objects)
        if rank() == 0:
            self._write_metrics()
        if self.board:
            self._show(metrics)
        [stop] = _highest(_Signals.pending or 0)
        if stop:
            raise Stopped(stop)
        _Signals.wait = False

    def _write_metrics(self):
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_whole(self.dir / "metrics.jsonl", lines.encode())

    def finish(self, student: nn.Module, data: Data, teacher, **more) -> dict:
        """Write `student.pt` and `result.json`, with `more` in it; -> the result."""
        scores = {
            "teacher_top1": teacher and teacher.top1,
            "teacher_hash": teacher and teacher.hash,
            "train_images": len(data.train.labels),
            "test_images": len(data.test.labels),
            "data_hash": data.fingerprint,
            "student_top1": self.history[-1]["test_top1"],
        }
        return self.write_result(student, scores, more)

    def finish_detection(self, student: nn.Module, data: "DetectionData", teacher) -> dict:
        """The same for a detector: AP in the place of top-1."""
        last = self.history[-1]
        scores = {
            "teacher_ap": teacher and teacher.scores["AP"],
            "teacher_hash": teacher and teacher.hash,
            "train_images": len(data.train),
            "val_images": len(data.val),
            "bad_images": data.bad,
            "data_hash": data.fingerprint,
            "student_ap": last["AP"],
            "ap": {name: last[name] for name in AP_NAMES},
            "classes": data.classes,
        }
        return self.write_result(student, scores, {})

    def write_result(self, student: nn.Module, scores: dict, more: dict) -> dict:
        """`finish`, with whatever the scores of this kind of run are."""
        args, lines = self.args, self.history
        seconds = sum(line["seconds"] for line in lines)
        images = sum(line["images_per_second"] * line["seconds"] for line in lines)
        names = ("method", "dataset", "teacher", "student", "seed", "epochs")
        result = {
            **{name: getattr(args, name) for name in names},
            "world_size": world(),
            **scores,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1),
            **more,
            "peak_memory_mb": peak_memory_mb(args.device),
            "script": f"{args.script}.py",
            "argv": sys.argv[1:],
            "args": {
                k: v for k, v in vars(args).items() if k not in ("resume", "compare", "seeds")
            },
            "commit": _commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
            "device": device_name(args.device),
        }
        if self.on_gpu:
            result["tf32"] = torch.backends.cudnn.allow_tf32  # of convolutions, under fp32
        if rank() == 0:
            weights = {k: v.cpu() for k, v in student.state_dict().items()}
            self._write_metrics()  # again: a stop may have come between last.pt and it
            self.previous.unlink(missing_ok=True)
            save_whole(self.dir / "student.pt", weights)
            write_whole(self.dir / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        wait_for_all()  # the files are there
        return result


def _read_last(path):
    saved = read_checkpoint(path)
    parts = dict(epoch=int, step=int, state=dict, args=dict, history=list, ranks=list)
    whole = isinstance(saved, dict) and all(isinstance(saved.get(k), t) for k, t in parts.items())
    rank_parts = {"meter", "rng", "python_rng", "cuda_rng"}
    whole = whole and 0 <= saved["epoch"] == len(saved["history"]) and saved["step"] >= 0
    if not whole or not all(isinstance(r, dict) and rank_parts <= r.keys() for r in saved["ranks"]):
        raise UserError(f"{path}: not a run's last.pt; move its folder away to start again")
    return saved


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def peak_memory_mb(device: str) -> int:
    """Of the GPU's allocator since the run began; on a CPU, of the process since it began."""
    if pick_device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def device_name(device: str) -> str:
    if pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _commit():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Meter:
    """Running sums of one epoch, kept on the device; the live line; the watch for nan."""

    def __init__(self, args, epoch: int, images_per_epoch: int):
        self.epoch, self.epochs, self.total = epoch, args.epochs, images_per_epoch
        # The processes add a share of a batch each, or all of them all of it.
        self.shares = 1 if getattr(args, "gather", "local") == "global" else world()
        self.images, self.sums, self.bad, self.names = 0, 0, None, ()
        self.start = self.shown = time.perf_counter()
        self.live = bool(sys.stdout) and sys.stdout.isatty()

    def add(self, logits: Tensor, labels: Tensor, terms: dict) -> None:
        """One step: a loss term is a 0-dim tensor, or the number 0.0 where it is switched off."""
        terms = {name: value for name, value in terms.items() if torch.is_tensor(value)}
        self.names = tuple(terms)
        with torch.no_grad():
            values = torch.stack([value.float() for value in terms.values()])
            broken = ~torch.isfinite(values)
            # Which terms were the first to break; later ones break because the weights did.
            self.bad = broken if self.bad is None else torch.where(self.bad.any(), self.bad, broken)
            correct = (logits.argmax(1) == labels).sum().float()
            self.sums = self.sums + torch.cat([values * len(labels), correct[None]]).double()
        self.images += len(labels)
        self._show()

    def _show(self):
        now = time.perf_counter()
        if now - self.shown > 0.5:  # reading a value waits for the device: not at every step
            self.shown = now
            self.check()
            if self.live:
                width = shutil.get_terminal_size().columns - 1  # \r cannot go back over a wrap
                print(f"\r{self._line(now - self.start)[:width]}\x1b[K", end="", flush=True)

    def state(self) -> dict:
        """All of it, for a checkpoint within an epoch."""
        seconds = time.perf_counter() - self.start
        kept = {name: getattr(self, name) for name in ("images", "sums", "bad", "names")}
        # On the CPU: else every process would open all GPUs to read what the others have.
        kept = {k: v.cpu() if torch.is_tensor(v) else v for k, v in kept.items()}
        return {"seconds": seconds} | kept

    def restore(self, state: dict, device) -> None:
        for name in ("images", "sums", "bad", "names"):
            value = state[name]
            setattr(self, name, value.to(device) if torch.is_tensor(value) else value)
        self.start -= state["seconds"]

    def check(self) -> None:
        """UserError: a loss term was not finite."""
        if self.bad is not None and bool(self.bad.any()):
            names = [name for name, bad in zip(self.names, self.bad.tolist()) if bad]
            print("\n" * self.live, end="", flush=True)
            raise UserError(
                f"the loss term {' and '.join(names)} became infinite or nan in epoch"
                f" {self.epoch + 1}: lower --lr (of a teacher: --teacher-lr) or the term's weight;"
                " last.pt holds the last good state"
            )

    def _means(self):
        sums = (self.sums / self.images).tolist()
        return dict(zip(self.names, sums)), 100 * sums[-1]

    def _line(self, seconds):
        """seconds: spent on the images so far."""
        images = self.images * self.shares
        left = (self.total * (self.epochs - self.epoch) - images) / images
        left *= time.perf_counter() - self.start
        terms, top1 = self._means()
        rate = f"{images / seconds:6.0f} images/s  {_clock(left)} left"  # first: lines may be cut
        means = "  ".join(f"{name} {value:#.3g}" for name, value in terms.items())
        return f"epoch {self.epoch + 1:3d}/{self.epochs}  {rate}  {means}  train {top1:5.2f} %"

    def _add_up(self):
        if self.shares > 1:
            sum_over_ranks(self.sums)
            self.images, self.shares = sum(_counts(self.images)), 1

    def close(self) -> dict:
        """-> the epoch's means, train top-1 in %, seconds and images/s."""
        self.check()
        seconds = time.perf_counter() - self.start
        self._add_up()
        terms, top1 = self._means()
        return {
            "epoch": self.epoch + 1,
            **{name: float(f"{value:.6g}") for name, value in terms.items()},
            "train_top1": round(top1, 3),
            "seconds": round(seconds, 3),
            "images_per_second": round(self.images / seconds, 1),
        }

    def report(self, metrics: dict) -> None:
        """The epoch's line, after the test."""
        line = self._line(metrics["seconds"])
        line += f"  test {metrics['test_top1']:5.2f} %  lr {metrics['lr']:.4g}"
        print(f"\r{line}\x1b[K" if self.live else line, flush=True)


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------------------------------------
# The teacher, and evaluation
# ---------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device() if name == "cuda" else None)


def pyplot(asked_by: str = "--plot"):
    """matplotlib's, drawing into files. UserError: it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError(f"{asked_by} needs matplotlib: pip install matplotlib") from None
    plt.switch_backend("agg")
    return plt


def as_text(name: str) -> str:
    """A class's name for matplotlib, to which $ begins a formula and _ hides a label."""
    return " " + name.replace("$", r"\$")


def save_figure(figure, path: Path) -> None:
    if rank() > 0:
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_whole(path, buffer.getvalue())
    print(f"picture: {path}", flush=True)


def autocast(args, device: torch.device):
    """bfloat16 for convolutions and matrix products under --precision bf16; else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def compiled(args, *networks):
    """The networks as --compile runs them, sharing their weights; without it, they themselves.

    Two graphs a network, for full batches and for the last, and none from earlier runs in this
    process: else a resumed run would compute with other kernels than one that never stopped.
    """
    if not args.compile:
        return networks
    torch.compiler.reset()
    return [network and torch.compile(network, dynamic=False) for network in networks]


def take_buffers(model: nn.Module) -> None:
    """BatchNorm's statistics, of which every process has its own: those of process 0."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, args) -> float:
    """Top-1 on the test split, in %. Leaves the model in eval mode.

    Several processes share the images; BatchNorm's statistics are those of process 0.
    """
    model.eval()
    take_buffers(model)
    correct = torch.zeros((), dtype=torch.int64, device=data.device)
    for images, labels in data.batches("test", 500, shared=True):
        with autocast(args, data.device):
            correct += (model(images).argmax(1) == labels).sum()
    sum_over_ranks(correct)
    return round(100 * int(correct) / len(data.test.labels), 3)


@torch.no_grad()
def probe(model: nn.Module, data: Data) -> Features:
    """Its features of two test images, to read off widths; the model stays as it was."""
    was_training = model.training
    images = data.first_images().to(next(model.parameters()).device)
    try:
        return model.eval()(images, return_features=True)[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{getattr(model, 'name', 'the model')} does not take {data.image_size}-pixel images"
            f" ({str(error).splitlines()[0]}): choose another model or --image-size"
        ) from None
    finally:
        model.train(was_training)


class Teacher(NamedTuple):
    net: nn.Module  # eval mode, frozen, BatchNorm folded
    top1: float  # on the test split, %
    hash: str  # of its weights


_EVALUATED: dict = {}


def get_teacher(args, data: Data, train) -> Teacher:
    """The teacher named by --teacher: from --teacher-ckpt, else from `checkpoints/`, else trained;
    with --pretrained-teacher, torchvision's.

    `train(args)` is the calling script's own `main`: a teacher is a student without a teacher.
    UserError: a checkpoint that does not fit, a --teacher-ckpt near chance, or a teacher in
    `checkpoints/` that was trained in another way than this command asks for.
    """
    net = build_model(args.teacher, data.num_classes)
    path = Path(args.teacher_ckpt or f"checkpoints/{args.dataset}_{args.teacher}.pt")
    if args.pretrained_teacher:
        path = "torchvision"
        if data.num_classes != 1000:
            raise UserError(
                f"--pretrained-teacher: it knows ImageNet's 1,000 classes, here are"
                f" {data.num_classes}; --pretrained trains a teacher that starts from those weights"
            )
        net = build_model(args.teacher, data.num_classes, pretrained=True)
    elif not args.teacher_ckpt:
        teacher_args = _teacher_args(args)
        recipe = {name: getattr(teacher_args, name, None) for name in TEACHER_RECIPE}
        recipe |= {"data": data.fingerprint, "images": len(data.train.labels)}
        if gather_objects(path.exists())[0]:
            _check_recipe(path, recipe)
        else:
            print(f"teacher: no {path}; training it for {teacher_args.epochs} epochs", flush=True)
            _writable(path.parent)
            result = train(_resumed_if_begun(teacher_args, data))
            if rank() == 0:
                weights = read_checkpoint(Path(teacher_args.out) / "student.pt")
                top1 = result["student_top1"]
                save_whole(path, {"model": weights, "recipe": recipe, "test_top1": top1})
            wait_for_all()
    if not args.pretrained_teacher:
        load_weights(net, path)
    probe(net, data)  # does it take images of this size?
    weights_hash = state_hash(net)
    net = net.to(data.device, memory_format=torch.channels_last)
    net = fold_batchnorm(net, data.first_images())
    key = (weights_hash, data.fingerprint, args.precision)
    if key not in _EVALUATED:
        top1 = evaluate(net, data, args)
        print(f"teacher {args.teacher} from {path}: test {top1:.2f} %", flush=True)
        if near_chance(top1, data.num_classes):
            problem = f"{path}: {top1:.2f} % on the test images is near chance"
            if args.teacher_ckpt or args.pretrained_teacher:
                raise UserError(f"{problem}: other class order, preprocessing or --dataset?")
            print(f"warning: {problem}: train it longer (--teacher-epochs)", file=sys.stderr)
        _EVALUATED[key] = top1
    return Teacher(net, _EVALUATED[key], weights_hash)


def _writable(folder):
    """UserError: the folder, made if need be, cannot be written; so before the work, not after."""
    if rank() == 0:
        folder.mkdir(exist_ok=True)
    if not gather_objects(rank() > 0 or os.access(folder, os.W_OK))[0]:
        raise UserError(f"{folder}/ cannot be written, where the teacher would be kept")


def near_chance(top1: float, num_classes: int) -> bool:
    """Below twice chance; with two or three classes that is out of reach, so 1.2 times."""
    return top1 < (2 if num_classes > 3 else 1.2) * 100 / num_classes


def _check_recipe(path, recipe):
    saved = read_checkpoint(path)
    saved = saved.get("recipe") if isinstance(saved, dict) else None
    saved = saved if isinstance(saved, dict) else {}
    other = {k: f"{k} {saved.get(k)} (asked: {v})" for k, v in recipe.items() if saved.get(k) != v}
    if "script" in other and saved.get("script"):
        # Another method's script has its own optimizer by default: its teacher serves all scripts.
        different = [other.pop(k) for k in ("script", *TEACHER_OPTIMIZER) if k in other]
        print(f"note: {path} was trained with {', '.join(different)}; used as it is", flush=True)
    if other:
        raise UserError(
            f"{path} is a teacher trained otherwise: {', '.join(other.values())}. Ask for the same,"
            f" or give --teacher-ckpt {path} to use it anyway, or move it away to train another"
        )


# What a teacher's training shares with its student's; all else belongs to the method and is off.
TEACHER_OPTIMIZER = ("recipe", "lr", "batch_size", "momentum", "nesterov", "weight_decay")
TEACHER_KEEPS = ("dataset", "data_dir", "image_size", "train_size", "val_size", "precision")
TEACHER_KEEPS += ("device", "workers", "compile", "script", "pretrained", "gather")
TEACHER_KEEPS += ("save_minutes", "tensorboard", *TEACHER_OPTIMIZER)
# What decides its weights, besides the data; kept in its checkpoint.
TEACHER_RECIPE = ("student", "epochs", "seed", "precision", "image_size", "pretrained", "script")
TEACHER_RECIPE += TEACHER_OPTIMIZER


def _teacher_args(args):
    """The arguments that train the teacher: the same recipe, every loss but cross-entropy off."""
    new = {k: v if k in TEACHER_KEEPS else 0.0 for k, v in vars(args).items()}
    new |= dict(student=args.teacher, teacher=None, teacher_ckpt=None, method="teacher")
    new |= dict(ce_weight=1.0, lr=args.teacher_lr, epochs=args.teacher_epochs)
    new |= dict(seed=0)  # whatever the students' seeds: all of them learn from one teacher
    new |= dict(out=f"runs/teacher-{args.dataset}-{args.teacher}", resume=False)
    return argparse.Namespace(**new)


def _resumed_if_begun(args, data):
    """Go on with a teacher that was stopped half-way."""
    for name in ("last.pt", "previous.pt"):
        with contextlib.suppress(UserError):
            last = _read_last(Path(args.out) / name)
            same_data = last["state"].get("data") == data.fingerprint
            args.resume = same_data and not _changed(last["args"], lasting(args))
            break
    return args


# ---------------------------------------------------------------------------------------------
# Detection: COCO's layout, torchvision's Faster R-CNN with FPN, average precision
# ---------------------------------------------------------------------------------------------

DETECTORS = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")  # their backbones
# MobileNetV2's levels as in the paper: 24, 32, 96 and 320 channels at strides 4, 8, 16, 32.
# torchvision's own choice of levels is another.
MOBILENET_LEVELS = {"3": "0", "6": "1", "13": "2", "17": "3"}
COCO_WEIGHTS = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
COCO_CLASSES = COCO_WEIGHTS.meta["categories"]  # by COCO's id, 0 the background, 91 with the gaps


class Annotated(NamedTuple):
    """An image of a detection set, not decoded yet."""

    image_id: int
    path: str
    width: int
    height: int
    boxes: Tensor  # [N,4] float32: x1, y1, x2, y2 in pixels, inside the image
    labels: Tensor  # [N] int64, 1 or more


class DetectionData:
    """A detection set. Label 0 is the background.

    classes: a name for every label, "N/A" for a gap. category_ids: the files' number of a label.
    truth: the validation split's annotations, whole, as the evaluator wants them. bad: how many
    images --skip-bad-images left out.
    """

    def __init__(self, train, val, truth, classes, category_ids, bad, fingerprint, workers, device):
        self.train, self.val, self.truth, self.device = train, val, truth, device
        self.classes, self.category_ids, self.num_classes = classes, category_ids, len(classes)
        self.bad, self.fingerprint, self.workers = bad, fingerprint, workers

    def steps(self, batch_size: int) -> int:
        """Batches in a shuffled pass."""
        return len(self._batches(self.train, batch_size, 0))

    def _batches(self, samples, batch_size, seed):
        """Lists of (index, flip?). Shuffled: wide images with wide ones, tall with tall, for less
        padding; what is left over of both makes the last batches. A last batch of one image (for
        a process) is left out, since BatchNorm on a 1x1 map is not defined on it."""
        if seed is None:
            keys = [(i, False) for i in range(len(samples))]
            return [keys[k : k + batch_size] for k in range(0, len(keys), batch_size)]
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(samples), generator=rng).tolist()
        flips = (torch.rand(len(samples), generator=rng) < 0.5).tolist()
        batches, rest = [], []
        for wide in (True, False):
            group = [i for i in order if (samples[i].width >= samples[i].height) == wide]
            whole = len(group) - len(group) % batch_size
            batches += [group[k : k + batch_size] for k in range(0, whole, batch_size)]
            rest += group[whole:]
        batches += [rest[k : k + batch_size] for k in range(0, len(rest), batch_size)]
        if len(batches) > 1 and len(batches[-1]) < min(2 * world(), batch_size):
            batches.pop()
        if len(batches[-1]) < world():
            raise UserError(
                f"--batch-size {batch_size} of {len(samples)} images: {world()} processes need one"
                " each"
            )
        order = torch.randperm(len(batches), generator=rng).tolist()
        return [[(i, flips[i]) for i in batches[k]] for k in order]

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int | None = None,
        limit: int | None = None,
        part: slice = slice(None),
        shared: bool = False,
    ):
        """One pass, decoded by worker processes: (images, targets, image ids) of a batch.

        images: list of [3,H,W] in 0..1. targets: list of {"boxes", "labels"}, as torchvision's
        detectors take them. With a seed: shuffled, flipped with probability 1/2; the same seed
        gives the same batches, whatever the workers. limit: the first so many images. part: of the
        pass, such as slice(3, None) to go on after three batches. shared: what falls to this
        process; with a seed a part of every batch, without one a part of the batches.
        """
        samples = getattr(self, split)[:limit]
        plan = self._batches(samples, batch_size, seed)[part]
        if shared and seed is None:
            plan = plan[share(len(plan))]
        elif shared:
            plan = [batch[share(len(batch))] for batch in plan]
        for keys, decoded in zip(plan, _decoded_batches(samples, plan, self.workers)):
            images, targets = [], []
            for (index, flip), image in zip(keys, decoded):
                if not torch.is_tensor(image):
                    raise UserError(f"{image}; or leave such images out with --skip-bad-images")
                images.append(image.to(self.device).float().div_(255))
                sample = samples[index]
                x1, y1, x2, y2 = sample.boxes.unbind(1)
                if flip:
                    x1, x2 = sample.width - x2, sample.width - x1
                boxes = torch.stack([x1, y1, x2, y2], 1).to(self.device)
                targets.append({"boxes": boxes, "labels": sample.labels.to(self.device)})
            yield images, targets, [samples[index].image_id for index, _ in keys]


class _Decoder(torch.utils.data.Dataset):
    """(index, flip?) -> image [3,H,W] uint8, or what is wrong with it.

    Holds no tensors: each that a worker has or sends keeps a file open, and there are many images.
    """

    def __init__(self, samples):
        self.files = [(sample.path, sample.width, sample.height) for sample in samples]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        index, flip = key
        path, *size = self.files[index]
        try:
            image = read_rgb(path)
        except UserError as error:
            return str(error)
        if list(image.size) != size:
            found, says = ("x".join(map(str, s)) for s in (image.size, size))
            return f"{path}: is {found}, its annotation says {says}; mend one"
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (image.flip(2) if flip else image).contiguous()


def _decoded_batches(samples, plan, workers):
    """For each list of keys in the plan, the list of what _Decoder makes of them."""
    most = max(
        (sum(3 * samples[i].width * samples[i].height for i, _ in b) for b in plan), default=0
    )
    return _in_workers(_Decoder(samples), workers, most, batch_sampler=plan)


def _readable(samples, workers):
    """Those that can be decoded; the others are named. A pass of its own, so that the batches are
    full and a resumed run counts them alike."""
    plan, good = [[(i, False)] for i in range(len(samples))], []
    for sample, [image] in zip(samples, _decoded_batches(samples, plan, workers)):
        if torch.is_tensor(image):
            good.append(sample)
        else:
            print(f"note: {image}: left out", file=sys.stderr)
    return good


def load_detection_data(args, device) -> DetectionData:
    """The detection set that the command line asks for; kept, so that several runs load it once."""
    torch.backends.cudnn.benchmark = False  # nearly every batch has another shape
    root, splits = Path(args.data_dir), (args.train_split, args.val_split)
    if args.dataset == "shapes":
        with one_rank_first():
            root, splits = draw_scenes(root, args.image_size), ("train2017", "val2017")
    key = ("detection", str(root), *splits, args.train_size, args.skip_bad_images, str(device))
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = _load_detection_data(args, root, splits, device)
    return _LOADED[key]


def _load_detection_data(args, root, splits, device):
    _evaluator()  # fail now, not after an epoch
    digest, tables = hashlib.sha256(), []
    for split in splits:
        path = root / "annotations" / f"instances_{split}.json"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--data-dir: cannot read {path} ({error.strerror}); wanted COCO's layout,"
                f" annotations/instances_{splits[0]}.json, {splits[0]}/*.jpg and the same for"
                f" {splits[1]} (--dataset shapes needs no files)"
            ) from None
        digest.update(content)
        tables.append(_read_table(path, content))
    categories = tables[0][0]
    if tables[1][0] != categories:
        raise UserError(f"{splits[0]} and {splits[1]} list different categories; use one list")
    if all(0 < i < 91 and COCO_CLASSES[i] == name for i, name in categories.items()):
        classes, ids = list(COCO_CLASSES), list(range(91))  # so that COCO's weights fit
    else:  # any ids, from 0 or with gaps: counted through
        ids = [None, *sorted(categories)]
        classes = ["__background__", *(categories[i] for i in ids[1:])]
    label_of = {category: label for label, category in enumerate(ids) if category in categories}
    workers = min(8, cores()) if args.workers is None else args.workers
    read, bad = [], 0
    for split, (_, images, boxes) in zip(splits, tables):
        samples = _read_split(root / split, images, boxes, label_of, args.skip_bad_images)
        if args.skip_bad_images:
            samples = _readable(samples, workers)
            bad += len(images) - len(samples)
        digest.update(repr([sample.image_id for sample in samples]).encode())
        read.append(samples)
    if bad:
        print(f"note: {bad} bad images are left out", flush=True)
    train = [sample for sample in read[0] if len(sample.labels)]
    if len(train) < len(read[0]):
        print(f"note: {splits[0]}: {len(read[0]) - len(train)} images without boxes are left out")
    if not train:
        raise UserError(f"{splits[0]}: no image with a box to train on")
    if args.train_size:
        if args.train_size > len(train):
            raise UserError(f"--train-size {args.train_size}: there are {len(train)} images")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        train = [train[i] for i in sorted(order[: args.train_size])]
    truth = _truth(tables[1], {sample.image_id for sample in read[1]})
    if not any(not box["iscrowd"] for box in truth["annotations"]):
        raise UserError(f"{splits[1]}: no boxes to compare with; AP needs some")
    fingerprint = digest.hexdigest()[:16]
    return DetectionData(train, read[1], truth, classes, ids, bad, fingerprint, workers, device)


def _read_table(path, content):
    """-> {category id: name}, {image id: image}, annotations, all of them checked."""
    try:
        table = json.loads(content)
        categories = {c["id"]: str(c["name"]) for c in table["categories"]}
        images = {i["id"]: i for i in table["images"]}
        for image in images.values():
            os.fspath(image["file_name"]), int(image["width"]), int(image["height"])
        if not all(isinstance(number, int) for number in (*categories, *images)):
            raise TypeError("an id is not a whole number")
        annotations = table.get("annotations", [])
        for a in annotations:
            x, y, w, h = (float(v) for v in a["bbox"])
            if not all(map(math.isfinite, (x, y, w, h))):
                raise UserError(f"{path}: annotation {a.get('id')}: bbox {a['bbox']} is not finite")
            for key, known in (("image_id", images), ("category_id", categories)):
                if a[key] not in known:
                    problem = f"annotation {a.get('id')}: {key} {a[key]} is not in the file"
                    raise UserError(f"{path}: {problem}; add it or remove the annotation")
        if not categories or not images:
            raise UserError(f"{path}: lists no {'images' if categories else 'categories'}")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not COCO's instances format ({type(error).__name__}: {error}); wanted"
            " images, annotations and categories as in instances_val2017.json"
        ) from None
    return categories, images, annotations


def _read_split(folder, images, annotations, label_of, skip_bad_images):
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"--data-dir: cannot read {folder} ({error.strerror})") from None
    by_image, crowds, empty, missing = {}, 0, 0, []
    for a in annotations:
        if a.get("iscrowd"):
            crowds += 1
            continue
        image = images[a["image_id"]]
        x, y, w, h = a["bbox"]
        x1, y1 = max(0.0, x), max(0.0, y)
        x2, y2 = min(image["width"], x + w), min(image["height"], y + h)
        box = torch.tensor([x1, y1, x2, y2], dtype=torch.float32)
        if (box[2:] <= box[:2]).any():
            empty += 1
        else:
            by_image.setdefault(a["image_id"], []).append((box, label_of[a["category_id"]]))
    samples = []
    for image_id, image in images.items():
        name = image["file_name"]
        path = folder / name
        if name not in present and not path.is_file():  # a name may have folders in it
            missing.append(path)
            continue
        found = by_image.get(image_id, [])
        boxes = torch.stack([box for box, _ in found]) if found else torch.zeros(0, 4)
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        samples.append(
            Annotated(image_id, str(path), image["width"], image["height"], boxes, labels)
        )
    if missing and not skip_bad_images:
        raise UserError(
            f"{missing[0]}: no such image, but it is annotated ({len(missing)} missing);"
            " add it or leave such images out with --skip-bad-images"
        )
    odd = {"crowd regions": crowds, "boxes without area inside their image": empty}
    odd["missing images"] = len(missing)
    if left_out := ", ".join(f"{n} {what}" for what, n in odd.items() if n):
        print(f"note: {folder.name}: not trained on: {left_out}", flush=True)
    return samples


def _truth(table, image_ids):
    """COCO's annotations of these images, with the little that a file may lack."""
    categories, images, annotations = table
    kept_ones = []
    for a in annotations:
        if a["image_id"] in image_ids:
            area = a.get("area", a["bbox"][2] * a["bbox"][3])
            given = {key: a[key] for key in ("image_id", "category_id", "bbox")}
            # Numbered from 1: the evaluators take a match with number 0 for no match.
            number = len(kept_ones) + 1
            kept_ones.append({**given, "id": number, "area": area, "iscrowd": a.get("iscrowd", 0)})
    return {
        "info": {},
        "images": [{"id": i, **_size(images[i])} for i in images if i in image_ids],
        "annotations": kept_ones,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }


def _size(image):
    return {"width": image["width"], "height": image["height"]}


SCENES = {"train2017": 400, "val2017": 100}  # images of the drawn set


def draw_scenes(root: Path, size: int) -> Path:
    """The embedded detection set: 2 to 5 of SHAPES on a canvas, drawn once in COCO's layout.

    -> its folder under `root`. Images, boxes and classes are the same wherever they are drawn.
    """
    if size < 32:
        raise UserError(f"--image-size {size}: drawn scenes need 32 pixels or more")
    folder = root / f"shapes-scenes-{size}"
    if folder.is_dir():
        return folder
    half_done = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        (half_done / "annotations").mkdir(parents=True)
        for seed, (split, count) in enumerate(SCENES.items()):
            (half_done / split).mkdir()
            images, annotations = [], []
            for number in range(count):
                pixels, found = _draw_scene(np.random.default_rng((seed, number)), size)
                name = f"{number:06d}.png"
                Image.fromarray(pixels).save(half_done / split / name)
                images.append(dict(id=number, file_name=name, width=size, height=size))
                for shape, box in found:
                    entry = dict(image_id=number, category_id=shape + 1, bbox=box, iscrowd=0)
                    annotations.append(entry | dict(id=len(annotations) + 1, area=box[2] * box[3]))
            categories = [dict(id=k + 1, name=name) for k, name in enumerate(SHAPES)]
            table = dict(images=images, annotations=annotations, categories=categories)
            path = half_done / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(table))
        try:
            half_done.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(half_done, ignore_errors=True)
    return folder


def _draw_scene(rng, size):
    """-> [S,S,3] uint8, [(shape, [x, y, w, h])]: shapes that do not touch, on a shaded ground."""
    outlines, holes = _outlines()
    axis = np.arange(size, dtype=np.float32) + 0.5
    turn = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(turn) * axis[:, None] + np.sin(turn) * axis) / size
    first, second = rng.uniform(0.1, 0.6, (2, 3))
    canvas = first + ramp[..., None] * (second - first)
    found, taken = [], np.zeros((size, size), bool)
    for _ in range(rng.integers(2, 6)):
        shape, radius = rng.integers(len(SHAPES)), rng.uniform(0.11, 0.21) * size
        turn, colour = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1, 3)
        for _ in range(20):  # until it finds room; a full canvas stays as it is
            x, y = rng.uniform(1.2 * radius, size - 1.2 * radius, 2)
            dx, dy = axis - x, axis[:, None] - y
            angle = np.arctan2(dy, dx) + turn
            angle = ((angle + np.pi) * (256 / (2 * np.pi))).astype(np.int32) % 256
            distance = np.hypot(dx, dy) / radius
            whole = distance < outlines[shape][angle]
            (top, *_, bottom), (left, *_, right) = (np.flatnonzero(whole.any(k)) for k in (1, 0))
            around = (slice(top, bottom + 1), slice(left, right + 1))
            if not taken[around].any():
                taken[around] = True
                canvas = np.where((whole & (distance > holes[shape]))[..., None], colour, canvas)
                box = [int(v) for v in (left, top, right + 1 - left, bottom + 1 - top)]
                found.append((int(shape), box))
                break
    canvas = canvas + rng.standard_normal(canvas.shape) * rng.uniform(0.02, 0.05)
    return (canvas.clip(0, 1) * 255).astype(np.uint8), found


def build_detector(name: str, num_classes: int, args, frozen_norm: bool = False) -> nn.Module:
    """Faster R-CNN on an FPN over the backbone `name`, one of DETECTORS; the background counts.

    args: image_size, smallest_anchor, regions, fpn_width, pretrained_backbone. frozen_norm: for
    weights that are loaded and stay. UserError: the backbone's weights cannot be downloaded.
    """
    models = torchvision.models.detection
    pretrained = args.pretrained_backbone and not frozen_norm
    # Two or so images a GPU are too few for BatchNorm, so it is frozen in pretrained backbones.
    # Frozen as it starts it would normalise nothing: then it is trained, as torchvision does.
    frozen = pretrained or frozen_norm
    norm = torchvision.ops.FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    options = {"weights": "IMAGENET1K_V1" if pretrained else None, "norm_layer": norm}
    try:
        with one_rank_first() if pretrained else contextlib.nullcontext():  # downloads
            net = torchvision.models.get_model(name, **options)
    except OSError as error:
        raise UserError(
            f"cannot download the ImageNet weights of {name} ({error}); --no-pretrained-backbone"
            " starts from scratch"
        ) from None
    if name == "mobilenet_v2":
        body, levels, widths = net.features, MOBILENET_LEVELS, [24, 32, 96, 320]
    else:
        body, levels = net, {f"layer{k + 1}": str(k) for k in range(4)}
        widths = [net.inplanes // 8 * 2**k for k in range(4)]
        if pretrained:  # stem and first stage stay as they are
            for part in (net.conv1, net.bn1, net.layer1):
                part.requires_grad_(False)
    backbone = models.backbone_utils.BackboneWithFPN(
        body,
        levels,
        widths,
        args.fpn_width,
        torchvision.ops.feature_pyramid_network.LastLevelMaxPool(),
    )
    sides = [args.smallest_anchor * 2**k for k in range(5)]
    anchors = models.anchor_utils.AnchorGenerator(
        tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * 5
    )
    short = [args.image_size] if args.image_size else list(range(640, 801, 32))
    detector = models.FasterRCNN(
        backbone,
        num_classes,
        min_size=short,  # training: one of them at random; test: the last
        max_size=short[-1] * 1333 // 800,
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_train=1000,
        rpn_post_nms_top_n_test=min(1000, 2 * args.regions),
        box_batch_size_per_image=args.regions,
    )
    detector.name = name

    # torchvision makes anchors and boxes in the precision of what it is given; the 8 bits of
    # bfloat16 would move them by pixels.
    def full(x):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    heads = detector.rpn.head, detector.roi_heads.box_predictor
    detector.backbone.register_forward_hook(
        lambda _, inputs, maps: {name: full(x) for name, x in maps.items()}
    )
    heads[0].register_forward_hook(lambda _, inputs, out: tuple([full(x) for x in y] for y in out))
    heads[1].register_forward_hook(lambda _, inputs, out: tuple(full(x) for x in out))
    return detector


def load_detector(name: str, num_classes: int, args, path: str | Path) -> nn.Module:
    """A detector for inference with the weights in `path`, its norm frozen. UserError: no fit."""
    net = build_detector(name, num_classes, args, frozen_norm=True)
    state = {k: v for k, v in _state_dict(path).items() if not k.endswith("num_batches_tracked")}
    classes = len(state.get("roi_heads.box_predictor.cls_score.bias", ()))
    if classes and classes != num_classes:
        raise UserError(
            f"{path}: a detector of {classes} classes with the background, the data has"
            f" {num_classes}; give one trained on the same categories"
        )
    load_weights(net, path, state)
    return net.eval().requires_grad_(False)


class TeacherDetector(NamedTuple):
    net: nn.Module  # eval mode, frozen
    scores: dict  # AP and its kin on the validation split, %
    hash: str  # of its weights


def hopeless(ap: float) -> bool:
    """An AP that no trained detector has on its own data."""
    return ap < 1.0


DETECTOR_RECIPE = ("student", "epochs", "seed", "precision", "image_size", "smallest_anchor")
DETECTOR_RECIPE += ("regions", "fpn_width", "pretrained_backbone", "iterations", "script")
DETECTOR_RECIPE += TEACHER_OPTIMIZER


def get_teacher_detector(args, data: DetectionData, train) -> TeacherDetector:
    """The teacher: --teacher-ckpt, or trained by `train` (--train-teacher), or torchvision's.

    UserError: no weights, weights that do not fit, a loaded teacher that detects nothing.
    """
    path = Path(args.teacher_ckpt) if args.teacher_ckpt else None
    if not path and args.train_teacher:
        path = Path(f"checkpoints/detect-{args.dataset}_{args.teacher}.pt")
        new = vars(args) | dict(student=args.teacher, teacher=None, teacher_ckpt=None, plot=())
        new |= {k: 0.0 for k in vars(args) if k in ("nd_weight", "kd_weight", "reviewkd_weight")}
        new |= dict(seed=0, method="teacher", resume=False)
        if args.teacher_epochs:
            new |= dict(epochs=args.teacher_epochs, iterations=None)
        new |= dict(out=f"runs/teacher-detect-{args.dataset}-{args.teacher}")
        new = _resumed_if_begun(argparse.Namespace(**new), data)
        recipe = {name: getattr(new, name, None) for name in DETECTOR_RECIPE}
        recipe |= {"data": data.fingerprint, "images": len(data.train)}
        if gather_objects(path.exists())[0]:
            _check_recipe(path, recipe)
        else:
            print(f"teacher: no {path}; training it for {new.epochs} epochs", flush=True)
            _writable(path.parent)
            result = train(new)
            if rank() == 0:
                weights = read_checkpoint(Path(new.out) / "student.pt")
                save_whole(path, {"model": weights, "recipe": recipe, "ap": result["student_ap"]})
            wait_for_all()
    if path:
        net = load_detector(args.teacher, data.num_classes, args, path)
    else:
        net = _coco_detector(args, data)
    weights_hash, net = state_hash(net), net.to(data.device)
    key = ("detector", weights_hash, data.fingerprint, args.precision, args.image_size)
    if key not in _EVALUATED:
        scores = evaluate_detector(net, data, args)
        source = path or "torchvision"
        print(f"teacher {args.teacher} from {source}: {ap_line(scores)}", flush=True)
        if hopeless(scores["AP"]):
            problem = f"{source}: AP {scores['AP']:.2f} on the validation images"
            if not (args.train_teacher and not args.teacher_ckpt):
                raise UserError(f"{problem}: other categories, --image-size or --smallest-anchor?")
            print(f"warning: {problem}: train it longer (--teacher-epochs)", file=sys.stderr)
        _EVALUATED[key] = scores
    return TeacherDetector(net, _EVALUATED[key], weights_hash)


def _coco_detector(args, data):
    if args.teacher != "resnet50" or data.classes != list(COCO_CLASSES):
        what = "these categories" if args.teacher == "resnet50" else args.teacher
        raise UserError(
            f"--teacher: torchvision has no detector for {what}; give --teacher-ckpt FILE, or"
            " --train-teacher to train one first"
        )
    if args.fpn_width != 256:
        raise UserError(
            f"--fpn-width {args.fpn_width}: torchvision's teacher has 256; leave it out"
        )
    try:
        with one_rank_first():
            state = COCO_WEIGHTS.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise UserError(
            f"cannot download the teacher {COCO_WEIGHTS.url} ({error}); put that file into"
            f" {torch.hub.get_dir()}/checkpoints"
        ) from None
    net = build_detector("resnet50", 91, args, frozen_norm=True)
    net.load_state_dict(state)
    for module in net.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.eps = 0.0  # as these weights were trained
    return net.eval().requires_grad_(False)


AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@torch.no_grad()
def detect(model: nn.Module, data: DetectionData, args) -> list[dict]:
    """Its detections on the validation split, in COCO's format. Leaves the model in eval mode.

    Several processes share the batches; BatchNorm's statistics are those of process 0.
    """
    model.eval()
    take_buffers(model)
    found = []
    for images, _, image_ids in data.batches("val", args.batch_size, shared=True):
        with autocast(args, data.device):
            results = model(images)
        for image_id, result in zip(image_ids, results):
            boxes = torchvision.ops.box_convert(result["boxes"].float(), "xyxy", "xywh").tolist()
            scored = zip(boxes, result["labels"].tolist(), result["scores"].tolist())
            for box, label, score in scored:
                category = data.category_ids[label]
                found.append(dict(image_id=image_id, category_id=category, bbox=box, score=score))
    return [detection for part in gather_objects(found) for detection in part]


def _evaluator():
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise UserError("detection needs faster-coco-eval: pip install faster-coco-eval") from None
    return COCO, COCOeval_faster


def coco_ap(truth: dict, found: list[dict]) -> tuple[dict, dict]:
    """AP, AP50, AP75, APs, APm, APl in %, by faster-coco-eval; and AP by category id.

    None: there is nothing of that size or class to find.
    """
    annotated, evaluate_boxes = _evaluator()
    coco = annotated(truth)
    evaluator = evaluate_boxes(coco, coco.loadRes([dict(d) for d in found]), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()

    def percent(value):
        return None if value < 0 else round(100 * float(value), 3)

    scores = {name: percent(value) for name, value in zip(AP_NAMES, evaluator.stats)}
    precision = evaluator.eval["precision"]  # [IoU, recall, class, area, detections an image]
    by_class = [precision[:, :, k, 0, -1] for k in range(precision.shape[2])]
    by_class = [percent(p[p > -1].mean() if (p > -1).any() else -1) for p in by_class]
    return scores, dict(zip(evaluator.params.catIds, by_class))


def evaluate_detector(model: nn.Module, data: DetectionData, args) -> dict:
    """AP and its kin on the validation split, %."""
    found = detect(model, data, args)
    scores = coco_ap(data.truth, found)[0] if rank() == 0 else None
    return gather_objects(scores)[0]


def ap_line(scores: dict) -> str:
    shown = ((name, scores[name]) for name in AP_NAMES)
    return "  ".join(f"{name} {'-' if v is None else format(v, '.2f')}" for name, v in shown)


class DetectionMeter(Meter):
    """Meter without a training accuracy; a term that is not finite ends the run at its step.

    Its last argument: the images from the epoch's start to the end of the run. Of several
    processes each adds its own images.
    """

    def add(self, terms: dict, image_ids: list[int]) -> None:
        terms = {name: value for name, value in terms.items() if torch.is_tensor(value)}
        self.names = tuple(terms)
        values = torch.stack([value.detach().float() for value in terms.values()])
        if not bool(torch.isfinite(values).all()):
            names = [n for n, v in zip(self.names, values.tolist()) if not math.isfinite(v)]
            raise UserError(
                f"the loss term {' and '.join(names)} became infinite or nan in epoch"
                f" {self.epoch + 1}, images {', '.join(map(str, image_ids))}: lower --lr or the"
                " term's weight, or look at these images; last.pt holds an earlier state"
            )
        self.sums = self.sums + values.double() * len(image_ids)
        self.images += len(image_ids)
        self._show()

    def _line(self, seconds):
        images = self.images * self.shares
        left = max(0, self.total - images) / images * (time.perf_counter() - self.start)
        means = "  ".join(f"{name} {value:#.3g}" for name, value in self._term_means().items())
        rate = f"{images / seconds:5.1f} images/s  {_clock(left)} left"
        return f"epoch {self.epoch + 1:3d}/{self.epochs}  {rate}  {means}"

    def _term_means(self):
        return dict(zip(self.names, (self.sums / self.images).tolist()))

    def close(self) -> dict:
        seconds = time.perf_counter() - self.start
        self._add_up()
        return {
            "epoch": self.epoch + 1,
            **{name: float(f"{value:.6g}") for name, value in self._term_means().items()},
            "seconds": round(seconds, 3),
            "images_per_second": round(self.images / seconds, 1),
        }

    def report(self, metrics: dict) -> None:
        line = f"{self._line(metrics['seconds'])}  AP {metrics['AP']:.2f}  lr {metrics['lr']:.4g}"
        print(f"\r{line}\x1b[K" if self.live else line, flush=True)


def drawn_boxes(image: Image.Image, boxes: Tensor, labels: list[int], words: list[str]):
    """A copy of the image, its short side at least 480, with boxes [N,4] and a word at each."""
    scale = max(1, math.ceil(480 / min(image.size)))
    image = image.resize([scale * side for side in image.size], Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(14, min(image.size) // 34))
    for box, label, word in zip((boxes * scale).tolist(), labels, words):
        colour = f"hsl({label * 137.5 % 360},90%,70%)"  # neighbouring labels far apart
        pen.rectangle(box, outline=colour, width=2)
        corner = (box[0] + 3, box[1] + 1)
        pen.rectangle(pen.textbbox(corner, word, font), fill="black")
        pen.text(corner, word, colour, font)
    return image


@torch.no_grad()
def draw_sheet(data: DetectionData, columns: dict, args, path: Path, rows: int = 6) -> None:
    """The first validation images: ground truth, and what each network of `columns` finds."""
    figure, axes = pyplot().subplots(
        rows, 1 + len(columns), figsize=(4 * (1 + len(columns)), 4 * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], ("ground truth", *columns)):
        axis.set_title(title)
    for net in columns.values():
        net.eval()
    for line, (images, targets, _) in zip(axes, data.batches("val", 1, limit=rows)):
        image = Image.fromarray(images[0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
        labels = targets[0]["labels"].tolist()
        words = [data.classes[k] for k in labels]
        pictures = [drawn_boxes(image, targets[0]["boxes"].cpu(), labels, words)]
        for net in columns.values():
            with autocast(args, data.device):
                result = net(images)[0]
            pictures.append(drawn_boxes(image, *confident(result, data.classes)))
        for axis, picture in zip(line, pictures):
            axis.imshow(np.asarray(picture))
    save_figure(figure, path)
    pyplot().close(figure)


def confident(result: dict, classes: list[str], least: float = 0.5):
    """Of a detector's result: boxes scored `least` or more, labels, what to write at each."""
    keep = result["scores"] >= least
    labels, scores = result["labels"][keep].tolist(), result["scores"][keep].tolist()
    words = [f"{classes[k]} {score:.2f}" for k, score in zip(labels, scores)]
    return result["boxes"][keep].float().cpu(), labels, words


def as_trained(args) -> None:
    """For --eval: the settings in the result.json beside that file, if there is one."""
    args.classes = None
    try:
        result = json.loads((Path(args.eval).parent / "result.json").read_text())
        settings = ("student", "image_size", "smallest_anchor", "regions", "fpn_width")
        settings = {name: result["args"][name] for name in settings}
        args.classes = result["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    vars(args).update(settings)
    print("as trained:", *(f"{flag(name)} {value}" for name, value in settings.items()))


@torch.no_grad()
def draw_predictions(args) -> None:
    """--predict: boxes with a score of 0.5 and more, drawn on the user's own pictures."""
    device = pick_device(args.device)
    weights = _state_dict(args.eval)
    count = len(weights.get("roi_heads.box_predictor.cls_score.bias", ()))
    if count < 2:
        raise UserError(f"{args.eval}: not the weights of a detector")
    coco = list(COCO_CLASSES) if count == 91 else [f"class {k}" for k in range(count)]
    classes = args.classes if args.classes and len(args.classes) == count else coco
    net = load_detector(args.student, count, args, args.eval).to(device)
    folder = Path(args.out or "predictions")
    for name in args.predict:
        image = read_rgb(name, upright=True)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        with autocast(args, device):
            result = net([pixels.to(device).float() / 255])[0]
        boxes, labels, words = confident(result, classes)
        buffer, path = io.BytesIO(), folder / f"{Path(name).stem}-boxes.png"
        drawn_boxes(image, boxes, labels, words).save(buffer, format="png")
        write_whole(path, buffer.getvalue())
        print(f"{name}: {', '.join(words) or 'nothing found'}; picture: {path}", flush=True)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def at_most(most: int, least: int = 0):
    """An argparse type: a whole number between the two."""

    def whole_number(text):
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be from {least} to {most}")
        return int(text)

    whole_number.__name__ = "whole number"  # argparse: "invalid whole number value"
    return whole_number


seed, image_size = at_most(2**31 - 1), at_most(4096, least=8)


def weight(text: str) -> float:
    """A number from 0 on, within float32."""
    value = float(text)
    if not 0 <= value <= 1e30:
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 0 to 1e30")
    return value


def positive(text: str) -> float:
    """Within what float32 can square."""
    if not 1e-12 <= float(text) <= 1e12:
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 1e-12 to 1e12")
    return float(text)


def below_one(text: str) -> float:
    if weight(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be below 1")
    return float(text)


def file_path(text: str) -> str:
    """Of a file or folder; an empty one is a variable of the shell that was not set."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must name a file or folder")
    return text


YesNo = argparse.BooleanOptionalAction

positive_int.__name__, positive.__name__ = "whole number", "number"  # argparse: "invalid ... value"


def one_of(kind: str, names: list[str]):
    """An argparse type: one of `names`, else an error that offers the nearest."""

    def check(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} '{text}'{nearest(text, names)}")
        return text

    return check


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a methods section would not mention: where files lie, on what and how often it runs."""
    add = parser.add_argument_group("run").add_argument
    datasets = one_of("data set", list(STATS))
    add("--dataset", type=datasets, default="cifar100", metavar="NAME", help=", ".join(STATS))
    add("--data-dir", type=file_path, default="data", metavar="DIR", help="where the data lies or"
        " is downloaded to")  # fmt: skip
    add("--image-size", type=image_size, metavar="N", help="pixels (32; imagenet 224)")
    add(
        "--train-size", type=positive_int, metavar="N", help="train on N images, even classes (all)"
    )
    add("--val-size", type=positive_int, metavar="N", help="keep N training images out and measure"
        " on them, not on the test set: to choose weights and rates")  # fmt: skip
    add("--teacher-ckpt", type=file_path, metavar="FILE", help="a teacher's weights, such as"
        " RepDistiller's")  # fmt: skip
    add("--pretrained-teacher", action="store_true", help="torchvision's ImageNet weights, as such")
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of the student's start, its batches and dropout (0)",
    )
    add("--seeds", type=seed, nargs="+", metavar="N", help="run each, print mean and spread")
    add("--compare", action="store_true", help="train the baselines too: CE alone, KD")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: faster where the"
        " processor has it; losses stay in fp32 (fp32; on GPUs convolutions in TF32)")  # fmt: skip
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    add("--compile", action="store_true", help="torch.compile both networks: slow start, for a GPU")
    add("--gather", choices=("global", "local"), default="global", help="under torchrun losses"
        " between images see the whole batch, or each process its own share (global)")  # fmt: skip
    add("--workers", type=at_most(256), metavar="N", help="threads that decode a tree, processes"
        " that decode imagenet; 0: the program itself (one a core)")  # fmt: skip
    _add_file_arguments(add)


def _add_file_arguments(add) -> None:
    add("--save-minutes", type=positive, default=15.0, metavar="X", help="save within an epoch, as"
        " well as at its end, when so many have passed (15)")  # fmt: skip
    add("--out", type=file_path, metavar="DIR", help="folder of the run (runs/<script>-<teacher>-"
        "<student>-...)")  # fmt: skip
    add("--resume", action="store_true", help="go on where a stopped run left off")
    add("--deterministic", action="store_true", help="the same bits in every run on a GPU; slower")
    add("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    add("--eval", type=file_path, metavar="FILE", help="only test this student checkpoint")


def add_detection_arguments(parser: argparse.ArgumentParser) -> None:
    """`add_run_arguments` for detection."""
    add = parser.add_argument_group("run").add_argument
    add("--dataset", choices=("coco", "shapes"), default="coco", help="shapes: drawn, no files")
    add("--data-dir", type=file_path, default="data", metavar="DIR", help="with annotations/ and"
        " the images' folders")  # fmt: skip
    add("--train-split", default="train2017", metavar="NAME", help="(train2017)")
    add("--val-split", default="val2017", metavar="NAME", help="(val2017)")
    add(
        "--skip-bad-images", action="store_true", help="leave out what cannot be read, and count it"
    )
    add("--image-size", type=image_size, metavar="N", help="short side (trained at 640 to 800,"
        " tested at 800; shapes 64)")  # fmt: skip
    add("--smallest-anchor", type=positive_int, metavar="N", help="side in pixels; the other four"
        " levels double it (32; shapes 16)")  # fmt: skip
    add("--train-size", type=positive_int, metavar="N", help="train on N images (all)")
    add("--teacher-ckpt", type=file_path, metavar="FILE", help="a detector's weights"
        " (torchvision's for resnet50)")  # fmt: skip
    add("--train-teacher", action="store_true", help="train it first (shapes: always)")
    add("--seed", type=seed, default=0, metavar="N", help="of start, batches and regions (0)")
    add("--seeds", type=seed, nargs="+", metavar="N", help="run each, print mean and spread")
    add("--compare", action="store_true", help="train the plain and the KD student too")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: losses in fp32 (fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU if there is one")
    add("--workers", type=at_most(256), metavar="N", help="processes that decode (one a core, up"
        " to 8; shapes 0)")  # fmt: skip
    _add_file_arguments(add)
    add("--per-class", action="store_true", help="with --eval: each class's AP too")
    add("--predict", type=file_path, nargs="+", metavar="IMAGE", help="with --eval: draw boxes"
        " on these instead")  # fmt: skip
    add("--plot", action="store_true", help="draw a sheet of validation images: boxes of the"
        " truth, the plain student (trained too) and the student")  # fmt: skip


def launch(main, args, baselines: dict, needed: tuple = ()) -> None:
    """Run `main(args)` for every seed and, with --compare, for every baseline; print the table.

    baselines: name -> the arguments that make it, such as {"ce": {"kd_weight": 0.0, ...}}; those
    `needed` are run without --compare too, and first. The others come after the method, so that
    what does not fit it is found at once. A baseline's folder is `<out>/<name>`, a seed's
    `<out>/s<seed>` where --out is given.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # wanted by cuBLAS for that
        torch.use_deterministic_algorithms(True)
    elif pick_device(args.device).type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are the same at every step
    fill_image_size(args)
    if args.resume and args.eval:
        raise UserError("--resume and --eval: choose one")
    if args.eval and (args.compare or args.seeds or getattr(args, "plot", None)):
        raise UserError("--eval: leave --compare, --seeds and --plot out, nothing is trained")
    for file in (args.eval, args.teacher_ckpt):
        if file:
            read_checkpoint(file)  # fail before the data is read
    if args.eval:
        return print_top1(args)
    if getattr(args, "pretrained", False) and args.student in ZOO:
        build_model(args.student, 2, pretrained=True)  # likewise
    if args.teacher_ckpt and getattr(args, "pretrained_teacher", False):
        raise UserError("--teacher-ckpt and --pretrained-teacher: choose one")
    if args.seeds and args.seed:
        raise UserError("--seed and --seeds: choose one")
    runs = []
    for seed in dict.fromkeys(args.seeds or [args.seed]):
        name = f"{args.script}-{args.teacher}-{args.student}-{args.dataset}-s{seed}"
        out = Path(args.out or f"runs/{name}")
        out = out / f"s{seed}" if args.out and args.seeds else out
        for baseline, changes in baselines.items():
            if changes["method"] != args.method and (args.compare or baseline in needed):
                runs.append(vars(args) | changes | {"seed": seed, "out": str(out / baseline)})
        runs.append(vars(args) | {"seed": seed, "out": str(out)})
    if args.resume and len(runs) > 1:
        for run in runs:
            run["resume"] = (Path(run["out"]) / ".lock").exists()  # those not reached start now
        if not any(run["resume"] for run in runs):
            raise UserError(f"--resume: nothing to resume in {runs[-1]['out']}")
    wait_for_all()
    first = {baselines[name]["method"] for name in needed} | {args.method}
    seeds = [run["seed"] for run in runs]
    results = {}
    for run in sorted(runs, key=lambda r: (seeds.index(r["seed"]), r["method"] not in first)):
        if len(runs) > 1:
            print(f"\n== {run['method']}, seed {run['seed']}: {run['out']}", flush=True)
        results[run["out"]] = main(argparse.Namespace(**run))
    print("\n" + table([results[run["out"]] for run in runs]))


def print_top1(args) -> None:
    device = pick_device(args.device)
    data = load_data(args, device)
    student = build_model(args.student, data.num_classes)
    load_weights(student, args.eval)
    probe(student, data)
    student = student.to(device, memory_format=torch.channels_last)
    print(f"{args.student} from {args.eval}: test {evaluate(student, data, args):.2f} %")


# What strange JSON leads to in `table`.
NOT_A_RESULT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def table(results: list[dict]) -> str:
    """A Markdown table of results, a row a method: n, last-epoch top-1 or AP, mean and spread.

    The spread is the standard deviation over seeds (n - 1 in the denominator), of probes over their
    students too. The last column
    names methods of the same pair whose mean lies within the larger of the two spreads. Runs of a
    method with other flags are rows of their own, named with the flags that differ.
    """
    kind = "ap" if "student_ap" in results[0] else "top1"
    groups: dict = {}
    for r in results:
        measured = r["dataset"] + (" (validation)" if r.get("args", {}).get("val_size") else "")
        key = (measured, r["train_images"], r["epochs"], r["teacher"], r["student"])
        key += (r["method"], r.get("teacher_hash"), r.get("data_hash"))
        without = FREE | {"seed"}
        if r.get("world_size", 1) == 1:
            without |= {"gather"}  # it means nothing there
        processes = {} if r.get("world_size", 1) == 1 else {"world_size": r["world_size"]}
        # None: not asked for, as before the flag existed.
        args = {k: v for k, v in r.get("args", {}).items() if v is not None}
        settings = {k: v for k, v in args.items() if k not in without} | processes
        group = groups.setdefault((*key, json.dumps(settings, sort_keys=True)), {})
        # A run given twice counts once.
        which = r.get("seed", len(group)), r.get("student_hash")  # a probe's, of its student
        group[which] = r[f"student_{kind}"], r[f"teacher_{kind}"]
    score = {"top1": "top-1 %", "ap": "AP"}[kind]
    rows = []
    for key, by_seed in groups.items():
        values, teachers = zip(*by_seed.values())
        mean, n = sum(values) / len(values), len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
        mine = json.loads(key[-1])
        others = [json.loads(other[-1]) for other in groups if other[:6] == key[:6]]
        differs = [k for k in mine if any(mine[k] != other.get(k) for other in others)]
        name = " ".join([key[5], *(f"{flag(k)} {mine[k]}" for k in differs)])
        rows.append(((*key[:5], name, *key[6:8]), values, teachers, mean, spread))
    lines = ["| data, images, epochs | teacher | student | method | n | "]
    lines[0] += f"{score} | lowest, highest | not apart from |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for key, values, teachers, mean, spread in rows:
        dataset, images, epochs, teacher, student, method, *hashes = key
        figure, near = f"{mean:.2f}", ["one run"]
        if spread is not None:
            figure += f" ± {spread:.2f}"
            near = [
                other[5]
                for other, _, _, its_mean, its_spread in rows
                if other[:5] == key[:5] and list(other[6:]) == hashes  # the same images and teacher
                if other != key and its_spread is not None
                if abs(mean - its_mean) <= max(spread, its_spread)
            ]
        source = f"{teacher} ({sum(teachers) / len(teachers):.2f})" if teacher else "none"
        lines.append(
            f"| {dataset}, {images:,}, {epochs} | {source} | {student} | {method} | {len(values)} |"
            f" {figure} | {min(values):.2f}, {max(values):.2f} | {', '.join(near) or '-'} |"
        )
    return "\n".join(lines)


def print_table(paths: list[str] | None) -> None:
    """`python common.py FILE...`: the table of these result files."""
    results = []
    for path in sys.argv[1:] if paths is None else paths:
        try:
            result = json.loads(Path(path).read_text())
            if "method" not in result:
                print(f"note: {path} is not of a training run: left out", file=sys.stderr)
                continue
            table([result])
            kinds = {"student_top1", "student_ap"} & result.keys()
            if len(kinds) > 1:
                raise ValueError("both top-1 and AP")
            results.append(result)
        except (OSError, *NOT_A_RESULT) as error:
            raise UserError(f"{path}: not a result of a run ({error})") from None
    if not results:
        raise UserError("usage: python common.py results/*.json")
    for kind in ("student_top1", "student_ap"):
        if of_kind := [r for r in results if kind in r]:
            print(table(of_kind))


if __name__ == "__main__":
    sys.exit(run_program(print_table))
