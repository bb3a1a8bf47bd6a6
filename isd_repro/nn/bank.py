"""The memory bank: past teacher embeddings, first in first out."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_repro.runtime import ranks
from isd_repro.runtime.errors import ConfigError

BankInit = Literal["reference", "unit"]


class Bank(nn.Module):
    """K rows of dimension D and the position of the oldest one; both are part of the state dict.

    Read `rows` before `push`: the embeddings of a batch are never among its own anchors.
    """

    rows: Tensor

    def __init__(
        self, size: int, features: int, batch_size: int, init: BankInit = "unit", dtype: torch.dtype = torch.float32
    ) -> None:
        """Random rows, replaced after size / batch_size steps.

        `reference` normalises each column, as the released ISD ResNet-18 script does, which leaves row norms of
        sqrt(D / K); `unit` normalises each row.  # DEV-03
        Entries of unit rows are kept to 11 bits in float16 and to 8 in bfloat16, which is therefore never used.

        Raises:
            ConfigError: the batch does not divide the bank.
        """
        super().__init__()
        if size % batch_size:
            raise ConfigError(
                f"method.bank_size: {size} is not a multiple of optim.batch_size {batch_size}",
                f"use {max(batch_size, size - size % batch_size)}, so that a batch never wraps around the end of the bank",
            )
        rows_KD = torch.randn(size, features)
        self.register_buffer("rows", F.normalize(rows_KD, dim=0 if init == "reference" else 1).to(dtype))
        self.pointer = 0

    def before_push(self) -> Tensor:
        """A copy of the rows, for a loss whose gradient needs them after `push`."""
        return self.rows.clone()

    @torch.no_grad()
    def push(self, embedding_BD: Tensor) -> None:
        """Overwrite the oldest rows with a batch of unit-norm teacher embeddings, those of all ranks."""
        embedding_BD = ranks.gather(embedding_BD)
        count = len(embedding_BD)
        self.rows[self.pointer : self.pointer + count].copy_(embedding_BD)
        self.pointer = (self.pointer + count) % len(self.rows)

    def get_extra_state(self) -> Tensor:
        """The pointer, kept as a Python int in between so that no step waits for the device."""
        return torch.tensor(self.pointer)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the pointer; `ValueError` where it is no row."""
        pointer = int(state)
        if not 0 <= pointer < len(self.rows):
            raise ValueError(f"bank: the pointer is {pointer}, the rows are {len(self.rows)}")
        self.pointer = pointer
