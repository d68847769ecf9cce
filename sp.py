"""SP: similarity-preserving knowledge distillation, and its neighbours CC, intra and AT.

The idea in one sentence: images that look alike to the teacher should look alike to the student,
whatever the features are that each of them uses.

    Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682.

For a batch of B images, Q is a network's last stage output [B,C,H,W], flattened to [B,CHW]:

    gram = Q Q^T  [B,B],   G = gram with every row divided by its L2 norm
    sp   = |G_T - G_S|_F^2 / B^2
    loss = ce_weight * ce + sp_weight * sp + kd_weight * kd + at_weight * at

Weights 1, 3000, 0, 0. kd is Hinton's, at temperature 4. Only the batch must be the same: channels
and sizes of the maps may differ, and nothing is trained beside the student. Multiplying all
features of the batch by one number, or rotating their space, changes nothing.

Why thousands: the rows of G are unit vectors, so |G_T - G_S|_F^2 is at most 2 B if no feature is
negative (else 4 B), and sp at most 2 / B; such rows also point much the same way, so that sp is far
smaller still. It falls as 1 / B: twice the batch halves its pull. 3000 is in use at 64 and at 128;
--sp-weight-batch 64 multiplies it by the size of each batch / 64, the last and smaller one too.

    python sp.py --teacher resnet56 --student resnet20      CIFAR-100, RepDistiller's recipe
    python sp.py --kd-weight 1 --compare --seeds 0 1 2      SP+KD, KD and CE, 3 seeds
    python sp.py --recipe paper --teacher wrn_16_8 --student wrn_40_2      CIFAR-10

Measured, top-1 % of the last epoch on CIFAR-100's test images, mean ± standard deviation over the
seeds 0, 1, 2; resnet56 (69.56 %, of all 50,000 images) -> resnet8, a small budget for a CPU: 10,000
training images, 15 epochs. It shows that the code works, not what the method gains in 240 epochs.

    CE      24.03 ± 0.14
    KD      32.03 ± 0.44
    SP      27.30 ± 0.40
    SP+KD   36.01 ± 0.24

To MobileNetV2 the same weight harms: CE 19.13, KD 24.48, SP 13.51, SP+KD 21.24 (README.md).
(--student resnet8 --teacher-ckpt FILE --train-size 10000 --epochs 15 --compare --seeds 0 1 2, the
last row with --kd-weight 1. KD is higher in nd.py, whose recipe has batches of 128, twice the
learning rate and a warm-up of KD.)

Differs from the paper and from other code:
 1. Rows are divided by their L2 norm, after the product. (torchdistill's rows are divided by their
    L1 norm.) A row of zeros stays zero instead of becoming 0/0.
 2. One pair of maps, the last stage outputs, as in RepDistiller, whose code one of the authors
    checked. --sp-maps all: all stage outputs, summed. In WRN and MobileNetV2 these come before any
    ReLU, so that they have negative entries.
 3. --recipe paper: 200 epochs of batch 128, Nesterov, lr 0.1, times 0.2 at 60, 120 and 160. It is
    that of an independent replication; it was not checked against the paper.
 4. The result is the last epoch, of each seed. The baseline KD is ce + kd; RepDistiller's KD rows
    are 0.1 ce + 0.9 kd.
 5. CC is taken of the embeddings; its paper learns a layer for it. Intra is ours. Their weights are
    ours too: terms of the size of SP's for a trained teacher and an untrained student
    (results/sizes.json).
 6. Under torchrun the similarities are those of the whole batch. --gather local: of each process's
    share of it, N times as few images for N processes, and so sp about N times as large.

Note: the method is covered by US patent 11636337B2; check before commercial use.
"""

import argparse
import sys

import numpy as np
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
    as_text,
    autocast,
    average_gradients,
    below_one,
    build_model,  # network(x, return_features=True) -> logits, (.embedding, .maps, .preact)
    compiled,  # torch.compile, under --compile
    evaluate,
    flag,
    gather,  # under torchrun: rows of all processes, with gradient
    get_teacher,  # loads it, or trains it first by calling main
    launch,  # --seeds and --compare: calls main once per run
    load_data,
    load_weights,
    mean_over_ranks,
    model_names,
    one_of,
    pick_device,
    positive,
    positive_int,
    probe,  # features of two test images in eval mode
    pyplot,
    run_program,
    save_figure,
    weight,
)

# --- copy from here ---------------------------------------------------------------------------
# Needs `import torch` and `import torch.nn.functional as F`. Every loss computes in float32 or
# better, also inside autocast (products in TF32 if your project allows that), and sends no gradient
# into the teacher.


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


def _same_batch(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"a batch of {len(student)} of the student, {len(teacher)} of the teacher")


def _scaled(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """x / max |x| along dims: products of tiny or huge features neither vanish nor overflow.

    For losses that such a factor does not change; so it has no gradient and is detached.
    """
    return x / x.detach().abs().amax(dims, keepdim=True).clamp_min(1e-30)


def _similarities(q: torch.Tensor) -> torch.Tensor:
    """Rows q_i, [...,N,F], to the matrix of dot products q_i.q_j with unit rows, [...,N,N]."""
    q = _scaled(q, (-2, -1))
    with torch.autocast(q.device.type, enabled=False):  # what differs is small: not in bfloat16
        gram = q @ q.mT  # [...,N,N]
    return _unit(_scaled(gram, (-1,)), dim=-1)


def sp_loss(student_map: torch.Tensor, teacher_map: torch.Tensor) -> torch.Tensor:
    """Similarity-preserving: |G_T - G_S|_F^2 / B^2, at most 2/B if no feature is negative.

    student_map, teacher_map [B,...]: same B, two or more; the rest may differ and is flattened.
    G: Gram matrix of the batch, rows divided by their L2 norms. Usual weight 3000 at B = 64: the
    value starts near 0.0015 (MobileNetV2: 0.004) and falls as 1/B. Under DDP gather the maps first:
    a process's 1/N of the batch makes it N times as large. Source: arXiv 1907.09682.
    """
    _same_batch(student_map, teacher_map)
    g_s = _similarities(_full(student_map).flatten(1))  # [B,B]
    g_t = _similarities(_full(teacher_map.detach()).flatten(1))
    return (g_t - g_s).square().mean()  # the mean divides by B^2


def cc_loss(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, gamma: float = 0.4, order: int = 2
) -> torch.Tensor:
    """Correlation congruence: |K_T - K_S|_F^2 / B^2 with K_ij near exp(-gamma |x_i - x_j|^2).

    [B,...], flattened; x_i the rows as unit vectors, so that |x_i - x_j|^2 = 2 - 2 x_i.x_j, and
    K_ij = exp(-2 gamma) times the Taylor series of exp(2 gamma x_i.x_j) up to `order`. A zero row
    is unlike all others. Weight 100 here: the value starts at 0.005 to 0.06, at any B. Source: Peng
    et al., ICCV 2019, arXiv 1904.01802.
    """
    _same_batch(student_emb, teacher_emb)

    def kernel(features):
        x = _unit(_scaled(_full(features).flatten(1), (1,)))  # [B,F]
        with torch.autocast(x.device.type, enabled=False):
            exponent = 2 * gamma * x @ x.T  # 2 gamma x_i.x_j  [B,B]
        term = total = torch.ones_like(exponent)
        for p in range(1, order + 1):
            term = term * exponent / p  # (2 gamma x_i.x_j)^p / p!
            total = total + term
        return total * total.new_tensor(-2 * gamma).exp()  # [B,B]

    return (kernel(teacher_emb.detach()) - kernel(student_emb)).square().mean()


def _same_size(student_map: torch.Tensor, teacher_map: torch.Tensor) -> list[torch.Tensor]:
    """Both [B,C,H,W] averaged down to the smaller height and width of the two."""
    if not student_map.dim() == teacher_map.dim() == 4:
        raise ValueError("maps must be [B,C,H,W]; tokens [B,N,C]: transpose, and split N into H, W")
    size = tuple(min(pair) for pair in zip(student_map.shape[-2:], teacher_map.shape[-2:]))
    both = _full(student_map), _full(teacher_map.detach())
    return [x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in both]


def intra_loss(student_map: torch.Tensor, teacher_map: torch.Tensor) -> torch.Tensor:
    """SP turned inside: the similarities between the places of one image instead of between images.

    [B,C,H,W], the larger map averaged down to the smaller: per image |G_T - G_S|_F^2 / (HW)^2,
    G from its HW vectors of C channels; mean over the batch. Weight 1000 here, for 8x8 maps, where
    the value starts near 0.005; it falls roughly as 1/HW (MobileNetV2, 2x2: 0.17). At 1x1 it is 0.
    Needs [B,HW,HW] memory. ValueError: maps of other than four dimensions.
    """
    _same_batch(student_map, teacher_map)
    s, t = (x.flatten(2).mT for x in _same_size(student_map, teacher_map))  # [B,HW,C]
    return (_similarities(t) - _similarities(s)).square().mean()


def at_loss(student_map: torch.Tensor, teacher_map: torch.Tensor) -> torch.Tensor:
    """Attention transfer: mean over batch and places of (A_S - A_T)^2.

    [B,C,H,W], the larger map averaged down to the smaller. A: the mean over channels of the squared
    activations, flattened, divided by its L2 norm. Usual weight 1000 for each map: the value is at
    most 2/HW, and starts between 3e-4 (32x32) and 1e-2 (8x8). At 1x1 it is 0. Source: Zagoruyko and
    Komodakis, ICLR 2017, arXiv 1612.03928; the squared difference of their code, where the paper
    writes a norm.
    """
    _same_batch(student_map, teacher_map)
    s, t = _same_size(student_map, teacher_map)

    def attention(x):
        return _unit(_scaled(x, (1, 2, 3)).square().mean(1).flatten(1))  # [B,HW]

    return (attention(s) - attention(t)).square().mean()


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


# --- to here ----------------------------------------------------------------------------------

RELATIONS = {"sp": (sp_loss, 3000.0), "cc": (cc_loss, 100.0), "intra": (intra_loss, 1000.0)}

RECIPES = {
    # The CIFAR-100 benchmark of the field. lr 0.01 for MobileNet and ShuffleNet.
    "benchmark": dict(dataset="cifar100", teacher="resnet56", student="resnet20", epochs=240)
    | dict(batch_size=64, lr=0.05, nesterov=False, drops=(150, 180, 210), factor=0.1),
    "paper": dict(dataset="cifar10", teacher="wrn_40_1", student="wrn_16_1", epochs=200)
    | dict(batch_size=128, lr=0.1, nesterov=True, drops=(60, 120, 160), factor=0.2),
    # That of others who tried SP there; the paper has no ImageNet. Chosen by --dataset imagenet.
    "imagenet": dict(dataset="imagenet", teacher="resnet34", student="resnet18", epochs=100)
    | dict(batch_size=256, lr=0.1, nesterov=False, drops=(30, 60, 90), factor=0.1)
    | dict(weight_decay=1e-4),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    network = one_of("model", model_names())

    add = parser.add_argument_group("method").add_argument
    add("--teacher", type=network, metavar="NAME", help="(resnet56; paper: wrn_40_1)")
    add("--student", type=network, metavar="NAME", help="(resnet20; paper: wrn_16_1)")
    add("--relation", choices=tuple(RELATIONS), default="sp", help="sp; cc: correlation congruence,"
        " of embeddings; intra: between the places of one image (sp)")  # fmt: skip
    add("--sp-maps", choices=("last", "all"), default="last", help="stage ends compared (last)")
    add("--ce-weight", type=weight, default=1.0, metavar="X", help="of the cross-entropy (1)")
    add("--sp-weight", type=weight, metavar="X", help="of the relation (3000; cc 100, intra 1000)")
    add("--sp-weight-batch", type=positive_int, metavar="N", help="the weight is meant for"
        " batches of N, such as 64: multiply it by the batch's size / N (off)")  # fmt: skip
    add("--kd-weight", type=weight, default=0.0, metavar="X", help="of KD (0; usual: 1)")
    add("--at-weight", type=weight, default=0.0, metavar="X", help="of AT (0; usual: 1000)")
    add("--temperature", type=positive, default=4.0, metavar="T", help="of KD (4)")

    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=tuple(RECIPES), help="sets --dataset, --teacher, --student, --epochs,"
        " --batch-size, --lr, drops and --nesterov (benchmark, or imagenet)")  # fmt: skip
    add("--epochs", type=positive_int, metavar="N", help="drops scale along (240; paper: 200)")
    add("--teacher-epochs", type=positive_int, metavar="N", help="if it must be trained (--epochs)")
    add("--batch-size", type=positive_int, metavar="N", help="(64; paper: 128)")
    add("--teacher-lr", type=positive, metavar="X", help="of a teacher trained here (the same"
        " defaults; --lr does not change it)")  # fmt: skip
    add("--lr", type=positive, metavar="X", help="(0.05; MobileNet, ShuffleNet 0.01; paper: 0.1)")
    add("--momentum", type=below_one, default=0.9, metavar="X", help="(0.9)")
    add("--nesterov", action=YesNo, help="Nesterov's form of it (no; paper: yes)")
    add("--weight-decay", type=weight, metavar="X", help="(0.0005; imagenet: 0.0001)")
    add("--pretrained", action=YesNo, default=False, help="start from ImageNet weights (no)")

    add_run_arguments(parser)
    parser.set_defaults(dataset=None)  # the recipe's
    add("--plot", action="store_true", help="draw the similarities of teacher, plain student (CE"
        " is trained too) and this student: similarities.png")  # fmt: skip
    args = parser.parse_args(argv)
    args.script = "sp"
    args.recipe = args.recipe or ("imagenet" if args.dataset == "imagenet" else "benchmark")
    for name, value in ({"weight_decay": 5e-4} | RECIPES[args.recipe]).items():
        if name != "lr" and getattr(args, name, 0) is None:
            setattr(args, name, value)
    args.lr = args.lr or default_lr(args.student, args.recipe)
    args.teacher_lr = args.teacher_lr or default_lr(args.teacher, args.recipe)
    args.teacher_epochs = args.teacher_epochs or args.epochs
    args.nesterov = args.nesterov and args.momentum > 0
    if args.sp_weight is None:
        args.sp_weight = RELATIONS[args.relation][1]
    if not args.sp_weight:
        for name in ("relation", "sp_maps", "sp_weight_batch"):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"{flag(name)}: has no use with --sp-weight 0; leave it out")
    if args.sp_weight_batch and args.relation != "sp":
        raise UserError(
            f"--sp-weight-batch: {args.relation} does not fall with the batch; leave it out"
        )
    if args.sp_maps == "all" and args.relation == "cc":
        raise UserError("--sp-maps: cc compares embeddings, not maps; leave it out")
    if args.batch_size < 2:
        raise UserError("--batch-size 1: a relation needs two images or more")
    if not args.eval and not args.ce_weight and not args.kd_weight:
        raise UserError("--ce-weight 0: nothing else here trains the classifier")
    args.method = method_name(args)
    args.plot = ("similarities.png",) if args.plot else ()
    if args.plot:
        pyplot()  # fail now, not after the training
        if args.method == "CE":
            raise UserError("--plot compares with the plain student: give it a method's weight")
    return args


def default_lr(name: str, recipe: str) -> float:
    if recipe == "benchmark" and name.lower().startswith(("mobile", "shuffle")):
        return 0.01
    return RECIPES[recipe]["lr"]


def method_name(args) -> str:
    relation = {"sp": "SP", "cc": "CC", "intra": "intra"}[args.relation]
    weights = {relation: args.sp_weight, "KD": args.kd_weight, "AT": args.at_weight}
    return "+".join(name for name, value in weights.items() if value) or "CE"


def relation_inputs(features, args) -> list[torch.Tensor]:
    """What the relation is taken of: the embedding for cc, as published, else maps."""
    if args.relation == "cc":
        return [features.embedding]
    return features.maps if args.sp_maps == "all" else features.maps[-1:]


def check_maps(args, student_sees, teacher_sees) -> None:
    """UserError: a network lacks the maps that the losses need."""
    counts = {args.student: len(student_sees.maps), args.teacher: len(teacher_sees.maps)}
    by_map = (args.sp_weight and args.relation != "cc") or args.at_weight
    for name, count in counts.items():
        if by_map and not count:
            raise UserError(
                f"{name} gives no maps, only an embedding: use --relation cc and --at-weight 0, or"
                " another network"
            )
    size = min(seen.maps[-1].shape[-1] for seen in (student_sees, teacher_sees)) if by_map else 0
    if size == 1 and (args.relation == "intra" or args.at_weight):
        raise UserError(
            "--relation intra and --at-weight compare places, but a last map here has only one: use"
            " a larger --image-size or another network"
        )
    every = "--at-weight" if args.at_weight else args.sp_maps == "all" and "--sp-maps all"
    if by_map and every and len(set(counts.values())) > 1:
        stages = " and ".join(f"{name} has {count}" for name, count in counts.items())
        raise UserError(f"{every} compares stage by stage, but {stages} stages; choose a like pair")


@torch.no_grad()
def draw_similarities(args, data, teacher, student, path) -> None:
    """The matrices G of 20 test images of each of ten classes: teacher, plain student, student."""
    plain = build_model(args.student, data.num_classes)
    load_weights(plain, path.parent / "ce" / "student.pt")
    plain = plain.to(data.device, memory_format=torch.channels_last)
    images, labels = data.test_batch(per_class=20, classes=10)
    networks = {args.teacher: teacher.net, f"{args.student}, CE": plain}
    networks[f"{args.student}, {args.method}"] = student
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4.6))
    outputs = [network.eval()(images, return_features=True)[1] for network in networks.values()]
    flat = [(f.maps[-1] if f.maps else f.embedding).flatten(1).float() for f in outputs]
    matrices = torch.stack([_similarities(q) for q in flat]).cpu().numpy()
    starts = [(labels == k).nonzero()[0].item() for k in labels.unique()]  # of each class
    names = [as_text(data.classes[k]) for k in labels.unique().tolist()]
    for axis, name, q, matrix in zip(axes, networks, flat, matrices):
        image = axis.imshow(matrix, vmin=0, vmax=np.quantile(matrices, 0.995))
        value = "teacher" if q is flat[0] else f"sp {sp_loss(q, flat[0]):.2e} to the teacher"
        axis.set(title=f"{name}\n{value}", xticks=starts, yticks=starts, yticklabels=[])
        axis.set_xticklabels(names, rotation=90)
    axes[0].set(ylabel=f"{len(labels)} test images, sorted by class", yticklabels=names)
    figure.colorbar(image, ax=axes, label="similarity of two images (entry of G)")
    save_figure(figure, path)


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

    recipe = RECIPES[args.recipe]
    if args.teacher:
        relation_loss = RELATIONS[args.relation][0]
        check_maps(args, student_sees, teacher_sees)

    # [alike: teacher]
    # Loaded, or trained first by this very function; in eval mode and frozen from here on.
    teacher = get_teacher(args, data, main) if args.teacher else None
    # [end]

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
            # Schedule, in epochs of the recipe's full length, whatever the run's: `now` is this
            # step on that scale. Three drops, of the recipe's factor each.
            now = recipe["epochs"] * (epoch * steps + step) // (args.epochs * steps)
            lr = args.lr * recipe["factor"] ** sum(now >= drop for drop in recipe["drops"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward: both networks see the same augmented images.
            with autocast(args, device):
                logits, features = run_student(images, return_features=True)
                if args.sp_weight or args.kd_weight or args.at_weight:
                    with torch.no_grad():
                        teacher_logits, teacher_features = run_teacher(images, return_features=True)

            # Under torchrun, what is compared between images is gathered from all processes.
            logits, labels = gather(args, logits, labels)

            # Losses, outside autocast and in float32. A term of weight 0 is not computed.
            relation = kd = at = 0.0
            ce = F.cross_entropy(logits.float(), labels)
            if args.sp_weight:
                pairs = relation_inputs(features, args), relation_inputs(teacher_features, args)
                relation = sum(relation_loss(*gather(args, s, t)) for s, t in zip(*pairs))
            if args.kd_weight:
                [teacher_logits] = gather(args, teacher_logits)
                kd = kd_loss(logits, teacher_logits, args.temperature)
            if args.at_weight:
                at = sum(at_loss(s, t) for s, t in zip(features.maps, teacher_features.maps))
                at = mean_over_ranks(args, at, len(images))  # it looks at one image at a time
            scale = len(labels) / args.sp_weight_batch if args.sp_weight_batch else 1.0
            loss = args.ce_weight * ce + args.sp_weight * scale * relation
            loss = loss + args.kd_weight * kd + args.at_weight * at
            terms = {"ce": ce, args.relation: relation, "kd": kd, "at": at}

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

    if args.plot:
        draw_similarities(args, data, teacher, student, run.dir / args.plot[0])
    return run.finish(student, data, teacher)


def program(argv=None) -> None:
    args = parse_args(argv)
    ce = dict(method="CE", ce_weight=1.0, sp_weight=0.0, kd_weight=0.0, at_weight=0.0, plot=())
    kd = ce | dict(method="KD", kd_weight=args.kd_weight or 1.0)
    if args.kd_weight:  # the very terms that stand beside the relation
        kd["ce_weight"] = args.ce_weight
    launch(main, args, {"ce": ce, "kd": kd}, needed=("ce",) if args.plot else ())


if __name__ == "__main__":
    sys.exit(run_program(program))
