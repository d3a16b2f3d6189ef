"""Writes a checkpoint of random weights in the published layout, to try the whole path with."""

import functools
import sys
import time
from pathlib import Path

from kandinsky import cli, random_weights


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("model", choices=tuple(random_weights.MODELS), help="which model")
    parser.add_argument(
        "--size", choices=tuple(random_weights.SIZES), default="released", help="of the networks"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the repositories go")
    parser.add_argument(
        "--only",
        choices=tuple(random_weights.REPOSITORIES),
        action="append",
        help="one part, may be repeated; default: prior and decoder",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights; the same seed, the same bytes")
    return parser.parse_args(argv)


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    start, say = time.perf_counter(), functools.partial(print, flush=True)
    parts = tuple(dict.fromkeys(args.only or ("prior", "decoder")))
    for folder in random_weights.make(args.out, args.size, parts, args.seed, say, args.model):
        say(folder)
    say(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
