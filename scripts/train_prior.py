"""Trains a prior: text in, image embedding out. Writes a whole prior repository around it.

`--lora RANK` writes a LoRA of --init's prior instead, prior-lora.safetensors.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from kandinsky import Prior, cli, training_cli
from kandinsky.clip_training import clip_normalize, load_image_encoder
from kandinsky.config import PriorConfig
from kandinsky.datasets import Dataset
from kandinsky.embedding_cache import Cache, build_cache, digest, encode_texts, tokenizer_digest
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.prior import Block
from kandinsky.prior_training import PriorObjective, deepen
from kandinsky.prompts import PromptTokenizer
from kandinsky.repository import write_prior_repository
from kandinsky.schedulers import UnCLIPScheduler
from kandinsky.training import initialize


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--clip", type=Path, required=True, help="folder of the CLIP pair, or of another prior"
    )
    parser.add_argument("--heads", type=cli.whole(1), default=6, help="attention heads")
    parser.add_argument("--head-dim", type=cli.whole(1), default=32, help="width of a head")
    parser.add_argument("--layers", type=cli.whole(1), default=4, help="transformer layers")
    parser.add_argument("--save-dtype", choices=cli.DTYPES, default="float16", help="of the written prior")
    parser.add_argument(
        "--add-layers",
        type=cli.whole(0),
        default=0,
        help="to --init's prior, behind its own; they start as identity",
    )
    parser.add_argument(
        "--noises",
        type=cli.whole(1),
        default=4,
        help="for each caption, at timesteps spread over the schedule",
    )
    parser.add_argument(
        "--train-text",
        action="store_true",
        help="train the text tower too: what contrast taught it may not tell what belongs to what",
    )
    parser.add_argument(
        "--own-steps",
        type=cli.real(0, 1),
        default=0.0,
        help="share of the samples that a guided step of the prior's own leads to, as when it draws",
    )
    training_cli.add_cache_flags(parser)
    training_cli.add_lora_flag(parser)
    training_cli.add_training_flags(parser, learning_rate=1e-3)
    return training_cli.parse(parser, argv, ("heads", "head_dim", "layers"))


@torch.no_grad()
def encode_data(args) -> list[Cache]:
    """The caches of training and of fresh samples; a folder's own are both."""
    device = training_cli.device_of(args)
    image_encoder = load_image_encoder(args.clip).to(device)
    text_encoder = CLIPTextEncoder.from_pretrained(args.clip / "text_encoder", device=device)
    tokenizer = PromptTokenizer.from_pretrained(args.clip / "tokenizer")
    made_from = {"image tower": digest(image_encoder), "text tower": digest(text_encoder), "bf16": args.bf16}
    made_from["tokenizer"] = tokenizer_digest(args.clip / "tokenizer")
    unread = ("text tower",) if args.train_text else ()  # which reads the ids, and may change this very tower

    def encode(samples) -> dict:
        pixels = clip_normalize(samples.pixels.to(device), image_encoder.config.image_size)
        texts = encode_texts(text_encoder, tokenizer, samples.captions)
        with torch.autocast(image_encoder.device.type, torch.bfloat16, enabled=args.bf16):
            image_embeds = image_encoder(pixels)
        return {"image_embeds": image_embeds, **texts}

    def cache(name: str, samples: Dataset, count: int) -> Cache:
        path = args.out / "training" / f"embeddings-{name}.safetensors"
        given = samples, count, path, encode, args.encode_batch, args.workers
        return build_cache(*given, seed=args.seed, made_from=made_from, unread=unread)

    data = training_cli.data_of(args)
    if args.data is not None:
        return [cache("train", data, len(data))] * 2
    fresh = next(iter(training_cli.fresh_data_of(args, data).values()))
    return [cache("train", data, args.count), cache("fresh", fresh, 512)]


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    training_cli.check_lora_flag(args)
    training_cli.check_training_flags(args)
    training_cli.check_place(args, "unet")
    if args.add_layers and (args.init is None or args.lora is not None):
        raise ValueError("--add-layers adds to --init's prior, and goes without --lora")
    if args.lora is not None and args.train_text:
        raise ValueError("--lora leaves the networks as they are; --train-text goes without it")
    if args.init is None and args.heads * args.head_dim % 2:
        what = f"--heads times --head-dim is {args.heads * args.head_dim}"
        raise ValueError(f"{what}; an even number is needed")
    if args.init is not None:
        width = CLIPTextEncoder.read_config(args.clip / "text_encoder").projection_dim
        own = Prior.read_config(args.init / "prior").embedding_dim
        if own != width:
            raise ValueError(f"--init's prior is for embeddings of {own} numbers, --clip's have {width}")
    cache, fresh = encode_data(args)  # a cache may be refused: what lies in --out is then left as it is
    if args.init is not None:
        prior = Prior.from_pretrained(args.init / "prior", dtype=training_cli.lora_dtype(args))
        prior = deepen(prior, args.add_layers, args.seed) if args.add_layers else prior
    else:
        dim = cache["image_embeds"].shape[1]
        prior = initialize(Prior(PriorConfig(args.heads, args.head_dim, args.layers, dim)), args.seed)
    training_cli.with_lora(prior, args)
    text_encoder = None
    if args.train_text:
        folder = args.clip if args.init is None else args.init
        text_encoder = CLIPTextEncoder.from_pretrained(folder / "text_encoder")
    dtype = getattr(torch, args.save_dtype)
    given = (prior, UnCLIPScheduler(), cache, fresh, dtype, args.noises, text_encoder, args.own_steps)
    objective = PriorObjective(*given)
    if args.init is None:
        objective.normalize_by(cache)
    trained = ("text_encoder",) if args.train_text else ()
    write_around = partial(write_prior_repository, args.out, args.clip, trained)
    training_cli.train(objective, args, Block, write_around=write_around if args.lora is None else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
