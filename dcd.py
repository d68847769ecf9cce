"""DCD: discriminative and consistent representation distillation.

Idea: in a small common space, the student's embedding of image i must be nearer to the teacher's
embedding of image i than to those of the other images of the batch, and the similarities of image i
to the others must be the same from the student's side (P_i) and from the teacher's (Q_i).

    Giakoumoglou, Stathaki: Discriminative and Consistent Representation Distillation,
    arXiv 2407.11802 (earlier: Invariant Consistency / Invariant Causal KD, ICD).

Two linear heads, trained with the student and then discarded, map the embeddings (the inputs of
the classifiers) to 128 dimensions. For image i of a batch of B, s_i is what the student's head
returns and t_i what the teacher's head returns.

    similarity_ij = min(exp(tau), 10) * cos(s_i, t_j)     a learned scale; tau starts at 1
    P_i = softmax over j of similarity_ij                 s_i compared with all t_j
    Q_i = softmax over j of similarity_ji                 t_i compared with all s_j
    dcd  = mean_i -log P_ii  +  alpha * mean_i KL(Q_i || P_i)        contrastive, consistency
    loss = ce_weight * ce + dcd_weight * dcd + kd_weight * kd

Weights 1, 1, 0 (DCD+KD: 1, 1, 1), alpha 0.5; kd is Hinton's at temperature 4.

    python dcd.py --teacher resnet56 --student resnet20     # CIFAR-100, RepDistiller's recipe
    python dcd.py --kd-weight 1 --compare --seeds 0 1 2     # DCD+KD, KD and CE, 3 seeds each
    python dcd.py --transfer stl10 --student-ckpt runs/NAME/student.pt    # linear probe, new images

Measured on CIFAR-100, resnet56 (72.6 %) -> resnet20, all images, 24 epochs (a tenth of the usual
length): top-1 % after the last epoch, mean ± standard deviation over seeds 0, 1, 2. CE 61.38 ±
0.22, KD 63.71 ± 0.21, DCD+KD 64.82 ± 0.41. What DCD gains in 240 epochs was not measured.
MobileNetV2, 10,000 images, 15 epochs: CE 19.13 ± 0.14, KD 24.48 ± 1.03, DCD 23.49 ± 0.29.

Differences from the paper and its code:
 1. No offset on the similarities: it cancels in every softmax, so its gradient is zero.
 2. ImageNet: tau is trained (code: never); a crop has 0.08 to 1 of the area, at an aspect of 3/4
    to 4/3 (code: 0.1 to 1, 0.8 to 1.25).
 3. --fixed-temperature 0.07 divides the cosines by 0.07; the published code multiplies by it.
 4. KD is ce + kd (RepDistiller: 0.1 ce + 0.9 kd). The last, smaller batch is used, not dropped.
 5. The probe keeps BatchNorm in eval mode; --transfer-bn batch is the published train mode.
 6. Under torchrun the negatives come from the whole batch, not from each rank's part.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import common

# The losses. Pass float32: under autocast, call .float() on what the networks return. No gradient
# reaches the teacher. Its head, however, is DCDLoss's own and is trained.


def contrastive_loss(similarity: torch.Tensor) -> torch.Tensor:
    """InfoNCE over the rows: mean of -log softmax_j(similarity_ij) at j = i.

    Args: similarity: [B,B], row i as the student sees image i, column j as the teacher sees j.
    Returns: scalar; log B if all entries are equal. Default weight: 1.
    Reference: van den Oord, Li, Vinyals, arXiv 1807.03748.
    """
    return -F.log_softmax(similarity, dim=1).diagonal().mean()


def consistency_loss(similarity: torch.Tensor) -> torch.Tensor:
    """KL divergence between row and column softmax: mean of KL(Q_i || P_i); neither is detached.

    Args: similarity: [B,B]; P_i is the softmax of row i, Q_i that of column i.
    Returns: scalar, 0 if and only if similarity is symmetric, so also if all entries are equal:
        do not use it alone. Default weight: 0.5 beside contrastive_loss.
    Reference: Giakoumoglou, Stathaki, arXiv 2407.11802.
    """
    log_p, log_q = F.log_softmax(similarity, dim=1), F.log_softmax(similarity.T, dim=1)  # [B,B]
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class DCDLoss(torch.nn.Module):
    """DCD: contrastive + alpha * consistency, on two linear heads of its own.

        dcd = DCDLoss(student_dim, teacher_dim).to(device)
        optimizer = torch.optim.SGD([*student.parameters(), *dcd.parameters()], lr=0.05)
        loss = F.cross_entropy(logits, labels) + dcd(student_emb.float(), teacher_emb.float())
    Under DDP wrap this module too, and gather the embeddings with gradient first, or each rank has
    only its own negatives.

    Args: student_dim, teacher_dim, embed_dim: dimensions of the embeddings and the common space;
        alpha: weight of the consistency; init_tau, max_scale: similarity = min(exp(tau), max_scale)
        * cosine, tau trained; temperature: if given, similarity = cosine / temperature instead;
        terms: "both", or one of "contrastive" and "consistency" (without alpha).
    Default weight: 1: it starts near log B, as the cross-entropy starts near log K (K classes).
    Raises: ValueError for other terms. Reference: Giakoumoglou, Stathaki, arXiv 2407.11802.
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
        if terms not in ("both", "contrastive", "consistency"):
            raise ValueError(f"DCDLoss: terms={terms!r}; choose both, contrastive or consistency")
        self.student_head = torch.nn.Linear(student_dim, embed_dim)
        self.teacher_head = torch.nn.Linear(teacher_dim, embed_dim)
        self.tau = torch.nn.Parameter(torch.tensor(float(init_tau)))
        self.tau.requires_grad_(temperature is None)
        self.max_tau = torch.tensor(max_scale, dtype=torch.float64).log().item()
        self.alpha, self.temperature, self.terms = alpha, temperature, terms

    def scale(self) -> torch.Tensor:
        """What multiplies the cosines: min(exp(tau), max_scale), or 1 / temperature."""
        if self.temperature is not None:
            return torch.full_like(self.tau, 1 / self.temperature)
        # As published, tau has no gradient above log max_scale: momentum and weight decay alone
        # move it. The clamp comes before exp: else a huge tau gives inf * 0 = nan in the gradient.
        return self.tau.clamp(max=self.max_tau).exp()

    def forward(self, student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
        """[B,student_dim], [B,teacher_dim] -> scalar, 0 if B = 1. Raises: ValueError for others."""
        if not student_emb.ndim == teacher_emb.ndim == 2 or len(student_emb) != len(teacher_emb):
            raise ValueError(f"DCDLoss: not two [B,D]: {student_emb.shape}, {teacher_emb.shape}")

        def unit(x):  # a vector too short to have a direction becomes 0, without gradient
            norm = x.norm(dim=1, keepdim=True)
            return x / norm.masked_fill(norm < 1e-7, torch.inf)

        with torch.autocast(student_emb.device.type, enabled=False):
            s = unit(self.student_head(student_emb))  # [B,embed_dim]
            # A clone, since the head cannot be trained on what was made under inference_mode.
            t = unit(self.teacher_head(teacher_emb.detach().clone()))
            similarity = self.scale() * s @ t.T  # [B,B]
        contrastive, consistency = contrastive_loss(similarity), consistency_loss(similarity)
        if self.terms == "both":
            return contrastive + self.alpha * consistency
        return contrastive if self.terms == "contrastive" else consistency


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
    figures = ("correlation_gap.png", "embeddings.png")
    run = common.Run(args, data, figures=figures if args.plot else ())
    recipe = RECIPES.get(args.dataset, RECIPES["cifar"])

    # Networks. Seeded here, so that their start does not depend on what happened before.
    torch.manual_seed(args.seed)
    student = common.build_for(data, args.student, args.pretrained)
    teacher = common.build_for(data, args.teacher) if args.teacher else None

    # Auxiliary modules: trained beside the student, discarded after training.
    auxiliary = torch.nn.ModuleDict()
    if args.dcd_weight:
        dims = student.embed_dim, teacher.embed_dim, args.embed_dim
        dcd_options = dict(alpha=args.alpha, temperature=args.fixed_temperature, terms=args.terms)
        auxiliary["dcd"] = DCDLoss(*dims, **dcd_options)

    # The teacher's weights: from a file, or trained first by this very function. Frozen from here.
    if args.teacher:
        teacher = common.load_teacher(teacher, args, data, distill)

    student = student.to(data.device, memory_format=torch.channels_last)
    auxiliary = auxiliary.to(data.device)
    trained = [*student.parameters(), *auxiliary.parameters()]
    optimizer = common.sgd_or_adamw(args, trained)
    run.start(student=student, auxiliary=auxiliary, optimizer=optimizer, teacher=teacher)

    for _ in run.epochs():
        student.train()
        auxiliary.train()
        for images, labels in run.batches():
            # Schedule, in epochs of the full recipe: a shorter run has the same shape.
            now = recipe["epochs"] * run.step // run.total_steps
            drops = sum(now >= milestone for milestone in recipe["milestones"])
            common.set_lr(optimizer, args.lr / 10**drops, run)

            # Forward: both networks see the same augmented images.
            with common.autocast(args):
                logits, features = student(images, return_features=True)
                if args.dcd_weight or args.kd_weight:
                    teacher_logits, teacher_features = run.ask_teacher(images)
                    teacher_emb = teacher_features.embedding

            # Under torchrun every loss sees the whole batch. From here on everything is float32.
            logits, student_emb, labels = run.all_gather(logits, features.embedding, labels)
            if args.dcd_weight or args.kd_weight:
                teacher_logits, teacher_emb = run.all_gather(teacher_logits, teacher_emb)

            # DCD or KD of weight 0 is not computed: it stays 0.0 and is not logged.
            dcd = kd = scale = tau = 0.0
            ce = F.cross_entropy(logits, labels)
            if args.dcd_weight:
                dcd = auxiliary["dcd"](student_emb, teacher_emb)
                # Only logged. The trained scale is expected to settle at max_scale, 10.
                scale, tau = auxiliary["dcd"].scale().detach(), auxiliary["dcd"].tau.detach()
            if args.kd_weight:
                kd = kd_loss(logits, teacher_logits, args.temperature)
            loss = args.ce_weight * ce + args.dcd_weight * dcd + args.kd_weight * kd

            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(optimizer)
            optimizer.step()
            run.log({"ce": ce, "dcd": dcd, "kd": kd, "scale": scale, "tau": tau}, labels, logits)
            features = teacher_features = None  # frees the feature maps before the next forward

        run.end_epoch(test_top1=common.evaluate(student, data, args))
    if not args.plot:
        return run.finish()
    draw_embeddings(student, teacher, data, run.dir / "embeddings.png")
    gap = draw_correlation_gap(student, teacher, data, run.dir / "correlation_gap.png")
    return run.finish(correlation_gap=gap)


def transfer(args) -> dict:
    """Linear probes: a new classifier for another data set on the frozen student, and one on the
    frozen teacher if it is known, trained side by side by the published schedule."""
    data = common.load_data(args)
    run = common.Run(args, data)

    # Networks as they were trained; of each, only a new classifier is trained from here on.
    networks = torch.nn.ModuleDict({"student": common.load_model(args.student, args.student_ckpt)})
    if args.teacher:
        networks["teacher"] = common.load_model(args.teacher, args.teacher_ckpt)
    hashes = {name: common.state_hash(network) for name, network in networks.items()}
    groups = []
    for network in networks.values():
        common.try_on(network, data)
        network.requires_grad_(False)
        torch.manual_seed(args.seed)
        classifier = common.new_classifier(network, data.num_classes)
        torch.nn.init.normal_(classifier.weight, std=0.01)
        torch.nn.init.zeros_(classifier.bias)
        groups.append({"params": classifier.parameters()})

    networks = networks.to(data.device, memory_format=torch.channels_last)
    optimizer = common.sgd_or_adamw(args, groups)
    run.start(student=networks["student"], networks=networks, optimizer=optimizer, origin=hashes)

    for _ in run.epochs():
        networks.train(args.transfer_bn == "batch")
        for images, labels in run.batches():
            now = 120 * run.step // run.total_steps  # the published schedule
            drops = sum(now >= milestone for milestone in (30, 60, 90))
            for group, lr in zip(optimizer.param_groups, (args.lr, args.teacher_lr)):
                group["lr"] = lr / 10**drops

            with common.autocast(args):
                logits = {name: network(images).float() for name, network in networks.items()}
            ce = {name: F.cross_entropy(z, labels) for name, z in logits.items()}
            optimizer.zero_grad()
            sum(ce.values()).backward()
            optimizer.step()
            terms = {"ce": ce["student"], "teacher_ce": ce.get("teacher", 0.0)}
            run.log(terms, labels, logits["student"])

        top1 = {name: common.evaluate(network, data, args) for name, network in networks.items()}
        run.end_epoch(test_top1=top1["student"], teacher_test_top1=top1.get("teacher"))
    found = dict(student_hash=hashes["student"], teacher_hash=hashes.get("teacher"))
    return run.finish(teacher_top1=run.history[-1]["teacher_test_top1"], **found)


@torch.no_grad()
def draw_correlation_gap(student, teacher, data, path) -> float:
    """The paper's |student - teacher| of each class's mean standardised logits. -> its mean."""
    relations = []  # [K,K] each
    for network in (student.eval(), teacher):
        sums = torch.zeros(data.num_classes, data.num_classes, device=data.device)
        for images, labels in data.batches("test", 500):
            logits = network(images)
            sums.index_add_(0, labels, F.layer_norm(logits, logits.shape[1:], eps=1e-14))
        relations.append(sums / data.test.labels.bincount(minlength=len(sums))[:, None])
    gap = (relations[0] - relations[1]).abs().fill_diagonal_(0)
    mean = gap[data.test.labels.unique()].mean().item()  # --val-size: some classes have no images
    figure, axis = common.pyplot().subplots(figsize=(6, 5))
    figure.colorbar(axis.imshow(gap.cpu().numpy(), cmap="Blues", vmin=0, vmax=3))
    names = dict(enumerate(data.classes)) if len(gap) < 30 else {}  # more would overlap
    axis.set_xticks([*names], names.values(), rotation=90)
    axis.set_yticks([*names], names.values())
    axis.set(xlabel="logit of class", ylabel="true class", title=f"|student - teacher|: {mean:.3f}")
    common.save_figure(figure, path)
    return round(mean, 5)


@torch.no_grad()
def draw_embeddings(student, teacher, data, path) -> None:
    """Test images of ten classes by their two principal components (paper: t-SNE of the logits)."""
    images, labels = data.test_batch(per_class=100, classes=10)
    figure, axes = common.pyplot().subplots(1, 2, figsize=(11, 5))
    for axis, name, network in zip(axes, ("teacher", "student"), (teacher, student)):
        parts = [network.eval()(part, return_features=True)[1] for part in images.split(250)]
        x = torch.cat([features.embedding for features in parts])
        x = x.nan_to_num().clamp(-1e6, 1e6)  # if the student has diverged
        u, lengths, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        points = (u * lengths)[:, :2].cpu()  # coordinates along the components
        for k in labels.unique().tolist():
            of_class = points[labels.cpu() == k]
            axis.scatter(*of_class.T, s=14, marker="os^vD*PX<>"[k], label=" " + data.classes[k])
        axis.set(title=f"{name}: embeddings, two principal components", xticks=[], yticks=[])
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


# fmt: off
RECIPES = {  # cifar: RepDistiller's and the paper's, for all but ImageNet; imagenet: paper's code
    "cifar": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=64, lr=0.05,
        small_lr=0.01, nesterov=False, weight_decay=5e-4, milestones=(150, 180, 210)),
    "imagenet": dict(teacher="resnet34", student="resnet18", epochs=120, batch_size=256, lr=0.1,
        small_lr=0.01, nesterov=False, weight_decay=1e-4, milestones=(30, 60, 90)),
}
# fmt: on


def prepare_transfer(args) -> None:
    """Fill in what --transfer leaves open, from the result.json beside the student if it is there.
    On entry args.dataset is what the networks were trained on, on return that of the probes."""
    if not (args.transfer and args.student_ckpt) or common.world() > 1:
        raise common.UserError("--transfer NAME and --student-ckpt FILE: give both; no torchrun")
    if args.compare or args.plot or args.optimizer == "adamw":
        raise common.UserError("--transfer: SGD trains probes; no --compare, --plot, --optimizer")
    student, result = Path(args.student_ckpt), {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = dict(json.loads(student.with_name("result.json").read_text()))
        names = [type(found[name]) for name in ("student", "teacher", "dataset")]
        if names == [str] * 3 and type(found["args"]["image_size"]) is int:  # as a run writes it
            result = found
    dataset = result.get("dataset", args.dataset)
    recipe = RECIPES.get(dataset, RECIPES["cifar"])
    args.student = args.student or result.get("student") or recipe["student"]
    args.teacher = args.teacher or result.get("teacher") or recipe["teacher"]
    size = result.get("args", {}).get("image_size", 224 if dataset == "imagenet" else 32)
    args.image_size = args.image_size or size
    teacher_file = f"checkpoints/{dataset}_{args.teacher}.pt"
    if not args.teacher_ckpt and Path(teacher_file).exists():
        args.teacher_ckpt = teacher_file
    args.dataset, args.epochs = args.transfer, args.epochs or 120
    args.method = f"probe of {result.get('method', student.stem)}"
    args.method += " (batch)" if args.transfer_bn == "batch" else ""
    path = str(student.with_suffix("")).strip("/").replace("/", "-")
    out = f"runs/transfer-{args.dataset}-{args.transfer_bn}-of-{path}"
    args.out = args.out or (out if args.seeds else f"{out}-s{args.seed}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = common.Parser("dcd", __doc__)
    weight = dict(type=common.weight, metavar="X")
    add = parser.add_argument_group("method").add_argument
    # fmt: off
    add("--ce-weight", **weight, default=1.0, help="weight of the cross-entropy (default: 1)")
    add("--dcd-weight", **weight, default=1.0, help="weight of DCD (default: 1)")
    add("--kd-weight", **weight, default=0.0, help="weight of KD, usually 1 (default: 0)")
    add("--temperature", type=common.positive, default=4.0, help="temperature of KD (default: 4)")
    add("--terms", choices=("both", "contrastive", "consistency"), default="both",
        help="terms of DCD (default: both)")
    add("--alpha", **weight, default=0.5, help="weight of the consistency in DCD (default: 0.5)")
    add("--embed-dim", type=common.number(int, 1, 65536), default=128, metavar="N",
        help="dimension of the common space (default: 128)")
    add("--fixed-temperature", "--fixed-scale", type=common.positive, metavar="T", help="divide the"
        " cosines by T, such as 0.07 (default: multiply them by a trained scale)")
    add("--plot", action="store_true", help="draw embeddings.png and correlation_gap.png")
    add("--transfer", type=common.one_of("data set", list(common.STATS)), metavar="NAME",
        help="instead: train a linear probe for this data set, 120 epochs, on --student-ckpt, and"
        " on the teacher if --teacher-ckpt or checkpoints/ has it")
    add("--student-ckpt", type=common.file_path, metavar="FILE", help="the student of --transfer;"
        " networks and image size are read from a result.json beside it, if there")
    add("--transfer-bn", choices=("eval", "batch"), default="eval", help="mode of the frozen"
        " networks; batch: train mode, BatchNorm adapts, dropout is on (default: eval)")
    # fmt: on
    common.add_recipe_arguments(parser, RECIPES)
    common.add_run_arguments(parser)
    args = parser.parse_args(argv)

    if args.transfer or args.student_ckpt:
        prepare_transfer(args)
        common.fill_recipe(args, RECIPES["cifar"])  # as published, whatever the images
        args.teacher = args.teacher if args.teacher_ckpt else None
        return args
    common.fill_recipe(args, RECIPES.get(args.dataset, RECIPES["cifar"]))
    dcd = "DCD" if args.terms == "both" else f"DCD {args.terms}"
    dcd += " fixed temperature" if args.fixed_temperature else ""
    terms = {dcd: args.dcd_weight, "KD": args.kd_weight}
    args.method = "+".join(name for name in terms if terms[name]) or "CE"
    if not args.eval and not args.ce_weight and not args.kd_weight:
        raise common.UserError("--ce-weight 0: nothing else here trains the classifier")
    return args


def main(argv=None) -> dict | list[dict]:
    args = parse_args(argv)
    if args.transfer:
        return common.launch(transfer, args, {})
    ce = dict(method="CE", ce_weight=1.0, dcd_weight=0.0, kd_weight=0.0)
    kd = dict(ce, method="KD", kd_weight=1.0)
    if args.kd_weight:  # the KD baseline keeps the ce and kd weights that were given
        kd.update(ce_weight=args.ce_weight, kd_weight=args.kd_weight)
    return common.launch(distill, args, {"ce": ce, "kd": kd})


if __name__ == "__main__":
    sys.exit(common.run_program(main))
