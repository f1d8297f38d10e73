"""The report's page says what was certified, or why nobody exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import report

REPORTS = Path(__file__).parent / "reports.json"


@pytest.mark.parametrize(
    ("first", "said", "told"),
    [
        ("inf", {"needed": 1196}, "Nothing could be certified, so nobody exits; some 1,196 held-out images may do."),
        (
            "-inf",
            {"certificate": {"of": "lost", "delta": 0.05, "failures": 3, "samples": 99}},
            "confidence: of 99 images",
        ),
    ],
)
def test_the_page_says_what_was_certified(first: str, said: dict[str, Any], told: str) -> None:
    results = json.loads(REPORTS.read_text())[0]
    results["calibration"] |= {"goal": "risk", "needed": None, **said}
    results["thresholds"] = [first, *["inf"] * (len(results["exits"]) - 1)]
    text = " ".join(report.page(results, REPORTS.parent, []).split())
    assert (told in text, "Switched off" in text) == (True, False)
