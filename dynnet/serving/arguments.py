"""Numbers on command lines."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number of 1 or more, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of 1 or more")
    return int(text)
