"""k-means on one thread, and the clusters and members that are shown."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_info, threadpool_limits

from isd_repro.report import clusters
from isd_repro.report.clusters import scikit_learn


def test_one_thread_inside_and_the_old_number_after() -> None:
    with threadpool_limits(2):
        before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert 2 in before.values()
        with scikit_learn():
            assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        after = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert before.items() <= after.items()


def test_a_collapsed_encoder_leaves_clusters_empty() -> None:
    found = clusters.k_means(torch.ones(30, 4), 3, seed=0)
    counts = clusters.counts(torch.from_numpy(found.labels_).long(), torch.arange(30) % 3, 3)
    assert sorted(counts.tolist()) == [[0, 0, 0], [0, 0, 0], [10, 10, 10]]


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
