"""Groups over TCP: what arrives where and when, and what becomes of it when a peer does not play along."""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from collectives_fakes import record_of

from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.reducers import Reducer, reducer_for
from raytrain_het.allreduce.step_summary import SummarySoFar
from raytrain_het.allreduce.transport import tcp
from raytrain_het.allreduce.transport.building import GroupBuilder, connect
from raytrain_het.allreduce.transport.group import GroupError, PeerBuffers
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.allreduce.transport.tcp import TcpGroup

pytestmark = pytest.mark.usefixtures("shards_of_any_size")

LONG = 6_000_000
"""More than two sockets hold."""


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


class Mesh:
    """All members of a group in one thread, each with a poller of its own."""

    def __init__(self, size: int) -> None:
        sockets: list[dict[int, socket.socket]] = [{} for _ in range(size)]
        for a in range(size):
            for b in range(a):
                sockets[a][b], sockets[b][a] = connected()
        self.pollers = [Poller() for _ in range(size)]
        self.groups = [TcpGroup("g", rank, mine) for rank, mine in enumerate(sockets)]
        for group, poller in zip(self.groups, self.pollers, strict=True):
            group.join(poller)

    def drive(self, until: Callable[[], bool], *, ranks: list[int] | None = None) -> None:
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline
            for rank in ranks if ranks is not None else range(len(self.pollers)):
                self.pollers[rank].wait(0.001)

    def close(self) -> None:
        for group, poller in zip(self.groups, self.pollers, strict=True):
            group.leave()
            poller.close()


@pytest.fixture
def mesh() -> Iterator[Callable[[int], Mesh]]:
    made: list[Mesh] = []

    def make(size: int) -> Mesh:
        made.append(Mesh(size))
        return made[-1]

    yield make
    for one in made:
        one.close()


def filled(length: int, value: int) -> torch.Tensor:
    return torch.full((length,), value, dtype=torch.uint8)


def empty(length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.uint8)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_part_of_whatever_length_lands_in_its_place(mesh: Any, size: int) -> None:
    lengths = [[(7 * i + 3 * j) % 5 * 400_000 + (i + j) % 3 for j in range(size)] for i in range(size)]
    whole = mesh(size)
    operations, outs = [], []
    for i, group in enumerate(whole.groups):
        inp = torch.cat([filled(lengths[i][j], 10 * i + j) for j in range(size)])
        outs.append(empty(sum(lengths[j][i] for j in range(size))))
        operations.append(
            group.all_to_all(PeerBuffers(outs[i], [lengths[j][i] for j in range(size)]), PeerBuffers(inp, lengths[i]))
        )
    whole.drive(lambda: all(op.done for op in operations))
    for i in range(size):
        operations[i].result()
        assert torch.equal(outs[i], torch.cat([filled(lengths[j][i], 10 * j + i) for j in range(size)]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is Linux that counts")
def test_what_has_reached_a_peer_is_counted_and_how_long_it_took(mesh: Any) -> None:
    whole = mesh(2)
    out = empty(4 * LONG)
    operations = [
        whole.groups[0].all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(4 * LONG, 1), [0, 4 * LONG])),
        whole.groups[1].all_to_all(PeerBuffers(out, [4 * LONG, 0]), PeerBuffers(empty(0), [0, 0])),
    ]
    whole.drive(lambda: all(op.done for op in operations))
    (sent, busy_s), (back, _) = whole.groups[0].sent()[1], whole.groups[1].sent()[0]
    assert 4 * LONG <= sent < 4 * LONG + 1000 and back < 1000
    assert 0 <= busy_s < 10


def test_a_sum_goes_to_all_others_from_one_place(mesh: Any) -> None:
    whole = mesh(3)
    outs = [empty(10 if rank else 0) for rank in range(3)]
    operations = [
        group.all_to_all(
            PeerBuffers(outs[rank], [10 if rank else 0, 0, 0]),
            PeerBuffers.copies(filled(10 if rank == 0 else 0, 5), [1, 2] if rank == 0 else [], 3),
        )
        for rank, group in enumerate(whole.groups)
    ]
    whole.drive(lambda: all(op.done for op in operations))
    assert [out.tolist() for out in outs] == [[], [5] * 10, [5] * 10]


def test_what_is_expected_is_taken_in_before_this_member_sends(mesh: Any) -> None:
    whole = mesh(2)
    late, early = whole.groups
    out = empty(LONG)
    expected = late.expect(PeerBuffers(out, [0, LONG]))
    sent = early.all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(LONG, 3), [LONG, 0]))
    whole.drive(lambda: sent.done and expected.done)
    assert out.min() == 3
    assert late.all_to_all(PeerBuffers(out, [0, LONG]), PeerBuffers(empty(0), [0, 0]), expected) is expected


def test_messages_that_come_too_early_wait_their_turn(mesh: Any) -> None:
    whole = mesh(2)
    late, early = whole.groups
    for value in (1, 2, 3):
        early.all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(50, value), [50, 0]))
    for _ in range(20):
        whole.pollers[0].wait(0.001)
    outs = [empty(50) for _ in range(3)]
    operations = [late.expect(PeerBuffers(out, [0, 50])) for out in outs]
    whole.drive(lambda: all(op.done for op in operations))
    assert [int(out[0]) for out in outs] == [1, 2, 3]


def test_a_length_that_was_not_expected_fails_the_operation_and_harms_nothing(mesh: Any) -> None:
    for early in (False, True):
        whole = mesh(2)
        out = empty(100)
        launch = [
            lambda whole=whole: whole.groups[1].all_to_all(
                PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(101, 9), [101, 0])
            ),
            lambda whole=whole, out=out: whole.groups[0].expect(PeerBuffers(out, [0, 100])),
        ]
        first, second = launch if early else launch[::-1]
        operations = [first()]
        for _ in range(20):
            whole.pollers[0].wait(0.001)
        operations.append(second())
        expecting = operations[early]
        whole.drive(lambda expecting=expecting: expecting.done)
        with pytest.raises(GroupError, match="rank 1 sends 101 bytes where 100 are expected"):
            expecting.result()
        assert out.sum() == 0


def test_a_lost_peer_fails_what_needs_it_and_nothing_else(mesh: Any) -> None:
    whole = mesh(3)
    first, second, third = whole.groups
    outs = [empty(20) for _ in range(3)]
    from_second, from_third = (
        first.expect(PeerBuffers(outs[0], [0, 20, 0])),
        first.expect(PeerBuffers(outs[1], [0, 0, 20])),
    )
    second.all_to_all(PeerBuffers(empty(0), [0, 0, 0]), PeerBuffers(filled(20, 4), [20, 0, 0]))
    third.leave()
    whole.drive(lambda: from_third.done and from_second.done, ranks=[0, 1])
    from_second.result()
    assert outs[0].min() == 4
    with pytest.raises(GroupError, match="rank 2 is lost"):
        from_third.result()
    later = [
        first.expect(PeerBuffers(outs[2], [0, 0, 20])),
        first.all_to_all(PeerBuffers(empty(0), [0] * 3), PeerBuffers(filled(20, 1), [0, 0, 20])),
    ]
    for operation in later:
        assert operation.done
        with pytest.raises(GroupError, match="rank 2 is lost"):
            operation.result()


def test_what_was_sent_before_its_end_still_arrives(mesh: Any) -> None:
    whole = mesh(2)
    whole.groups[1].all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(1000, 6), [1000, 0]))
    whole.groups[1].leave()
    out = empty(1000)
    operation = whole.groups[0].expect(PeerBuffers(out, [0, 1000]))
    whole.drive(lambda: operation.done, ranks=[0])
    operation.result()
    assert out.min() == 6


def test_who_has_received_all_goes_on_unless_told_to_flush(mesh: Any) -> None:
    whole = mesh(2)
    sender = whole.groups[0]
    hasty = sender.all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(LONG, 1), [0, LONG]), flush=False)
    patient = sender.all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(LONG, 2), [0, LONG]))
    assert hasty.done
    assert not patient.done
    outs = [empty(LONG) for _ in range(2)]
    received = [whole.groups[1].expect(PeerBuffers(out, [LONG, 0])) for out in outs]
    whole.drive(lambda: patient.done and all(op.done for op in received))
    assert [(int(out.min()), int(out.max())) for out in outs] == [(1, 1), (2, 2)]


def test_the_place_of_a_short_message_may_be_used_again_at_once(mesh: Any) -> None:
    whole = mesh(2)
    sender = whole.groups[0]
    sender.all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(LONG, 1), [0, LONG]), flush=False)
    short = filled(100, 2)
    sender.all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(short, [0, 100]), flush=False)
    short.fill_(77)
    outs = [empty(LONG), empty(100)]
    received = [whole.groups[1].expect(PeerBuffers(out, [len(out), 0])) for out in outs]
    whole.drive(lambda: all(op.done for op in received))
    assert outs[1].unique().tolist() == [2]


def test_nothing_is_written_after_a_group_was_left(mesh: Any) -> None:
    whole = mesh(2)
    out = empty(100)
    whole.groups[0].expect(PeerBuffers(out, [0, 100]))
    whole.groups[0].leave()
    whole.groups[1].all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(100, 5), [100, 0]), flush=False)
    for _ in range(10):
        whole.pollers[0].wait(0.001)
    assert out.sum() == 0


def test_a_wake_from_another_thread_ends_a_wait() -> None:
    poller = Poller()
    for _ in range(100):
        began = time.monotonic()
        waker = threading.Thread(target=poller.wake)
        waker.start()
        poller.wait(20)
        assert time.monotonic() - began < 10
        waker.join()
    poller.wake()
    poller.wake()
    poller.wait(20)
    poller.close()
    poller.wake()


# ---------------------------------------------------------------- how members connect


class Meeting:
    """What members say, in one process."""

    def __init__(self, said: dict[str, bytes], condition: threading.Condition) -> None:
        self.said, self.condition, self.abandoned = said, condition, False

    def set(self, key: str, value: Any) -> None:
        with self.condition:
            self.said[key] = value.encode() if isinstance(value, str) else value
            self.condition.notify_all()

    def get(self, key: str) -> bytes:
        with self.condition:
            self.condition.wait_for(lambda: self.abandoned or key in self.said)
        if self.abandoned:
            raise RuntimeError("not wanted")
        return self.said[key]

    def abandon(self) -> None:
        with self.condition:
            self.abandoned = True
            self.condition.notify_all()


def meetings(size: int) -> list[Meeting]:
    said: dict[str, bytes] = {}
    condition = threading.Condition()
    return [Meeting(said, condition) for _ in range(size)]


def test_members_connect_each_with_each_and_strangers_with_nobody_nor_hold_them_up() -> None:
    began = time.monotonic()
    places = meetings(3)
    found: dict[int, dict[int, socket.socket]] = {}

    def run(rank: int) -> None:
        found[rank] = connect(places[rank], rank, 3, "127.0.0.1", lambda: True)  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    address, port = places[2].get("0").decode().split()
    strangers = [socket.create_connection((address, int(port))) for _ in range(2)]
    strangers[0].sendall(b"\0" * 16 + b"\2\0\0\0")
    threads.append(threading.Thread(target=run, args=(2,)))
    threads[-1].start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began < 4
    assert {rank: sorted(sockets) for rank, sockets in found.items()} == {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    found[2][0].sendall(b"x")
    found[0][2].settimeout(5)
    assert found[0][2].recv(1) == b"x"
    for sock in [*strangers, *(s for sockets in found.values() for s in sockets.values())]:
        sock.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_is_not_wanted_any_more_is_not_waited_for(rank: int) -> None:
    place = meetings(2)[0]
    builder = GroupBuilder("g", place, rank, 2, "127.0.0.1", torch.device("cpu"), lambda: None)  # type: ignore[arg-type]
    place.get("0") if rank == 0 else None
    builder.abandon()
    deadline = time.monotonic() + 10
    while not builder.done:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert builder.group is None


def test_a_member_that_is_gone_ends_the_making_of_a_group() -> None:
    first, second = meetings(2)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    first.set("secret", b"s" * 16)
    first.set("0", f"127.0.0.1 {port}")
    with pytest.raises(GroupError, match="cannot connect"):
        connect(second, 1, 2, "127.0.0.1", lambda: True)  # type: ignore[arg-type]


def test_who_listens_in_the_place_of_a_member_and_does_not_know_the_secret_is_no_member() -> None:
    first, second = meetings(2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            caller, _ = server.accept()
            with caller:
                caller.sendall(b"n" * 16 + b"p" * 32)
                caller.recv(1000)
                caller.recv(1000)

        thread = threading.Thread(target=pretend)
        thread.start()
        first.set("secret", b"s" * 32)
        first.set("0", f"127.0.0.1 {server.getsockname()[1]}")
        with pytest.raises(GroupError, match="does not know the group's secret"):
            connect(second, 1, 2, "127.0.0.1", lambda: True)  # type: ignore[arg-type]
        thread.join()


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(GroupError, match="cannot connect"):
        connect(meetings(1)[0], 0, 1, "no host at all", lambda: True)  # type: ignore[arg-type]


class Made:
    """A group that remembers whether it was left."""

    def __init__(self) -> None:
        self.left = False

    def leave(self) -> None:
        self.left = True


@pytest.mark.parametrize("late", [False, True])
def test_a_group_that_nobody_wants_any_more_is_left_whenever_it_was_made(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    made, go_on, woken = Made(), threading.Event(), threading.Event()

    def make(*_: Any) -> Made:
        go_on.wait(10)
        return made

    monkeypatch.setattr(GroupBuilder, "_connected_group", make)
    builder = GroupBuilder("g", meetings(1)[0], 0, 1, "h", torch.device("cpu"), woken.set)  # type: ignore[arg-type]
    if late:
        builder.abandon()
    go_on.set()
    assert woken.wait(10)
    assert made.left == late
    builder.abandon()
    assert made.left


def test_the_thread_is_woken_for_large_parts_of_a_long_message_and_for_its_end(mesh: Any) -> None:
    whole = mesh(2)
    out, end = empty(LONG), empty(10)
    operations = [
        whole.groups[0].expect(PeerBuffers(out, [0, LONG])),
        whole.groups[0].expect(PeerBuffers(end, [0, 10])),
    ]
    sock = whole.groups[0]._peers[1].sock
    seen = []
    for part, length in ((filled(LONG, 1), LONG), (filled(10, 2), 10)):
        whole.groups[1].all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(part, [length, 0]), flush=False)

    def done() -> bool:
        seen.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
        return all(op.done for op in operations)

    whole.drive(done)
    assert max(seen) == tcp._LOW_WATER
    assert seen[-1] == 1


def test_a_failed_operation_is_freed_with_its_buffers_though_nobody_collects_cycles(mesh: Any) -> None:
    gc.disable()
    try:
        whole = mesh(2)
        operations = [whole.groups[0].expect(PeerBuffers(empty(LONG), [0, LONG]))]
        whole.groups[1].all_to_all(PeerBuffers(empty(0), [0, 0]), PeerBuffers(filled(1000, 1), [1000, 0]), flush=False)
        whole.drive(lambda: operations[0].done)
        with pytest.raises(GroupError):
            operations[0].result()
        operations.append(whole.groups[1].expect(PeerBuffers(empty(LONG), [LONG, 0])))
        whole.groups[0]._give(whole.groups[0]._peers[1], None, memoryview(bytes(LONG)), 1)
        for _ in range(3):
            whole.pollers[1].wait(0.01)
        whole.groups[0].leave()
        whole.groups[1].leave()
        references = [weakref.ref(operation) for operation in operations]
        operations.clear()
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- whole steps over narrow sockets

NARROW = 1 << 16


def narrow(whole: Mesh) -> None:
    """Sockets that hold little, so that much is still being sent when a step ends."""
    for group in whole.groups:
        for peer in group._peers.values():
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                peer.sock.setsockopt(socket.SOL_SOCKET, option, NARROW)


class Steps:
    """One member's steps in a thread of its own: two generations on one group, gradients of whole numbers."""

    LAYOUT = Layout(
        [(f"p{i}", torch.zeros(n)) for i, n in enumerate([140_000, 3, 180_000, 100_000, 11])],
        [("b", torch.zeros(80_000))],
        600_000,
    )

    def __init__(self, whole: Mesh, rank: int, generations: list[Any]) -> None:
        self.group, self.poller, self.rank, self.generations = (
            whole.groups[rank],
            whole.pollers[rank],
            rank,
            generations,
        )
        self.wrong: list[Any] = []
        self.num_queued = 0
        self.over = False

    @staticmethod
    def gradient(step: int, rank: int, index: int, numel: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + index)
        return torch.randint(-8, 8, (numel,), generator=generator).float()

    def run(self, members: list[Steps]) -> None:
        try:
            self.train()
        finally:
            self.over = True
        while not all(member.over for member in members):
            self.poller.wait(0.01)  # Others may wait for what it still has to send.

    def train(self) -> None:
        step = 0
        for record in self.generations:
            reducer = reducer_for(record, self.rank, self.LAYOUT, self.group, ErrorFeedback(self.LAYOUT))
            for _ in range(4):
                step += 1
                self.do(reducer, record, step)

    def do(self, reducer: Reducer, record: Any, step: int) -> None:
        if step % 3 == self.rank:
            time.sleep(0.005)  # The others are to have something left that they could not send yet.
        reducer.expect_step()
        summary, contributes = SummarySoFar(step=step), record.shares[self.rank] > 0
        for bucket in self.LAYOUT.buckets:
            local = self.gradient(step, self.rank, bucket.index, bucket.numel)
            wires = reducer.send_buffers[bucket.index]
            for start, stop, values in wires or ():
                values.copy_(local[start:stop])
            header = Header(step, record.number, bucket.index, 0, 1.0, contributes, used=0)
            out = torch.full((bucket.numel,), torch.nan)
            for operation in reducer.all_reduce(bucket, header, None if wires else local, out, summary):
                self.finish(operation)
            senders = [rank for rank, share in enumerate(record.shares) if share > 0]
            parts = [self.gradient(step, rank, bucket.index, bucket.numel) for rank in senders]
            if not torch.allclose(out, torch.stack(parts).mean(dim=0), atol=0.1):
                self.wrong.append((self.rank, step, bucket.index))
        self.num_queued += sum(len(peer.out) for peer in self.group._peers.values())

    def finish(self, operation: Any) -> None:
        while not operation.done:
            self.poller.wait(1.0)
        operation.result()


@pytest.mark.parametrize("codec", ["none", "bf16"])
@pytest.mark.parametrize(
    ("shares", "owners"),
    [([1, 1, 1], [1, 1, 1]), ([1, 0, 2], [0, 1, 3]), ([0, 1, 1], [3, 0, 0]), ([1, 1, 0], [0, 0, 1])],
)
def test_what_is_still_being_sent_when_a_step_ends_is_not_written_over(
    mesh: Any, shares: list[float], owners: list[float], codec: str
) -> None:
    for _ in range(20):  # Whether anything is left is a matter of chance: of who gets the CPU when.
        whole = mesh(3)
        narrow(whole)
        generations = [record_of(shares, owners, codec=codec, number=3), record_of(shares[::-1], owners, number=4)]
        members = [Steps(whole, rank, generations) for rank in range(3)]
        threads = [threading.Thread(target=member.run, args=(members,)) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [(member.over, member.wrong) for member in members] == [(True, [])] * 3
        if len(set(owners)) == 1 or sum(m.num_queued for m in members) > 0:
            return
    pytest.fail("nothing was ever left: this test tests nothing")
