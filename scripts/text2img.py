"""Draws pictures from a prompt, from a prompt and a depth map, or as variations of a picture."""

import sys

from kandinsky import ImageEmbeds, cli, drawing


def make_parser():
    parser = cli.OneLineParser(__doc__)
    cli.add_prompt(parser)
    image = "in place of a prompt: draw variations of this picture; repeat it for more"
    hint = "depth map, near is white; takes a checkpoint for hints; repeat it for one per prompt or picture"
    cli.add_picture_flags(parser, image=image, hint=hint)
    cli.add_sampling_flags(parser)
    cli.add_size_flags(parser)
    cli.add_model_flags(parser)
    cli.add_output_flags(parser)
    return parser


def check_variations(pipe, call, inputs):
    words = drawing.beside_embeds(pipe, call)
    if call["negative_prompt"] is not None and not words:
        raise ValueError("--negative-prompt goes with a prompt; variations of a picture take none")
    hints = {name: items for name, items in inputs.items() if name != "image"}
    embeds = drawing.any_embeds(pipe, len(inputs["image"]))
    pipe.check("text2img", embeds=embeds, **call | hints | words)


def vary(pipe, call, inputs):
    call = call | inputs | drawing.beside_embeds(pipe, call)
    embeds = ImageEmbeds(pipe.embed_image(call.pop("image")))
    return pipe.text2img(embeds=embeds, **call, progress=True)


@cli.one_line_errors
def main(argv=None) -> int:
    args, settings = drawing.parse(make_parser(), "text2img", argv)
    if settings is not None:
        call = settings["call"]
    elif args.image:
        if drawing.prompts(args) is not None:
            raise ValueError("give a prompt or --image, not both; img2img.py takes both")
        call = {"prompt": None, **drawing.call_of(args)}
    else:
        call = {"prompt": drawing.need_prompts(args), **drawing.call_of(args)}
    job = drawing.Job(check_variations, vary) if args.image else drawing.job("text2img")
    drawing.draw("text2img", call, args, settings, job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
