"""Files, locks, signals, exit codes and distributed processes: what makes a long run reliable."""
