"""Files as somebody else might make them: changed, and signed anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dynnet.files.bundles import read_bundle, write_bundle


def resign(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change the tensors and the description of a file, and give it a right SHA-256."""
    tensors, about = read_bundle(path)
    change(tensors, about)
    write_bundle(path, tensors, about)
