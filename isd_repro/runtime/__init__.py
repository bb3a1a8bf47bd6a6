"""What keeps a long run whole: files, locks, signals, exit codes, and the processes that train together."""
