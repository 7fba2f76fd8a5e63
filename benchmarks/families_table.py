"""Which method works in which family of models. `python_tests/models/test_families_table.py` trains
every pair that works and reads the refusal of every other, `benchmarks.readme` writes the table.
"""

from __future__ import annotations

from typing import NamedTuple

from pelt_kernels.methods import PRESETS
from pelt_kernels.models import FAMILIES

WITHOUT_BIASES = (
    "gemma", "gemma3_text", "llama", "mistral", "modernbert", "mt5", "qwen3", "t5",
)  # fmt: skip
WITHOUT_A_HEAD = (
    "bart", "clip_vision_model", "gemma", "gemma3_text", "gpt2", "llama", "mbart", "mistral", "mt5",
    "qwen2", "qwen3", "t5",
)  # fmt: skip


class Gap(NamedTuple):
    """Methods that some families cannot have, the words of the refusal that say why, and what
    works.
    """

    methods: tuple[str, ...]
    families: tuple[str, ...]
    why: str
    instead: str = ""


GAPS = (
    Gap(
        ("unipelt", "unipelt-ap", "prefix", "control_prefixes", "hyperpelt", "mam"),
        ("deberta-v2", "mpnet"),
        "expected a model whose attention can be given further keys",
        "; `UniPELTConfig(prefix=None)` and `HyperPELTConfig(prefix_length=0)` work",
    ),
    Gap(("bitfit",), WITHOUT_BIASES, "expected a model with biases"),
    Gap(
        ("head",),
        WITHOUT_A_HEAD,
        "expected a model with a head, such as one for sequence classification",
        "; with one it works",
    ),
)


def gap_of(method: str, family: str) -> Gap | None:
    """Why a family cannot have a method, or None where it can."""
    for gap in GAPS:
        if method in gap.methods and family in gap.families:
            return gap
    return None


def table() -> str:
    """The methods in the families, in Markdown: families whose layers are alike share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family, variants in FAMILIES.items():
        gaps = [gap_of(method, family) for method in PRESETS]
        cells = ["yes" if gap is None else f"no ({GAPS.index(gap) + 1})" for gap in gaps]
        rows.setdefault((str(variants), *cells), []).append(family)
    lines = [
        "| models | " + " | ".join(f"`{method}`" for method in PRESETS) + " |",
        "|---" * (len(PRESETS) + 1) + "|",
    ]
    for (_, *cells), families in rows.items():
        names = ", ".join(f"`{family}`" for family in families)
        lines.append(f"| {names} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"({number}) {gap.why}{gap.instead}  " for number, gap in enumerate(GAPS, 1)]
    lines += [
        "",
        "Models that read are classifiers here (of CLIP the vision tower alone), models that write "
        "are",
        "language models. `python_tests/models/test_families_table.py` trains every pair.",
    ]
    return "\n".join(lines) + "\n"
