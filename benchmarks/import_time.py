"""How long one waits for the package: importing it, its help, the first model; against transformers.

    python benchmarks/import_time.py                       # a table
    python benchmarks/import_time.py --write               # also results/import_time.json and .md

Every figure is the processor time (user and system) of a fresh interpreter, so that other programs add to it
by emptying the caches, but not by taking the processor. All are taken in turns, round after round, and
compared with `import transformers` of the same round; one round before them, not counted, fills the disk's
cache. *Modules* counts what is loaded at the end. `import transformers` alone loads hardly anything, so the
class that everybody needs stands beside it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from loss import RESULTS, environment

from diverse_cfg.atomic import write_text

CASES = {
    "import transformers": "import transformers",
    "import diverse_cfg": "import diverse_cfg",
    "diverse-cfg --help": "from diverse_cfg.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "diverse-cfg inspect --help": (
        "from diverse_cfg.cli import main\ntry: main(['inspect', '--help'])\nexcept SystemExit: pass"
    ),
    "transformers' MusicGen class": "from transformers import MusicgenForConditionalGeneration",
    "transformers' MusicGen, the nano base loaded": (
        "from transformers import MusicgenForConditionalGeneration\nfrom diverse_cfg.assets import nano_path\n"
        "MusicgenForConditionalGeneration.from_pretrained(nano_path())"
    ),
    "diverse_cfg.load_policy of the nano base": (
        "import diverse_cfg\nfrom diverse_cfg.assets import nano_path\ndiverse_cfg.load_policy(nano_path())"
    ),
    "diverse_cfg.CFGDiversityTrainer imported": "from diverse_cfg import CFGDiversityTrainer",
}
BASELINE = next(iter(CASES))


def measure(code: str) -> tuple[float, int]:
    """Processor seconds of a fresh interpreter, and the number of modules it has loaded."""
    code += "\nimport sys; print('\\n' + str(len(sys.modules)))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, int(done.stdout.splitlines()[-1])


def as_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [f"| what | s | modules | × {BASELINE} (min – max) |", "|---|---|---|---|"]
    for row in rows:
        low, high = row["ratio_spread"]
        ratio = "1" if row["what"] == BASELINE else f"{row['ratio']:.2f} ({low:.2f} – {high:.2f})"
        lines.append(f"| {row['what']} | {row['seconds']:.2f} | {row['modules']} | {ratio} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Time until the package can be used.")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every case, taken in turns")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="JSON and Markdown"
    )
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    load = [os.getloadavg()[0]]
    modules = {what: measure(code)[1] for what, code in CASES.items()}
    times: dict[str, list[float]] = {what: [] for what in CASES}
    for _ in range(args.rounds):
        for what, code in CASES.items():
            times[what].append(measure(code)[0])
    load.append(os.getloadavg()[0])
    rows = []
    for what in CASES:
        ratios = [own / base for own, base in zip(times[what], times[BASELINE], strict=True)]
        rows.append(
            {
                "what": what,
                "seconds": statistics.median(times[what]),
                "modules": modules[what],
                "ratio": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
            }
        )
    where = environment("cpu") | {
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "load average before and after": f"{load[0]:.1f}, {load[1]:.1f}",
    }
    parts = ["# Importing", str(__doc__).strip().split("\n\n")[-1]]
    if max(load) > 1.5 * (os.cpu_count() or 1):
        parts.append(
            "**The machine was busy with other work (see the load average), which empties the caches: the\n"
            "figures are to be taken again on a quiet one.**"
        )
    parts += [as_table(rows), "\n".join(f"- {name}: {value}" for name, value in where.items())]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.write:
        write_text(args.write / "import_time.md", text)
        write_text(
            args.write / "import_time.json", json.dumps({"environment": where, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
