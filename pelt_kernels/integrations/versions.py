"""Which versions of other libraries their layers were compared with."""

from __future__ import annotations

TESTED = {"peft": ("0.18", "0.22"), "adapters": ("1.3", "1.4")}  # from the first, before the second


def check_version(library: str, version: str) -> None:
    """Raises ValueError for a version of a library that nothing here was compared with."""
    first, before = TESTED[library]
    if not _numbers(first) <= _numbers(version) < _numbers(before):
        raise ValueError(
            f"accelerate: expected {library}>={first},<{before}, with which its layers were "
            f"compared, got {version}; install such a version, or use the model as it is"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers: a release candidate counts as its release."""
    return tuple(int(part) for part in version.split(".")[:2])
