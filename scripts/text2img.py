"""Draws pictures from a prompt."""

import sys

import torch

from kandinsky import Kandinsky, cli, images


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("prompt", help="what to draw")
    cli.add_sampling_flags(parser)
    cli.add_size_flags(parser)
    cli.add_model_flags(parser)
    cli.add_output_flags(parser)
    return parser.parse_args(argv)


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    images.check_writable(args.out)
    decoder = cli.decoder_folder(args.weights, "kandinsky-2-2-decoder", "mini-decoder")
    pipe = Kandinsky.from_pretrained(
        decoder, args.prior, args.device, getattr(torch, args.dtype), keep_loaded=not args.low_memory
    )
    for path in args.lora or []:
        pipe.load_lora(path, args.lora_scale)
    pictures = pipe.text2img(
        args.prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_images_per_prompt=args.num_images,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.steps,
        prior_num_inference_steps=args.prior_steps,
        prior_guidance_scale=args.prior_guidance_scale,
        seed=args.seed,
        progress=True,
    )
    for picture, name, seed in zip(pictures, cli.numbered(args.out, len(pictures)), pipe.seeds):
        path = cli.free_name(name, args.overwrite)
        images.save_image(picture, path, args.overwrite)
        print(f"{path} (seed {seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
