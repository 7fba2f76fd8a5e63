"""What benchmarks share with the tests of the checkout: the cases, and the rule that a backend is
held to before it is timed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
cases = importlib.import_module("cases")
parity = importlib.import_module("parity")

Case = cases.Case
