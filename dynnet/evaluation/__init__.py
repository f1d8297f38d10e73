"""What was done for every input, and how long it took."""
