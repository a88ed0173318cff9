import sys
from pathlib import Path

# The benchmarks are scripts beside each other, as they are when one of them is run.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
