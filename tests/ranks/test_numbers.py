"""The numbers do not depend on how many ranks there are: losses, weights, banks, BatchNorm's buffers, views and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isd_repro import methods
from isd_repro.nn import batchnorm
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import ConfigError
from tests.faults import forks
from tests.ranks import cases

CLOSE = 1e-10
WORLDS = (2, 4)
Found = dict[int, list[dict[str, Any]]]  # by world and rank


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every case on four ranks, which leave checkpoints, then on one and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    cases.write_store(folder / "store")
    results: Found = {}
    for world in (4, 1, 2):
        ended = forks.run(folder, ranks=world, call=cases.main)
        assert ended.codes == [0] * world, ended.said
        results[world] = [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    return results


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two states, and whose it is."""
    assert one.keys() == other.keys()
    return max((float((one[name].double() - other[name].double()).abs().max()), name) for name in one)


def assert_same_training(ours: dict[str, Any], want: dict[str, Any]) -> None:
    assert len(want["curve"]) == cases.STEPS
    for row, expected in zip(ours["curve"], want["curve"], strict=True):
        assert row == pytest.approx(expected, rel=CLOSE, abs=CLOSE)
    assert gap(ours["state"], want["state"])[0] < CLOSE, gap(ours["state"], want["state"])


@pytest.mark.parametrize(
    ("world", "name", "groups"), [*((4, *case) for case in cases.CASES), *((2, *case) for case in cases.ISD)]
)
def test_steps_are_those_of_one_rank(found: Found, world: int, name: str, groups: int) -> None:
    """And all ranks hold the same bits."""
    ours = [result[f"{name}-{groups}"] for result in found[world]]
    assert_same_training(ours[0], found[1][0][f"{name}-{groups}"])
    for each in ours[1:]:
        assert [key for key, value in each["state"].items() if not torch.equal(value, ours[0]["state"][key])] == []


def test_groups_change_the_numbers(found: Found) -> None:
    """Otherwise the test above would not see a rank that normalises by itself."""
    states = [found[1][0][f"isd-{groups}"]["state"] for groups in (1, 2, 4)]
    assert gap(states[0], states[1])[0] > 1e-4
    assert gap(states[1], states[2])[0] > 1e-4


@pytest.mark.parametrize(("world", "name"), [*((1, name) for name in methods.names()), (2, "isd")])
def test_a_run_resumes_on_another_number_of_ranks(found: Found, world: int, name: str) -> None:
    """Two steps on four ranks, the rest on one or two."""
    assert_same_training(found[world][0][f"{name}-resumed"], found[1][0][f"{name}-2"])


@pytest.mark.parametrize("world", WORLDS)
def test_views_are_the_same_bits(found: Found, world: int) -> None:
    """Of images of many sizes; every view of a rank shows the same images."""
    for step, whole in enumerate(found[1][0]["views"]):
        parts = [result["views"][step] for result in found[world]]
        assert all(len(part["view_student"]) == cases.BATCH // world for part in parts)
        for key in ("view_student", "view_teacher", "index", "label"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key]), (step, key)
        assert torch.equal(torch.cat([part["more"][0] for part in parts]), whole["more"][0])
        assert all(torch.equal(part["shuffle"], whole["shuffle"]) for part in parts)
    assert not torch.equal(found[1][0]["views"][0]["view_student"], found[1][0]["views"][1]["view_student"])


@pytest.mark.parametrize("world", WORLDS)
def test_shared_extraction_gives_the_same_bits(found: Found, world: int) -> None:
    want, ours = found[1][0]["features"], found[world][0]["features"]
    assert list(ours) == list(want) == ["student", "teacher"]
    for name, rows in want.items():
        assert rows.shape[0] == cases.FEATURES
        assert torch.equal(ours[name], rows)


@pytest.mark.parametrize("world", WORLDS)
def test_a_shared_linear_evaluation_gives_the_same_heads(found: Found, world: int) -> None:
    """Losses, weights and answers; views bit for bit, each rank's part of them."""
    want = found[1][0]["linear"]
    assert len(want["rows"]) == 3
    assert gap({"move": want["heads"]["student.weight"]}, {"move": want["heads"]["teacher.weight"]})[0] > 1e-3
    for result in found[world]:
        ours = result["linear"]
        assert gap(ours["heads"], want["heads"])[0] < CLOSE
        assert all(torch.equal(ours["last"][name], answers) for name, answers in want["last"].items())
        for row, expected in zip(ours["rows"], want["rows"], strict=True):
            assert row == pytest.approx(expected, rel=CLOSE, abs=CLOSE)
        assert gap(ours["heads"], found[world][0]["linear"]["heads"])[0] == 0  # all ranks hold the same bits
    for at, (views, label) in enumerate(want["views"]):
        parts = [result["linear"]["views"][at] for result in found[world]]
        assert all(len(part) == -(-len(label) // world) for part, _ in parts)
        assert torch.equal(torch.cat([part for part, _ in parts])[: len(label)], views)
        assert all(torch.equal(mine, label) for _, mine in parts)


def test_ranks_that_would_cut_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 4)
    with pytest.raises(ConfigError, match=r"numerics\.bn_groups: 6 groups on 4 processes"):
        batchnorm.set_bn_groups(nn.BatchNorm1d(2), 6)


def test_one_process_is_alone() -> None:
    """Nothing is exchanged, copied or initialised."""
    rows = torch.randn(3, 2)
    assert (ranks.world(), ranks.rank()) == (1, 0)
    assert ranks.gather(rows) is rows
    assert ranks.at_first(rows)[0] is rows
    assert [ranks.anywhere(flag) for flag in (True, False)] == [True, False]
    before = rows.clone()
    ranks.average_([rows])
    assert torch.equal(rows, before)
    assert not torch.distributed.is_initialized()


def test_a_group_over_ranks_is_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of a batch in turn, what they exchange played by hand, against BatchNorm of the whole and its own gradients."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    seen = torch.randn_like(x)
    norm = nn.BatchNorm2d(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    whole = x.clone().requires_grad_()
    norm(whole).backward(seen)

    statistics = torch.stack([torch.stack([half.mean((0, 2, 3)), half.var((0, 2, 3), correction=0)]) for half in x.chunk(2)])
    output = ((x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()).detach()
    sums = torch.stack([seen.sum((0, 2, 3)), (seen * output).sum((0, 2, 3))])
    monkeypatch.setattr(ranks, "gather", lambda own, span: statistics)
    monkeypatch.setattr(ranks, "total", lambda own, span: sums)
    gradients = []
    for half, back in zip(x.chunk(2), seen.chunk(2), strict=True):
        part = half.clone().requires_grad_()
        out, mean, variance = batchnorm._Shared.apply(part, norm.weight, norm.bias, norm.eps, 2)
        out.backward(back)
        assert part.grad is not None
        gradients.append(part.grad)
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-11, atol=1e-12)
