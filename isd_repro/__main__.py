"""The process `isd-repro`, also as `python -m isd_repro`, which torchrun starts."""

import gc

from isd_repro.cli import main
from isd_repro.runtime import signals


def run() -> None:
    """Run the command and end the process.

    Python first looks for cyclic garbage, which takes a second or two once torch is loaded. `gc.freeze` spares that.
    """
    try:
        main()
    finally:
        signals.ignore()
        gc.freeze()


if __name__ == "__main__":
    run()
