"""Every public loss as its equation says it: plain loops over Python numbers, in double precision.

An oracle has the name and the arguments of its loss and shares no line with it. It takes nested
lists of numbers and returns a number; `gradients` differentiates it by central differences. LOSSES
says for each loss where it stands and what it is called with.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

# --- Words that the equations share ---------------------------------------------------------------


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def norm(a):
    return math.sqrt(dot(a, a))


def unit(a):
    """a / |a|; a vector of zeros has no direction and stays."""
    length = norm(a)
    return [x / length for x in a] if length > 0 else [0.0 for _ in a]


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b))


def log_softmax(z, temperature=1.0):
    z = [x / temperature for x in z]
    log_sum = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
    return [x - log_sum for x in z]


def kl(log_p, log_q):
    """KL(p || q) of two distributions given by their logarithms."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q))


def transpose(rows):
    return [list(column) for column in zip(*rows)]


def flat(nested):
    if not isinstance(nested, list):
        return [nested]
    return [x for part in nested for x in flat(part)]


def square_mean(a, b):
    """|A - B|_F^2 over the number of entries."""
    return mean((x - y) ** 2 for x, y in zip(flat(a), flat(b)))


# --- nd.py ----------------------------------------------------------------------------------------


def nd_loss(student_emb, teacher_emb, class_means, labels):
    """mean_i [ 1 - s_i . e_y / max(|s_i|, |t_i|) ]"""
    total = 0.0
    for s, t, y in zip(student_emb, teacher_emb, labels):
        longer = max(norm(s), norm(t))
        total += 1 - (dot(s, unit(class_means[y])) / longer if longer > 0 else 0.0)
    return total / len(labels)


def direction_loss(student_emb, class_means, labels):
    """mean_i [ 1 - cos(s_i, c_y) ]"""
    return mean(1 - dot(unit(s), unit(class_means[y])) for s, y in zip(student_emb, labels))


def norm_loss(student_emb, teacher_emb):
    """mean_i relu(1 - |s_i| / |t_i|)"""
    pairs = [(norm(s), norm(t)) for s, t in zip(student_emb, teacher_emb)]
    return mean(max(0.0, 1 - s / t) if t > 0 else 0.0 for s, t in pairs)


def kd_loss(student_logits, teacher_logits, temperature=4.0):
    """T^2 mean_i KL(softmax(teacher_i / T) || softmax(student_i / T))"""
    pairs = zip(teacher_logits, student_logits)
    kls = [kl(log_softmax(t, temperature), log_softmax(s, temperature)) for t, s in pairs]
    return temperature**2 * mean(kls)


def dkd_loss(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0):
    """T^2 mean_i (alpha TCKD_i + beta NCKD_i)"""
    total = 0.0
    for s, t, y in zip(student_logits, teacher_logits, labels):
        log_q, log_p = log_softmax(s, temperature), log_softmax(t, temperature)

        def true_or_not(log_row, y=y):  # the masses of the true class and of all others
            rest = [x for k, x in enumerate(log_row) if k != y]
            top = max(rest)
            return [log_row[y], top + math.log(sum(math.exp(x - top) for x in rest))]

        def others(logits, y=y):  # the distribution among the others alone
            return log_softmax([x for k, x in enumerate(logits) if k != y], temperature)

        tckd = kl(true_or_not(log_p), true_or_not(log_q))
        nckd = kl(others(t), others(s))
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(labels)


def dist_loss(student_logits, teacher_logits, beta=1.0, gamma=1.0, temperature=4.0):
    """T^2 [ beta (1 - mean Pearson of the rows) + gamma (1 - mean Pearson of the columns) ]"""

    def pearson(a, b):
        a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
        return dot(a, b) / (norm(a) * norm(b) + 1e-8)

    q = [[math.exp(x) for x in log_softmax(row, temperature)] for row in student_logits]
    p = [[math.exp(x) for x in log_softmax(row, temperature)] for row in teacher_logits]
    rows = mean(pearson(a, b) for a, b in zip(q, p))
    columns = mean(pearson(a, b) for a, b in zip(transpose(q), transpose(p)))
    return temperature**2 * (beta * (1 - rows) + gamma * (1 - columns))


def convolution(x, weight, bias, padding):
    """[B,C,H,W] * [O,C,k,k], stride 1."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    size = weight.shape[-1]
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    out = np.zeros((len(x), len(weight), height, width))
    for o, i, j in itertools.product(range(len(weight)), range(height), range(width)):
        patch = x[:, :, i : i + size, j : j + size]
        out[:, o, i, j] = (patch * weight[o]).sum((1, 2, 3)) + bias[o]
    return out


def batch_norm(x, gain, shift):
    out = np.empty_like(x)
    for c in range(x.shape[1]):
        centred = x[:, c] - x[:, c].mean()
        out[:, c] = centred / math.sqrt((centred**2).mean() + 1e-5) * gain[c] + shift[c]
    return out


def nearest(x, height, width):
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [j * x.shape[3] // width for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


def ReviewKD(student_map_0, student_map_1, teacher_map_0, teacher_map_1, **parameters):
    """Two levels in train mode; -> their weighted sum, as `call_review` makes a number of them.

    x_l = gate (conv1x1(map_l), what level l + 1 had); result_l = conv3x3(x_l at the teacher's size)
    """
    p = {name: np.array(value) for name, value in parameters.items()}
    student = [np.array(student_map_0), np.array(student_map_1)]
    teacher = [np.array(teacher_map_0), np.array(teacher_map_1)]

    def conv_bn(x, name, padding):
        weight = p[f"{name}.0.weight"]
        x = convolution(x, weight, np.zeros(len(weight)), padding)
        return batch_norm(x, p[f"{name}.1.weight"], p[f"{name}.1.bias"])

    deep = nearest(conv_bn(student[1], "inward.1", 0), *teacher[1].shape[2:])
    shallow = conv_bn(student[0], "inward.0", 0)
    residual = nearest(deep, *shallow.shape[2:])
    both = np.concatenate([shallow, residual], 1)
    gate = 1 / (1 + np.exp(-convolution(both, p["attention.0.weight"], p["attention.0.bias"], 0)))
    shallow = shallow * gate[:, :1] + residual * gate[:, 1:]
    shallow = nearest(shallow, *teacher[0].shape[2:])
    results = conv_bn(shallow, "outward.0", 1), conv_bn(deep, "outward.1", 1)
    return sum(x * math.cos(i + k) for i in (0, 1) for k, x in enumerate(results[i].flatten()))


def hcl_loss(**maps):
    """sum over levels of sum_n w_n MSE(pooled to n x n) / sum_n w_n; n: full, 4, 2, 1; w halves"""
    total = 0.0
    for level in range(len(maps) // 2):
        s, t = maps[f"student_map_{level}"], maps[f"teacher_map_{level}"]
        size = len(s[0][0])
        value = weights = 0.0
        for order, n in enumerate([size] + [n for n in (4, 2, 1) if n < size]):
            squares = []
            for image_s, image_t in zip(s, t):
                for plane_s, plane_t in zip(image_s, image_t):
                    small = shrink(plane_s, n, n), shrink(plane_t, n, n)
                    squares += [(a - b) ** 2 for a, b in zip(*map(flat, small))]
            value += 0.5**order * mean(squares)
            weights += 0.5**order
        total += value / weights
    return total


def shrink(plane, height, width):
    """Average of the cells of a height x width grid; cells overlap where sizes do not divide."""

    def cells(size, count):
        return [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]

    rows, columns = cells(len(plane), height), cells(len(plane[0]), width)
    return [[mean(plane[i][j] for i in r for j in c) for c in columns] for r in rows]


# --- sp.py ----------------------------------------------------------------------------------------


def similarities(vectors):
    """Gram matrix with rows of length 1."""
    return [unit([dot(a, b) for b in vectors]) for a in vectors]


def sp_loss(student_map, teacher_map):
    """|G_T - G_S|_F^2 / B^2"""
    s, t = [flat(x) for x in student_map], [flat(x) for x in teacher_map]
    return square_mean(similarities(s), similarities(t))


def cc_loss(student_emb, teacher_emb, gamma=0.4):
    """|K_T - K_S|_F^2 / B^2; K_ij = exp(-gamma |x_i - x_j|^2) up to the square, |x_i| = 1

    |x_i - x_j|^2 = 2 - 2 x_i.x_j, so K_ij = exp(-2 gamma) exp(u), u = 2 gamma x_i.x_j.
    """

    def kernel(rows):
        x = [unit(flat(row)) for row in rows]
        exponents = [[2 * gamma * dot(a, b) for b in x] for a in x]
        return [[math.exp(-2 * gamma) * (1 + u + u**2 / 2) for u in row] for row in exponents]

    return square_mean(kernel(student_emb), kernel(teacher_emb))


def smaller_size(student_map, teacher_map):
    sizes = [(len(x[0][0]), len(x[0][0][0])) for x in (student_map, teacher_map)]
    return min(s[0] for s in sizes), min(s[1] for s in sizes)


def intra_loss(student_map, teacher_map):
    """mean over images of |G_T - G_S|_F^2 / (HW)^2, G of the vectors at the spatial positions"""
    size = smaller_size(student_map, teacher_map)

    def gram(image):
        planes = [flat(shrink(plane, *size)) for plane in image]
        return similarities(transpose(planes))

    return mean(square_mean(gram(s), gram(t)) for s, t in zip(student_map, teacher_map))


def at_loss(student_map, teacher_map):
    """mean over images and positions of (A_S - A_T)^2; A = unit vector of mean_c x_c^2"""
    size = smaller_size(student_map, teacher_map)

    def attention(image):
        planes = [flat(shrink(plane, *size)) for plane in image]
        return unit([mean(x * x for x in position) for position in transpose(planes)])

    return mean(square_mean(attention(s), attention(t)) for s, t in zip(student_map, teacher_map))


# --- dcd.py ---------------------------------------------------------------------------------------


def contrastive_loss(similarity):
    """mean_i -log softmax_j(similarity_ij) at j = i"""
    return mean(-log_softmax(row)[i] for i, row in enumerate(similarity))


def consistency_loss(similarity):
    """mean_i KL(Q_i || P_i); P the softmax of the rows, Q that of the columns"""
    pairs = zip(similarity, transpose(similarity))
    return mean(kl(log_softmax(column), log_softmax(row)) for row, column in pairs)


def DCDLoss(student_emb, teacher_emb, tau, alpha=0.5, max_scale=10.0, temperature=None, **more):
    """contrastive + alpha consistency of min(exp(tau), max_scale) cos(head_S(s_i), head_T(t_j))"""

    def project(x, head):
        rows, bias = more[f"{head}.weight"], more[f"{head}.bias"]
        return unit([dot(row, x) + b for row, b in zip(rows, bias)])

    s = [project(x, "student_head") for x in student_emb]
    t = [project(x, "teacher_head") for x in teacher_emb]
    scale = 1 / temperature if temperature else min(math.exp(tau), max_scale)
    similarity = [[scale * dot(a, b) for b in t] for a in s]
    contrastive, consistency = contrastive_loss(similarity), consistency_loss(similarity)
    terms = dict(contrastive=contrastive, consistency=consistency)
    return terms.get(more.get("terms"), contrastive + alpha * consistency)


# --- kd2m.py --------------------------------------------------------------------------------------


def assignment(cost):
    """min over all permutations p of mean_i cost[i][p(i)]"""
    n = range(len(cost))
    return min(sum(cost[i][p[i]] for i in n) for p in itertools.permutations(n)) / len(cost)


def mse(student_emb, teacher_emb):
    """mean_i |s_i - t_i|^2"""
    return mean(squared_distance(s, t) for s, t in zip(student_emb, teacher_emb))


def w2_empirical(student_emb, teacher_emb):
    """min_p mean_i |s_i - t_p(i)|^2"""
    return assignment([[squared_distance(s, t) for t in teacher_emb] for s in student_emb])


def jw2_empirical(student_emb, teacher_emb, student_logits, teacher_logits, beta=1.0):
    """min_p mean_i [ |s_i - t_p(i)|^2 + beta |logits_i - logits_p(i)|^2 ]"""
    students, teachers = zip(student_emb, student_logits), list(zip(teacher_emb, teacher_logits))
    cost = [
        [squared_distance(s, t) + beta * squared_distance(zs, zt) for t, zt in teachers]
        for s, zs in students
    ]
    return assignment(cost)


def by_class(metric, student_emb, teacher_emb, labels, reduction):
    total = 0.0
    for label in set(labels):
        rows = [i for i, y in enumerate(labels) if y == label]
        value = metric([student_emb[i] for i in rows], [teacher_emb[i] for i in rows])
        shares = {"mean": 1 / len(set(labels)), "sum": 1.0, "freq": len(rows) / len(labels)}
        total += shares[reduction] * value
    return total


def cw2_empirical(student_emb, teacher_emb, labels, reduction="mean"):
    return by_class(w2_empirical, student_emb, teacher_emb, labels, reduction)


def cw2_gaussian(student_emb, teacher_emb, labels, reduction="mean", cov="diag"):
    def metric(s, t):
        return w2_gaussian(s, t, cov)

    return by_class(metric, student_emb, teacher_emb, labels, reduction)


def moments(rows):
    """Mean and biased variance of each dimension."""
    means = [mean(column) for column in transpose(rows)]
    return means, [mean((x - m) ** 2 for x in c) for c, m in zip(transpose(rows), means)]


def matrix_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T


def w2_gaussian(student_emb, teacher_emb, cov="diag"):
    """|mu_S - mu_T|^2 + tr [ C_S + C_T - 2 (C_S^1/2 C_T C_S^1/2)^1/2 ]"""
    (mean_s, var_s), (mean_t, var_t) = moments(student_emb), moments(teacher_emb)
    gap = squared_distance(mean_s, mean_t)
    if cov == "diag":
        return gap + sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(var_s, var_t))
    cov_s, cov_t = (
        sum(np.outer(np.subtract(x, mu), np.subtract(x, mu)) for x in rows) / len(rows)
        for rows, mu in ((student_emb, mean_s), (teacher_emb, mean_t))
    )
    root = matrix_root(cov_s)
    return gap + np.trace(cov_s + cov_t) - 2 * np.trace(matrix_root(root @ cov_t @ root))


def floored_moments(student_emb, teacher_emb, floor):
    """No variance below `floor` times the mean variance of the teacher."""
    (mean_s, var_s), (mean_t, var_t) = moments(student_emb), moments(teacher_emb)
    least = max(floor * mean(var_t), 1e-12)
    return mean_s, [max(v, least) for v in var_s], mean_t, [max(v, least) for v in var_t]


def kl_gaussian(student_emb, teacher_emb, direction="student", floor=1e-3):
    """1/2 sum_k [ v / w + (a - b)^2 / w - 1 - log(v / w) ] of N(a, v) against N(b, w)"""

    def divergence(a, v, b, w):
        each = zip(a, v, b, w)  # feature by feature
        return sum((v / w + (a - b) ** 2 / w - 1 - math.log(v / w)) / 2 for a, v, b, w in each)

    a, v, b, w = floored_moments(student_emb, teacher_emb, floor)
    student, teacher = divergence(a, v, b, w), divergence(b, w, a, v)
    return {"student": student, "teacher": teacher, "both": student + teacher}[direction]


def hellinger(student_emb, teacher_emb, floor=1e-3):
    """-log of the product over k of sqrt(2 sqrt(v w) / (v + w)) exp(-(a - b)^2 / (4 (v + w)))"""
    total = 0.0
    for a, v, b, w in zip(*floored_moments(student_emb, teacher_emb, floor)):
        total -= math.log(2 * math.sqrt(v * w) / (v + w)) / 2 - (a - b) ** 2 / (4 * (v + w))
    return total


def mmd_linear(student_emb, teacher_emb):
    """mean_ij s_i.s_j + mean_ij t_i.t_j - 2 mean_ij s_i.t_j"""

    def kernel(x, y):
        return mean(dot(a, b) for a in x for b in y)

    s, t = student_emb, teacher_emb
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def mean_distance(student_emb, teacher_emb):
    """Of all pairs within and between the sets: the default bandwidth of mmd_rbf."""
    s, t = student_emb, teacher_emb
    pairs = ((a, b) for x, y in ((s, s), (t, t), (s, t)) for a in x for b in y)
    return mean(math.sqrt(squared_distance(a, b)) for a, b in pairs)


def mmd_rbf(student_emb, teacher_emb, bandwidth):
    """The same with k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2))"""

    def kernel(x, y):
        return mean(math.exp(-squared_distance(a, b) / (2 * bandwidth**2)) for a in x for b in y)

    s, t = student_emb, teacher_emb
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def mean_cost(student_emb, teacher_emb):
    return mean(squared_distance(a, b) for a in student_emb for b in teacher_emb)


def sinkhorn(student_emb, teacher_emb, eps, **_):
    """OT(S, T) - OT(S, S) / 2 - OT(T, T) / 2 with OT = <plan, C> + eps KL(plan | uniform)"""

    def entropic(x, y):
        cost = np.array([[squared_distance(a, b) for b in y] for a in x])
        kernel, n = np.exp(-cost / eps), len(x)
        u = v = np.ones(n)
        for _ in range(20000):
            before, u = u, 1 / (kernel @ v)
            v = 1 / (kernel.T @ u)
            if np.abs(u / before - 1).max() < 1e-14:
                break
        plan = u[:, None] * kernel * v / n
        return (plan * cost).sum() + eps * (plan * np.log(plan * n * n)).sum()

    s, t = student_emb, teacher_emb
    return entropic(s, t) - entropic(s, s) / 2 - entropic(t, t) / 2


def sliced_w2(student_emb, teacher_emb, projections, seed):
    """mean over random directions of W2^2 of the projections"""
    draw = torch.Generator().manual_seed(seed)
    width = len(student_emb[0])
    lines = torch.randn(width, projections, generator=draw, dtype=torch.float64).T.tolist()
    total = 0.0
    for line in lines:
        s, t = ([[dot(x, unit(line))] for x in rows] for rows in (student_emb, teacher_emb))
        total += w2_empirical(s, t)
    return total / projections


def gromov_costs(student_emb, teacher_emb):
    """{p: mean_ij (|s_i - s_j|^2 - |t_p(i) - t_p(j)|^2)^2} at every permutation p"""
    ds, dt = ([[squared_distance(a, b) for b in x] for a in x] for x in (student_emb, teacher_emb))
    n = range(len(ds))
    return {
        p: mean((ds[i][j] - dt[p[i]][p[j]]) ** 2 for i in n for j in n)
        for p in itertools.permutations(n)
    }


def gromov_w2(student_emb, teacher_emb, **_):
    """The least of them: what the loss bounds from above, and reaches if the search is lucky."""
    return min(gromov_costs(student_emb, teacher_emb).values())


# --- What each loss is called with ----------------------------------------------------------------

SIZES = {"D": 4, "E": 5}  # dimensions of an embedding; B and K are the batch and the classes


def draw(shapes, batch, classes, seed):
    """Inputs in float64. Under an odd seed one dimension of each embedding does not vary."""
    generator = torch.Generator().manual_seed(seed)
    sizes, inputs = {"B": batch, "K": classes, **SIZES}, {}
    for name, text in shapes.items():
        shape = [sizes.get(letter) or int(letter) for letter in text.split()]
        if name == "labels":
            inputs[name] = torch.randint(0, classes, shape, generator=generator)
            continue
        x = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs[name] = 3 * x if name.endswith("_logits") else x
        if name.endswith("_emb") and seed % 2:
            x[:, 0 if name.startswith("student") else 1] = 0.7
    return inputs


def call(loss, inputs, options):
    return loss(**inputs, **options)


def call_hcl(loss, inputs, options):
    maps = [[x for k, x in inputs.items() if k.startswith(who)] for who in ("student", "teacher")]
    return loss(*maps)


def call_review(module, inputs, options):
    """A module with given parameters, in train mode; output i weighted by cos(i), cos(i + 1) ..."""
    maps = [[inputs[f"{owner}_map_{i}"] for i in (0, 1)] for owner in ("student", "teacher")]
    module = module([2, 3], [3, 2], 2).to(maps[0][0].dtype)
    names = [name for name, _ in module.named_parameters()]  # in the order of REVIEW
    parameters = dict(zip(names, [x for name, x in inputs.items() if name in REVIEW], strict=True))
    outputs = torch.func.functional_call(module, parameters, tuple(maps))
    angles = (torch.arange(x.numel()).to(x) for x in outputs)
    return sum((x.flatten() * (a + i).cos()).sum() for i, (x, a) in enumerate(zip(outputs, angles)))


def call_dcd(module, inputs, options):
    parameters = {k: v for k, v in inputs.items() if not k.endswith("_emb")}
    embeddings = inputs["student_emb"], inputs["teacher_emb"]
    return torch.func.functional_call(module(4, 5, embed_dim=3, **options), parameters, embeddings)


@dataclass(frozen=True)
class Case:
    """scripts: where the loss stands. shapes: of its inputs; a list holds alternatives, by seed.
    options: further arguments, one dict a variant. held: what the loss holds fixed when it is
    differentiated, as arguments of the oracle. batch: of the comparison; least: allowed. widths:
    those of student and teacher may differ. rough: the oracle takes roots of rounded zeros."""

    scripts: str
    oracle: Callable
    shapes: dict | list
    options: tuple[dict, ...] = ({},)
    held: Callable = lambda inputs, options: {}
    call: Callable = call
    batch: int = 6
    least: int = 1
    seeds: tuple[int, ...] = (0, 1)
    widths: bool = False
    rough: bool = False

    def make(self, batch, classes, seed):
        shapes = self.shapes if isinstance(self.shapes, list) else [self.shapes]
        return draw(shapes[seed % len(shapes)], batch, classes, seed)


def is_teachers(name):
    """No gradient may reach this input."""
    return name.startswith(("teacher_emb", "teacher_logits", "teacher_map", "class_means"))


def held_bandwidth(inputs, options):
    rows = (x.tolist() for x in inputs.values())
    return {"bandwidth": options.get("bandwidth") or mean_distance(*rows)}


def held_eps(inputs, options):
    return {"eps": options["reg"] * mean_cost(*(x.tolist() for x in inputs.values()))}


EMB = dict(student_emb="B D", teacher_emb="B D")
WIDE = dict(student_emb="B D", teacher_emb="B E")
LOGITS = dict(student_logits="B K", teacher_logits="B K")
LABELS, MEANS = dict(labels="B"), dict(class_means="K D")
MAPS = [
    dict(student_map="B 3 4 4", teacher_map="B 2 4 4"),
    dict(student_map="B 3 4 4", teacher_map="B 2 2 2"),
    dict(student_map="B 2 2 2", teacher_map="B 3 4 4"),
]
PYRAMID = ("B 1 8 8", "B 1 7 7", "B 2 2 2", "B 2 1 1")
PYRAMIDS = {f"{who}_map_{i}": x for who in ("student", "teacher") for i, x in enumerate(PYRAMID)}
REVIEW_MAPS = dict(student_map_0="B 2 4 4", student_map_1="B 3 2 2")
REVIEW = {  # two levels, of 2 and 3 channels in the student, 3 and 2 in the teacher, 2 between
    "inward.0.0.weight": "2 2 1 1", "inward.0.1.weight": "2", "inward.0.1.bias": "2",
    "inward.1.0.weight": "2 3 1 1", "inward.1.1.weight": "2", "inward.1.1.bias": "2",
    "outward.0.0.weight": "3 2 3 3", "outward.0.1.weight": "3", "outward.0.1.bias": "3",
    "outward.1.0.weight": "2 2 3 3", "outward.1.1.weight": "2", "outward.1.1.bias": "2",
    "attention.0.weight": "2 4 1 1", "attention.0.bias": "2",
}  # fmt: skip
REVIEWS = [{**REVIEW_MAPS, "teacher_map_0": a, "teacher_map_1": b, **REVIEW}
           for a, b in (("B 3 2 2", "B 2 1 1"), ("B 3 5 5", "B 2 3 3"))]  # fmt: skip
HEADS = {"student_head.weight": "3 D", "student_head.bias": "3"}
HEADS = {**HEADS, "teacher_head.weight": "3 E", "teacher_head.bias": "3", "tau": ""}
REDUCTIONS = ({}, {"reduction": "sum"}, {"reduction": "freq"})
FULL = tuple({"cov": "full", **options} for options in REDUCTIONS)
DKD = ({}, {"alpha": 2.5, "beta": 4.0, "temperature": 3.0})
# At a temperature of 3000, as at the start of training, the 1e-8 of DIST is no small part.
DIST = ({}, {"beta": 2.0, "gamma": 0.5, "temperature": 3.0}, {"temperature": 3000.0})
DCD = ({}, {"alpha": 3.0, "max_scale": 0.1}, {"temperature": 0.2})  # 0.1: no gradient to tau
DCD = (*DCD, {"terms": "contrastive"}, {"terms": "consistency"})
DIRECTIONS = ({}, {"direction": "teacher"}, {"direction": "both", "floor": 0.5})
BANDWIDTHS = ({}, {"bandwidth": 2.0})
TO_THE_END = ({"reg": 0.5, "tolerance": 1e-13, "iterations": 10000},)

ALL = "nd sp dcd kd2m detect_nd"
LOSSES = {
    "nd_loss": Case("nd detect_nd", nd_loss, {**EMB, **MEANS, **LABELS}),
    "direction_loss": Case("nd", direction_loss, {"student_emb": "B D", **MEANS, **LABELS}),
    "norm_loss": Case("nd", norm_loss, EMB),
    "kd_loss": Case(ALL, kd_loss, LOGITS, ({}, {"temperature": 1.0})),
    "dkd_loss": Case("nd detect_nd", dkd_loss, {**LOGITS, **LABELS}, DKD),
    "dist_loss": Case("nd", dist_loss, LOGITS, DIST),
    "ReviewKD": Case("nd detect_nd", ReviewKD, REVIEWS, call=call_review, batch=3, least=2),
    "hcl_loss": Case("nd detect_nd", hcl_loss, PYRAMIDS, call=call_hcl, batch=2),
    "sp_loss": Case("sp", sp_loss, MAPS, seeds=(0, 1, 2), batch=5, widths=True),
    "cc_loss": Case("sp", cc_loss, WIDE, ({}, {"gamma": 0.7}), widths=True),
    "intra_loss": Case("sp", intra_loss, MAPS, seeds=(0, 1, 2), batch=2, widths=True),
    "at_loss": Case("sp", at_loss, MAPS, seeds=(0, 1, 2), batch=3, widths=True),
    "contrastive_loss": Case("dcd", contrastive_loss, {"similarity": "B B"}),
    "consistency_loss": Case("dcd", consistency_loss, {"similarity": "B B"}),
    "DCDLoss": Case("dcd", DCDLoss, {**WIDE, **HEADS}, DCD, call=call_dcd, batch=4, widths=True),
    "mse": Case("kd2m", mse, EMB),
    "w2_empirical": Case("kd2m", w2_empirical, EMB, batch=5),
    "cw2_empirical": Case("kd2m", cw2_empirical, {**EMB, **LABELS}, REDUCTIONS),
    "jw2_empirical": Case("kd2m", jw2_empirical, {**EMB, **LOGITS}, ({}, {"beta": 0.05}), batch=5),
    "w2_gaussian": Case("kd2m", w2_gaussian, EMB),
    "w2_gaussian full": Case("kd2m", w2_gaussian, EMB, ({"cov": "full"},), rough=True),
    "cw2_gaussian": Case("kd2m", cw2_gaussian, {**EMB, **LABELS}, REDUCTIONS),
    "cw2_gaussian full": Case("kd2m", cw2_gaussian, {**EMB, **LABELS}, FULL, rough=True),
    "kl_gaussian": Case("kd2m", kl_gaussian, EMB, DIRECTIONS, least=2),
    "mmd_linear": Case("kd2m", mmd_linear, EMB),
    "mmd_rbf": Case("kd2m", mmd_rbf, EMB, BANDWIDTHS, held=held_bandwidth, rough=True),
    "sinkhorn": Case("kd2m", sinkhorn, EMB, TO_THE_END, held=held_eps, batch=4),
    "sliced_w2": Case("kd2m", sliced_w2, EMB, ({"projections": 5, "seed": 7},), batch=4),
    "hellinger": Case("kd2m", hellinger, EMB, ({}, {"floor": 0.5}), least=2),
    "gromov_w2": Case(  # seeds where its search finds the best assignment
        "kd2m", gromov_w2, WIDE, ({}, {"start": "identity"}), batch=4, seeds=(1, 38), widths=True
    ),
}


def value(case, inputs, options):
    """The oracle's number for these tensors."""
    lists = {name: x.tolist() for name, x in inputs.items()}
    return float(case.oracle(**lists, **{**options, **case.held(inputs, options)}))


def gradients(case, inputs, options):
    """Central differences by every input that is trained; what the loss holds fixed is fixed."""
    step = 1e-3 if case.rough else 1e-5
    options = {**options, **case.held(inputs, options)}
    slopes = {}
    for name in [k for k, x in inputs.items() if x.is_floating_point() and not is_teachers(k)]:
        lists = {key: x.tolist() for key, x in inputs.items()}
        slopes[name] = torch.zeros_like(inputs[name])
        for i in range(inputs[name].numel()):
            at = []
            for move in (step, -step):
                x = inputs[name].clone()
                x.view(-1)[i] += move
                lists[name] = x.tolist()
                at.append(float(case.oracle(**lists, **options)))
            slopes[name].view(-1)[i] = (at[0] - at[1]) / (2 * step)
    return slopes
