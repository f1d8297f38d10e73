"""A model in an engine, to be timed there: exported once for every set of exits that run."""

from __future__ import annotations

from pathlib import Path

import torch

from dynnet import DynamicModel, export
from dynnet.backbone.chain import bare_of
from dynnet.deploy import Runner
from dynnet.deploy.manifest import Manifest


class Exported:
    """Folders of a model and its bare backbone, made when they are first needed.

    Args:
        model: wrapped; its thresholds may change.
        engine: as for `dynnet.export`.
        folder: that is there, and in which folders are made.
    """

    def __init__(self, model: DynamicModel, engine: str, folder: str | Path) -> None:
        self.model, self.engine, self.folder = model, engine, Path(folder)
        self._there: dict[tuple[bool, ...] | None, Path] = {}

    def dynamic(self) -> Runner:
        """The model at its present thresholds, in as many threads as PyTorch has.

        Raises:
            ExportError: it cannot be exported.
        """
        runner = Runner(self.folders()[1], torch.get_num_threads())
        runner.thresholds = self.model.thresholds
        return runner

    def take(self, folder: Path) -> Manifest:
        """Export the model with the exits that run now into a folder of the caller's."""
        manifest = export(self.model, folder, engine=self.engine)
        self._there[self.model.running] = folder
        return manifest

    def every_exit(self) -> Runner:
        """The model with a stage for each of its exits, also where they are switched off."""
        every = (True,) * len(self.model.exits)
        if every not in self._there:
            export(self.model, self.folder / "every", engine=self.engine, exits="all")
            self._there[every] = self.folder / "every"
        return Runner(self._there[every], torch.get_num_threads())

    def folders(self) -> tuple[Path, Path]:
        """Of its bare backbone, and of the model at its present thresholds; they are made if they are not there."""
        running = self.model.running
        if None not in self._there:
            export(bare_of(self.model), self.folder / "dense", engine=self.engine, input_size=self.model.input_size)
            self._there[None] = self.folder / "dense"
        if running not in self._there:
            self.take(self.folder / f"exits_{''.join('01'[on] for on in running)}")
        return self._there[None], self._there[running]

    def dense(self) -> Runner:
        """Its bare backbone."""
        return Runner(self.folders()[0], torch.get_num_threads())
