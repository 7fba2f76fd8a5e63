"""``python -m pelt_kernels.cli`` is the command `pelt-kernels`."""

import sys

from . import main

# The worker processes of `compare` import this module under another name.
if __name__ == "__main__":
    sys.exit(main())
