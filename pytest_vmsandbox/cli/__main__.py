"""`python -m pytest_vmsandbox.cli`: the command `vmsandbox`, for a Python without scripts."""

import sys

from pytest_vmsandbox.cli import main

sys.exit(main())
