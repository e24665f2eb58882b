"""What all gather is on its way until it has arrived: whoever has it all goes on, over links of any speed."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from collectives_fakes import record_of

from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.reducers import reducer_for
from raytrain_het.allreduce.step_summary import SummarySoFar
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.allreduce.transport.tcp import TcpGroup

pytestmark = pytest.mark.usefixtures("shards_of_any_size")

LAYOUT = Layout([("a", torch.zeros(1500, 1000))], [], 1 << 30)
(BUCKET,) = LAYOUT.buckets
BUFFER_BYTES = 65536
"""Much less than a payload: the rest waits at the sender."""


class End:
    """One of two members."""

    def __init__(self, rank: int, sock: socket.socket, record: Any) -> None:
        self.record, self.rank, self.poller = record, rank, Poller()
        self.group = TcpGroup("g", rank, {1 - rank: sock})
        self.group.join(self.poller)
        self.reducer = reducer_for(record, rank, LAYOUT, self.group, ErrorFeedback(LAYOUT))

    def start(self, step: int) -> None:
        share = self.record.shares[self.rank]
        local = torch.randn(BUCKET.numel, generator=torch.Generator().manual_seed(step)) if share else None
        header = Header(step, 3, 0, 3, share, share > 0, used=1)
        self.out = torch.empty(BUCKET.numel)
        self.reducer.expect_step()
        self.operations = self.reducer.all_reduce(BUCKET, header, local, self.out, SummarySoFar(step=step))
        self.operation = next(self.operations)

    def advance(self) -> bool:
        """Whether the step is over."""
        self.poller.wait(0.001)
        while self.operation is not None and self.operation.done:
            self.operation.result()
            self.operation = next(self.operations, None)
        return self.operation is None


@pytest.mark.parametrize("all_gather", ["true", "false"])
def test_a_message_stays_as_it_is_until_a_slow_receiver_has_it(all_gather: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        fast = socket.socket()
        fast.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        fast.connect(server.getsockname())
        slow, _ = server.accept()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    record = record_of([1.0, 0.0], [1.0, 0.0], codec=f"topk(density=0.25, all_gather={all_gather})")
    sender, receiver = End(0, fast, record), End(1, slow, record)
    sender.start(5)
    receiver.start(5)
    receiver.poller.wait(0.01)
    for _ in range(50):  # The receiver takes nothing meanwhile.
        if sender.advance():
            break
    first = sender.out
    if sender.operation is None:
        sender.start(6)
    for _ in range(5000):
        sender.advance()
        if receiver.advance():
            break
    assert receiver.operation is None
    for _ in range(5000):
        if sender.operation is None or sender.out is not first or sender.advance():
            break
    assert torch.equal(receiver.out, first)
    for end in (sender, receiver):
        end.group.leave()
        end.poller.close()
