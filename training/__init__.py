"""Programs that train: `python -m training.train --help`."""
