"""What the gates of a trained adapter do, and what they are worth: `pelt-kernels gates`.

`source` finds the adapter and the rows, `measure` runs them through it, `relations` tests which
traits of a text the gates follow, `ablation` alters the gates and `comparison` says what of that is
noise. `report` makes the numbers of it, `findings` says them in words and `page` shows both.
"""

from .report import Watch, report_gates

__all__ = ["Watch", "report_gates"]
