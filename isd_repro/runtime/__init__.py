"""Files, locks, signals, exit codes and distributed processes, which make long runs reliable."""
