"""What a fork server imports once, so that its forks begin where a command's own work begins."""

from __future__ import annotations

import importlib
import pkgutil

import torch

import isd_repro
from isd_repro import provenance

torch.set_num_threads(1)
for module in pkgutil.walk_packages(isd_repro.__path__, "isd_repro."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
provenance.remember_code()
