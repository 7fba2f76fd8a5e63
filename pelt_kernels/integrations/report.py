"""What `accelerate` did to a model, to read and to print."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .replacement import Replacement

LAYER = re.compile(r"\.\d+(?=\.|$)")  # the number of a layer in a module's name


@dataclass(frozen=True)
class Report:
    """The modules of a model by what became of them, by their names.

    Attributes:
        served: operator -> the modules that run on it.
        left_alone: module -> why it runs as its library made it.
        exceptions: module that is served -> the calls that go its library's own way all the same.
    """

    served: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many modules are served."""
        return sum(map(len, self.served.values()))

    def __str__(self) -> str:
        lines = [f"{self.count} modules accelerated, {len(self.left_alone)} left alone"]
        rows = [(operator, name, "") for operator, names in self.served.items() for name in names]
        rows += [("left alone", *pair) for pair in self.left_alone.items()]
        rows += [("except", *pair) for pair in self.exceptions.items()]
        alike = Counter((title, LAYER.sub(".*", name), reason) for title, name, reason in rows)
        for (title, name, reason), count in alike.items():
            lines.append(f"  {title:<17} {count:>3} x {name}{': ' if reason else ''}{reason}")
        return "\n".join(lines)


def report_of(found: Iterable[Replacement]) -> Report:
    """The report on replacements, all of which were made."""
    report = Report()
    for each in found:
        if each.accelerated is None:
            report.left_alone[each.name] = each.reason
            continue
        report.served[each.operator] = (*report.served.get(each.operator, ()), each.name)
        if each.reason:
            report.exceptions[each.name] = each.reason
    return report
