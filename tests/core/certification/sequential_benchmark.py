"""benchmarks/sequential.py as a module: its simulation of draws serves the tests, too."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "sequential.py"
_SPEC = importlib.util.spec_from_file_location("sequential_benchmark_program", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)
