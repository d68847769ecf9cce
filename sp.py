"""SP: similarity-preserving knowledge distillation. Related losses: CC, intra (our own) and AT.

Idea: two images that are similar for the teacher should be similar for the student, whichever
features each of the two networks uses.

    Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682.

For a batch of B images, q is the last feature map of a network [B,C,H,W], flattened to [B,CHW]:

    gram     = q q^T, every row divided by its L2 norm                      [B,B]
    relation = |gram_t - gram_s|_F^2 / B^2                                  t: teacher, s: student
    loss     = ce_weight * ce + sp_weight * relation + kd_weight * kd + at_weight * at

Weights: 1, 3000, 0, 0 (relation starts near 0.0015 for B = 64); kd: Hinton's, T = 4; at: AT loss.
The feature maps may differ in channels and size, and nothing is trained beside the student.

    python sp.py --teacher resnet56 --student resnet20      # CIFAR-100, RepDistiller's recipe
    python sp.py --kd-weight 1 --compare --seeds 0 1 2      # SP+KD, KD and CE, 3 seeds each
    python sp.py --sp-weight 0 --at-weight 1000             # AT; --relation cc or intra: the others
    python sp.py --recipe paper --teacher wrn_16_8 --student wrn_40_2       # CIFAR-10

Measured on CIFAR-100, resnet56 (72.6 %) -> resnet20, all images, 24 epochs (a tenth of the usual
length): top-1 % after the last epoch, mean ± standard deviation over seeds 0, 1, 2. CE 61.38 ±
0.22, KD 63.71 ± 0.21, SP+KD 63.91 ± 0.22. What SP gains in 240 epochs was not measured.
SP harms MobileNetV2: CE 19.13, SP 13.51 (n = 3; 10,000 images, 15 epochs).

Differences from the paper and from other code:
 1. Rows have unit L2 norm, as published (torchdistill: L1); a row of zeros stays zero, not 0/0.
 2. One pair of feature maps, the last, as in RepDistiller's code; --sp-maps all sums over all.
 3. --recipe paper is the recipe of an independent replication, not checked against the paper.
 4. The result is the last epoch. KD is ce + kd; RepDistiller's KD rows are 0.1 ce + 0.9 kd.
 5. Under torchrun the similarities are those of the whole batch, not of each rank's part.
 6. --relation cc has nothing to train; RepDistiller's CC has two layers, so its rows differ.
Patent: US 11636337B2 covers the method; check it before commercial use.
"""

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F

import common

# The losses; sp_loss and intra_loss need _gram. Teacher in eval mode. Pass float32: under autocast,
# use .float() on what the networks return. No gradient reaches the teacher. All but KD ignore the
# scale of the features; they divide by the largest first, so that nothing overflows or vanishes.


def _gram(q: torch.Tensor) -> torch.Tensor:
    """Dot products of the rows of q, [...,N,F] -> [...,N,N], rows of unit L2 norm, or zero."""
    q = q / q.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)
    with torch.autocast(q.device.type, enabled=False):
        gram = q @ q.mT  # q_i . q_j
    largest = gram.detach().abs().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest < 1e-30, torch.inf)  # zero rows stay zero, no gradient
    return F.normalize(gram / largest, dim=-1)


def sp_loss(student_map: torch.Tensor, teacher_map: torch.Tensor) -> torch.Tensor:
    """Similarity-preserving loss between the images of a batch: |G_T - G_S|_F^2 / B^2.

    Args: student_map, teacher_map: [B,...], the last maps before pooling, of the same images; their
        other sizes may differ. B >= 2: one image gives 0.
    Returns: scalar, at most 4/B (2/B if no feature is negative). Raises: ValueError if B differs.
    Default weight: 3000 at B = 64, where the value starts near 0.0015 (MobileNetV2: 0.004). The
        value falls as 1/B: under DDP gather the maps of all ranks first, with gradient.
    Reference: Tung, Mori, ICCV 2019, arXiv 1907.09682.
    """
    if len(student_map) != len(teacher_map):
        raise ValueError(f"sp_loss: {len(student_map)} student, {len(teacher_map)} teacher images")
    g_s = _gram(student_map.flatten(1))  # [B,B]
    g_t = _gram(teacher_map.detach().flatten(1))
    return (g_t - g_s).square().mean()  # the mean divides by B^2


def cc_loss(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, gamma: float = 0.4
) -> torch.Tensor:
    """Correlation congruence: |K_T - K_S|_F^2 / B^2, K a Gaussian kernel between the images.

    K_ij = exp(-gamma |x_i - x_j|^2) of unit vectors x, that is exp(-2 gamma) exp(2 gamma x_i.x_j);
    the last factor, as published, is replaced by 1 + z + z^2/2 with z = 2 gamma x_i.x_j.
    Args: student_emb, teacher_emb: [B,...] of the same images; the rest may differ. gamma: > 0.
    Returns: scalar. Raises: ValueError if B differs.
    Default weight: 100, our choice, as the value starts between 0.005 and 0.06, at any B.
    Reference: Peng et al., ICCV 2019, arXiv 1904.01802, where x comes out of a learned layer.
    """
    if len(student_emb) != len(teacher_emb):
        raise ValueError(f"cc_loss: {len(student_emb)} student, {len(teacher_emb)} teacher images")

    def kernel(x):
        largest = x.detach().abs().amax(1, keepdim=True)  # of each row of x, [B,F]
        x = F.normalize(x / largest.masked_fill(largest < 1e-30, torch.inf), dim=1)
        with torch.autocast(x.device.type, enabled=False):
            e = 2 * gamma * x @ x.T  # [B,B]
        return (e * e / 2 + (1 + e)) * e.new_tensor(-2 * gamma).exp()

    k_s, k_t = kernel(student_emb.flatten(1)), kernel(teacher_emb.detach().flatten(1))
    return (k_t - k_s).square().mean()


def intra_loss(student_map: torch.Tensor, teacher_map: torch.Tensor) -> torch.Tensor:
    """SP within an image: similarities between its spatial positions; mean over the images.

    Args: student_map, teacher_map: [B,C,H,W]; both averaged down to the smaller H and smaller W.
    Returns: scalar, mean over images of |G_T - G_S|_F^2 / (HW)^2; needs [B,HW,HW] of memory.
    Raises: ValueError if these are not two [B,C,H,W] of one B.
    Default weight: 1000 at 8x8, where the value starts near 0.005; it falls about as 1/HW.
    Reference: none, our own variant of sp_loss.
    """
    if not student_map.ndim == teacher_map.ndim == 4 or len(student_map) != len(teacher_map):
        raise ValueError(f"intra_loss: not two [B,C,H,W]: {student_map.shape}, {teacher_map.shape}")
    s, t = student_map, teacher_map.detach()
    if s.shape[2:] != t.shape[2:]:
        size = [min(s.shape[d], t.shape[d]) for d in (2, 3)]
        s, t = F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)
    g_s, g_t = _gram(s.flatten(2).mT), _gram(t.flatten(2).mT)  # from [B,HW,C]: [B,HW,HW]
    return (g_t - g_s).square().mean()


def at_loss(student_map: torch.Tensor, teacher_map: torch.Tensor) -> torch.Tensor:
    """Attention transfer: mean over images and positions of (A_S - A_T)^2.

    A: the squared features, averaged over the channels and flattened to [B,HW], of unit L2 norm.
    Args: student_map, teacher_map: [B,C,H,W]; both averaged down to the smaller H and smaller W.
    Returns: scalar, at most 2/HW. Raises: ValueError if these are not two [B,C,H,W] of one B.
    Usual weight: 1000 for each stage, as the value starts at 3e-4 (32x32) to 1e-2 (8x8).
    Reference: Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928; squared as in their code.
    """
    if not student_map.ndim == teacher_map.ndim == 4 or len(student_map) != len(teacher_map):
        raise ValueError(f"at_loss: not two [B,C,H,W]: {student_map.shape}, {teacher_map.shape}")
    s, t = student_map, teacher_map.detach()
    if s.shape[2:] != t.shape[2:]:
        size = [min(s.shape[d], t.shape[d]) for d in (2, 3)]
        s, t = F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)
    s, t = (x / x.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30) for x in (s, t))
    a_s, a_t = (F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (s, t))
    return (a_s - a_t).square().mean()


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


def distill(args) -> dict:
    """Train a student and return its result; without args.teacher: plain training, of a teacher."""
    data = common.load_data(args)
    run = common.Run(args, data, figures=("similarities.png",) if args.plot else ())
    recipe = RECIPES[args.recipe]

    # Networks. Seeded here, so that their start does not depend on what happened before.
    torch.manual_seed(args.seed)
    student = common.build_for(data, args.student, args.pretrained)
    teacher = common.build_for(data, args.teacher) if args.teacher else None

    # Does this pair have the feature maps that the losses compare? Shapes are (C, H, W), by stage.
    needs_maps = args.at_weight or (args.sp_weight and args.relation != "cc")
    if needs_maps:
        s, t = student.stage_shapes, teacher.stage_shapes
        if not s or not t:
            raise common.UserError("no feature maps in this pair: use --relation cc --at-weight 0")
        if len(s) != len(t) and (args.at_weight or args.sp_maps == "all"):
            raise common.UserError(f"--at-weight, --sp-maps all: {len(s)} and {len(t)} stages")
        if 1 in (s[-1][-1], t[-1][-1]) and (args.at_weight or args.relation == "intra"):
            raise common.UserError("--at-weight, intra: a last map is 1x1; raise --image-size")

    # The teacher's weights: from a file, or trained first by this very function. Frozen from here.
    if args.teacher:
        teacher = common.load_teacher(teacher, args, data, distill)

    student = student.to(data.device, memory_format=torch.channels_last)
    optimizer = common.sgd_or_adamw(args, student.parameters())
    run.start(student=student, optimizer=optimizer, teacher=teacher)
    stages = slice(None) if args.sp_maps == "all" else slice(-1, None)  # for sp and intra

    for _ in run.epochs():
        student.train()
        for images, labels in run.batches():
            # Schedule, in epochs of the full recipe: a shorter run has the same shape.
            now = recipe["epochs"] * run.step // run.total_steps
            drops = sum(now >= milestone for milestone in recipe["milestones"])
            common.set_lr(optimizer, args.lr * recipe["factor"] ** drops, run)

            # Forward: both networks see the same augmented images.
            with common.autocast(args):
                logits, features = student(images, return_features=True)
                if args.sp_weight or args.kd_weight or args.at_weight:
                    teacher_logits, teacher_features = run.ask_teacher(images, needs_maps)

            # sp, cc, kd: of the whole batch, under torchrun too. all_gather returns float32.
            logits, labels = run.all_gather(logits, labels)

            # But for ce, a term of weight 0 is not computed: it stays 0.0 and is not logged.
            relation = kd = at = 0.0
            ce = F.cross_entropy(logits, labels)
            if args.sp_weight:
                pairs = zip(features.maps[stages], teacher_features.maps[stages])
                if args.relation == "sp":
                    relation = sum(sp_loss(*run.all_gather(s, t)) for s, t in pairs)
                elif args.relation == "cc":
                    pair = run.all_gather(features.embedding, teacher_features.embedding)
                    relation = cc_loss(*pair)
                elif args.relation == "intra":  # looks at one image at a time, as AT does
                    relation = sum(intra_loss(s.float(), t.float()) for s, t in pairs)
                    relation = run.mean_over_ranks(relation, len(images))
            if args.kd_weight:
                kd = kd_loss(logits, *run.all_gather(teacher_logits), args.temperature)
            if args.at_weight:
                pairs = zip(features.maps, teacher_features.maps)
                at = sum(at_loss(s.float(), t.float()) for s, t in pairs)
                at = run.mean_over_ranks(at, len(images))
            scale = len(labels) / args.sp_weight_batch if args.sp_weight_batch else 1.0
            loss = args.ce_weight * ce + args.sp_weight * scale * relation
            loss = loss + args.kd_weight * kd + args.at_weight * at

            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(optimizer)
            optimizer.step()
            run.log({"ce": ce, args.relation: relation, "kd": kd, "at": at}, labels, logits)
            features = teacher_features = pairs = None  # frees the maps before the next forward

        run.end_epoch(test_top1=common.evaluate(student, data, args))
    if args.plot:
        draw_similarities(args, data, teacher, student, run.dir / "similarities.png")
    return run.finish()


@torch.no_grad()
def draw_similarities(args, data, teacher, student, path) -> None:
    """G of 20 test images of each of ten classes, for teacher, CE-only baseline and student."""
    baseline = common.load_model(args.student, path.parent / "ce" / "student.pt").to(data.device)
    names = [args.teacher, f"{args.student}, CE", f"{args.student}, {args.method}"]
    images, labels = data.test_batch(per_class=20, classes=10)
    classes, starts = np.unique(labels.cpu(), return_index=True)
    outputs = [net.eval()(images, return_features=True)[1] for net in (teacher, baseline, student)]
    flat = [(f.maps[-1] if f.maps else f.embedding).flatten(1).float() for f in outputs]
    matrices = torch.stack([_gram(q) for q in flat]).cpu().numpy()
    figure, axes = common.pyplot().subplots(1, 3, figsize=(14, 4.6))
    for axis, name, q, matrix in zip(axes, names, flat, matrices):
        image = axis.imshow(matrix, vmin=0, vmax=np.quantile(matrices, 0.995))
        axis.set_title(f"{name}\nSP to the teacher: {sp_loss(q, flat[0]):.2e}")
        axis.set_xticks(starts, [data.classes[k] for k in classes], rotation=90)
    axes[0].set_ylabel(f"{len(labels)} test images, sorted by class")
    figure.colorbar(image, ax=axes, label="similarity of two images (entry of G)")
    common.save_figure(figure, path)


# fmt: off
RECIPES = {  # benchmark: CIFAR-100 as in RepDistiller; imagenet: others' choice, the paper has none
    "benchmark": dict(dataset="cifar100", teacher="resnet56", student="resnet20", epochs=240,
        batch_size=64, lr=0.05, small_lr=0.01, nesterov=False, weight_decay=5e-4,
        milestones=(150, 180, 210), factor=0.1),
    "paper": dict(dataset="cifar10", teacher="wrn_40_1", student="wrn_16_1", epochs=200, lr=0.1,
        batch_size=128, nesterov=True, weight_decay=5e-4, milestones=(60, 120, 160), factor=0.2),
    "imagenet": dict(dataset="imagenet", teacher="resnet34", student="resnet18", epochs=100, lr=0.1,
        batch_size=256, nesterov=False, weight_decay=1e-4, milestones=(30, 60, 90), factor=0.1),
}
RELATION_WEIGHTS = {"sp": 3000.0, "cc": 100.0, "intra": 1000.0}
# fmt: on


def parse_args(argv=None) -> argparse.Namespace:
    parser = common.Parser("sp", __doc__)
    weight = dict(type=common.weight, metavar="X")
    add = parser.add_argument_group("method").add_argument
    # fmt: off
    add("--relation", choices=tuple(RELATION_WEIGHTS), default="sp", help="sp: feature maps between"
        " images; cc: embeddings between images; intra: positions within an image (default: sp)")
    add("--sp-maps", choices=("last", "all"), default="last", help="stages used (default: last)")
    add("--ce-weight", **weight, default=1.0, help="weight of the cross-entropy (default: 1)")
    add("--sp-weight", **weight, help="weight of --relation (default: sp 3000, cc 100, intra 1000)")
    add("--sp-weight-batch", type=common.positive_int, metavar="N", help="multiply --sp-weight by"
        " (batch size) / N, since SP falls as 1 / (batch size) (default: off)")
    add("--kd-weight", **weight, default=0.0, help="weight of KD, usually 1 (default: 0)")
    add("--at-weight", **weight, default=0.0, help="weight of AT, usually 1000 (default: 0)")
    add("--temperature", type=common.positive, default=4.0, help="temperature of KD (default: 4)")
    add("--plot", action="store_true", help="draw similarities.png; trains a CE-only baseline too")
    add("--recipe", choices=tuple(RECIPES), help="what sets --dataset and the defaults below; paper"
        " is that of a replication (default: benchmark; with --dataset imagenet: imagenet)")
    # fmt: on
    common.add_recipe_arguments(parser, RECIPES)
    common.add_run_arguments(parser)
    parser.set_defaults(dataset=None)  # left to the recipe
    args = parser.parse_args(argv)

    args.recipe = args.recipe or ("imagenet" if args.dataset == "imagenet" else "benchmark")
    common.fill_recipe(args, RECIPES[args.recipe])
    if args.sp_weight is None:
        args.sp_weight = RELATION_WEIGHTS[args.relation]
    relation = {"sp": "SP", "cc": "CC", "intra": "intra"}[args.relation]
    terms = {relation: args.sp_weight, "KD": args.kd_weight, "AT": args.at_weight}
    args.method = "+".join(name for name in terms if terms[name]) or "CE"
    if not args.eval and not args.ce_weight and not args.kd_weight:
        raise common.UserError("--ce-weight 0: nothing else here trains the classifier")
    if args.sp_weight_batch and args.relation != "sp":
        raise common.UserError("--sp-weight-batch: only for --relation sp, which depends on it")
    if args.plot and args.method == "CE":
        raise common.UserError("--plot compares a method with CE: give a weight that is not 0")
    return args


def main(argv=None) -> dict | list[dict]:
    """What the shell calls: one run, or those of --seeds and --compare. Returns their results."""
    args = parse_args(argv)
    ce = dict(method="CE", ce_weight=1.0, sp_weight=0.0, kd_weight=0.0, at_weight=0.0, plot=False)
    kd = dict(ce, method="KD", kd_weight=1.0)
    if args.kd_weight:  # the KD baseline keeps the ce and kd weights that were given
        kd.update(ce_weight=args.ce_weight, kd_weight=args.kd_weight)
    return common.launch(distill, args, {"ce": ce, "kd": kd}, needed=("ce",) if args.plot else ())


if __name__ == "__main__":
    sys.exit(common.run_program(main))
