"""Typed parameters of the evaluating stages; `params` holds the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isd_repro.config.fields import Count, Frozen, Many, Natural, Positive, Unit, Words


class Knn(Frozen):
    """Nearest-neighbour evaluation."""

    k: Annotated[Many[Count], Field(min_length=1)] = (1, 20)


class Linear(Frozen):
    """The paper's linear protocol (paper.md 4); a shortened one must be named as such."""

    epochs: Count = 40
    batch_size: Count = 256
    lr: Positive = 0.01
    sgd_momentum: Unit = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    milestones: Many[Count] = (15, 30)
    factor: Positive = 0.1
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    flip: Unit = 0.5
    seed: Natural = 0
    protocol: Words = "paper"  # the name that tables print; `paper` only with the paper's values


class FewLabel(Frozen):
    """Linear evaluation where few images are labelled (DEV-18); the head's settings are those of `linear`."""

    fractions: Annotated[Many[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = (0.01, 0.1)
    lists_env: Words = ""  # environment variable naming a folder with 1percent.txt and so on; empty or unset: drawn
    seed: Natural = 0  # of the draw


TransferName = Literal[
    "food101", "cifar10", "cifar100", "sun397", "cars", "dtd", "pets", "caltech101", "flowers102", "aircraft", "cifar10-folder"
]


class Transfer(Frozen):
    """Logistic regression on the frozen features of other data sets (paper.md 4, Transfer; DEV-19)."""

    sets: Many[TransferName] = ()  # rows of data/transfer_sets.py
    c_min: Positive = 1e-5  # C is sklearn's: the summed loss counts C times, half the squared weights once
    c_max: Positive = 1e6
    c_values: Annotated[int, Field(ge=2, le=10_000)] = 45  # logarithmically spaced, both ends included
    iterations: Count = 1000  # of L-BFGS at most, for each C
    tolerance: Positive = 1e-5  # largest entry of the mean loss's gradient that counts as none
    seed: Natural = 0  # of validation images, where a set has none of its own


class Evaluation(Frozen):
    """Settings of the evaluating stages, one for all runs of a profile."""

    knn: Knn = Knn()
    linear: Linear = Linear()
    few_label: FewLabel = FewLabel()
    transfer: Transfer = Transfer()
