"""A worker's connections: to the hub, to peers that heal, and to those of its generation."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.events import Warned
from raytrain_het.membership.protocol import Event
from raytrain_het.membership.record import Record
from raytrain_het.membership.watchman import Watchman
from raytrain_het.worker.context import HubAddress
from raytrain_het.worker.state.state_server import StateServer

logger = logging.getLogger("raytrain_het")


@dataclass(frozen=True)
class Connections:
    """One worker's, with the threads behind them."""

    hub: HubAddress
    agent: MemberAgent
    server: StateServer
    """Serves this worker's state to peers."""
    communicator: Communicator
    watchman: Watchman
    """Tells the hub whether this process lives, while it is too busy to."""

    def record(self) -> Record:
        """The record that the hub has sent last.

        Raises:
            RuntimeError: there was none yet.
        """
        record = self.agent.record
        if record is None:
            raise RuntimeError("this worker has joined no generation yet")
        return record

    def warn(self, text: str, *, everybody_says_it: bool = True) -> None:
        """A warning for this worker's log, and for the run's: there one of all who say the same counts."""
        logger.warning(text)
        self.tell_warning(text, everybody_says_it=everybody_says_it)

    def tell_warning(self, text: str, *, everybody_says_it: bool = True) -> None:
        """A warning that this worker's log has already, for the run's."""
        if self.agent.member.slot == 0 or not everybody_says_it:
            self.agent.tell(Event(event=Warned(text=text)))

    def close(self) -> None:
        """Let go of threads and sockets."""
        self.communicator.close()
        self.server.close()
        self.agent.close()
        self.watchman.close()
