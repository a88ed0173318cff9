import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_DONE: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_SUPERSEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_DONE: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_SUPERSEDED: JobState
JOB_STATE_FAILED: JobState

class Architecture(_message.Message):
    __slots__ = ("name", "num_classes", "channels", "height", "width")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_classes: int
    channels: int
    height: int
    width: int
    def __init__(self, name: _Optional[str] = ..., num_classes: _Optional[int] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("dataset", "image_size", "num_images", "sigma", "n0", "n", "alpha", "method", "radius_step", "seed", "precision")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    N0_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RADIUS_STEP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    image_size: int
    num_images: int
    sigma: float
    n0: int
    n: int
    alpha: float
    method: str
    radius_step: float
    seed: int
    precision: str
    def __init__(self, dataset: _Optional[str] = ..., image_size: _Optional[int] = ..., num_images: _Optional[int] = ..., sigma: _Optional[float] = ..., n0: _Optional[int] = ..., n: _Optional[int] = ..., alpha: _Optional[float] = ..., method: _Optional[str] = ..., radius_step: _Optional[float] = ..., seed: _Optional[int] = ..., precision: _Optional[str] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("run", "round")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "weights")
    class Header(_message.Message):
        __slots__ = ("architecture", "terms", "submission", "dataset_fingerprint", "num_bytes")
        ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
        TERMS_FIELD_NUMBER: _ClassVar[int]
        SUBMISSION_FIELD_NUMBER: _ClassVar[int]
        DATASET_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
        architecture: Architecture
        terms: Terms
        submission: Submission
        dataset_fingerprint: str
        num_bytes: int
        def __init__(self, architecture: _Optional[_Union[Architecture, _Mapping]] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., submission: _Optional[_Union[Submission, _Mapping]] = ..., dataset_fingerprint: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...
    HEADER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    header: SubmitRequest.Header
    weights: bytes
    def __init__(self, header: _Optional[_Union[SubmitRequest.Header, _Mapping]] = ..., weights: _Optional[bytes] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("key", "state", "problem", "architecture", "terms", "weights_sha256", "dataset_fingerprint", "class_names", "device", "num_images", "images_done", "submissions", "submitted_at", "ended_at", "seconds")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    DATASET_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    IMAGES_DONE_FIELD_NUMBER: _ClassVar[int]
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    key: str
    state: JobState
    problem: str
    architecture: Architecture
    terms: Terms
    weights_sha256: str
    dataset_fingerprint: str
    class_names: _containers.RepeatedScalarFieldContainer[str]
    device: str
    num_images: int
    images_done: int
    submissions: _containers.RepeatedCompositeFieldContainer[Submission]
    submitted_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    seconds: float
    def __init__(self, key: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., problem: _Optional[str] = ..., architecture: _Optional[_Union[Architecture, _Mapping]] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., weights_sha256: _Optional[str] = ..., dataset_fingerprint: _Optional[str] = ..., class_names: _Optional[_Iterable[str]] = ..., device: _Optional[str] = ..., num_images: _Optional[int] = ..., images_done: _Optional[int] = ..., submissions: _Optional[_Iterable[_Union[Submission, _Mapping]]] = ..., submitted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., seconds: _Optional[float] = ...) -> None: ...

class JobRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("run", "states", "limit")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    run: str
    states: _containers.RepeatedScalarFieldContainer[JobState]
    limit: int
    def __init__(self, run: _Optional[str] = ..., states: _Optional[_Iterable[_Union[JobState, str]]] = ..., limit: _Optional[int] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("key", "rows_seen")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ROWS_SEEN_FIELD_NUMBER: _ClassVar[int]
    key: str
    rows_seen: int
    def __init__(self, key: _Optional[str] = ..., rows_seen: _Optional[int] = ...) -> None: ...

class Row(_message.Message):
    __slots__ = ("idx", "label", "predict", "radius", "correct", "n", "seconds")
    IDX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PREDICT_FIELD_NUMBER: _ClassVar[int]
    RADIUS_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    idx: int
    label: int
    predict: int
    radius: float
    correct: bool
    n: int
    seconds: float
    def __init__(self, idx: _Optional[int] = ..., label: _Optional[int] = ..., predict: _Optional[int] = ..., radius: _Optional[float] = ..., correct: _Optional[bool] = ..., n: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class CertifiedAccuracy(_message.Message):
    __slots__ = ("radius", "accuracy", "low", "high")
    RADIUS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    radius: float
    accuracy: float
    low: float
    high: float
    def __init__(self, radius: _Optional[float] = ..., accuracy: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("num_images", "average_certified_radius", "abstention_rate", "mean_n", "certified_accuracy")
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_CERTIFIED_RADIUS_FIELD_NUMBER: _ClassVar[int]
    ABSTENTION_RATE_FIELD_NUMBER: _ClassVar[int]
    MEAN_N_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    num_images: int
    average_certified_radius: float
    abstention_rate: float
    mean_n: float
    certified_accuracy: _containers.RepeatedCompositeFieldContainer[CertifiedAccuracy]
    def __init__(self, num_images: _Optional[int] = ..., average_certified_radius: _Optional[float] = ..., abstention_rate: _Optional[float] = ..., mean_n: _Optional[float] = ..., certified_accuracy: _Optional[_Iterable[_Union[CertifiedAccuracy, _Mapping]]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("job", "new_rows", "summary", "seconds_left")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NEW_ROWS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    job: Job
    new_rows: _containers.RepeatedCompositeFieldContainer[Row]
    summary: Summary
    seconds_left: float
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., new_rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("rows", "job", "summary")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    job: Job
    summary: Summary
    def __init__(self, rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., job: _Optional[_Union[Job, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class Images(_message.Message):
    __slots__ = ("pixels", "count", "channels", "height", "width")
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    pixels: bytes
    count: int
    channels: int
    height: int
    width: int
    def __init__(self, pixels: _Optional[bytes] = ..., count: _Optional[int] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("model", "images", "sigma", "n", "alpha", "seed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    model: str
    images: Images
    sigma: float
    n: int
    alpha: float
    seed: int
    def __init__(self, model: _Optional[str] = ..., images: _Optional[_Union[Images, _Mapping]] = ..., sigma: _Optional[float] = ..., n: _Optional[int] = ..., alpha: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("predictions", "sigma", "n", "alpha", "weights_sha256")
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    sigma: float
    n: int
    alpha: float
    weights_sha256: str
    def __init__(self, predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., sigma: _Optional[float] = ..., n: _Optional[int] = ..., alpha: _Optional[float] = ..., weights_sha256: _Optional[str] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("label", "class_name")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    label: int
    class_name: str
    def __init__(self, label: _Optional[int] = ..., class_name: _Optional[str] = ...) -> None: ...

class CertifyRequest(_message.Message):
    __slots__ = ("model", "images", "sigma", "n0", "n", "alpha", "seed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    N0_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    model: str
    images: Images
    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int
    def __init__(self, model: _Optional[str] = ..., images: _Optional[_Union[Images, _Mapping]] = ..., sigma: _Optional[float] = ..., n0: _Optional[int] = ..., n: _Optional[int] = ..., alpha: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class CertifyResponse(_message.Message):
    __slots__ = ("certificates", "sigma", "n0", "n", "alpha", "weights_sha256")
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    N0_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedCompositeFieldContainer[Certificate]
    sigma: float
    n0: int
    n: int
    alpha: float
    weights_sha256: str
    def __init__(self, certificates: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ..., sigma: _Optional[float] = ..., n0: _Optional[int] = ..., n: _Optional[int] = ..., alpha: _Optional[float] = ..., weights_sha256: _Optional[str] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("label", "class_name", "radius")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    RADIUS_FIELD_NUMBER: _ClassVar[int]
    label: int
    class_name: str
    radius: float
    def __init__(self, label: _Optional[int] = ..., class_name: _Optional[str] = ..., radius: _Optional[float] = ...) -> None: ...
