"""Every error that dynnet raises on purpose.

All are `DynnetError`s, and also the built-in type that a caller would expect (`ValueError`, `FileNotFoundError`, ...).
A message names the thing, what was got, what was expected, and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DynnetError(Exception):
    """Base of all errors raised by dynnet."""


class ExitError(DynnetError, ValueError):
    """An exit that cannot stand where it was asked for."""


class HeadError(DynnetError, ValueError):
    """An exit head that does not answer with (B, K) logits."""


class ThresholdError(DynnetError, ValueError):
    """Thresholds that do not fit the model's exits."""


class GateError(DynnetError, ValueError):
    """Gates that cannot stand where they were asked for."""


class CascadeError(DynnetError, ValueError):
    """Models that cannot stand in a row."""


class PruneError(DynnetError, ValueError):
    """Nothing to prune, or a target that cannot be met."""


class ExportError(DynnetError, ValueError):
    """A model that cannot be exported in stages."""


class InputError(DynnetError, ValueError):
    """A batch that the model cannot take."""


class RequestError(DynnetError, ValueError):
    """A request that a server does not answer.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, told: str, status: int) -> None:
        super().__init__(told)
        self.status = status


class NonFiniteError(DynnetError, ValueError):
    """NaN or infinity where a number was needed."""


class DataError(DynnetError, ValueError):
    """A dataset that is missing, empty or unreadable."""


class CalibrationError(DynnetError, ValueError):
    """A calibration goal that cannot be reached."""


class SchemaError(DynnetError, ValueError):
    """What a file says has another form than it must have; raised as part of what is wrong with the file."""


class RecipeError(DynnetError, ValueError):
    """A recipe with an unknown key or a value of the wrong type."""


# What PyTorch says where there are no numbers, and what to do about it.
_WITHOUT_NUMBERS = {
    ("meta tensor", "meta device type", "'meta' device type", "register_meta", "tensor.__format__"): (
        "it, or a hook on it, looks at numbers, and a dry run has shapes only: take that away"
    ),
    ("expected device meta",): (
        "it, or a hook on it, brings a tensor that is not the model's: keep it as a buffer, or make it on the input's "
        "device"
    ),
}


class ForwardError(DynnetError, RuntimeError):
    """What somebody's own forward raised in a dry run: the fault is the model's, or that of what it was given.

    Attributes:
        remedy: in words, where there is one that does not depend on who asked for the dry run.
    """

    def __init__(self, told: str, remedy: str | None = None) -> None:
        super().__init__(f"{told}; {remedy}" if remedy else told)
        self.remedy = remedy

    @classmethod
    def of(cls, raised: Exception, model: str) -> ForwardError:
        """The error for whatever was raised in a model's own code."""
        said = str(raised).lower()
        remedy = next((remedy for words, remedy in _WITHOUT_NUMBERS.items() if any(w in said for w in words)), None)
        return cls(f"the forward of {model} itself raised {type(raised).__name__}: {raised}", remedy)


class UnsupportedError(DynnetError, NotImplementedError):
    """Something that timm's models do, and a wrapped one cannot."""


class VerificationError(DynnetError, AssertionError):
    """A model that does not keep its promises."""


class CheckpointError(DynnetError, ValueError):
    """A checkpoint that is missing, damaged, or of another model or version."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
