"""Programs that measure: `python -m eval.report`, `eval.latency`, `eval.coverage`."""

from dynnet.evaluation.waiting import sleep_soon

sleep_soon()
