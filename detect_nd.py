"""ND for object detection: Faster R-CNN with FPN on COCO, taught by feature norm and direction.

The idea in one sentence: for every region that the student's detector samples, turn its box feature
towards the teacher's mean feature of that region's class (background is a class), and lengthen it
until it is at least as long as the teacher's feature of the same region.

    Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature
    Norm and Direction, arXiv 2305.17007 (ECCV 2024: "... Feature Direction and Norm").

For region r of class y, with s = student_emb[r], t = teacher_emb[r] (outputs of the two box heads
on the same box of the same pixels) and e_y = class_means[y] / |class_means[y]|:

    nd   = mean_r [ 1 - (s . e_y) / max(|s|, |t|) ]
    kd   = mean_r KL(softmax(teacher_logits[r]) || softmax(student_logits[r]))
    loss = cls + box + objectness + rpn_box
           + nd_weight * nd + kd_weight * kd + reviewkd_weight * reviewkd

nd with kd is KD++. ReviewKD compares the FPN's maps; nd with it is ReviewKD++.

    python detect_nd.py --data-dir coco --teacher resnet50 --student resnet18
    python detect_nd.py --data-dir coco --teacher resnet101 --train-teacher --base reviewkd
    python detect_nd.py --dataset shapes --compare --plot        drawn scenes, needs no files

Measured, AP in % of the last epoch on 100 drawn scenes, mean ± standard deviation over the seeds
0, 1, 2; resnet18 (45.45 %) -> mobilenet_v2, 400 scenes of 64 pixels, 3 epochs, on a CPU (--dataset
shapes --compare --seeds 0 1 2). It shows that the code works; so short a training tells no method
apart from the plain student.

    plain       27.12 ± 3.55
    KD          27.75 ± 3.15
    ND          23.83 ± 2.21
    KD++        25.91 ± 0.96
    ReviewKD    26.85 ± 2.09
    ReviewKD++  24.57 ± 7.17

Differs from the paper and its code:
 1. torchvision's detector: background is class 0 (theirs: the last), box loss smooth L1 (L1),
    regions pooled at 2 x 2 points a bin, 91 classes for COCO's ids (81), one normalisation of the
    pixels for both networks (the code's configurations for ResNet-18 mix up the colour channels).
 2. One pass: the student's box features serve the detector's losses and the distillation. The code
    computes them twice.
 3. Class means come from one pass over clean training images with the teacher's own proposals, in
    double precision, of this teacher; the code's file is of one teacher for all pairs. Classes
    without a region are left out of ND and named.
 4. The weight of ND beside ReviewKD is --nd-weight. The code never reads the one it is given.
 5. The schedule's drops are fractions of the run: 120 and 160 of 180 thousand iterations.
 6. A student without ImageNet weights trains its BatchNorm instead of freezing it.
 7. Under torchrun a step takes the mean of the processes' gradients, each of its own images.
 8. Teachers are torchvision's (AP 37.0) or trained here for as long as a student; the code's are
    detectron2's, of three times the usual length.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.roi_heads import fastrcnn_loss

from common import (  # nothing in there knows about distillation
    DETECTORS,  # names of backbones
    DetectionMeter,  # sums of the loss terms, progress line, stop at nan
    Parser,
    Run,  # the run's folder: resume, metrics.jsonl, result.json, student.pt
    UserError,  # ends the program with one line and status 2
    YesNo,  # --flag and --no-flag
    add_detection_arguments,
    ap_line,
    as_trained,  # --eval: the settings that its run was trained with
    autocast,
    average_gradients,
    below_one,
    build_detector,
    coco_ap,
    detect,
    draw_predictions,
    draw_sheet,
    evaluate_detector,
    get_teacher_detector,  # loads it, or trains it first by calling main
    kept,  # a value from a file if that was made by the same things, else computed
    launch,  # --seeds and --compare: calls main once per run
    load_detection_data,
    load_detector,
    one_of,
    pick_device,
    positive,
    positive_int,
    pyplot,
    rank,  # under torchrun the number of this process
    run_program,
    sum_over_ranks,
    weight,
    world,  # the number of processes
)

# --- copy from here ---------------------------------------------------------------------------
# Needs `import torch` and `import torch.nn.functional as F`. Every loss computes in float32 or
# better and sends no gradient into the teacher. For regions read B as the number of regions.


def _full(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _alike(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raises ValueError if the shapes differ: they would broadcast to a wrong loss."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: must be the same")


def _unit(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """x / |x|, or 0 with zero gradient where |x| < 1e-7: too short to have a direction."""
    norm = x.norm(dim=dim, keepdim=True)
    return x / norm.masked_fill(norm < 1e-7, float("inf"))


def _rows(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> list[torch.Tensor]:
    """Both embeddings as [B,D], the teacher's without gradient. Raises ValueError as `_alike`."""
    s, t = _full(student_emb).flatten(1), _full(teacher_emb.detach()).flatten(1)
    if s.shape != t.shape:
        raise ValueError(f"embeddings {tuple(s.shape)} and {tuple(t.shape)}: project the student's")
    return [s, t]


def nd_loss(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    class_means: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Norm and direction: mean of 1 - s.e_y / max(|s|, |t|), from 0 to 2.

    student_emb, teacher_emb [B,D] (or [B,D,1,1]): inputs of the classifiers. If the widths differ,
    the student's after a projector trained with it: BatchNorm1d, Dropout(0.5), Linear.
    class_means [K,D]: the teacher's mean embedding of each class, in eval mode, over the training
    set; only their direction counts. labels [B], from 0 to K-1.
    Usual weight 1 (paper: 0.5 to 4). ValueError: shapes that do not fit.
    While |s| < |t|, even at s = 0, the gradient of an image's term is -e_y / |t|: a step adds a
    multiple of e_y to s, which turns it and, once within 90 degrees of e_y, lengthens it. Beyond
    |t| it only turns. The loss is 0 where s points along e_y and is no shorter than t. Source:
    arXiv 2305.17007.
    """
    s, t = _rows(student_emb, teacher_emb)  # [B,D]
    e = F.embedding(labels, _unit(_full(class_means.detach())))  # e_y, by row  [B,D]
    _alike(s, e)
    longer = torch.maximum(s.norm(dim=1), t.norm(dim=1))  # max(|s|, |t|)  [B]
    longer = longer.masked_fill(longer < 1e-7, float("inf"))  # both zero: nothing to learn from
    return (1 - (s * e).sum(1) / longer).mean()


def kd_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """Hinton's distillation: T^2 KL(softmax(z_t/T) || softmax(z_s/T)), mean over the batch.

    [B,K] logits, finite. T^2 undoes the 1/T^2 that the temperature puts on the gradient, so that
    one weight serves about every T. Usual weight 1 (up to 4). ValueError: shapes differ. Source:
    arXiv 1503.02531.
    """
    _alike(student_logits, teacher_logits)
    log_s = F.log_softmax(_full(student_logits) / temperature, 1)  # [B,K]
    log_t = F.log_softmax(_full(teacher_logits.detach()) / temperature, 1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class ReviewKD(torch.nn.Module):
    """Fuses student maps from deep to shallow and shapes them like the teacher's.

    student_channels, teacher_channels: widths of the levels, shallow to deep. Each level: a 1x1
    convolution to `mid_channels`; at all but the deepest, mix in what the deeper level had before
    its 3x3 convolution, the two weighted by a sigmoid gate each; resize to the teacher's map; a 3x3
    convolution to the teacher's width. Published levels: the stage outputs, the student's after and
    the teacher's before their last ReLU, and as the deepest the embedding as [B,D,1,1], for which
    training needs B >= 2. Source: arXiv 2104.09044.
    """

    def __init__(self, student_channels: list[int], teacher_channels: list[int], mid_channels: int):
        super().__init__()

        def conv_bn(c_in, c_out, size):
            conv = torch.nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False)
            torch.nn.init.kaiming_uniform_(conv.weight, a=1)
            return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(c_out))

        self.inward = torch.nn.ModuleList(conv_bn(c, mid_channels, 1) for c in student_channels)
        self.outward = torch.nn.ModuleList(conv_bn(mid_channels, c, 3) for c in teacher_channels)
        gates = [torch.nn.Conv2d(2 * mid_channels, 2, 1) for _ in student_channels[:-1]]
        self.gates = torch.nn.ModuleList(gates)

    def forward(
        self, student_maps: list[torch.Tensor], teacher_maps: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Each level: student map [B,Cs,h,w] -> [B,Ct,H,W]; the teacher's maps give only H, W."""
        if not len(student_maps) == len(teacher_maps) == len(self.inward):
            raise ValueError(f"{len(student_maps)}, {len(teacher_maps)} maps: needs one a level")
        results, deeper = [], None
        for level in reversed(range(len(student_maps))):
            x = self.inward[level](student_maps[level])
            if deeper is not None:
                deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
                gate = torch.sigmoid(self.gates[level](torch.cat([x, deeper], 1)))  # [B,2,h,w]
                x = x * gate[:, :1] + deeper * gate[:, 1:]
            deeper = F.interpolate(x, teacher_maps[level].shape[-2:], mode="nearest")
            results.insert(0, self.outward[level](deeper))
        return results


def hcl_loss(student_maps: list[torch.Tensor], teacher_maps: list[torch.Tensor]) -> torch.Tensor:
    """Hierarchical context loss: MSE at full size and pooled to 4, 2, 1, summed over the levels.

    Lists of [B,C,H,W], equal shapes (else ValueError). Only sizes below H are used; full size has
    weight 1, each further size used half of the one before, and a level's weights are divided by
    their sum. Usual weight of the loss 0.6 to 8. Source: arXiv 2104.09044.
    """
    total = 0.0
    for s, t in zip(student_maps, teacher_maps, strict=True):
        _alike(s, t)
        gaps = [_full(s) - _full(t.detach())]  # [B,C,H,W]; pooling is linear, so pool these
        gaps += [F.adaptive_avg_pool2d(gaps[0], n) for n in (4, 2, 1) if n < s.shape[-2]]
        weights = [0.5**k for k in range(len(gaps))]
        terms = (w * gap.square().mean() for w, gap in zip(weights, gaps))
        total = total + sum(terms) / sum(weights)
    return total


# --- to here ----------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """What a training pass of the student saw: the teacher is shown the same."""

    pixels: torch.Tensor  # [N,3,H,W], normalised, resized, padded
    sizes: list  # height and width of each image in `pixels`
    boxes: list  # per image: its regions [r,4], R in all
    labels: torch.Tensor  # [R], 0 is the background
    maps: dict  # the FPN's five levels [N,256,h,w], strides 4 to 64
    emb: torch.Tensor  # [R,1024], the input of the classifier
    logits: torch.Tensor  # [R,K]


def box_branch(detector: nn.Module, maps: dict, boxes: list, sizes: list):
    """A detector's box head on regions -> emb [R,1024], logits [R,K], box offsets [R,4K]."""
    heads = detector.roi_heads
    emb = heads.box_head(heads.box_roi_pool(maps, boxes, sizes))
    return emb, *heads.box_predictor(emb)


def training_pass(student: nn.Module, images: list, targets: list) -> tuple[dict, Sampled]:
    """torchvision's own training pass, opened up: its four losses, and what distillation needs.

    images: [3,H,W] each. The size at which the images are seen and the regions are random, so the
    teacher must not draw its own.
    """
    batch, targets = student.transform(images, targets)
    maps = student.backbone(batch.tensors)
    proposals, rpn_losses = student.rpn(batch, maps, targets)
    # Ground truth joins the proposals; of an image's regions at most a quarter are foreground.
    boxes, _, labels, offsets = student.roi_heads.select_training_samples(proposals, targets)
    emb, logits, regressed = box_branch(student, maps, boxes, batch.image_sizes)
    cls, box = fastrcnn_loss(logits.float(), regressed.float(), labels, offsets)
    losses = {"cls": cls, "box": box, "objectness": rpn_losses["loss_objectness"]}
    losses["rpn_box"] = rpn_losses["loss_rpn_box_reg"]
    sampled = (batch.tensors, batch.image_sizes, boxes, torch.cat(labels), maps, emb, logits)
    return losses, Sampled(*sampled)


@torch.no_grad()
def region_class_means(teacher: nn.Module, batches, num_classes: int):
    """The teacher's mean box feature of each class -> [K,1024] float32, and counts [K].

    batches: (images, targets, ...). Regions are sampled as in training, from the ground truth and
    the teacher's own proposals, as many as in a test; sums in double precision. A class without a
    region is 0.
    """
    score = teacher.roi_heads.box_predictor.cls_score
    sums = score.weight.new_zeros(num_classes, score.in_features, dtype=torch.float64)
    counts = score.weight.new_zeros(num_classes, dtype=torch.int64)
    for images, targets, *_ in batches:
        batch, targets = teacher.transform(images, targets)
        maps = teacher.backbone(batch.tensors)
        proposals, _ = teacher.rpn(batch, maps)
        boxes, _, labels, _ = teacher.roi_heads.select_training_samples(proposals, targets)
        emb, labels = box_branch(teacher, maps, boxes, batch.image_sizes)[0], torch.cat(labels)
        sums.index_add_(0, labels, emb.double())
        counts += labels.bincount(minlength=num_classes)
    sum_over_ranks(sums, counts)  # under torchrun each process saw its share of the images
    return (sums / counts.clamp_min(1)[:, None]).float(), counts


def load_region_means(args, data, teacher):
    """Kept beside the teachers; computed anew if that file is of other data or settings."""

    def compute():
        print("class means of regions: one pass of the teacher", flush=True)
        limit = args.class_means_images
        batches = data.batches("train", args.batch_size, limit=limit, shared=True)
        torch.manual_seed(0)
        means, counts = region_class_means(teacher.net, batches, data.num_classes)
        return {"means": means.cpu(), "counts": counts.cpu()}

    settings = ("class_means_images", "image_size", "smallest_anchor", "regions", "batch_size")
    made_by = {"teacher": teacher.hash, "data": data.fingerprint, "images": len(data.train)}
    made_by |= {name: getattr(args, name) for name in settings}
    value = kept(Path(f"checkpoints/region-means-{teacher.hash}.pt"), made_by, compute)
    unseen = zip(data.classes, (value["counts"] == 0).tolist())
    unseen = [name for name, none in unseen if none and name != "N/A"]
    if unseen:
        names = ", ".join(unseen[:8]) + f" and {len(unseen) - 8} more" * (len(unseen) > 8)
        print(f"note: class means: no region of {names}; they are left out of ND", flush=True)
    return value["means"].to(data.device), value["counts"].to(data.device)


def region_nd(sampled, teacher_emb, class_means, class_counts, foreground_only: bool):
    """ND over the regions whose class has a mean; 0 if there is none."""
    counted = class_counts[sampled.labels] > 0
    if foreground_only:
        counted &= sampled.labels > 0
    if not counted.any():
        return sampled.emb.float().sum() * 0.0
    labels = sampled.labels[counted]
    return nd_loss(sampled.emb[counted], teacher_emb[counted], class_means, labels)


# The paper's weights for its three COCO pairs, from its code's configurations.
PAIR_WEIGHTS = {
    # teacher student           KD++ kd, nd  ReviewKD++ reviewkd, nd  ReviewKD alone
    "resnet101 resnet18": ((1.0, 1.5), (1.2, 1.5), 1.2),
    "resnet101 resnet50": ((1.0, 1.0), (1.4, 1.0), 1.0),
    "resnet50 mobilenet_v2": ((1.0, 1.0), (2.2, 1.5), 2.0),
}


def pair_row(args) -> tuple[tuple, str]:
    """The paper's weights for this pair, and the pair they are from."""
    pair = f"{args.teacher} {args.student}"
    pair = pair if pair in PAIR_WEIGHTS else "resnet101 resnet18"
    return PAIR_WEIGHTS[pair], pair


def fill_pair_weights(args) -> None:
    """Weights that the command line leaves open: the paper's, said aloud."""
    (kd, nd), (reviewkd, nd_beside_review), _ = pair_row(args)[0]
    if args.base == "kd":
        weights = dict(nd_weight=nd, kd_weight=kd, reviewkd_weight=0.0)
    else:
        weights = dict(nd_weight=nd_beside_review, kd_weight=0.0, reviewkd_weight=reviewkd)
    weights = {k: v for k, v in weights.items() if getattr(args, k) is None}
    vars(args).update(weights)
    asked, pair = f"{args.teacher} {args.student}", pair_row(args)[1]
    source = "the paper's" if pair == asked else f"none known for {asked}, so those of {pair}"
    if weights:
        print(f"weights ({source}):", *(f"{k} {v:g}" for k, v in weights.items()), flush=True)


def method_name(args) -> str:
    base = ["KD"] * bool(args.kd_weight) + ["ReviewKD"] * bool(args.reviewkd_weight)
    if not args.nd_weight:
        return "+".join(base) or "plain"
    name = "+".join(base) + "++" if base else "ND"
    return name + " on foreground" * args.nd_foreground_only


# Settings that the command line leaves open. The drawn set has small images and few of them, and
# starts from scratch.
OPEN = {
    "coco": {
        **dict(teacher="resnet50", student="resnet18", epochs=12, batch_size=8, regions=512),
        **dict(fpn_width=256, smallest_anchor=32, pretrained_backbone=True),
    },
    "shapes": {
        **dict(teacher="resnet18", student="mobilenet_v2", epochs=3, batch_size=4, regions=32),
        **dict(fpn_width=64, smallest_anchor=16, pretrained_backbone=False, lr=0.01),
        **dict(image_size=64, workers=0),
    },
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    backbone = one_of("backbone", list(DETECTORS))

    add = parser.add_argument_group("method (weights: the paper's for the pair)").add_argument
    names = ", ".join(DETECTORS)
    add("--teacher", type=backbone, metavar="NAME", help=f"{names} (resnet50; shapes: resnet18)")
    add("--student", type=backbone, metavar="NAME", help="(resnet18; shapes: mobilenet_v2)")
    add("--base", choices=("kd", "reviewkd"), default="kd", help="the loss that ND joins (kd)")
    add("--nd-weight", type=weight, metavar="X", help="of ND; 0 gives the base method alone")
    add("--kd-weight", type=weight, metavar="X", help="of KD on the regions' logits, at T = 1")
    add("--reviewkd-weight", type=weight, metavar="X", help="of ReviewKD on the FPN's maps")
    add(
        "--nd-foreground-only",
        action="store_true",
        help="ablation: by the paper background counts, three quarters of the regions and more",
    )
    add("--class-means-images", type=positive_int, metavar="N", help="the first N are"
        " enough for the means (all)")  # fmt: skip

    add = parser.add_argument_group("recipe (settings in brackets: COCO; shapes)").add_argument
    add("--epochs", type=positive_int, metavar="N", help="drops scale along (12; 3)")
    add("--iterations", type=positive_int, metavar="N", help="steps, in the place of --epochs")
    add("--teacher-epochs", type=positive_int, metavar="N", help="if it is trained (--epochs)")
    add("--batch-size", type=positive_int, metavar="N", help="images (8; 4)")
    add("--lr", type=positive, metavar="X", help="lower it if the first epoch diverges (0.01 for 8"
        " images, in proportion; 0.01)")  # fmt: skip
    add("--momentum", type=below_one, default=0.9, metavar="X", help="(0.9)")
    add("--weight-decay", type=weight, default=1e-4, metavar="X", help="(0.0001)")
    add("--regions", type=positive_int, metavar="N", help="sampled in an image;"
        " a test keeps twice as many proposals, 1000 at most (512; 32)")  # fmt: skip
    add("--fpn-width", type=positive_int, metavar="N", help="channels of the FPN (256; 64)")
    add(
        "--pretrained-backbone",
        action=YesNo,
        help="start from ImageNet weights, with BatchNorm frozen (yes; no)",
    )

    add_detection_arguments(parser)
    args = parser.parse_args(argv)
    args.script = "detect_nd"
    if args.epochs and args.iterations:
        raise UserError("--epochs and --iterations: give the length of training once")
    for name, value in OPEN[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.train_teacher |= args.dataset == "shapes"
    args.lr = args.lr or 0.01 * args.batch_size / 8
    args.plot = ("detections.png",) if args.plot else ()
    if args.predict and not args.eval:
        raise UserError("--predict: say with whose weights: --eval runs/.../student.pt")
    if args.eval:
        return args
    fill_pair_weights(args)
    args.method = method_name(args)
    on_gpu = pick_device(args.device).type == "cuda"
    if args.reviewkd_weight and args.deterministic and on_gpu:
        raise UserError("--base reviewkd: its pooling has no deterministic form on a GPU")
    if args.plot:
        pyplot()  # fail now, not after the training
        if args.method == "plain":
            raise UserError("--plot compares with the plain student: give it a method's weight")
    if args.reviewkd_weight and args.batch_size < 2 * world():
        raise UserError(
            f"--batch-size {args.batch_size}: ReviewKD's BatchNorm needs 2 images or more a process"
        )
    return args


def main(args) -> dict:
    """One run, from data to result. With args.teacher None and every weight 0 it is the plain
    detector: so is the teacher trained."""
    device = pick_device(args.device)
    data = load_detection_data(args, device)
    steps = data.steps(args.batch_size)
    if args.iterations:  # the last epoch is cut short
        args.epochs = math.ceil(args.iterations / steps)
    total = args.iterations or args.epochs * steps
    run = Run(args)
    if run.done:  # --resume of a finished run
        return run.done

    # Student. Seeded here, so that its start does not depend on what happened before. The helper is
    # trained beside it and thrown away afterwards.
    torch.manual_seed(args.seed)
    student = build_detector(args.student, data.num_classes, args)
    helpers = nn.ModuleDict()
    if args.reviewkd_weight:
        widths = [args.fpn_width] * 5  # of the FPN's levels, the teacher's and the student's
        helpers["review"] = ReviewKD(widths, widths, args.fpn_width)
    student, helpers = student.to(device), helpers.to(device)

    # Teacher: loaded, or trained first by this very function; frozen from here on.
    teacher = get_teacher_detector(args, data, main) if args.teacher else None
    if args.nd_weight:
        class_means, class_counts = load_region_means(args, data, teacher)
    # What is drawn from here on, such as regions, is drawn alike for every method.
    torch.manual_seed(args.seed)

    # SGD with momentum, one group for student and helper; a pretrained stem is left as it is.
    trained = [p for p in (*student.parameters(), *helpers.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )

    state = {"student": student, "helpers": helpers, "optimizer": optimizer}
    state |= {"data": data.fingerprint, "teacher": teacher and teacher.hash}
    warm_up = min(1000, total // 10)
    for epoch in range(run.restore(**state), args.epochs):
        student.train()
        helpers.train()
        todo = total - epoch * steps
        meter = DetectionMeter(args, epoch, args.batch_size * todo)
        shuffle = args.seed * 100_003 + epoch  # another for every seed and epoch
        last = min(steps, todo)
        order = dict(seed=shuffle, part=slice(run.step, last), shared=True)
        batches = data.batches("train", args.batch_size, **order)
        for step, (images, targets, image_ids) in run.steps(batches, last, meter, state):
            # Schedule: lr / 10 at 120 and 160 of 180 parts of the run; at first it grows linearly.
            done = epoch * steps + step
            lr = args.lr / 10 ** sum(180 * done >= drop * total for drop in (120, 160))
            lr *= min(1.0, 0.001 + 0.999 * done / max(1, warm_up))
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward: the teacher is shown the student's pixels and the student's regions.
            with autocast(args, device):
                losses, sampled = training_pass(student, images, targets)
                with torch.no_grad():
                    if args.nd_weight or args.kd_weight or args.reviewkd_weight:
                        teacher_maps = teacher.net.backbone(sampled.pixels)
                    if args.nd_weight or args.kd_weight:
                        teacher_emb, teacher_logits, _ = box_branch(
                            teacher.net, teacher_maps, sampled.boxes, sampled.sizes
                        )
                if args.reviewkd_weight:
                    teacher_levels = list(teacher_maps.values())
                    student_levels = helpers["review"](list(sampled.maps.values()), teacher_levels)

            # Losses, outside autocast and in float32. A term of weight 0 is not computed.
            nd = kd = reviewkd = 0.0
            if args.nd_weight:
                nd = region_nd(
                    sampled, teacher_emb, class_means, class_counts, args.nd_foreground_only
                )
            if args.kd_weight:
                kd = kd_loss(sampled.logits, teacher_logits, temperature=1.0)
            if args.reviewkd_weight:
                reviewkd = hcl_loss(student_levels, teacher_levels)
            loss = losses["cls"] + losses["box"] + losses["objectness"] + losses["rpn_box"]
            loss = loss + args.nd_weight * nd + args.kd_weight * kd
            loss = loss + args.reviewkd_weight * reviewkd

            optimizer.zero_grad()
            meter.add({**losses, "nd": nd, "kd": kd, "reviewkd": reviewkd}, image_ids)
            loss.backward()
            average_gradients(optimizer)  # over the processes, if there are several
            optimizer.step()

        metrics = meter.close() | evaluate_detector(student, data, args)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        meter.report(metrics)
        run.end_epoch(metrics, **state)

    if args.plot and rank() == 0:
        plain = load_detector(
            args.student, data.num_classes, args, run.dir / "plain" / "student.pt"
        ).to(device)
        columns = {"plain student": plain, args.method: student}
        draw_sheet(data, columns, args, run.dir / args.plot[0])
    return run.finish_detection(student, data, teacher)


def print_ap(args) -> None:
    """--eval: AP of a student's weights."""
    device = pick_device(args.device)
    data = load_detection_data(args, device)
    student = load_detector(args.student, data.num_classes, args, args.eval).to(device)
    scores, by_class = coco_ap(data.truth, detect(student, data, args))
    print(f"{args.student} from {args.eval}: {ap_line(scores)}")
    if args.per_class:
        for category, ap in by_class.items():
            name = data.classes[data.category_ids.index(category)]
            print(f"  {name:20s} {'-' if ap is None else format(ap, '.2f')}")


def program(argv=None) -> None:
    args = parse_args(argv)
    if args.eval:
        if args.resume:
            raise UserError("--resume and --eval: choose one")
        as_trained(args)
        return draw_predictions(args) if args.predict else print_ap(args)
    zero = dict(nd_weight=0.0, kd_weight=0.0, reviewkd_weight=0.0, plot=())
    zero |= dict(nd_foreground_only=False)
    (kd, _), _, reviewkd = pair_row(args)[0]
    baselines = {
        "plain": zero | dict(method="plain"),
        "kd": zero | dict(method="KD", kd_weight=args.kd_weight or kd),
    }
    if args.reviewkd_weight:
        if args.reviewkd_weight != pair_row(args)[0][1][0]:  # not the default: the user's
            reviewkd = args.reviewkd_weight
        baselines["reviewkd"] = zero | dict(method="ReviewKD", reviewkd_weight=reviewkd)
    launch(main, args, baselines, needed=("plain",) if args.plot else ())


if __name__ == "__main__":
    sys.exit(run_program(program))
