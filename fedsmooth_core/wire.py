"""Names on the wire, in one place: what the keys of Flower's records are called.

Record names hold a record each in a message; the other names are keys inside those records.
"""

# Records
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"

# Keys that the server sends beside the flat training plan and model specification
SERVER_ROUND = "server-round"
PARTITION_ID = "partition-id"
CLASS_NAMES = "class-names"
PLAN_PREFIX = "plan."
SPEC_PREFIX = "spec."

# Keys that the server sends besides in an evaluate message: what to certify
CERTIFY_PREFIX = "certify."  # of the flat procedure
NUM_IMAGES = "num-images"
RADII = "radii"

# Keys of a device's own node configuration, and of its answer to the server's query
NUM_PARTITIONS = "num-partitions"
DATA_PATH = "data-path"
DATASET_ROOT = "dataset-root"
DEVICE = "device"
THREADS = "threads"
MAX_BATCH = "max-batch"
BF16 = "bf16"
TF32 = "tf32"
ENGINE = "engine"

# Metrics of a train reply
NUM_EXAMPLES = "num-examples"
TRAIN_LOSS = "train-loss"
TRAIN_ACCURACY = "train-accuracy"
SETUP_SECONDS = "setup-seconds"  # reading the message, finding the data, loading the weights
TRAIN_SECONDS = "train-seconds"
TRAIN_METRICS = frozenset({NUM_EXAMPLES, TRAIN_LOSS, TRAIN_ACCURACY, SETUP_SECONDS, TRAIN_SECONDS})

# Metrics of an evaluate reply, beside num-examples (the images certified): counts alone
HELD_OUT = "held-out"  # of the images certified, those that the client does not train on
ABSTAINED = "abstained"
CORRECT = "correct"  # a list: how many are certified to be right at each of the radii asked for
CERTIFY_METRICS = frozenset({NUM_EXAMPLES, HELD_OUT, ABSTAINED, CORRECT})
