"""Repaints the white part of a mask."""

import sys

from kandinsky import cli, drawing


def make_parser():
    parser = cli.OneLineParser(__doc__)
    cli.add_prompt(parser)
    mask = "white is repainted, black is kept to the last bit; repeat it for one per prompt"
    cli.add_picture_flags(parser, image="the picture to repaint; repeat it for one per prompt", mask=mask)
    parser.add_argument("--invert-mask", action="store_true", help="repaint black and keep white")
    parser.add_argument("--grow-mask", type=int, default=0, help="pixels by which the repainted part grows")
    parser.add_argument(
        "--feather-mask", type=int, default=0, help="pixels, inside it, over which it fades in"
    )
    parser.add_argument(
        "--no-keep-unmasked", action="store_true", help="leave what is kept as the autoencoder returns it"
    )
    cli.add_sampling_flags(parser)
    cli.add_size_flags(parser, "the picture's own")
    cli.add_model_flags(parser)
    cli.add_output_flags(parser)
    return parser


@cli.one_line_errors
def main(argv=None) -> int:
    args, settings = drawing.parse(make_parser(), "inpaint", argv)
    if not (args.image and args.mask) and settings is None:
        raise ValueError("give --image FILE and --mask FILE; see --help")
    if settings is not None:
        call = settings["call"]
    else:
        call = {
            "prompt": drawing.need_prompts(args),
            **drawing.call_of(args),
            "keep_unmasked": not args.no_keep_unmasked,
            "invert_mask": args.invert_mask,
            "grow_mask": args.grow_mask,
            "feather_mask": args.feather_mask,
        }
    drawing.draw("inpaint", call, args, settings, drawing.job("inpaint"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
