"""Sampling beside other programs: the number of threads that the loop measures, against the fixed one.

    python benchmarks/busy.py                         # nano: idle, beside one busy loop, beside one per core
    python benchmarks/busy.py --busy 0 1 --batch 32 --rounds 7
    python benchmarks/busy.py --write                 # also benchmarks/results/busy-nano

Every round samples the same clips with all threads, with one, and with as many as are measured to be best, each
first in its turn, since the speed of a machine drifts and a variant leaves caches and threads to the next. Wall
time, in units of all threads' median on idle cores; the table is of use only where nothing else runs. What was
measured is kept from round to round, as in a training or an evaluation; `cold` starts anew each time, as a single
command does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from loss import RESULTS, environment
from rollout import SHAPES, TEXT_TOKENS, make_model

from diverse_cfg.atomic import write_text
from diverse_cfg.policies.sampler import loop
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from diverse_cfg.threads import Threads, available_cores
from diverse_cfg.types import TextCondition

VARIANTS = ("all threads", "one thread", "measured", "cold")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing, as fast as they can."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


class Fixed:
    """A number of threads that is set once."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @contextmanager
    def measured(self, device: str) -> Iterator:
        torch.set_num_threads(self.threads)
        yield lambda: None


def measure(shape: str, batch: int, frames: int, counts: list[int], rounds: int) -> list[dict]:
    """Seconds of every variant in every round, beside `counts` busy loops."""
    model = make_model(shape, "cpu")
    weights = RolloutWeights.from_model(model)
    hidden = torch.randn(batch, TEXT_TOKENS, model.config.text_encoder.d_model)
    condition = TextCondition(hidden, torch.ones(batch, TEXT_TOKENS, dtype=torch.long))
    threads, kept = torch.get_num_threads(), Threads()

    def seconds(variant: str) -> float:
        kinds = {"all threads": Fixed(threads), "one thread": Fixed(1), "measured": kept, "cold": Threads()}
        started = time.perf_counter()
        with patch.object(loop, "SAMPLING", kinds[variant]):
            sample_codes(model, condition, frames, weights=weights)
        spent = time.perf_counter() - started
        torch.set_num_threads(threads)
        return spent

    seconds("all threads"), seconds("measured")
    rows = []
    for count in counts:
        with busy(count):
            turns = [VARIANTS[n % 4 :] + VARIANTS[: n % 4] for n in range(rounds)]
            times = [{name: seconds(name) for name in turn} for turn in turns]
        rows.append({"shape": shape, "batch": batch, "busy": count, "times": times, "chosen": kept.chosen})
        print(as_table(rows[:1] + rows[-1:]).splitlines()[-1], flush=True)
    return rows


def as_table(rows: list[dict]) -> str:
    """Markdown: times in units of the first row's `all threads`, and the gain within each round."""
    unit = statistics.median(times["all threads"] for times in rows[0]["times"])
    lines = [
        f"| busy loops | {' | '.join(VARIANTS)} | all threads / measured (min – max) |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        cells = [statistics.median(times[name] for times in row["times"]) / unit for name in VARIANTS]
        gains = [times["all threads"] / times["measured"] for times in row["times"]]
        gain = f"{statistics.median(gains):.2f} ({min(gains):.2f} – {max(gains):.2f})"
        lines.append(f"| {row['busy']} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {gain} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Time of sampling beside other programs.")
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, available_cores()], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="JSON and Markdown"
    )
    args = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    rows = measure(args.shape, args.batch, args.frames, args.busy, args.rounds)
    where = environment("cpu") | {"batch": args.batch, "frames": args.frames, "rounds": args.rounds}
    where |= {"cores": available_cores(), "load average before": f"{load:.1f}"}
    facts = "\n".join(f"- {name}: {value}" for name, value in where.items())
    text = "\n\n".join(
        ["# Sampling beside other programs", (__doc__ or "").split("\n\n")[2], as_table(rows), facts]
    )
    print(f"\n{text}")
    if args.write:
        write_text(args.write / f"busy-{args.shape}.md", text + "\n")
        write_text(
            args.write / f"busy-{args.shape}.json", json.dumps({"environment": where, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
