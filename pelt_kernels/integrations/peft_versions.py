"""Which versions of PEFT its layers were compared with."""

from __future__ import annotations

TESTED = ("0.18", "0.22")  # from the first one, before the second one


def check_version(version: str) -> None:
    """Raises ValueError for a version of PEFT that nothing here was compared with."""
    if not _numbers(TESTED[0]) <= _numbers(version) < _numbers(TESTED[1]):
        raise ValueError(
            f"accelerate: expected peft>={TESTED[0]},<{TESTED[1]}, with which its layers were "
            f"compared, got {version}; install such a version, or use the model as it is"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers: a release candidate counts as its release."""
    return tuple(int(part) for part in version.split(".")[:2])
