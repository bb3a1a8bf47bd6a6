"""`python -m isd_repro` is `isd-repro`: torchrun starts modules."""

from isd_repro.cli import main

if __name__ == "__main__":
    main()
