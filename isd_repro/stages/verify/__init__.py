"""Command `verify`."""

from isd_repro.stages.verify.command import verify as verify
from isd_repro.stages.verify.walk import Asked as Asked
