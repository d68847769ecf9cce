"""KD2M: knowledge distillation as matching the distribution of the features of a minibatch.

The idea in one sentence: add to the cross-entropy a distance between the student's and the
teacher's features, seen as two clouds of points rather than as pairs, and choose the distance.

    Montesuma: KD^2M: A unifying framework for feature knowledge distillation, arXiv 2504.01757
    (GSI 2025). Formulas from its author's slides and published code; its body was not at hand.

For a batch with student_emb S = {s_i} and teacher_emb T = {t_i} (the inputs of the classifiers):

    loss = ce_weight * ce + metric_weight * D(S, T) + kd_weight * kd

D is estimated on the batch, the teacher frozen. Squared distances, summed over the units:

    mse              mean_i |s_i - t_i|^2, paired: no distribution, the control
    w2_empirical     min over pairings p of mean_i |s_i - t_p(i)|^2
    jw2_empirical    the same of |s_i - t_p(i)|^2 + beta |logits_i - teacher_logits_p(i)|^2
    w2_gaussian      W2^2 of the Gaussians with the clouds' moments, diagonal or full covariance
    cw2_...          w2_empirical or w2_gaussian within each class present, mean over the classes
    mmd_linear       |mean S - mean T|^2
    sinkhorn         near w2_empirical, by entropic plans; an addition of ours

In other units: kl_gaussian (nats; diagonal), mmd_rbf (0 to 2); ours: sliced_w2 (a mean over lines,
not a sum over units), hellinger (nats), gromov_w2 (4th power; for different widths).

They are nearer to mse than their names suggest: |mean S - mean T|^2 <= w2_gaussian diag <= full <=
w2_empirical <= cw2_empirical (freq) <= mse, and where each image's own pair is the best pairing,
w2_empirical is mse in value and gradient. (An untrained student is far from that, and one may not
get there.) So read every gain against mse; --compare trains it.

    python kd2m.py --metric w2_empirical --compare --seeds 0 1 2    and CE, KD, mse: 12 runs
    python kd2m.py --metric w2_gaussian --covariance full --out runs/w2-full
    python kd2m.py --bench-metrics                                  what each costs and is

Measured, top-1 % of the last epoch on CIFAR-100's test images, mean ± standard deviation over the
seeds 0, 1, 2; resnet56 (69.56 %, of all 50,000 images) -> resnet8, a small budget for a CPU: 10,000
training images, 15 epochs, default weights. It shows that the code works, not what the method
gains in 240 epochs.

    CE            24.03 ± 0.14    mmd_linear    25.73 ± 0.32
    KD            32.03 ± 0.44    w2_empirical  23.83 ± 0.85
    mse           35.29 ± 0.35    mmd_rbf       23.16 ± 0.42
    cw2_empirical 35.07 ± 0.94    w2_gaussian   21.22 ± 1.29
    cw2_gaussian  35.29 ± 0.43    kl_gaussian   19.03 ± 1.39
    jw2_empirical 27.14 ± 0.47

(--student resnet8 --teacher-ckpt FILE --train-size 10000 --epochs 15 --seeds 0 1 2, and --compare.)
The metrics that know which image is which (mse) or of which class (cw2_..., where most classes of
such a batch have one image) pass KD and are not told apart. Of the others, jw2_empirical and
mmd_linear end between CE and KD, the rest at CE or below it. The weights are not the best ones: on
images kept out (README), mse did best at ten times its default, w2_gaussian at a tenth and less.

What the paper proves: put ONE head h on the features g_S(x) of the student or g_T(x) of the
teacher. If the label depends on the features alike for both, and the loss of h, as a function of
them, has norm at most 1 in the space of a kernel with feature map phi, the two risks differ by
|R_S(h) - R_T(h)| <= W2, the root (no square here), in |phi(z) - phi(z')|; if phi is 1-Lipschitz,
W2 <= (E |g_S(x) - g_T(x)|^2)^1/2, the root of the expected mse. It is no bound for the student's
own head, and says nothing of training or batches.

Differs from the paper and its published code:
 1. The default recipe and pair are the field's for CIFAR-100, with untuned weights that bring the
    term within a factor of 3 of the cross-entropy at the start; the code's is 1e-4 at 512 units,
    and in the slides' sweep 1e-7 did best. --recipe paper is the code's set-up (but SVHN is not
    flipped).
 2. There the undistilled student alone keeps its learning rate constant: its gains may be the
    schedule. Here every baseline has the schedule of the method.
 3. Optimal pairings are permutations, found exactly by scipy.
 4. CW2 is the mean over the classes present, as in the slides; the code sums ("sum"). W2 has
    the slides' full covariance too; KL only the code's diagonal: the full one is singular here.
 5. JW2 compares student with teacher, both costs in their own units; the code compares the
    student's features with themselves and divides by the largest distance.
 6. KL floors the variances; the code's is infinite for a unit dead in the teacher's batch.
 7. Under torchrun the samples are the whole batch. --gather local: each process's share of it; the
    distances of smaller samples are larger, and fewer classes have two images.
"""

import argparse
import math
import sys
import time

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
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
    device_name,
    evaluate,
    flag,  # "--its-name"
    gather,  # under torchrun: rows of all processes, with gradient
    get_teacher,  # loads it, or trains it first by calling main
    launch,  # --seeds and --compare: calls main once per run
    load_data,
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
# Needs `import torch`, `import torch.nn.functional as F` and
# `from scipy.optimize import linear_sum_assignment`. Every metric takes features [B,D], returns a
# scalar in the square of their unit unless said otherwise, sums over D, averages over B (moments
# are biased, 1/B), computes in float32 or better and sends no gradient into the teacher.
#  - Products of matrices are float64: |a|^2 + |b|^2 - 2ab loses digits where a is near b, and
#    neither autocast nor TF32 touches float64 (which Apple's MPS lacks: move the features first).
#  - Where a value is itself an optimum (pairing, plan, nuclear norm), the optimum is found without
#    gradient and then held fixed: by the envelope theorem the first derivative is still right. (The
#    default bandwidth of mmd_rbf and eps of sinkhorn are held fixed as well, by definition.)
#  - The weights named are for a CIFAR resnet56's 64 units; for yours, print metric and CE and let
#    them be alike.
#  - ValueError: wrong shapes, too few samples, nan or infinity. That check reads the values, so it
#    waits for a GPU and breaks a torch.compile graph.


def _full(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _alike(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raises ValueError if the shapes differ: they would broadcast to a wrong loss."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: must be the same")


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


def _choose(metric: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{metric}: {option}={value!r}; choose from {', '.join(choices)}")


def _pair(metric, student, teacher, what="features", fewest=1, same_width=True):
    """Both batches, checked, in float32 or better, the teacher's without gradient."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise ValueError(f"{metric}: needs {what} [B,D] of student and teacher, not {shapes}")
    if len(student) < fewest:
        raise ValueError(f"{metric}: needs a batch of {fewest} or more, not {len(student)}")
    widths = student.shape[1], teacher.shape[1]
    if same_width and widths[0] != widths[1]:
        hint = "; project the student's, or use gromov_w2" if what == "features" else ""
        text = f"the student's {what} are {widths[0]} wide, the teacher's {widths[1]}"
        raise ValueError(f"{metric}: {text}{hint}")
    for owner, x in (("student", student), ("teacher", teacher)):
        if not x.isfinite().all():
            raise ValueError(f"{metric}: nan or infinity in the {owner}'s {what}")
    return _full(student), _full(teacher.detach().clone())  # a copy: else no inference_mode


def _square_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a_i - b_j|^2, in float64. [B,D], [B,D] -> [B,B]"""
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _best_pairing(cost: torch.Tensor) -> torch.Tensor:
    """The permutation p with the least sum_i cost[i, p(i)], exactly. [B,B] -> [B]

    Clouds of equal size and equal weights need no other plan (Birkhoff). An infinite cost forbids
    a pair. Ties are broken by the solver: each choice gives a valid subgradient.
    """
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=cost.device)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each unit. [B,D] -> [D], [D]"""
    mean = x.mean(0)
    return mean, (x - mean).square().mean(0)


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """sqrt(x), with gradient 0 instead of infinity at 0: a dead unit, a class of one sample."""
    positive = x > 0
    return torch.where(positive, x, 1.0).sqrt() * positive


def _nuclear_norm(matrix: torch.Tensor) -> torch.Tensor:
    """|M|_* = sum of the singular values = max <Q, M> over |Q|_2 <= 1, reached at Q = U V^T.

    Q is the gradient: no 1 / (sigma_i - sigma_j) as in the derivative of a decomposition. Singular
    values that are mere rounding are left out of Q, and with them arbitrary null directions.
    """
    u, sigma, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    kept = sigma > max(matrix.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    return (((u * kept) @ vh) * matrix).sum()


def _classes(metric, labels, reduction, like):
    """Class of each sample, counted from 0 [B]; size [C] and weight [C] of each class present."""
    _choose(metric, "reduction", reduction, ("mean", "sum", "freq"))
    if labels.shape != like.shape[:1] or labels.is_floating_point():
        shape = f"{list(labels.shape)} {labels.dtype}"
        raise ValueError(f"{metric}: needs whole numbers [{len(like)}] as labels, not {shape}")
    if labels.min() < 0:
        raise ValueError(f"{metric}: label {int(labels.min())} is negative")
    _, index, size = labels.unique(return_inverse=True, return_counts=True)
    size = size.to(like.dtype)
    one = torch.ones_like(size)
    return index, size, {"mean": one / len(one), "sum": one, "freq": size / len(like)}[reduction]


def _class_means(x: torch.Tensor, index: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Mean of the rows of x in each class. [B,D], [B], [C] -> [C,D]"""
    return x.new_zeros(len(size), x.shape[1]).index_add(0, index, x) / size[:, None]


def mse(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Paired squared error, the control: image i's features against image i's. [B,D], [B,D].

    D times F.mse_loss: summed over the units, like all metrics here. Weight 0.03 at 64 units.
    """
    s, t = _pair("mse", student_emb, teacher_emb)  # [B,D]
    # mean_i |s_i - t_i|^2
    return (s - t).square().sum(1).mean()


def w2_empirical(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Squared 2-Wasserstein distance of the two clouds, exact. [B,D], [B,D].

    Never above mse, and equal to it in value and gradient where pairing each image with itself is
    the best pairing: common once the student is near the teacher, the more so the wider the
    features, rare for an untrained student. Weight 0.03 at 64 units. Source: arXiv 2504.01757.
    """
    s, t = _pair("w2_empirical", student_emb, teacher_emb)  # [B,D]
    pair = _best_pairing(_square_distances(s.detach(), t))  # [B]
    # min_p mean_i |s_i - t_p(i)|^2
    return (s - t[pair]).square().sum(1).mean()


def cw2_empirical(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
) -> torch.Tensor:
    """w2_empirical within each class. [B,D], [B,D], true labels [B]. Weight 0.03 at 64 units.

    reduction: "mean" over the C classes present (the paper's slides), "sum" (its code; C times as
    large), "freq" weights a class by its share of the batch. In a class with one sample it is the
    paired squared error. Source: arXiv 2504.01757.
    """
    s, t = _pair("cw2_empirical", student_emb, teacher_emb)  # [B,D]
    index, size, weight = _classes("cw2_empirical", labels, reduction, s)  # [B], [C], [C]
    cost = _square_distances(s.detach(), t)
    # One assignment for all classes at once: infinity, not merely large, between two classes, so
    # that the costs within a class keep all their digits.
    pair = _best_pairing(cost.masked_fill(index[:, None] != index, float("inf")))
    # sum_y weight_y W2^2(S_y, T_y)
    w2 = _class_means((s - t[pair]).square(), index, size).sum(1)  # [C]
    return (weight * w2).sum()


def jw2_empirical(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 1.0,
) -> torch.Tensor:
    """W2^2 of the clouds of (features, predictions), exact. [B,D], [B,D], [B,K], [B,K] logits.

    One pairing for both parts; features and logits both get gradient. beta 0 is w2_empirical. The
    squared distance of raw logits is the published code's choice. Usual beta 1; weight 0.003 at 64
    units. Source: arXiv 2504.01757.
    """
    s, t = _pair("jw2_empirical", student_emb, teacher_emb)  # [B,D]
    p, q = _pair("jw2_empirical", student_logits, teacher_logits, "logits")  # [B,K]
    if len(p) != len(s):
        raise ValueError(f"jw2_empirical: {len(s)} rows of features, {len(p)} of logits")
    cost = _square_distances(s.detach(), t) + beta * _square_distances(p.detach(), q)
    pair = _best_pairing(cost)  # [B]
    # min_p mean_i (|s_i - t_p(i)|^2 + beta |logits_i - logits_p(i)|^2)
    return ((s - t[pair]).square().sum(1) + beta * (p - q[pair]).square().sum(1)).mean()


def w2_gaussian(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, cov: str = "diag"
) -> torch.Tensor:
    """Squared 2-Wasserstein distance of the Gaussians with the clouds' moments. [B,D], [B,D].

    cov "diag" (the published code) or "full" (the paper's slides). Weight 0.05 at 64 units.
    Full: let A, B be the centred features, n rows each, cov_S = A^T A / n and cov_T = B^T B / n.
    The eigenvalues of cov_S cov_T = A^T (A B^T) B / n^2 that are not 0 are the squares of the
    singular values of A B^T / n, so tr (cov_S^1/2 cov_T cov_S^1/2)^1/2 = |A B^T|_* / n, sample by
    sample [n,n]: no matrix root, no ridge, and singular covariances (n <= D, dead units) are as
    good as others. Its neighbour |A^T B|_* [D,D] would be wrong: A^T B = sum_i a_i b_i^T depends on
    which rows are paired; another order of the teacher's rows only permutes the columns of A B^T.
    Source: arXiv 2504.01757.
    """
    _choose("w2_gaussian", "cov", cov, ("diag", "full"))
    s, t = _pair("w2_gaussian", student_emb, teacher_emb)  # [B,D]
    if cov == "diag":
        (mean_s, var_s), (mean_t, var_t) = _moments(s), _moments(t)  # [D]
        # |mu_S - mu_T|^2 + |sigma_S - sigma_T|^2
        return (mean_s - mean_t).square().sum() + (_sqrt(var_s) - _sqrt(var_t)).square().sum()
    dtype, s, t = s.dtype, s.double(), t.double()
    gap = (s.mean(0) - t.mean(0)).square().sum()
    a, b = s - s.mean(0), t - t.mean(0)  # [B,D]
    # |mu_S - mu_T|^2 + tr cov_S + tr cov_T - 2 |A B^T|_* / n
    traces = (a.square() + b.square()).sum() / len(a)
    return (gap + traces - 2 * _nuclear_norm(a @ b.T) / len(a)).to(dtype)


def cw2_gaussian(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
    cov: str = "diag",
) -> torch.Tensor:
    """w2_gaussian within each class. [B,D], [B,D], true labels [B]. Weight 0.03 at 64 units.

    reduction: as in cw2_empirical. In a class with one sample the variances are 0 and it is the
    paired squared error. Source: arXiv 2504.01757.
    """
    _choose("cw2_gaussian", "cov", cov, ("diag", "full"))
    s, t = _pair("cw2_gaussian", student_emb, teacher_emb)  # [B,D]
    dtype = s.dtype
    if cov == "full":
        s, t = s.double(), t.double()
    index, size, weight = _classes("cw2_gaussian", labels, reduction, s)  # [B], [C], [C]
    mean_s, mean_t = _class_means(s, index, size), _class_means(t, index, size)  # [C,D]
    a, b = s - mean_s[index], t - mean_t[index]  # [B,D], centred within the class
    var_s = _class_means(a.square(), index, size)  # [C,D]
    var_t = _class_means(b.square(), index, size)
    gap = (mean_s - mean_t).square().sum(1)  # [C]
    if cov == "diag":
        # sum_y weight_y (|mu_S - mu_T|^2 + |sigma_S - sigma_T|^2)
        return (weight * (gap + (_sqrt(var_s) - _sqrt(var_t)).square().sum(1))).sum()
    # sum_y weight_y (|mu_S - mu_T|^2 + tr cov_S + tr cov_T - 2 |A_y B_y^T|_* / n_y). The matrices
    # A_y B_y^T stand as the blocks of one [B,B] matrix, whose nuclear norm is the sum of theirs.
    blocks = (a @ b.T) * (index[:, None] == index) * (weight / size)[index]
    return ((weight * (gap + (var_s + var_t).sum(1))).sum() - 2 * _nuclear_norm(blocks)).to(dtype)


def _floored_moments(metric, student_emb, teacher_emb, floor):
    """Moments [D] of both, no variance below `floor` times the mean of the teacher's."""
    s, t = _pair(metric, student_emb, teacher_emb, fewest=2)  # [B,D]
    (mean_s, var_s), (mean_t, var_t) = _moments(s), _moments(t)
    least = (floor * var_t.mean()).clamp_min(1e-12)
    return mean_s, torch.maximum(var_s, least), mean_t, torch.maximum(var_t, least)


def kl_gaussian(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    direction: str = "student",
    floor: float = 1e-3,
) -> torch.Tensor:
    """KL divergence of the diagonal Gaussians with the clouds' moments, in nats. [B,D], [B,D].

    direction: "student" KL(S || T), the published code's; "teacher" KL(T || S); "both" their sum
    (Jeffreys). Diagonal only: with B <= D the full covariances are singular and the KL infinite.
    A unit that hardly varies in the teacher is weighted by 1 / var_T, at most 1 / floor times the
    usual; a variance under the floor gets no gradient. (If no unit of the teacher varies at all,
    the floor is 1e-12 and the value huge.) Needs B >= 2. Does not change if both clouds are scaled.
    Weight 0.1 at 64 units. Source: arXiv 2504.01757 ("both": ours).
    """
    _choose("kl_gaussian", "direction", direction, ("student", "teacher", "both"))
    mean_s, var_s, mean_t, var_t = _floored_moments("kl_gaussian", student_emb, teacher_emb, floor)
    gap = (mean_s - mean_t).square()  # [D]
    # KL(P || Q) = 1/2 sum_k [ v_P / v_Q + (mu_P - mu_Q)^2 / v_Q - 1 - log(v_P / v_Q) ]
    student = ((var_s + gap) / var_t - 1 - (var_s / var_t).log()).sum() / 2
    teacher = ((var_t + gap) / var_s - 1 - (var_t / var_s).log()).sum() / 2
    return {"student": student, "teacher": teacher, "both": student + teacher}[direction]


def mmd_linear(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy with k(a, b) = a.b: the means alone. [B,D], [B,D].

    Weight 0.2 at 64 units. Source: the published code of arXiv 2504.01757.
    """
    s, t = _pair("mmd_linear", student_emb, teacher_emb)  # [B,D]
    # |mu_S - mu_T|^2
    return (s.mean(0) - t.mean(0)).square().sum()


def mmd_rbf(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, bandwidth: float | None = None
) -> torch.Tensor:
    """Squared maximum mean discrepancy with k(a, b) = exp(-|a - b|^2 / (2 sigma^2)). [B,D], [B,D].

    From 0 to 2, without unit; biased (V-statistic). bandwidth: sigma; None takes, as the published
    code, the mean of all 3 B^2 distances in and between the clouds, each sample's own 0 included,
    without gradient. Weight 20 at 64 units. Source: the published code of arXiv 2504.01757.
    """
    s, t = _pair("mmd_rbf", student_emb, teacher_emb)  # [B,D]
    ss, tt, st = _square_distances(s, s), _square_distances(t, t), _square_distances(s, t)  # [B,B]
    if bandwidth is None:
        bandwidth = torch.stack([ss, tt, st]).detach().sqrt().mean().clamp_min(1e-12)
    # mean_ij k(s_i, s_j) + mean_ij k(t_i, t_j) - 2 mean_ij k(s_i, t_j)
    ss, tt, st = ((-d / (2 * bandwidth**2)).exp().mean() for d in (ss, tt, st))
    return (ss + tt - 2 * st).to(s.dtype)


def sinkhorn(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    reg: float = 0.1,
    tolerance: float = 1e-2,
    iterations: int = 100,
) -> torch.Tensor:
    """Debiased Sinkhorn divergence, an addition of ours. [B,D], [B,D]. Weight 0.05 at 64 units.

    reg: entropy's price eps as a share of the mean cost between the clouds, without gradient; so
    scaling both clouds by c multiplies the result by c^2 and changes no iteration. Small: near
    w2_empirical; large: mmd_linear. Iterates in the log domain until every row and column of the
    three plans has its mass within `tolerance`, or `iterations` are over; a small reg needs
    thousands. Stopped early, with an error e of the mass, each OT_eps is a lower bound, off by
    O(e^2), and its gradient by O(e).
    """
    s, t = _pair("sinkhorn", student_emb, teacher_emb)  # [B,D]
    cost = [_square_distances(s, t), _square_distances(s, s), _square_distances(t, t)]
    cost = torch.stack(cost)  # [3,B,B]
    eps = (reg * cost[0].detach().mean()).clamp_min(1e-30)
    scaled = cost.detach() / eps
    f = g = torch.zeros_like(scaled[:, 0])  # potentials, divided by eps  [3,B]
    log_n = f.new_tensor(len(s)).log()
    for _ in range(iterations):
        # f_i = -log mean_j exp(g_j - C_ij / eps), g likewise; halfway there, both at once
        new_f = log_n - (g[:, None, :] - scaled).logsumexp(2)
        new_g = log_n - (f[:, :, None] - scaled).logsumexp(1)
        error = torch.maximum((new_f - f).abs().max(), (new_g - g).abs().max())
        f, g = (f + new_f) / 2, (g + new_g) / 2
        if error < tolerance:
            break
    # OT_eps = eps max_fg [ mean f + mean g + 1 - mean_ij exp(f_i + g_j - C_ij / eps) ]
    plan = (f[:, :, None] + g[:, None, :] - cost / eps).exp()
    ot = eps * (f.mean(1) + g.mean(1) + 1 - plan.mean((1, 2)))  # [3]
    # OT_eps(S, T) - OT_eps(S, S) / 2 - OT_eps(T, T) / 2
    return (ot[0] - ot[1] / 2 - ot[2] / 2).to(s.dtype)


def sliced_w2(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    projections: int = 128,
    seed: int | None = None,
) -> torch.Tensor:
    """Mean of the squared W2 of the clouds' shadows on random lines, an addition of ours.

    [B,D], [B,D]. At most w2_empirical / D on average over the lines. seed: None draws new lines
    at each call from torch's generator of the CPU; a number gives the same lines at each call.
    Weight 4 at 64 units.
    """
    s, t = _pair("sliced_w2", student_emb, teacher_emb)  # [B,D]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shape = s.shape[1], projections
    lines = torch.randn(shape, generator=generator, dtype=torch.float64).to(s.device)
    lines = lines / lines.norm(dim=0)  # [D,L], uniform on the sphere
    shadow_s, shadow_t = (x.double() @ lines for x in (s, t))  # [B,L]
    # mean over lines and ranks of |s_(k) - t_(k)|^2: on a line the best pairing is by rank
    return (shadow_s.sort(0)[0] - shadow_t.sort(0)[0]).square().mean().to(s.dtype)


def hellinger(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, floor: float = 1e-3
) -> torch.Tensor:
    """Bhattacharyya form -log(1 - H^2) of the Hellinger distance H, an addition of ours.

    [B,D], [B,D]; of the diagonal Gaussians with the clouds' moments, in nats. H^2 itself is at most
    1 and flat for distant Gaussians; this grows on. Symmetric and milder than kl_gaussian: a unit
    dead in one cloud is measured by the other's variance. floor, scale, B >= 2: as in kl_gaussian.
    Weight 0.2 at 64 units.
    """
    mean_s, var_s, mean_t, var_t = _floored_moments("hellinger", student_emb, teacher_emb, floor)
    var = (var_s + var_t) / 2  # [D]
    # sum_k [ (mu_S - mu_T)^2 / (8 v) + log(v / sqrt(v_S v_T)) / 2 ], v = (v_S + v_T) / 2
    logs = ((var / var_s).log() + (var / var_t).log()) / 4
    return ((mean_s - mean_t).square() / (8 * var) + logs).sum()


def gromov_w2(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    start: str = "profile",
    steps: int = 20,
) -> torch.Tensor:
    """Gromov-Wasserstein: distances within the clouds, for any two widths. An addition of ours.

    [B,D], [B,E]. Compares squared distances, so in the fourth power of the features' unit; blind to
    rotations and shifts. The best pairing is out of reach (a quadratic assignment problem): this is
    the exact cost of the pairing in which conditional gradient ends, an upper bound that can be
    loose. As the objective is concave in the plan, a step goes all the way to the next pairing and
    never up; `steps` at most, usually under 5. start: "profile" pairs samples by their sorted
    distances to the others, whatever the order of the rows; "identity" pairs each image with
    itself, much tighter where student and teacher agree, but the result then depends on that
    pairing. Weight 1e-4 at 64 units.
    """
    _choose("gromov_w2", "start", start, ("profile", "identity"))
    s, t = _pair("gromov_w2", student_emb, teacher_emb, same_width=False)  # [B,D], [B,E]
    within_s, within_t = _square_distances(s, s), _square_distances(t, t)  # [B,B]
    fixed = within_s.detach()

    def loss(within, p):  # mean_ij (|s_i - s_j|^2 - |t_p(i) - t_p(j)|^2)^2
        return (within - within_t[p][:, p]).square().mean()

    pair = torch.arange(len(s), device=s.device)
    if start == "profile":
        pair = _best_pairing(_square_distances(fixed.sort(1)[0], within_t.sort(1)[0]))
    for _ in range(steps):
        # d loss / d plan[i, j] is, but for constants, -sum_k |s_i - s_k|^2 |t_p(k) - t_j|^2
        candidate = _best_pairing(-fixed @ within_t[pair])
        if loss(fixed, candidate) >= loss(fixed, pair):
            break
        pair = candidate
    return loss(within_s, pair).to(s.dtype)


METRICS = {
    "mse": mse,
    "w2_empirical": w2_empirical,
    "cw2_empirical": cw2_empirical,  # and labels
    "jw2_empirical": jw2_empirical,  # and the logits of both
    "w2_gaussian": w2_gaussian,
    "cw2_gaussian": cw2_gaussian,  # and labels
    "kl_gaussian": kl_gaussian,
    "mmd_linear": mmd_linear,
    "mmd_rbf": mmd_rbf,
    # Additions of ours, not in the paper:
    "sinkhorn": sinkhorn,
    "sliced_w2": sliced_w2,
    "hellinger": hellinger,
    "gromov_w2": gromov_w2,
}


# --- to here ----------------------------------------------------------------------------------

# Weights that bring the term near the size of the cross-entropy at the start of the default pair (a
# trained resnet56, 64 units, and an untrained student): 1.5 to 7 beside 4.8. Not tuned.
WEIGHTS = {
    "mse": 0.03,
    "w2_empirical": 0.03,
    "cw2_empirical": 0.03,
    "jw2_empirical": 0.003,
    "w2_gaussian": 0.05,
    "cw2_gaussian": 0.03,
    "kl_gaussian": 0.1,
    "mmd_linear": 0.2,
    "mmd_rbf": 20.0,
    "sinkhorn": 0.05,
    "sliced_w2": 4.0,
    "hellinger": 0.2,
    "gromov_w2": 1e-4,
}

RECIPES = {
    # RepDistiller's for CIFAR-100. lr 0.01 for MobileNet and ShuffleNet; / 10 at 150, 180 and 210.
    "benchmark": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=64, lr=0.05)
    | dict(weight_decay=5e-4, pretrained=False, drops=(150, 180, 210)),
    # The usual one; the paper has no ImageNet. Chosen by --dataset imagenet.
    "imagenet": dict(teacher="resnet34", student="resnet18", epochs=100, batch_size=256, lr=0.1)
    | dict(weight_decay=1e-4, pretrained=False, drops=(30, 60, 90)),
    # The published code's: cosine towards a hundredth of the rate, weight 1e-4 for its metrics.
    "paper": dict(teacher="resnet34", student="resnet18", epochs=15, batch_size=128, lr=0.01)
    | dict(weight_decay=0.0, pretrained=True, class_reduction="sum"),
}
# Options that only some metrics have, and their defaults.
OPTIONS = {
    "covariance": (("w2_gaussian", "cw2_gaussian"), "diag"),
    "kl_direction": (("kl_gaussian",), "student"),
    "class_reduction": (("cw2_empirical", "cw2_gaussian"), "mean"),
    "beta": (("jw2_empirical",), 1.0),
}
OURS = ("sinkhorn", "sliced_w2", "hellinger", "gromov_w2")


def default_weight(metric: str, recipe: str, normalize_by_dim: bool = False) -> float:
    weight = 1e-4 if recipe == "paper" and metric not in OURS else WEIGHTS[metric]
    return weight * (64 if normalize_by_dim else 1)


def feature_distance(
    args, student_emb, teacher_emb, labels, student_logits, teacher_logits, seed=None
) -> torch.Tensor:
    """The metric of the command line, with its options. UserError: it cannot be computed.
    seed: of what a metric draws, so that all processes of torchrun draw alike."""
    name, inputs, options = args.metric, [student_emb, teacher_emb], {}
    if name in ("cw2_empirical", "cw2_gaussian"):
        inputs.append(labels)
        options["reduction"] = args.class_reduction
    if name in ("w2_gaussian", "cw2_gaussian"):
        options["cov"] = args.covariance
    if name == "kl_gaussian":
        options["direction"] = args.kl_direction
    if name == "jw2_empirical":
        inputs += [student_logits, teacher_logits]
        options["beta"] = args.beta
    if name == "sliced_w2":
        options["seed"] = seed
    try:
        distance = METRICS[name](*inputs, **options)
    except ValueError as error:
        hint = ": lower --lr or --metric-weight" if "nan" in str(error) else ""
        raise UserError(f"--metric {error}{hint}") from None
    return distance / teacher_emb.shape[1] if args.normalize_by_dim else distance


BENCH_HEADING = """\
On drawn clouds of 100 classes; the student's is the teacher's and as much noise again. At batch 128
and width 64:
  value
  shuffled  does it stay the same if the teacher's rows within each class change places?
  pairs     share of the images whose best pairing is with their own teacher
  gradient  its cosine with the gradient of mse, both by the student's embeddings
Then ms forward and backward at batch x width, the best of 3, on"""


def bench_metrics(args) -> None:
    """What each metric costs and how far it is from the paired squared error, on drawn clouds."""
    device = pick_device(args.device)
    print(BENCH_HEADING, device_name(args.device))
    sizes = [(batch, width) for width in (64, 512) for batch in (64, 128, 256)]
    columns = "".join(f"{f'{batch}x{width}':>9}" for batch, width in sizes)
    print(f"{'metric':15}{'value':>10}{'shuffled':>9}{'pairs':>7}{'gradient':>9}{columns}")
    draw = torch.Generator().manual_seed(0)

    def clouds(batch, width):
        labels = torch.randint(0, 100, (batch,), generator=draw)
        centres = torch.randn(100, width, generator=draw)
        teacher = F.relu(centres[labels] + torch.randn(batch, width, generator=draw))
        student = F.relu(teacher + torch.randn(batch, width, generator=draw))
        head = torch.randn(width, 100, generator=draw) / width**0.5
        return [x.to(device) for x in (student, teacher, labels, student @ head, teacher @ head)]

    def value_and_gradient(student, *others):
        torch.manual_seed(0)  # the same lines for sliced_w2
        student = student.clone().requires_grad_()
        value = feature_distance(args, student, *others)
        return value.detach(), torch.autograd.grad(value, student)[0]

    batches = {size: clouds(*size) for size in sizes}
    student, teacher, labels, student_logits, teacher_logits = batches[128, 64]
    order = torch.arange(128, device=device)
    for k in labels.unique():
        order[labels == k] = order[labels == k].roll(1)
    costs = {"w2_empirical": _square_distances(student, teacher)}
    other_class = labels[:, None] != labels
    costs["cw2_empirical"] = costs["w2_empirical"].masked_fill(other_class, float("inf"))
    of_logits = _square_distances(student_logits, teacher_logits)
    costs["jw2_empirical"] = costs["w2_empirical"] + args.beta * of_logits
    own = {name: (_best_pairing(cost).cpu() == torch.arange(128)) for name, cost in costs.items()}
    for args.metric in METRICS:
        value, gradient = value_and_gradient(*batches[128, 64])
        swapped = student, teacher[order], labels, student_logits, teacher_logits[order]
        same = torch.allclose(value_and_gradient(*swapped)[0], value, rtol=1e-4)
        pairs = f"{100 * own[args.metric].float().mean():.0f} %" if args.metric in own else "-"
        cosine = F.cosine_similarity(gradient.flatten(), (student - teacher).flatten(), dim=0)
        line = f"{args.metric:15}{value:10.4g}{'yes' if same else 'no':>9}{pairs:>7}{cosine:9.3f}"
        for size in sizes:
            times = []
            for _ in range(4):
                start = time.perf_counter()
                value_and_gradient(*batches[size])[1].sum().item()  # waits for the device
                times.append(1000 * (time.perf_counter() - start))
            line += f"{min(times[1:]):9.2f}"
        print(line, flush=True)


@torch.no_grad()
def draw_features(args, data, student, projector, teacher, path) -> None:
    """Embeddings of ten classes' test images: teacher, student before (eval mode, not projected)
    and after, in the plane of the teacher's two largest principal components. A cloud of another
    width stands in a plane of its own."""
    images, labels = data.test_batch(per_class=50, classes=10)
    torch.manual_seed(args.seed)  # the very start of this run
    start = build_model(args.student, data.num_classes, args.pretrained)
    start = start.to(data.device, memory_format=torch.channels_last)
    projector.eval()
    clouds = {"teacher": teacher(images, return_features=True)[1].embedding}
    for name, network in {"student before": start, "student after": student}.items():
        seen = [network.eval()(x, return_features=True)[1].embedding for x in images.split(250)]
        clouds[name] = torch.cat(seen) if name == "student before" else projector(torch.cat(seen))
    one_width = len({x.shape[1] for x in clouds.values()}) == 1
    options = dict(sharex=one_width, sharey=one_width, figsize=(15, 5))
    figure, axes = pyplot().subplots(1, 3, **options)
    planes = {}
    for axis, (name, x) in zip(axes, clouds.items()):
        if x.shape[1] not in planes:  # the teacher's comes first
            centre = x.mean(0)
            planes[x.shape[1]] = centre, torch.linalg.svd(x - centre, full_matrices=False)[2][:2]
        centre, plane = planes[x.shape[1]]  # [D], [2,D]
        shadow = ((x - centre) @ plane.T).cpu().numpy()
        for k in labels.unique().tolist():
            mine = shadow[(labels == k).cpu().numpy()]
            axis.scatter(mine[:, 0], mine[:, 1], s=8, label=as_text(data.classes[k]))
        axis.set_title(name)
    axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def draw_curves(args, history, path) -> None:
    """Cross-entropy and distance over the epochs: means over the training batches, unweighted."""
    figure, axis = pyplot().subplots(figsize=(6, 4))
    epochs = [line["epoch"] for line in history]
    axis.plot(epochs, [line["ce"] for line in history], label="cross-entropy")
    axis.set(xlabel="epoch", ylabel="cross-entropy")
    if args.metric in history[0]:
        other = axis.twinx()
        other.plot(epochs, [line[args.metric] for line in history], "C1--", label=args.metric)
        other.set_ylabel(args.metric)
    figure.legend()
    save_figure(figure, path)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    network = one_of("model", model_names())

    add = parser.add_argument_group("method").add_argument
    add("--teacher", type=network, metavar="NAME", help="(resnet56; paper: resnet34)")
    add("--student", type=network, metavar="NAME", help="(resnet20; paper: resnet18)")
    metrics = one_of("metric", list(METRICS))
    add("--metric", type=metrics, default="w2_empirical", metavar="NAME", help=", ".join(METRICS))
    add("--ce-weight", type=weight, default=1.0, metavar="X", help="of the cross-entropy (1)")
    add("--metric-weight", type=weight, metavar="X", help="of the metric (printed; paper: 1e-4)")
    add("--kd-weight", type=weight, default=0.0, metavar="X", help="of KD beside it (0; usual: 1)")
    add("--temperature", type=positive, default=4.0, metavar="T", help="of KD (4)")
    add("--covariance", choices=("diag", "full"), help="of w2_gaussian, cw2_gaussian (diag)")
    add("--kl-direction", choices=("student", "teacher", "both"), help="whose"
        " Gaussian comes first in kl_gaussian; both: Jeffreys (student)")  # fmt: skip
    add("--class-reduction", choices=("mean", "sum", "freq"), help="over classes,"
        " of cw2_empirical and cw2_gaussian (mean; paper: sum)")  # fmt: skip
    add("--beta", type=weight, metavar="X", help="of the logits in jw2_empirical (1)")
    add("--normalize-by-dim", action="store_true", help="divide the metric by the teacher's width;"
        " the default weight is then 64 times as large")  # fmt: skip
    add("--projector", choices=("none", "linear"), default="none", help="on the student, for"
        " pairs of different width; trained along, thrown away (none)")  # fmt: skip
    add("--bench-metrics", action="store_true", help="only print what each metric costs and is")
    add("--plot", action="store_true", help="draw features.png and curves.png")

    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=tuple(RECIPES), help="paper: torchvision's ResNets with ImageNet"
        " weights, 15 epochs, cosine; then give --dataset (benchmark, or imagenet)")  # fmt: skip
    add("--epochs", type=positive_int, metavar="N", help="drops scale along (240; paper: 15)")
    add("--teacher-epochs", type=positive_int, metavar="N", help="if it must be trained (--epochs)")
    add("--batch-size", type=positive_int, metavar="N", help="(64; paper: 128)")
    add("--teacher-lr", type=positive, metavar="X", help="of a teacher trained here (the same"
        " defaults; --lr does not change it)")  # fmt: skip
    add("--lr", type=positive, metavar="X", help="(0.05; MobileNet, ShuffleNet 0.01; paper: 0.01)")
    add("--momentum", type=below_one, default=0.9, metavar="X", help="(0.9)")
    add("--nesterov", action=YesNo, default=False, help="Nesterov's form of it (no)")
    add("--weight-decay", type=weight, metavar="X", help="(0.0005; paper: 0)")
    add("--pretrained", action=YesNo, help="start from ImageNet weights (no; paper: yes)")

    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.script = "kd2m"
    for name, (metrics, _) in OPTIONS.items():
        if (
            getattr(args, name) is not None
            and args.metric not in metrics
            and not args.bench_metrics
        ):
            raise UserError(f"{flag(name)}: only for --metric {' and '.join(metrics)}")
    args.recipe = args.recipe or ("imagenet" if args.dataset == "imagenet" else "benchmark")
    for name, value in ({n: v for n, (_, v) in OPTIONS.items()} | RECIPES[args.recipe]).items():
        if name != "lr" and getattr(args, name, 0) is None:
            setattr(args, name, value)
    if args.normalize_by_dim and args.metric in ("mmd_rbf", "sliced_w2", "gromov_w2"):
        raise UserError(f"--normalize-by-dim: {args.metric} is no sum over the units")
    args.lr = args.lr or default_lr(args.student, args.recipe)
    args.teacher_lr = args.teacher_lr or default_lr(args.teacher, args.recipe)
    args.teacher_epochs = args.teacher_epochs or args.epochs
    args.nesterov = args.nesterov and args.momentum > 0
    if args.batch_size < 2:
        raise UserError("--batch-size 1: a distribution needs two images or more")
    if args.metric_weight is None:
        args.metric_weight = default_weight(args.metric, args.recipe, args.normalize_by_dim)
        if not args.eval and not args.bench_metrics:
            print(
                f"--metric-weight of {args.metric}: {args.metric_weight:g} (the default)",
                flush=True,
            )
    by_logits = args.metric == "jw2_empirical" and args.beta and args.metric_weight
    if not (args.eval or args.bench_metrics or args.ce_weight or args.kd_weight or by_logits):
        raise UserError("--ce-weight 0: nothing else here trains the classifier")
    args.method = method_name(args)
    args.plot = ("features.png", "curves.png") if args.plot else ()
    if args.plot:
        pyplot()  # fail now, not after the training
    return args


def default_lr(name: str, recipe: str) -> float:
    if recipe == "benchmark" and name.lower().startswith(("mobile", "shuffle")):
        return 0.01
    return RECIPES[recipe]["lr"]


def method_name(args) -> str:
    metric = args.metric
    if metric in ("w2_gaussian", "cw2_gaussian") and args.covariance == "full":
        metric += " full"
    if metric == "kl_gaussian" and args.kl_direction != "student":
        metric += f" {args.kl_direction}"
    if metric.startswith("cw2") and args.class_reduction != "mean":
        metric += f" {args.class_reduction}"
    return "+".join([metric] * bool(args.metric_weight) + ["KD"] * bool(args.kd_weight)) or "CE"


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
    helpers["projector"] = nn.Identity()
    if args.teacher and args.metric_weight:
        width, teacher_width = student_sees.embedding.shape[1], teacher_sees.embedding.shape[1]
        if args.projector == "linear":
            helpers["projector"] = nn.Linear(width, teacher_width, bias=False)
        elif width != teacher_width and args.metric != "gromov_w2":
            raise UserError(
                f"--metric {args.metric}: {args.student}'s embedding is {width} wide,"
                f" {args.teacher}'s {teacher_width}; add --projector linear or take gromov_w2"
            )

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
            # step on that scale. Paper: cosine, a step an epoch, towards a hundredth.
            if args.recipe == "paper":
                lr = args.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * epoch / args.epochs)) / 2)
            else:
                now = recipe["epochs"] * (epoch * steps + step) // (args.epochs * steps)
                lr = args.lr / 10 ** sum(now >= drop for drop in recipe["drops"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward: both networks see the same augmented images.
            with autocast(args, device):
                logits, features = run_student(images, return_features=True)
                embedding = helpers["projector"](features.embedding)
                if args.metric_weight or args.kd_weight:
                    with torch.no_grad():
                        teacher_logits, teacher_features = run_teacher(images, return_features=True)

            # Under torchrun, what is compared between images is gathered from all processes.
            logits, embedding, labels = gather(args, logits, embedding, labels)
            if args.metric_weight or args.kd_weight:
                teacher_emb = teacher_features.embedding
                teacher_logits, teacher_emb = gather(args, teacher_logits, teacher_emb)

            # Losses, outside autocast and in float32. A term of weight 0 is not computed.
            distance = kd = ratio = 0.0
            ce = F.cross_entropy(logits.float(), labels)
            if args.metric_weight:
                inputs = embedding, teacher_emb, labels, logits, teacher_logits
                distance = feature_distance(args, *inputs, seed=shuffle * steps + step)
                # How large the term is beside the cross-entropy: no loss, but worth watching.
                ratio = args.metric_weight * distance.detach() / ce.detach().clamp_min(1e-6)
            if args.kd_weight:
                kd = kd_loss(logits, teacher_logits, args.temperature)
            loss = args.ce_weight * ce + args.metric_weight * distance + args.kd_weight * kd
            terms = {"ce": ce, args.metric: distance, "kd": kd, "ratio": ratio}

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
        pictures = [run.dir / name for name in args.plot]
        draw_features(args, data, student, helpers["projector"], teacher.net, pictures[0])
        draw_curves(args, run.history, pictures[1])
    return run.finish(student, data, teacher)


def program(argv=None) -> None:
    args = parse_args(argv)
    if args.bench_metrics:
        return bench_metrics(args)
    ce = dict(method="CE", ce_weight=1.0, metric_weight=0.0, kd_weight=0.0)
    kd = ce | dict(method="KD", kd_weight=args.kd_weight or 1.0)
    if args.kd_weight:  # the very terms that stand beside the metric
        kd["ce_weight"] = args.ce_weight
    baselines = {"ce": ce, "kd": kd}
    if args.metric != "gromov_w2":  # which may have widths that nothing else compares
        # The control: the same run but for the metric; the same weight where the scale is the same.
        weight = default_weight("mse", args.recipe, args.normalize_by_dim)
        if args.metric in ("w2_empirical", "cw2_empirical"):
            weight = args.metric_weight
        method = "mse+KD" if args.kd_weight else "mse"
        # mse trains no classifier: where jw2_empirical alone did, CE does.
        ce_weight = args.ce_weight if args.kd_weight else args.ce_weight or 1.0
        baselines["mse"] = dict(
            method=method, metric="mse", metric_weight=weight, ce_weight=ce_weight
        )
    launch(main, args, baselines)


if __name__ == "__main__":
    sys.exit(run_program(program))
