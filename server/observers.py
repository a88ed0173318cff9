"""Who watches a run."""

from rich.console import Console

from server.collection import BackgroundCourier
from server.progress import TrainingProgress
from server.prometheus import Prometheus
from server.recorder import Observer
from server.tracking import TensorBoard


def standard_observers(progress: TrainingProgress, console: Console) -> list[Observer]:
    """Return those that every run has: progress, TensorBoard, Prometheus, the way to the certifier."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    return [progress, TensorBoard(), Prometheus(), BackgroundCourier(say)]
