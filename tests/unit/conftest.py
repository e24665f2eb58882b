from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from raytrain_het.allreduce.reducers import sharding

# Shared machines stall now and then; how long an example takes is no claim of these tests.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's, for many small operations: a pool of threads costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards_of_any_size() -> Iterator[None]:
    """Small buckets too are cut among all owners."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARD_BYTES", 1)
        patch.setattr(sharding, "MIN_SHARD_BYTES_ON_ONE_MACHINE", 1)
        yield
