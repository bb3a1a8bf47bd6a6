"""torchrun with readable errors: each rank reports its own error, and this module names the ranks that were killed."""

from __future__ import annotations

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from isd_repro.runtime.errors import EXIT_FAILURE


def main() -> None:
    """Exit with 1 if a rank failed, or with 128 plus the signal's number if a signal ended torchrun itself."""
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # with which torchrun ends the others
                name = signal.Signals(-failure.exitcode).name
                sys.stderr.write(f"error: rank {rank} (process {failure.pid}) was ended by {name}\n")
        sys.exit(EXIT_FAILURE)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
