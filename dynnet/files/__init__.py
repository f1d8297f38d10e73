"""Models in files that are whole or not there."""
