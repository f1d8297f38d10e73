"""The guide says what is so: its blocks of code run, page by page, and its words are those that are printed."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from dynnet import errors

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$|^<!-- setup\n(.*?)^-->$", re.M | re.S)
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if BLOCK.search(page.read_text()))


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """Of a page: "python" or "pycon", code, and the line it begins at. What sets up a page is not shown in it."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        yield found[1] or "python", found[2] or found[3], text[: found.start()].count("\n") + 1


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with forty images of two classes, and a recipe, in which timm fetches no weights."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 10)):
        for name, low in (("cat", 0), ("dog", 128)):
            folder = tmp_path / "my_images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(low, low + 128, (48, 48, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    (tmp_path / "recipe.yaml").write_text("joint: {epochs: 1}")
    create = timm.create_model

    def offline(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, place: Path) -> None:
    names: dict[str, Any] = {"__name__": page}
    for kind, code, line in blocks(DOCS / f"{page}.md"):
        if kind == "pycon":
            test = doctest.DocTestParser().get_doctest(code, names, page, f"{page}.md", line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            told = io.StringIO()
            runner.run(test, out=told.write, clear_globs=False)
            assert runner.failures == 0, told.getvalue()
            names.update(test.globs)
        else:
            code = code.replace("range(3)", "range(1)")  # epochs, to save time
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * line + code, f"{page}.md", "exec"), names)


def test_every_error_is_explained() -> None:
    told = set(re.findall(r"^## (\w+)$", (DOCS / "errors.md").read_text(), re.M))
    raised = {
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.DynnetError) and found is not errors.DynnetError
    }
    assert told == raised
