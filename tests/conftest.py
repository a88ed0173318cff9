"""What all tests share."""

import torch

# Two OpenMP threads that fight over a busy core make tiny tensor operations many times slower.
torch.set_num_threads(1)
