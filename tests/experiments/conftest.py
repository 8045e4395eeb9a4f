import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The experiments train in workers of one thread; networks this small lose with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
