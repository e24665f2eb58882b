"""How a worker comes to hold what the others hold: from a checkpoint, a snapshot, or a snapshot and a replay.

An unhealed member takes a snapshot of a peer while the others train, replays the means of the steps gone by
since, and asks for a share. With the record that gives it one it compares itself to the peer, bit by bit: what a
training function does to gradients between ``backward()`` and ``step()`` is not in the sums. If it differs it takes the
peer's state as it stands; the peer cannot move on meanwhile, for the step needs them both. So it does if a snapshot
takes so long that more steps go by than may be kept: another one would take as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.errors import EvictedError, ReplicaMismatchError
from raytrain_het.membership import events
from raytrain_het.membership.agent import Impatience, MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.protocol import Event, Healed, Verified
from raytrain_het.membership.record import Record
from raytrain_het.worker.state.healing_source import HealingSource
from raytrain_het.worker.state.randomness import Randomness
from raytrain_het.worker.state.replica import Hyperparameters, Replica
from raytrain_het.worker.step.gradients import Gradients


class Healing:
    """Makes this worker hold what the others hold. Used by the training thread.

    Args:
        agent: which record is in force, and the right to commit.
        communicator: follows the steps that pass meanwhile.
        replica: what heals.
        gradients: through which a replayed step's means reach the optimizer.
        source: serves those that heal from this worker.
        randomness: heals too.
        load_checkpoint: loads a checkpoint; returns where its cursor stands.
    """

    def __init__(
        self,
        agent: MemberAgent,
        communicator: Communicator,
        replica: Replica,
        gradients: Gradients,
        source: HealingSource,
        randomness: Randomness,
        load_checkpoint: Callable[[str, Cursor], Cursor],
    ) -> None:
        self.source = source
        self._agent, self._comm, self._replica, self._gradients = agent, communicator, replica, gradients
        self._randomness, self._load_checkpoint = randomness, load_checkpoint
        self.arrived: dict[str, Any] | None = None
        """The light part with which this worker came into the run, where others had begun the epoch: what its program
        does at the epoch's beginning has been done."""
        self._snapshot_step = -1
        self._snapshot_source = ""
        self._follow_start = -1
        self._held = False
        self._gap = False
        """Whether steps that the snapshot does not hold were dropped before their replay."""
        self._first: dict[str, Any] | None = None
        """What this worker was built with, while it heals: the run may have to begin again from it."""

    def take_arrived(self) -> dict[str, Any] | None:
        """:attr:`arrived`, once."""
        arrived, self.arrived = self.arrived, None
        return arrived

    # ---------------------------------------------------------------- this worker heals

    def take_over(self, record: Record) -> bool:
        """Come to hold the record's base; False if the record was superseded before that."""
        uid, held = self._agent.uid, True
        if not (record.reset or uid in (*record.unhealed, *record.fresh)):
            return True
        self._gradients.clear()
        if record.reset:
            held = self._reset(record)
        elif uid in record.unhealed:
            held = self._heal(record)
        else:
            held = self._verify(record)
        self._gradients.clear()
        if held and self.arrived is not None:
            self._replica.set_gradients(self.arrived)
        return held

    def _reset(self, record: Record) -> bool:
        cursor = record.cursor
        if record.checkpoint is not None:
            cursor = self._load_checkpoint(record.checkpoint, cursor)
        elif record.source == self._agent.uid:
            self._begin_again()
            self._comm.codec_states.reset()
            self.source.offer_snapshot(record)
        else:
            snapshot = self._ask(record, f"snapshot.{record.number}")
            if snapshot is None:
                return False
            built_with = None if self._held else self._replica.hyperparameters()
            self._replica.load(snapshot)
            self._comm.codec_states.reset()
            if built_with is not None and record.base == 0:
                _check_settings(built_with, self._replica.hyperparameters())
        return self._hold(record, cursor=cursor, healed=True, fresh=False)

    def _begin_again(self) -> None:
        """Nobody holds what was trained, and there is no checkpoint: the first state counts, not one partly healed."""
        if self._first is not None:
            self._replica.load(self._first)
        elif self._held:
            raise EvictedError(
                "all that held the state were lost before a checkpoint; this worker has only a part of it"
            )

    def _heal(self, record: Record) -> bool:
        """Snapshot, then replay; comes back when another record is there."""
        comm, agent = self._comm, self._agent
        if self._follow_start != comm.followed.num_starts or self._snapshot_source != record.source or self._gap:
            if not self._hold(record, cursor=None, healed=False, fresh=False):
                return False
            snapshot = self._ask(record, f"snapshot.{record.number}")
            if snapshot is None:
                return False
            if self._first is None and not self._held:
                self._first = self._replica.snapshot()
            self._replica.load(snapshot)
            # What it has left out of its gradients so far, if it was away, is still to be sent.
            self._comm.codec_states.forget_all_but_residual()
            self._snapshot_step, self._snapshot_source = record.base, record.source or ""
            self._follow_start, self._gap = comm.followed.num_starts, False
        asked = False
        while agent.is_current(record.number):
            if not self._gap:
                self._replay(record, until=None)
            if not asked and (self._gap or not self._behind()):
                if not self._hold(record, cursor=None, healed=True, fresh=True):
                    break
                agent.tell(Healed())
                asked = True
            agent.wait_for(lambda: not agent.is_current(record.number) or (self._behind() and not self._gap))
        return False

    def _behind(self) -> bool:
        """Whether steps that the snapshot does not hold wait for their replay."""
        return self._comm.followed.reach_beyond(self._snapshot_step)

    def _replay(self, record: Record, until: int | None) -> bool:
        """Replay the followed steps on the snapshot, each with the settings the peer used for it."""
        settings: dict[int, Hyperparameters | None] = {}
        followed = self._comm.followed
        while (step := followed.first_after(self._snapshot_step)) is not None and (until is None or step <= until):
            if step > self._snapshot_step + 1:
                self._gap = True
                return False
            if step not in settings:
                log = self._ask(record, "log", after=self._snapshot_step, at_least=step)
                if log is None:
                    return False
                settings = dict(log)
                if step not in settings:
                    return False
            taken, chosen = followed.take(step), settings[step]
            if taken is None:
                continue
            if taken.summary.applies and chosen is not None:
                self._gradients.adopt(taken.means)
                self._gradients.buffers.settle(self._gradients.means, True, own=False)
                self._gradients.publish(taken.summary)
                self._replica.set_hyperparameters(chosen)
                self._replica.update()
                self._gradients.clear()
            self._snapshot_step = step
        return True

    def _verify(self, record: Record) -> bool:
        """Replay to the base, and compare with the peer before the first step that counts."""
        complete = self._replay(record, until=record.base) and self._snapshot_step == record.base
        light = self._ask(record, f"light.{record.number}")
        if light is None:
            return False
        same = complete and light["digest"] == self._replica.digest(optimizer=True)
        if not same:
            full = self._ask(record, f"full.{record.number}")
            if full is None:
                return False
            self._replica.load(full)
        self._replica.restore_light(light)
        self.arrived = light
        self._randomness.load(light["random"])
        self._comm.followed.clear()
        why = "more steps had gone by than are kept" if self._gap else "the replay differed"
        how = "replay" if same else f"the peer's state, as {why}"
        held = self._hold(record, cursor=record.cursor, healed=True, fresh=False)
        if held:
            self._agent.tell(Verified())
            self._agent.tell(Event(event=events.Healed(step=record.base, by=how)))
        return held

    def _hold(self, record: Record, *, cursor: Cursor | None, healed: bool, fresh: bool) -> bool:
        """Say what this worker holds from now on, unless the record is superseded. ``cursor`` None leaves it."""
        with self._agent.committing(record.number) as allowed:
            if allowed:
                self._agent.advance(cursor or self._agent.cursor, healed=healed, fresh=fresh)
                if healed and not fresh:
                    self._held, self._first = True, None
        return allowed

    def _ask(self, record: Record, name: str, **values: Any) -> Any | None:
        """Ask the record's source; None once the record is superseded (a source that is gone will see to that)."""
        agent, source = self._agent, record.members[record.source_rank]
        impatience = Impatience(agent)

        def stale() -> bool:
            impatience.tell()
            return agent.gone is not None or not agent.is_current(record.number)

        while not stale():
            answer = self.source.server.ask(source.host, source.state_port, name, give_up=stale, **values)
            if answer is not None:
                return answer
            agent.wait_for(stale, timeout=0.05)
        agent.check()
        return None


_HOW_ONLY = ("foreach", "fused", "capturable", "differentiable")
"""Settings that say how an update is computed, and not which: GPUs and CPUs may have others."""


def _check_settings(mine: Hyperparameters, theirs: Hyperparameters) -> None:
    """Raises:
    ReplicaMismatchError: this worker's optimizer has other settings than that of the worker that all begin from.
    """
    for number, (here, there) in enumerate(zip(mine, theirs, strict=False)):
        for key, value in here.items():
            other = there.get(key)
            plain = isinstance(value, int | float | str | tuple | list | torch.Tensor | None)
            if plain and key not in _HOW_ONLY and repr(value) != repr(other):
                raise ReplicaMismatchError(
                    f"{key} of parameter group {number} is {value!r} on this worker, and {other!r} on the one that the "
                    "run begins from: every worker has to make the optimizer with the same settings. For rates by "
                    "speed write HetConfig(alpha=...)."
                )
