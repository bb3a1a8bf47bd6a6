"""The training loop and its parts; nothing here depends on a particular method."""
