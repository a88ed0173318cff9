"""scikit-learn's bundled handwritten digits: small, real, and there without any download."""

from importlib.metadata import version

import numpy as np

from fedsmooth_core.data.source import Decoded

_SPLIT_SEED = 0
_TEST_SHARE = 0.2


class Digits:
    """1,797 images of 8x8 pixels, 1 channel, values 0 to 16 (the UCI optical digits test set).

    The data set has no test split of its own: a fixed fifth of every class is ours.
    """

    def state(self) -> str:
        # The images are part of the installed package; asking for its version does not import it.
        return f"scikit-learn {version('scikit-learn')}"

    def decode(self) -> Decoded:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = bunch.images.astype(np.uint8)[:, np.newaxis]
        labels = bunch.target.astype(np.int64)
        rng = np.random.default_rng(_SPLIT_SEED)
        in_test = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            in_test[members[: round(_TEST_SHARE * len(members))]] = True
        return Decoded(
            state=self.state(),
            class_names=tuple(str(name) for name in bunch.target_names),
            max_value=16,
            splits={
                "train": (images[~in_test], labels[~in_test]),
                "test": (images[in_test], labels[in_test]),
            },
        )
