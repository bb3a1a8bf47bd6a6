"""`params.yaml`: every key with its type and range, and a reader whose errors name line and key."""
