"""ND: knowledge distillation by feature norm and direction (KD++, DKD++, DIST++, ReviewKD++).

The idea in one sentence: turn the student's embedding of an image towards the teacher's mean
embedding of that image's class and, along that direction, lengthen it until it is at least as long
as the teacher's own.

    Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature
    Norm and Direction, arXiv 2305.17007 (ECCV 2024: "... Feature Direction and Norm").

For image i of class y, with s = student_emb[i], t = teacher_emb[i] (the inputs of the classifiers;
if their widths differ, s comes out of a projector, BatchNorm, Dropout, Linear, later thrown away)
and e_y = class_means[y] / |class_means[y]|:

    nd   = mean_i [ 1 - (s . e_y) / max(|s|, |t|) ]  =  mean_i [ 1 - cos(s, e_y) min(1, |s|/|t|) ]
    loss = ce_weight * ce + warm_up * kd_weight * base + nd_weight * nd

ce is the cross-entropy; base is KD, DKD, DIST or ReviewKD, and with nd becomes KD++, DKD++, DIST++
or ReviewKD++. warm_up grows from 0 to 1 over the first twelfth of the run (ImageNet: twentieth).
The paper's ablations take nd apart: --direction-weight, 1 - cos(s, e_y), and --norm-weight,
relu(1 - |s|/|t|), stand in its place.

    python nd.py --teacher resnet56 --student resnet20            CIFAR-100, the paper's recipe
    python nd.py --base dkd --compare --seeds 0 1 2               DKD++, DKD, KD and CE, 3 seeds
    python nd.py --dataset imagenet --data-dir imagenet --pretrained-teacher
    python nd.py --dataset shapes --teacher resnet14 --student resnet8 --epochs 4 --batch-size 64

Measured, top-1 % of the last epoch on CIFAR-100's test images, mean ± standard deviation over the
seeds 0, 1, 2; resnet56 (69.56 %, of all 50,000 images) -> resnet8, a small budget for a CPU: 10,000
training images, 15 epochs. Weights of resnet56 -> resnet20, the paper having none for this pair. It
shows that the code works, not what the method gains in 240 epochs.

    CE    24.29 ± 0.53
    KD    34.07 ± 0.27
    KD++  35.46 ± 0.90

(--student resnet8 --teacher-ckpt FILE --train-size 10000 --epochs 15 --compare --seeds 0 1 2)

Differs from the paper and its code:
 1. Class means come from clean training images (--class-means augmented: the official way) and are
    summed in double precision; the official code rounds each value to 4 decimals.
 2. Where |s| and |t| are both 0 (below 1e-7) ND is 1 with zero gradient instead of 0/0. DIST's
    correlations have no epsilon; the published 1e-8 draws those of very small columns towards 0.
 3. The result is the last epoch. The paper's code keeps the epoch that is best on the test set.
 4. The projector starts as PyTorch starts it and leaves the student's classifier alone; the paper's
    code, where there is one, also resets the classifier's bias (CIFAR) or draws it anew (ImageNet).
 5. The drops of the learning rate and the warm-up are fractions of the run (of 240 epochs: 150,
    180, 210 and 20, as published), so that a shorter run keeps the recipe's shape. On ImageNet the
    paper's code warms ND up too in DKD++; here ND is whole from the start.
 6. ReviewKD works for every pair with the same number of stages, resized to the teacher's maps.
 7. Under torchrun every loss is that of the whole batch, though BatchNorm sees a process's share.
    --gather local: the losses too, which matters to DIST, whose columns run over the images.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import (  # nothing in there knows about distillation
    Meter,  # sums of the loss terms, progress line, stop at nan
    Parser,
    Run,  # the run's folder: resume, metrics.jsonl, result.json, student.pt
    UserError,  # ends the program with one line and status 2
    YesNo,  # --flag and --no-flag
    add_run_arguments,
    autocast,
    average_gradients,
    below_one,
    build_model,  # network(x, return_features=True) -> logits, (.embedding, .maps, .preact)
    compiled,  # torch.compile, under --compile
    evaluate,
    gather,  # under torchrun: rows of all processes, with gradient
    get_teacher,  # loads it, or trains it first by calling main
    kept,  # a value from a file if that was made by the same things, else computed
    launch,  # --seeds and --compare: calls main once per run
    load_data,
    mean_over_ranks,
    model_names,
    one_of,
    pick_device,
    positive,
    positive_int,
    probe,  # features of two test images in eval mode
    run_program,
    sum_over_ranks,
    weight,
)

# --- copy from here ---------------------------------------------------------------------------
# Needs `import torch` and `import torch.nn.functional as F`. Every loss computes in float32 or
# better and sends no gradient into the teacher. ND alone is the first four functions, nd_loss and,
# below the block, compute_class_means:
#     class_means = compute_class_means(teacher, batches, num_classes)  # once
#     loss = ce + nd_loss(student_emb, teacher_emb, class_means, labels)


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


def direction_loss(
    student_emb: torch.Tensor, class_means: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Direction alone: mean of 1 - cos(s, e_y). [B,D], [K,D], [B]. Usual weight 1.
    ValueError: shapes that do not fit."""
    s = _unit(_full(student_emb).flatten(1))  # [B,D]
    e = F.embedding(labels, _unit(_full(class_means.detach())))
    _alike(s, e)
    return (1 - (s * e).sum(1)).mean()


def norm_loss(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Norm alone: mean of relu(1 - |s| / |t|). [B,D], [B,D]. Usual weight 1."""
    s, t = (x.norm(dim=1) for x in _rows(student_emb, teacher_emb))  # [B]
    return (F.relu(t - s) / t.clamp_min(1e-7)).mean()  # relu(1 - s/t), and 0 where t = 0


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


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> torch.Tensor:
    """Decoupled KD: T^2 (alpha TCKD + beta NCKD), mean over the batch.

    [B,K] logits, finite, [B] labels. TCKD: KL(teacher || student) between the masses (true class,
    all others). NCKD: the same among the others alone; plain KD multiplies it by the teacher's mass
    on them, tiny where the teacher is sure. With K = 2, NCKD is 0. Usual alpha 0.5 to 2.5, beta 4
    to 8; on ImageNet, at temperature 1, alpha 0.6 to 1, beta 0.5 to 1. ValueError: logits of
    different shapes. Source: arXiv 2203.08679.
    """

    def split(logits):
        log_p = F.log_softmax(_full(logits) / temperature, 1)  # [B,K]
        true = F.one_hot(labels, log_p.shape[1]).bool()
        others = log_p.masked_fill(true, torch.finfo(log_p.dtype).min)  # finite: no inf - inf
        log_rest = others.logsumexp(1, keepdim=True)  # log mass of all other classes  [B,1]
        binary = torch.cat([log_p.gather(1, labels[:, None]), log_rest], 1)  # [B,2]
        return binary, F.log_softmax(others, 1)  # [B,2], [B,K]

    _alike(student_logits, teacher_logits)
    pairs = zip(split(student_logits), split(teacher_logits.detach()))
    tckd, nckd = (F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in pairs)
    return temperature**2 * (alpha * tckd + beta * nckd)


def dist_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
) -> torch.Tensor:
    """DIST: T^2 (beta (1 - mean row correlation) + gamma (1 - mean column correlation)).

    [B,K] logits. Pearson correlations of the two matrices of probabilities: rows compare the
    classes within an image, columns the images within a class: under DDP gather the logits first,
    for a column needs the whole batch. A row or column that is constant up to rounding (its
    deviations are shorter than 1e-5 of its length, or than 1e-7) has correlation 0. Usual weight
    1.5 to 7. ValueError: shapes differ. Source: arXiv 2205.10536.
    """
    _alike(student_logits, teacher_logits)
    p_s = F.softmax(_full(student_logits) / temperature, 1)  # [B,K]
    p_t = F.softmax(_full(teacher_logits.detach()) / temperature, 1)

    def deviation(p, dim):  # from the mean, as unit vectors; mere rounding has no direction
        centred = p - p.mean(dim, keepdim=True)
        rounding = centred.norm(dim=dim, keepdim=True) < 1e-5 * p.norm(dim=dim, keepdim=True)
        return _unit(centred.masked_fill(rounding, 0.0), dim)

    def correlation(dim):
        return (deviation(p_s, dim) * deviation(p_t, dim)).sum(dim).mean()

    return temperature**2 * (beta * (1 - correlation(1)) + gamma * (1 - correlation(0)))


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
# nd_loss and direction_loss need the class means too; this copies like the block.


@torch.no_grad()
def compute_class_means(
    teacher: torch.nn.Module, batches, num_classes: int, add_up=None
) -> torch.Tensor:
    """The teacher's mean embedding of each class, [K,D] float32, summed in double precision.

    batches: pairs of images [B,3,H,W] and labels [B], of the training set, once. The teacher is
    used in eval mode. add_up: called with the sums and the counts, to add those of all processes in
    place, where each sees its share of the images. ValueError: a class without samples.
    """
    modes = {module: module.training for module in teacher.modules()}
    teacher.eval()
    sums = counts = torch.zeros(())
    for images, labels in batches:
        embedding = teacher(images, return_features=True)[1].embedding.double()  # [B,D]  <- yours
        one_hot = F.one_hot(labels, num_classes).double()  # [B,K]
        sums, counts = sums + one_hot.T @ embedding, counts + one_hot.sum(0)  # [K,D], [K]
    if add_up:
        add_up(sums, counts)
    for module, mode in modes.items():
        module.training = mode
    if not counts.all():
        raise ValueError(f"class means: no training image of class {int(counts.argmin())}")
    return (sums / counts[:, None]).float()


def load_class_means(args, data, teacher, run) -> torch.Tensor:
    """Kept in the run's folder; computed anew if that file is of another teacher or other data."""

    def compute():
        augment = args.class_means == "augmented"
        batches = data.batches("train", 500, augment=augment, shared=True)  # in order, every image
        try:
            return compute_class_means(teacher.net, batches, data.num_classes, sum_over_ranks).cpu()
        except ValueError as error:
            raise UserError(str(error)) from None

    made_by = {"teacher": teacher.hash, "data": data.fingerprint, "images": args.class_means}
    return kept(run.dir / "class_means.pt", made_by, compute).to(data.device)


# The paper's recipes, by data set; warm_up: the epochs over which the base loss grows.
RECIPES = {
    "cifar": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=128, lr=0.1)
    | dict(weight_decay=5e-4, temperature=4.0, drops=(150, 180, 210), warm_up=20),
    "imagenet": dict(teacher="resnet34", student="resnet18", epochs=100, batch_size=512, lr=0.2)
    | dict(weight_decay=1e-4, temperature=1.0, drops=(30, 60, 90), warm_up=5),
}
BASES = {"kd": "KD", "dkd": "DKD", "dist": "DIST", "reviewkd": "ReviewKD"}
# The paper's weights for its pairs, from its code's training scripts; ce_weight 1. The first pair
# stands in for unknown ones; where there is none for DIST, the first of CIFAR.
PAPER_WEIGHTS = {
    # teacher student         KD++ kd, nd  DKD++ alpha, beta, nd  DIST++ kd, nd  ReviewKD++ kd, nd
    "cifar": {
        "resnet56 resnet20": ((1.0, 2.0), (2.5, 4.0, 3.5), (2.0, 1.0), (1.2, 1.0)),
        "resnet32x4 resnet8x4": ((3.5, 2.0), (2.0, 8.0, 0.5), (1.5, 4.0), (8.0, 1.0)),
        "wrn_40_2 wrn_40_1": ((1.0, 1.5), (1.0, 6.0, 1.0), (2.5, 3.0), (5.0, 4.0)),
        "ResNet50 MobileNetV2": ((3.0, 0.5), (0.5, 8.0, 1.0), (7.0, 1.0), (6.0, 2.0)),
        "resnet32x4 ShuffleV1": ((2.5, 1.5), (0.5, 8.0, 4.0), (2.5, 3.0), (7.0, 1.0)),
        "resnet32x4 ShuffleV2": ((4.0, 0.5), (0.5, 6.0, 0.5), (3.0, 4.0), (8.0, 1.5)),
    },
    "imagenet": {
        "resnet34 resnet18": ((2.5, 1.0), (0.8, 0.5, 1.0), None, (1.0, 3.0)),
        "resnet50 resnet18": ((4.0, 1.0), (0.6, 0.5, 2.0), None, (3.0, 2.0)),
        "resnet101 resnet18": ((3.5, 4.0), (0.8, 0.5, 1.0), None, (3.0, 1.0)),
        "resnet152 resnet18": ((4.0, 2.0), (1.0, 1.0, 1.0), None, (3.0, 1.0)),
    },
}


def paper_weights(args, base: str) -> tuple[dict, str]:
    """The paper's weights for this pair and base loss, and the pair they are from."""
    known = PAPER_WEIGHTS.get(args.dataset, {}) | PAPER_WEIGHTS["cifar"]
    column = list(BASES).index(base)
    rows = {pair: row[column] for pair, row in known.items() if row[column]}
    pair = f"{args.teacher} {args.student}"
    pair = pair if pair in rows else next(iter(rows))
    names = ("dkd_alpha", "dkd_beta", "nd_weight") if base == "dkd" else ("kd_weight", "nd_weight")
    return dict(kd_weight=1.0) | dict(zip(names, rows[pair])), pair


def fill_weights(args) -> None:
    """Weights that the command line leaves open: the paper's, said aloud."""
    if args.nd_weight is None and (args.direction_weight or args.norm_weight):
        args.nd_weight = 0.0  # an ablation puts its terms in the place of ND
    weights, pair = paper_weights(args, args.base)
    weights = {k: v for k, v in weights.items() if getattr(args, k) is None}
    vars(args).update(weights)
    asked = f"{args.teacher} {args.student}"
    source = "the paper's" if pair == asked else f"none known for {asked}, so those of {pair}"
    if weights:
        print(f"weights ({source}):", *(f"{k} {v:g}" for k, v in weights.items()), flush=True)


def method_name(args) -> str:
    if args.kd_weight:
        parts = [BASES[args.base] + "++" * bool(args.nd_weight)]
    else:
        parts = ["CE"] + ["ND"] * bool(args.nd_weight)
    parts += ["direction"] * bool(args.direction_weight) + ["norm"] * bool(args.norm_weight)
    return " + ".join(parts)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    network = one_of("model", model_names())

    add = parser.add_argument_group("method (weights: the paper's for the pair)").add_argument
    add("--teacher", type=network, metavar="NAME", help="(resnet56; ImageNet: resnet34)")
    add("--student", type=network, metavar="NAME", help="(resnet20; ImageNet: resnet18)")
    add("--base", choices=tuple(BASES), default="kd", help="the loss that ND joins (kd)")
    add("--ce-weight", type=weight, default=1.0, metavar="X", help="of the cross-entropy (1)")
    add("--kd-weight", type=weight, metavar="X", help="of the base loss; 0 switches it off")
    add("--nd-weight", type=weight, metavar="X", help="of ND; 0 gives the base method alone")
    add("--direction-weight", type=weight, default=0.0, metavar="X", help="in ND's place (0)")
    add("--norm-weight", type=weight, default=0.0, metavar="X", help="in ND's place (0)")
    add("--temperature", type=positive, metavar="T", help="of KD, DKD, DIST (4; ImageNet: 1)")
    add("--dkd-alpha", type=weight, metavar="X", help="DKD: true class against all others")
    add("--dkd-beta", type=weight, metavar="X", help="DKD: the others among themselves")
    add("--class-means", choices=("clean", "augmented"), default="clean", help="images (clean)")

    add = parser.add_argument_group("recipe (in brackets: CIFAR; ImageNet)").add_argument
    add("--epochs", type=positive_int, metavar="N", help="the drops of lr scale along (240; 100)")
    add("--teacher-epochs", type=positive_int, metavar="N", help="if it must be trained (--epochs)")
    add("--batch-size", type=positive_int, metavar="N", help="(128; 512)")
    add("--teacher-lr", type=positive, metavar="X", help="of a teacher trained here (the same"
        " defaults; --lr does not change it)")  # fmt: skip
    add("--lr", type=positive, metavar="X", help="(0.1, but MobileNet, ShuffleNet 0.02; 0.2)")
    add("--momentum", type=below_one, default=0.9, metavar="X", help="(0.9)")
    add("--nesterov", action=YesNo, default=True, help="Nesterov's form of it (yes)")
    add("--weight-decay", type=weight, metavar="X", help="(0.0005; 0.0001)")
    add("--pretrained", action=YesNo, default=False, help="start from ImageNet weights (no)")

    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.script = "nd"
    for name in ("teacher", "student", "epochs", "batch_size", "weight_decay", "temperature"):
        if getattr(args, name) is None:
            setattr(args, name, recipe_of(args)[name])
    args.lr = args.lr or default_lr(args.student, args)
    args.teacher_lr = args.teacher_lr or default_lr(args.teacher, args)
    args.teacher_epochs = args.teacher_epochs or args.epochs
    args.nesterov = args.nesterov and args.momentum > 0
    if args.base != "dkd" and (args.dkd_alpha, args.dkd_beta) != (None, None):
        raise UserError("--dkd-alpha, --dkd-beta: only for --base dkd")
    if args.base == "reviewkd" and args.deterministic and pick_device(args.device).type == "cuda":
        raise UserError("--base reviewkd: its pooling has no deterministic form on a GPU")
    if args.batch_size < 2:
        raise UserError("--batch-size 1: BatchNorm needs 2 or more")
    if not args.eval:
        fill_weights(args)
        trains = args.dkd_alpha or args.dkd_beta if args.base == "dkd" else args.base != "reviewkd"
        if not args.ce_weight and not (args.kd_weight and trains):  # ReviewKD trains no classifier
            raise UserError("--ce-weight 0: nothing else here trains the classifier")
        args.method = method_name(args)
    return args


def recipe_of(args) -> dict:
    return RECIPES.get(args.dataset, RECIPES["cifar"])


def default_lr(name: str, args) -> float:
    if args.dataset != "imagenet" and name.lower().startswith(("mobile", "shuffle")):
        return 0.02
    return recipe_of(args)["lr"]


def main(args) -> dict:
    """One run, from data to result. With args.teacher None and every weight 0 but that of CE it is
    plain training: so is the teacher trained."""
    # What stands between `[alike` and `[end]` is the same in every script; a test compares it.
    # [alike: start]
    run = Run(args)
    if run.done:  # --resume of a finished run
        return run.done
    device = pick_device(args.device)
    data = load_data(args, device)

    # Student. Seeded here, so that its start does not depend on what happened before.
    torch.manual_seed(args.seed)
    student = build_model(args.student, data.num_classes, args.pretrained)

    # Helpers: what is trained beside the student and thrown away afterwards. Shapes are read off an
    # untrained teacher, so that a pair that does not fit is refused before any long work.
    helpers = nn.ModuleDict()
    student_sees = probe(student, data)
    teacher_sees = args.teacher and probe(build_model(args.teacher, data.num_classes), data)
    # [end]

    recipe = recipe_of(args)
    helpers["projector"] = nn.Identity()
    uses_embedding = args.nd_weight or args.direction_weight or args.norm_weight
    uses_teacher = args.nd_weight or args.norm_weight or args.kd_weight  # in every step
    if args.teacher:
        width, teacher_width = student_sees.embedding.shape[1], teacher_sees.embedding.shape[1]
        if uses_embedding and width != teacher_width:
            layers = nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, teacher_width)
            helpers["projector"] = nn.Sequential(*layers)
        if args.base == "reviewkd" and args.kd_weight:
            # Levels: the stages (teacher: before their last ReLU) and the embedding as a 1x1 map.
            student_channels = [m.shape[1] for m in student_sees.maps] + [width]
            teacher_channels = [m.shape[1] for m in teacher_sees.preact] + [teacher_width]
            if not len(student_channels) == len(teacher_channels) > 1:
                stages = f"{len(teacher_channels) - 1} and {len(student_channels) - 1} stages"
                raise UserError(f"--base reviewkd: this pair has {stages}; choose one with as many")
            helpers["review"] = ReviewKD(student_channels, teacher_channels, min(512, width))

    # [alike: teacher]
    # Loaded, or trained first by this very function; in eval mode and frozen from here on.
    teacher = get_teacher(args, data, main) if args.teacher else None
    # [end]
    uses_means = args.nd_weight or args.direction_weight
    class_means = load_class_means(args, data, teacher, run) if uses_means else None

    # [alike: optimizer and epochs]
    # SGD with momentum, one group for student and helpers.
    student = student.to(device, memory_format=torch.channels_last)
    helpers = helpers.to(device)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *helpers.parameters()],
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.nesterov,
        weight_decay=args.weight_decay,
    )
    run_student, run_teacher = compiled(args, student, teacher and teacher.net)

    state = {"student": student, "helpers": helpers, "optimizer": optimizer}
    state |= {"data": data.fingerprint, "teacher": teacher and teacher.hash}
    torch.manual_seed(args.seed)  # dropout: the same whatever else was built or trained above
    steps, first_epoch = data.steps(args.batch_size), run.restore(**state)
    for epoch in range(first_epoch, args.epochs):
        student.train()
        helpers.train()
        meter = Meter(args, epoch, len(data.train.labels))
        shuffle = args.seed * 100_003 + epoch  # another for every seed and epoch
        order = dict(seed=shuffle, augment=True, first=run.step, shared=True)
        batches = data.batches("train", args.batch_size, **order)
        for step, (images, labels) in run.steps(batches, steps, meter, state):
            # [end]
            # Schedule. `now` is this step in epochs of the recipe's full length (CIFAR: 0 to 239),
            # whatever the run's. Three drops of lr; the base loss grows at first.
            now = recipe["epochs"] * (epoch * steps + step) // (args.epochs * steps)
            lr = args.lr / 10 ** sum(now >= drop for drop in recipe["drops"])
            warm_up = min(1.0, now / recipe["warm_up"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward: both networks see the same augmented images.
            with autocast(args, device):
                logits, features = run_student(images, return_features=True)
                embedding = helpers["projector"](features.embedding)
                if uses_teacher:
                    with torch.no_grad():
                        teacher_logits, teacher_features = run_teacher(images, return_features=True)
                    teacher_emb = teacher_features.embedding
                if "review" in helpers:
                    teacher_maps = [*teacher_features.preact, teacher_emb[..., None, None]]
                    student_maps = [*features.maps, features.embedding[..., None, None]]
                    student_maps = helpers["review"](student_maps, teacher_maps)

            # Under torchrun, what is compared between images is gathered from all processes.
            logits, embedding, labels = gather(args, logits, embedding, labels)
            if uses_teacher:
                teacher_logits, teacher_emb = gather(args, teacher_logits, teacher_emb)

            # Losses, outside autocast and in float32. A method's term of weight 0 is not computed.
            base = nd = direction = norm = 0.0
            ce = F.cross_entropy(logits.float(), labels)
            if args.kd_weight:
                if args.base == "kd":
                    base = kd_loss(logits, teacher_logits, args.temperature)
                elif args.base == "dkd":
                    alpha, beta = args.dkd_alpha, args.dkd_beta
                    base = dkd_loss(logits, teacher_logits, labels, alpha, beta, args.temperature)
                elif args.base == "dist":
                    base = dist_loss(logits, teacher_logits, temperature=args.temperature)
                elif args.base == "reviewkd":
                    base = mean_over_ranks(args, hcl_loss(student_maps, teacher_maps), len(images))
            if args.nd_weight:
                nd = nd_loss(embedding, teacher_emb, class_means, labels)
            if args.direction_weight:
                direction = direction_loss(embedding, class_means, labels)
            if args.norm_weight:
                norm = norm_loss(embedding, teacher_emb)
            loss = args.ce_weight * ce + warm_up * args.kd_weight * base + args.nd_weight * nd
            loss = loss + args.direction_weight * direction + args.norm_weight * norm
            terms = {"ce": ce, args.base: base, "nd": nd, "direction": direction, "norm": norm}

            # [alike: step]
            optimizer.zero_grad()
            loss.backward()
            average_gradients(optimizer)  # over the processes, if there are several
            optimizer.step()
            meter.add(logits, labels, terms)

        metrics = meter.close() | {"test_top1": evaluate(student, data, args)}
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        meter.report(metrics)
        run.end_epoch(metrics, **state)
    # [end]

    return run.finish(student, data, teacher)


def program(argv=None) -> None:
    args = parse_args(argv)
    ce = dict(method="CE", base="kd", ce_weight=1.0, kd_weight=0.0, nd_weight=0.0)
    ce |= dict(direction_weight=0.0, norm_weight=0.0, dkd_alpha=None, dkd_beta=None)

    def without_nd(base):  # with the weight that the base loss has beside ND
        given = args.kd_weight if base == args.base else 0.0
        kd_weight = given or paper_weights(args, base)[0]["kd_weight"]
        ce_weight = args.ce_weight if given else 1.0
        new = dict(method=BASES[base], base=base, ce_weight=ce_weight, kd_weight=kd_weight)
        if base == "dkd":
            new |= dict(dkd_alpha=args.dkd_alpha, dkd_beta=args.dkd_beta)
        return ce | new

    baselines = {"ce": ce, "kd": without_nd("kd"), args.base: without_nd(args.base)}
    launch(main, args, baselines)


if __name__ == "__main__":
    sys.exit(run_program(program))
