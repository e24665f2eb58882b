"""From what was prepared to a worker that can join its run: its parts, in the order in which they need each other."""

from __future__ import annotations

import contextlib
import functools
import secrets
from dataclasses import astuple

from raytrain_het.allreduce.codecs import byte_cpu_s, codec_costs, codec_of
from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.layout import Layout
from raytrain_het.config import HetConfig
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.message_parts import Codecs
from raytrain_het.membership.record import Member
from raytrain_het.membership.watchman import Watchman
from raytrain_het.probing.cores import cpu_limit
from raytrain_het.worker.checks.codec_warnings import warnings_of_epochs, warnings_of_model
from raytrain_het.worker.checks.rehearsal import Rehearsal
from raytrain_het.worker.checks.step_checks import StepChecks
from raytrain_het.worker.connections import Connections
from raytrain_het.worker.context import HubAddress, WorkerContext
from raytrain_het.worker.draft import Draft, Prepared
from raytrain_het.worker.reports import Reports
from raytrain_het.worker.state.contents import Contents, identity_of_data
from raytrain_het.worker.state.extras import Extra
from raytrain_het.worker.state.healing import Healing
from raytrain_het.worker.state.healing_source import HealingSource
from raytrain_het.worker.state.randomness import Randomness
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.state.replica_check import ReplicaCheck, kind_of_machine
from raytrain_het.worker.state.reporter import Reporter
from raytrain_het.worker.state.resuming import Resuming
from raytrain_het.worker.state.state_server import StateServer
from raytrain_het.worker.state.structure import Structure
from raytrain_het.worker.state.writing import Writer
from raytrain_het.worker.stats import StatsReporter
from raytrain_het.worker.step.committing import Committing, advance, resync_due
from raytrain_het.worker.step.engine import Engine
from raytrain_het.worker.step.generations import Generations
from raytrain_het.worker.step.gradients import Gradients
from raytrain_het.worker.step.memory import MemoryLimit
from raytrain_het.worker.step.open_step import Counters
from raytrain_het.worker.step.passes import Passes
from raytrain_het.worker.step.rates import Rates
from raytrain_het.worker.step.reducing import Reducing
from raytrain_het.worker.step.restore_point import RestorePoint
from raytrain_het.worker.step.skips import Skips
from raytrain_het.worker.step.step_key import step_key
from raytrain_het.worker.step.timings import KnownSpeed, Timings
from raytrain_het.worker.worker import Tellers, Worker


def make_worker(context: WorkerContext, draft: Draft, num_epochs: int) -> Worker:
    """Make a worker of what was prepared. It says hello to the hub in :meth:`Worker.join`.

    Args:
        context: where it runs.
        draft: what its training function has prepared.
        num_epochs: that its loop goes over.

    Raises:
        LoopOrderError: something is not prepared.
        ConfigError: the model has no parameter that is trained, or one of a kind that cannot travel.
        CheckpointError: the optimizer or a registered object cannot be stored.
    """
    prepared = draft.complete()
    replica = Replica(prepared.model, prepared.optimizer, prepared.registered, prepared.update)
    replica.check_storable()
    with contextlib.ExitStack() as undo:
        gradients = _make_gradients(context.config, draft, prepared)
        undo.callback(gradients.close)
        draft.warn(warnings_of_epochs, num_epochs)
        for word in context.config.possible_codecs:  # All workers': what others send is decoded here.
            codec_of(word).prepare()
        speed = _known_speed(context, prepared)
        connections = _connect(context, prepared, gradients.layout, replica, speed)
        undo.callback(connections.close)
        worker = _put_together(context, prepared, connections, gradients, replica, num_epochs, speed)
        undo.pop_all()
    return worker


def _make_gradients(config: HetConfig, draft: Draft, prepared: Prepared) -> Gradients:
    apart = any(codec_of(word).spares_small for word in config.possible_codecs)
    gradients = Gradients(
        prepared.model,
        int(config.bucket_mib * 2**20),
        small_apart=apart,
        zeroed=[p for group in prepared.optimizer.param_groups for p in group["params"]],
    )
    if apart:
        draft.warn(warnings_of_model, gradients.layout)
    return gradients


def _known_speed(context: WorkerContext, prepared: Prepared) -> KnownSpeed | None:
    if not context.config.follows_speeds:
        return None
    data = prepared.data
    return KnownSpeed(context.device, step_key(prepared.model, data.plan.dataset_size, data.micro_batch_size))


def _connect(
    context: WorkerContext, prepared: Prepared, layout: Layout, replica: Replica, speed: KnownSpeed | None
) -> Connections:
    """The threads and sockets: nothing is sent yet."""
    config, plan, hub = context.config, prepared.data.plan, HubAddress(context.locate)
    server, watchman = StateServer(context.node_ip, hub.token), Watchman(context.node_ip)
    member = Member(
        uid=f"{context.slot}-{secrets.token_hex(4)}",
        slot=context.slot,
        host=context.node_ip,
        state_port=server.port,
        watch_port=watchman.port,
        device=str(context.device),
        kind=kind_of_machine(context.device),
    )
    identity = identity_of_data(plan, prepared.data.fingerprint).values()
    fingerprint = "/".join(map(str, (layout.fingerprint, *identity)))
    agent = MemberAgent(
        member, hub.find, fingerprint=fingerprint, hang_limit_s=config.hang_limit_s, points=context.points
    )
    if speed is not None:
        codecs = _codecs_told(config, layout) if config.compression_error is not None else None
        agent.known = speed.told(plan.full_batch, codecs)
    communicator = Communicator(
        agent,
        layout,
        advance=lambda cursor: advance(plan, cursor),
        hang_limit_s=config.hang_limit_s,
        resync_due=functools.partial(resync_due, config.replica_check_steps),
    )
    agent.on_token = watchman.learn
    return Connections(hub, agent, server, communicator, watchman)


def _put_together(
    context: WorkerContext,
    prepared: Prepared,
    connections: Connections,
    gradients: Gradients,
    replica: Replica,
    num_epochs: int,
    speed: KnownSpeed | None,
) -> Worker:
    contents = Contents(
        replica=replica,
        states=connections.communicator.codec_states,
        extras=prepared.extras,
        plan=prepared.data.plan,
        data_fingerprint=prepared.data.fingerprint,
        layout_fingerprint=gradients.layout.fingerprint,
        num_slots=context.num_slots,
    )
    prepared.data.loss.warn = connections.warn
    decay, plan = context.config.decay, prepared.data.plan
    rates = Rates(decay, plan, num_epochs) if decay is not None else None
    resuming = Resuming(context, contents, scheduled=rates is not None, tell=connections.warn)
    engine = _make_engine(context, prepared, connections, gradients, replica, rates, resuming)
    stats = StatsReporter(context, prepared, connections, engine)
    writer = Writer(connections.agent, connections.server, context.storage)
    reporter = Reporter(connections.agent, writer, storage_limit_s=context.config.storage_limit_s)
    reports = Reports(connections, engine, contents, reporter, stats)
    return Worker(prepared, connections, engine, Tellers(stats, reports, speed), num_epochs)


def _codecs_told(config: HetConfig, layout: Layout) -> Codecs:
    """What codecs cost here, and how much there is to encode: for who chooses one."""
    codecs = ((word, codec_of(word)) for word in config.possible_codecs)
    costs = codec_costs(codecs, cores=cpu_limit().cores, shapes=layout.compressed_shapes)
    return Codecs(
        costs={word: list(astuple(cost)) for word, cost in costs.items()},
        num_elements=layout.num_compressed,
        byte_cpu_s=byte_cpu_s(cores=cpu_limit().cores),
    )


def _make_engine(
    context: WorkerContext,
    prepared: Prepared,
    connections: Connections,
    gradients: Gradients,
    replica: Replica,
    rates: Rates | None,
    resuming: Resuming,
) -> Engine:
    config, data = context.config, prepared.data
    agent, communicator, plan = connections.agent, connections.communicator, data.plan
    randomness = Randomness(context.slot, config.seed)
    prepared.extras.add("random", Extra(save=randomness.state, load=randomness.load, own=True))
    source = HealingSource(agent, replica, connections.server)
    healing = Healing(agent, communicator, replica, gradients, source, randomness, resuming.load)
    generations = Generations(agent, communicator, healing)
    everything = config.check == "every_step"
    check = ReplicaCheck(replica, every=config.replica_check_steps, everything=everything)
    rehearsal = Rehearsal(prepared.model, config, data.loss)
    structure = Structure(prepared.model, prepared.optimizer)
    checks = StepChecks(agent, plan, structure, data.loss, check, rehearsal)
    timings, counters = Timings(agent, plan.full_batch), Counters()
    skips = Skips(agent, gradients, plan, config.max_skipped_steps)
    return Engine(
        generations,
        RestorePoint(replica, randomness, rates),
        Passes(plan, data.micro_batch_size, MemoryLimit.of(context.device), data.loss),
        gradients,
        checks,
        Reducing(communicator, generations, gradients, checks, timings, counters),
        Committing(communicator, generations, replica, plan, checks, skips, config),
    )
