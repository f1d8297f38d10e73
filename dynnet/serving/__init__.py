"""Exported models behind a door: what requests hold, what they are answered, and adapters to servers. No torch."""
