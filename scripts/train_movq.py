"""Trains a MoVQ, the autoencoder between pixels and latents."""

import sys

import torch

from kandinsky import MoVQ, cli, training_cli
from kandinsky.config import MoVQConfig
from kandinsky.movq import AttentionBlock, ResnetBlock
from kandinsky.movq_training import LEAST_SIDE, MoVQObjective
from kandinsky.training import initialize


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--channels", type=cli.whole(1), nargs="+", default=[32, 64, 64], help="of the levels, finest first"
    )
    parser.add_argument("--layers", type=cli.whole(1), default=1, help="residual blocks a level")
    parser.add_argument("--codes", type=cli.whole(1), default=1024, help="size of the codebook")
    parser.add_argument("--crop", type=cli.whole(1), help="train on crops of so many pixels, the busier ones")
    parser.add_argument(
        "--adversarial", type=cli.real(0), default=0.0, help="weight of a discriminator's judgement"
    )
    parser.add_argument(
        "--latent-noise", type=cli.real(0), default=0.1, help="added to latents before they are decoded"
    )
    parser.add_argument("--save-dtype", choices=cli.DTYPES, default="float32", help="of the written MoVQ")
    parser.add_argument(
        "--freeze-encoder", action="store_true", help="train what decodes of --init's, keep the latents"
    )
    training_cli.add_training_flags(parser, batch_size=16, learning_rate=1.5e-3)
    cli.needs(parser, argv, "freeze_encoder", "init")
    return training_cli.parse(parser, argv, ("channels", "layers", "codes"))


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    training_cli.check_training_flags(args)
    if args.init is not None:
        movq = MoVQ.from_pretrained(args.init / "movq")
    else:
        config = MoVQConfig(
            tuple(args.channels), args.layers, num_vq_embeddings=args.codes, norm_num_groups=16
        )
        movq = initialize(MoVQ(config), args.seed)
    if args.size % movq.config.downscale:
        raise ValueError(f"--size is {args.size}; this MoVQ needs a multiple of {movq.config.downscale}")
    if args.crop is not None and (args.crop > args.size or args.crop % movq.config.downscale):
        least = movq.config.downscale
        raise ValueError(f"--crop is {args.crop}; allowed are multiples of {least} up to --size, {args.size}")
    if args.adversarial and (args.crop or args.size) < LEAST_SIDE:
        seen = f"--size is {args.size}" if args.crop is None else f"--crop is {args.crop}"
        raise ValueError(f"{seen}; the discriminator of --adversarial needs {LEAST_SIDE} pixels and more")
    data = training_cli.data_of(args)
    fresh = next(iter(training_cli.fresh_data_of(args, data).values()))
    settings = {"adversarial": args.adversarial, "crop": args.crop, "frozen_encoder": args.freeze_encoder}
    settings |= {"latent_noise": args.latent_noise, "dtype": getattr(torch, args.save_dtype)}
    objective = MoVQObjective(movq, data, fresh, **settings)
    training_cli.train(objective, args, ResnetBlock, AttentionBlock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
