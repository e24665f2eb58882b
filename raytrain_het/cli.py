"""The command line: it reads arguments and calls the functions that do the work."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from raytrain_het.errors import ConfigError, ResourceError

_EXAMPLES = """examples:
  raytrain-het train
  raytrain-het train --set epochs=3 --set het.shares='[7, 1]'
  raytrain-het train experiments/jobs/digits.yaml --name mine --json
  raytrain-het train --simulate 1,0.5,0.25
  raytrain-het probe
  raytrain-het probe --model experiments/jobs/digits.yaml --address auto
  raytrain-het sweep experiments/sweeps/digits.yaml --set trials=4
  raytrain-het schedule '{cosine: {floor: 0.01}}' --out cosine.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is success, 1 a run that failed, 2 bad input (nothing was started), 130 Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="raytrain-het",
        description="Train one PyTorch model on machines of different speeds, through failures.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_train, _add_probe, _add_sweep, _add_schedule):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a job from a YAML file",
        description="Train a job. Without a file: handwritten digits, on two local one-CPU workers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("job", nargs="?", metavar="JOB.yaml", help="the job file (default: the digits job)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the job, such as het.compression=bf16 or workers.0.count=3; may be repeated; "
        "--keys lists them all",
    )
    train.add_argument("--name", help="the run's name; a name that was used before goes on from its last checkpoint")
    train.add_argument(
        "--storage", metavar="PATH", help="where the run's folder goes: a folder or a URI (default: runs)"
    )
    train.add_argument(
        "--address", help="a Ray cluster: HOST:PORT, auto, or local (default: RAY_ADDRESS, else a local Ray)"
    )
    train.add_argument(
        "--simulate",
        metavar="SPEEDS",
        help="instead of the job's workers, so many on this machine, slowed down to these relative speeds, "
        "such as 1,0.5,0.25; shares follow their speeds, unless --set het.shares says otherwise",
    )
    train.add_argument(
        "--check",
        action="store_true",
        help="compare everything between workers at every step, and the first steps with one process that has the "
        "whole batch: slow, to find what goes wrong (het.check=every_step)",
    )
    train.add_argument(
        "--json", action="store_true", dest="as_json", help="end with one JSON object on stdout, progress on stderr"
    )
    train.add_argument(
        "--keys", action="store_true", help="print every key of the job, its default and its meaning, and stop"
    )
    train.set_defaults(run=_train)


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser(
        "probe",
        allow_abbrev=False,
        help="measure the machines, and say whether a fleet pays for a job",
        description="Measure the nodes of a cluster, or this machine where none is named: matrix products, memory, "
        "links. With a job, also its training step on each of its workers, and what they will do together.",
    )
    probe.add_argument(
        "--address", help="a Ray cluster: HOST:PORT, auto, or local (default: RAY_ADDRESS, else this machine)"
    )
    probe.add_argument("--model", metavar="JOB.yaml", help="also measure this job's training step, and advise")
    probe.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the job, such as global_batch_size=1024 or workers=auto; may be repeated",
    )
    probe.add_argument(
        "--compression",
        action="store_true",
        help="also predict the job's steps and bytes with each codec, and what compression=auto would choose",
    )
    probe.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on stdout, nothing else")
    probe.set_defaults(run=_probe)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        allow_abbrev=False,
        help="try many settings of a job, and say which is best",
        description="Run a sweep: a job, a space of settings, a search. Each trial is a whole run on\n"
        "workers of its own, as many at once as the cluster holds.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("sweep", metavar="SWEEP.yaml", help="the sweep's file (docs/sweeps.md has all keys)")
    sweep.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the sweep, such as trials=5 or search=optuna; may be repeated",
    )
    sweep.add_argument("--name", help="of the sweep's folder (default: the file's name and the time of day)")
    sweep.add_argument("--storage", metavar="PATH", help="where the sweep's folder goes (default: sweeps)")
    sweep.add_argument(
        "--address", help="a Ray cluster: HOST:PORT, auto, or local (default: RAY_ADDRESS, else a local Ray)"
    )
    sweep.add_argument(
        "--simulate",
        metavar="SPEEDS",
        help="instead of the job's workers, so many on this machine for each trial, slowed down to these relative "
        "speeds, such as 4,2,1,1; one trial at once",
    )
    sweep.add_argument(
        "--resume",
        action="store_true",
        help="go on with the sweep of this name; trials that have ended are not run again",
    )
    sweep.add_argument(
        "--retry-failed", action="store_true", help="with --resume: trials that have failed are tried again"
    )
    sweep.add_argument(
        "--json", action="store_true", dest="as_json", help="end with one JSON object on stdout, progress on stderr"
    )
    sweep.set_defaults(run=_sweep)


def _add_schedule(commands: Any) -> None:
    schedule = commands.add_parser(
        "schedule",
        allow_abbrev=False,
        help="show what a decay schedule does to the learning rate",
        description="Print the learning rate after each epoch, or draw it.",
    )
    schedule.add_argument(
        "schedules",
        nargs="*",
        metavar="SCHEDULE",
        help="a name, or one with options such as '{cosine: {floor: 0.01, warmup_epochs: 1}}' (default: all)",
    )
    schedule.add_argument("--epochs", type=int, default=20, metavar="N", help="of the run (default: 20)")
    schedule.add_argument("--lr", type=float, default=1.0, metavar="RATE", help="before the schedule (default: 1)")
    schedule.add_argument("--out", metavar="FILE", help="draw into a file, such as x.png")
    schedule.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on stdout")
    schedule.set_defaults(run=_schedule)


def _train(arguments: argparse.Namespace) -> int:
    named = {"name": arguments.name, "storage": arguments.storage}
    # --name and --storage are short for --set, and are checked as such. JSON's quotes keep `--name 12` a text.
    overrides = [*arguments.overrides, *(f"{k}={json.dumps(v)}" for k, v in named.items() if v is not None)]
    return _guarded(arguments, lambda: _run_train(arguments, overrides))


def _run_train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from raytrain_het.jobs.table import load_job

    _check_overrides(arguments)
    if arguments.keys:
        return _print_keys(arguments.job)
    if arguments.check:
        overrides = [*overrides, "het.check=every_step"]
    if arguments.simulate is not None:
        _simulate(arguments, overrides)
        return 0
    job = load_job(arguments.job, overrides)

    from raytrain_het.jobs.display import make_display
    from raytrain_het.jobs.runner import run_job

    run_job(job, display=make_display(as_json=arguments.as_json), address=arguments.address)
    return 0


def _guarded(arguments: argparse.Namespace, run: Callable[[], int]) -> int:
    """Run a command; returns its exit status, and reports any error."""
    from raytrain_het.jobs.failure import describe
    from raytrain_het.jobs.interrupted import Interrupted

    try:
        return run()
    except (ConfigError, ResourceError) as error:
        return _failed(arguments, f"raytrain-het: {error}", 2)
    except Interrupted as end:
        return _failed(arguments, f"raytrain-het: interrupted; all workers are gone{end.hint}", end.exit_code)
    except KeyboardInterrupt:
        return _failed(arguments, "raytrain-het: interrupted", 130)
    except Exception as error:
        return _failed(arguments, describe(error), 1)


def _failed(arguments: argparse.Namespace, message: str, code: int) -> int:
    if sys.stderr.isatty() and "Traceback" not in message:
        from raytrain_het.jobs.lines import print_text

        print_text(message, sys.stderr)
    else:  # Not wrapped: each mistake stays one line, which a log can be searched for.
        print(message, file=sys.stderr, flush=True)
    if arguments.as_json:
        print(json.dumps({"error": message.removeprefix("raytrain-het: ")}), flush=True)
    return code


def _check_overrides(arguments: argparse.Namespace) -> None:
    """Refuse `--set epochs 3`, where argparse takes `3` for the job file."""
    for override in arguments.overrides:
        if "=" not in override and arguments.job is not None and not os.path.exists(arguments.job):
            raise ConfigError(f"--set {override} {arguments.job}: did you mean --set {override}={arguments.job}?")


def _print_keys(path: str | None) -> int:
    from raytrain_het.jobs.keys import key_lines
    from raytrain_het.jobs.table import load_job

    print("\n".join(key_lines(type(load_job(path)))))
    return 0


class _Version(argparse.Action):
    """``--version``. The version is looked up only here, since that takes as long as to read a job file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        try:
            found = metadata.version("raytrain-het")
        except metadata.PackageNotFoundError:
            found = "(not installed)"
        print(f"{parser.prog} {found}")
        parser.exit()


def _simulate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from raytrain_het.jobs import simulation
    from raytrain_het.jobs.table import load_job, read_job
    from raytrain_het.probing.cores import cpu_limit

    speeds = simulation.parse_speeds(arguments.simulate)
    cores = simulation.fitting_cores(speeds, cpu_limit().cores)
    simulation.check_alone(workers=read_job(arguments.job, overrides).get("workers"), address=arguments.address)
    overrides = simulation.with_simulated_workers(overrides, len(speeds), default_job=arguments.job is None)
    job = load_job(arguments.job, overrides)

    from raytrain_het.jobs.display import make_display
    from raytrain_het.jobs.runner import run_job
    from raytrain_het.testing.throttle import slow_workers

    display = make_display(as_json=arguments.as_json)
    with slow_workers(cores) as slow:
        display.say(simulation.announcement(cores, slow.how))
        summary = run_job(job, display=display, address="local", at_start=slow)
    display.say(simulation.verdict(summary, cores))


def _probe(arguments: argparse.Namespace) -> int:
    from raytrain_het.errors import HetError
    from raytrain_het.jobs.probe_checks import check_before_torch
    from raytrain_het.jobs.table import load_job

    def say(line: str) -> None:
        from raytrain_het.jobs.lines import print_text

        print_text(line, sys.stderr)

    try:
        if arguments.overrides and arguments.model is None:
            raise ConfigError(f"--set {arguments.overrides[0]} needs a job: write --model JOB.yaml too")
        job = load_job(arguments.model, arguments.overrides) if arguments.model is not None else None
        job = check_before_torch(job, address=arguments.address, compression=arguments.compression)

        from raytrain_het.jobs.probe import run_probe
        from raytrain_het.jobs.probe_report import print_probe

        found = run_probe(job=job, address=arguments.address, say=say, compression=arguments.compression)
        print_probe(found, as_json=arguments.as_json)
    except (ConfigError, ResourceError) as error:
        return _failed(arguments, f"raytrain-het: {error}", 2)
    except HetError as error:
        return _failed(arguments, f"raytrain-het: {error}", 1)
    except KeyboardInterrupt:
        return _failed(arguments, "raytrain-het: interrupted", 130)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    named = {"name": arguments.name, "storage": arguments.storage}
    overrides = [*arguments.overrides, *(f"{k}={json.dumps(v)}" for k, v in named.items() if v is not None)]
    return _guarded(arguments, lambda: _run_sweep(arguments, overrides))


def _run_sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from raytrain_het.jobs import simulation
    from raytrain_het.sweeps import load_sweep

    if arguments.retry_failed and not arguments.resume:
        raise ConfigError("--retry-failed needs a sweep to go on with: write --resume too")
    if arguments.simulate is not None:
        overrides = [*overrides, f"simulate={json.dumps(simulation.parse_speeds(arguments.simulate))}"]
    sweep = load_sweep(arguments.sweep, overrides)

    from raytrain_het.jobs.lines import print_text
    from raytrain_het.probing.cores import cpu_limit
    from raytrain_het.sweeps.command import sweep_command
    from raytrain_het.testing.throttle import slow_workers

    options: dict[str, Any] = {
        "file": arguments.sweep,
        "resume": arguments.resume,
        "retry_failed": arguments.retry_failed,
        "as_json": arguments.as_json,
    }
    if sweep.config.simulate is None:
        return sweep_command(sweep, address=arguments.address, **options)
    simulation.check_alone(workers=None, address=arguments.address)
    cores = simulation.fitting_cores(sweep.config.simulate, cpu_limit().cores)
    with slow_workers(cores) as slow:
        print_text(simulation.announcement(cores, slow.how), sys.stderr)
        return sweep_command(sweep, address="local", at_start=slow, **options)


def _schedule(arguments: argparse.Namespace) -> int:
    from raytrain_het.jobs import schedules

    try:
        if arguments.epochs < 1 or not arguments.lr > 0:
            raise ConfigError(
                f"--epochs {arguments.epochs} --lr {arguments.lr:g}: allowed are a whole number of epochs from 1, and "
                "a rate above 0. Write --epochs 20 --lr 0.1"
            )
        chosen = schedules.parse(arguments.schedules)
        if arguments.out is not None:
            schedules.draw(chosen, epochs=arguments.epochs, lr=arguments.lr, out=arguments.out)
            print(arguments.out, file=sys.stderr)
        if arguments.out is None or arguments.as_json:
            schedules.print_rates(chosen, epochs=arguments.epochs, lr=arguments.lr, as_json=arguments.as_json)
    except ConfigError as error:
        return _failed(arguments, f"raytrain-het: {error}", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
