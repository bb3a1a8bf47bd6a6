"""Weighted nearest neighbours against sums written out in float64, query by query."""

from __future__ import annotations

import math

import torch

from isd_repro.evaluations.neighbour_search import nearest
from isd_repro.evaluations.weighted_knn import similarities, vote

CPU, CLASSES = torch.device("cpu"), 3


def test_votes_are_the_sums_of_the_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    bank, query = torch.randn(90, 5, generator=draw), torch.randn(130, 5, generator=draw)
    label = torch.randint(CLASSES, (90,), generator=draw)
    near = nearest(bank, label, query, 10, CPU)
    similarity = similarities(bank, query, near)
    plain = {}
    for temperature in (0.07, 100.0):
        found = vote(label[near], similarity, temperature, CLASSES)
        for row in range(len(query)):
            weights = [0.0] * CLASSES
            for at in near[row].tolist():
                one, other = bank[at].double(), query[row].double()
                cosine = float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))
                weights[int(label[at])] += math.exp(cosine / temperature)
            assert int(found[row]) == weights.index(max(weights))
        plain[temperature] = found
    assert not plain[0.07].equal(plain[100.0]), "a cold vote follows the nearest, a hot one the majority"


def test_the_lowest_of_equal_classes_wins() -> None:
    label, similarity = torch.tensor([[2, 1], [1, 2]]), torch.tensor([[0.5, 0.5], [0.25, 0.25]])
    assert vote(label, similarity, 0.07, CLASSES).tolist() == [1, 1]
