"""What `raytrain-het probe` prints: tables, or one JSON object."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.balance.scores import scores
from raytrain_het.jobs import lines
from raytrain_het.jobs.probe import BATCH_BOUND, ModelResult, ProbeResult
from raytrain_het.jobs.summary import jsonable
from raytrain_het.probing.codec_advice import CodecAdvice
from raytrain_het.probing.links import Link
from raytrain_het.score_policies import SCORE_POLICIES

HARDWARE_POLICIES = [name for name, policy in SCORE_POLICIES.items() if policy.from_hardware]


def print_probe(result: ProbeResult, *, as_json: bool) -> None:
    """Print it on stdout."""
    if as_json:
        print(to_json(result))
    else:
        lines.print_tables(tables(result, lines.columns(sys.stdout)), sys.stdout)


def to_json(result: ProbeResult) -> str:
    """One line of JSON: ``devices``, ``links``, and ``model`` or null. Infinity becomes null."""
    by_policy = _scores(result)
    found: dict[str, Any] = {
        "devices": [
            {"node": device.node, **_without_step(device.profile)}
            | {"scores": {policy: by_policy[policy][i] for policy in HARDWARE_POLICIES}}
            for i, device in enumerate(result.devices)
        ],
        "links": [
            {"from": a, "to": b} | (dataclasses.asdict(link) if link is not None else {"latency_s": None})
            for (a, b), link in result.links.items()
        ],
        "model": _model_json(result.model) if result.model is not None else None,
    }
    return json.dumps(jsonable(found), allow_nan=False)


def _without_step(profile: Profile) -> dict[str, Any]:
    return {name: value for name, value in profile.to_json().items() if name != "step"}


def _model_json(model: ModelResult) -> dict[str, Any]:
    given, prediction = model.advice, model.advice.prediction
    by_worker = _step_scores(model)
    return {
        "kind": model.job.kind,
        "global_batch_size": model.global_batch_size,
        "gradient_bytes": model.gradient_bytes,
        "workers": [
            {
                "node": worker.node,
                "device": worker.profile.device,
                "num_threads": worker.profile.num_threads,
                **dataclasses.asdict(worker.profile.step),
                "score": by_worker[i],
                "share": prediction.shares[i],
                "solo_samples_per_s": given.solo_samples_per_s[i],
                "gain": given.gains[i],
                "costs_more_than_it_gives": i in given.costs_more,
            }
            for i, worker in enumerate(model.workers)
            if worker.profile.step is not None
        ],
        "step_s": prediction.step_s,
        "communication_s": prediction.communication_s,
        "chance_s": prediction.chance_s,
        "samples_per_s": prediction.samples_per_s,
        "fraction_of_aggregate": given.fraction_of_aggregate,
        "without_costly_samples_per_s": given.without_them.samples_per_s,
        "best_global_batch_size": given.best_batch_size,
        "best_samples_per_s": given.best_samples_per_s,
        "enough_global_batch_size": given.enough_batch_size,
        "max_global_batch_size": BATCH_BOUND * model.global_batch_size,
        "compression": _codecs_json(model.codecs) if model.codecs is not None else None,
    }


def _codecs_json(advice: CodecAdvice) -> dict[str, Any]:
    return {
        "codecs": [
            {
                "codec": word,
                "bytes": max(prediction.num_bytes),
                "step_s": prediction.step_s,
                "messages_s": prediction.exchange_s,
                "break_even_bytes_per_s": advice.break_even.get(word),
                "error": max(costs[word].error for costs in advice.fleet.costs),
            }
            for word, prediction in advice.by_codec.items()
        ],
        "chosen": list(advice.chosen),
        "step_s": advice.step_s,
        "why": advice.why,
    }


def tables(result: ProbeResult, width: int) -> RenderableType:
    """For reading.

    Args:
        width: in columns of text. In few, spreads of the devices' figures are left out.
    """
    devices = _device_table(result)
    parts: list[RenderableType] = [devices if lines.fits(devices, width) else _device_table(result, spreads=False)]
    if len(result.devices) > 1:
        parts.append(_score_table(result))
    if result.links:
        parts.append(_link_table(result.links))
    if result.model is not None:
        parts += [_worker_table(result.model), *map(lines.Sentence, _sentences(result.model))]
        if result.model.codecs is not None:
            parts += [_codec_table(result.model.codecs), *map(lines.Sentence, _codec_sentences(result.model.codecs))]
    return Group(*parts)


def _device_table(result: ProbeResult, *, spreads: bool = True) -> Table:
    def said(measurement: Measurement | None) -> str:
        return _measured(measurement) if spreads or measurement is None else _si(measurement.median)

    table = _table("Devices")
    dtypes = [t for t in ("fp32", "bf16", "fp16") if any(t in d.profile.flops for d in result.devices)]
    has_host = any(d.profile.host_to_device is not None for d in result.devices)
    table.add_column("node", overflow="fold")
    table.add_column("device", overflow="fold")
    rates = [*(f"{t}\nFLOP/s" for t in dtypes), "memory\nB/s", *(["from host\nB/s"] if has_host else [])]
    for name in ("cores", *rates):
        table.add_column(name, justify="right", no_wrap=True)
    for device in result.devices:
        profile = device.profile
        table.add_row(
            device.node,
            _name(profile),
            f"{profile.cores:.3g}",
            *(said(profile.flops.get(dtype)) for dtype in dtypes),
            said(profile.memory_bandwidth),
            *([said(profile.host_to_device)] if has_host else []),
        )
    return table


def _score_table(result: ProbeResult) -> Table:
    table = _table("Scores (mean 1)")
    table.add_column("node", overflow="fold")
    table.add_column("device", overflow="fold")
    for policy in HARDWARE_POLICIES:
        table.add_column(policy, justify="right")
    by_policy = _scores(result)
    for i, device in enumerate(result.devices):
        table.add_row(
            device.node, _name(device.profile), *(f"{by_policy[policy][i]:.2f}" for policy in HARDWARE_POLICIES)
        )
    return table


def _link_table(links: dict[tuple[str, str], Link | None]) -> Table:
    table = _table("Links")
    table.add_column("from", overflow="fold")
    table.add_column("to", overflow="fold")
    for name in ("round trip s", "there B/s", "back B/s"):
        table.add_column(name, justify="right")
    for ends, link in links.items():
        values = (link.latency_s, link.send, link.receive) if link is not None else ()
        table.add_row(*ends, *(map(_measured, values) if values else ["none: is a firewall between them?"]))
    return table


def _name(profile: Profile) -> str:
    return profile.hardware if profile.device == "cpu" else f"{profile.hardware} {profile.device}"


def _worker_table(model: ModelResult) -> Table:
    table = _table(f"Job {model.job.kind!r} at a global batch of {model.global_batch_size}, predicted")
    table.add_column("worker", justify="right")
    table.add_column("node", overflow="fold")
    for name in ("device,\nthreads", "step ms,\nb samples", "samples/s\nalone", "score", "share", "gain"):
        table.add_column(name, justify="left" if name.startswith("device") else "right", no_wrap=True, overflow="fold")
    by_worker, given = _step_scores(model), model.advice
    for i, worker in enumerate(model.workers):
        cost = worker.profile.step
        assert cost is not None
        table.add_row(
            str(i),
            worker.node,
            f"{worker.profile.device}, {worker.profile.num_threads}",
            f"{_rate(1000 * cost.fixed_s)} + {_rate(1000 * cost.per_sample_s)} b",
            _rate(given.solo_samples_per_s[i]),
            f"{by_worker[i]:.3g}",
            str(given.prediction.shares[i]),
            "-" if math.isinf(given.gains[i]) else f"{given.gains[i]:.3g}",
        )
    return table


def _codec_table(advice: CodecAdvice) -> Table:
    table = _table("Codecs, if all workers used one; bytes: what the busiest sends in a step")
    table.add_column("codec", overflow="fold")
    for name in ("bytes", "step\nms", "of it\nmessages", "loses of\na message", "shorter steps\nbelow B/s"):
        table.add_column(name, justify="right")
    for word, prediction in advice.by_codec.items():
        below = advice.break_even.get(word)
        error = max(costs[word].error for costs in advice.fleet.costs)
        table.add_row(
            word.replace("(", "\n("),
            _si(max(prediction.num_bytes)),
            f"{1000 * prediction.step_s:.4g}",
            f"{1000 * prediction.exchange_s:.3g}",
            f"{error:.2g}",
            "-" if below is None else _si(below),
        )
    return table


def _codec_sentences(advice: CodecAdvice) -> list[str]:
    words = list(dict.fromkeys(advice.chosen))
    chosen = words[0] if len(words) == 1 else ", ".join(f"{word} on worker {i}" for i, word in enumerate(advice.chosen))
    return [f"compression=auto would choose {chosen}: {advice.why}"]


def _sentences(model: ModelResult) -> list[str]:
    given, prediction = model.advice, model.advice.prediction
    found = [
        f"together {_rate(prediction.samples_per_s)} samples/s, {given.fraction_of_aggregate:.0%} of the sum of their "
        f"solo speeds: a step of {1000 * prediction.step_s:.4g} ms, of which communication "
        f"{1000 * prediction.communication_s:.3g} ms, and waiting for whoever happens to be slowest "
        f"{1000 * prediction.chance_s:.3g} ms",
    ]
    if len(model.workers) > 1:
        found.append("gain: throughput with the worker over throughput without it")
    for i in given.costs_more:
        worker = model.workers[i]
        found.append(f"worker {i} ({worker.profile.device} on {worker.node}) costs more than it gives: leave it out")
    if given.costs_more:
        found.append(f"without: {_rate(given.without_them.samples_per_s)} samples/s")
    edge = given.best_batch_size >= BATCH_BOUND * model.global_batch_size
    found.append(
        f"best global batch up to {BATCH_BOUND} times the job's: {given.best_batch_size}"
        f"{' or more' if edge else ''}, with "
        f"{_rate(given.best_samples_per_s)} samples/s; {given.enough_batch_size} gives 95 % of it or more"
    )
    if model.job.het.shares != "auto":
        found.append("predicted with shares that follow the speeds; this job's own stay: write --set het.shares=auto")
    return found


def _scores(result: ProbeResult) -> dict[str, dict[int, float]]:
    profiles = {i: device.profile for i, device in enumerate(result.devices)}
    return {policy: scores(profiles, policy) for policy in HARDWARE_POLICIES}


def _step_scores(model: ModelResult) -> dict[int, float]:
    profiles = {i: worker.profile for i, worker in enumerate(model.workers)}
    return scores(profiles, "train_step", global_batch_size=model.global_batch_size)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)


def _measured(measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"
    return f"{_si(measurement.median)} ±{100 * measurement.spread:.0f}%"


def _si(value: float) -> str:
    """Three digits and a prefix: ``48.2G``."""
    prefixes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3}
    prefix, unit = next(((name, unit) for name, unit in prefixes.items() if value >= 0.9995 * unit), ("µ", 1e-6))
    return f"{value / unit:.3g}{prefix}"


def _rate(value: float) -> str:
    """Four digits, without an exponent."""
    return f"{float(f'{value:.4g}'):.15g}"
