"""PEFT's own tests of LoRA, prefix tuning and mixed batches, as shipped and with every model that
they make accelerated: what passes before and after, and each difference.

    python -m benchmarks.peers.peft_tests [--folder FOLDER] [--files test_mixed,test_initialization]
                                          [--json FILE]

The tests come from the source distribution of the installed version, by pip from the package
registry; what they need beyond this environment goes into an environment of its own beside them.
Models of the hub are small random ones (`benchmarks.peers.peft_models`), so that nothing but the
registry is asked for. A folder that is given keeps all of it, and the outcomes of files that were
run; without one a temporary folder is used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkout import ROOT, commit
from ..rows import Rows, write
from . import peft_models

FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_initialization",
    "test_lora_conversion",
    "test_lora_variants",
    "test_low_level_api",
    "test_mixed",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_tuners_utils",
)
# What they import beyond this package's own test environment.
REQUIREMENTS = ("attrs", "datasets", "diffusers", "parameterized", "scipy")
RESULTS = ROOT / "benchmarks" / "results" / "peft_tests.jsonl"
WAYS = {"before": (), "after": ("--accelerated",)}  # and the plugin's arguments
COUNTED = ("passed", "failed", "skipped")
Outcomes = dict[str, dict[str, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts and the differences; 1 where something passes before and not after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="keeps what is fetched, made and found out")
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("--json", type=Path, help=f"file for the rows, such as {RESULTS.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(_rows(folder, options.files.split(",")))
    print(table(rows))
    print(*differences(rows), sep="\n")
    if options.json:
        write(options.json, rows)
    return 1 if any(each["before"] == "passed" for row in rows for each in row["differ"]) else 0


def _rows(folder: Path, files: Iterable[str]) -> Iterator[dict[str, Any]]:
    source = fetched(folder)
    python = _environment(folder)
    variables = os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(source)]),
    }
    make = [python, "-m", peft_models.__name__, folder / "hub"]
    _run(make, source, variables)
    for file in files:
        found = {}
        for way, more in WAYS.items():
            outcomes = folder / f"{file}.{way}.jsonl"
            if not outcomes.is_file():
                part = outcomes.with_suffix(".part")
                part.unlink(missing_ok=True)
                said = _run([python, *_pytest(source, file, part), *more], source, variables, 1)
                print(f"{file}, {way}: {said.rpartition(chr(10))[2]}", flush=True)
                with part.open("a") as stream:
                    stream.write(json.dumps({"commit": commit()}) + "\n")
                part.rename(outcomes)
            found[way] = read_outcomes(outcomes)
        yield row_of(file, found)


def fetched(folder: Path) -> Path:
    """PEFT's source distribution, unpacked. Raises CalledProcessError where pip gets none."""
    version = importlib.metadata.version("peft")
    source = folder / f"peft-{version}"
    if not source.is_dir():
        download = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        command = [sys.executable, "-m", "pip", *download, f"peft=={version}", "--dest", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    # The tests import from each other as from a package; the distribution leaves its file out.
    (source / "tests" / "__init__.py").touch()
    return source


def _environment(folder: Path) -> Path:
    """The interpreter of an environment that has this one's packages and PEFT's requirements."""
    place = folder / "environment"
    python = place / "bin" / "python"
    marker = place / "complete"
    if not marker.is_file():
        venv.create(place, with_pip=True, clear=True)
        (packages,) = place.glob("lib/python*/site-packages")
        own = sysconfig.get_paths()["purelib"]
        (packages / "own.pth").write_text(f"import site; site.addsitedir({own!r})\n")
        install = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS]
        subprocess.run(install, check=True)
        marker.touch()
    return python


def _pytest(source: Path, file: str, outcomes: Path) -> list[Any]:
    # PEFT's settings ask for coverage, and make errors of warnings of its time's transformers.
    settings = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    plugin = ["-p", "benchmarks.peers.peft_plugin", "--outcomes", outcomes]
    return ["-m", "pytest", "-q", "--tb=no", *settings, *plugin, source / "tests" / f"{file}.py"]


def _run(command: list[Any], source: Path, variables: dict[str, str], most: int = 0) -> str:
    """What a command says. Raises RuntimeError where it ends with a code above ``most``: pytest's 1
    is of tests that failed, which is an outcome.
    """
    done = subprocess.run(
        command, cwd=source, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if not 0 <= done.returncode <= most:
        raise RuntimeError(f"{command[2]} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout.rstrip()


def read_outcomes(file: Path) -> tuple[Outcomes, dict[str, Any]]:
    """What the plugin wrote: each test's outcome, and what became of the models.

    A test that fails while it is put up or taken down has failed, whatever else is said of it.
    """
    outcomes: Outcomes = {}
    models: dict[str, Any] = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if "test" not in line:
            models |= line
        elif outcomes.get(line["test"], {}).get("outcome") != "failed":
            outcomes[line["test"]] = {name: line[name] for name in ("outcome", "reason")}
    return outcomes, models


def row_of(file: str, found: dict[str, tuple[Outcomes, dict[str, Any]]]) -> dict[str, Any]:
    """A file's counts, and what differs between the two ways."""
    (before, _), (after, models) = found["before"], found["after"]
    absent = {"outcome": "absent", "reason": ""}
    differ = [
        {
            "test": test,
            "before": before.get(test, absent)["outcome"],
            "after": after.get(test, absent)["outcome"],
            "reason": after.get(test, absent)["reason"],
        }
        for test in dict.fromkeys([*before, *after])
        if before.get(test, absent)["outcome"] != after.get(test, absent)["outcome"]
    ]
    failed = Counter(each["reason"] for each in before.values() if each["outcome"] == "failed")
    return {
        "file": file,
        "before": counts(before),
        "after": counts(after),
        "differ": differ,
        "failed_before": dict(failed),
        **models,
        "versions": {
            name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")
        },
    }


def counts(outcomes: Outcomes) -> dict[str, int]:
    """How many passed, failed and were skipped; what is expected to fail and does has passed."""
    as_counted = {"xfailed": "passed", "xpassed": "passed"}
    found = Counter(as_counted.get(each["outcome"], each["outcome"]) for each in outcomes.values())
    return {name: found[name] for name in COUNTED}


def table(rows: Rows) -> str:
    """The counts in Markdown, with their sums and the conditions."""
    lines = [
        "| file of PEFT | passed, failed, skipped as shipped | accelerated | differ |",
        "|---|---|---|---|",
    ]
    sums = {way: Counter() for way in WAYS}  # type: ignore[var-annotated]
    for row in rows:
        for way, total in sums.items():
            total.update(row[way])
        cells = [_three(row[way]) for way in WAYS]
        lines.append(f"| `{row['file']}` | {' | '.join(cells)} | {len(row['differ'])} |")
    cells = [_three(total) for total in sums.values()]
    lines.append(f"| all | {' | '.join(cells)} | {sum(len(row['differ']) for row in rows)} |")
    versions = rows[0]["versions"]
    served: Counter[str] = Counter()
    for row in rows:
        served.update(row.get("served", {}))
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in rows))
    modules = ", ".join(f"{count:,} by `{operator}`" for operator, count in served.items())
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += ["", f"Modules served, once for each time a model was accelerated: {modules}."]
    return "\n".join([*lines, f"{named}; commit {commits}."]) + "\n"


def _three(count: dict[str, int]) -> str:
    return ", ".join(f"{count[name]:,}" for name in COUNTED)


def differences(rows: Rows) -> Iterator[str]:
    """A line for each test whose outcome differs."""
    for row in rows:
        for each in row["differ"]:
            name = each["test"].rpartition("tests/")[2]
            yield f"{name}: {each['before']}, accelerated {each['after']}: {each['reason']}"


if __name__ == "__main__":
    sys.exit(main())
