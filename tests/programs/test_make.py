"""The Makefile's promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import os
import pytest

@pytest.mark.parametrize("number", range(20))
def test_dies(number):
    if number in (3, 4, 11):
        os.abort()
"""


def test_a_worker_that_dies_names_its_test_and_takes_no_other_with_it(tmp_path: Path) -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    options = re.search(r"^SURVIVE := (.*)$", makefile, re.MULTILINE)
    assert options is not None
    (tmp_path / "test_first.py").write_text(TESTS)
    (tmp_path / "test_second.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-n", "2", *options[1].split(), "-p", "no:cacheprovider", str(tmp_path)]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    died = {line.split()[1].strip("'") for line in told.splitlines() if line.startswith("FAILED")}
    assert died == {f"test_{file}.py::test_dies[{number}]" for file in ("first", "second") for number in (3, 4, 11)}
    assert re.search(r"6 failed, 34 passed", told), told
