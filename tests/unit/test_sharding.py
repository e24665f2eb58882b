"""Who adds up which part of a bucket."""

from __future__ import annotations

import pytest
from collectives_fakes import record_of

from raytrain_het.allreduce.reducers.sharding import MIN_SHARD_BYTES_ON_ONE_MACHINE, Sharding


def test_small_shards_are_merged_and_over_all_buckets_each_owner_has_its_part() -> None:
    owners, n = [4.0, 0.0, 2.0, 1.0, 1.0], 8192
    sharding, owned, num_owners = Sharding(record_of([1.0] * 5, owners)), [0] * 5, []
    for _ in range(40):
        shards = sharding.bounds(n, num_bytes=2 * MIN_SHARD_BYTES_ON_ONE_MACHINE)
        there = [shard for shard in shards if shard is not None]
        assert [start for start, _ in there] == [0, *(stop for _, stop in there[:-1])]
        assert there[-1][1] == n
        owned = [before + (s[1] - s[0] if s is not None else 0) for before, s in zip(owned, shards, strict=True)]
        num_owners.append(len(there))
    assert max(num_owners) == 2
    for part, size in zip(owned, owners, strict=True):
        assert part == pytest.approx(40 * n * size / sum(owners), abs=1.5 * n)


@pytest.mark.parametrize("hosts", ["ab", None])
def test_between_machines_shards_are_merged_only_where_they_are_as_small_as_a_packet(hosts: str | None) -> None:
    sharding = Sharding(record_of([1.0] * 2, hosts=hosts, hierarchy=False))
    one, two = sharding.bounds(100, num_bytes=400), sharding.bounds(8192, num_bytes=32768)
    assert sum(shard is not None for shard in one) == 1
    assert sum(shard is not None for shard in two) == (2 if hosts else 1)


def test_an_empty_bucket_has_an_owner_who_sends_its_header() -> None:
    sharding = Sharding(record_of([1.0] * 3))
    assert sharding.bounds(0, num_bytes=0) == [(0, 0), None, None]
