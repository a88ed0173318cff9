"""Many clients' local training at once on one device, with the results that each would have alone."""

from fedsmooth_core.cohort.local_training import Member, Trained
from fedsmooth_core.cohort.trainer import CohortTrainer

__all__ = ["CohortTrainer", "Member", "Trained"]
