"""Runs the README's code on a tiny model, as the installed package carries it in its metadata. Needs
the package, PEFT, and nothing of the tests but this file.
"""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

NAME = "bert-base-uncased"  # the model of the README
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]


def code_of(readme: str) -> list[str]:
    """The blocks of Python."""
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def main() -> None:
    import torch
    from transformers import BertConfig, BertModel

    import pelt_kernels

    blocks = code_of(str(metadata("pelt-kernels").get_payload()))
    assert blocks, "expected code in the description of pelt-kernels, got none"
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
        for code in blocks:
            names: dict[str, object] = {}
            adapter = f'"{folder}/adapter"'
            exec(code.replace(NAME, folder).replace('"adapter"', adapter), names)
            model: Any = names["model"]
            if not isinstance(model, pelt_kernels.PeltModel):
                # By name, so that nothing else may serve the calls.
                with pelt_kernels.use_backend("cpu"):
                    ids, labels = torch.ones(2, 8, dtype=torch.long), torch.tensor([0, 1])
                    model(ids, labels=labels).loss.backward()
    served = sorted({choice.backend for choice in pelt_kernels.explain()})
    assert served == ["cpu"], f"expected the compiled kernels to serve, got {served}"
    pools = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libgomp" in line
    }
    assert len(pools) <= 1, f"expected torch's OpenMP alone, got {sorted(pools)}"
    print(f"{len(blocks)} blocks of code, served by {', '.join(served)}")


if __name__ == "__main__":
    main()
