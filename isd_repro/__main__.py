"""`python -m isd_repro` runs the command `isd-repro`; torchrun needs a module to start."""

from isd_repro.cli import main

if __name__ == "__main__":
    main()
