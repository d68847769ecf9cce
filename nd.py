"""ND: knowledge distillation by feature norm and direction (KD++, DKD++, DIST++, ReviewKD++).

Idea: turn the student's embedding of an image towards the teacher's mean embedding of that image's
class, and lengthen it until it is as long as the teacher's own embedding of the image.

    Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature
    Norm and Direction, arXiv 2305.17007 (ECCV 2024: "... Feature Direction and Norm").

For image i of class y, with s = student_emb[i], t = teacher_emb[i] (the inputs of the classifiers;
s comes out of a projector if the dimensions differ) and e = class_means[y] / |class_means[y]|:

    nd   = mean_i [ 1 - (s . e) / max(|s|, |t|) ]  =  mean_i [ 1 - cos(s, e) * min(1, |s|/|t|) ]
    loss = ce_weight * ce + warm_up * kd_weight * base + nd_weight * nd

ce: cross-entropy; base: KD, DKD, DIST or ReviewKD; warm_up grows to 1. Ablations: nd is replaced by
direction = mean_i [ 1 - cos(s, e) ] and/or norm = mean_i [ relu(1 - |s|/|t|) ] (this one ours).

    python nd.py --teacher resnet56 --student resnet20          # CIFAR-100, the paper's recipe
    python nd.py --base dkd --compare --seeds 0 1 2             # DKD++, DKD, KD and CE, 3 seeds
    python nd.py --dataset imagenet --data-dir imagenet --pretrained-teacher
    python nd.py --dataset shapes --teacher resnet14 --student resnet8 --epochs 4 --batch-size 64

Measured: CIFAR-100, resnet56 (72.6 %) -> resnet20, 24 epochs with the optimizer of `sp.py`, top-1 %
of the last epoch, mean ± standard deviation over n = 3 seeds: CE 61.38 ± 0.22, KD 63.71 ± 0.21
(without warm-up), KD++ 64.91 ± 0.54. What the method gains in 240 epochs was not measured.

Differences from the paper's code:
 1. Class means: clean images, summed in float64 (there: augmented images, rounded to 4 decimals).
 2. Where |s| and |t| are both below 1e-7, nd is 1 and its gradient 0 (there: 0/0).
 3. The result is that of the last epoch (there: of the epoch that is best on the test set).
 4. Classifiers start as PyTorch's Linear (there: from N(0, 0.01^2), partly overwritten if there is
    a projector or ReviewKD++). A teacher trained here gets this recipe (there: that of `sp.py`).
 5. ND has no warm-up with any base loss (there: with DKD on ImageNet it has one).
 6. On one device BatchNorm sees the whole batch (there, on CIFAR: half of it on each GPU).
"""

import argparse
import sys

import torch
import torch.nn.functional as F

import common

# Each loss can be copied alone. Teacher in eval mode. Pass float32: under autocast, use .float() on
# what the networks return. No gradient reaches the teacher. B images, K classes, D dimensions.


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


def direction_loss(student_emb: torch.Tensor, class_means: torch.Tensor,
                   labels: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Direction alone (arXiv 2305.17007): mean of 1 - cos(s, e); [B,D], [K,D], [B]. Weight: 1."""
    s, e = student_emb, F.normalize(class_means.detach(), dim=1).index_select(0, labels)  # [B,D]
    if s.shape != e.shape:
        raise ValueError(f"shapes of s, e must be the same: {s.shape}, {e.shape}")
    length = s.norm(dim=1, keepdim=True)  # not F.normalize: its gradient at s = 0 would be 1e12
    s = s / length.masked_fill(length < 1e-7, torch.inf)
    return (1 - (s * e).sum(1)).mean()


def norm_loss(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Norm alone (ours): mean of relu(1 - |s| / |t|), of [B,D] and [B,D]; 0 to 1. Weight: 1."""
    if student_emb.shape != teacher_emb.shape:
        raise ValueError(f"shapes must be the same: {student_emb.shape}, {teacher_emb.shape}")
    s, t = student_emb.norm(dim=1), teacher_emb.detach().norm(dim=1)  # |s|, |t|  [B]
    return (F.relu(t - s) / t.clamp_min(1e-7)).mean()  # 0 where t = 0


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


def dist_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 1.0,
              gamma: float = 1.0, temperature: float = 4.0) -> torch.Tensor:  # fmt: skip
    """DIST: T^2 (beta (1 - mean correlation of rows) + gamma (1 - mean correlation of columns)).

    Rows of the probabilities compare classes within an image, columns images within a class.
    Args, Returns, Raises: as `kd_loss`; beta, gamma >= 0 weigh the two terms.
    Default weight: 2 (ND's paper: 1.5 to 7), with beta = gamma = 1. Reference: arXiv 2205.10536.
    """
    s, t = student_logits, teacher_logits.detach()
    if s.dim() != 2 or s.shape != t.shape or temperature <= 0:
        raise ValueError(f"need two [B,K] and T > 0, not {s.shape}, {t.shape}, {temperature}")
    p_s, p_t = F.softmax(s / temperature, 1), F.softmax(t / temperature, 1)

    def correlation(dim):  # Pearson's, mean over the rows (1) or columns (0); 1e-8 as published
        a, b = p_s - p_s.mean(dim, keepdim=True), p_t - p_t.mean(dim, keepdim=True)
        return ((a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)).mean()

    return temperature**2 * (beta * (1 - correlation(1)) + gamma * (1 - correlation(0)))


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


@torch.no_grad()
def compute_class_means(teacher: torch.nn.Module, batches, num_classes: int, embed=None):
    """The teacher's mean embedding of each class, [K,D] float32. ValueError: one has no image.

    Args: teacher, put into eval mode; batches: training images, not augmented, and labels [B], on
        its device; embed: (teacher, images) -> [B,D] for a teacher without `return_features`.
    """
    teacher.eval()
    embed = embed or (lambda network, x: network(x, return_features=True)[1].embedding)
    sums = counts = torch.zeros((), dtype=torch.float64)
    for images, labels in batches:
        embedding = embed(teacher, images).cpu().double()
        one_hot = F.one_hot(labels.cpu(), num_classes).double()  # [B,K]
        sums, counts = sums + one_hot.T @ embedding, counts + one_hot.sum(0)  # [K,D], [K]
    common.sum_over_ranks(sums, counts)  # each rank saw its part. Copy: delete it, show all images
    if not counts.all():
        raise ValueError(f"class means: no training image of class {int(counts.argmin())}")
    return (sums / counts[:, None]).float().to(labels.device)


def distill(args: argparse.Namespace) -> dict:
    """One run, from data to result. Without a teacher it is plain training; so a teacher learns."""
    data = common.load_data(args)
    run = common.Run(args, data, figures=("embeddings.png",) if args.plot else ())
    recipe = RECIPES.get(args.dataset, RECIPES["cifar"])

    # Networks. Seeded here, so that the initial weights depend on --seed alone.
    torch.manual_seed(args.seed)
    student = common.build_for(data, args.student, args.pretrained)
    teacher = common.build_for(data, args.teacher) if args.teacher else None

    # Auxiliary modules: trained beside the student, discarded after training.
    auxiliary = torch.nn.ModuleDict({"projector": torch.nn.Identity()})
    if args.plot and student.embed_dim != teacher.embed_dim:
        raise common.UserError("--plot: teacher and student need embeddings of equal dimension")
    uses_embedding = args.nd_weight or args.direction_weight or args.norm_weight
    if uses_embedding and student.embed_dim != teacher.embed_dim:
        linear = torch.nn.Linear(student.embed_dim, teacher.embed_dim)
        layers = torch.nn.BatchNorm1d(student.embed_dim), torch.nn.Dropout(0.5), linear
        auxiliary["projector"] = torch.nn.Sequential(*layers)
    base_name = args.base if args.kd_weight else "none"
    needs_maps = base_name == "reviewkd"
    if needs_maps:
        # Levels: each stage's map (a CIFAR teacher's: before ReLU), then the embedding as 1x1 map.
        s_channels = [c for c, _, _ in student.stage_shapes] + [student.embed_dim]
        t_channels = [c for c, _, _ in teacher.stage_shapes] + [teacher.embed_dim]
        if not len(s_channels) == len(t_channels) > 1:
            raise common.UserError("--base reviewkd: choose networks with equally many stages")
        auxiliary["review"] = ReviewKD(s_channels, t_channels, min(512, student.embed_dim))

    # The teacher's weights: from a file, or trained first by this very function. Frozen from here.
    if teacher is not None:
        teacher = common.load_teacher(teacher, args, data, distill)
    asks_teacher = args.kd_weight or args.nd_weight or args.norm_weight  # in every step
    if args.nd_weight or args.direction_weight:
        batches = data.batches("train", 500, augment=args.class_means == "augmented", shared=True)
        key = teacher.hash, data.fingerprint, args.class_means, common.device_name(data.device)
        path = common.Path(args.teacher_cache or run.dir) / "class_means.pt"
        means = common.cached(path, key, compute_class_means, teacher, batches, data.num_classes)
        means = means.to(data.device)

    student = student.to(data.device, memory_format=torch.channels_last)
    auxiliary = auxiliary.to(data.device)
    optimizer = common.sgd_or_adamw(args, [*student.parameters(), *auxiliary.parameters()])
    run.start(student=student, auxiliary=auxiliary, optimizer=optimizer, teacher=teacher)

    alpha, beta, temperature = args.dkd_alpha, args.dkd_beta, args.temperature
    for _ in run.epochs():
        student.train()
        auxiliary.train()
        for images, labels in run.batches():
            # Schedule, in epochs of the full recipe: CIFAR 0 to 239, however long this run is.
            now = recipe["epochs"] * run.step // run.total_steps
            drops = sum(now >= milestone for milestone in recipe["milestones"])
            common.set_lr(optimizer, args.lr / 10**drops, run)
            warm_up = min(1.0, now / recipe["warm_up"])

            # Forward: both networks see the same augmented images.
            with common.autocast(args):
                logits, features = student(images, return_features=True)
                student_emb = auxiliary["projector"](features.embedding)
                if asks_teacher:
                    teacher_logits, teacher_features = run.ask_teacher(images, needs_maps)
                    teacher_emb = teacher_features.embedding
                if needs_maps:
                    maps = [*features.maps, features.embedding[..., None, None]]
                    teacher_maps = [*teacher_features.preact, teacher_emb[..., None, None]]
                    maps = [m.float() for m in auxiliary["review"](maps, teacher_maps)]

            # Under torchrun losses see the whole batch. all_gather turns bf16 to float32.
            logits, student_emb, labels = run.all_gather(logits, student_emb, labels)
            if asks_teacher:
                teacher_logits, teacher_emb = run.all_gather(teacher_logits, teacher_emb)

            # Losses. But for ce, a term of weight 0 is not computed: it is 0.0 and is not logged.
            base = 0.0
            if base_name == "kd":
                base = kd_loss(logits, teacher_logits, temperature)
            elif base_name == "dkd":
                base = dkd_loss(logits, teacher_logits, labels, alpha, beta, temperature)
            elif base_name == "dist":
                base = dist_loss(logits, teacher_logits, temperature=temperature)
            elif base_name == "reviewkd":
                base = run.mean_over_ranks(hcl_loss(maps, teacher_maps), len(images))
            ce = F.cross_entropy(logits, labels)
            nd = nd_loss(student_emb, teacher_emb, means, labels) if args.nd_weight else 0.0
            direction = direction_loss(student_emb, means, labels) if args.direction_weight else 0.0
            norm = norm_loss(student_emb, teacher_emb) if args.norm_weight else 0.0
            loss = args.ce_weight * ce + warm_up * args.kd_weight * base + args.nd_weight * nd
            loss = loss + args.direction_weight * direction + args.norm_weight * norm
            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(optimizer)
            optimizer.step()
            terms = {"ce": ce, args.base: base, "nd": nd, "direction": direction, "norm": norm}
            run.log(terms, labels, logits)
            features = teacher_features = maps = teacher_maps = None  # frees the feature maps
        run.end_epoch(test_top1=common.evaluate(student, data, args))
    if args.plot and args.nd_weight:  # not of the baselines, which are trained first
        draw_norm_and_direction(args, data, teacher, student, means, run.dir)
    return run.finish()


@torch.no_grad()
def draw_norm_and_direction(args, data, teacher, student, means, out) -> None:
    """What ND changes: length and direction of embeddings; 50 test images of each of 10 classes."""
    ce, base = (common.load_model(args.student, out / x / "student.pt") for x in ("ce", args.base))
    networks = {"teacher": teacher, "CE": ce, BASES[args.base]: base, args.method: student}
    images, labels = data.test_batch(per_class=50, classes=10)
    figure, (left, right) = common.pyplot().subplots(1, 2, figsize=(9, 3.5))
    for (name, network), colour in zip(networks.items(), ("black", "gray", "#D55E00", "#0072B2")):
        x = network.to(data.device).eval()(images, return_features=True)[1].embedding
        style = dict(bins=30, density=True, histtype="step", linewidth=2, color=colour, label=name)
        left.hist(x.norm(dim=1).nan_to_num().clamp_max(1e6).tolist(), **style)  # if it diverged
        right.hist(F.cosine_similarity(x, means[labels]).nan_to_num().tolist(), **style)
    left.set(xlabel="length of the embedding", ylabel=f"density, {len(labels)} test images")
    right.set_xlabel("cosine to the teacher's class mean (1: same direction)")
    left.legend()
    common.save_figure(figure, out / "embeddings.png")


# fmt: off
RECIPES = {  # the paper's; warm_up: epochs in which the base loss grows to its full weight
    "cifar": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=128, lr=0.1,
        small_lr=0.02, milestones=(150, 180, 210), warm_up=20, nesterov=True, weight_decay=5e-4,
        temperature=4.0),
    "imagenet": dict(teacher="resnet34", student="resnet18", epochs=100, batch_size=512, lr=0.2,
        milestones=(30, 60, 90), warm_up=5, nesterov=True, weight_decay=1e-4, temperature=1.0),
}
BASES = {"kd": "KD", "dkd": "DKD", "dist": "DIST", "reviewkd": "ReviewKD"}
# Loss weights by pair. "++": of the paper's code; DIST++ on ImageNet and ReviewKD++ of a ViT: ours.
# DKD, ReviewKD: their authors' (ImageNet: for resnet34; DKD: MobileNetV1 too). KD, DIST: as "++".
PAIRS = [  # six of CIFAR, then six of ImageNet
    "resnet56 resnet20", "resnet32x4 resnet8x4", "wrn_40_2 wrn_40_1", "ResNet50 MobileNetV2",
    "resnet32x4 ShuffleV1", "resnet32x4 ShuffleV2", "resnet34 resnet18", "resnet50 resnet18",
    "resnet101 resnet18", "resnet152 resnet18", "resnet50 MobileNetV1", "vit_b_16 resnet18"]
PAPER_WEIGHTS = {
    "KD++": dict(kd_weight=[1.0, 3.5, 1.0, 3.0, 2.5, 4.0, 2.5, 4.0, 3.5, 4.0, 4.0, 2.0],
                 nd_weight=[2.0, 2.0, 1.5, 0.5, 1.5, 0.5, 1.0, 1.0, 4.0, 2.0, 1.0, 1.0]),
    "DKD++": dict(dkd_alpha=[2.5, 2.0, 1.0, 0.5, 0.5, 0.5, 0.8, 0.6, 0.8, 1.0, 0.8, 1.4],
                  dkd_beta=[4.0, 8.0, 6.0, 8.0, 8.0, 6.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.5],
                  nd_weight=[3.5, 0.5, 1.0, 1.0, 4.0, 0.5, 1.0, 2.0, 1.0, 1.0, 1.0, 2.0]),
    "DKD": dict(dkd_alpha=[1.0] * 12,
                dkd_beta=[2.0, 8.0, 6.0, 8.0, 8.0, 8.0, 0.5, 0.5, 0.5, 0.5, 2.0, 0.5]),
    "DIST++": dict(kd_weight=[2.0, 1.5, 2.5, 7.0, 2.5, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
                   nd_weight=[1.0, 4.0, 3.0, 1.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    "ReviewKD++": dict(kd_weight=[1.2, 8.0, 5.0, 6.0, 7.0, 8.0, 1.0, 3.0, 3.0, 3.0, 8.0, 1.0],
                       nd_weight=[1.0, 1.0, 4.0, 2.0, 1.0, 1.5, 3.0, 2.0, 1.0, 1.0, 4.0, 1.0]),
    "ReviewKD": dict(kd_weight=[0.6, 5.0, 5.0, 5.0, 5.0, 8.0, 1.0, 1.0, 1.0, 1.0, 8.0, 1.0]),
}
# fmt: on


def parse_args(argv=None, **changes) -> argparse.Namespace:
    """Read the command line and fill in what it leaves open. changes: flags of a baseline."""
    parser = common.Parser("nd", __doc__)
    weight = dict(type=common.weight, metavar="X")
    add = parser.add_argument_group("method").add_argument
    add("--base", choices=tuple(BASES), default="kd", help="loss to add ND to (default: kd)")
    add("--ce-weight", **weight, default=1.0, help="weight of the cross-entropy (default: 1)")
    add("--kd-weight", **weight, help="weight of the base loss (default: the paper's; KD: as KD++)")
    add("--nd-weight", **weight, help="weight of ND (default: the paper's; in an ablation: 0)")
    add("--direction-weight", **weight, default=0.0, help="direction, an ablation (default: 0)")
    add("--norm-weight", **weight, default=0.0, help="norm, an ablation (default: 0)")
    add("--temperature", type=common.positive, help="T of KD, DKD, DIST (default: 4; imagenet: 1)")
    add("--dkd-alpha", **weight, help="DKD: weight of TCKD (default: the paper's)")
    add("--dkd-beta", **weight, help="DKD: weight of NCKD (default: the paper's)")
    add("--class-means", choices=("clean", "augmented"), default="clean", help="images that class"
        " means are computed on (default: clean)")  # fmt: skip
    add("--plot", action="store_true", help="draw embeddings.png; trains CE and --base alone too")
    common.add_recipe_arguments(parser, RECIPES)
    common.add_run_arguments(parser)
    args = parser.parse_args(argv)
    vars(args).update(changes)
    common.fill_recipe(args, RECIPES.get(args.dataset, RECIPES["cifar"]))
    # Unset loss weights: the paper's for this pair, or its first pair. An ablation replaces ND.
    base, pair = BASES[args.base], f"{args.teacher} {args.student}"
    pairs = PAIRS[6:] if args.dataset == "imagenet" else PAIRS[:6]
    pair = pair if pair in pairs else pairs[0]
    ablation = args.direction_weight or args.norm_weight
    alone = args.nd_weight == 0 and not ablation
    row = PAPER_WEIGHTS[base if alone and base in PAPER_WEIGHTS else f"{base}++"]
    weights = {name: values[PAIRS.index(pair)] for name, values in row.items()}
    weights = {"kd_weight": 1.0} | weights | ({"nd_weight": 0.0} if ablation else {})
    weights = {name: value for name, value in weights.items() if getattr(args, name) is None}
    vars(args).update(weights)
    if not changes:
        print(f"default loss weights, those of {pair.replace(' ', ' -> ')}: {weights}")
    if args.plot and not args.nd_weight and not changes:
        raise common.UserError("--plot shows what ND changes: give an --nd-weight")
    if not args.ce_weight and (args.base == "reviewkd" or not args.kd_weight):
        raise common.UserError("--ce-weight 0: nothing else here trains the classifier")
    method = {(0, 0): "CE", (0, 1): "ND", (1, 0): base, (1, 1): f"{base}++"}
    args.method = method[args.kd_weight > 0, args.nd_weight > 0]
    args.method += " + direction" if args.direction_weight else ""
    args.method += " + norm" if args.norm_weight else ""
    return args


def main(argv=None) -> dict | list[dict]:
    """What the shell calls: one run, or those of --seeds and --compare. Returns their results."""
    args = parse_args(argv)
    # Baselines: the command line without ND. CE, and KD if --base is another, take default weights.
    off = dict(nd_weight=0.0, direction_weight=0.0, norm_weight=0.0)
    kd = dict(off, base="kd", ce_weight=1.0, kd_weight=None, dkd_alpha=None, dkd_beta=None)
    base = off if args.kd_weight else off | {"kd_weight": None}  # of ND alone: with its default
    runs = {"ce": kd | {"kd_weight": 0.0}, "kd": kd, args.base: base}
    runs = {name: vars(parse_args(argv, **changes)) for name, changes in runs.items()}
    return common.launch(distill, args, runs, needed=("ce", args.base) if args.plot else ())


if __name__ == "__main__":
    sys.exit(common.run_program(main))
