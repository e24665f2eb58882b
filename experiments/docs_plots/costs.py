"""What a step costs besides computing: the protocol, its hooks, the codecs."""

from __future__ import annotations

import math

from experiments.docs_plots.raw import Shown, date_of, read
from experiments.docs_plots.svg import BOUND, DDP, OURS, dots, panels


def step_time() -> Shown:
    """Step time over plain DDP's, equal workers, by run."""
    names = ("engine/step_time", "tcp/step_time_1", "tcp/step_time_2", "parts/step_time")
    sources = [f"2026-11-21_{name}.json" for name in names]
    sources += ["2026-11-30_never_silently_wrong/step_time.json", "2026-11-30_exchange/step_time.json"]
    results = [read(source) for source in sources]
    figure, (panel,) = panels()
    for place, result in enumerate(results):
        dots(panel, [place - 0.2] * len(result["ratios"]), result["ratios"], color=DDP, alpha=0.3, markersize=4)
        error = [[result["ratio"] - result["low"]], [result["high"] - result["ratio"]]]
        panel.errorbar([place + 0.1], [result["ratio"]], yerr=error, fmt="o", color=OURS)
    panel.axhline(1, color=DDP, linewidth=1)
    panel.set_ylim(0.7, 1.5)
    panel.set_xticks(
        range(len(sources)), [source.split("/")[0].replace("_", "\n", 1) for source in sources], fontsize=7
    )
    panel.set_ylabel("step time / DDP's")
    rows = [
        {
            "date": date_of(source),
            "ratio (95 % interval)": f"{result['ratio']:.3f} ({result['low']:.3f} to {result['high']:.3f})",
            "DDP (ms)": f"{result['ddp_ms']:.0f}",
            "raytrain_het (ms)": f"{result['het_ms']:.0f}",
            "steps each": str(result["steps_each"]),
            "raw data": f"`{source}`",
        }
        for source, result in zip(sources, results, strict=True)
    ]
    caption = "Grey: a block of steps against the DDP block beside it. Green: median and 95 % interval."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)


def protocol_cost() -> Shown:
    """CPU time of a worker for one step's protocol, by thread."""
    sources = ["2026-11-21_tcp/protocol_cost.json", "2026-11-21_tcp/protocol_cost_2.json"]
    sources += [f"2026-11-21_parts/protocol_cost_{n}.json" for n in (1, 2, 3)]
    figure, both = panels(2, sharey=True)
    table = []
    for panel, model in zip(both, ("1.3M", "tiny"), strict=True):
        rows = [next(row for row in read(source)["rows"] if row["model"] == model) for source in sources]
        main = [row["main"] for row in rows]
        panel.bar(range(len(rows)), main, color=OURS, label="training thread")
        communication = [row["protocol"] - row["main"] for row in rows]
        panel.bar(range(len(rows)), communication, bottom=main, color=BOUND, label="communication thread")
        panel.set_title({"1.3M": "1.3 million parameters", "tiny": "2 thousand parameters"}[model])
        panel.set_xticks(range(len(rows)), [f"run {n + 1}" for n in range(len(rows))])
        table += [
            {
                "parameters": model,
                "run": str(n + 1),
                "date": date_of(source),
                "training thread (ms)": f"{row['main']:.2f}",
                "communication thread (ms)": f"{row['protocol'] - row['main']:.2f}",
                "together (ms)": f"{row['protocol']:.2f}",
                "raw data": f"`{source}`",
            }
            for n, (source, row) in enumerate(zip(sources, rows, strict=True))
        ]
    both[0].set_ylabel("ms of CPU time a step")
    both[1].legend(fontsize="small")
    caption = "CPU time of one worker in one step for everything but computing and moving gradients."
    return Shown(figure=figure, rows=table, sources=sources, caption=caption)


def hooks() -> Shown:
    """What hooks on parameters cost in a backward pass."""
    source = "2026-11-21_engine/hooks.json"
    result = read(source)
    rows = result["rows"]
    names = {"plain": "no hooks", "ddp": "DDP with a comm hook", "ours": "raytrain_het"}
    figure, (panel,) = panels(height=1.8)
    for place, row in enumerate(rows):
        times = result["times_ms"][row["route"]]
        dots(panel, times, [place] * len(times), color=OURS if row["route"] == "ours" else DDP)
    panel.set_yticks(range(len(rows)), [names[row["route"]] for row in rows])
    panel.set_xlabel("forward and backward pass, ms of CPU time")
    table = [
        {
            "route": names[row["route"]],
            "forward and backward (ms)": f"{row['forward and backward ms']:.2f}",
            "of it hooks (ms)": f"{row['hooks ms']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            "raw data": f"`{source}`",
        }
        for row in rows
    ]
    caption = "A dot is a block of passes; the table has medians and 95 % intervals."
    return Shown(figure=figure, rows=table, sources=[source], caption=caption)


def codec_speed() -> Shown:
    """Encoding and decoding speed of each codec."""
    sources = ["2026-11-22/codecs_1.json", "2026-11-22/codecs_2.json"]
    tables = [{row["codec"]: row for row in read(source)["rows"]} for source in sources]
    names = [name for name in tables[0] if name != "copy"]
    figure, (panel,) = panels(height=3.4)
    for k, (what, colour) in enumerate((("encode_gb_s", OURS), ("decode_gb_s", BOUND))):
        places = [place + 0.36 * (k - 0.5) for place in range(len(names))]
        panel.barh(places, [tables[0][name][what] for name in names], 0.34, color=colour, label=what.split("_")[0])
    panel.axvline(tables[0]["copy"]["encode_gb_s"], color=DDP, linewidth=1, label="a plain copy")
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("GB/s of fp32 values, one thread")
    figure.legend(loc="outside upper center", ncols=3)
    rows = [
        {
            "codec": f"`{name}`",
            "encode (GB/s), two runs": " and ".join(_gb(table[name]["encode_gb_s"]) for table in tables),
            "decode (GB/s), two runs": " and ".join(_gb(table[name]["decode_gb_s"]) for table in tables),
            "compression factor": f"{tables[0][name]['factor']:.3g}",
        }
        for name in ["copy", *names]
    ]
    caption = "The first run; speeds are in GB/s of the uncompressed values, so that codecs compare."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)


def _gb(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3g}"


def hub() -> Shown:
    """What the membership actor costs by the number of members."""
    source = "2026-12-01_headers/hub_cost.json"
    rows = read(source)["rows"]
    members = [row["members"] for row in rows]
    figure, (cpu, forming) = panels(2)
    cpu.plot(members, [100 * row["cpu_part"] for row in rows], "o-", color=OURS)
    cpu.set_ylabel("CPU time, % of a core")
    forming.plot(members, [row["forming_s"] for row in rows], "o-", color=OURS)
    forming.set_ylabel("seconds to form a generation")
    forming.set_yscale("log")
    for panel in (cpu, forming):
        panel.set_xscale("log")
        panel.set_xlabel("members")
    table = [
        {
            "members": str(row["members"]),
            "CPU time (% of a core)": f"{100 * row['cpu_part']:.1f}",
            "forming a generation (s)": f"{row['forming_s']:.3f}",
            "members lost or suspended": str(row["lost"]),
        }
        for row in rows
    ]
    caption = "Left: CPU time of the hub while members train. Right: from a failed collective until all can meet again."
    return Shown(figure=figure, rows=table, sources=[source], caption=caption)


def worker_cpu() -> Shown:
    """What a step with many small buckets takes a worker, by the number of workers."""
    folder = "2026-12-01_headers"
    sources = [f"{folder}/worker_cpu_before.json", f"{folder}/worker_cpu.json"]
    before, after = ({row["workers"]: row for row in read(source)["rows"]} for source in sources)
    figure, (panel,) = panels()
    for k, (rows, label, colour) in enumerate(((before, "before", DDP), (after, "now", OURS))):
        places = [place + 0.3 * (k - 0.5) for place in range(len(rows))]
        panel.bar(places, [row["cpu_ms"] for row in rows.values()], 0.28, color=colour, label=label)
    panel.set_xticks(range(len(after)), [f"{workers} workers" for workers in after])
    panel.set_ylabel("CPU time of a worker and step (ms)")
    figure.legend(loc="outside upper center", ncols=2)
    table = [
        {
            "workers": str(workers),
            "before (ms)": f"{before[workers]['cpu_ms']:.1f}",
            "now (ms)": f"{row['cpu_ms']:.1f}",
            "of which training (ms)": f"{row['solo_ms']:.1f}",
            "step, before and now (ms)": f"{before[workers]['step_ms']:.0f} and {row['step_ms']:.0f}",
        }
        for workers, row in after.items()
    ]
    caption = "Workers of Ray Train on one machine, two cores for all of them. Before: headers to all members."
    return Shown(figure=figure, rows=table, sources=sources, caption=caption)
