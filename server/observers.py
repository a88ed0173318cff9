"""Who watches a run."""

from server.progress import TrainingProgress
from server.prometheus import Prometheus
from server.recorder import Observer
from server.tracking import TensorBoard


def standard_observers(progress: TrainingProgress) -> list[Observer]:
    """Return those that every run has: progress, TensorBoard, Prometheus."""
    return [progress, TensorBoard(), Prometheus()]
