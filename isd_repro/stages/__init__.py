"""One file, one stage, one command."""
