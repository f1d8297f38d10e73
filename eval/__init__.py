"""Programs that measure: `python -m eval.report`, `eval.latency`, `eval.coverage`."""
