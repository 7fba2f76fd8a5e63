"""``python -m pelt_kernels.cli`` is the command `pelt-kernels`."""

import sys

from . import main

sys.exit(main())
