"""Checks every number of a rendered report against its record, its parameters and the available files."""

from isd_repro.verify.command import verify
from isd_repro.verify.findings import VerifyOptions

__all__ = ["VerifyOptions", "verify"]
