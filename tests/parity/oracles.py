"""Slow oracles written from the equations, in Python floats; nothing here calls the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    log_total = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    return [logit - log_total for logit in logits]


def isd_loss(student: Rows, teacher: Rows, bank: Rows, tau_student: float, tau_teacher: float) -> float:
    """Mean over images of sum_i p_t(i) (log p_t(i) - log p_s(i)), with p(i) = softmax_i(embedding . x_i / tau)."""
    terms = []
    for q, k in zip(student, teacher, strict=True):
        log_s = log_softmax([dot(q, x) / tau_student for x in bank])
        log_t = log_softmax([dot(k, x) / tau_teacher for x in bank])
        terms.append(math.fsum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True)))
    return math.fsum(terms) / len(student)


def isd_gradient(student: Rows, teacher: Rows, bank: Rows, tau_student: float, tau_teacher: float) -> list[list[float]]:
    """dL/dq_b = sum_i (p_s(i) - p_t(i)) x_i / (B tau_student); the teacher's entropy has no part in it."""
    gradient = []
    for q, k in zip(student, teacher, strict=True):
        p_s = softmax([dot(q, x) / tau_student for x in bank])
        p_t = softmax([dot(k, x) / tau_teacher for x in bank])
        row = [math.fsum((s - t) * x[d] for s, t, x in zip(p_s, p_t, bank, strict=True)) for d in range(len(q))]
        gradient.append([value / (len(student) * tau_student) for value in row])
    return gradient


def moco_loss(student: Rows, teacher: Rows, bank: Rows, tau: float) -> float:
    """Mean over images of -log( exp(q.k/tau) / (exp(q.k/tau) + sum_i exp(q.x_i/tau)) )."""
    terms = [-log_softmax([dot(q, x) / tau for x in (k, *bank)])[0] for q, k in zip(student, teacher, strict=True)]
    return math.fsum(terms) / len(student)


def moco_gradient(student: Rows, teacher: Rows, bank: Rows, tau: float) -> list[list[float]]:
    """dL/dq_b = (sum_j p(j) z_j - k_b) / (B tau) over the positive z_0 = k_b and the bank."""
    gradient = []
    for q, k in zip(student, teacher, strict=True):
        anchors = (k, *bank)
        p = softmax([dot(q, x) / tau for x in anchors])
        row = [math.fsum(share * x[d] for share, x in zip(p, anchors, strict=True)) - k[d] for d in range(len(q))]
        gradient.append([value / (len(student) * tau) for value in row])
    return gradient


def sce_loss(student: Rows, teacher: Rows, bank: Rows, lam: float, tau_student: float, tau_teacher: float) -> float:
    """Mean over images of -sum_j w(j) log p(j), w = lam at the positive, (1 - lam) softmax(k . x / tau_teacher) in the bank."""
    terms = []
    for q, k in zip(student, teacher, strict=True):
        log_p = log_softmax([dot(q, x) / tau_student for x in (k, *bank)])
        target = [lam, *((1 - lam) * share for share in softmax([dot(k, x) / tau_teacher for x in bank]))]
        terms.append(-math.fsum(w * p for w, p in zip(target, log_p, strict=True)))
    return math.fsum(terms) / len(student)


def msf_loss(student: Rows, teacher: Rows, bank: Rows, neighbours: int) -> float:
    """Mean over images and over the rows nearest to the teacher of the squared distance |q - x|^2."""
    terms = []
    for q, k in zip(student, teacher, strict=True):
        nearest = sorted(bank, key=lambda x: -dot(k, x))[:neighbours]
        terms += [math.fsum((a - b) ** 2 for a, b in zip(q, x, strict=True)) for x in nearest]
    return math.fsum(terms) / len(terms)


def cmsf_loss(student: Rows, teacher: Rows, before: Rows, bank: Rows, second: Rows, neighbours: int, candidates: int) -> float:
    """Half the mean squared distance to the nearest rows, and half to the nearest of those that were near before."""
    terms = []
    for q, k, old in zip(student, teacher, before, strict=True):
        by_similarity = sorted(range(len(bank)), key=lambda at: -dot(k, bank[at]))
        related = sorted(range(len(bank)), key=lambda at: -dot(old, second[at]))[:candidates]
        for chosen in (by_similarity, [at for at in by_similarity if at in related]):
            distances = [math.fsum((a - b) ** 2 for a, b in zip(q, bank[at], strict=True)) for at in chosen[:neighbours]]
            terms.append(math.fsum(distances) / neighbours)
    return math.fsum(terms) / len(terms)


def simclr_loss(one: Rows, other: Rows, tau: float) -> float:
    """Mean over all 2B views of -log softmax over the 2B - 1 other views, at the other view of the same image."""
    rows, terms = [*one, *other], []
    for at, z in enumerate(rows):
        partner = (at + len(one)) % len(rows)
        others = [place for place in range(len(rows)) if place != at]
        terms.append(-log_softmax([dot(z, rows[place]) / tau for place in others])[others.index(partner)])
    return math.fsum(terms) / len(terms)


def byol_loss(student: Rows, teacher: Rows) -> float:
    """Mean over images of 2 - 2 q.k for unit vectors."""
    return math.fsum(2 - 2 * dot(q, k) for q, k in zip(student, teacher, strict=True)) / len(student)
