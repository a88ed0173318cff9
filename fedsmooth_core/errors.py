"""What can go wrong, as one clear sentence for the person who has to mend it."""


class FedSmoothError(Exception):
    """Base of every error whose message is meant for a user, not for a stack trace."""


class ConfigError(FedSmoothError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(FedSmoothError):
    """A data set, partition or image file cannot be used."""


class TrainingError(FedSmoothError):
    """A run cannot go on, or leaves no model worth certifying."""


class CheckpointError(FedSmoothError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class CertificationError(FedSmoothError):
    """A certification cannot start, continue, or be read back."""


class RowsInUseError(CertificationError):
    """Another process writes a file of rows now: the same may succeed later."""


class NodeError(FedSmoothError):
    """A device cannot join its federation, or is no member any more."""


class KeyFileError(FedSmoothError):
    """A file is not the kind of key that a device is known by."""


class EnrolmentError(FedSmoothError):
    """A device cannot be enrolled or revoked."""


class UnansweredError(EnrolmentError):
    """The SuperLink does not answer now: asking again later may help."""


class ServiceError(FedSmoothError):
    """The certification service refuses a call."""

    def __init__(self, sentence: str, status: str) -> None:
        super().__init__(sentence)
        self.status = status
        """Name of the gRPC status, e.g. ``INVALID_ARGUMENT``."""


class ServiceUnreachableError(ServiceError):
    """The certification service does not answer, or cannot now: the same call may succeed later."""
