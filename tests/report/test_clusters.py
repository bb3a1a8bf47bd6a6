"""Clusters against plain loops, and scikit-learn held to one thread."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from isd_repro.report import clusters
from isd_repro.report.clusters import scikit_learn


def blobs(groups: int = 5, each: int = 40, width: int = 12, spread: float = 0.25) -> tuple[Tensor, Tensor]:
    """Overlapping groups of directions, of lengths that mean nothing; the rows and their group."""
    draw = torch.Generator().manual_seed(3)
    centre = torch.randn(groups, width, generator=draw)
    label = torch.arange(groups).repeat_interleave(each)
    rows = centre[label] + spread * torch.randn(groups * each, width, generator=draw)
    return rows * (0.5 + 4 * torch.rand(len(rows), 1, generator=draw)), label


def unit(rows: Tensor) -> list[list[float]]:
    found = []
    for row in rows.double().tolist():
        length = sum(value * value for value in row) ** 0.5
        found.append([value / length for value in row])
    return found


def squared(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def test_every_row_is_in_the_cluster_of_the_nearest_mean() -> None:
    """What k-means ends in: means of members, and members nearest to their mean, of rows of length 1."""
    rows, _ = blobs(spread=0.9)  # overlapping, so that the assignment is no matter of course
    found = clusters.fit(rows, 7, seed=0)
    plain, assigned = unit(rows), found.assignment.tolist()
    members = {c: [row for row, at in zip(plain, assigned, strict=True) if at == c] for c in range(7)}
    assert all(members.values())
    means = {c: [sum(column) / len(inside) for column in zip(*inside, strict=True)] for c, inside in members.items()}
    for row, at in zip(plain, assigned, strict=True):
        assert squared(row, means[at]) <= min(squared(row, mean) for mean in means.values()) + 1e-6
    assert found.inertia == pytest.approx(sum(squared(row, means[at]) for row, at in zip(plain, assigned, strict=True)), rel=1e-4)


def test_equal_input_gives_equal_clusters_and_the_seed_counts() -> None:
    rows, _ = blobs(spread=2.0)
    first = clusters.fit(rows, 9, seed=0)
    assert clusters.fit(rows.clone(), 9, seed=0).sha256 == first.sha256
    assert clusters.fit(rows, 9, seed=1).sha256 != first.sha256
    assert clusters.fit(rows * 4.0, 9, seed=0).sha256 == first.sha256, "only directions count"


def test_one_thread_inside_and_the_old_number_after() -> None:
    with threadpool_limits(2):
        before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert 2 in before.values()
        with scikit_learn():
            assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        after = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert before.items() <= after.items()


def test_a_collapsed_encoder_leaves_clusters_empty() -> None:
    found = clusters.fit(torch.ones(30, 4), 3, seed=0)
    every = clusters.tally(found.assignment, torch.arange(30) % 3, 3)
    assert sorted(cluster.size for cluster in every) == [0, 0, 30]
    assert clusters.purity(every) == pytest.approx(100 / 3)
    assert [(c.label, c.hits, c.purity) for c in every if c.size == 0] == [(-1, 0, 0.0)] * 2


# --- purity -----------------------------------------------------------------------------------------------------------


def test_purity_against_counting() -> None:
    draw = torch.Generator().manual_seed(5)
    assignment, label = torch.randint(0, 6, (200,), generator=draw), torch.randint(0, 4, (200,), generator=draw)
    assignment[assignment == 2] = 3  # an empty one
    every = clusters.tally(assignment, label, 6)
    total = 0
    for cluster in every:
        counts = Counter(cls for at, cls in zip(assignment.tolist(), label.tolist(), strict=True) if at == cluster.number)
        most = max(counts.values(), default=0)
        total += most
        assert (cluster.size, cluster.hits) == (sum(counts.values()), most)
        if counts:
            assert cluster.label == min(cls for cls, count in counts.items() if count == most)
            assert cluster.purity == pytest.approx(100 * most / sum(counts.values()))
    assert every[2].size == 0
    assert clusters.purity(every) == pytest.approx(100 * total / 200)


def test_purity_of_shuffled_labels_is_what_the_sizes_give_away() -> None:
    label = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    draw = torch.Generator().manual_seed(0)
    assert clusters.shuffled_purity(torch.zeros(100, dtype=torch.int64), label, 1, draw) == pytest.approx(70)
    assert clusters.shuffled_purity(torch.arange(100), label, 100, draw) == pytest.approx(100)
    sorted_out = clusters.shuffled_purity(label, label, 3, draw)
    # Every cluster has the common class in front but the smallest now and then: far below the 100 % of the true labels.
    assert 69 < sorted_out < 80


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_random_clusters_and_members_are_of_the_clusters_and_none_twice() -> None:
    assignment = torch.tensor([4, 4, 4, 4, 4, 1, 1, 7, 7, 7])
    shown = clusters.choose(assignment, 2, 3, torch.Generator().manual_seed(0))
    assert len({number for number, _ in shown}) == len(shown) == 2
    for number, inside in shown:
        assert set(assignment[inside].tolist()) == {number}
        assert len(set(inside.tolist())) == len(inside) == min(3, int((assignment == number).sum()))
    every = clusters.choose(assignment, 50, 50, torch.Generator().manual_seed(0))
    assert sorted(position for _, inside in every for position in inside.tolist()) == list(range(10))
    seen = {clusters.choose(assignment, 1, 1, torch.Generator().manual_seed(seed))[0][0] for seed in range(40)}
    assert seen == {1, 4, 7}, "every cluster has its chance"
