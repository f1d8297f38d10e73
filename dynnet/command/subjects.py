"""What a user names on the command line: a model of the zoo, a file, an exported folder, or one of timm's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dynnet.deploy.manifest import NAME
from dynnet.errors import CheckpointError, did_you_mean


class Subject(NamedTuple):
    """What was found.

    Attributes:
        name: as it was named.
        kind: "zoo", "file", "exported" or "timm".
        model: wrapped or plain, in eval mode; a `dynnet.deploy.Runner` of an exported folder.
    """

    name: str
    kind: str
    model: Any


def find(name: str, threads: int | None = None, pretrained: bool = False) -> Subject:
    """A model by whatever it is called.

    Args:
        name: of a folder that `dynnet.export` wrote, a file that `dynnet.save` wrote, a model of the zoo, or timm's.
        threads: of the engine, for an exported folder.
        pretrained: give a model of timm's its weights, which may be fetched for that.

    Raises:
        CheckpointError: there is none, with names that are like it.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / NAME).is_file():
            raise CheckpointError(
                f"the folder {name!r} holds no exported model ({NAME} is missing); dynnet export makes one"
            )
        from dynnet.deploy import Runner

        return Subject(name, "exported", Runner(path, threads))
    if path.is_file():
        import dynnet

        return Subject(name, "file", dynnet.load(path).eval())
    import dynnet

    if name in dynnet.list_models():
        return Subject(name, "zoo", dynnet.create_model(name))
    import timm

    if timm.is_model(name):
        from dynnet.files.creation import unknown_to_timm

        if told := unknown_to_timm(name):
            raise CheckpointError(told)
        return Subject(name, "timm", timm.create_model(name, pretrained=pretrained).eval())
    known = [*dynnet.list_models(), *timm.list_models()]
    raise CheckpointError(
        f"{name!r} is no file or folder, no model of the zoo ({', '.join(dynnet.list_models())}), and none of timm's"
        f"{did_you_mean(name, known)}"
    )
