"""`params.yaml`: every key with its type and range, and one reader that names the line of every mistake."""
