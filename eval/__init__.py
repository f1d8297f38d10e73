"""Programs that measure: `python -m eval.report`, `eval.latency`, `eval.coverage`."""

import os

# As in training/__init__.py: threads that wait soon sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
