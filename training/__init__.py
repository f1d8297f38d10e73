"""Programs that train: `python -m training.train --help`."""

from dynnet.evaluation.waiting import sleep_soon

sleep_soon()
