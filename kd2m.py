"""KD2M: knowledge distillation as matching the distribution of the features of a minibatch.

Idea: add to the cross-entropy a distance between the student's and the teacher's features, seen as
two sets of vectors rather than as pairs, and choose the distance.

    Montesuma: KD^2M: A unifying framework for feature knowledge distillation, arXiv 2504.01757
    (GSI 2025). Formulas from the author's slides and published code, not from the paper's text.

With student_emb and teacher_emb [B,D], the inputs of the two classifiers for one minibatch:

    loss = ce_weight * ce + metric_weight * distance(student_emb, teacher_emb) + kd_weight * kd

The distance is one of METRICS. Compare it with mse, which pairs each image with itself: mmd_linear
<= w2_gaussian (diag <= full) <= w2_empirical <= cw2_empirical (freq) <= mse on every batch.

    python kd2m.py --metric w2_empirical --compare --seeds 0 1 2    # also CE, KD, mse: 12 runs
    python kd2m.py --metric w2_gaussian --covariance full --out runs/w2-full
    python kd2m.py --recipe paper --dataset svhn --metric cw2_empirical
    python kd2m.py --bench-metrics                                  # what each metric costs

Measured: CIFAR-100 test top-1 (%) of the last epoch, mean ± standard deviation, n = 3 seeds. All
images, 24 epochs, resnet56 -> resnet20: CE 61.38 ± 0.22, KD 63.71 ± 0.21, mse 65.37 ± 0.48. With
10,000 images, 15 epochs, resnet8 (it shows that the code works, not a gain in 240 epochs):
    CE            24.03 ± 0.14    cw2_empirical 35.07 ± 0.94    mmd_rbf       23.16 ± 0.42
    KD            32.03 ± 0.44    cw2_gaussian  35.29 ± 0.43    w2_gaussian   21.22 ± 1.29
    mse           35.29 ± 0.35    jw2_empirical 27.14 ± 0.47    kl_gaussian   19.03 ± 1.39
    w2_empirical  23.83 ± 0.85    mmd_linear    25.73 ± 0.32

Differences from the paper and its code (--recipe paper: the code's pair, schedule and weights):
 1. Every baseline has the method's schedule (code: the plain student's rate stays constant).
 2. cw2_* average over the classes present, as in the slides (code: sum, --class-reduction sum).
 3. jw2_empirical compares student and teacher (code: the student with itself, cost / its maximum).
 4. w2_gaussian has a full covariance too, as in the slides (code: only the diagonal).
 5. kl_gaussian bounds variances from below (code: infinite if a teacher's feature is constant).
 6. CIFAR-10 has its own mean and std (code: CIFAR-100's). The code's Gromov-Wasserstein crashes.
"""

import argparse
import copy
import math
import sys
import timeit

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

import common

# To copy a metric, copy the _helpers it calls too and, for assignments, the scipy import. Use:
#     loss = F.cross_entropy(logits, labels) + 0.05 * w2_gaussian(student_emb, teacher_emb)
# Pass float32: under autocast, call `.float()` on what networks return. Products of matrices are
# float64, which autocast leaves alone: |a|^2 + |b|^2 - 2ab loses digits where a is near b. An
# optimum, such as an assignment, is found without gradient, then held fixed: by the envelope
# theorem the gradient is still right. Variances are biased (1/B). An unknown option: KeyError.


def mse(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Squared error between the student's and the teacher's features of each image: the control.

    Args: student_emb, teacher_emb [B,D]: inputs of the classifiers. Raises: ValueError if these are
        not two [B,D]. Returns: a scalar, D times F.mse_loss. Reference: none, it is the control.
    Default weight: 0.03 (starts near the cross-entropy if D = 64; * 64 / D else).
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    if s.ndim != 2 or s.shape != t.shape:
        raise ValueError(f"needs two [B,D]: {s.shape}, {t.shape}")
    return (s - t).square().sum(1).mean()  # mean_i |s_i - t_i|^2


def _square_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a_i - b_j|^2 in float64: [B,D], [B,D] -> [B,B]."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"needs two [B,D]: {a.shape}, {b.shape}")
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def w2_empirical(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Squared 2-Wasserstein distance of the two sets of features, exact. Default weight: 0.03.

    Args, Returns: see `mse`, which it equals where assigning each image to itself is optimal.
    Raises: ValueError if shapes do not fit, or for nan or infinity. Reference: arXiv 2504.01757.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    # Between two sets of one size with equal weights, a permutation p is an optimal transport plan.
    _, p = linear_sum_assignment(_square_distances(s.detach(), t).cpu().numpy())  # [B]
    return (s - t[p]).square().sum(1).mean()  # min_p mean_i |s_i - t_p(i)|^2


def cw2_empirical(student_emb: torch.Tensor, teacher_emb: torch.Tensor, labels: torch.Tensor,
                  reduction: str = "mean") -> torch.Tensor:  # fmt: skip
    """Class-conditional w2_empirical: an assignment within each class. Default weight: 0.03.

    Args: student_emb, teacher_emb [B,D]; labels [B]; reduction over the C classes present: "mean",
        "sum" or "freq", which weights a class by its share of the batch.
    Returns, Raises, Reference: see `w2_empirical`. A class of one image gives |s - t|^2.
    """
    s, t, y = student_emb, teacher_emb.detach(), labels  # [B,D], [B,D], [B]
    if y.shape != s.shape[:1] or y.min() < 0:
        raise ValueError(f"needs features [B,D] and labels [B] from 0: {s.shape}, {y.shape}")
    _, index, size = y.unique(return_inverse=True, return_counts=True)  # [B], [C]
    ones, size = torch.ones_like(size, dtype=s.dtype), size.to(s.dtype)
    weight = {"mean": ones / len(size), "sum": ones, "freq": size / len(s)}[reduction]  # [C]
    # One assignment for all classes: an infinite cost forbids assigning across classes.
    cost = _square_distances(s.detach(), t).masked_fill(index[:, None] != index, float("inf"))
    _, p = linear_sum_assignment(cost.cpu().numpy())  # [B]
    # sum_y weight_y mean_{i of y} |s_i - t_p(i)|^2
    sums = s.new_zeros(len(size), s.shape[1]).index_add(0, index, (s - t[p]).square())  # [C,D]
    return (weight * (sums / size[:, None]).sum(1)).sum()


def jw2_empirical(student_emb: torch.Tensor, teacher_emb: torch.Tensor,
                  student_logits: torch.Tensor, teacher_logits: torch.Tensor,
                  beta: float = 1.0) -> torch.Tensor:  # fmt: skip
    """Joint w2_empirical: one assignment for features and logits, with gradient to both.

    Args: student_emb, teacher_emb [B,D]; student_logits, teacher_logits [B,K]; beta >= 0: weight
        of the logits' squared distance. The published code has this distance, with beta 1.
    Returns, Raises, Reference: see `w2_empirical`. Default weight: 0.003, as the logits add to it.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    u, v = student_logits, teacher_logits.detach()  # [B,K]
    if len(s) != len(u):
        raise ValueError(f"needs features and logits of the same images: {s.shape}, {u.shape}")
    cost = _square_distances(s.detach(), t) + beta * _square_distances(u.detach(), v)  # [B,B]
    _, p = linear_sum_assignment(cost.cpu().numpy())  # [B]
    # min_p mean_i (|s_i - t_p(i)|^2 + beta |u_i - v_p(i)|^2)
    return ((s - t[p]).square().sum(1) + beta * (u - v[p]).square().sum(1)).mean()


def _nuclear_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of the singular values; gradient U V^T, without those singular values that are 0."""
    u, sigma, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    kept = sigma > max(matrix.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    return (((u * kept) @ vh) * matrix).sum()


def w2_gaussian(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, cov: str = "diag"
) -> torch.Tensor:
    """Squared 2-Wasserstein distance of the two Gaussians that have the features' moments.

    Args: student_emb, teacher_emb [B,D]; cov: "diag" (published code) or "full" (slides). Both are
        biased upwards if B is small, "full" more: use B well above D.
    Returns, Raises: see `mse`. Default weight: 0.05. Reference: arXiv 2504.01757.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    if s.ndim != 2 or s.shape != t.shape:
        raise ValueError(f"needs two [B,D]: {s.shape}, {t.shape}")
    dtype = {"diag": s.dtype, "full": torch.float64}[cov]
    s, t = s.to(dtype), t.to(dtype)
    mean_s, mean_t = s.mean(0), t.mean(0)  # [D]
    gap, a, b = (mean_s - mean_t).square().sum(), s - mean_s, t - mean_t
    if cov == "diag":
        # clamp_min: the gradient of the root at variance 0 is then 0 instead of infinite.
        sigma_s, sigma_t = (x.square().mean(0).clamp_min(1e-36).sqrt() for x in (a, b))  # [D]
        return gap + (sigma_s - sigma_t).square().sum()  # |mu_s - mu_t|^2 + |sigma_s - sigma_t|^2
    # |mu_s - mu_t|^2 + tr cov_s + tr cov_t - 2 tr (cov_s^1/2 cov_t cov_s^1/2)^1/2. The last is the
    # nuclear norm of a b^T / len(a), [B,B], also if covariances are singular. (a^T b is wrong.)
    traces = (a.square() + b.square()).sum() / len(a)
    return (gap + traces - 2 * _nuclear_norm(a @ b.T) / len(a)).to(student_emb.dtype)


def cw2_gaussian(student_emb: torch.Tensor, teacher_emb: torch.Tensor, labels: torch.Tensor,
                 reduction: str = "mean", cov: str = "diag") -> torch.Tensor:  # fmt: skip
    """Class-conditional w2_gaussian: moments within each class. Default weight: 0.03.

    Args, Returns, Raises, Reference: see `cw2_empirical` and `w2_gaussian`.
    """
    s, t, y = student_emb, teacher_emb.detach(), labels  # [B,D], [B,D], [B]
    if s.ndim != 2 or s.shape != t.shape or y.shape != s.shape[:1] or y.min() < 0:
        raise ValueError(f"needs two [B,D], labels [B] from 0: {s.shape}, {t.shape}, {y.shape}")
    dtype = {"diag": s.dtype, "full": torch.float64}[cov]
    s, t = s.to(dtype), t.to(dtype)
    _, index, size = y.unique(return_inverse=True, return_counts=True)  # [B], [C]
    ones, size = torch.ones_like(size, dtype=s.dtype), size.to(s.dtype)
    weight = {"mean": ones / len(size), "sum": ones, "freq": size / len(s)}[reduction]  # [C]

    def class_mean(x):  # [B,D] -> [C,D]
        return x.new_zeros(len(size), x.shape[1]).index_add(0, index, x) / size[:, None]

    mean_s, mean_t = class_mean(s), class_mean(t)  # [C,D]
    a, b = s - mean_s[index], t - mean_t[index]  # [B,D], centred within the class
    var_s, var_t = class_mean(a.square()), class_mean(b.square())  # [C,D]
    gap = (mean_s - mean_t).square().sum(1)  # [C]
    if cov == "diag":
        sigma_s, sigma_t = (var.clamp_min(1e-36).sqrt() for var in (var_s, var_t))  # [C,D]
        # sum_y weight_y (|mu_s - mu_t|^2 + |sigma_s - sigma_t|^2)
        return (weight * (gap + (sigma_s - sigma_t).square().sum(1))).sum()
    # As in w2_gaussian, class by class. The matrices weight_y A_y B_y^T / n_y are the blocks of one
    # [B,B] matrix, whose nuclear norm is the sum of theirs.
    blocks = (a @ b.T) * (index[:, None] == index) * (weight / size)[index]
    w2 = (weight * (gap + (var_s + var_t).sum(1))).sum() - 2 * _nuclear_norm(blocks)
    return w2.to(student_emb.dtype)


def _floored_moments(s, t, floor):
    """Means and variances [D] of s and t, none below `floor` times the mean variance of t."""
    if s.ndim != 2 or s.shape != t.shape or len(s) < 2:
        raise ValueError(f"needs two [B,D], B >= 2: {s.shape}, {t.shape}")
    mean_s, mean_t = s.mean(0), t.mean(0)
    var_s, var_t = (s - mean_s).square().mean(0), (t - mean_t).square().mean(0)
    least = (floor * var_t.mean()).clamp_min(1e-12)
    return mean_s, torch.maximum(var_s, least), mean_t, torch.maximum(var_t, least)


def kl_gaussian(student_emb: torch.Tensor, teacher_emb: torch.Tensor, direction: str = "student",
                floor: float = 1e-3) -> torch.Tensor:  # fmt: skip
    """KL divergence of the two diagonal Gaussians that have the features' moments.

    Args: student_emb, teacher_emb [B,D], B >= 2; direction: "student" KL(S || T) (published code),
        "teacher" KL(T || S), "both" their sum (ours); floor: least variance, as a share of the
        teacher's mean variance. (Diagonal, as full covariances are singular where B <= D.)
    Returns: a scalar in nats. Raises: see `mse`. Default weight: 0.1. Reference: arXiv 2504.01757.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    mean_s, var_s, mean_t, var_t = _floored_moments(s, t, floor)  # [D]
    gap = (mean_s - mean_t).square()
    # KL(P || Q) = 1/2 sum_k [ v_P / v_Q + (mu_P - mu_Q)^2 / v_Q - 1 - log(v_P / v_Q) ]
    student = ((var_s + gap) / var_t - 1 - (var_s / var_t).log()).sum() / 2
    teacher = ((var_t + gap) / var_s - 1 - (var_t / var_s).log()).sum() / 2
    return {"student": student, "teacher": teacher, "both": student + teacher}[direction]


def mmd_linear(student_emb: torch.Tensor, teacher_emb: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy with the kernel a.b: the means alone. Default weight: 0.2.

    Args, Returns, Raises: see `mse`. Reference: published code of arXiv 2504.01757.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    if s.ndim != 2 or s.shape != t.shape:
        raise ValueError(f"needs two [B,D]: {s.shape}, {t.shape}")
    return (s.mean(0) - t.mean(0)).square().sum()  # |mu_s - mu_t|^2


def mmd_rbf(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, bandwidth: float | None = None
) -> torch.Tensor:
    """Squared maximum mean discrepancy, kernel k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)); biased.

    Args: student_emb, teacher_emb [B,D]; bandwidth: None takes the mean of all 3 B^2 distances in
        and between the two sets, without gradient.
    Returns: a scalar from 0 to 2. Default weight: 20. Raises, Reference: see `mse`, `mmd_linear`.
    """
    s, t = student_emb, teacher_emb.detach().clone()  # autograd cannot save an inference_mode t
    ss, tt, st = (_square_distances(a, b) for a, b in ((s, s), (t, t), (s, t)))  # [B,B]
    if bandwidth is None:
        bandwidth = torch.stack([ss, tt, st]).detach().sqrt().mean().clamp_min(1e-12)
    # mean_ij k(s_i, s_j) + mean_ij k(t_i, t_j) - 2 mean_ij k(s_i, t_j)
    ss, tt, st = ((-d / (2 * bandwidth**2)).exp().mean() for d in (ss, tt, st))
    return (ss + tt - 2 * st).to(s.dtype)


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


# From here to METRICS: additions of ours, not in the paper.
def sinkhorn(student_emb: torch.Tensor, teacher_emb: torch.Tensor, reg: float = 0.1,
             tolerance: float = 1e-2, iterations: int = 100) -> torch.Tensor:  # fmt: skip
    """Debiased Sinkhorn divergence: near w2_empirical for a small reg, mmd_linear for a large one.

    Args: student_emb, teacher_emb [B,D]; reg: weight of the entropy, as a share of the mean cost;
        tolerance: relative error of the plans' marginals at which to stop; iterations: at most.
    Returns, Raises: see `mse`. Default weight: 0.05.
    """
    s, t = student_emb, teacher_emb.detach().clone()  # [B,D], a copy as in mmd_rbf
    cost = torch.stack([_square_distances(a, b) for a, b in ((s, t), (s, s), (t, t))])  # [3,B,B]
    eps = (reg * cost[0].detach().mean()).clamp_min(1e-30)
    scaled = cost.detach() / eps
    f = g = torch.zeros_like(scaled[:, 0])  # dual potentials, divided by eps  [3,B]
    log_n = f.new_tensor(len(s)).log()
    for _ in range(iterations):
        # f_i = -log mean_j exp(g_j - C_ij / eps), and g likewise; both at once, so damped by half
        new_f = log_n - (g[:, None, :] - scaled).logsumexp(2)
        new_g = log_n - (f[:, :, None] - scaled).logsumexp(1)
        error = torch.maximum((new_f - f).abs().max(), (new_g - g).abs().max())
        f, g = (f + new_f) / 2, (g + new_g) / 2
        if error < tolerance:
            break
    # OT_eps = eps max_fg [ mean f + mean g + 1 - mean_ij exp(f_i + g_j - C_ij / eps) ]
    plan = (f[:, :, None] + g[:, None, :] - cost / eps).exp()
    ot = eps * (f.mean(1) + g.mean(1) + 1 - plan.mean((1, 2)))  # [3]
    return (ot[0] - ot[1] / 2 - ot[2] / 2).to(s.dtype)  # OT(S, T) - OT(S, S) / 2 - OT(T, T) / 2


def sliced_w2(student_emb: torch.Tensor, teacher_emb: torch.Tensor, projections: int = 128,
              seed: int | None = None) -> torch.Tensor:  # fmt: skip
    """Mean of the squared W2 of the features' projections on random directions.

    Args: student_emb, teacher_emb [B,D]; projections: number of directions; seed: of the
        directions, None draws new ones at each call from torch's CPU generator.
    Returns, Raises: see `mse`. Default weight: 4, as a mean over directions is no sum over D.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    if s.ndim != 2 or s.shape != t.shape:
        raise ValueError(f"needs two [B,D]: {s.shape}, {t.shape}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    lines = torch.randn(s.shape[1], projections, generator=generator, dtype=torch.float64)
    lines = (lines / lines.norm(dim=0)).to(s.device)  # [D,L], uniform on the sphere
    # On a line the optimal assignment is by rank.
    gap = (s.double() @ lines).sort(0)[0] - (t.double() @ lines).sort(0)[0]  # [B,L]
    return gap.square().mean().to(s.dtype)


def hellinger(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, floor: float = 1e-3
) -> torch.Tensor:
    """-log(1 - H^2), H the Hellinger distance of the diagonal Gaussians with the features' moments.

    Milder than `kl_gaussian`: see there for Args, Returns, Raises. Default weight: 0.2.
    """
    s, t = student_emb, teacher_emb.detach()  # [B,D]
    mean_s, var_s, mean_t, var_t = _floored_moments(s, t, floor)  # [D]
    var = (var_s + var_t) / 2
    # sum_k [ (mu_s - mu_t)^2 / (8 v) + log(v / sqrt(v_s v_t)) / 2 ], v = (v_s + v_t) / 2
    logs = ((var / var_s).log() + (var / var_t).log()) / 4
    return ((mean_s - mean_t).square() / (8 * var) + logs).sum()


def gromov_w2(
    student_emb: torch.Tensor, teacher_emb: torch.Tensor, start: str = "profile", steps: int = 20
) -> torch.Tensor:
    """Gromov-Wasserstein: compares squared distances within each set. Default weight: 1e-4.

    The exact minimum is too hard to find (a quadratic problem): each step solves the problem
    linearised at the last assignment, until the cost no longer falls.
    Args: student_emb [B,D], teacher_emb [B,E], of any two dimensions; start: "profile" assigns by
        the sorted distances to the others, "identity" each image to itself; steps: at most.
    Returns: a scalar, fourth power of feature units. Raises: see `w2_empirical`.
    """
    s, t, starts = student_emb, teacher_emb.detach(), ("profile", "identity")
    if s.ndim != 2 or t.ndim != 2 or len(s) != len(t) or start not in starts:
        raise ValueError(f"needs [B,D], [B,E], start in {starts}: {s.shape}, {t.shape}, {start}")
    within_s, within_t = _square_distances(s, s), _square_distances(t, t)  # [B,B]
    fixed, p = within_s.detach(), torch.arange(len(s))
    if start == "profile":
        profiles = _square_distances(fixed.sort(1)[0], within_t.sort(1)[0])
        _, p = linear_sum_assignment(profiles.cpu().numpy())
    least = (fixed - within_t[p][:, p]).square().mean()
    for _ in range(steps):
        # d cost / d plan[i, j] is, but for constants, -sum_k |s_i - s_k|^2 |t_p(k) - t_j|^2
        _, candidate = linear_sum_assignment((-fixed @ within_t[p]).cpu().numpy())
        cost = (fixed - within_t[candidate][:, candidate]).square().mean()
        if cost >= least:
            break
        p, least = candidate, cost
    # mean_ij (|s_i - s_j|^2 - |t_p(i) - t_p(j)|^2)^2
    return (within_s - within_t[p][:, p]).square().mean().to(s.dtype)


METRICS = {
    "mse": mse, "w2_empirical": w2_empirical, "cw2_empirical": cw2_empirical,
    "jw2_empirical": jw2_empirical, "w2_gaussian": w2_gaussian, "cw2_gaussian": cw2_gaussian,
    "kl_gaussian": kl_gaussian, "mmd_linear": mmd_linear, "mmd_rbf": mmd_rbf,
    "sinkhorn": sinkhorn, "sliced_w2": sliced_w2, "hellinger": hellinger, "gromov_w2": gromov_w2,
}  # fmt: skip


def feature_distance(args, s, t, labels, student_logits, teacher_logits, seed=None):
    """The metric of the command line, with its options; a UserError where it has no value."""
    more = {  # what the metric takes besides the features
        "cw2_empirical": (labels, args.class_reduction),
        "jw2_empirical": (student_logits, teacher_logits, args.beta),
        "w2_gaussian": (args.covariance,),
        "cw2_gaussian": (labels, args.class_reduction, args.covariance),
        "kl_gaussian": (args.kl_direction,),
        "sliced_w2": (128, seed),  # seeded, so that all ranks draw the same directions
    }
    try:
        distance = METRICS[args.metric](s, t, *more.get(args.metric, ()))
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise common.UserError(f"--metric {args.metric}: {error}; if nan, lower --lr") from None
    return distance / t.shape[1] if args.normalize_by_dim else distance


def distill(args) -> dict:
    """Train a student and return its result; without args.teacher: plain training, of a teacher."""
    data = common.load_data(args)
    run = common.Run(args, data, figures=("features.png",) if args.plot else ())
    recipe = RECIPES[args.recipe]

    # Networks. Seeded here, so that their start does not depend on what happened before.
    torch.manual_seed(args.seed)
    student = common.build_for(data, args.student, args.pretrained)
    teacher = common.build_for(data, args.teacher) if args.teacher else None

    # The projector is trained beside the student and discarded after training.
    projector = nn.Identity()
    if teacher and (args.metric_weight or args.plot):
        if args.projector == "linear":
            projector = nn.Linear(student.embed_dim, teacher.embed_dim, bias=False)
        elif student.embed_dim != teacher.embed_dim and (args.metric != "gromov_w2" or args.plot):
            flag = "--plot" if args.metric == "gromov_w2" else f"--metric {args.metric}"
            dims = f"feature dimensions {student.embed_dim} and {teacher.embed_dim} differ"
            raise common.UserError(f"{flag}: {dims}; add --projector linear")

    # The teacher's weights: from a file, or trained first by this very function. Frozen from here.
    if teacher:
        teacher = common.load_teacher(teacher, args, data, distill)

    student = student.to(data.device, memory_format=torch.channels_last)
    projector = projector.to(data.device)
    at_start = copy.deepcopy((student, projector)) if args.plot else None
    trained = [*student.parameters(), *projector.parameters()]
    optimizer = common.sgd_or_adamw(args, trained)
    run.start(student=student, projector=projector, optimizer=optimizer, teacher=teacher)

    for epoch in run.epochs():
        student.train()
        projector.train()
        for images, labels in run.batches():
            # Schedule. Paper: cosine to lr / 100. Else milestones, in epochs of the full recipe.
            if args.recipe == "paper":
                lr = args.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * epoch / args.epochs)) / 2)
            else:
                now = recipe["epochs"] * run.step // run.total_steps
                lr = args.lr / 10 ** sum(now >= m for m in recipe["milestones"])
            common.set_lr(optimizer, lr, run)

            # Forward: both networks see the same augmented images.
            with common.autocast(args):
                logits, features = student(images, return_features=True)
                student_emb = projector(features.embedding)
                if args.metric_weight or args.kd_weight:
                    teacher_logits, teacher_features = run.ask_teacher(images)
                    teacher_emb = teacher_features.embedding

            # Under torchrun the loss sees the whole batch. From here on everything is float32.
            logits, student_emb, labels = run.all_gather(logits, student_emb, labels)
            if args.metric_weight or args.kd_weight:
                teacher_logits, teacher_emb = run.all_gather(teacher_logits, teacher_emb)

            # A term of weight 0 stays 0.0 and is not logged. ratio is for watching, not trained.
            distance = kd = ratio = 0.0
            ce = F.cross_entropy(logits, labels)
            if args.metric_weight:
                inputs = student_emb, teacher_emb, labels, logits, teacher_logits
                distance = feature_distance(args, *inputs, seed=run.step_seed)
                ratio = args.metric_weight * distance.detach() / ce.detach().clamp_min(1e-6)
            if args.kd_weight:
                kd = kd_loss(logits, teacher_logits, args.temperature)
            loss = args.ce_weight * ce + args.metric_weight * distance + args.kd_weight * kd

            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(optimizer)
            optimizer.step()
            run.log({"ce": ce, args.metric: distance, "kd": kd, "ratio": ratio}, labels, logits)
            features = teacher_features = None  # frees the feature maps before the next forward
        run.end_epoch(test_top1=common.evaluate(student, data, args))

    if args.plot:
        at_end = student.eval(), projector.eval()
        draw_features(data, at_start, at_end, teacher, run.dir / "features.png")
    return run.finish()


@torch.no_grad()
def draw_features(data, at_start, at_end, teacher, path) -> None:
    """Both sets of features of 200 test images, before and after training, in the plane of the
    teacher's two principal components. Lines: w2_empirical's assignment, for every fourth image."""
    images, _ = data.test_batch(per_class=20, classes=10)
    t = teacher(images, return_features=True)[1].embedding  # [B,D]
    plane = torch.linalg.svd(t - t.mean(0), full_matrices=False)[2][:2]  # [2,D]
    figure, axes = common.pyplot().subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True)
    columns = zip(axes, ("before training", "after training"), (at_start, at_end))
    for axis, title, (student, projector) in columns:
        s = projector(student(images, return_features=True)[1].embedding)
        s = s.nan_to_num()  # not finite: the student has diverged
        _, p = linear_sum_assignment(_square_distances(s, t).cpu().numpy())  # [B]
        pairs = (torch.stack([s, t[p]]) - t.mean(0)) @ plane.T  # [2,B,2]
        axis.plot(*pairs[:, ::4].permute(2, 0, 1).cpu(), color="gray", linewidth=0.8)
        axis.plot(*pairs[0].T.cpu(), "^", color="#0072B2", markersize=5, label="student")
        axis.plot(*pairs[1].T.cpu(), "o", color="#D55E00", markersize=5, label="teacher")
        axis.set_title(title)
    axes[0].legend()
    common.save_figure(figure, path)


def bench_metrics(args) -> None:
    """Print the time of each metric, forward and backward, on random features with D = 64."""
    device = common.pick_device(args.device)
    s, t, z_s, z_t = torch.randn(4, args.batch_size, 64, device=device)  # features and logits
    labels = torch.randint(64, (args.batch_size,), device=device)
    for name in METRICS:
        options = argparse.Namespace(**{**vars(args), "metric": name})
        inputs = options, s.requires_grad_(), t, labels, z_s, z_t, 0
        step = "f(*x).backward(); s.grad.sum().item()"  # item() waits for a GPU
        names = {"f": feature_distance, "x": inputs, "s": s}
        seconds = min(timeit.repeat(step, globals=names, number=1, repeat=10))
        print(f"{name:15}{1000 * seconds:8.2f} ms", flush=True)


# Default --metric-weight, not tuned: at the start, if D = 64, the term is near the cross-entropy.
WEIGHTS = {
    "mse": 0.03, "w2_empirical": 0.03, "cw2_empirical": 0.03, "jw2_empirical": 0.003,
    "w2_gaussian": 0.05, "cw2_gaussian": 0.03, "kl_gaussian": 0.1, "mmd_linear": 0.2,
    "mmd_rbf": 20.0, "sinkhorn": 0.05, "sliced_w2": 4.0, "hellinger": 0.2, "gromov_w2": 1e-4,
}  # fmt: skip
OURS = ("sinkhorn", "sliced_w2", "hellinger", "gromov_w2")
RECIPES = {
    "benchmark": dict(  # RepDistiller's, usual in the field for CIFAR-100
        teacher="resnet56", student="resnet20", epochs=240, batch_size=64, lr=0.05, small_lr=0.01,
        nesterov=False, weight_decay=5e-4, milestones=(150, 180, 210), class_reduction="mean",
    ),
    "imagenet": dict(  # chosen by --dataset imagenet; the paper has no ImageNet
        teacher="resnet34", student="resnet18", epochs=100, batch_size=256, lr=0.1,
        nesterov=False, weight_decay=1e-4, milestones=(30, 60, 90), class_reduction="mean",
    ),
    "paper": dict(  # the published code's
        teacher="resnet34", student="resnet18", epochs=15, batch_size=128, lr=0.01,
        nesterov=False, weight_decay=0.0, pretrained=True, class_reduction="sum",
    ),
}  # fmt: skip


def default_weight(args, metric: str) -> float:
    weight = 1e-4 if args.recipe == "paper" and metric not in OURS else WEIGHTS[metric]
    return weight * 64 if args.normalize_by_dim else weight


def parse_args(argv=None) -> argparse.Namespace:
    parser = common.Parser("kd2m", __doc__)
    add, weight = parser.add_argument_group("method").add_argument, common.weight
    add("--metric", type=common.one_of("metric", list(METRICS)), default="w2_empirical",
        metavar="NAME", help=f"{', '.join(METRICS)} (default: w2_empirical)")  # fmt: skip
    add("--ce-weight", type=weight, default=1.0, help="weight of the cross-entropy (default: 1)")
    add("--metric-weight", type=weight, help="weight (default: the metric's own; paper: 1e-4)")
    add("--kd-weight", type=weight, default=0.0, help="weight of KD (default: 0)")
    add("--temperature", type=common.positive, default=4.0, help="temperature of KD (default: 4)")
    add("--covariance", choices=("diag", "full"), default="diag",
        help="covariance in w2_gaussian and cw2_gaussian (default: diag)")  # fmt: skip
    add("--kl-direction", choices=("student", "teacher", "both"), default="student",
        help="KL(S || T), KL(T || S) or their sum (default: student)")  # fmt: skip
    add("--class-reduction", choices=("mean", "sum", "freq"),
        help="over classes, of cw2_* (default: mean; paper: sum)")  # fmt: skip
    add("--beta", type=weight, default=1.0, help="jw2_empirical: weight of logits (default: 1)")
    add("--normalize-by-dim", action="store_true", help="divide the metric by D (default: no)")
    add("--projector", choices=("none", "linear"), default="none",
        help="linear: a trained map on the student's features (default: none)")  # fmt: skip
    add("--bench-metrics", action="store_true", help="only print what each metric costs")
    add("--plot", action="store_true", help="draw features.png")
    add("--recipe", choices=tuple(RECIPES), help="paper: the published code's set-up, to be used"
        " with --dataset (default: benchmark; with --dataset imagenet: imagenet)")  # fmt: skip
    common.add_recipe_arguments(parser, RECIPES)
    common.add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.recipe = args.recipe or ("imagenet" if args.dataset == "imagenet" else "benchmark")
    common.fill_recipe(args, RECIPES[args.recipe])
    if args.metric_weight is None:
        args.metric_weight = default_weight(args, args.metric)
        print(f"--metric-weight of {args.metric} (default): {args.metric_weight:g}", flush=True)
    on_logits = args.metric == "jw2_empirical" and args.metric_weight and args.beta
    if not (args.ce_weight or args.kd_weight or on_logits or args.eval or args.bench_metrics):
        raise common.UserError("--ce-weight 0: nothing else here trains the classifier")
    if args.covariance == "full" and "w2_gaussian" not in args.metric and not args.bench_metrics:
        raise common.UserError("--covariance full: only w2_gaussian and cw2_gaussian have it")
    terms = {args.metric: args.metric_weight, "KD": args.kd_weight}
    args.method = "+".join(name for name, value in terms.items() if value) or "CE"
    return args


def main(argv=None):
    """Parse the command line and run it. Returns: the result, or a list of several."""
    args = parse_args(argv)
    if args.bench_metrics:
        return bench_metrics(args)
    ce = dict(method="CE", ce_weight=1.0, metric_weight=0.0, kd_weight=0.0, plot=False)
    kd = ce | dict(method="KD", kd_weight=1.0)
    # The control: mse as the metric, at the same weight where the scale is the same.
    same_scale = args.metric in ("w2_empirical", "cw2_empirical")
    mse_weight = args.metric_weight if same_scale else default_weight(args, "mse")
    control = dict(method="mse", metric="mse", metric_weight=mse_weight)
    control["ce_weight"] = args.ce_weight or 1.0  # mse alone does not train the classifier
    if args.kd_weight:  # CE and KD have the weights that they have beside the metric
        kd |= dict(ce_weight=args.ce_weight, kd_weight=args.kd_weight)
        control |= dict(method="mse+KD", ce_weight=args.ce_weight)
    baselines = dict(ce=ce, kd=kd, mse=control)
    if args.metric == "gromov_w2" or not args.metric_weight:  # any dimensions; nothing to control
        del baselines["mse"]
    return common.launch(distill, args, baselines)


if __name__ == "__main__":
    sys.exit(common.run_program(main))
