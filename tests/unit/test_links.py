"""Links over the loopback interface, and who measures with whom."""

from __future__ import annotations

import socket

import pytest

from raytrain_het.balance.profile import Measurement
from raytrain_het.probing.links import ROUND_TRIPS, Address, Link, LinkServer, probe_link, probe_links, slowest_link


def link(latency_s: float, send: float, receive: float) -> Link:
    return Link(*(Measurement(value, 0, 1) for value in (latency_s, send, receive)))


def test_a_link_has_a_latency_and_a_bandwidth_each_way_again_and_again() -> None:
    server = LinkServer("127.0.0.1")
    for _ in range(2):
        found = probe_link(server.address)
        assert 0 < found.latency_s.median < 1 and found.latency_s.repeats == ROUND_TRIPS
        assert found.send.median > 1e6 and found.receive.median > 1e6
        assert found.bandwidth == min(found.send.median, found.receive.median)
    server.close()
    assert not server._thread.is_alive()
    with pytest.raises(OSError):
        probe_link(server.address)


def test_a_server_outlives_a_caller_that_talks_nonsense() -> None:
    server = LinkServer("127.0.0.1")
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"", b">"):
        with socket.create_connection(server.address) as caller:
            caller.sendall(nonsense)
    assert probe_link(server.address).bandwidth > 0
    server.close()


class Member:
    def __init__(self, number: int, log: list[tuple[int, int]]) -> None:
        self.number, self.log = number, log

    def listen(self) -> Address:
        return ("host", self.number)

    def link_to(self, address: Address) -> Link | None:
        self.log.append((self.number, address[1]))
        return link(0.1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, []), (2, [(0, 1)]), (3, [(0, 1), (1, 2), (2, 0)]), (4, [(0, 1), (1, 2), (2, 3), (3, 0)])],
)
def test_each_member_measures_with_the_next_in_a_ring(count: int, expected: list[tuple[int, int]]) -> None:
    log: list[tuple[int, int]] = []
    links = probe_links([Member(i, log) for i in range(count)])
    assert log == expected == list(links)


def test_a_member_is_as_slow_as_its_slowest_link() -> None:
    links = {("a", "b"): link(0.1, 10, 20), ("b", "c"): link(0.3, 50, 5), ("c", "a"): None}
    assert slowest_link("a", links) == (0.1, 10)
    assert slowest_link("b", links) == (0.3, 5)
    assert slowest_link("d", links) is None
