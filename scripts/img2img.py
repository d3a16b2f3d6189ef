"""Redraws a picture towards a prompt."""

import sys

from kandinsky import cli, drawing


def make_parser():
    parser = cli.OneLineParser(__doc__)
    cli.add_prompt(parser)
    hint = "depth map, near is white; takes a checkpoint for hints; repeat it for one per prompt"
    cli.add_picture_flags(parser, image="the picture to redraw; repeat it for one per prompt", hint=hint)
    parser.add_argument("--strength", type=float, default=0.3, help="share of the steps that run, 0 to 1")
    cli.add_sampling_flags(parser)
    cli.add_size_flags(parser, "the picture's own")
    cli.add_model_flags(parser)
    cli.add_output_flags(parser)
    return parser


@cli.one_line_errors
def main(argv=None) -> int:
    args, settings = drawing.parse(make_parser(), "img2img", argv)
    if not args.image and settings is None:
        raise ValueError("give --image FILE, the picture to redraw; see --help")
    if settings is not None:
        call = settings["call"]
    else:
        prompts = drawing.need_prompts(args)
        call = {"prompt": prompts, **drawing.call_of(args), "strength": args.strength}
    drawing.draw("img2img", call, args, settings, drawing.job("img2img"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
