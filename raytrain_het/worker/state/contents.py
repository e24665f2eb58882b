"""What a checkpoint of this worker holds: all that is common to workers, and its own part."""

from __future__ import annotations

import dataclasses
from typing import Any

from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Record
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.state.extras import Extras
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.state.storage import Identity


def identity_of_data(plan: DataPlan, fingerprint: str) -> dict[str, Any]:
    """What all workers must agree on about the data, and what a checkpoint's cursor belongs to."""
    return {**dataclasses.asdict(plan), "dataset_fingerprint": fingerprint}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """Where it all is."""

    replica: Replica
    states: ErrorFeedback
    """What this worker's codec remembers."""
    extras: Extras
    plan: DataPlan
    data_fingerprint: str
    layout_fingerprint: str
    num_slots: int

    @property
    def parameters(self) -> dict[str, list[int]]:
        """By name: the shape."""
        return {name: list(p.shape) for name, p in self.replica.named_parameters()}

    @property
    def data(self) -> dict[str, Any]:
        """See :func:`identity_of_data`."""
        return identity_of_data(self.plan, self.data_fingerprint)

    def about(self, cursor: Cursor, record: Record, identity: Identity) -> dict[str, Any]:
        """What a checkpoint is of, as it stands in ``het.json``."""
        return {
            "cursor": cursor.to_dict(),
            "step": cursor.step,
            "generation": record.number,
            "table": record.table,
            "world_size": self.num_slots,
            "fingerprint": self.layout_fingerprint,
            "parameters": self.parameters,
            "data": self.data,
            "extras": sorted(self.extras.known),
            "run": identity.to_json(),
        }

    def shared(self, opened: dict[str, Any] | None) -> dict[str, Any]:
        """All that is common to workers, copied to the CPU.

        Args:
            opened: in the middle of a step what it began from (:meth:`Replica.light`): a run that resumes does this
                step from its beginning. None between steps.
        """
        snapshot = {**self.replica.snapshot(), "extras": self.extras.save()}
        if opened is not None:
            began = self.replica.offered(opened)
            for part in (snapshot["model"], snapshot["buffers"]):
                part.update({name: b for name, b in began["buffers"].items() if name in part})
            snapshot["registered"] = began["registered"]
            for group, settings in zip(snapshot["optimizer"]["param_groups"], began["hyperparameters"], strict=True):
                group.update(settings)
        return snapshot

    def own(self, *, checkpoint: bool) -> dict[str, Any]:
        """This worker's own part; nearly nothing where there is no checkpoint."""
        return {
            "codec": self.states.by_parameter() if checkpoint else {},
            "weight_per_sample": self.states.weight_per_sample,
            "extras": self.extras.save_own() if checkpoint else {},
        }
