"""Layout, headers, codecs, and the weighted all-reduce of several ranks in one process."""

from __future__ import annotations

import pytest
import torch
from collectives_fakes import Reduction, record_of
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.allreduce.codecs import Stamp, codec_of
from raytrain_het.allreduce.header import Header, HeaderFormat, merged
from raytrain_het.allreduce.layout import ALIGN_BYTES, Layout, aligned, shard_bounds
from raytrain_het.allreduce.transport.one_to_all import one_to_all
from raytrain_het.errors import ProtocolError

pytestmark = pytest.mark.usefixtures("shards_of_any_size")

SHAPES = [("a", (3, 5)), ("b", (7,)), ("c", (40, 4)), ("d", (1,))]


def layout_of(
    shapes: list[tuple[str, tuple[int, ...]]] = SHAPES,
    *,
    bucket_bytes: int = 256,
    buffers: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Layout:
    return Layout(
        [(name, torch.zeros(shape, dtype=dtype)) for name, shape in shapes],
        [(f"mean{k}", torch.zeros(4)) for k in range(buffers)],
        bucket_bytes,
    )


def numel(layout: Layout) -> int:
    return sum(b.numel for b in layout.buckets)


owner_lists = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=9).filter(any)

# ---------------------------------------------------------------- layout


@given(st.integers(1, 5000), owner_lists)
def test_shards_tile_the_bucket_and_those_who_own_nothing_get_nothing(n: int, owners: list[float]) -> None:
    bounds = shard_bounds(n, owners)
    place = 0
    for (start, stop), size in zip(bounds, owners, strict=True):
        assert start == place
        assert stop >= start
        assert size > 0 or start == stop
        place = stop
    assert place == n


@given(st.integers(200, 5000), owner_lists)
def test_shards_are_in_proportion_to_within_a_grain(n: int, owners: list[float]) -> None:
    for (start, stop), size in zip(shard_bounds(n, owners), owners, strict=True):
        assert abs((stop - start) - n * size / sum(owners)) <= 16


@given(st.integers(200, 5000), owner_lists)
def test_all_inner_bounds_are_multiples_of_sixteen_where_there_are_enough(n: int, owners: list[float]) -> None:
    assert all(stop % 16 == 0 or stop == n for _, stop in shard_bounds(n, owners))


def test_buckets_hold_every_tensor_once_in_reverse_order() -> None:
    layout = layout_of(buffers=2)
    names = [s.name for b in layout.buckets for s in b.segments]
    assert names == ["d", "c", "b", "a", "mean0", "mean1"]
    for bucket in layout.buckets:
        assert [s.offset for s in bucket.segments] == [0, *(s.stop for s in bucket.segments[:-1])]


def test_a_bucket_is_no_larger_than_asked_unless_one_tensor_is() -> None:
    for bucket in layout_of().buckets:
        assert bucket.numel * 4 <= 256 or len(bucket.segments) == 1


def test_fp64_travels_as_fp64_and_all_else_as_fp32_never_in_one_bucket() -> None:
    tensors = [("h", torch.zeros(3, dtype=torch.bfloat16)), ("d", torch.zeros(3, dtype=torch.float64))]
    layout = Layout(tensors, [], 1 << 20)
    assert [b.dtype for b in layout.buckets] == [torch.float64, torch.float32]


def test_the_fingerprint_knows_names_shapes_dtypes_order_buffers_and_bucket_size() -> None:
    renamed = [("x", SHAPES[0][1]), *SHAPES[1:]]
    reshaped = [("a", (5, 3)), *SHAPES[1:]]
    others = [
        layout_of(renamed),
        layout_of(reshaped),
        layout_of(SHAPES[::-1]),
        layout_of(buffers=1),
        layout_of(bucket_bytes=64),
        layout_of(dtype=torch.float64),
    ]
    assert len({layout_of().fingerprint, *(o.fingerprint for o in others)}) == 7
    assert layout_of().fingerprint == layout_of().fingerprint
    assert layout_of(dtype=torch.bfloat16).fingerprint == layout_of().fingerprint, "it travels alike"


# ---------------------------------------------------------------- headers

int64 = st.integers(-(2**63), 2**63 - 1)


bits = st.integers(0, 70).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2**n - 1)))
flags = st.booleans()


@given(bits, bits, int64, int64, st.integers(0, 2**16 - 1), int64, st.floats(allow_nan=False), flags, int64, flags)
def test_a_header_comes_back_as_it_was(
    segments_used: tuple[int, int],
    members_nonfinite: tuple[int, int],
    step: int,
    generation: int,
    bucket: int,
    want: int,
    weight: float,
    contributes: bool,
    digest: int,
    differ: bool,
) -> None:
    (segments, used), (members, nonfinite) = segments_used, members_nonfinite
    header = Header(
        step, generation, bucket, want, weight, contributes, used, nonfinite, digest, 5, 6, differ, not differ
    )
    layout = HeaderFormat(segments, members)
    message = torch.full((layout.num_bytes + 16,), 255, dtype=torch.uint8)
    layout.write(header, layout.place(message))
    assert layout.read(message) == header
    assert layout.num_bytes % ALIGN_BYTES == 0


headers = st.builds(
    Header,
    step=st.just(5),
    generation=st.just(3),
    bucket=st.just(0),
    want=st.integers(3, 6),
    weight=st.integers(0, 9).map(float),
    contributes=flags,
    used=st.integers(0, 15),
    nonfinite=st.integers(0, 15),
    digest=st.integers(0, 2),
    numbers=st.integers(0, 1),
    loss=st.integers(0, 2),
    replicas_differ=st.just(False),
    losses_differ=st.just(False),
)


@given(st.lists(headers, min_size=2, max_size=6), st.data())
def test_headers_that_are_merged_on_their_way_say_the_same_as_all_at_once(
    of_members: list[Header], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(of_members) - 1))
    at_once = merged(of_members)
    assert merged([merged(of_members[:cut]), merged(of_members[cut:])]) == at_once
    counting = [h for h in of_members if h.contributes]
    assert at_once.weight == sum(h.weight for h in counting)
    assert at_once.want == max(h.want for h in of_members)
    assert at_once.contributes == bool(counting)
    assert at_once.losses_differ == (len({h.loss for h in counting} - {0}) > 1)
    assert at_once.replicas_differ == (len({(h.digest, h.numbers) for h in of_members if h.digest}) > 1)
    for k in range(4):
        assert at_once.used >> k & 1 == any(h.used >> k & 1 for h in counting)
        assert at_once.nonfinite >> k & 1 == any(h.nonfinite >> k & 1 for h in counting)


def test_a_message_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0x0000 instead of 0x4e57"):
        HeaderFormat(3, 2).read(torch.zeros(HeaderFormat(3, 2).num_bytes, dtype=torch.uint8))


@given(st.integers(0, 10**6))
def test_alignment_adds_less_than_a_grain(size: int) -> None:
    assert aligned(size) % ALIGN_BYTES == 0
    assert 0 <= aligned(size) - size < ALIGN_BYTES


# ---------------------------------------------------------------- codecs


@pytest.mark.parametrize("codec", [codec_of("none"), codec_of("bf16")], ids=["none", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(n=st.integers(0, 100), seed=st.integers(0, 99))
def test_codecs_fill_their_capacity_and_decode_the_same_twice(codec, dtype: torch.dtype, n: int, seed: int) -> None:
    x = torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    payload = torch.zeros(codec.capacity_bytes(n, dtype), dtype=torch.uint8)
    first, second = torch.empty_like(x), torch.empty_like(x)
    codec.encode(x, payload, Stamp(), codec.init(n, dtype, x.device), {})
    codec.decode(payload, first)
    codec.decode(payload, second)
    assert torch.equal(first, second)
    assert torch.allclose(first, x, rtol=2**-8, atol=0)
    again = torch.zeros_like(payload)
    codec.encode(first, again, Stamp(), {}, {})
    assert torch.equal(again, payload), "what was decoded is encoded without loss"


def test_none_is_exact_and_bf16_halves_the_bytes_of_fp32() -> None:
    x = torch.randn(64)
    payload = torch.zeros(codec_of("none").capacity_bytes(64, x.dtype), dtype=torch.uint8)
    codec_of("none").encode(x, payload, Stamp(), {}, {})
    out = torch.empty_like(x)
    codec_of("none").decode(payload, out)
    assert torch.equal(out, x)
    assert (payload.numel(), codec_of("bf16").capacity_bytes(64, x.dtype)) == (256, 128)


@pytest.mark.parametrize("codec", [codec_of("none"), codec_of("bf16")], ids=["none", "bf16"])
def test_codecs_keep_what_is_not_finite(codec) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    payload = torch.zeros(codec.capacity_bytes(4, x.dtype), dtype=torch.uint8)
    out = torch.empty_like(x)
    codec.encode(x, payload, Stamp(), {}, {})
    codec.decode(payload, out)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[1:], x[1:])


# ---------------------------------------------------------------- the weighted all-reduce


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=5, max_size=5).filter(lambda o: o[0] > 0),
    st.sampled_from([64, 256, 4096]),
)
def test_the_mean_is_exact_and_the_same_on_every_rank(weights: list[int], owners: list[float], size: int) -> None:
    """Whole numbers add up exactly in fp32, whoever owns what and in however many buckets they travel."""
    layout = layout_of(bucket_bytes=size)
    raw = [torch.randint(-50, 50, (numel(layout),)).float() for _ in weights]
    reduction = Reduction(record_of([float(w) for w in weights], owners[: len(weights)]), layout)
    gradients = [w * g if w else None for w, g in zip(weights, raw, strict=True)]
    outs, summary = reduction.run(gradients, [float(w) for w in weights])
    expected = sum(w * g for w, g in zip(weights, raw, strict=True)) / sum(weights)
    for out, total in zip(outs, summary, strict=True):
        assert torch.equal(torch.cat(out), expected)
        assert total.total_weight == sum(weights)
        assert total.applies


def test_a_sender_of_weight_zero_is_dropped_even_if_its_payload_is_nan() -> None:
    layout = layout_of()
    good, bad = torch.randn(numel(layout)), torch.full((numel(layout),), torch.nan)
    reduction = Reduction(record_of([1.0, 1.0]), layout)
    outs, summary = reduction.run([4 * good, bad], [4.0, 0.0], finite=[True, False])
    assert torch.equal(torch.cat(outs[1]), good)
    assert all(s.finite and s.applies for s in summary)


def test_a_gradient_that_is_not_finite_is_known_to_all_with_its_slot() -> None:
    layout = layout_of()
    one = torch.ones(numel(layout))
    _, summary = Reduction(record_of([1.0, 1.0, 1.0]), layout).run(
        [one, one * torch.inf, one], [1.0, 1.0, 1.0], finite=[True, False, True]
    )
    assert [(s.finite, s.applies, s.nonfinite_slots) for s in summary] == [(False, False, (11,))] * 3


def test_a_step_in_which_nobody_contributes_applies_nothing() -> None:
    layout = layout_of()
    outs, summary = Reduction(record_of([1.0, 0.0]), layout).run([torch.zeros(numel(layout)), None], [0.0, 0.0])
    assert not any(s.applies for s in summary)
    assert all(torch.equal(torch.cat(out), torch.zeros(numel(layout))) for out in outs)


def test_a_parameter_counts_as_used_if_any_contributor_used_it() -> None:
    layout = layout_of(bucket_bytes=1 << 20)
    one = torch.ones(numel(layout))
    _, summary = Reduction(record_of([1.0, 1.0, 1.0]), layout).run(
        [one, one, one], [1.0, 1.0, 0.0], used=[0b0001, 0b0100, 0b1000]
    )
    assert [s.used for s in summary] == [(0b0101,)] * 3


@pytest.mark.parametrize(("digest", "differ"), [([77, 77, 0], False), ([77, 77, 77], False), ([77, 77, 78], True)])
def test_the_highest_want_and_unlike_digests_are_known_to_every_rank_also_from_those_without_a_share(
    digest: list[int], differ: bool
) -> None:
    layout = layout_of()
    one = torch.ones(numel(layout))
    _, summary = Reduction(record_of([1.0, 1.0, 0.0]), layout).run(
        [one, one, None], [1.0, 1.0, 0.0], want=[3, 4, 9], digest=digest
    )
    assert [(s.want, s.replicas_differ) for s in summary] == [(9, differ)] * 3


def test_bf16_decodes_to_the_same_bits_everywhere_and_rounds_what_is_sent_and_the_mean() -> None:
    layout = layout_of(bucket_bytes=1 << 20)
    gradients = [torch.randn(numel(layout)) for _ in range(3)]
    outs, _ = Reduction(record_of([1.0] * 3, [3.0, 0.0, 1.0], codec="bf16"), layout).run(gradients, [1.0] * 3)
    expected, place = torch.empty(numel(layout)), 0
    for bucket in layout.buckets:
        for owner, (start, stop) in enumerate(shard_bounds(bucket.numel, [3.0, 0.0, 1.0])):
            part = slice(place + start, place + stop)
            sent = [g[part] if rank == owner else g[part].bfloat16().float() for rank, g in enumerate(gradients)]
            expected[part] = ((sent[0] + sent[1] + sent[2]) / 3).bfloat16().float()
        place += bucket.numel
    flat = [torch.cat(out) for out in outs]
    assert torch.equal(flat[0], flat[1])
    assert torch.equal(flat[0], flat[2])
    assert torch.equal(flat[0], expected)


def test_buffers_are_never_compressed() -> None:
    layout = Layout([("w", torch.zeros(8))], [("mean", torch.zeros(8))], 1 << 20)
    values = torch.cat([torch.zeros(8), torch.full((8,), 1.001)])
    outs, _ = Reduction(record_of([1.0, 1.0], codec="bf16"), layout).run([values, values], [1.0, 1.0])
    assert torch.equal(outs[1][1], values[8:])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("codec", ["none", "bf16"])
def test_bytes_are_those_of_the_formula_for_equal_owners(size: int, codec: str) -> None:
    """``2 (N - 1) / N`` of the encoded gradient, and a header in front of each message."""
    n = 4096 * size
    layout = Layout([("w", torch.zeros(n))], [], 1 << 20)
    reduction = Reduction(record_of([1.0] * size, codec=codec, hosts="abcd"[:size], hierarchy=False), layout)
    reduction.run([torch.ones(n)] * size, [1.0] * size)
    encoded = codec_of(codec).capacity_bytes(n, torch.float32)
    expected = 2 * (size - 1) * encoded // size + 2 * (size - 1) * HeaderFormat(1, size).num_bytes
    for reducer in reduction.reducers:
        assert (reducer.traffic.sent, reducer.traffic.received) == (expected, expected)


def test_who_owns_nothing_receives_each_sum_once_and_sends_its_gradient_once() -> None:
    n = 1024
    layout = Layout([("w", torch.zeros(n))], [], 1 << 20)
    reduction = Reduction(record_of([1.0, 1.0], [1.0, 0.0]), layout)
    reduction.run([torch.ones(n)] * 2, [1.0, 1.0])
    (owner, other), head = (e.traffic for e in reduction.reducers), HeaderFormat(1, 2).num_bytes
    assert (other.sent, other.received) == (4 * n + head, 4 * n + head)
    assert (owner.sent, owner.received) == (other.received, other.sent)


def test_a_member_without_a_share_sends_headers_only() -> None:
    n = 1024
    layout = Layout([("w", torch.zeros(n))], [], 1 << 20)
    reduction = Reduction(record_of([1.0, 0.0], [1.0, 0.0]), layout)
    reduction.run([torch.ones(n), None], [1.0, 0.0])
    head = HeaderFormat(1, 2).num_bytes
    assert reduction.reducers[1].traffic.sent == head
    assert reduction.reducers[1].traffic.received == head + 4 * n


def test_who_owns_nothing_of_a_bucket_gets_no_message_before_its_mean() -> None:
    """Two of three own nothing, and send nothing to each other."""
    n = 1024
    reduction = Reduction(record_of([1.0] * 3, [1.0, 0.0, 0.0]), Layout([("w", torch.zeros(n))], [], 1 << 20))
    outs, summary = reduction.run([torch.ones(n)] * 3, [1.0, 1.0, 1.0], want=[3, 3, 8])
    one_message = HeaderFormat(1, 3).num_bytes + 4 * n
    assert [r.traffic.sent for r in reduction.reducers] == [2 * one_message, one_message, one_message]
    assert all(torch.equal(out[0], torch.ones(n)) for out in outs)
    assert [s.want for s in summary] == [8] * 3


def test_kept_sums_decode_again_until_the_next_step() -> None:
    layout = layout_of()
    gradient = torch.randn(numel(layout))
    reduction = Reduction(record_of([1.0, 1.0]), layout)
    outs, _ = reduction.run([gradient, gradient], [1.0, 1.0])
    for bucket, before in zip(layout.buckets, outs[0], strict=True):
        again = torch.empty(bucket.numel)
        reduction.reducers[0].decode(bucket, again)
        assert torch.equal(again, before)


def test_members_at_different_steps_are_told_which_worker_is_where() -> None:
    layout = layout_of()
    one = torch.ones(numel(layout))
    with pytest.raises(ProtocolError, match="worker 1[01] is at step [56], bucket 0, while this one is at step [56]"):
        Reduction(record_of([1.0, 1.0]), layout).run([one, one], [1.0, 1.0], step=[5, 6])


@pytest.mark.parametrize("receivers", [[], [1], [0, 3]])
def test_one_to_all_reaches_the_receivers_only(receivers: list[int]) -> None:
    wire = Reduction(record_of([1.0] * 4), layout_of()).wire
    data = [
        torch.arange(10, dtype=torch.uint8) if rank == 2 else torch.zeros(10, dtype=torch.uint8) for rank in range(4)
    ]
    for group, mine in zip(wire.groups, data, strict=True):
        one_to_all(group, 2, receivers, mine, lambda _: None)  # type: ignore[arg-type]
    wire.carry()
    for rank in range(4):
        assert torch.equal(data[rank], data[2]) == (rank == 2 or rank in receivers)


def test_small_parameters_are_kept_apart_and_travel_as_they_are() -> None:
    """Of one dimension, or of fewer than 1,024 elements; in reverse order too, behind all others."""
    named = [
        ("w", torch.zeros(40, 50)),
        ("bias", torch.zeros(5000)),
        ("tiny", torch.zeros(5, 5)),
        ("v", torch.zeros(2, 999)),
    ]
    layout = Layout(named, [("mean", torch.zeros(3))], 1 << 20, small_apart=True)
    assert [([s.name for s in b.segments], b.is_dense, b.is_state) for b in layout.buckets] == [
        (["v", "w"], False, False),
        (["tiny", "bias"], True, False),
        (["mean"], True, True),
    ]
    assert layout.fingerprint != Layout(named, [("mean", torch.zeros(3))], 1 << 20).fingerprint
    gradient = torch.randn(numel(layout))
    outs, _ = Reduction(record_of([1.0, 1.0], codec="sign"), layout).run([gradient, gradient], [1.0, 1.0])
    big = layout.buckets[0].numel
    assert not torch.equal(outs[0][0], gradient[:big])
    assert torch.equal(outs[1][1], gradient[big : big + layout.buckets[1].numel])
