"""Nearest neighbours against hand-made points, a slow exact oracle with the tie rule, scikit-learn and faiss."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from isd_repro.evaluations import neighbour_search
from isd_repro.runtime.errors import ConfigError, DataError

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signs(count: int, dim: int, seed: int) -> Tensor:
    """Rows of +-1 with an even square root of dim: unit vectors and all similarities are exact in float32."""
    return torch.randint(0, 2, (count, dim), generator=generator(seed)).float() * 2 - 1


def predict(bank: Tensor, label: Tensor, query: Tensor, ks: Sequence[int], device: torch.device) -> dict[int, Tensor]:
    near = neighbour_search.nearest(bank, label, query, max(ks), device)
    return {k: neighbour_search.vote(label[near[:, :k]]) for k in ks}


def oracle(bank: Tensor, label: Tensor, query: Tensor, k: int) -> tuple[list[list[int]], list[int]]:
    """Integers only: neighbours by (dot descending, label ascending, position ascending), then a counted vote."""
    rows, classes = bank.long().tolist(), label.tolist()
    neighbours, votes = [], []
    for asked in query.long().tolist():
        dots = [sum(a * b for a, b in zip(asked, row, strict=True)) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (-dots[i], classes[i], i))[:k]
        counts = Counter(classes[i] for i in order)
        neighbours.append(order)
        votes.append(min(counts, key=lambda c: (-counts[c], c)))
    return neighbours, votes


@pytest.fixture(params=[(1024, 2048), (8, 32)], ids=["as shipped", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tests with blocks so small that every merge is exercised."""
    monkeypatch.setattr(neighbour_search, "QUERY_ROWS", request.param[0])
    monkeypatch.setattr(neighbour_search, "BANK_ROWS", request.param[1])


def test_points_on_a_circle() -> None:
    angle = torch.deg2rad(torch.tensor([0.0, 30.0, 90.0, 100.0, 180.0]))
    length = torch.tensor([[1.0], [5.0], [0.1], [2.0], [1.0]])  # cosine: lengths do not count
    bank = length * torch.stack([angle.cos(), angle.sin()], dim=1)
    label = torch.tensor([2, 2, 1, 1, 0])
    asked = torch.deg2rad(torch.tensor([20.0, 80.0, 170.0]))
    query = 3 * torch.stack([asked.cos(), asked.sin()], dim=1)
    assert neighbour_search.nearest(bank, label, query, 2, CPU).tolist() == [[1, 0], [2, 3], [4, 3]]
    found = predict(bank, label, query, (1, 3, 5), CPU)
    assert found[1].tolist() == [2, 1, 0]
    assert found[3].tolist() == [2, 1, 1]  # 170: neighbours 180, 100, 90
    assert found[5].tolist() == [1, 1, 1]  # two votes each for 1 and 2


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("k", [1, 5, 20, 47])
def test_equals_the_exact_oracle_where_most_similarities_tie(k: int) -> None:
    bank, query = signs(300, 16, seed=1), signs(41, 16, seed=2)
    label = torch.randint(0, 7, (300,), generator=generator(3))
    neighbours, votes = oracle(bank, label, query, k)
    assert neighbour_search.nearest(bank, label, query, k, CPU).tolist() == neighbours
    assert predict(bank, label, query, (k,), CPU)[k].tolist() == votes


@pytest.mark.usefixtures("chunks")
def test_every_image_of_the_bank_may_be_a_neighbour() -> None:
    bank, query = signs(70, 16, seed=4), signs(9, 16, seed=5)
    label = torch.arange(70) % 3
    assert neighbour_search.nearest(bank, label, query, 70, CPU).tolist() == oracle(bank, label, query, 70)[0]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("seed", range(3))
def test_permuting_the_bank_changes_no_prediction(seed: int) -> None:
    """Random reals: with copies under several labels, so that the boundary of k falls inside a tie."""
    base = torch.randn(60, 24, generator=generator(seed))
    bank = torch.cat([base, base, base])
    label = torch.randint(0, 5, (180,), generator=generator(seed + 10))
    query = torch.cat([torch.randn(50, 24, generator=generator(seed + 20)), base[:10]])
    order = torch.randperm(180, generator=generator(seed + 30))
    before = predict(bank, label, query, (1, 2, 4, 20), CPU)
    after = predict(bank[order], label[order], query, (1, 2, 4, 20), CPU)
    for k, predicted in before.items():
        assert torch.equal(predicted, after[k]), k


@pytest.mark.usefixtures("chunks")
def test_collapsed_features_give_the_lowest_labels() -> None:
    bank = torch.full((100, 8), 0.3)
    label = torch.arange(100).flip(0) // 10
    near = neighbour_search.nearest(bank, label, bank[:3], 15, CPU)
    assert near.tolist() == [[*range(90, 100), *range(80, 85)]] * 3


def test_number_of_queries_and_of_bank_images_changes_no_neighbour() -> None:
    bank, query = torch.randn(9000, 32, generator=generator(0)), torch.randn(600, 32, generator=generator(1))
    label = torch.randint(0, 10, (9000,), generator=generator(2))
    whole = neighbour_search.nearest(bank, label, query, 20, CPU)
    for part in (slice(0, 1), slice(3, 40), slice(511, 514)):
        assert torch.equal(neighbour_search.nearest(bank, label, query[part], 20, CPU), whole[part])
    kept = torch.unique(whole[:2])  # a far smaller bank that still holds the neighbours
    again = neighbour_search.nearest(bank[kept], label[kept], query[:2], 20, CPU)
    assert torch.equal(kept[again], whole[:2])


def test_vote_is_unweighted_and_draws_go_to_the_lowest_label() -> None:
    labels = torch.tensor([[5, 0, 0], [4, 4, 9], [9, 2, 7], [3, 1, 3]])
    assert neighbour_search.vote(labels).tolist() == [0, 4, 2, 3]
    assert neighbour_search.vote(labels[:, :2]).tolist() == [0, 4, 2, 1]


def test_keys_order_as_similarities_do() -> None:
    values = torch.tensor([[-torch.inf, -1.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0]])
    keys = neighbour_search._keys(values, torch.zeros(8, dtype=torch.int64))[0].tolist()
    assert keys[3] == keys[4]
    assert sorted(set(keys)) == keys[:4] + keys[5:]
    same = neighbour_search._keys(torch.zeros(1, 3), torch.tensor([7, 8, 2**31]))[0].tolist()
    assert same == sorted(same, reverse=True)  # the lower rank first


def test_a_zero_vector_is_equally_far_from_everything() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    label = torch.tensor([2, 1, 0])
    assert predict(bank, label, torch.tensor([[0.0, 0.0], [2.0, 0.0]]), (1,), CPU)[1].tolist() == [0, 2]
    assert neighbour_search.nearest(bank, label, torch.tensor([[-1.0, 0.0]]), 3, CPU).tolist() == [
        [2, 1, 0]
    ]  # similarities 1, 0, -1


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_search_set_is_named(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k = {k}: the search set has 3 images"):
        predict(torch.eye(3), torch.arange(3), torch.eye(3), (k,), CPU)


def test_bad_features_are_refused() -> None:
    broken = torch.eye(3)
    broken[1, 1] = torch.nan
    with pytest.raises(DataError, match="search features: 1 of 3 rows"):
        predict(broken, torch.arange(3), torch.eye(3), (1,), CPU)
    with pytest.raises(DataError, match="query features: 1 of 3 rows"):
        predict(torch.eye(3), torch.arange(3), broken, (1,), CPU)
    with pytest.raises(DataError, match="do not fit"):
        predict(torch.eye(3), torch.arange(3), torch.eye(4), (1,), CPU)
    assert neighbour_search.nearest(torch.eye(3), torch.arange(3), torch.empty(0, 3), 1, CPU).shape == (0, 1)


def test_features_without_a_direction_are_refused() -> None:
    """They would score as ties, at chance, and look like a result."""
    sound, label = torch.eye(3), torch.arange(3)
    long = sound.clone()
    long[2] = 1e30  # finite, and its square is not
    for what, bank, query in (("search", long, sound), ("query", sound, long)):
        with pytest.raises(DataError, match=f"{what} features: 1 of 3 rows are too long for float32"):
            predict(bank, label, query, (1,), CPU)
    none = torch.zeros(3, 3)
    for what, bank, query in (("search", none, sound), ("query", sound, none), ("query", sound, none + 1e-30)):
        with pytest.raises(DataError, match=f"{what} features: all of them are zero"):
            predict(bank, label, query, (1,), CPU)


# --- blocks whose better columns are gathered, and memory ---------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("few", [0, 1, 3, 1000])
def test_gathering_and_ranking_agree(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Ties and a bank that gets better towards its end, so that rows go either way."""
    monkeypatch.setattr(neighbour_search, "_FEW", few)
    monkeypatch.setattr(neighbour_search, "GROUPS", 8)
    monkeypatch.setattr(neighbour_search, "QUERY_BYTES", 1)
    bank, query = signs(300, 16, seed=1), signs(41, 16, seed=2)
    order = torch.argsort(bank @ query[0])
    label = torch.arange(300) // 50
    assert neighbour_search.nearest(bank[order], label, query, 7, CPU).tolist() == oracle(bank[order], label, query, 7)[0]


def clustered(bank: int, queries: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    centre = torch.randn(30, dim, generator=generator(1))
    label, asked = torch.arange(bank) % 30, torch.randint(0, 30, (queries,), generator=generator(2))
    rows = centre[label] + 2 * torch.randn(bank, dim, generator=generator(3))
    return rows, label, centre[asked] + 2 * torch.randn(queries, dim, generator=generator(4))


def test_twenty_thousand_clustered_features_as_faiss_and_scikit_learn() -> None:
    bank, label, query = clustered(20_000, 300, 128)
    unit_bank, unit_query = (torch.nn.functional.normalize(rows, dim=1) for rows in (bank, query))
    near = neighbour_search.nearest(bank, label, query, 20, CPU)
    index = faiss.IndexFlatIP(128)
    index.add(unit_bank.numpy())
    theirs = torch.from_numpy(index.search(unit_query.numpy(), 20)[1])
    model = KNeighborsClassifier(n_neighbors=20, metric="cosine", algorithm="brute").fit(bank.numpy(), label.numpy())
    others = torch.from_numpy(model.kneighbors(query.numpy(), 20)[1])
    exact = unit_query.double() @ unit_bank.double().T
    for found in (theirs, others):
        differs = near != found
        assert differs.float().mean() < 0.001
        gap = (exact.gather(1, near) - exact.gather(1, found)).abs()
        assert float(gap.max()) < 1e-6  # what differs is the order of near-equals
    predicted = predict(bank, label, query, (1, 20), CPU)
    assert torch.equal(predicted[1], label[theirs[:, 0]])
    assert torch.equal(predicted[20], neighbour_search.vote(label[theirs]))
    assert np.array_equal(predicted[20].numpy(), model.predict(query.numpy()))


MEMORY = """
import resource, sys, numpy as np, torch
from isd_repro.evaluations import neighbour_search
torch.set_num_threads(1)
rows, dim = 12_000, 2048
bank = torch.from_numpy(np.memmap(sys.argv[1], np.float32, "c", shape=(rows, dim)))
label = torch.arange(rows) % 100 if sys.argv[2] == 'mixed' else torch.arange(rows) // 120
neighbour_search.nearest(bank[:1000], label[:1000], bank[:100].clone(), 20, torch.device("cpu"))
def own():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("RssAnon", "VmHWM", "RssFile")))
    return int(fields["RssAnon"].split()[0]) / 1024
import threading, time
peak, stop = [own()], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak.append(own())
before = own()
thread = threading.Thread(target=watch); thread.start()
neighbour_search.nearest(bank, label, bank[:100].clone(), 20, torch.device("cpu"))
stop.set(); thread.join()
print(max(peak) - before)
"""


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_a_memory_mapped_bank_is_never_copied(tmp_path: Path, order: str) -> None:
    """98 MB of features; anonymous memory, which a copy would be, grows by a few blocks alone."""
    path = tmp_path / "bank"
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        block = draw.standard_normal((1000, 2048), dtype=np.float32)
        for at in range(12):
            file.write((block + np.float32(at)).tobytes())
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path), order], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 90, f"{done.stdout} MB"
