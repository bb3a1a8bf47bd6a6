"""Anchors and their probabilities against the equations, term by term."""

from __future__ import annotations

import math

import pytest
import torch

from isd_repro.report import anchors

QUERY = [[3.0, 4.0, 0.0], [0.0, -2.0, 1.0]]
BANK = [[1.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 5.0, 5.0], [0.0, 0.0, 0.0], [6.0, 8.0, 0.0]]


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
def test_probabilities_entropy_and_mass_by_hand(tau: float) -> None:
    found = anchors.cosine(torch.tensor(QUERY), torch.tensor(BANK))
    probability = anchors.probabilities(found, tau)
    spread = anchors.spread(probability)
    for row, query in enumerate(QUERY):
        similar = [cosine(query, anchor) for anchor in BANK]
        weights = [math.exp(value / tau) for value in similar]
        shares = [weight / sum(weights) for weight in weights]
        assert found[row].tolist() == pytest.approx(similar, abs=1e-12)
        assert probability[row].tolist() == pytest.approx(shares, rel=1e-9)
        assert float(spread.entropy[row]) == pytest.approx(-sum(p * math.log(p) for p in shares if p), rel=1e-9)
        assert float(spread.highest[row]) == pytest.approx(max(shares), rel=1e-9)
        assert float(spread.top[row]) == pytest.approx(1.0)  # five anchors, all among the ten


def test_nearest_first_and_the_lower_position_of_equals() -> None:
    found = anchors.nearest(anchors.cosine(torch.tensor(QUERY), torch.tensor(BANK)), 4)
    assert found[0].tolist() == [1, 4, 0, 2]  # 1 and 4 are the query's own direction
    assert found[1].tolist() == [0, 3, 2, 1]  # two at a right angle, one of them zero; then -0.316, then -0.716 twice


def test_a_bank_of_any_size_is_one_bank() -> None:
    """Parts of the bank change no similarity; the last ones are found, too."""
    draw = torch.Generator().manual_seed(1)
    bank, query = torch.randn(9001, 6, generator=draw), torch.randn(3, 6, generator=draw)
    bank[9000] = 2.5 * query[2]
    found = anchors.cosine(query, bank)
    assert found.shape == (3, 9001)
    assert int(anchors.nearest(found, 1)[2]) == 9000
    for at in (0, 4095, 4096, 8191, 8192, 9000):
        assert float(found[1, at]) == pytest.approx(cosine(query[1].tolist(), bank[at].tolist()), abs=1e-7)
