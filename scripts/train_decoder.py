"""Trains a decoder: image embedding in, latents out. Writes a whole decoder repository around it.

`--task inpaint` and `--task hint` start from the text-to-image U-Net that --init names, its entrance widened.
`--lora RANK` writes a LoRA of --init's U-Net instead, unet-lora.safetensors. From an --init of 2.1 the U-Net
is trained on the captions too, read by the text tower in that folder.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from kandinsky import Kandinsky, MoVQ, UNet, cli, training_cli
from kandinsky.clip_training import clip_normalize, image_encoder_of, load_image_encoder
from kandinsky.config import UNetConfig
from kandinsky.datasets import Dataset, Samples, with_holes
from kandinsky.decoder_training import ROW, DecoderObjective, Painter, widen
from kandinsky.embedding_cache import Cache, build_cache, digest, encode_decoder_texts, tokenizer_digest
from kandinsky.encoders import MultilingualCLIP
from kandinsky.masks import keep_latents
from kandinsky.prompts import MultilingualTokenizer
from kandinsky.repository import decoder_scheduler, write_decoder_repository, write_decoder_repository_2_1
from kandinsky.scheduler_files import DECODER_SCHEDULERS, from_config
from kandinsky.schedulers import DDPMScheduler, NoiseScheduler
from kandinsky.training import initialize
from kandinsky.unet import AttentionBlock, ResnetBlock
from kandinsky.zero_image import zero_image_embeds

ENTRANCES = {"text2img": (4, False), "inpaint": (9, False), "hint": (8, True)}  # channels, hint network
HOLES = 8  # in each picture of a folder, for inpainting
ZERO = ("conv2", "to_out.0", "conv_out")  # what starts at zero, so that blocks start as the identity


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("--clip", type=Path, required=True, help="folder of the CLIP pair, or a prior's")
    parser.add_argument("--movq", type=Path, required=True, help="folder of the MoVQ, or of another decoder")
    parser.add_argument("--task", choices=tuple(ENTRANCES), default="text2img", help="what it is for")
    parser.add_argument(
        "--channels", type=cli.whole(1), nargs="+", default=[64, 96, 112], help="of the levels, finest first"
    )
    parser.add_argument("--layers", type=cli.whole(1), default=1, help="residual blocks a level")
    parser.add_argument("--head-dim", type=cli.whole(1), default=16, help="width of an attention head")
    parser.add_argument(
        "--context-dim", type=cli.whole(1), default=32, help="width of the image-prompt tokens"
    )
    parser.add_argument("--groups", type=cli.whole(1), default=16, help="of channels, in the norms")
    parser.add_argument("--bound", type=cli.real(0), default=1.0, help="weight of the variance's loss")
    parser.add_argument(
        "--embedding-noise", type=cli.real(0), default=0.0, help="added to the embeddings in training"
    )
    parser.add_argument(
        "--prior",
        type=Path,
        help="train on what this prior draws of the captions: the pictures' own embeddings leave hints and "
        "known pixels nothing to say",
    )
    parser.add_argument(
        "--samples",
        type=int,
        choices=range(0, 49, ROW),
        default=48,
        help="pictures of text2img, 2.2, to draw; 0: none",
    )
    parser.add_argument("--save-dtype", choices=cli.DTYPES, default="float16", help="of the written U-Net")
    training_cli.add_cache_flags(parser)
    training_cli.add_lora_flag(parser)
    training_cli.add_training_flags(parser, learning_rate=1e-3)
    args = training_cli.parse(parser, argv, ("channels", "layers", "head_dim", "context_dim", "groups"))
    if args.task != "text2img" or reads_text(args):
        cli.refuse(parser, argv, ("samples",), "text2img, 2.2")
    return args


def reads_text(args) -> bool:
    return args.init is not None and UNet.read_config(args.init / "unet").text


def draw_embeds(pipe: Kandinsky, seeds: Iterator[int], captions: list[str]) -> Tensor:
    """(b, d), each from a seed of its own."""
    return pipe.embed(captions, seed=list(islice(seeds, len(captions)))).image_embeds


def known_latents(movq: MoVQ, samples: Samples) -> Tensor:
    """What an inpainting U-Net reads beside the sample: latents and mask of what is kept, (b, 5, h, w)"""
    kept = keep_latents(samples.holes, movq.config.downscale).to(movq.device)
    return torch.cat([kept * movq.encode(samples.before.to(movq.device)), kept], dim=1)


def encode_data(args, data: Dataset, image_encoder, movq: MoVQ) -> Cache:
    device, texts, drawn, rng = movq.device, None, None, Random(args.seed)
    made_from = {"task": args.task, "image tower": digest(image_encoder), "bf16": args.bf16}
    made_from["MoVQ encoder"] = digest(movq.encoder, movq.quant_conv)
    if reads_text(args):
        text_encoder = MultilingualCLIP.from_pretrained(args.init / "text_encoder", device=device)
        tokenizer = MultilingualTokenizer.from_pretrained(args.init / "tokenizer")
        texts = partial(encode_decoder_texts, text_encoder, tokenizer)
        made_from["text tower"] = digest(text_encoder)
        made_from["tokenizer"] = tokenizer_digest(args.init / "tokenizer")

    def encode(samples) -> dict[str, Tensor]:
        pixels = samples.pixels.to(device)
        size = image_encoder.config.image_size
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            out = {
                "image_embeds": image_encoder(clip_normalize(pixels, size)),
                "latents": movq.encode(pixels),
            }
            if args.task == "inpaint":
                out["known"] = known_latents(movq, with_holes(samples, rng))
        if samples.hints is not None:
            out["hint"] = samples.hints
        if drawn is not None:
            out["image_embeds"] = drawn(samples.captions)
        if texts is not None:
            out |= texts(samples.captions)
        return {name: tensor.half() for name, tensor in out.items()}

    if args.prior is not None:
        pipe = Kandinsky.from_pretrained(args.init, args.prior, device)
        drawn = partial(draw_embeds, pipe, count(args.seed))
        made_from["prior"] = digest(pipe.prior, pipe.text_encoder)

    rounds = HOLES if args.task == "inpaint" else 1
    number = args.count if args.data is None else rounds * len(data)
    path = args.out / "training" / "latents.safetensors"
    given = data, number, path, encode, args.encode_batch, args.workers
    return build_cache(*given, seed=args.seed, made_from=made_from)


def is_for(config: UNetConfig, task: str) -> bool:
    return (config.in_channels, config.hint) == ENTRANCES[task]


def unet_config(args, embedding_dim: int, f: int) -> UNetConfig:
    """Of the U-Net that is trained: --init's with the task's entrance, or as the flags say."""
    if args.init is not None:
        in_channels, hint = ENTRANCES[args.task]
        return replace(UNet.read_config(args.init / "unet"), in_channels=in_channels, hint=hint)
    sizes = (tuple(args.channels), args.layers, args.head_dim, args.context_dim, embedding_dim, args.groups)
    return UNetConfig(4, 8, *sizes, sample_size=args.size // f)


def check_sizes(args) -> None:
    """What the networks can be built of, and what passes through them."""
    if args.init is None and (args.channels[0] % 2 or any(c % args.groups for c in args.channels)):
        given = f"--channels are {', '.join(map(str, args.channels))}"
        raise ValueError(f"{given}; multiples of --groups, {args.groups}, are needed, the first one even")
    f = MoVQ.read_config(args.movq / "movq").downscale
    multiple = f * unet_config(args, 1, f).downscale
    if args.size % multiple:
        raise ValueError(f"--size is {args.size}; this MoVQ and U-Net need a multiple of {multiple}")


def check_task(args) -> None:
    """Before any picture is encoded."""
    training_cli.check_lora_flag(args)
    training_cli.check_training_flags(args)
    training_cli.check_place(args, "prior")
    if args.task != "text2img" and args.init is None:
        raise ValueError(f"--task {args.task} needs --init, a text-to-image decoder to start from")
    if args.prior is not None and args.init is None:
        raise ValueError("--prior needs --init, a decoder that goes with it")
    if args.task == "hint" and reads_text(args):
        raise ValueError(f"{args.init} is of 2.1, which takes no hints")
    if args.init is not None:
        check_init(args)
    check_sizes(args)


def check_init(args) -> None:
    """The decoder that training starts from: what it is for, and whether it goes with the other flags."""
    known = UNet.read_config(args.init / "unet")
    if args.lora is not None and not is_for(known, args.task):
        what = f"--lora with --task {args.task} needs an --init of that task"
        raise ValueError(f"{what}, which {args.init} is not; train one first, without --lora")
    if not (is_for(known, "text2img") or is_for(known, args.task)):
        what = "a text-to-image decoder" + f", or one of {args.task}" * (args.task != "text2img")
        raise ValueError(f"{args.init} is of another task; --task {args.task} starts from {what}")
    image_encoder, place = image_encoder_of(args.clip)
    width = image_encoder.read_config(place).projection_dim
    if known.image_dim != width:
        what = f"--init's U-Net is for embeddings of {known.image_dim} numbers"
        raise ValueError(f"{what}, --clip's have {width}")


def make_scheduler(args) -> NoiseScheduler:
    """--init's, as the written decoder will have it; 2.1 is trained on another schedule than it draws by."""
    if reads_text(args):
        return DDPMScheduler(clip_sample=False)
    settings = decoder_scheduler(args.init, args.task == "inpaint")
    return from_config(settings, f"{args.init}/scheduler", DECODER_SCHEDULERS)


def make_unet(args, embedding_dim: int, f: int) -> UNet:
    if args.init is not None:
        known = UNet.from_pretrained(args.init / "unet", dtype=training_cli.lora_dtype(args))
        if is_for(known.config, args.task):
            return known
        return widen(known, initialize(UNet(unet_config(args, embedding_dim, f)), args.seed, ZERO))
    return initialize(UNet(unet_config(args, embedding_dim, f)), args.seed, ZERO)


@torch.no_grad()
def make_objective(args, scheduler: NoiseScheduler) -> DecoderObjective:
    device = training_cli.device_of(args)
    image_encoder, movq = (
        load_image_encoder(args.clip).to(device),
        MoVQ.from_pretrained(args.movq / "movq", device=device),
    )
    data = training_cli.data_of(args, hints=args.task == "hint")
    cache = encode_data(args, data, image_encoder, movq)
    unet = make_unet(args, cache["image_embeds"].shape[1], movq.config.downscale)
    training_cli.with_lora(unet, args)
    painter = None
    if args.samples and args.task == "text2img" and not unet.config.text:
        samples = next(iter(training_cli.fresh_data_of(args, data).values())).load(list(range(args.samples)))
        pixels = clip_normalize(samples.pixels.to(device), image_encoder.config.image_size)
        painter = Painter(movq, samples, image_encoder(pixels))
    return DecoderObjective(
        unet,
        scheduler,
        cache,
        zero_image_embeds(image_encoder),
        painter,
        args.bound,
        args.embedding_noise,
        getattr(torch, args.save_dtype),
    )


def write_around(args) -> None:
    """All of the repository but the U-Net; a LoRA has none."""
    if args.lora is not None:
        return
    if reads_text(args):
        write_decoder_repository_2_1(args.out, args.movq / "movq", args.init)
    else:
        of_task = {"inpaint": args.task == "inpaint", "hint": args.task == "hint"}
        settings = decoder_scheduler(args.init, of_task["inpaint"])
        write_decoder_repository(args.out, args.movq / "movq", settings, **of_task)


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    check_task(args)
    scheduler = make_scheduler(args)  # a file that is not modelled here is refused before anything is written
    objective = make_objective(args, scheduler)  # a cache may be refused: --out is then left as it is
    around = partial(write_around, args)
    training_cli.train(objective, args, ResnetBlock, AttentionBlock, write_around=around)
    return 0


if __name__ == "__main__":
    sys.exit(main())
