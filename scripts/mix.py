"""Mixes what prompts and pictures show, or draws the way from one to another."""

import math
import sys
from functools import partial
from pathlib import Path

import torch

from kandinsky import ImageEmbeds, arguments, cli, drawing, images


def make_parser():
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("prompt", nargs="*", help="what to mix: prompts")
    cli.add_picture_flags(parser, image="what to mix: a picture; repeat it for more")
    parser.add_argument(
        "--mix-weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one for each prompt, then one for each picture; default: equal shares of one",
    )
    parser.add_argument(
        "--frames", type=int, help="draw so many pictures on the way from one item to another"
    )
    parser.add_argument(
        "--animation", type=Path, metavar="FILE", help="of the frames, .gif or .webp; default: beside --out"
    )
    parser.add_argument("--negative-prior-prompt", help="what the prior leads every prompt away from")
    cli.add_sampling_flags(parser)
    cli.add_size_flags(parser)
    cli.add_model_flags(parser)
    cli.add_output_flags(parser)
    return parser


def call_of(args) -> dict:
    count = len(args.prompt) + len(args.image or [])
    if not count:
        raise ValueError("give prompts or --image FILE to mix; see --help")
    if args.frames is not None and (count != 2 or args.mix_weights or args.num_images > 1):
        raise ValueError("--frames leads from one item to another: two items, no weights, one picture each")
    if args.frames is not None:
        arguments.whole(args.frames, "--frames", 2, 1000)
    weights = args.mix_weights or [1 / count] * count
    more = {"weights": weights, "negative_prior_prompt": args.negative_prior_prompt, "frames": args.frames}
    return {"prompt": args.prompt, **drawing.call_of(args), **more}


def decoder_call(call: dict) -> dict:
    names = ("guidance_scale", "num_inference_steps", "sampler", "height", "width")
    names += ("guidance_interval", "cache_every")
    return {name: call[name] for name in names}


def mix(pipe, call: dict, inputs: dict, weights: list[float]) -> ImageEmbeds:
    return pipe.mix(
        call["prompt"] + inputs.get("image", []),
        weights,
        call["negative_prompt"] or "",
        call["negative_prior_prompt"],
        call["num_images_per_prompt"],
        call["prior_num_inference_steps"],
        call["prior_guidance_scale"],
        call["seed"],
        progress=True,
    )


def check(pipe, call, inputs):
    has_negative = bool(call["negative_prompt"]) or call["negative_prior_prompt"] is not None
    asked = decoder_call(call) | drawing.beside_embeds(pipe, call)
    more = ("num_images_per_prompt", "prior_num_inference_steps", "prior_guidance_scale")
    asked |= {name: call[name] for name in more}
    pipe.check("text2img", embeds=drawing.any_embeds(pipe, 1, has_negative), **asked)


def draw_mixture(pipe, call, inputs):
    embeds, words = mix(pipe, call, inputs, call["weights"]), drawing.beside_embeds(pipe, call)
    return pipe.text2img(**words, embeds=embeds, seed=pipe.seeds, **decoder_call(call), progress=True)


def draw_frames(pipe, call, inputs):
    """Every frame from the same noise: only what it shows moves."""
    first = mix(pipe, call, inputs, [1, 0])
    last = mix(pipe, call | {"seed": pipe.seeds}, inputs, [0, 1])
    seeds, words = pipe.seeds, drawing.beside_embeds(pipe, call)
    for share in torch.linspace(0, 1, call["frames"]):
        between = ImageEmbeds(torch.lerp(first[0], last[0], share), first[1])
        yield from pipe.text2img(**words, embeds=between, seed=seeds, **decoder_call(call), progress=True)


@cli.one_line_errors
def main(argv=None) -> int:
    parser = make_parser()
    args, settings = drawing.parse(parser, "mix", argv)
    if args.frames is not None:
        cli.refuse(parser, argv, ("batch_size",), "mixtures without --frames, which are drawn one by one")
    call = call_of(args) if settings is None else settings["call"]
    if call["frames"] is not None:
        args.animation = args.animation or args.out.with_suffix(".gif")
        images.check_writable(args.animation, images.ANIMATIONS)
        if args.animation.resolve() == args.out.resolve():
            raise ValueError(f"--out and --animation both name {args.out}; give each a name of its own")
    elif args.animation is not None:
        raise ValueError("--animation is made of --frames; give their number")
    frames = []

    def run(pipe, call, inputs):
        if call["frames"] is None:
            return draw_mixture(pipe, call, inputs)
        for frame in draw_frames(pipe, call, inputs):  # one by one: a run that is stopped keeps them
            frames.append(frame)
        return [images.grid(frames, math.ceil(math.sqrt(len(frames))))]

    try:
        drawing.draw("mix", call, args, settings, drawing.Job(check, run))
    finally:
        if frames:
            save = partial(images.save_animation, frames)
            print(drawing.write(args.animation, frames[0].size, args.overwrite, save, ".gif"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
