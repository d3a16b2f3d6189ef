"""Draws a picture and writes one HTML page that tells how: tokens, prior, decoder, norms, time, settings."""

import sys
from pathlib import Path

import torch

from kandinsky import Kandinsky, cli, explain, images, metadata
from kandinsky.checkpoint import atomic_file
from kandinsky.page import page

PICTURES = ("image", "mask", "hint")


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("prompt", help="what to draw")
    mask = "with --image: repaint where it is white (inpaint)"
    hint = "depth map, near is white; takes a checkpoint for hints"
    cli.add_picture_flags(parser, image="start from this picture (img2img)", mask=mask, hint=hint)
    parser.add_argument("--strength", type=float, help="of img2img, 0 to 1")
    cli.add_loop_flags(parser)
    cli.add_size_flags(parser, "the picture's own, without --image the checkpoint's")
    cli.add_model_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("run.html"), help="page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it is there")
    args = parser.parse_args(argv)
    cli.needs(parser, argv, "lora_scale", "lora")
    for name in PICTURES:
        paths = getattr(args, name) or [None]
        if len(paths) > 1:
            parser.error(f"--{name} is given {len(paths)} times; a page follows one picture")
        setattr(args, name, paths[0])
    return args


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    images.check_writable(args.out, {".html": "HTML"})
    if args.mask is not None and args.image is None:
        raise ValueError("--mask needs --image, the picture to repaint")
    if args.strength is not None and (args.image is None or args.mask is not None):
        raise ValueError("--strength is of img2img: it goes with --image, and without --mask")
    if args.hint is not None and args.mask is not None:
        raise ValueError("give --hint or --mask, not both")
    task = "inpaint" if args.mask is not None else "img2img" if args.image is not None else "text2img"
    files = {"image": args.image, "mask_image": args.mask, "hint": args.hint}
    call = {name: images.open_image(path) for name, path in files.items() if path is not None}
    call |= {n: getattr(args, n) for n in ("height", "width", "strength") if getattr(args, n) is not None}
    folder = cli.decoder_folder(args.weights, cli.decoder_kind(task, args.hint is not None))
    dtype = getattr(torch, args.dtype)
    pipe = Kandinsky.from_pretrained(folder, args.prior, args.device, dtype, not args.low_memory)
    for path in args.lora or []:
        pipe.load_lora(path, args.lora_scale)
    if args.optimize:
        pipe.optimize()
    steps = {"prior_num_inference_steps": args.prior_steps, "num_inference_steps": args.steps}
    steps |= {n: getattr(args, n) for n in ("guidance_scale", "prior_guidance_scale", "sampler")}
    found = explain.trace(pipe, args.prompt, task, args.seed, args.negative_prompt, **steps, **call)
    found.settings |= {name: path.name for name, path in files.items() if path is not None}
    found.settings |= {f"lora {path.name}": args.lora_scale for path in args.lora or []}
    found.settings |= {"weights": folder.name, "prior": pipe.need_prior().name, "dtype": args.dtype}
    found.settings |= {"device": str(pipe.device), "optimized": args.optimize}
    found.settings["sampler"] = metadata.sampler_name(pipe, args.sampler)

    def write(path: Path) -> None:
        with atomic_file(path, args.overwrite) as temporary:
            temporary.write_text(page(found), encoding="utf-8")

    path = cli.write_free(args.out, args.overwrite, write)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB, seed {found.settings['seed']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
