"""How close a backend has to be to the truth: the one place where tolerances live.

Truth is the reference in float64 on inputs already rounded to the dtype; the baseline is the
reference in the dtype itself. A backend may be twice as far from the truth as the baseline, plus
two units of rounding of the largest true value. NaN and infinities have to be exactly where the
truth has them.

A tensor of few elements, such as the gradient of a gate's bias, shows the baseline's error badly:
one sum of many terms may be right by chance. Then other draws of the same case's inputs are looked
at too, and the largest error counts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def baseline_error(baseline: Tensor, truth: Tensor) -> float:
    """max|baseline - truth| over the finite true values."""
    truth = _exact(truth)
    baseline = _exact(baseline, truth.device)
    finite = truth.isfinite() & baseline.isfinite()
    return (baseline - truth)[finite].abs().max().item() if finite.any() else 0.0


def assert_close(
    found: Tensor,
    baseline: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    what: str,
    other_draws: Iterable[tuple[Tensor, Tensor]] = (),
) -> None:
    """Raises AssertionError with the numbers unless ``found`` is as close to the truth as the rule
    asks.

    ``max|found - truth| <= 2 max|baseline - truth| + 2 eps(dtype) max|truth|``; ``other_draws`` are
    further pairs of baseline and truth, read only where the first pair does not suffice.
    """
    assert found.shape == truth.shape, (
        f"{what}: expected shape {list(truth.shape)}, got {list(found.shape)}"
    )
    assert found.dtype == baseline.dtype, f"{what}: expected {baseline.dtype}, got {found.dtype}"
    exact = _exact(truth)
    found = _exact(found, exact.device)
    assert torch.equal(found.isnan(), exact.isnan()), f"{what}: {int(found.isnan().sum())} NaN"
    infinite = exact.isinf()
    assert torch.equal(found[infinite], exact[infinite]), f"{what}: infinities in the wrong places"
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (found - exact)[finite].abs().max().item()
    rounding = 2 * torch.finfo(dtype).eps * exact[finite].abs().max().item()
    allowed = 2 * baseline_error(baseline, truth) + rounding
    for pair in other_draws:
        if error <= allowed:
            break
        allowed = max(allowed, 2 * baseline_error(*pair) + rounding)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def _exact(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    return tensor.detach().to(device or tensor.device, torch.float64)
