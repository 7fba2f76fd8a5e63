"""A pytest plugin for PEFT's own tests: without a network, and, where it is asked to, with every
model that PEFT makes accelerated.

`benchmarks.peers.peft_tests` runs pytest with it. A model is accelerated again after each call of
PEFT's that may have put modules into it, as a user would. Each test's outcome goes into a file, a
line each, and so does what became of the models.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# LoRA by its own name: AdaLora, VBLoRA, TinyLora and others are other methods. What stands behind
# "Test" names a class of tests, some of which are LoRA's alone.
WANTED = re.compile(
    r"(?<![A-Za-z])(?i:lora|prefix|mixed)"
    r"|(?<=Test)(?:Lora|Mixed|MultiRank|HotSwapping|Scaling|Corda|Eva|LowCpuMemUsage)"
)
# All of whose tests are of LoRA or of what every method shares.
WHOLE = ("test_lora_", "test_low_level_api", "test_mixed", "test_tuners_utils")


def is_wanted(name: str) -> bool:
    """Whether a test is of LoRA, prefix tuning or mixed batches, by the name that pytest gives."""
    file, _, test = name.partition("::")
    return Path(file).name.startswith(WHOLE) or bool(WANTED.search(test))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("pelt_kernels")
    group.addoption("--outcomes", type=Path, help="file for the outcome of each test")
    group.addoption("--accelerated", action="store_true", help="accelerate what PEFT makes")
    parser.addoption("--regression", action="store_true", help="as PEFT's own option")


def pytest_configure(config: pytest.Config) -> None:
    """Puts the plugin's parts in place before a test is imported."""
    import tests.testing_utils as utils  # of the source distribution

    utils.hub_online_once = _as_it_is
    utils.load_dataset_english_quotes = _quotes
    if config.getoption("--accelerated"):
        config.pluginmanager.register(Acceleration(config), "pelt_kernels-acceleration")
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of other methods."""
    wanted = [item for item in items if is_wanted(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = wanted


@contextmanager
def _as_it_is(model_id: str) -> Iterator[None]:
    """Instead of PEFT's switch between online and offline: there is no network either way."""
    yield


@functools.lru_cache
def _quotes() -> Any:
    """A data set with the columns of the one that PEFT's training tests load."""
    from datasets import Dataset, DatasetDict

    quotes = [f"In {n} of {m} cases it is so." for n in range(1, 11) for m in range(11, 21)]
    rows = {"quote": quotes, "author": ["nobody"] * len(quotes), "tags": [["number"]] * len(quotes)}
    return DatasetDict({"train": Dataset.from_dict(rows)})


class Outcomes:
    """Writes what becomes of each test, its phases together."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line for each phase that says more than that it went well."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.outcome == "skipped" else "xpassed"
        line = {"test": report.nodeid, "outcome": outcome, "reason": reason_of(report)}
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def reason_of(report: Any) -> str:
    """Why a test failed or was skipped, in a line."""
    details = report.longrepr
    if report.outcome == "passed" or details is None:
        return ""
    if isinstance(details, tuple):
        return str(details[2])
    crash = getattr(details, "reprcrash", None)
    return " ".join((crash.message if crash else str(details)).split())[:300]


class Acceleration:
    """Has every model accelerated, and counts what became of its modules."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.served: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTuner

        from pelt_kernels.integrations import peft_lora
        from pelt_kernels.ops.prefix_attention import without_prefix

        # The tests' models are small, and each call shall be an operator's.
        for module, name in (
            (peft_lora, "PAYS_FROM"),
            (without_prefix, "PAYS_FROM"),
            (without_prefix, "PAYS_FROM_WITH_DROPOUT"),
        ):
            assert getattr(module, name) > 0
            setattr(module, name, 0)

        self._after(BaseTuner, "inject_adapter", lambda tuner, model, *_, **__: model)
        for kind in (PeftModel, PeftMixedModel):
            for name in ("__init__", "add_adapter", "load_adapter"):
                self._after(kind, name, lambda model, *_, **__: model)

    def _after(self, kind: type, name: str, model_of: Callable[..., Any]) -> None:
        own = getattr(kind, name)

        @functools.wraps(own)
        def then_accelerated(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            model = kwargs["model"] if name == "inject_adapter" and "model" in kwargs else None
            self._accelerate(model if model is not None else model_of(*args, **kwargs))
            return found

        setattr(kind, name, then_accelerated)

    def _accelerate(self, model: Any) -> None:
        import pelt_kernels

        try:
            report = pelt_kernels.accelerate(model)
        except ValueError as error:
            # A model that holds nothing to serve, or cannot be served now, stays PEFT's: counted.
            self.refused[str(error).partition(", got")[0]] += 1
            return
        for operator, names in report.served.items():
            self.served[operator] += len(names)

    def pytest_sessionfinish(self) -> None:
        """What became of the models, as a line of its own beside the outcomes."""
        from pelt_kernels.training.machine import backends_used

        file = self.config.getoption("--outcomes")
        if file:
            line = {"served": self.served, "refused": self.refused, "backends": backends_used()}
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
