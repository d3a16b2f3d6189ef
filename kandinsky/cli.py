"""What the scripts share: one-line errors, the flags that mean the same everywhere, and where weights lie."""

import math
import os
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from kandinsky import arguments

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
DTYPES = ("float32", "bfloat16", "float16")
EXPECTED_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, MemoryError)


class OneLineParser(ArgumentParser):
    """An ArgumentParser whose help shows defaults and whose errors are one line with exit code 2."""

    def __init__(self, description: str | None = None):
        # no abbreviations: --prompt would be --prompts, a file
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # no "(default: None)" behind flags whose help says what absence means
        return action.help if action.default is None else super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        """Paragraphs stay apart; one with columns, which two spaces part, stays as it is written."""
        parts = text.strip().split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(p if "  " in p else fill(p, width, indent) for p in parts)


def whole(least: int) -> Callable[[str], int]:
    """For a flag's `type`: an int of at least so much."""
    return partial(_parsed, int, partial(arguments.whole, low=least))


def real(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The same for a finite number, up to `most`."""
    return partial(_parsed, float, partial(arguments.number, low=least, high=most))


def _parsed(kind: type, check: Callable[[Any, str], Any], text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
    try:
        return check(value, "value")
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def given(parser: ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Which arguments stand on the command line, as against those that have their default."""
    absent: list = []  # compared by identity
    actions = {action.dest: action for action in parser._actions}
    values = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(actions, absent))))
    found = {name for name in actions if name in values and values[name] is not absent}
    # argparse also fills in a positional argument that is left out
    return {n for n in found if actions[n].option_strings or values[n] not in (None, [])}


def needs(parser: ArgumentParser, argv: Sequence[str] | None, flag: str, other: str) -> None:
    """Ends with an error where a flag is given that means nothing without another one."""
    names = given(parser, argv)
    if flag in names and other not in names:
        parser.error(f"--{flag.replace('_', '-')} means nothing without --{other.replace('_', '-')}")


def refuse(parser: ArgumentParser, argv: Sequence[str] | None, flags: Iterable[str], of: str) -> None:
    """Ends with an error where one of these flags is given; of: what they are of."""
    names = given(parser, argv)
    for flag in flags:
        if flag in names:
            parser.error(f"--{flag.replace('_', '-')} is of {of}")


def one_line_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """For a script's `main(argv=None)`: errors a user can mend become one line on stderr and exit code 2."""

    def run(argv: Sequence[str] | None = None) -> int:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return main(argv)
        except EXPECTED_ERRORS as error:
            _say(" ".join(str(error).split()) or type(error).__name__)
            return 2
        except RuntimeError as error:
            if not arguments.lacks_memory(error):
                raise
            may_do = "a smaller batch or size, half precision, or another device may do"
            _say(f"out of memory; {may_do} ({str(error).splitlines()[0]})")
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    run.__doc__ = main.__doc__
    return run


def _say(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


def add_model_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--weights", help="2.2, 2.1, or a decoder folder; default: the embedded checkpoint")
    parser.add_argument(
        "--prior", type=Path, help="prior folder; default: the one that belongs to the decoder"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps …")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="free each network after use; it is read again for each batch",
    )
    parser.add_argument(
        "--optimize", action="store_true", help="rewrite the networks to run faster; worth it for large ones"
    )
    lora_help = "LoRA file or folder, for prior or decoder by its keys; may be given several times"
    parser.add_argument("--lora", type=Path, action="append", metavar="FILE", help=lora_help)
    parser.add_argument("--lora-scale", type=float, default=1.0, help="strength of every --lora")


def add_sampling_flags(parser: ArgumentParser) -> None:
    num_help = "pictures of each prompt, of each picture that is varied, or of the mixture"
    parser.add_argument("--num-images", type=int, default=1, help=num_help)
    batch_help = "pictures to draw at a time; those of a batch are written before the next is drawn"
    parser.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help=batch_help)
    add_loop_flags(parser)
    add_approximate_flags(parser)


def add_loop_flags(parser: ArgumentParser) -> None:
    """What one picture takes."""
    parser.add_argument("--negative-prompt", help="what to lead away from; default: the zero image")
    parser.add_argument("--seed", type=int, help="picture i uses seed + i; drawn and printed when absent")
    add_sampler_flags(parser)
    parser.add_argument("--prior-steps", type=int, default=25, help="prior steps, for prompts")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="decoder guidance; 1 turns it off")
    parser.add_argument(
        "--prior-guidance-scale", type=float, default=4.0, help="prior guidance, for prompts; 1 turns it off"
    )


def add_sampler_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=50, help="decoder steps")
    sampler_help = "DPM-Solver++(2M), good in 15 to 20 steps; default: the checkpoint's scheduler"
    parser.add_argument("--sampler", choices=("dpm++",), help=sampler_help)


def add_approximate_flags(parser: ArgumentParser) -> None:
    """What `kandinsky.approximate` leaves out."""
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("START", "STOP"),
        help="guide in this part of the loop only, 0 its start and 1 its end; faster, approximate",
    )
    every_help = (
        "run the whole U-Net at each N-th step, its outermost level at the others; faster, approximate"
    )
    parser.add_argument("--cache-every", type=int, default=1, metavar="N", help=every_help)


def add_prompt(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts from a text file, a line each")


def add_picture_flags(parser: ArgumentParser, **flags: str) -> None:
    """flags: of image, mask, hint those that the script takes, with their help; each may be repeated."""
    for name in ("image", "mask", "hint"):
        if name in flags:
            parser.add_argument(f"--{name}", type=Path, action="append", metavar="FILE", help=flags[name])
        else:
            parser.set_defaults(**{name: None})


def add_size_flags(parser: ArgumentParser, default: str = "the checkpoint's own") -> None:
    parser.add_argument("--height", type=int, help=f"pixels; default: {default}")
    parser.add_argument("--width", type=int, help=f"pixels; default: {default}")


def add_output_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out.png"),
        help="picture to write: .png, .jpg or .webp; several are numbered, -0, -1 …",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing file; else a free name is used"
    )
    parser.add_argument("--no-metadata", action="store_true", help="leave the settings out of the PNG")
    parser.add_argument(
        "--from-png",
        type=Path,
        metavar="FILE",
        help="make this picture again, from its settings; pictures it came from are given again",
    )


# the repositories' names by kind of decoder and --weights; None: the embedded one
DECODERS = {
    "text2img": {
        "2.2": "kandinsky-2-2-decoder",
        "2.1": "kandinsky-2-1",
        None: "mini-decoder",
    },
    "inpaint": {
        "2.2": "kandinsky-2-2-decoder-inpaint",
        "2.1": "kandinsky-2-1-inpaint",
        None: "mini-decoder-inpaint",
    },
    "hint": {
        "2.2": "kandinsky-2-2-controlnet-depth",
        None: "mini-controlnet-depth",
    },
}


def decoder_kind(task: str, has_hint: bool) -> str:
    """Which of DECODERS a task takes."""
    return "inpaint" if task == "inpaint" else "hint" if has_hint else "text2img"


def decoder_folder(weights: str | None, kind: str = "text2img") -> Path:
    """The decoder folder that --weights means: None, "2.2", "2.1", or a folder.

    Raises:
        ValueError: it is not there; the message says how to get it.
    """
    if weights not in (None, "2.2", "2.1"):
        return Path(weights)
    names = DECODERS[kind]
    if weights not in names:
        raise ValueError(f"2.1 has nothing like {names['2.2']}; use --weights 2.2, or a decoder folder")
    folder = WEIGHTS / names[weights]
    if folder.is_dir():
        return folder
    model = weights or "2.2"
    get = (
        f"`python scripts/download_weights.py {model}`, then pass --weights {model}; or pass --weights FOLDER"
    )
    raise ValueError(f"no checkpoint at {folder}; get the official one with {get}")


def free_name(path: Path, overwrite: bool = False) -> Path:
    """`path`, or with a number before the suffix where it exists and must not be overwritten."""
    number, candidate = 1, path
    while os.path.lexists(candidate) and not overwrite:
        number, candidate = number + 1, path.with_stem(f"{path.stem}-{number}")
    return candidate


def write_free(path: Path, overwrite: bool, write: Callable[[Path], None]) -> Path:
    """Writes under a `free_name`, or under the next where another process takes that meanwhile.

    Returns the name that was used.
    """
    while True:
        candidate = free_name(path, overwrite)
        try:
            write(candidate)
            return candidate
        except FileExistsError:
            if overwrite or not os.path.lexists(candidate):
                raise


def numbered(path: Path, count: int) -> list[Path]:
    """`count` names made of one: the name itself, or with -0, -1 … before the suffix."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
