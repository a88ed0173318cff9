"""A certification into a file, as a program that a test can kill."""

import sys
from pathlib import Path

import torch
from known_classifiers import random_images, small_network

from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.rows import RowFile

NUM_IMAGES = 24
PARAMETERS = {"sigma": 0.25, "n0": 100, "n": 20_000, "alpha": 0.001, "seed": 7}


def certify_to(path: Path) -> None:
    torch.set_num_threads(1)
    model, images = small_network((3, 5, 5)), random_images(NUM_IMAGES, (3, 5, 5))
    with RowFile(path, PARAMETERS) as file:
        left = [i for i in range(NUM_IMAGES) if i not in file.done]
        labels = torch.zeros(len(left), dtype=torch.int64)
        rows = certify(
            model,
            images[left],
            labels,
            left,
            max_value=255,
            batch_size=1024,
            device="cpu",
            **PARAMETERS,
        )
        for row in rows:
            file.append(row)
            print(row.idx, flush=True)


if __name__ == "__main__":
    certify_to(Path(sys.argv[1]))
