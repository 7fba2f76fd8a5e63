"""Trackers of experiments (tensorboard, wandb, ...), which transformers' own callbacks serve."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .errors import UsageError, check_choice, reason


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker that transformers does not know, or whose package is not
    installed.
    """
    for name in names:
        check_choice("report-to", name, tuple(INTEGRATION_TO_CALLBACK))
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:  # its sentence names the package
            raise UsageError(f"report-to: {reason(error)}") from error
