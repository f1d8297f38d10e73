"""What the guide shows of the command is what the wheel prints, outside of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"\d+(?:\.\d+)*(?:e[+-]\d+)?")
# What times, and what versions and kernels decide.
VOLATILE = re.compile(r"\bms\b|times as fast|engine onnxruntime|differ from PyTorch|\.png +\d")


REPLAY = """
import sys
from dynnet.command.program import main

for command in sys.argv[1:]:
    print("$", command, flush=True)
    assert main(command.split()[1:]) == 0
"""


def commands() -> list[tuple[str, list[str]]]:
    """Of the page: a command, and the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", (DOCS / "command.md").read_text(), re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def comparable(line: str) -> str:
    """Without times, and without how columns are filled up for them."""
    if ".png" in line and not line.startswith("$"):  # the last column is a time
        line = line.rpartition(" ")[0]
    elif VOLATILE.search(line):
        line = NUMBER.sub("#", line)
    return " ".join(line.split())


def test_a_fresh_environment_prints_the_transcript(installed: Path, tmp_path: Path) -> None:
    for picture in (DOCS / "images" / "digits").glob("*.png"):
        shutil.copy(picture, tmp_path)
    # What [deploy] does not bring cannot be imported.
    others = ("sklearn", "scipy", "jsonargparse", "matplotlib", "pandas")
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({others}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    path = f"{installed.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    shown = commands()
    assert {command.split()[1] for command, _ in shown} == {"list", "info", "predict", "export", "bench"}

    def run(*argv: str) -> list[str]:
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert "bench" in " ".join(run("dynnet", "--help"))
    # All in one process: most of a command is the import of torch.
    (tmp_path / "replay.py").write_text(REPLAY)
    said = run("python", "replay.py", *(command for command, _ in shown))
    expected = [line for command, lines in shown for line in (f"$ {command}", *lines)]
    assert [comparable(line) for line in said] == [comparable(line) for line in expected]
