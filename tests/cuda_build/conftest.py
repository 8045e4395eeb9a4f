"""Tests of the CUDA build without a GPU: run by `make test-cuda-build`, in .venv-cuda.

With a CPU build of torch there is nothing of it to test, and timm and torchvision may not load.
"""

from __future__ import annotations

import torch

collect_ignore_glob = ["test_*.py"] if torch.version.cuda is None else []
