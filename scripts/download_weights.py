"""Downloads the official weights, checks them, or converts old checkpoint files."""

import functools
import os
import sys
from pathlib import Path

from kandinsky import cli, download
from kandinsky.convert import convert

PARTS = ("prior", "decoder", "inpaint", "controlnet-depth")


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("model", nargs="?", choices=("2.2", "2.1", "all"), help="which weights")
    only_help = "one part of them, may be repeated; default: every part"
    parser.add_argument("--only", choices=PARTS, action="append", help=only_help)
    parser.add_argument("--verify", action="store_true", help="check what is there; downloads nothing")
    parser.add_argument(
        "--convert", type=Path, metavar="FILE", help="make safetensors of a .bin, or of the authors' .ckpt"
    )
    parser.add_argument(
        "--clip-stats",
        type=Path,
        metavar="FILE",
        help="ViT-L-14_stats.th, for --convert of the authors' prior",
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: weights/; --convert: beside FILE")
    parser.add_argument("--overwrite", action="store_true", help="--convert: replace an existing file")
    parser.add_argument(
        "--manifest",
        type=Path,
        default=cli.WEIGHTS / "manifest.json",
        help="what is fetched and held against",
    )
    args = parser.parse_args(argv)
    if (args.model is None) == (args.convert is None):
        parser.error("give either a model (2.2, 2.1 or all) or --convert FILE")
    foreign = ("clip_stats", "overwrite") if args.model else ("only", "verify", "manifest")
    idle = [name for name in foreign if name in cli.given(parser, argv)]
    if idle:
        kind = "--convert FILE" if args.model else "a model (2.2, 2.1 or all)"
        parser.error(f"--{idle[0].replace('_', '-')} goes with {kind} only")
    if args.out == "":
        parser.error("--out is empty; a folder is needed")
    return args


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.convert:
        print(convert(args.convert, args.out, args.clip_stats, args.overwrite))
        return 0
    repositories = download.select(download.load_manifest(args.manifest), args.model, args.only)
    out, say = args.out or cli.WEIGHTS, functools.partial(print, flush=True)
    if args.verify:
        problems = download.verify(repositories, out, say)
        say("\n".join(problems) or "everything is there and right")
        return 1 if problems else 0
    download.download(repositories, out, os.environ.get("HF_ENDPOINT") or None, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
