"""A worker's session: the parts wired together, and the functions users call inside the training function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from raytrain_het.allreduce import points
from raytrain_het.allreduce.codecs import byte_cpu_s, codec_costs, codec_of
from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.sums import Sums
from raytrain_het.config import HetConfig
from raytrain_het.errors import EvictedError, HetError, LoopOrderError, RunFailedError
from raytrain_het.membership.agent import MemberAgent, RunOver
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.protocol import Codecs, Event, Finish, Leave, Raised, ReplicaAudit
from raytrain_het.membership.protocol import Report as ReportPart
from raytrain_het.membership.record import Member, Record
from raytrain_het.probing.cores import cpu_limit
from raytrain_het.worker import stock
from raytrain_het.worker.checks.call_site import call_site
from raytrain_het.worker.checks.codec_warnings import warnings_of_epochs, warnings_of_model, warnings_of_optimizer
from raytrain_het.worker.checks.losses import LossCheck
from raytrain_het.worker.checks.rehearsal import Rehearsal
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.data.data_plan import DataPlan, slice_of
from raytrain_het.worker.state import checkpoint as files
from raytrain_het.worker.state.evaluations import Evaluations
from raytrain_het.worker.state.extras import Extra, Extras
from raytrain_het.worker.state.handing_on import HandingOn
from raytrain_het.worker.state.healing import Healing
from raytrain_het.worker.state.last_words import text_of, traceback_of
from raytrain_het.worker.state.metrics import check_metrics, check_reduce
from raytrain_het.worker.state.randomness import Randomness
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.state.replica_check import ReplicaCheck, kind_of_machine
from raytrain_het.worker.state.reporter import Report, Reporter
from raytrain_het.worker.state.resuming import Resuming
from raytrain_het.worker.state.state_server import StateServer
from raytrain_het.worker.state.storage import Identity
from raytrain_het.worker.state.structure import Structure, parameters_outside
from raytrain_het.worker.stats import Stats
from raytrain_het.worker.step.clipping import Clipping
from raytrain_het.worker.step.engine import Counters, Engine, Opened, advance, resync_due
from raytrain_het.worker.step.gradients import Gradients
from raytrain_het.worker.step.memory import MemoryLimit
from raytrain_het.worker.step.rates import Rates
from raytrain_het.worker.step.step_key import step_key
from raytrain_het.worker.step.step_record import StepRecord
from raytrain_het.worker.step.timings import KnownSpeed
from raytrain_het.worker.step.trained import trained

logger = logging.getLogger("raytrain_het")


class Session:
    """One worker's part in one run.

    Args:
        config: the run's settings.
        slot: world rank.
        num_slots: world size.
        locate: where the hub is; asked again whenever the connection is lost.
        storage: where checkpoints go.
        device: this worker's device.
        node_ip: address at which peers reach this worker.
    """

    def __init__(
        self,
        *,
        config: HetConfig,
        slot: int,
        num_slots: int,
        locate: Callable[[], dict[str, Any]],
        storage: files.Storage,
        device: torch.device,
        node_ip: str,
    ) -> None:
        self.config, self.slot, self.num_slots = config, slot, num_slots
        self._codecs = [codec_of(word) for word in config.possible_codecs]
        """All workers': what others send is decoded here."""
        self.storage, self.device, self.node_ip = storage, device, node_ip
        self._locate, self._token_value, self._run_id = locate, "", ""
        self.extras = Extras()
        """What checkpoints hold besides: add to it before ``loader.epochs()``."""
        self.replica = Replica()
        self.gradients: Gradients | None = None
        self.plan: DataPlan | None = None
        self.engine: Engine | None = None
        self.agent: MemberAgent | None = None
        self.reporter: Reporter | None = None
        self.listeners: list[Callable[[StepRecord], None]] = []
        self._communicator: Communicator | None = None
        self._server: StateServer | None = None
        self._inner_step: Callable[[], Any] | None = None
        self._data_fingerprint = ""
        self.collate_fn: Callable[[list[Any]], Any] | None = None
        """The training loader's."""
        self._speed: KnownSpeed | None = None
        self._micro_batch_size = config.micro_batch_size
        self.stats: Stats | None = None
        self._epoch = 0
        self._evaluations = Evaluations()
        self._leaving = False
        self._num_epochs: int | None = None
        self._clipping = Clipping(**config.clip) if config.clip else None
        self._warnings: list[str] = []
        self._handing_on: HandingOn | None = None
        self.loss_check = LossCheck("mean", weighed=False)
        self.updating = False
        """Whether the prepared optimizer's own step is under way, which may take those of others that it wraps."""
        self._check: ReplicaCheck | None = None
        self._warned_of_sums = False
        self._guards: list[Any] = []
        self._watched_steps: Any = None

    # ---------------------------------------------------------------- preparing

    def set_model(self, model: nn.Module) -> None:
        """Keep the model, put its hooks on."""
        if self.replica.model is not None:
            raise refuse("second model")
        self._guards = [p.register_post_accumulate_grad_hook(_refuse_backward) for _, p in trained(model)]
        self.replica.model = model

    def set_optimizer(self, optimizer: torch.optim.Optimizer, inner_step: Callable[[], Any]) -> None:
        """Keep the optimizer and its own ``step``."""
        if self.replica.optimizer is not None:
            raise refuse("second optimizer")
        self._check_parameters(optimizer)
        self._warn(warnings_of_optimizer, optimizer)
        self.replica.optimizer, self._inner_step = optimizer, inner_step

    def set_data(self, plan: DataPlan, micro_batch_size: int | None, fingerprint: str = "") -> None:
        """Keep the data plan."""
        if self.plan is not None:
            raise refuse("second loader")
        self.plan, self._data_fingerprint = plan, fingerprint
        self._micro_batch_size = micro_batch_size or self._micro_batch_size

    def register_state(self, name: str, obj: Any) -> None:
        """See :func:`raytrain_het.register_state`."""
        if self.engine is not None and self.replica.registered.get(name) is not obj:
            raise LoopOrderError(
                f"register_state({name!r}, ...) was called after loader.epochs(): the state that this worker began "
                "from has been taken over already, without it. Call it before loader.epochs()."
            )
        self.replica.register(name, obj)

    def begin(self, num_epochs: int) -> Engine:
        """Join the run: called by ``loader.epochs`` when everything has been prepared."""
        model, optimizer, plan = self._all_prepared()
        self._check_parameters(optimizer)
        self._check_scheduler()
        self.replica.check_storable()
        self._make_gradients(model, optimizer)
        self._warn(warnings_of_epochs, num_epochs)
        for codec in self._codecs:
            codec.prepare()
        agent = self.agent = self._make_agent(model, plan)
        self.engine = self._make_engine(model, optimizer, plan, num_epochs)
        self._watched_steps = register_optimizer_step_pre_hook(self._check_optimizer)
        assert self._communicator is not None and self._server is not None
        device = str(self.device)
        self.stats = Stats(agent, self.engine, self._communicator, plan, device=device, node_ip=self.node_ip)
        self.reporter = Reporter(agent, self._server, self.storage, self._token)
        self.engine.on_commit.append(self._committed)
        self.engine.on_confirm.append(self.reporter.send_up_to)
        agent.on_reconnect.append(self._tell_a_new_hub)
        agent.doing.otherwise, agent.told = self.engine.doing, self.reporter.told
        self._num_epochs = num_epochs
        agent.join()
        self.engine.start()
        record = agent.record
        assert record is not None
        self.reporter.begins(record.life, self.engine.cursor.step + (not record.reset))
        if self.slot == 0:  # One of all who say the same; a worker's log is read by few.
            for text in self._warnings:
                agent.tell(Event(event={"kind": "warning", "text": text}))
        return self.engine

    def _all_prepared(self) -> tuple[nn.Module, torch.optim.Optimizer, DataPlan]:
        """
        Raises:
            LoopOrderError: something is not prepared yet, or the run was joined before.
        """
        if self.engine is not None:
            raise LoopOrderError("loader.epochs() was called twice: one loop over epochs per run.")
        model, optimizer = self.replica.model, self.replica.optimizer
        for what, there in (("prepare_model", model), ("prepare_optimizer", optimizer)):
            if there is None:
                raise LoopOrderError(f"loader.epochs() was called before {what}(): prepare model and optimizer first.")
        assert model is not None and self.plan is not None and optimizer is not None
        return model, optimizer, self.plan

    def _make_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for guard in self._guards:
            guard.remove()
        apart = any(codec.spares_small for codec in self._codecs)
        self.gradients = Gradients(
            model,
            int(self.config.bucket_mib * 2**20),
            small_apart=apart,
            zeroed=[p for group in optimizer.param_groups for p in group["params"]],
        )
        if apart:
            self._warn(warnings_of_model, self.gradients.layout)

    def _make_agent(self, model: nn.Module, plan: DataPlan) -> MemberAgent:
        """Who this worker is, and what is known of its speed, for the hub."""
        assert self.gradients is not None
        self._server = StateServer(self.node_ip, self._token)
        member = Member(
            uid=f"{self.slot}-{secrets.token_hex(4)}",
            slot=self.slot,
            host=self.node_ip,
            state_port=self._server.port,
            device=str(self.device),
            kind=kind_of_machine(self.device),
        )
        fingerprint = "/".join(map(str, (self.gradients.layout.fingerprint, *self._data().values())))
        agent = MemberAgent(member, self._ask_hub, fingerprint=fingerprint)
        if self.config.follows_speeds:
            self._speed = KnownSpeed(self.device, step_key(model, plan.dataset_size, self._micro_batch_size))
            codecs = self._codecs_told() if self.config.compression_error is not None else None
            agent.known = self._speed.told(plan.full_batch, codecs)
        return agent

    def _make_engine(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: DataPlan, num_epochs: int
    ) -> Engine:
        gradients, agent = self.gradients, self._agent()
        assert gradients is not None
        communicator = self._communicator = Communicator(
            agent,
            gradients.layout,
            advance=lambda cursor: advance(plan, cursor),
            resync_bytes=self.replica.parameter_bytes(),
            hang_limit_s=self.config.hang_limit_s,
            resync_due=functools.partial(resync_due, self.config.replica_check_steps),
        )
        assert self._server is not None
        self._handing_on = HandingOn(agent, self._server, self._token, communicator.codec_states)
        everything = self.config.check == "every_step"
        self._check = ReplicaCheck(self.replica, every=self.config.replica_check_steps, everything=everything)
        randomness = Randomness(self.slot, self.config.seed)
        self.extras.add("random", Extra(save=randomness.state, load=randomness.load, own=True))
        decay = self.config.decay
        rates = Rates(decay, plan, num_epochs) if decay is not None else None
        self.loss_check.warn = self._tell
        return Engine(
            agent=agent,
            communicator=communicator,
            replica=self.replica,
            gradients=gradients,
            plan=plan,
            config=self.config,
            healing=self._make_healing(plan, gradients, communicator, randomness, scheduled=rates is not None),
            micro_batch_size=self._micro_batch_size,
            memory=MemoryLimit.of(self.device),
            structure=Structure(model, optimizer),
            randomness=randomness,
            loss=self.loss_check,
            check=self._check,
            rates=rates,
            rehearsal=Rehearsal(model, self.config, self.loss_check) if everything else None,
        )

    def _make_healing(
        self,
        plan: DataPlan,
        gradients: Gradients,
        communicator: Communicator,
        randomness: Randomness,
        *,
        scheduled: bool,
    ) -> Healing:
        assert self._server is not None and self._inner_step is not None
        resuming = Resuming(
            self.storage,
            self.slot,
            self.num_slots,
            plan,
            self._parameters(),
            self._data(),
            self.replica,
            communicator.codec_states,
            self.extras,
            scheduled=scheduled,
            tell=self._tell,
        )
        return Healing(
            agent=self._agent(),
            communicator=communicator,
            replica=self.replica,
            gradients=gradients,
            server=self._server,
            token=self._token,
            update=self._inner_step,
            randomness=randomness,
            load_checkpoint=resuming.load,
        )

    def _tell(self, text: str, *, all_say_it: bool = True) -> None:
        """One of all who say the same; a worker's own log is read by few."""
        logger.warning(text)
        if self.slot == 0 or not all_say_it:
            self._agent().tell(Event(event={"kind": "warning", "text": text}))

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        if self.replica.model is not None and (outside := parameters_outside(self.replica.model, optimizer)):
            more = f", and {len(outside) - 1} more" if len(outside) > 1 else ""
            raise refuse("parameters outside", outside[0] + more)

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called before each step of any optimizer in this process."""
        engine, model = self.engine, self.replica.model
        if engine is None or model is None or optimizer is self.replica.optimizer or self.updating:
            return
        ours = {id(p) for p in model.parameters()}
        trains_ours = any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        if trains_ours or engine.in_body:
            raise refuse("other optimizer", f"a {type(optimizer).__name__}")

    def _warn(self, warnings: Callable[[Any, tuple[str, ...], Any], list[str]], of: Any) -> None:
        for text in warnings(self.config.compression, self.config.possible_codecs, of):
            logger.warning(text)
            self._warnings.append(text)

    def _check_scheduler(self) -> None:
        optimizer = self.replica.optimizer
        schedulers = [
            o for o in self.replica.registered.values() if isinstance(o, torch.optim.lr_scheduler.LRScheduler)
        ]
        if hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched") and not schedulers:
            raise LoopOrderError(
                "a learning-rate scheduler is attached to the optimizer but not registered, so it would count a step "
                "that is done again twice: call raytrain_het.register_state('scheduler', scheduler) before "
                "loader.epochs()."
            )
        if schedulers and self.config.schedule is not None:
            raise LoopOrderError(
                f"the run has schedule={self.config.schedule!r}, and a {type(schedulers[0]).__name__} is registered "
                "too: both would set the learning rate. Use one of them."
            )

    # ---------------------------------------------------------------- while it runs

    def _committed(self, opened: Opened, sums: Sums) -> None:
        if self.reporter is not None:
            self.reporter.went_on(opened.record.life, opened.job.step)
        if self.listeners:
            digest = functools.partial(self.replica.digest, optimizer=True)
            note = StepRecord.of(opened, sums, self._plan(), self._agent().uid, digest)
            for listener in self.listeners:
                listener(note)
        if self.stats is not None:
            self.stats.committed(opened.started)

    def _tell_a_new_hub(self) -> None:
        assert self.reporter is not None
        self.reporter.resend()
        self.send_stats()
        if self._leaving:
            self._agent().tell(Leave())

    def send_stats(self) -> None:
        """See :class:`raytrain_het.worker.stats.Stats`."""
        if self.stats is not None:
            self.stats.send()

    def report(self, metrics: dict[str, Any], *, reduce: dict[str, str] | None = None, checkpoint: bool = True) -> None:
        """See :func:`raytrain_het.report`."""
        engine, reporter, communicator = self.engine, self.reporter, self._communicator
        if engine is None or reporter is None or communicator is None:
            raise LoopOrderError("report() was called before loader.epochs(): there is no step to report on yet.")
        reduce = check_reduce(reduce)
        plain = check_metrics(metrics, reduce)
        engine.agent.check()
        cursor, record = engine.cursor, engine.agent.record
        assert record is not None and self.gradients is not None
        points.reach("report", cursor.step)
        # Not those that healed at the very end of an epoch: they begin with the next one, and do not come here.
        healed = [m.uid for m in record.members if m.uid not in (*record.unhealed, *record.fresh)]
        holds = checkpoint and engine.agent.uid in healed[:2]
        told, key = reporter.told(), reporter.next_key(cursor.step, engine.open_body)
        if reporter.has(key):
            return
        assert self.stats is not None
        self._warn_of_sums(reduce, engine.counters)
        since_last = self.stats.since_report()
        buffers, audit = engine.buffers_when_opened(), None
        if checkpoint and self._check is not None and self.config.replica_check_steps:
            light = self.replica.light()
            light["buffers"] |= buffers
            position = {"the position in the data": str(list(cursor.to_dict().values()))}
            audit = ReplicaAudit(**self._check.whole_audit(light, position))
        message = ReportPart(
            key=key,
            at=call_site().where,
            told=told,
            step=cursor.step,
            epoch=self._epoch,
            metrics=plain,
            reduce=reduce,
            samples=since_last["samples"],
            since_last=since_last,
            lr=self.replica.learning_rate(),
            checkpoint=checkpoint,
            holds_snapshot=holds,
            audit=audit,
        )
        states = communicator.codec_states
        own = {
            "codec": states.by_parameter() if checkpoint else {},
            "weight_per_sample": states.weight_per_sample,
            "extras": self.extras.save_own() if checkpoint else {},
        }
        snapshot = self._snapshot(buffers) if holds else None
        reporter.add(Report(key, cursor.step, message, self._about(cursor, record, key), snapshot, record), own)
        self.send_stats()

    def _about(self, cursor: Cursor, record: Record, key: str) -> dict[str, Any]:
        """What a checkpoint is of."""
        assert self.gradients is not None
        return {
            "cursor": cursor.to_dict(),
            "step": cursor.step,
            "generation": record.number,
            "table": record.table,
            "world_size": self.num_slots,
            "fingerprint": self.gradients.layout.fingerprint,
            "parameters": self._parameters(),
            "data": self._data(),
            "extras": sorted(self.extras.known),
            "run": Identity(id=self._run_id, life=record.life, key=key).to_json(),
        }

    def _snapshot(self, buffers: dict[str, torch.Tensor]) -> dict[str, Any]:
        """All that is common to workers, with buffers as they were when the step was opened."""
        snapshot = {**self.replica.snapshot(), "extras": self.extras.save()}
        for part in (snapshot["model"], snapshot["buffers"]):
            part.update({name: b.to("cpu", copy=True) for name, b in buffers.items() if name in part})
        return snapshot

    def _warn_of_sums(self, reduce: dict[str, str], counters: Counters) -> None:
        sums = [name for name, how in reduce.items() if how == "sum"]
        times = counters.uncounted
        if sums and times and not self._warned_of_sums:
            self._warned_of_sums = True
            self._tell(
                f"report(reduce={{{sums[0]!r}: 'sum'}}): of the times that the loop's body has run on worker "
                f"{self.slot}, {times} were on samples that do not count (a share of 0, or a step that was done "
                "again). A sum that the body adds up holds them too; for an exact one write "
                "raytrain_het.evaluate(fn, dataset).",
                all_say_it=False,
            )

    def await_reports(self) -> None:
        """Return when every report made so far is registered, with its checkpoint."""
        if self.reporter is not None:
            self.reporter.wait()

    def evaluate(self, num_chunks: int, run_chunk: Callable[[int], dict[str, float]], name: str) -> dict[str, float]:
        """Sums over all chunks, computed by whoever is free; the same on every worker that asks for them there."""
        if self.engine is None:
            raise LoopOrderError("evaluate() was called before loader.epochs(): join the run first.")
        body = self.engine.open_body
        under = "" if body is None else str(body.job.generation)
        return self._evaluations.sums(self._agent(), self.engine.cursor.step, name, num_chunks, run_chunk, under)

    def leave(self) -> None:
        """Leave the run in good order after the step under way: the others go on without this worker."""
        self._leaving = True
        self._agent().tell(Leave())

    def clip_gradients(self, scale: float) -> None:
        """Before an update, of this run or one that is replayed. Gradients are ``scale`` times what they are."""
        if self._clipping is None:
            return
        optimizer = self.replica.optimizer
        assert optimizer is not None and self.engine is not None
        trained_here = [p for group in optimizer.param_groups for p in group["params"]]
        self.engine.counters.clipped += self._clipping.clip(trained_here, scale)

    def let_go(self) -> None:
        """The others go on without this worker: what it has left to give goes to one of them."""
        if self._leaving and self._handing_on is not None and not self._handing_on.hand_on():
            logger.warning(
                "worker %d leaves, and what its codec has left out of its gradients is lost: nobody stands where it "
                "does, or nobody came for it.",
                self.slot,
            )

    def num_participants(self) -> int:
        """Members that take part in the steps now."""
        record = self.agent.record if self.agent else None
        return len(record.members) - len(record.unhealed) if record else self.num_slots

    def _codecs_told(self) -> Codecs:
        """What codecs cost here, and how much there is to encode: for who chooses one."""
        assert self.gradients is not None
        codecs = ((word, codec_of(word)) for word in self.config.possible_codecs)
        layout = self.gradients.layout
        costs = codec_costs(codecs, cores=cpu_limit().cores, shapes=layout.compressed_shapes)
        return Codecs(
            costs={word: list(astuple(cost)) for word, cost in costs.items()},
            num_elements=layout.num_compressed,
            byte_cpu_s=byte_cpu_s(cores=cpu_limit().cores),
        )

    # ---------------------------------------------------------------- the end

    def finish(self) -> None:
        """The training function has returned: nothing of this worker's may be lost when its process goes.

        Raises:
            LoopOrderError: it has not trained with the others at all.
        """
        engine, agent, reporter = self.engine, self.agent, self.reporter
        if engine is None or agent is None or reporter is None:
            raise refuse("own loop", f"worker {self.slot} returned without {self._never_called()}")
        if engine.opened is None and engine.cursor.step == 0 and not self._evaluations.any:
            raise refuse("own loop", f"worker {self.slot} returned in epoch 0 without a turn of `for batch in loader`")
        if self._speed is not None:
            self._speed.keep(engine.timings)
        engine.abandon()
        engine._wait_for_confirmation()
        reporter.flush()
        self.send_stats()
        complete = self._num_epochs is not None and engine.cursor.epoch >= self._num_epochs

        def say() -> None:
            cursor = agent.cursor
            confirmed = engine.confirmed >= cursor.step
            agent.tell(Finish(cursor=cursor, confirmed=confirmed, told=reporter.told(complete=complete)))

        agent.on_reconnect.append(say)
        say()
        step = agent.cursor.step
        with agent.doing.call("returned", f"returned after step {step}"), contextlib.suppress(RunOver):
            agent.wait_for_peers(lambda: agent.finished)

    def _never_called(self) -> str:
        """What the training function has left out, in the order in which it is called."""
        there = (
            ("prepare_model()", self.replica.model),
            ("prepare_optimizer()", self.replica.optimizer),
            ("prepare_data_loader()", self.plan),
        )
        missing = [name for name, value in there if value is None]
        return " and ".join([*missing, "a turn of `for epoch in loader.epochs(n)`"])

    def raised(self, error: BaseException) -> None:
        """Tell the hub before unwinding: no generation follows, nobody waits for this worker."""
        if self.agent is not None and self.agent.gone is None:
            self.agent.tell(Raised(error=traceback_of(error), last=text_of(error).splitlines()[0][:500]))

    def close(self) -> None:
        """Let go of threads and sockets, and take everything off torch that was put there."""
        if self.engine is not None:
            self.engine.body_over()
        for guard in self._guards:
            guard.remove()
        if self._watched_steps is not None:
            self._watched_steps.remove()
        if self.gradients is not None:
            self.gradients.close()
        if self._communicator is not None:
            self._communicator.close()
        if self._server is not None:
            self._server.close()
        if self.agent is not None:
            self.agent.close()

    # ---------------------------------------------------------------- inside

    def _ask_hub(self) -> dict[str, Any]:
        where = self._locate()
        self._token_value, self._run_id = where["token"], where.get("run", "")
        return where

    def _token(self) -> str:
        return self._token_value

    def _plan(self) -> DataPlan:
        assert self.plan is not None
        return self.plan

    def _agent(self) -> MemberAgent:
        if self.agent is None:
            raise LoopOrderError("this worker has not joined the run yet: call loader.epochs() first.")
        return self.agent

    def _parameters(self) -> dict[str, list[int]]:
        assert self.replica.model is not None
        return {name: list(p.shape) for name, p in self.replica.model.named_parameters()}

    def _data(self) -> dict[str, Any]:
        """What all workers must agree on about the data, and what a checkpoint's cursor belongs to."""
        return {**dataclasses.asdict(self._plan()), "dataset_fingerprint": self._data_fingerprint}


def _refuse_backward(_: torch.Tensor) -> None:
    raise LoopOrderError(
        "backward() was called outside of a step, before loader.epochs(): take a batch from the prepared loader first "
        "(for x, y in loader: ...), one backward() and one optimizer.step() for each."
    )


_current: Session | None = None
_lock = threading.Lock()


def current() -> Session:
    """The session of this worker.

    Raises:
        LoopOrderError: called outside of a training function.
    """
    if _current is None:
        raise LoopOrderError(
            "this works only inside a training function that HetTrainer(train_fn, ...).fit() runs on its workers."
        )
    return _current


def run_worker(train_fn: Callable[[], Any], **kwargs: Any) -> Any:
    """Run a training function in a session of its own, to its orderly end.

    Args:
        train_fn: the user's function, its config already bound.
        kwargs: those of :class:`Session`.

    Returns:
        What the function returned; None if this worker was let go before its end.

    Raises:
        Exception: what the function raised; the other workers know of it by then.
    """
    global _current
    session = Session(**kwargs)
    with _lock:
        _current = session
    try:
        with stock.refused(session.num_slots):
            result = _run_to_its_end(train_fn)
        session.finish()
        return result
    except RunOver:
        session.let_go()
        return None
    except EvictedError:
        raise
    except RunFailedError as error:
        raise _with_samples(session, error) from None
    except BaseException as error:
        session.raised(error)
        raise
    finally:
        session.close()
        with _lock:
            _current = None


def _run_to_its_end(train_fn: Callable[[], Any]) -> Any:
    """``sys.exit(0)`` ends a script in good order, and so a function."""
    try:
        return train_fn()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
        return None


def _with_samples(session: Session, error: RunFailedError) -> HetError:
    """Name the samples that the dead workers had, if this worker stands before their step."""
    poison, engine, plan = error.poison, session.engine, session.plan
    if not poison or engine is None or plan is None or engine.cursor.step + 1 != poison["step"]:
        return error
    cursor = engine.cursor
    order, batch = plan.permutation(cursor.epoch), plan.batch_at(cursor)
    slices = [slice_of(batch, poison["shares"], rank) for rank in poison["ranks"]]
    samples = [int(order[k]) for positions in slices for k in positions]
    return RunFailedError(f"{error} Samples of the last dead workers: {samples[:64]}", poison)
