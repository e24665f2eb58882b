"""The command: ``python -m raytrain_het.testing.programs --seed N --count 500``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from raytrain_het.testing.programs.drawing import generate
from raytrain_het.testing.programs.pool import Pool
from raytrain_het.testing.programs.shrinking import shrunk
from raytrain_het.testing.programs.text import text_of
from raytrain_het.testing.programs.verdict import VERDICTS, verdict_of


def main() -> None:
    """Run programs and print the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m raytrain_het.testing.programs", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first program's number is this times 100000")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="programs by their numbers instead")
    parser.add_argument("--text", type=int, metavar="NUMBER", help="print a program's text and stop")
    parser.add_argument("--shrink", type=int, metavar="NUMBER", help="find the smallest program that fails alike")
    parser.add_argument("--json", action="store_true", help="one JSON object a program")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no program after so long")
    args = parser.parse_args()
    if args.text is not None:
        print(f"# {generate(args.text)}\n{text_of(generate(args.text))}")
        return
    with Pool() as pool:
        if args.shrink is not None:
            small, verdict = shrunk(lambda program: verdict_of(pool.run(program)), generate(args.shrink))
            print(f"{verdict.kind}: {verdict.detail}\n\n# {small}\n{text_of(small)}")
            return
        numbers = args.only or range(args.seed * 100_000, args.seed * 100_000 + args.count)
        counts: Counter[str] = Counter()
        alike: dict[str, list[int]] = {}
        started = time.monotonic()
        for number in numbers:
            if time.monotonic() - started > args.seconds:
                break
            program = generate(number)
            ran = pool.run(program)
            verdict = verdict_of(ran)
            counts[verdict.kind] += 1
            if not verdict.good:
                alike.setdefault(verdict.key, []).append(number)
            if args.json:
                line = {"number": number, "kind": verdict.kind, "detail": verdict.detail, "program": str(program)}
                print(json.dumps({**line, "seconds": round(ran.seconds, 2)}), flush=True)
            elif not verdict.good:
                print(f"{number} {verdict.kind}: {verdict.detail.splitlines()[0][:200]}\n    {program}", flush=True)
    if not args.json:
        for key, which in sorted(alike.items(), key=lambda item: -len(item[1])):
            print(f"{len(which):4} {key}  {which[:8]}")
        print({kind: counts[kind] for kind in VERDICTS}, f"{time.monotonic() - started:.0f} s")
    sys.exit(0 if not alike else 1)


if __name__ == "__main__":
    main()
