"""ND for object detection: Faster R-CNN with FPN on COCO (KD++, DKD++, ReviewKD++ for detectors).

Idea: turn the student's box feature of every sampled RoI (region of interest) towards the teacher's
mean feature of its class (background is one), and lengthen it until it is as long as the teacher's.

    Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature
    Norm and Direction, arXiv 2305.17007 (ECCV 2024: "... Feature Direction and Norm").

For RoI r of class y, with s = student_emb[r], t = teacher_emb[r] (outputs of the two box heads for
the same box on the same pixels) and e = class_means[y] / |class_means[y]|:

    nd   = mean_r [ 1 - (s . e) / max(|s|, |t|) ]
    kd   = mean_r [ KL(softmax(teacher_logits[r]) || softmax(student_logits[r])) ]
    dkd  = mean_r [ TCKD + 0.25 NCKD ]   KL of (p_y, 1 - p_y), and of the other classes alone
    loss = cls + box + objectness + rpn_box + nd_weight nd + kd_weight kd + reviewkd_weight reviewkd

nd with kd is KD++, with dkd in its place DKD++, with ReviewKD (on the FPN's maps) ReviewKD++.

    python detect_nd.py --data-dir coco --teacher resnet50 --student resnet18
    python detect_nd.py --data-dir coco --teacher resnet101 --train-teacher --base reviewkd
    python detect_nd.py --dataset shapes --base dkd --compare   synthetic scenes, needs no files

AP (%) of the last epoch, mean ± standard deviation over n = 3 seeds, --dataset shapes --epochs 9
--lr 0.005, resnet18 (80.30) -> mobilenet_v2: no distillation 61.66 ± 2.03, KD 72.08 ± 2.11, DKD
72.68 ± 1.06, KD++ 67.66 ± 4.20, DKD++ 72.51 ± 3.56. ND adds nothing; at lr 0.01 KD++ gave nan.

Differences from the paper's code:
 1. torchvision's detector, initial weights and smooth L1 (there: L1); class 0 is the background.
 2. Both networks see the same normalised pixels (there: ResNet-18's colour channels are mixed up).
 3. Class means: of this teacher, clean images, its own proposals, summed in float64.
 4. --nd-weight also applies with ReviewKD (there: never read). DKD++ is ours.
 5. LR milestones are at 2/3 and 8/9 of any run (there: at 120,000 and 160,000 of 180,000 steps).
 6. Norm layers have weight decay (there: none); RoIAlign has aligned=False (there: True).
 7. Teachers: torchvision's (AP 37.0), or trained as long as a student (there: three times that).
As there, a rank computes the losses of its own images; gradients are averaged over the ranks.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import sys
import tempfile
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map

import common

# The losses. They compute in the dtype of their inputs: pass float32, so under autocast call
# `.float()` on what a network returns. For RoIs, read B as the number of RoIs.


def nd_loss(student_emb: torch.Tensor, teacher_emb: torch.Tensor, class_means: torch.Tensor,
            labels: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Norm and direction: mean of 1 - s.e / max(|s|, |t|), with e the direction of the class mean.

    Args: student_emb, teacher_emb [B,D]: inputs of the classifiers, the student's out of a trained
        projector if its D differs; class_means [K,D]: the teacher's; labels [B]: int64, 0 to K-1.
    Returns: a scalar, 0 to 2. Raises: ValueError (shapes do not fit), IndexError (label, on CPU).
    Weight: 1 to begin with (paper: 0.5 to 4): nd starts below 1. Reference: arXiv 2305.17007.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    e = F.normalize(class_means.detach(), dim=1).index_select(0, labels)  # [B,D]
    if not s.shape == t.shape == e.shape:
        raise ValueError(f"shapes of s, t, e must be the same: {s.shape}, {t.shape}, {e.shape}")
    longer = torch.maximum(s.norm(dim=1), t.norm(dim=1))  # max(|s|, |t|)  [B]
    longer = longer.masked_fill(longer < 1e-7, torch.inf)  # both are zero: nothing to learn from
    return (1 - (s * e).sum(1) / longer).mean()


def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor,
            temperature: float = 4.0) -> torch.Tensor:  # fmt: skip
    """Hinton's knowledge distillation: T^2 KL(softmax(t / T) || softmax(s / T)), batch mean.

    Args: student_logits, teacher_logits [B,K]; temperature T > 0. Returns: a scalar, at least 0.
    Raises: ValueError if the logits are not two [B,K] of one shape, or if T is not positive.
    Default weight: 1 at any T: T^2 undoes the 1/T^2 of the gradient. Reference: arXiv 1503.02531.
    """
    s, t = student_logits, teacher_logits.detach()
    if s.dim() != 2 or s.shape != t.shape or temperature <= 0:
        raise ValueError(f"need two [B,K] and T > 0, not {s.shape}, {t.shape}, {temperature}")
    log_s, log_t = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def dkd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor,
             alpha: float = 1.0, beta: float = 8.0,
             temperature: float = 4.0) -> torch.Tensor:  # fmt: skip
    """Decoupled KD: T^2 (alpha TCKD + beta NCKD), mean over the batch.

    TCKD: KL divergence of two probabilities (true class, all others). NCKD: of the others alone,
    scaled to sum 1; KD multiplies it by the teacher's probability of the others, often tiny.
    Args, Returns, Raises: as `kd_loss`; labels [B]: 0 to K-1; alpha, beta >= 0.
    Default weights: alpha 1, beta 8, published for most CIFAR pairs. Reference: arXiv 2203.08679.
    """
    s, t, labels = student_logits, teacher_logits.detach(), labels.long()
    if s.dim() != 2 or s.shape != t.shape or temperature <= 0:
        raise ValueError(f"need two [B,K] and T > 0, not {s.shape}, {t.shape}, {temperature}")
    log_p = F.log_softmax(torch.stack([s, t]) / temperature, 2)  # of student and teacher  [2,B,K]
    is_true = F.one_hot(labels, s.shape[1]).bool()  # [B,K]
    rest = log_p.masked_fill(is_true, torch.finfo(log_p.dtype).min)  # -inf would lead to nan
    true = log_p.gather(2, labels[None, :, None].expand(2, -1, -1))  # of the true class  [2,B,1]
    pair = torch.cat([true, rest.logsumexp(2, keepdim=True)], 2)  # and of all others  [2,B,2]
    tckd = F.kl_div(*pair, reduction="batchmean", log_target=True)
    nckd = F.kl_div(*F.log_softmax(rest, 2), reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * tckd + beta * nckd)


class ReviewKD(torch.nn.Module):
    """Attention-based fusion of the student's maps, for hcl_loss(review(s_maps, t_maps), t_maps).

    Args: student_channels, teacher_channels: by level, from shallow to deep; mid_channels: of the
        maps while they are fused, e.g. 512. It has weights to train. Reference: arXiv 2104.09044.
    """

    def __init__(self, student_channels: list[int], teacher_channels: list[int], mid_channels: int):
        super().__init__()

        def conv_bn(c_in, c_out, size):
            conv = torch.nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False)
            torch.nn.init.kaiming_uniform_(conv.weight, a=1)
            return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(c_out))

        self.inward = torch.nn.ModuleList(conv_bn(c, mid_channels, 1) for c in student_channels)
        self.outward = torch.nn.ModuleList(conv_bn(mid_channels, c, 3) for c in teacher_channels)
        gates = (torch.nn.Conv2d(2 * mid_channels, 2, 1) for _ in student_channels[:-1])
        self.gates = torch.nn.ModuleList(gates)  # the deepest level has nothing to mix in

    def forward(self, student_maps: list, teacher_maps: list) -> list[torch.Tensor]:
        """Lists of [B,Cs,h,w] and [B,Ct,H,W] -> a list of [B,Ct,H,W], made of the student's."""
        fused, residual = [], None
        levels = zip(self.inward, self.outward, student_maps, teacher_maps, strict=True)
        for level, (inward, outward, x, t) in reversed(list(enumerate(levels))):
            x = inward(x)  # [B,mid,h,w]
            if residual is not None:  # mix in the deeper level, weighted at each position
                residual = F.interpolate(residual, x.shape[-2:], mode="nearest")
                attention = torch.sigmoid(self.gates[level](torch.cat([x, residual], 1)))
                x = x * attention[:, :1] + residual * attention[:, 1:]
            residual = F.interpolate(x, t.shape[-2:], mode="nearest")
            fused.insert(0, outward(residual))
        return fused


def hcl_loss(student_maps: list[torch.Tensor], teacher_maps: list[torch.Tensor]) -> torch.Tensor:
    """HCL: MSE of feature maps at full size (weight 1) and pooled to smaller sizes (1/2, 1/4, 1/8).

    Args: student_maps, teacher_maps: one [B,C,H,W] a level. Pooled sizes: those of 4, 2, 1 below H.
    Returns: a scalar: mean over sizes, sum over levels. Raises: ValueError (number, shape of maps).
    Default weight: 5, published for most CIFAR pairs. Reference: arXiv 2104.09044.
    """
    total = 0.0
    for s, t in zip(student_maps, teacher_maps, strict=True):
        if s.shape != t.shape:
            raise ValueError(f"shapes must be the same: {s.shape}, {t.shape}")
        gap = s - t.detach()  # pooling is linear: to pool the gap is to pool both maps
        pooled = [F.adaptive_avg_pool2d(gap, size) for size in (4, 2, 1) if size < s.shape[-2]]
        weights = [1.0, 0.5, 0.25, 0.125][: 1 + len(pooled)]
        terms = [weight * x.square().mean() for weight, x in zip(weights, [gap, *pooled])]
        total = total + sum(terms) / sum(weights)
    return total


@dataclass
class SampledRoIs:
    """What a detector saw in a training pass: N images, R RoIs, K classes with the background."""

    pixels: torch.Tensor  # [N,3,H,W], normalised, resized, padded
    sizes: list[tuple[int, int]]  # height and width of each image within `pixels`
    boxes: list[torch.Tensor]  # the RoIs of each image [r,4], in pixels: x1, y1, x2, y2
    labels: torch.Tensor  # [R], 0 is the background
    feature_maps: dict[str, torch.Tensor]  # the FPN's five levels [N,C,h,w], strides 4 to 64
    emb: torch.Tensor  # [R,1024], the input of the classifier
    logits: torch.Tensor  # [R,K]


def box_branch(detector: nn.Module, feature_maps: dict, boxes: list, sizes: list):
    """A detector's box head on RoIs -> emb [R,1024], logits [R,K], box offsets [R,4K], float32."""
    heads = detector.roi_heads
    emb = heads.box_head(heads.box_roi_pool(feature_maps, boxes, sizes))
    logits, offsets = heads.box_predictor(emb)
    return emb.float(), logits, offsets  # the predictor's are float32: see build_detector


def training_pass(detector: nn.Module, images: list, targets: list) -> tuple[dict, SampledRoIs]:
    """torchvision's own training pass, opened up, because it hides the RoIs and their features.

    Args: detector: the student, or for class means the teacher in eval mode; images: [3,h,w] each,
        values from 0 to 1; targets: of each image its "boxes" [n,4] in pixels and "labels" [n].
    Returns: the four losses (the RPN has none in eval mode), and what distillation needs: resizing
        and RoI sampling are random, so the teacher must get the student's pixels and RoIs.
    """
    batch, targets = detector.transform(images, targets)
    feature_maps = detector.backbone(batch.tensors)
    proposals, rpn_losses = detector.rpn(batch, feature_maps, targets)
    # Ground truth joins the proposals; at most a quarter of an image's RoIs are foreground.
    boxes, _, labels, wanted = detector.roi_heads.select_training_samples(proposals, targets)
    emb, logits, offsets = box_branch(detector, feature_maps, boxes, batch.image_sizes)
    cls, box = torchvision.models.detection.roi_heads.fastrcnn_loss(logits, offsets, labels, wanted)
    losses = {"cls": cls, "box": box, "objectness": rpn_losses.get("loss_objectness")}
    losses["rpn_box"] = rpn_losses.get("loss_rpn_box_reg")
    sizes, labels = batch.image_sizes, torch.cat(labels)
    return losses, SampledRoIs(batch.tensors, sizes, boxes, labels, feature_maps, emb, logits)


@torch.no_grad()
def compute_roi_class_means(teacher: nn.Module, batches):
    """The teacher's mean box feature of each class, over RoIs sampled as in training.

    Args: teacher: a detector in eval mode; the RoIs come from the ground truth and from its own
        proposals; batches: (images, targets, ...) as for `training_pass`.
    Returns: means [K,1024] in float32, 0 for a class without RoIs; the number of RoIs [K].
    """
    print("class means of RoIs: one pass of the teacher", flush=True)
    weight = teacher.roi_heads.box_predictor.cls_score.weight  # [K,1024]
    sums = torch.zeros_like(weight, dtype=torch.float64)
    counts = torch.zeros_like(weight[:, 0], dtype=torch.int64)
    for images, targets, *_ in batches:
        _, sampled = training_pass(teacher, images, targets)
        sums.index_add_(0, sampled.labels, sampled.emb.double())
        counts += sampled.labels.bincount(minlength=len(counts))
    common.sum_over_ranks(sums, counts)  # under torchrun: each rank saw its part of the images
    return (sums / counts.clamp_min(1)[:, None]).float(), counts


def roi_nd_loss(sampled: SampledRoIs, teacher_emb, class_means, class_counts, foreground_only):
    """`nd_loss` over the RoIs whose class has a mean and, if asked, is not the background."""
    counted = class_counts[sampled.labels] > 0
    if foreground_only:
        counted &= sampled.labels > 0
    if not counted.any():
        return sampled.emb.sum() * 0.0  # a tensor: the log needs the same terms in every step
    labels = sampled.labels[counted]
    return nd_loss(sampled.emb[counted], teacher_emb[counted], class_means, labels)


def distill(args: argparse.Namespace) -> dict:
    """One run, from data to result. Without a teacher: plain training, as of the teacher itself."""
    data = load_detection_data(args)
    run = common.Run(args, data, figures=("detections.png",) if args.plot else ())

    # Networks. Seeded here, so that their start does not depend on what happened before.
    torch.manual_seed(args.seed)
    student = build_detector(args.student, data.num_classes, args)

    # Auxiliary module: trained beside the student, discarded after training.
    auxiliary = nn.ModuleDict()
    if args.reviewkd_weight:
        channels = [args.fpn_width] * 5  # of the FPN's five levels, in both networks
        auxiliary["review"] = ReviewKD(channels, channels, args.fpn_width)

    # The teacher: from a file, or trained first by this very function. Frozen from here.
    teacher = load_teacher(args, data, distill) if args.teacher else None
    if args.nd_weight:
        class_means, counts = load_roi_class_means(args, data, teacher)
    asks_teacher = args.nd_weight or args.kd_weight or args.reviewkd_weight  # in every step

    # SGD with momentum for all that is trained: not the stem and layer1 of a pretrained ResNet.
    student, auxiliary = student.to(data.device), auxiliary.to(data.device)
    trained = [p for p in (*student.parameters(), *auxiliary.parameters()) if p.requires_grad]
    options = dict(momentum=args.momentum, weight_decay=args.weight_decay)
    if data.device.type == "cuda":
        options["fused"] = True  # all parameters in one kernel
    optimizer = torch.optim.SGD(trained, args.lr, **options)
    run.start(student=student, auxiliary=auxiliary, optimizer=optimizer, teacher=teacher)

    warm_up_steps = max(1, min(1000, run.total_steps // 10))
    for _ in run.epochs():
        student.train()
        auxiliary.train()
        for images, targets, image_ids in run.batches():
            # Schedule: linear warm-up; lr is divided by 10 at 2/3 and again at 8/9 of the run.
            passed = sum(9 * run.step >= ninths * run.total_steps for ninths in (6, 8))
            warm_up = min(1.0, 0.001 + 0.999 * run.step / warm_up_steps)
            common.set_lr(optimizer, args.lr / 10**passed * warm_up)

            # Forward: the teacher is shown the student's pixels and the student's RoIs.
            with common.autocast(args):
                losses, sampled = training_pass(student, images, targets)
                with torch.no_grad():
                    if asks_teacher:
                        teacher_maps = run.teacher.backbone(sampled.pixels)
                    if args.nd_weight or args.kd_weight:
                        found = box_branch(run.teacher, teacher_maps, sampled.boxes, sampled.sizes)
                        teacher_emb, teacher_logits, _ = found
                if args.reviewkd_weight:
                    maps, teacher_maps = [*sampled.feature_maps.values()], [*teacher_maps.values()]
                    maps = [m.float() for m in auxiliary["review"](maps, teacher_maps)]

            # Losses, in float32. A term that is off is the number 0.0, as is one of kd and dkd.
            nd = kd = dkd = reviewkd = 0.0
            if args.nd_weight:
                nd = roi_nd_loss(sampled, teacher_emb, class_means, counts, args.nd_foreground_only)
            if args.kd_weight and args.base == "dkd":
                dkd = dkd_loss(sampled.logits, teacher_logits, sampled.labels, **DKD)
            elif args.kd_weight:
                kd = kd_loss(sampled.logits, teacher_logits, temperature=1.0)
            if args.reviewkd_weight:
                reviewkd = hcl_loss(maps, teacher_maps)
            loss = sum(losses.values()) + args.nd_weight * nd
            loss = loss + args.kd_weight * (kd + dkd) + args.reviewkd_weight * reviewkd
            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(optimizer)
            optimizer.step()
            run.log({**losses, "nd": nd, "kd": kd, "dkd": dkd, "reviewkd": reviewkd}, image_ids)
            sampled = maps = teacher_maps = None  # frees the feature maps before the next step
        run.end_epoch(**evaluate_detector(student, data, args)[0])

    if args.plot and common.rank() == 0:
        draw_comparison(student, data, args)
    scores = {name: run.history[-1][name] for name in AP_NAMES}
    more = dict(ap=scores, classes=data.classes, bad_images=data.bad_images)
    return run.finish(teacher_ap=getattr(teacher, "ap", None), student_ap=scores["AP"], **more)


# Loss weights of the paper's three COCO pairs, from the configurations of its code: of KD++, of
# ReviewKD++ (review, review_nd) and of ReviewKD alone. Another pair takes those of the first.
PAPER_WEIGHTS = {
    "resnet101 resnet18": dict(kd=1.0, nd=1.5, review=1.2, review_nd=1.5, review_alone=1.2),
    "resnet101 resnet50": dict(kd=1.0, nd=1.0, review=1.4, review_nd=1.0, review_alone=1.0),
    "resnet50 mobilenet_v2": dict(kd=1.0, nd=1.0, review=2.2, review_nd=1.5, review_alone=2.0),
}
# From the code of DKD's authors, for every pair. DKD++ takes the weights of KD++: our choice.
DKD = dict(alpha=1.0, beta=0.25, temperature=1.0)
# The synthetic scenes are small and few, so a detector for them is small and trained from scratch.
RECIPES = {
    "coco": dict(teacher="resnet50", student="resnet18", epochs=12, batch_size=8, regions=512,
        fpn_width=256, smallest_anchor=32, pretrained_backbone=True),
    "shapes": dict(teacher="resnet18", student="mobilenet_v2", epochs=3, batch_size=4, lr=0.01,
        regions=32, fpn_width=64, smallest_anchor=16, pretrained_backbone=False, image_size=64,
        workers=0),
}  # fmt: skip
NO_DISTILLATION = dict(nd_weight=0.0, kd_weight=0.0, reviewkd_weight=0.0)


def parse_args(argv=None, **changes) -> argparse.Namespace:
    """Read the command line and fill in what it leaves open. changes: flags of a baseline."""
    parser = common.Parser("detect_nd", __doc__)
    add, weight = parser.add_argument_group("method").add_argument, common.weight
    add("--base", choices=("kd", "dkd", "reviewkd"), default="kd", help="base loss (default: kd)")
    add("--nd-weight", type=weight, help="weight of ND (default: the paper's; dkd: that of KD++)")
    add("--kd-weight", type=weight, help="of KD, or DKD, on RoIs, T = 1 (default: 1; reviewkd: 0)")
    add("--reviewkd-weight", type=weight, help="of ReviewKD (default: 0; reviewkd: the paper's)")
    add("--nd-foreground-only", action="store_true", help="ablation: ND without background RoIs")
    add("--class-means-images", type=common.positive_int, help="only the first N (default: all)")
    add_detection_arguments(parser)
    args = parser.parse_args(argv)
    vars(args).update(changes)
    vars(args).update({k: v for k, v in RECIPES[args.dataset].items() if getattr(args, k) is None})
    args.lr = args.lr or 0.01 * args.batch_size / 8
    args.train_teacher = args.train_teacher or args.dataset == "shapes"

    pair = f"{args.teacher} {args.student}"
    pair = pair if pair in PAPER_WEIGHTS else "resnet101 resnet18"
    paper = PAPER_WEIGHTS[pair]
    weights = dict(nd_weight=paper["nd"], kd_weight=paper["kd"], reviewkd_weight=0.0)
    if args.base == "reviewkd":
        review = paper["review_alone" if args.nd_weight == 0 else "review"]
        weights = dict(nd_weight=paper["review_nd"], kd_weight=0.0, reviewkd_weight=review)
    unset = {name: value for name, value in weights.items() if getattr(args, name) is None}
    vars(args).update(unset)
    if unset and not args.eval and not changes:
        source = "those of KD++" if args.base == "dkd" else "the paper's"
        print(f"default loss weights, {source} for {pair}: {unset}", flush=True)
    base = {"DKD" if args.base == "dkd" else "KD": args.kd_weight, "ReviewKD": args.reviewkd_weight}
    args.method = "+".join(name for name, value in base.items() if value)
    if args.nd_weight:
        args.method = f"{args.method}++" if args.method else "ND"
        args.method += " on foreground" if args.nd_foreground_only else ""
    args.method = args.method or "plain"

    device = common.pick_device(args.device)
    if args.predict and not args.eval:
        raise common.UserError("--predict: name the weights to use: --eval runs/.../student.pt")
    if args.reviewkd_weight and args.batch_size < 2 * common.world():
        raise common.UserError("--batch-size: ReviewKD's BatchNorm needs 2 images or more a rank")
    if args.reviewkd_weight and args.deterministic and device.type == "cuda":
        raise common.UserError("ReviewKD: its pooling has no --deterministic form on a GPU")
    if args.plot and args.method == "plain":
        raise common.UserError("--plot compares with no distillation: give a weight above 0")
    return args


def main(argv=None) -> dict | list[dict]:
    """What the shell calls: one run, or those of --seeds and --compare. Returns their results."""
    args = parse_args(argv)
    if args.eval and (args.resume or args.compare or args.seeds or args.plot):
        raise common.UserError("--eval trains nothing: no --resume, --compare, --seeds, --plot")
    if args.eval:
        return evaluate_file(args)
    # Baselines: the same command line without ND; for KD, with the paper's weight (None).
    off = dict(nd_weight=0.0, nd_foreground_only=False, plot=False)
    kd = dict(off, base="kd", kd_weight=None, reviewkd_weight=0.0)
    runs = {"plain": kd | {"kd_weight": 0.0}, "kd": kd}
    both = args.kd_weight and args.reviewkd_weight
    if args.reviewkd_weight or (args.kd_weight and args.base != "reviewkd"):
        runs["without-nd" if both else args.base] = off
    runs = {name: vars(parse_args(argv, **changes)) for name, changes in runs.items()}
    return common.launch(distill, args, runs, needed=("plain",) if args.plot else ())


# --- Chores that only detection has -----------------------------------------------------------
# Flags, data, synthetic scenes, the detector, the teacher, AP, figures: no part of the method.


def add_detection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the recipe, the detector, the data and the run."""
    count, file, below_one = common.positive_int, common.file_path, common.number(float, 0, 0.9999)
    pixels, processes = common.number(int, 8, 4096), common.number(int, 0, 256)
    backbone = common.one_of("backbone", BACKBONES)
    recipe = parser.add_argument_group(f"recipe and detector (backbones: {', '.join(BACKBONES)})")
    add, length = recipe.add_argument, recipe.add_mutually_exclusive_group().add_argument
    add("--teacher", type=backbone, help="its backbone (default: resnet50; shapes: resnet18)")
    add("--student", type=backbone, help="its backbone (default: resnet18; shapes: mobilenet_v2)")
    add("--teacher-ckpt", type=file, help="its weights (default: torchvision's resnet50 for COCO)")
    add("--train-teacher", action="store_true", help="train it, once for all runs (shapes: always)")
    add("--teacher-epochs", type=count, help="epochs to train it for (default: as the student)")
    length("--epochs", type=count, help="LR milestones scale with it (default: 12; shapes: 3)")
    length("--iterations", type=count, help="length in steps, in place of --epochs")
    add("--batch-size", type=count, help="images in a step (default: 8; shapes: 4)")
    add("--lr", type=common.positive, help="default: 0.01 for 8 images; shapes: 0.01")
    add("--momentum", type=below_one, default=0.9, help="of SGD (default: 0.9)")
    add("--weight-decay", type=common.weight, default=1e-4, help="of SGD (default: 0.0001)")
    add("--pretrained-backbone", action=common.YesNo, help="start from ImageNet weights and freeze"
        " BatchNorm; from scratch it is trained (default: yes; shapes: no)")  # fmt: skip
    add("--regions", type=count, help="RoIs an image; in tests twice (default: 512; shapes: 32)")
    add("--fpn-width", type=count, help="channels of the FPN (default: 256; shapes: 64)")
    add("--smallest-anchor", type=count, help="side at the finest level (default: 32; shapes: 16)")
    add("--image-size", type=pixels, help="short side (default: 640 to 800, test 800; shapes: 64)")
    add = parser.add_argument_group("data and run").add_argument
    add("--dataset", choices=("coco", "shapes"), default="coco", help="files in COCO's layout, or"
        " synthetic scenes, which need none (default: coco)")  # fmt: skip
    add("--data-dir", type=file, default="data", help="folder in COCO's layout (default: data)")
    add("--train-split", default="train2017", help="name of the split (default: train2017)")
    add("--val-split", default="val2017", help="name of the split (default: val2017)")
    add("--keep-empty", action="store_true", help="train on images without annotations too")
    add("--train-size", type=count, help="number of training images (default: all)")
    add("--workers", type=processes, help="to decode images (default: cores, up to 8; shapes: 0)")
    common.add_file_arguments(parser)
    add("--per-class", action="store_true", help="with --eval: print the AP of each class too")
    add("--predict", type=file, nargs="+", help="with --eval: draw detections on these images")
    add("--plot", action="store_true", help="draw boxes; trains without distillation too")


class DetectionData:
    """COCO's or Roboflow's layout. An image is a dict: COCO's entry, its path, and what can be
    trained on, boxes [n,4] in pixels (x1, y1, x2, y2) and labels [n] from 1. Images differ in size,
    so a batch is a list of them. `report` names all that was left out or is odd."""

    def __init__(self, root, splits, train_size, skip_bad_images, keep_empty, workers, device):
        self.workers, self.device = workers, device
        read = [_read_split(root, split, skip_bad_images, keep_empty, workers) for split in splits]
        paths, contents, tables, images, reports = zip(*read)
        every, self.val = images
        names, other = ({i: c["name"] for i, c in table.cats.items()} for table in tables)
        if names != other:
            raise common.UserError(f"{paths[0]} and {paths[1]} must list the same categories")
        # The name and the files' number of every label. COCO's own are kept, with their gaps, so
        # that torchvision's weights fit; others are numbered anew.
        self.classes, self.category_ids = list(COCO_CLASSES), list(range(91))
        if not all(0 < i < 91 and COCO_CLASSES[i] == name for i, name in names.items()):
            self.category_ids = [None, *sorted(names)]
            self.classes = ["__background__", *(names[i] for i in sorted(names))]
        self.num_classes, self.ground_truth = len(self.classes), tables[1]
        digest = hashlib.sha256(b"".join(contents))
        if keep_empty:
            digest.update(b"empty images too")
        for images in (every, self.val):
            digest.update(repr([image["id"] for image in images]).encode())
            for image in images:
                image["labels"].apply_(self.category_ids.index)  # of a category id
        self.fingerprint, self.report = digest.hexdigest()[:16], "".join(reports)
        self.bad_images = sum(len(table.imgs) for table in tables) - len(every) - len(self.val)
        train = [image for image in every if image["trained_on"]]
        if (train_size or 1) > len(train):
            raise common.UserError(f"--train-size: only {len(train)} images can be trained on")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        self.train = [train[i] for i in sorted(order[:train_size])]
        self.train_images, self.test_images = len(self.train), len(self.val)

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return len(self._shuffled(batch_size, seed=0))

    def train_batches(self, batch_size: int, seed: int, first: int, last: int):
        """Batches `first` to `last` - 1 of an epoch, shuffled and flipped: this rank's part."""
        plan = [keys[common.share(len(keys))] for keys in self._shuffled(batch_size, seed)]
        return self._decoded(plan[first:last])

    def batches(self, images: list[dict], batch_size: int, shared: bool = False):
        """Batches of these images in order. shared: this rank's part of the batches."""
        keys = [(image, False) for image in images]
        plan = [keys[k : k + batch_size] for k in range(0, len(keys), batch_size)]
        return self._decoded(plan[common.share(len(plan))] if shared else plan)

    def _shuffled(self, batch_size, seed):
        """An epoch as lists of (image, flip?). For less padding wide images meet wide ones and tall
        ones tall ones; the rest of both makes the last batches. A last batch of one image a rank is
        left out, since BatchNorm cannot be trained on one image's 1x1 feature map."""
        rng, images = torch.Generator().manual_seed(seed), self.train
        order = torch.randperm(len(images), generator=rng).tolist()
        flips = (torch.rand(len(images), generator=rng) < 0.5).tolist()
        batches, rest = [], []
        for wide in (True, False):
            group = [i for i in order if (images[i]["width"] >= images[i]["height"]) == wide]
            whole = len(group) - len(group) % batch_size
            batches += [group[k : k + batch_size] for k in range(0, whole, batch_size)]
            rest += group[whole:]
        batches += [rest[k : k + batch_size] for k in range(0, len(rest), batch_size)]
        if len(batches) > 1 and len(batches[-1]) < min(2 * common.world(), batch_size):
            batches.pop()
        if len(batches[-1]) < common.world():
            raise common.UserError(f"--batch-size: {common.world()} ranks need an image each")
        order = torch.randperm(len(batches), generator=rng).tolist()
        return [[(images[i], flips[i]) for i in batches[k]] for k in order]

    def _decoded(self, plan):
        """Yields lists of images [3,h,w] in 0..1, of torchvision's targets, and of image ids."""
        keys = [[(i["path"], (i["width"], i["height"]), flip) for i, flip in part] for part in plan]
        decoded = common.read_in_workers(Decoder(), self.workers, batch_sampler=keys)
        for part, contents in zip(plan, decoded):
            pixels, targets = [], []
            for (image, flip), content in zip(part, contents):
                if isinstance(content, str):
                    raise common.UserError(f"{content}; --skip-bad-images leaves such images out")
                pixels.append(content.to(self.device).float().div_(255))
                target = {k: image[k].to(self.device, copy=True) for k in ("boxes", "labels")}
                if flip:
                    target["boxes"][:, [0, 2]] = image["width"] - target["boxes"][:, [2, 0]]
                targets.append(target)
            yield pixels, targets, [image["id"] for image, _ in part]


class Decoder:
    """Images as stored, to which annotations refer, or turned as EXIF says if only that fits."""

    def __getitem__(self, key):
        path, size, flip = key
        try:
            image = common.read_rgb(path, upright=False)
            image = image if image.size == size else common.read_rgb(path, upright=True)
        except common.UserError as error:
            return str(error)
        if all(size) and image.size != size:
            return f"{path}: width and height are {image.size}, its annotation says {size}"
        pixels = np.array(image).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels)


def load_detection_data(args) -> DetectionData:
    """The data set of the command line. Raises: UserError if it cannot be read."""
    torch.backends.cudnn.benchmark = False  # nearly every batch has another shape
    root, splits = Path(args.data_dir), (args.train_split, args.val_split)
    if args.dataset == "shapes":
        with common.one_rank_first():
            root, splits = draw_scenes(root, args.image_size), tuple(SCENES)
    workers = min(8, common.cores()) if args.workers is None else args.workers
    choice = args.train_size, args.skip_bad_images, args.keep_empty, workers
    return _read_once(root, splits, *choice, common.pick_device(args.device))


_read_once = functools.lru_cache(maxsize=1)(DetectionData)  # for the runs of --compare and --seeds
SCENES = {"train2017": 400, "val2017": 100}  # of synthetic images, without any files
# What is read of each entry: whole numbers, but for those below. Tools write them as text, too.
KEYS = {"categories": ("name", "id"), "images": ("file_name", "width", "height", "id")}
KEYS["annotations"] = ("area", "iscrowd", "image_id", "category_id", "bbox")
READ = dict(name=str, file_name=str, area=float, bbox=lambda box: [*map(float, box)])


def _whole(value):
    whole = int(value.removesuffix(".0") if isinstance(value, str) else value)
    if whole.bit_length() > 63:
        raise ValueError(f"{whole} is too large")
    return whole


def _read_table(path, content, notes):
    """faster-coco-eval's index of an annotation file, whose entries are brought to one form."""
    known, where, key = defaultdict(dict), "not COCO's", "instances format"
    try:
        table = {"annotations": [], **json.loads(content)}
        for kind, index, entry in [(k, i, e) for k in KEYS for i, e in enumerate(table[k])]:
            where = f"{kind}[{index}] ({entry.get('file_name', entry.get('id', 'no id'))})"
            given = dict(width=0, height=0, iscrowd=0, area=-1)  # what may be left out
            given.update((key, value) for key, value in entry.items() if value is not None)
            for key in KEYS[kind]:
                value = READ.get(key, _whole)(given[key])
                if entry.get(key, value) != value:
                    notes[f"{kind} whose {key} had to be converted"].append(where)
                entry[key] = value
            if kind == "annotations":
                x, y, width, height = entry["bbox"]
                round(x + y + width + height)  # an error unless all four are finite
                for key, other in (("image_id", "images"), ("category_id", "categories")):
                    if entry[key] not in known[other]:
                        raise ValueError(f"{entry[key]} is not among the {other}")
                entry["area"] = width * height if entry["area"] < 0 else entry["area"]
                entry["id"] = index + 1  # from 1: the evaluator takes a match with 0 for no match
            elif entry["id"] in known[kind]:
                raise ValueError(f"{entry['id']} is that of {known[kind][entry['id']]} too")
            known[kind][entry["id"]] = entry["called"] = where
        return COCO(table)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        problem = f"missing {error}" if isinstance(error, KeyError) else error
        raise common.UserError(f"{path}: {where} {key}: {problem}; correct the file") from None


def _read_split(root, split, skip_bad_images, keep_empty, workers):
    """-> the annotation file, its content and index, the images that can be read, a report."""
    names = {"train2017": ["train2017", "train"], "val2017": ["val2017", "val", "valid"]}
    names, notes, owners = names.get(split, [split]), defaultdict(list), {}
    files = [(root / f"annotations/instances_{name}.json", root / name) for name in names]
    files += [(root / name / "_annotations.coco.json", root / name) for name in names]  # Roboflow's
    path, folder = next((file for file in files if file[0].is_file()), files[0])
    if not path.is_file():
        raise common.UserError(f"--data-dir: no {path} (--dataset shapes needs no files)")
    table = _read_table(path, content := path.read_bytes(), notes)
    images = [dict(image) for image in table.imgs.values()]
    for image in images:
        # The name may come with other folders, or in the other Unicode form.
        parts = image["file_name"].replace("\\", "/").split("/")
        ends = ["/".join(parts[k:]) for k in range(len(parts))]
        forms = [unicodedata.normalize(form, end) for end in ends for form in ("NFC", "NFD")]
        paths = [folder / name for name in (image["file_name"], *forms)]
        image["path"] = file = str(next(filter(Path.is_file, paths), paths[0]))
        if (other := owners.setdefault(file, image["id"])) != image["id"]:
            raise common.UserError(f"{path}: images {other} and {image['id']} are one file: {file}")
    if skip_bad_images:
        # A pass of its own, so that the batches are full and a resumed run counts them alike.
        keys = [[(i["path"], (i["width"], i["height"]), False)] for i in images]
        decoded = common.read_in_workers(Decoder(), workers, batch_sampler=keys)
        problems = [content if isinstance(content, str) else "" for [content] in decoded]
        notes["left out, unreadable"] = [problem for problem in problems if problem]
        images = [image for image, problem in zip(images, problems) if not problem]
    for image in images:
        file, size = image["path"], (image["width"], image["height"])
        if not Path(file).is_file():
            raise common.UserError(f"{file}: no such image; --skip-bad-images leaves it out")
        if not all(size):
            size = common.read_rgb(file, upright=True).size
            image.update(width=size[0], height=size[1])
            notes["images without width and height"].append(file)
        every = table.imgToAnns[image["id"]]
        whole = torch.tensor([a["bbox"] for a in every], dtype=torch.float64).view(-1, 4)
        whole = torchvision.ops.box_convert(whole, "xywh", "xyxy")
        boxes = torchvision.ops.clip_boxes_to_image(whole, size[::-1]).float()
        good = (boxes[:, 2:] > boxes[:, :2]).all(1)
        good &= ~torch.tensor([a["iscrowd"] for a in every], dtype=torch.bool)
        notable = {
            "crowds or boxes without area, not trained on": ~good,
            "boxes in 0..1, below one pixel: normalised?": good & (whole <= 1).all(1),
            "boxes beyond their image": good & (whole - boxes > 1).any(1),
        }
        for what, which in notable.items():
            notes[what] += [a["called"] for a, hit in zip(every, which.tolist()) if hit]
        # Empty is what has no annotation: a crowd, for example, must not be learnt as background.
        image["trained_on"] = bool(good.any()) or (keep_empty and not every)
        labels = torch.tensor([a["category_id"] for a in every], dtype=torch.int64)
        image.update(boxes=boxes[good], labels=labels[good])
        if not image["trained_on"]:
            notes["images without boxes, not trained on"].append(file)
    if not any(len(image["labels"]) for image in images):
        raise common.UserError(f"{path}: no image has a box")
    return path, content, table, images, common.say_what_is_odd(split, len(images), notes)


def draw_scenes(root: Path, size: int) -> Path:
    """Draw 2 to 5 of `common.SHAPES` in each image, once. Returns the data set's folder."""
    if size < 32:
        raise common.UserError(f"--image-size {size}: synthetic scenes need 32 pixels or more")
    folder = root / f"shapes-scenes-{size}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as begun:
        scenes = Path(begun) / "scenes"
        for seed, (split, count) in enumerate(SCENES.items()):
            (scenes / split).mkdir(parents=True)
            images, annotations = [], []
            for image_id in range(count):
                pixels, found = _draw_scene(np.random.default_rng((seed, image_id)), size)
                name = f"{image_id:06d}.png"
                Image.fromarray(pixels).save(scenes / split / name)
                images.append(dict(id=image_id, file_name=name, width=size, height=size))
                for shape, box in found:
                    entry = dict(image_id=image_id, category_id=shape + 1, bbox=box, iscrowd=0)
                    annotations.append(entry | dict(id=len(annotations) + 1, area=box[2] * box[3]))
            categories = [dict(id=k + 1, name=name) for k, name in enumerate(common.SHAPES)]
            table = json.dumps(dict(images=images, annotations=annotations, categories=categories))
            common.write_whole(scenes / f"annotations/instances_{split}.json", table.encode())
        with contextlib.suppress(OSError):  # another program was faster
            scenes.rename(folder)
    return folder


def _draw_scene(rng, size):
    """-> [S,S,3] uint8, [(shape, [x, y, w, h])]: shapes that do not touch, on a shaded ground."""
    outlines, holes = common.shape_outlines()
    axis = np.arange(size, dtype=np.float32) + 0.5
    turn = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(turn) * axis[:, None] + np.sin(turn) * axis) / size
    first, second = rng.uniform(0.1, 0.6, (2, 3))
    canvas = first + ramp[..., None] * (second - first)
    found, taken = [], np.zeros((size, size), bool)
    for _ in range(rng.integers(2, 6)):
        shape, radius = rng.integers(len(common.SHAPES)), rng.uniform(0.11, 0.21) * size
        turn, colour = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1, 3)
        for _ in range(20):  # until it finds room; a full canvas stays as it is
            x, y = rng.uniform(1.2 * radius, size - 1.2 * radius, 2)
            dx, dy = axis - x, axis[:, None] - y
            angle = (np.arctan2(dy, dx) + turn + np.pi) * (256 / (2 * np.pi))
            distance = np.hypot(dx, dy) / radius
            whole = distance < outlines[shape][angle.astype(np.int32) % 256]
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


BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
COCO_WEIGHTS = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
COCO_CLASSES = COCO_WEIGHTS.meta["categories"]  # by COCO's id, 0 the background, 91 with the gaps


def build_detector(name: str, num_classes: int, args, frozen_norm: bool = False) -> nn.Module:
    """Faster R-CNN with FPN on one of BACKBONES. frozen_norm: for weights that are loaded."""
    models, ops = torchvision.models.detection, torchvision.ops
    pretrained = args.pretrained_backbone and not frozen_norm
    # Two or so images a GPU are too few for BatchNorm, so it is frozen in pretrained backbones.
    # Without pretrained statistics, frozen BatchNorm would do nothing: from scratch it is trained.
    norm = ops.FrozenBatchNorm2d if pretrained or frozen_norm else nn.BatchNorm2d
    net = torchvision.models.get_model(name, weights=None, norm_layer=norm)
    if pretrained:
        net.load_state_dict(_download(torchvision.models.get_model_weights(name).IMAGENET1K_V1))
    if name == "mobilenet_v2":
        body, channels = net.features, [24, 32, 96, 320]
        levels = {"3": "0", "6": "1", "13": "2", "17": "3"}  # strides 4 to 32, as in the paper
    else:
        body, levels = net, {f"layer{k + 1}": str(k) for k in range(4)}
        channels = [net.inplanes // 8 * 2**k for k in range(4)]
        # A pretrained stem and first stage stay as they are.
        nn.ModuleList([net.conv1, net.bn1, net.layer1]).requires_grad_(not pretrained)
    fpn = models.backbone_utils.BackboneWithFPN(body, levels, channels, args.fpn_width)
    sides = tuple((args.smallest_anchor * 2**k,) for k in range(5))
    anchors = models.anchor_utils.AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5)
    short = [args.image_size] if args.image_size else list(range(640, 801, 32))
    # The short side is one of these at random in training, and the last in a test.
    options = dict(min_size=short, max_size=short[-1] * 1333 // 800, rpn_anchor_generator=anchors)
    options.update(box_batch_size_per_image=args.regions, rpn_post_nms_top_n_train=1000)
    options.update(rpn_post_nms_top_n_test=min(1000, 2 * args.regions))
    detector = models.FasterRCNN(fpn, num_classes, **options)

    # torchvision computes anchors and boxes in the dtype of what it is given. Under autocast that
    # would be bfloat16, whose 8 bits move them by pixels.
    for module in (detector.backbone, detector.rpn.head, detector.roi_heads.box_predictor):
        module.register_forward_hook(lambda *parts: tree_map(torch.Tensor.float, parts[2]))
    return detector


def _download(weights):
    """A state dict of torchvision's. Raises: UserError if it cannot be downloaded."""
    try:
        with common.one_rank_first():
            return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise common.UserError(f"{error}: download {weights.url} into {folder}") from None


def load_detector(name: str, num_classes: int, args, path: str | Path) -> nn.Module:
    """A frozen detector in eval mode with the weights in `path`. Raises: UserError: no fit."""
    net = build_detector(name, num_classes, args, frozen_norm=True)
    common.load_weights(net, path)
    return net.eval().requires_grad_(False)


# What decides the weights of a teacher trained here, beside what `common` knows.
TEACHER_RECIPE = ("iterations", "smallest_anchor", "regions", "fpn_width", "pretrained_backbone")
LOWEST_TEACHER_AP = 1.0  # of any trained detector, on its own data
AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # what faster-coco-eval computes, in order
_TEACHER_AP: dict = {}  # so that the runs of one command evaluate a teacher once


def load_teacher(args, data: DetectionData, distill) -> nn.Module:
    """The teacher, frozen, with its `.ap` and `.hash`: --teacher-ckpt, or trained first by
    `distill` (--train-teacher), or torchvision's. Raises: UserError if there is none that fits."""
    path = args.teacher_ckpt
    if not path and args.train_teacher:
        path = Path(f"checkpoints/detect-{args.dataset}_{args.teacher}.pt")
        new = dict(vars(args), student=args.teacher, teacher=None, teacher_ckpt=None, seed=0)
        new.update(NO_DISTILLATION, method="teacher", plot=False, resume=False)
        new.update(out=f"runs/teacher-detect-{args.dataset}-{args.teacher}")
        if args.teacher_epochs:
            new.update(epochs=args.teacher_epochs, iterations=None)
        common.teacher_checkpoint(path, argparse.Namespace(**new), data, distill, TEACHER_RECIPE)
    if path:
        teacher = load_detector(args.teacher, data.num_classes, args, path)
    elif (args.teacher, data.classes, args.fpn_width) == ("resnet50", list(COCO_CLASSES), 256):
        path, teacher = "torchvision", build_detector("resnet50", 91, args, frozen_norm=True)
        teacher.eval().requires_grad_(False).load_state_dict(_download(COCO_WEIGHTS))
        torchvision.models.detection._utils.overwrite_eps(teacher, 0.0)  # as they were trained
    else:
        problem = "torchvision has resnet50 alone, for COCO's classes and an FPN of width 256"
        raise common.UserError(f"{problem}; give --teacher-ckpt FILE or --train-teacher")
    teacher.hash = common.state_hash(teacher.to(data.device))
    key = (teacher.hash, data.fingerprint, args.precision, args.image_size)
    if key not in _TEACHER_AP:
        scores, _ = evaluate_detector(teacher, data, args)
        print(f"teacher {args.teacher} from {path}: {scores}", flush=True)
        if scores["AP"] < LOWEST_TEACHER_AP and (args.teacher_ckpt or not args.train_teacher):
            raise common.UserError(f"{path} detects nothing: other categories or --image-size?")
        _TEACHER_AP[key] = scores["AP"]
    teacher.ap = _TEACHER_AP[key]
    return teacher


def load_roi_class_means(args, data: DetectionData, teacher: nn.Module):
    """`compute_roi_class_means` over the training set, cached beside the teachers."""
    names = ("class_means_images", "image_size", "smallest_anchor", "regions", "batch_size")
    made_by = {name: getattr(args, name) for name in names}
    made_by.update(teacher=teacher.hash, data=data.fingerprint, images=data.train_images)
    made_by.update(device=common.device_name(data.device), ranks=common.world())
    batches = data.batches(data.train[: args.class_means_images], args.batch_size, shared=True)
    torch.manual_seed(0)  # RoI sampling is random
    path = Path(f"checkpoints/roi-means-{teacher.hash}.pt")
    means, counts = common.cached(path, made_by, compute_roi_class_means, teacher, batches)
    unseen = [name for name, count in zip(data.classes, counts) if count == 0 and name != "N/A"]
    if unseen:
        print(f"note: ND leaves out {len(unseen)} classes without RoI: {', '.join(unseen[:8])} ...")
    return means.to(data.device), counts.to(data.device)


@torch.no_grad()
def evaluate_detector(model: nn.Module, data: DetectionData, args) -> tuple[dict, dict]:
    """AP in % on the validation split, by AP_NAMES and by category id; None where there is nothing.
    On every rank. Leaves the model in eval mode, with the BatchNorm statistics of rank 0."""
    model.eval()
    common.broadcast(model.buffers())
    found = []
    for images, _, image_ids in data.batches(data.val, args.batch_size, shared=True):
        with common.autocast(args):
            results = model(images)
        for image_id, result in zip(image_ids, results):
            boxes = torchvision.ops.box_convert(result["boxes"].float(), "xyxy", "xywh").tolist()
            categories = [data.category_ids[label] for label in result["labels"].tolist()]
            for box, category, score in zip(boxes, categories, result["scores"].tolist()):
                found.append(dict(image_id=image_id, category_id=category, bbox=box, score=score))
    found = [detection for part in common.gather_objects(found) for detection in part]
    evaluator = COCOeval_faster(data.ground_truth, data.ground_truth.loadRes(found), "bbox")
    evaluator.params.imgIds = [image["id"] for image in data.val]
    evaluator.run()
    # Precision is [IoU, recall, class, area, detections an image]; -1 for a class without objects.
    values = [*evaluator.stats[:6], *evaluator.eval["precision"][:, :, :, 0, -1].mean((0, 1))]
    values = [None if value < 0 else round(100 * float(value), 3) for value in values]
    return dict(zip(AP_NAMES, values)), dict(zip(evaluator.params.catIds, values[6:]))


def evaluate_file(args) -> None:
    """--eval: AP of a student's weights, or with --predict its detections on the user's images."""
    classes = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((Path(args.eval).parent / "result.json").read_text())
        names = ("student", "image_size", "smallest_anchor", "regions", "fpn_width")
        settings, classes = {name: result["args"][name] for name in names}, result["classes"]
        args = argparse.Namespace(**{**vars(args), **settings})
        print("as trained:", *(f"--{name.replace('_', '-')} {v}" for name, v in settings.items()))
    if not args.predict:
        data = load_detection_data(args)
        student = load_detector(args.student, data.num_classes, args, args.eval).to(data.device)
        scores, by_class = evaluate_detector(student, data, args)
        print(f"{args.student} from {args.eval}: {scores}")
        for category, ap in by_class.items() if args.per_class else ():
            print(f"  {data.ground_truth.cats[category]['name']}: {ap}")
        return
    if not classes:
        name = "roi_heads.box_predictor.cls_score.bias"  # one value a class
        bias = common.read_state_dict(args.eval, {name: torch.zeros(91)}).get(name, ())
        classes = COCO_CLASSES if len(bias) == 91 else [f"class {k}" for k in range(len(bias))]
    device, folder = common.pick_device(args.device), Path(args.out or "predictions")
    student = load_detector(args.student, len(classes), args, args.eval).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(args.predict):
        image = torch.from_numpy(np.array(common.read_rgb(name))).permute(2, 0, 1)
        drawn, words = with_boxes(image, student([image.to(device).float() / 255])[0], classes)
        stem = Path(name).stem
        same = [stem == Path(other).stem for other in args.predict[:number]].count(True)
        path = folder / (f"{stem}-boxes-{same + 1}.png" if same else f"{stem}-boxes.png")
        Image.fromarray(drawn).save(path)
        print(f"{name}: {', '.join(words) or 'nothing found'}; figure: {path}", flush=True)


@torch.no_grad()
def draw_comparison(student: nn.Module, data: DetectionData, args) -> None:
    """--plot: validation images with ground truth, and detections without and with distillation."""
    plain = load_detector(args.student, data.num_classes, args, f"{args.out}/plain/student.pt")
    samples = data.val[:4]
    figure, axes = common.pyplot().subplots(len(samples), 3, figsize=(12, 4 * len(samples)))
    for row, (images, targets, _) in zip(axes.reshape(-1, 3), data.batches(samples, 1)):
        image = images[0].mul(255).round().byte().cpu()
        truth = dict(targets[0], scores=torch.ones(len(targets[0]["labels"])))
        results = {"ground truth": truth, "no distillation": plain.to(data.device)(images)[0]}
        results[args.method] = student.eval()(images)[0]
        for axis, (title, result) in zip(row, results.items()):
            axis.imshow(with_boxes(image, result, data.classes, side=200)[0])
            axis.set(title=title, xticks=[], yticks=[])
    common.save_figure(figure, Path(args.out) / "detections.png")


def with_boxes(image: torch.Tensor, result: dict, classes: list[str], side: int = 400):
    """An image [3,h,w] uint8 with boxes that score 0.5 or more, as an array, and what each says."""
    keep = (result["scores"] >= 0.5).cpu()
    boxes, labels, scores = (result[name].cpu()[keep] for name in ("boxes", "labels", "scores"))
    words = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores)]
    scale = side / min(image.shape[1:])  # torchvision writes in one size only, of ten pixels
    image = torchvision.transforms.v2.functional.resize(image, [side])
    if words:
        colours = [f"hsl({label * 137.5 % 360},90%,70%)" for label in labels.tolist()]
        boxes, draw = boxes * scale, torchvision.utils.draw_bounding_boxes
        image = draw(image, boxes, words, colours, width=2, fill_labels=True)
    return image.permute(1, 2, 0).numpy(), words


if __name__ == "__main__":
    sys.exit(common.run_program(main))
