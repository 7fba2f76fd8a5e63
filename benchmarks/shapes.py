"""Which sizes are measured: cases of the contracts at the sizes of real models, and sweeps in which
one size grows.

An operator without a row here is measured on the short list of its contract's own cases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pelt_kernels.ops._dispatch import contract_of

from .from_tests import Case, cases

# Inputs that a method keeps frozen, so that their gradients are not computed.
FROZEN = {"lora_linear": {"weight", "bias"}, "masked_weight": {"w0"}}
# A mask, and the inputs of which nothing is needed where it is False.
BEHIND_MASK = {
    "prefix_attention": ("key_mask", ("k", "v")),
    "symmetric_kl": ("mask", ("z1", "z2")),
}


def _sized(operator: str, like: str, id: str, is_quick: bool, **sizes: Any) -> Case:
    """The contract's case ``like`` at other sizes; a size that is an attribute is set there."""
    case = cases.case_of(operator, like)
    attributes = {name: sizes.pop(name) for name in set(sizes) & set(case.attributes)}
    return replace(
        case,
        id=id if like == "unipelt" else f"{id}-{like}",
        sizes={**case.sizes, **sizes},
        attributes={**case.attributes, **attributes},
        is_quick=is_quick,
    )


def _adapter(t: int, d: int, r: int, like: str = "unipelt", is_quick: bool = True) -> Case:
    """``t`` rows in sentences of 128."""
    s = min(t, 128)
    return _sized(
        "gated_adapter", like, f"T{t}-D{d}-R{r}", is_quick, B=t // s, S=s, D=d, R=r, M=4, M_up=4
    )


def _attention(
    b: int, s: int, e: int, p: int, like: str = "unipelt", is_quick: bool = True
) -> Case:
    """Twelve heads."""
    sizes = {"B": b, "H": 12, "G": 12, "S": s, "N": s, "E": e, "P_i": (p,), "scale": e**-0.5}
    return _sized("prefix_attention", like, f"B{b}-S{s}-E{e}-P{p}", is_quick, **sizes)


def _lora(t: int, d: int, r: int, like: str = "unipelt", is_quick: bool = True) -> Case:
    """``t`` rows in sentences of 128."""
    sizes = {"B": t // 128, "S": 128, "Din": d, "Dout": d, "R_i": (r,), "size_i": (d,)}
    return _sized("lora_linear", like, f"T{t}-D{d}-R{r}", is_quick, **sizes)


def _masked(d_out: int, d_in: int) -> Case:
    """Half of the entries stay."""
    sizes = {"Dout": d_out, "Din": d_in, "keep": d_out * d_in // 2}
    return _sized("masked_weight", "half", f"{d_out}x{d_in}", True, **sizes)


CASES = {
    "gated_adapter": [
        _adapter(128, 768, 48),
        _adapter(1024, 768, 48),
        _adapter(4096, 768, 48),
        _adapter(4096, 1024, 64),
        _adapter(2048, 4096, 64),
        *(
            _adapter(1024, 768, 48, like, is_quick=False)
            for like in ("adamix", "vlm", "hyperpelt", "dropout", "token_gate")
        ),
    ],
    "prefix_attention": [
        _attention(16, 128, 32, 10),
        _attention(16, 128, 64, 30),
        _attention(8, 512, 32, 50),
        _attention(8, 512, 64, 30),
        *(
            _attention(16, 128, 64, 30, like, is_quick=False)
            for like in ("dropout", "causal", "t5", "grouped_query")
        ),
    ],
    "lora_linear": [
        _lora(1024, 768, 8),
        _lora(1024, 768, 16),
        _lora(4096, 1024, 8),
        _lora(4096, 1024, 16),
        _lora(1024, 768, 8, "lora"),
        _lora(4096, 1024, 16, "lora"),
        *(_lora(1024, 768, 8, like, is_quick=False) for like in ("dropout", "adamix")),
    ],
    "masked_weight": [_masked(768, 768), _masked(768, 3072)],
    "symmetric_kl": [
        _sized("symmetric_kl", "tokens", "T512-C2", True, T=512, C=2),
        _sized("symmetric_kl", "tokens", "T512-C30522", True, T=512, C=30522),
    ],
}
# Beside those, what fills a GPU.
ON_GPU = {
    "gated_adapter": [
        *(_adapter(8192, d, 64) for d in (768, 1024, 4096)),
        *(_adapter(32768, d, 64) for d in (768, 1024, 4096)),
    ],
    "prefix_attention": [
        _attention(32, 128, 64, 10),
        _attention(32, 512, 64, 30),
        _attention(16, 1024, 64, 30),
        _attention(2, 8192, 128, 30),
    ],
    "lora_linear": [
        _lora(2048, 768, 16, "lora"),
        _lora(8192, 1024, 16, "lora"),
        _lora(8192, 4096, 16, "lora"),
        _lora(8192, 1024, 16),
    ],
}
# Small enough for a test to count what kernels do, and large enough for their loops to go round.
COUNTED = {
    "gated_adapter": _adapter(128, 512, 48),
    "prefix_attention": _attention(1, 128, 64, 30),
    "lora_linear": _lora(128, 512, 8, "lora"),
    "masked_weight": _masked(128, 512),
    "symmetric_kl": _sized("symmetric_kl", "tokens", "T64-C2000", True, T=64, C=2000),
}
SWEEPS = {
    "gated_adapter": {
        "T": [_adapter(2**n, 768, 48) for n in range(7, 13)],
        # 256 rows: with more, one of the values drawn lies 1e-7 from ReLU's kink, where float32 and
        # the float64 truth may take different sides. A test looks for such values.
        "D": [_adapter(256, 2**n, 48) for n in range(7, 13)],
        "R": [_adapter(256, 768, 2**n) for n in range(3, 9)],
    },
    "prefix_attention": {
        "S": [_attention(4, 2**n, 64, 30) for n in range(5, 11)],
        "P": [_attention(4, 128, 64, p) for p in (1, 3, 10, 30, 100, 300)],
    },
    "lora_linear": {
        "T": [_lora(2**n, 768, 8) for n in range(7, 13)],
        "D": [_lora(1024, 2**n, 8) for n in range(7, 12)],
        "R": [_lora(1024, 768, 2**n) for n in range(2, 9)],
    },
}


def swept(operator: str) -> list[Case]:
    """The cases of an operator's sweeps."""
    return [case for cases in SWEEPS.get(operator, {}).values() for case in cases]


def cases_of(operator: str, device: str) -> list[Case]:
    """What is measured of an operator on a kind of device."""
    own = [case for case in cases.cases_of(operator) if case.is_quick]
    more = ON_GPU.get(operator, []) if device == "cuda" else []
    return [*CASES.get(operator, own), *more]


def entries(operator: str, case: Case) -> int:
    """How many numbers the inputs are."""
    values = cases.make_blanks(contract_of(operator).CONTRACT, case, torch.float32, "meta")
    tensors = [t for value in values for t in (value if isinstance(value, list) else [value])]
    return sum(t.numel() for t in tensors if t is not None)


def flops(operator: str, case: Case, seen: float = 1.0) -> tuple[float, float]:
    """The fewest multiplications and additions of forward and backward in the operator's own
    products, from what the contract saves; 0 where bytes are all that counts. ``seen`` is the share
    of the keys that a mask leaves.
    """
    z = case.sizes
    if operator == "gated_adapter":
        # Backward: two products for the weights and two for the rows. The gate's gradient needs no
        # up projection again, <dy, up(a)> is <dy w_up, a>.
        once = z["B"] * z["S"] * z["D"] * z["R"]
        return 4 * once, 8 * once
    if operator == "prefix_attention":
        s, n = z["S"], z["N"]
        pairs = s * n
        if case.attributes.get("is_causal"):
            pairs = sum(min(max(row + n - s + 1, 0), n) for row in range(s))
        once = z["B"] * z["H"] * (seen * pairs + s * sum(z["P_i"])) * z["E"]
        return 4 * once, 10 * once
    if operator == "lora_linear":
        rows, base = z["B"] * z["S"], z["Din"] * z["Dout"]
        branches = sum(z["R_i"]) * (z["Din"] + z["Dout"])
        return 2 * rows * (base + branches), 2 * rows * (base + 2 * branches)
    return 0, 0
