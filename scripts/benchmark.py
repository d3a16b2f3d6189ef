"""Measures what the README states: medians of runs taken in turn, so that a drifting machine favours none."""

import json
import statistics
import subprocess
import sys
import time

from kandinsky import cli

IMPORTS = {
    "torch": "import torch",
    "kandinsky": "import kandinsky",
    "diffusers": "from diffusers import KandinskyV22CombinedPipeline",
}


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("what", choices=("import",), help="import: process start to the end of the import")
    parser.add_argument("--runs", type=int, default=9, help="of each, after one that is not counted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}; allowed is 1 and more")
    return args


def measure_imports(runs: int) -> dict[str, float]:
    """Median seconds of a fresh process for each import; diffusers only where it is installed."""
    seconds = {name: [] for name in IMPORTS}
    for run in range(runs + 1):
        for name, code in IMPORTS.items():
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True)
            if done.returncode == 0 and run > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items() if times}


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    medians = measure_imports(args.runs)
    if args.json:
        print(json.dumps(medians))
        return 0
    for name, median in medians.items():
        print(f"import {name:<10} {median:6.2f} s   {median / medians['torch']:5.2f} × import torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
