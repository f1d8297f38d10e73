"""Programs that train: `python -m training.train --help`."""

import os

# Before torch starts its threads: those that wait soon sleep, so that on a shared machine the one they wait for gets a
# core (libgomp's own count where there are more threads than cores; by default it spins for 300,000 turns).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
