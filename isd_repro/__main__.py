"""The process `isd-repro`, also as `python -m isd_repro`, which torchrun starts."""

import gc
import sys

from isd_repro.cli import main
from isd_repro.runtime import signals

ALLOCATIONS = 50_000  # between two searches for cyclic garbage, in place of 700


def run() -> None:
    """Run the command and end the process.

    Two settings of Python's search for cyclic garbage make a command start and end faster. While modules are imported, nearly
    everything is kept, so the search is rare. Before it ends, Python searches everything once more, which takes a second or two
    with torch loaded; `gc.freeze` spares that. Triton, if it is loaded, would report frozen objects as leaks.
    """
    gc.set_threshold(ALLOCATIONS)
    try:
        main()
    finally:
        signals.ignore()
        if "triton" not in sys.modules:
            gc.freeze()


if __name__ == "__main__":
    run()
