"""The controller's side of the membership actor: it makes it, asks it and ends it.

No question holds the controller's poll for longer than it says: an actor that restarts answers
later, and until then the last answer stands.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from raytrain_het.config import HetConfig
from raytrain_het.errors import RunFailedError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.run_context import RunContext

logger = logging.getLogger(__name__)

RESTART_LIMIT_S = 120.0
"""An actor that has died answers again by then, or never."""
MAX_ACKNOWLEDGED = 1000
"""So many of the last reports are remembered, in case that a restarted actor offers one again."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the lower layers give: named here so that tests can put others in their place."""

    actor: type
    run_worker: Callable[..., Any]

    @staticmethod
    def default() -> Parts:
        """The real ones."""
        from raytrain_het.membership.server import Hub as MembershipHub

        return Parts(actor=MembershipHub, run_worker=_run_worker)


def _run_worker(*args: Any, **keywords: Any) -> Any:
    """``training.session.run_worker``, which is loaded where it runs: the driver and the controller only name it, and
    torch takes seconds."""
    from raytrain_het.worker.session import run_worker

    return run_worker(*args, **keywords)


def hub_name(run_id: str, attempt: int) -> str:
    """The name under which the driver finds the membership actor of one attempt of a run."""
    return f"raytrain_het-membership-{run_id}-{attempt}"


class HubActor:
    """One attempt's membership actor.

    It is owned by the process that makes it, the controller, and so dies with it.
    """

    def __init__(
        self,
        parts: Parts,
        config: HetConfig,
        *,
        run_id: str,
        attempt: int,
        num_slots: int,
        checkpoint: str | None,
        checkpoint_cursor: Cursor | None,
    ) -> None:
        context = RunContext(
            run_id=f"{run_id}-{attempt}",
            num_slots=num_slots,
            host=ray.util.get_node_ip_address(),
            checkpoint=checkpoint,
            checkpoint_cursor=checkpoint_cursor,
        )
        here = ray.get_runtime_context().get_node_id()
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(parts.actor)
        self.handle = actor.options(
            name=hub_name(run_id, attempt), label_selector={ray._raylet.RAY_NODE_ID_KEY: here}
        ).remote(config, context)
        self.status: dict[str, Any] = {}
        self._pending: tuple[Any, Any] | None = None
        self._acknowledged: dict[str, None] = {}
        self._last_answer = time.monotonic()

    def ask(self, timeout_s: float) -> list[dict[str, Any]] | None:
        """Refresh ``status`` and return the finished reports that were not acknowledged yet.

        Returns:
            None where no answer came in time, else the reports, oldest first. The answer to a
            question asked in an earlier round does not count as this round's.

        Raises:
            RunFailedError: The actor is gone for good.
        """
        stale = self._pending is not None
        refs = self._pending or (self.handle.status.remote(), self.handle.take_reports.remote())
        try:
            status, reports = ray.get(list(refs), timeout=timeout_s)
        except GetTimeoutError:
            self._pending = refs
            return None
        except RayActorError as error:
            self._pending = None
            if getattr(error, "actor_init_failed", False):
                raise RunFailedError(f"The membership actor could not start: {error}") from None
            if time.monotonic() - self._last_answer > RESTART_LIMIT_S:
                raise RunFailedError(f"The membership actor is gone and was not restarted: {error}") from None
            return None
        self._pending, self._last_answer = None, time.monotonic()
        self.status = status
        if stale:
            return None
        again = [r["key"] for r in reports if r["key"] in self._acknowledged]
        if again:  # an acknowledgement that a restart of the actor lost
            self.handle.acknowledge.remote(again)
        return [r for r in reports if r["key"] not in self._acknowledged]

    def acknowledge(self, keys: list[str]) -> None:
        """These reports are registered."""
        self._acknowledged |= dict.fromkeys(keys)
        for key in list(self._acknowledged)[:-MAX_ACKNOWLEDGED]:
            del self._acknowledged[key]
        self.handle.acknowledge.remote(keys)

    def slot_lost(self, slot: int, reason: str) -> None:
        """Ray says that the slot's worker is dead. Does not wait."""
        self.handle.slot_lost.remote(slot, reason)

    def slot_drains(self, slot: int, reason: str) -> None:
        """The node of the slot's worker will be taken away. Does not wait."""
        self.handle.slot_drains.remote(slot, reason)

    def slot_vacant(self, slot: int, reason: str) -> None:
        """Nobody comes for this slot for now. Does not wait."""
        self.handle.slot_vacant.remote(slot, reason)

    def last_word(self) -> dict[str, Any]:
        """Status, events and reports at the end, as far as they come."""
        last: dict[str, Any] = {"status": self.status, "events": [], "reports": []}
        asked = {"status": (), "events": (0,), "reports": (0,)}
        for name, args in asked.items():
            try:
                last[name] = ray.get(getattr(self.handle, name).remote(*args), timeout=2)
            except (RayError, TimeoutError, AttributeError):
                logger.debug("The membership actor gave no last %s.", name)
        return last

    def end(self) -> None:
        """End the actor for good."""
        with contextlib.suppress(RayError, TimeoutError):
            ray.get(self.handle.shutdown.remote(), timeout=2)
        ray.kill(self.handle, no_restart=True)
