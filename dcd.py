"""DCD: discriminative and consistent representation distillation.

The idea in one sentence: in a small common space, the student's embedding of an image must pick out
the teacher's embedding of that image among those of the batch, and what student i sees of the
teacher's images must agree with what teacher i sees of the student's.

    Giakoumoglou, Stathaki: Discriminative and Consistent Representation Distillation,
    arXiv 2407.11802 (earlier: Invariant Consistency / Invariant Causal KD, ICD).

Embeddings are the pooled vectors that the classifiers see. Two heads, linear with bias, one for
each network, map them to 128 dimensions; both are trained along and thrown away. For a batch of B
images, s_i = student_head(student_emb[i]) and t_j = teacher_head(teacher_emb[j]):

    similarity_ij = scale * cos(s_i, t_j)        scale = min(exp(tau), 10), a factor: tau is its
                                                 log, trained from 1, and no temperature
    P_i = softmax over j of similarity_ij        student i's view of the teacher's images
    Q_i = softmax over j of similarity_ji        teacher i's view of the student's images
    contrastive = mean_i -log P_ii               InfoNCE: B - 1 negatives, all from the batch
    consistency = mean_i KL(Q_i || P_i)          0 if and only if similarity is symmetric
    dcd  = contrastive + 0.5 * consistency
    loss = ce_weight * ce + dcd_weight * dcd + kd_weight * kd

Weights 1, 1 and 0; DCD+KD: 1, 1 and 1. Gradient flows through both P and Q. kd is Hinton's, at
temperature 4.

    python dcd.py --teacher resnet56 --student resnet20     CIFAR-100, RepDistiller's recipe
    python dcd.py --kd-weight 1 --compare --seeds 0 1 2     DCD+KD, KD and CE, 3 seeds
    python dcd.py --transfer stl10 --student-ckpt student.pt --teacher-ckpt resnet56.pth
                                                            linear probes on other images

Measured, top-1 % of the last epoch on CIFAR-100's test images, mean ± standard deviation over the
seeds 0, 1, 2; resnet56 (69.56 %, of all 50,000 images) -> resnet8, a small budget for a CPU: 10,000
training images, 15 epochs. It shows that the code works, not what the method gains in 240 epochs.

    CE      24.03 ± 0.14
    KD      32.03 ± 0.44
    DCD     31.44 ± 0.51
    DCD+KD  34.79 ± 0.52

To MobileNetV2: CE 19.13, KD 24.48, DCD 23.49, DCD+KD 26.48 (README.md).
(--student resnet8 --teacher-ckpt FILE --train-size 10000 --epochs 15 --compare --seeds 0 1 2, the
last row with --kd-weight 1. KD is higher in nd.py, whose recipe has batches of 128, twice the
learning rate and a warm-up of KD.)

Differs from the paper and its code:
 1. No offset on the similarities. The paper adds a trained scalar b to each and credits it, with
    the temperature, with balancing the terms; a constant cancels in every softmax, so the gradient
    of b is zero and it stays where it starts, at 0.
 2. Heads and tau are in the optimizer, with weight decay, on every data set. The published ImageNet
    code never trains tau.
 3. --fixed-scale 0.07 divides the cosines by that temperature, a scale of 14.3. The published
    switch multiplies by 0.07, which flattens every softmax.
 4. The baseline KD is ce + kd; RepDistiller's KD rows are 0.1 ce + 0.9 kd. The last, smaller batch
    of an epoch is used (unless it is one image); the paper's loader drops it.
 5. Transfer keeps the frozen network in eval mode. --transfer-bn batch: in train mode, as in the
    paper's code, where BatchNorm goes on adapting to the new images.
 6. --plot shows embeddings by their principal components; the paper has t-SNE of the logits.
 7. Under torchrun the negatives come from the whole batch. --gather local, as in the published
    ImageNet code: from each process's share, so fewer and an easier task.

The clamp of the scale is hard, as published: once exp(tau) > 10, tau has no gradient; momentum,
then weight decay alone move it. Both are logged: expect the scale to sit at 10.
"""

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import (  # nothing in there knows about distillation
    STATS,  # the data sets
    Meter,  # sums of the loss terms, progress line, stop at nan
    Parser,
    Run,  # the run's folder: resume, metrics.jsonl, result.json, student.pt
    Teacher,  # (net, top1, hash)
    UserError,  # ends the program with one line and status 2
    YesNo,  # --flag and --no-flag
    add_run_arguments,
    as_text,
    at_most,
    autocast,
    average_gradients,
    below_one,
    build_model,  # network(x, return_features=True) -> logits, (.embedding, .maps, .preact)
    compiled,  # torch.compile, under --compile
    evaluate,
    file_path,
    fill_image_size,
    flag,
    gather,  # under torchrun: rows of all processes, with gradient
    get_teacher,  # loads it, or trains it first by calling main
    launch,  # --seeds and --compare: calls main once per run
    load_data,
    load_model,  # a checkpoint's network, with as many classes as that has
    model_names,
    new_classifier,
    one_of,
    pick_device,
    positive,
    positive_int,
    probe,  # features of two test images in eval mode
    pyplot,
    run_program,
    save_figure,
    state_hash,
    weight,
)

# --- copy from here ---------------------------------------------------------------------------
# Needs `import torch` and `import torch.nn.functional as F`. Losses compute in float32 or better,
# also inside autocast. DCDLoss and kd_loss send no gradient into the teacher; the teacher_head is
# DCDLoss's, not the teacher's, and is trained.


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


def contrastive_loss(similarity: torch.Tensor) -> torch.Tensor:
    """InfoNCE over the rows: mean of -log softmax_j(similarity_ij) at j = i.

    similarity [B,B], finite: a row for each image as the student sees it, a column as the teacher
    does. log B if all entries are equal.
    """
    return -F.log_softmax(_full(similarity), 1).diagonal().mean()


def consistency_loss(similarity: torch.Tensor) -> torch.Tensor:
    """Mean of KL(Q_i || P_i): do rows and columns of similarity [B,B] give the same view?

    P: softmax of the rows. Q: softmax of the columns, transposed. Gradient flows through both. 0 if
    and only if similarity is symmetric, so also where all entries are equal: no loss to use alone.
    """
    similarity = _full(similarity)
    log_p, log_q = F.log_softmax(similarity, 1), F.log_softmax(similarity.T, 1)  # [B,B]
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class DCDLoss(torch.nn.Module):
    """DCD: contrastive + alpha consistency, on two trained linear heads.

    student_dim, teacher_dim: widths of the embeddings. embed_dim: width of the common space.
    init_tau, max_scale: similarity = min(exp(tau), max_scale) * cosine, tau trained. Give all of
    its parameters to the optimizer. temperature: cosine / temperature in the place of the trained
    scale. terms: "both", or "contrastive" or "consistency" alone, the latter without alpha.
    forward: student_emb [B,student_dim], teacher_emb [B,teacher_dim] -> scalar, mean over the
    batch; B >= 2, for a single image it is 0. Usual weight 1: it starts near log B, as CE starts
    near log K. Under DDP wrap this module too, or its copies drift apart, and gather the embeddings
    first, with gradient, or the negatives are one process's. ValueError: inputs that are not [B,D]
    with one B, unknown terms. Source: arXiv 2407.11802.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        embed_dim: int = 128,
        alpha: float = 0.5,
        init_tau: float = 1.0,
        max_scale: float = 10.0,
        temperature: float | None = None,
        terms: str = "both",
    ):
        super().__init__()
        self.student_head = torch.nn.Linear(student_dim, embed_dim)
        self.teacher_head = torch.nn.Linear(teacher_dim, embed_dim)
        trained = temperature is None
        self.tau = torch.nn.Parameter(torch.tensor(float(init_tau)), requires_grad=trained)
        self.max_tau = float(torch.tensor(max_scale, dtype=torch.float64, device="cpu").log())
        self.alpha, self.temperature, self.terms = alpha, temperature, terms
        if terms not in ("both", "contrastive", "consistency"):
            raise ValueError(f"DCDLoss: terms={terms!r}; choose both, contrastive or consistency")

    def scale(self) -> torch.Tensor:
        """What multiplies the cosines: min(exp(tau), max_scale), or 1 / temperature."""
        if self.temperature is not None:
            return torch.full_like(self.tau, 1 / self.temperature)
        # The minimum is taken before exp, so that a huge tau gives no inf times 0 in the gradient.
        return self.tau.clamp(max=self.max_tau).exp()

    def similarity(self, student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
        """scale * cos(s_i, t_j), [B,B]: row i as the student sees image i, column j the teacher."""
        shapes = list(student_emb.shape), list(teacher_emb.shape)
        if not len(shapes[0]) == len(shapes[1]) == 2 or shapes[0][0] != shapes[1][0]:
            raise ValueError(f"DCDLoss: needs [B,D] of both, not {shapes[0]} and {shapes[1]}")
        dtype = self.student_head.weight.dtype  # float32, unless the whole module was cast
        with torch.autocast(student_emb.device.type, enabled=False):
            s = _unit(_full(self.student_head(student_emb.to(dtype))))  # [B,embed_dim]
            # A copy, since the head cannot be trained on what was made under inference_mode.
            t = _unit(_full(self.teacher_head(teacher_emb.detach().clone().to(dtype))))
            return _full(self.scale()) * s @ t.T

    def forward(self, student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
        similarity = self.similarity(student_emb, teacher_emb)
        if self.terms == "contrastive":
            return contrastive_loss(similarity)
        if self.terms == "consistency":
            return consistency_loss(similarity)
        return contrastive_loss(similarity) + self.alpha * consistency_loss(similarity)


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


# By data set. CIFAR: the field's benchmark, which is the paper's; ImageNet: the paper's code.
RECIPES = {
    "cifar": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=64, lr=0.05)
    | dict(weight_decay=5e-4, drops=(150, 180, 210)),
    "imagenet": dict(teacher="resnet34", student="resnet18", epochs=120, batch_size=256, lr=0.1)
    | dict(weight_decay=1e-4, drops=(30, 60, 90)),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    network = one_of("model", model_names())

    add = parser.add_argument_group("method").add_argument
    add("--teacher", type=network, metavar="NAME", help="(resnet56; ImageNet: resnet34)")
    add("--student", type=network, metavar="NAME", help="(resnet20; ImageNet: resnet18)")
    add("--ce-weight", type=weight, default=1.0, metavar="X", help="of the cross-entropy (1)")
    add("--dcd-weight", type=weight, default=1.0, metavar="X", help="of DCD (1)")
    add("--kd-weight", type=weight, default=0.0, metavar="X", help="of KD (0; DCD+KD: 1)")
    add("--temperature", type=positive, default=4.0, metavar="T", help="of KD (4)")
    add("--terms", choices=("both", "contrastive", "consistency"), default="both", help="of DCD")
    add("--alpha", type=weight, default=0.5, metavar="X", help="of the consistency in it (0.5)")
    add("--embed-dim", type=at_most(65536, least=1), default=128, metavar="N", help="width of the"
        " heads (128)")  # fmt: skip
    add("--fixed-scale", type=positive, metavar="X", help="divide the cosines by the temperature X,"
        " such as 0.07, in place of the trained scale")  # fmt: skip
    add("--plot", action="store_true", help="draw class relations against the teacher's"
        " (correlation_gap.png; its mean goes into result.json) and embeddings.png")  # fmt: skip

    add = parser.add_argument_group("recipe (in brackets: CIFAR and transfer; ImageNet)")
    add = add.add_argument
    add("--epochs", type=positive_int, metavar="N", help="drops scale along (240; 120; transfer"
        " 120)")  # fmt: skip
    add("--teacher-epochs", type=positive_int, metavar="N", help="if it must be trained (--epochs)")
    add("--batch-size", type=positive_int, metavar="N", help="(64; 256)")
    add("--teacher-lr", type=positive, metavar="X", help="of a teacher trained here (the same"
        " defaults; --lr does not change it)")  # fmt: skip
    add("--lr", type=positive, metavar="X", help="(0.05, MobileNet, ShuffleNet 0.01; 0.1)")
    add("--momentum", type=below_one, default=0.9, metavar="X", help="(0.9)")
    add("--nesterov", action=YesNo, default=False, help="Nesterov's form of it (no)")
    add("--weight-decay", type=weight, metavar="X", help="(0.0005; 0.0001)")
    add("--pretrained", action=YesNo, default=False, help="start from ImageNet weights (no)")

    datasets = one_of("data set", list(STATS))
    add = parser.add_argument_group("transfer").add_argument
    add("--transfer", type=datasets, metavar="NAME", help="instead of distilling: train a linear"
        " classifier for this data set on the frozen student and the frozen teacher")  # fmt: skip
    add("--student-ckpt", type=file_path, metavar="FILE", help="the student, such as a run's"
        " student.pt; its result.json, if there, gives --student, --teacher, --dataset and"
        " --image-size")  # fmt: skip
    add("--transfer-bn", choices=("eval", "batch"), default="eval", help="mode of the frozen"
        " networks; batch: train mode, BatchNorm adapts, dropout is on (eval)")  # fmt: skip

    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.script = "dcd"
    if args.batch_size == 1:
        raise UserError("--batch-size 1: a relation and BatchNorm need two images or more")
    if args.transfer or args.student_ckpt:
        prepare_transfer(args, parser.get_default)
    for name, value in recipe_of(args).items():
        if name != "lr" and getattr(args, name, 0) is None:
            setattr(args, name, value)
    args.lr = args.lr or default_lr(args.student, args)
    args.teacher_lr = args.teacher_lr or default_lr(args.teacher, args)
    args.teacher_epochs = args.teacher_epochs or args.epochs
    args.nesterov = args.nesterov and args.momentum > 0
    if args.transfer:
        args.teacher = args.teacher if args.teacher_ckpt else None
        return args
    if args.transfer_bn != "eval":
        raise UserError("--transfer-bn: only for --transfer NAME")
    for name in ("terms", "alpha", "embed_dim", "fixed_scale"):
        if not args.dcd_weight and getattr(args, name) != parser.get_default(name):
            raise UserError(f"{flag(name)}: has no use with --dcd-weight 0; leave it out")
    if not args.eval and not args.ce_weight and not args.kd_weight:
        raise UserError("--ce-weight 0: nothing else here trains the classifier")
    if args.alpha != 0.5 and args.terms != "both":
        raise UserError(f"--alpha: --terms {args.terms} has no second term to weigh; leave it out")
    args.method = method_name(args)
    args.plot = ("correlation_gap.png", "embeddings.png") if args.plot else ()
    if args.plot:
        pyplot()  # fail now, not after the training
    return args


def method_name(args) -> str:
    dcd = "DCD" if args.terms == "both" else f"DCD {args.terms}"
    dcd += " fixed scale" if args.fixed_scale else ""
    return "+".join([dcd] * bool(args.dcd_weight) + ["KD"] * bool(args.kd_weight)) or "CE"


def prepare_transfer(args, default) -> None:
    """--dataset is what the networks were trained on; from here on it is the data of the probes."""
    if not args.transfer:
        raise UserError("--student-ckpt: only for --transfer NAME, which names the new data")
    useless = ["compare", "plot", "eval", "pretrained_teacher", "pretrained", "compile", "terms"]
    useless += ["ce_weight", "dcd_weight", "kd_weight", "temperature", "alpha", "embed_dim"]
    for name in (*useless, "fixed_scale", "teacher_epochs", "gather"):
        if getattr(args, name) != default(name):
            raise UserError(f"--transfer: leave {flag(name)} out, it has no use here")
    if not args.student_ckpt:
        raise UserError("--transfer: name the student, --student-ckpt FILE, as a run's student.pt")
    student = Path(args.student_ckpt)
    label, learned = student.stem, {}
    if student.name == "student.pt" and student.parent.name:
        folder = student.parent  # a run's; below it those of its seeds and baselines
        label = folder.name
        while re.fullmatch(r"ce|kd|s\d+", folder.name) and folder.parent.name:
            folder = folder.parent
            label = f"{folder.name}-{label}"
        with contextlib.suppress(OSError, ValueError, TypeError):
            learned = dict(json.loads((student.parent / "result.json").read_text()))
    defaults = RECIPES["imagenet" if args.dataset == "imagenet" else "cifar"]
    for name in ("student", "teacher"):
        if getattr(args, name) is None:
            known = learned.get(name) in model_names()
            setattr(args, name, learned[name] if known else defaults[name])
    if str(learned.get("dataset")) in STATS:
        args.dataset = learned["dataset"]
    with contextlib.suppress(LookupError, TypeError):
        args.image_size = args.image_size or int(learned["args"]["image_size"])
    trained = Path(f"checkpoints/{args.dataset}_{args.teacher}.pt")
    if not args.teacher_ckpt and trained.exists():
        args.teacher_ckpt = str(trained)
    if not args.teacher_ckpt:
        print(f"note: no {trained}, no --teacher-ckpt: the student alone", file=sys.stderr)
    args.epochs = args.epochs or 120
    fill_image_size(args)  # of the images that the networks know
    args.source, args.dataset = args.dataset, args.transfer
    batch = args.transfer_bn == "batch"
    args.method = f"probe of {learned.get('method', student.stem)}" + " (batch)" * batch
    place = f"runs/dcd-transfer-{args.dataset}-of-{label}" + "-batch" * batch
    args.out = args.out or (place if args.seeds else f"{place}-s{args.seed}")


def recipe_of(args) -> dict:
    return RECIPES["imagenet" if args.dataset == "imagenet" and not args.transfer else "cifar"]


def default_lr(name: str, args) -> float:
    recipe = recipe_of(args)
    small = recipe is RECIPES["cifar"] and name.lower().startswith(("mobile", "shuffle"))
    return 0.01 if small else recipe["lr"]


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
    if args.teacher and args.dcd_weight:
        widths = student_sees.embedding.shape[1], teacher_sees.embedding.shape[1]
        options = dict(alpha=args.alpha, temperature=args.fixed_scale, terms=args.terms)
        helpers["dcd"] = DCDLoss(*widths, args.embed_dim, **options)

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
            # step on that scale. Three drops, to a tenth each.
            now = recipe["epochs"] * (epoch * steps + step) // (args.epochs * steps)
            lr = args.lr / 10 ** sum(now >= drop for drop in recipe["drops"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward: both networks see the same augmented images.
            with autocast(args, device):
                logits, features = run_student(images, return_features=True)
                if args.dcd_weight or args.kd_weight:
                    with torch.no_grad():
                        teacher_logits, teacher_features = run_teacher(images, return_features=True)

            # Under torchrun, what is compared between images is gathered from all processes.
            logits, embedding, labels = gather(args, logits, features.embedding, labels)
            if args.dcd_weight or args.kd_weight:
                teacher_emb = teacher_features.embedding
                teacher_logits, teacher_emb = gather(args, teacher_logits, teacher_emb)

            # Losses, outside autocast and in float32. A term of weight 0 is not computed.
            dcd = kd = scale = tau = 0.0
            ce = F.cross_entropy(logits.float(), labels)
            if args.dcd_weight:
                dcd = helpers["dcd"](embedding, teacher_emb)
                scale = helpers["dcd"].scale().detach()  # no losses, but worth watching
                tau = helpers["dcd"].tau.detach()
            if args.kd_weight:
                kd = kd_loss(logits, teacher_logits, args.temperature)
            loss = args.ce_weight * ce + args.dcd_weight * dcd + args.kd_weight * kd
            terms = {"ce": ce, "dcd": dcd, "kd": kd, "scale": scale, "tau": tau}

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

    more = {}
    if args.plot:
        pictures = [run.dir / name for name in args.plot]
        more["correlation_gap"] = draw_correlation_gap(student, teacher.net, data, pictures[0])
        draw_embeddings(student, teacher.net, data, pictures[1])
    return run.finish(student, data, teacher, **more)


@torch.no_grad()
def class_relations(network, data) -> torch.Tensor:
    """[K,K]: the mean over the test images of each class of their standardised logits."""
    sums = torch.zeros(data.num_classes, data.num_classes, device=data.device)
    network.eval()
    for images, labels in data.batches("test", 500):
        logits = network(images)
        centred = logits - logits.mean(1, keepdim=True)
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        sums.index_add_(0, labels, centred / deviation.clamp_min(1e-7))
    return sums / data.test.labels.bincount(minlength=data.num_classes)[:, None]


def draw_correlation_gap(student, teacher, data, path) -> float:
    """The paper's map: |student - teacher| of the class relations, diagonal 0. -> Its mean, over
    all entries. What the paper calls a correlation is a mean of standardised logits."""
    gap = (class_relations(student, data) - class_relations(teacher, data)).abs()
    gap.fill_diagonal_(0)
    seen = gap[data.test.labels.unique()]  # a class without test images has none (--val-size)
    figure, axis = pyplot().subplots(figsize=(6, 5))
    figure.colorbar(axis.imshow(gap.cpu().numpy(), cmap="Blues", vmin=0, vmax=3))
    axis.set(xlabel="logit of class", ylabel="true class")
    axis.set_title(f"class relations, |student - teacher|: mean {seen.mean():.3f}")
    save_figure(figure, path)
    print(f"correlation gap to the teacher: mean {seen.mean():.4f}, highest {seen.max():.4f}")
    return round(seen.mean().item(), 5)


@torch.no_grad()
def draw_embeddings(student, teacher, data, path) -> None:
    """Test images of ten classes in the plane of the two largest principal components."""
    images, labels = data.test_batch(per_class=100, classes=10)
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 5))
    for axis, (name, network) in zip(axes, {"teacher": teacher, "student": student}.items()):
        x = torch.cat([network.eval()(part, return_features=True)[1].embedding
                       for part in images.split(250)])  # fmt: skip
        x = x - x.mean(0)
        plane = torch.linalg.svd(x, full_matrices=False)[2][:2]  # [2,D]
        x = (x @ plane.T).cpu().numpy()
        for k in labels.unique().tolist():
            mine = x[(labels == k).cpu().numpy()]
            axis.scatter(mine[:, 0], mine[:, 1], s=6, label=as_text(data.classes[k]))
        axis.set(title=f"{name}: embeddings, two principal components", xticks=[], yticks=[])
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def transfer(args) -> dict:
    """Linear probes for the images of args.dataset: a new classifier on the frozen student and one
    on the frozen teacher, trained side by side. Schedule of the paper's code.
    With --seeds the spread is that of the probes: it is one student that they look at."""
    run = Run(args)
    if run.done:
        return run.done
    device = pick_device(args.device)
    data = load_data(args, device)

    # Networks as they were trained, each with a new classifier; nothing else of them is trained.
    networks = nn.ModuleDict({"student": load_model(args.student, args.student_ckpt)})
    if args.teacher_ckpt:
        networks["teacher"] = load_model(args.teacher, args.teacher_ckpt)
    hashes = {name: state_hash(network) for name, network in networks.items()}
    heads = []
    for network in networks.values():
        probe(network, data)  # does it take images of this size?
        network.requires_grad_(False)
        torch.manual_seed(args.seed)
        head = new_classifier(network, data.num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        heads.append(head)

    # SGD, a group for each classifier: they share nothing but the batches.
    networks = networks.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [{"params": head.parameters()} for head in heads],
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.nesterov,
        weight_decay=args.weight_decay,
    )
    state = {"networks": networks, "optimizer": optimizer}
    state |= {"data": data.fingerprint, "student or teacher": hashes}
    steps, first_epoch = data.steps(args.batch_size), run.restore(**state)
    if not run.history and not run.step:  # every process of torchrun draws the same dropout
        torch.manual_seed(args.seed)
    for epoch in range(first_epoch, args.epochs):
        meter = Meter(args, epoch, len(data.train.labels))
        networks.train(args.transfer_bn == "batch")
        shuffle = args.seed * 100_003 + epoch
        batches = data.batches("train", args.batch_size, shuffle, augment=True, first=run.step)
        for step, (images, labels) in run.steps(batches, steps, meter, state):
            now = 120 * (epoch * steps + step) // (args.epochs * steps)
            divisor = 10 ** sum(now >= drop for drop in (30, 60, 90))
            for group, lr in zip(optimizer.param_groups, (args.lr, args.teacher_lr)):
                group["lr"] = lr / divisor

            with autocast(args, device):
                logits = {name: network(images) for name, network in networks.items()}
            ce = {name: F.cross_entropy(z.float(), labels) for name, z in logits.items()}
            optimizer.zero_grad()
            sum(ce.values()).backward()
            optimizer.step()
            terms = {"ce" if name == "student" else "teacher_ce": v for name, v in ce.items()}
            meter.add(logits["student"], labels, terms)

        top1 = {name: evaluate(network, data, args) for name, network in networks.items()}
        metrics = meter.close() | {"test_top1": top1["student"]}
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "teacher_test_top1": top1.get("teacher")}
        meter.report(metrics)
        run.end_epoch(metrics, **state)

    teacher = None
    if "teacher" in networks:
        last = run.history[-1]["teacher_test_top1"]
        teacher = Teacher(networks["teacher"], last, hashes["teacher"])
    return run.finish(networks["student"], data, teacher, student_hash=hashes["student"])


def program(argv=None) -> None:
    args = parse_args(argv)
    if args.transfer:
        return launch(transfer, args, {})
    ce = dict(method="CE", ce_weight=1.0, dcd_weight=0.0, kd_weight=0.0)
    kd = ce | dict(method="KD", kd_weight=args.kd_weight or 1.0)
    if args.kd_weight:  # the very terms that stand beside DCD
        kd["ce_weight"] = args.ce_weight
    launch(main, args, {"ce": ce, "kd": kd})


if __name__ == "__main__":
    sys.exit(run_program(program))
