"""Members connected each with each by TCP: uneven all-to-alls of bytes, which may arrive before they are asked for.

Torch's gloo has the same operation. This one differs:

- A message can be received while this member still computes (:meth:`TcpGroup.expect`), so members that are ready early
  have sent everything by the time the last one is. Gloo's send waits until the receiver has launched the operation.
- A member that has received what it waits for continues. In gloo it waits until the others have received what it sent.
- An operation that is given up is over: its sockets are closed, and nothing writes into its buffers later.
- One thread serves everything: the one that waits for the result. Gloo hands each operation through three.

A frame is ``tag, length`` and the bytes. Tags count a group's operations, which all members launch in the same order.
A frame for an operation that this member has not expected yet stays in the socket.
"""

from __future__ import annotations

import collections
import contextlib
import selectors
import socket
import struct
import sys
from collections.abc import Mapping

import torch

from raytrain_het.allreduce.transport.group import GroupError, PeerBuffers
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.membership.encryption import Socket

_FRAME = struct.Struct("<QQ")
_SENT = struct.Struct("=120xQ40xQQ")
"""``tcpi_bytes_acked``, ``tcpi_busy_time``, ``tcpi_rwnd_limited`` in the kernel's ``struct tcp_info`` (linux/tcp.h)."""
_SMALL = 4096
"""A message of no more bytes is copied if it cannot be sent at once: its memory may be needed again soon."""
_AT_ONCE = 1 << 20
"""So many bytes are read from a peer before the next peer's turn."""
_LOW_WATER = 1 << 18
"""The thread is woken for a long frame once so many bytes of it are there."""


class TcpOperation:
    """An all-to-all. It is done when all messages have come, and, with ``flush``, all that it sends has gone."""

    def __init__(self, rank: int, tag: int, out: PeerBuffers) -> None:
        self.tag = tag
        self.own = out.views[rank]
        self.missing = {sender: part for sender, part in enumerate(out.views) if out.lengths[sender] and sender != rank}
        """By rank of those whose message is still to come: where it lands."""
        self.num_unsent = 0
        self.error = ""
        """Why it has failed. A text, since an exception would keep the buffers of its frames alive."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(self.error) or not (self.missing or self.num_unsent)

    def result(self) -> None:
        """Raises:
        GroupError: it failed.
        """
        if self.error:
            raise GroupError(self.error)


class _Incoming:
    """A message that is being received."""

    def __init__(self, operation: TcpOperation, rest: memoryview) -> None:
        self.operation = operation
        self.rest = rest
        """The part of its place that is still to be filled."""


class _Peer:
    """One connection."""

    def __init__(self, rank: int, sock: Socket) -> None:
        self.rank, self.sock = rank, sock
        self.events = 0
        self.out: collections.deque[tuple[memoryview, TcpOperation | None]] = collections.deque()
        self.head = bytearray(_FRAME.size)
        self.head_filled = 0
        self.incoming: _Incoming | None = None
        """The message that is being received; None between two frames, where a head comes."""
        self.low_water = 1
        self.early: tuple[int, int] | None = None
        """(tag, length) of a frame that nobody expects yet."""
        self.gone = ""
        """Why the connection is lost."""


class TcpGroup:
    """One member's end of a group.

    Args:
        key: names the group.
        rank: of this member.
        sockets: connected ones, by the other members' ranks; they belong to the group from now on.
    """

    device = torch.device("cpu")
    poll_s: float | None = None

    def __init__(self, key: str, rank: int, sockets: Mapping[int, Socket]) -> None:
        self.key, self.rank, self.size = key, rank, len(sockets) + 1
        self._poller: Poller | None = None
        self._peers = {r: _Peer(r, sock) for r, sock in sockets.items()}
        for sock in sockets.values():
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tag = 0
        self._open: dict[int, TcpOperation] = {}

    def join(self, poller: Poller) -> None:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        self._poller = poller
        for peer in self._peers.values():
            self._watch(peer, selectors.EVENT_READ)

    def leave(self) -> None:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        for peer in self._peers.values():
            self._watch(peer, 0)
            with contextlib.suppress(OSError):  # A forked child may hold it too, and would hold up its end.
                peer.sock.shutdown(socket.SHUT_RDWR)
            peer.sock.close()
            peer.out.clear()
            peer.incoming = None
        self._open.clear()

    # ---------------------------------------------------------------- operations

    def expect(self, out: PeerBuffers) -> TcpOperation:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        operation = TcpOperation(self.rank, self._tag, out)
        self._tag += 1
        if operation.missing:
            self._open[operation.tag] = operation
        for rank in list(operation.missing):
            peer = self._peers[rank]
            if peer.gone:
                operation.error = peer.gone
            elif peer.early is not None and peer.early[0] == operation.tag:
                (_, length), peer.early = peer.early, None
                try:
                    self._begin_message(peer, operation, length)
                except ConnectionError as error:
                    self._lost(peer, error)
                else:
                    self._watch(peer, peer.events | selectors.EVENT_READ)
        return operation

    def all_to_all(
        self, out: PeerBuffers, inp: PeerBuffers, expected: TcpOperation | None = None, *, flush: bool = True
    ) -> TcpOperation:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        operation = expected or self.expect(out)
        if operation.own:
            operation.own[:] = inp.views[self.rank]
        for rank, peer in self._peers.items():
            if inp.lengths[rank]:
                self._give(peer, operation if flush else None, inp.views[rank], operation.tag)
        if operation.error:
            self._open.pop(operation.tag, None)
        return operation

    def sent(self) -> dict[int, tuple[int, float]]:
        """See :class:`raytrain_het.allreduce.transport.group.Group`. As Linux counts it, in ticks of its clock."""
        sent: dict[int, tuple[int, float]] = {}
        if not sys.platform.startswith("linux"):
            return sent
        for peer in self._peers.values():
            with contextlib.suppress(OSError, struct.error):  # An old kernel has less to say.
                info = peer.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT.size)
                acknowledged, busy_us, waited_for_room_us = _SENT.unpack(info)
                sent[peer.rank] = acknowledged, (busy_us - waited_for_room_us) / 1e6
        return sent

    # ---------------------------------------------------------------- sockets

    def _watch(self, peer: _Peer, events: int) -> None:
        if events != peer.events and self._poller is not None:
            self._poller.watch(peer.sock, events, lambda what: self._serve(peer, what))
        peer.events = events

    def _serve(self, peer: _Peer, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._write(peer)
            if events & selectors.EVENT_READ:
                self._read(peer)
        except OSError as error:
            self._lost(peer, error)

    def _lost(self, peer: _Peer, error: OSError) -> None:
        """Operations that need this peer have failed. Messages of others are still received."""
        peer.gone = f"the connection to rank {peer.rank} is lost: {error}"
        self._watch(peer, 0)
        waiting = [operation for _, operation in peer.out if operation is not None]
        peer.out.clear()
        for operation in [*waiting, *(op for op in self._open.values() if peer.rank in op.missing)]:
            operation.error = peer.gone
            self._open.pop(operation.tag, None)

    def _give(self, peer: _Peer, operation: TcpOperation | None, part: memoryview, tag: int) -> None:
        if peer.gone:
            if operation is not None:
                operation.error = peer.gone
            return
        head, sent = memoryview(_FRAME.pack(tag, len(part))), 0
        if not peer.out:
            try:
                sent = peer.sock.sendmsg([head, part])
            except BlockingIOError:
                pass
            except OSError as error:
                self._lost(peer, error)
                if operation is not None:
                    operation.error = peer.gone
                return
        if sent == len(head) + len(part):
            return
        if operation is not None:
            operation.num_unsent += 1
        if sent < len(head):
            peer.out.append((head[sent:], None))
        rest = part[max(sent - len(head), 0) :]
        peer.out.append((memoryview(bytes(rest)) if len(rest) <= _SMALL else rest, operation))
        self._watch(peer, peer.events | selectors.EVENT_WRITE)

    def _write(self, peer: _Peer) -> None:
        while peer.out:
            part, operation = peer.out[0]
            try:
                sent = peer.sock.send(part)
            except BlockingIOError:
                return
            if sent < len(part):
                peer.out[0] = (part[sent:], operation)
                return
            peer.out.popleft()
            if operation is not None:
                operation.num_unsent -= 1
        self._watch(peer, peer.events & ~selectors.EVENT_WRITE)

    def _read(self, peer: _Peer) -> None:
        budget = _AT_ONCE
        while budget > 0 and peer.early is None:
            incoming = peer.incoming
            try:
                if incoming is None:
                    count = peer.sock.recv_into(memoryview(peer.head)[peer.head_filled :])
                    peer.head_filled += count
                else:
                    count = peer.sock.recv_into(incoming.rest)
                    incoming.rest = incoming.rest[count:]
            except BlockingIOError:
                break
            if count == 0:
                raise ConnectionError("it was closed by the peer")
            budget -= count
            if incoming is not None:
                if not len(incoming.rest):
                    self._end_message(peer, incoming.operation)
            elif peer.head_filled == _FRAME.size:
                self._begin(peer)
        self._set_low_water(peer)

    def _begin(self, peer: _Peer) -> None:
        tag, length = _FRAME.unpack(peer.head)
        peer.head_filled = 0
        operation = self._open.get(tag)
        if operation is not None:
            self._begin_message(peer, operation, length)
        elif tag >= self._tag:
            peer.early = (tag, length)
            self._watch(peer, peer.events & ~selectors.EVENT_READ)
        else:
            raise ConnectionError(f"rank {peer.rank} sends {length} bytes for operation {tag}, which is over")

    def _begin_message(self, peer: _Peer, operation: TcpOperation, length: int) -> None:
        part = operation.missing.get(peer.rank)
        if part is None or len(part) != length:
            expected = len(part) if part is not None else 0
            raise ConnectionError(f"rank {peer.rank} sends {length} bytes where {expected} are expected")
        peer.incoming = _Incoming(operation, part)

    def _end_message(self, peer: _Peer, operation: TcpOperation) -> None:
        peer.incoming = None
        del operation.missing[peer.rank]
        if not operation.missing:
            self._open.pop(operation.tag, None)

    def _set_low_water(self, peer: _Peer) -> None:
        wanted = min(len(peer.incoming.rest), _LOW_WATER) if peer.incoming is not None else 1
        if wanted != peer.low_water and (wanted == _LOW_WATER or peer.low_water > wanted):
            peer.low_water = wanted
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
