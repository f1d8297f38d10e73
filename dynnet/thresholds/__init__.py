"""Thresholds from held-out data: what every exit says, and what is best for a goal."""
