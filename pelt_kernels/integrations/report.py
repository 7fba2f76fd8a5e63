"""What `accelerate` did to a model, to read and to print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .replacement import Replacement

SHOWN = 3  # names in a line


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
        for operator, names in self.served.items():
            lines.append(f"  {operator:<20} {_named(names)}")
        for title, reasons in (("left alone", self.left_alone), ("except", self.exceptions)):
            for reason, modules in _by_reason(reasons).items():
                lines.append(f"  {title:<20} {_named(modules)}: {reason}")
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


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _named(names: Iterable[str]) -> str:
    """A count and the first names."""
    names = list(names)
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})"
