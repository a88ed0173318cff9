"""Every part runs at its quick size, alone and as one command; how fast is nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PEERS = ("flwr", "ray", "pfl", "art", "rich", "torchvision", "sklearn", "hydra", "safetensors")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def bench(*words, script="run", **environment):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / f"{script}.py", "--quick", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_parts_as_one_command(tmp_path):
    report = tmp_path / "bench.json"
    printed = bench("-o", report)
    measured = json.loads(report.read_text())
    assert measured["size"] == "quick"
    assert len(measured["parts"]) == 8
    # The environment of the tests has Flower and Ray, and perhaps neither pfl nor ART.
    assert {name for name, part in measured["parts"].items() if part["rows"]} >= {
        "training",
        "one_point",
        "roofline",
        "certification",
        "aggregation",
        "flower_runtime",
    }
    lines = printed.splitlines()
    assert any(line.startswith("In short") for line in lines)
    assert lines[-1].endswith(f"in {report}.")


def test_with_the_core_alone_it_says_what_was_left_out(tmp_path):
    # A finder that refuses every package that the core does without, as on a machine without them.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        f"REFUSED = {PEERS!r}\n"
        "class Refuse(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in REFUSED:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: (\n"
        "    None if name.partition('.')[0] in REFUSED else real(name, package)\n"
        ")\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    report = tmp_path / "bench.json"
    printed = bench("-o", report, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert "Left out: Flower's Simulation Runtime. It needs flwr" in printed
    assert "Left out: pfl. It is not installed here" in printed
    parts = json.loads(report.read_text())["parts"]
    for name in ("training", "one_point", "roofline", "certification"):
        assert parts[name]["rows"], name


def test_a_part_is_a_command_of_its_own(tmp_path):
    bench("-o", tmp_path / "one.json", script="training")
    assert list(json.loads((tmp_path / "one.json").read_text())["parts"]) == ["training"]
