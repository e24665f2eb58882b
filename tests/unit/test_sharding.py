"""Who adds up which part of a bucket."""

from __future__ import annotations

import pytest
from collectives_fakes import record_of

from raytrain_het.allreduce.reducers.sharding import MIN_SHARD_BYTES_ON_ONE_MACHINE, Sharding


def test_small_shards_are_merged_and_over_all_buckets_each_owner_has_its_part() -> None:
    owners, n = [4.0, 0.0, 2.0, 1.0, 1.0], 8192
    sharding, owned, num_owners = Sharding(record_of([1.0] * 5, owners)), [0] * 5, []
    for _ in range(40):
        bounds = sharding.bounds(n, num_bytes=2 * MIN_SHARD_BYTES_ON_ONE_MACHINE)
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == n
        owned = [sum_so_far + stop - start for sum_so_far, (start, stop) in zip(owned, bounds, strict=True)]
        num_owners.append(sum(stop > start for start, stop in bounds))
    assert max(num_owners) == 2
    for part, size in zip(owned, owners, strict=True):
        assert part == pytest.approx(40 * n * size / sum(owners), abs=1.5 * n)


@pytest.mark.parametrize("hosts", ["ab", None])
def test_between_machines_shards_are_merged_only_where_they_are_as_small_as_a_packet(hosts: str | None) -> None:
    sharding = Sharding(record_of([1.0] * 2, hosts=hosts, hierarchy=False))
    one, two = sharding.bounds(100, num_bytes=400), sharding.bounds(8192, num_bytes=32768)
    assert sum(stop > start for start, stop in one) == 1
    assert sum(stop > start for start, stop in two) == (2 if hosts else 1)
