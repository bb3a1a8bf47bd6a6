"""Health metrics against slow sums, and against cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from isd_repro import methods
from isd_repro.nn.bank import Bank
from isd_repro.nn.health import cosine_distance, embedding_std, purity
from isd_repro.train.monitor import Monitor, bank_purity
from tests.conformance.problem import BATCH, Noise, build, steps


def unit_rows(count: int, width: int, seed: int = 0) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.div(rows.square().sum(dim=1, keepdim=True).sqrt())


def slow_spread(rows: Tensor) -> float:
    deviations = []
    for column in rows.T.tolist():
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in column) / (len(column) - 1)))
    return sum(deviations) / len(deviations) * math.sqrt(len(deviations))


def test_spread_is_the_slow_sum_one_on_a_sphere_and_zero_when_collapsed() -> None:
    rows = unit_rows(7, 5)
    assert float(embedding_std(rows)) == pytest.approx(slow_spread(rows), rel=1e-12)
    assert float(embedding_std(unit_rows(4000, 64))) == pytest.approx(1, abs=0.01)
    assert float(embedding_std(unit_rows(1, 64).expand(9, -1))) == pytest.approx(0, abs=1e-12)
    narrow = torch.cat([unit_rows(500, 8), torch.zeros(500, 56, dtype=torch.float64)], dim=1)  # 8 of 64 dimensions
    assert float(embedding_std(narrow)) == pytest.approx(math.sqrt(8 / 64), abs=0.02)


def test_gap_is_the_slow_sum() -> None:
    student, teacher = unit_rows(6, 5), unit_rows(6, 5, seed=1)
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    slow = sum(1 - sum(a * b for a, b in zip(one, other, strict=True)) for one, other in pairs) / 6
    assert float(cosine_distance(student, teacher)) == pytest.approx(slow, rel=1e-12)
    assert float(cosine_distance(student, student)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_distance(student, -student)) == pytest.approx(2, rel=1e-12)


def slow_purity(rows: Tensor, label: list[int], newest: list[int], nearest: int) -> float:
    older = [at for at in range(len(rows)) if label[at] >= 0 and at not in newest]
    shares = []
    for asking in newest:
        ranked = sorted(older, key=lambda at: -float((rows[asking] * rows[at]).sum()))[:nearest]
        shares.append(sum(label[at] == label[asking] for at in ranked) / len(ranked))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("known", [40, 25, 12])
def test_purity_is_the_slow_count(known: int) -> None:
    """With a full bank, with one that still holds rows that are no images, and with fewer older images than are looked at."""
    rows = unit_rows(40, 6)
    label = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
    label[known:] = -1
    newest = torch.tensor([4, 5, 6, 7])
    slow = slow_purity(rows, label.tolist(), newest.tolist(), min(10, known - 4))
    assert 0 < slow < 1
    assert float(purity(rows, label, newest)) == pytest.approx(slow, rel=1e-12)


class Recorded:
    """Labels by step, without images."""

    steps_per_epoch, batch_size = 3, 4

    def labels_at(self, step: int) -> Tensor:
        return torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9])
def test_the_labels_of_a_bank_are_those_of_the_steps_that_filled_it(count: int) -> None:
    """A buffer of labels that is pushed beside the bank knows what the monitor works out from the number of steps."""
    bank = Bank(12, 5, 4)
    beside = torch.full((12,), -1)
    for step in range(count):
        start = bank.pointer
        bank.push(unit_rows(4, 5, seed=step).float())
        beside[start : start + 4] = Recorded().labels_at(step)
    newest = [(bank.pointer - 4) % 12 + at for at in range(4)]
    found = bank_purity(bank, Recorded(), count)
    if count == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(slow_purity(bank.rows, beside.tolist(), newest, min(10, 4 * min(count, 3) - 4)), rel=1e-6)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_says_how_it_is_on_the_device_and_detached(name: str) -> None:
    method = build(name)
    out = method(Noise().at(0))
    assert "spread" in out.metrics
    assert ("gap" in out.metrics) == ("teacher" in method.encoders)  # type: ignore[operator]
    for value in out.metrics.values():
        assert (value.requires_grad, value.shape, value.device) == (False, (), out.loss.device)


def test_the_monitor_counts_from_where_its_process_began() -> None:
    method = build("isd")
    steps(method, [Noise().at(0)], torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01))

    class Labelled:
        steps_per_epoch, batch_size = 4, BATCH

        def labels_at(self, step: int) -> Tensor:
            return Noise().at(step).label

    monitor = Monitor(method, Labelled(), first_step=6)
    row = monitor.epoch(8)
    assert set(row) == {"images_per_second", "memory_mib", "purity"}
    assert row["memory_mib"] > 50
    assert row["images_per_second"] > 0
    assert "purity" not in Monitor(build("byol"), Labelled(), 0).epoch(4)
