"""What the codec of a worker that leaves has left out of its gradients is sent by another one."""

from __future__ import annotations

import threading
import time
from typing import Any

from raytrain_het.allreduce.codecs import RESIDUAL, State
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.errors import CheckpointError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.protocol import Event
from raytrain_het.worker.state.state_server import StateServer

WAIT_S = 60.0
"""So long a worker that leaves stays for it."""
_LEFT_OUT, _INHERIT = "left_out", "inherit"


class HandingOn:
    """Both sides of it, between two state servers: the one that leaves asks its heir to come for it."""

    def __init__(self, agent: MemberAgent, server: StateServer, states: ErrorFeedback) -> None:
        self._agent, self._server, self._states = agent, server, states
        self._lock, self._gone = threading.Lock(), False
        server.offer(_INHERIT, self._inherit)

    def hand_on(self) -> bool:
        """This worker was let go, and trains no more. Whether another one has all that it had left out."""
        heir, member = self._agent.heir, self._agent.member
        with self._lock:  # What comes from others from now on is refused, and not lost.
            self._gone, held = True, self._states.by_parameter()
        left_out = {name: {RESIDUAL: state[RESIDUAL]} for name, state in held.items() if RESIDUAL in state}
        if not any(state[RESIDUAL].any() for state in left_out.values()):
            return True
        if heir is None:
            return False
        self._server.offer(_LEFT_OUT, lambda _: left_out)
        until = time.monotonic() + WAIT_S
        mine = {"host": member.host, "port": member.state_port, "slot": member.slot}
        try:
            taken = self._server.ask(
                heir.host, heir.port, _INHERIT, give_up=lambda: time.monotonic() > until, leaver=mine
            )
        except CheckpointError:  # The heir could not take it, and says why in its own log.
            return False
        return bool(taken)

    def _inherit(self, request: dict[str, Any]) -> bool:
        leaver, agent = request["leaver"], self._agent
        left_out: dict[str, State] | None = self._server.ask(
            leaver["host"], leaver["port"], _LEFT_OUT, give_up=lambda: agent.gone is not None
        )
        with self._lock:
            if left_out is None or self._gone or agent.gone is not None:
                return False
            norm = self._states.inherit(left_out)
        agent.tell(Event(event={"kind": "handed_on", "by": leaver["slot"], "norm": norm}))
        return True
