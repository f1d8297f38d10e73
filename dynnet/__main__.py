"""`python -m dynnet` is the command `dynnet`."""

import sys

from dynnet.command.program import main

sys.exit(main())
