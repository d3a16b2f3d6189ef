"""Trains a CLIP pair, with a tokenizer made from the captions.

Stages: `both` trains the towers together. Where time is short, a convolutional `teacher` finds the embeddings
first; then `text` fits the text tower to them, and `image` the image tower.
"""

import os
import sys

from kandinsky import CLIPImageEncoder, CLIPTextEncoder, cli, training_cli
from kandinsky.clip_training import (
    CLIPObjective,
    ConvEncoder,
    LossWeights,
    TowerObjective,
    image_encoder_of,
    load_image_encoder,
)
from kandinsky.config import CLIPImageConfig, CLIPTextConfig
from kandinsky.encoders import EncoderLayer
from kandinsky.prompts import PromptTokenizer
from kandinsky.repository import copy_folder
from kandinsky.training import initialize
from kandinsky.vocabulary import write_tokenizer

CAPTIONS = 3000  # that an endless data set's tokenizer is made from
STARTS = {  # what of --init each stage goes on with
    "both": ("image_encoder", "text_encoder", "tokenizer"),
    "teacher": ("teacher",),
    "text": ("text_encoder", "tokenizer"),
    "image": ("image_encoder",),
}
HEADS = ("caption_weight", "picture_weight", "scene_weight")
UNTRAINED = {  # which of these a stage leaves out
    "both": (),
    "teacher": ("caption_weight",),
    "text": HEADS,
    "image": HEADS,
}


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--stage", choices=("both", "teacher", "text", "image"), default="both", help="what learns"
    )
    parser.add_argument(
        "--dim", type=cli.whole(1), default=160, help="of the embeddings; also the text tower's width"
    )
    parser.add_argument("--text-layers", type=cli.whole(1), default=2, help="of the text tower")
    parser.add_argument("--image-width", type=cli.whole(1), default=160, help="of the image tower")
    parser.add_argument("--image-layers", type=cli.whole(1), default=4, help="of the image tower")
    parser.add_argument("--patch", type=cli.whole(1), default=8, help="side of a patch in pixels")
    parser.add_argument("--head-dim", type=cli.whole(1), default=32, help="width of an attention head")
    parser.add_argument("--caption-weight", type=cli.real(0), default=1.0, help="of the caption head's loss")
    parser.add_argument("--picture-weight", type=cli.real(0), default=10.0, help="of the picture head's loss")
    parser.add_argument(
        "--scene-weight", type=cli.real(0), default=1.0, help="of the scene head's loss; shapes only"
    )
    training_cli.add_training_flags(parser)
    sizes = ("dim", "text_layers", "image_width", "image_layers", "patch", "head_dim")
    args = training_cli.parse(parser, argv, sizes)
    cli.refuse(parser, argv, UNTRAINED[args.stage], f"a head that --stage {args.stage} does not train")
    if args.data is not None:
        cli.refuse(parser, argv, ("scene_weight",), "kandinsky.shapes; of --data no scene is known")
    return args


def make_tokenizer(args, data) -> PromptTokenizer:
    folder = args.out / "tokenizer"
    is_new = not (folder / "vocab.json").exists()
    has_one = args.init is not None and (args.init / "tokenizer").is_dir()
    if (is_new and has_one) or (args.init is not None and "tokenizer" in STARTS[args.stage]):
        copy_folder(args.init / "tokenizer", folder)
    elif is_new:
        count = CAPTIONS if args.data is None else len(data)
        write_tokenizer(data.captions(list(range(count))), folder)
    return PromptTokenizer.from_pretrained(folder)


def make_towers(args, vocab_size: int) -> tuple[CLIPImageEncoder, CLIPTextEncoder]:
    """From --init, from what an earlier stage left in --out, or new."""
    heads, mlp = args.dim // args.head_dim, 4 * args.dim
    text = CLIPTextConfig(vocab_size, 77, args.dim, args.text_layers, heads, mlp, args.dim)
    sizes = args.image_width, args.image_layers, args.image_width // args.head_dim, 4 * args.image_width
    image = CLIPImageConfig(args.size, args.patch, *sizes, args.dim)
    towers = []
    for name, network, config in (
        ("image_encoder", CLIPImageEncoder, image),
        ("text_encoder", CLIPTextEncoder, text),
    ):
        folder = (args.init or args.out) / name
        known = folder.is_dir() or (args.init is not None and name in STARTS[args.stage])
        towers.append(network.from_pretrained(folder) if known else initialize(network(config), args.seed))
    return tuple(towers)


def earlier_encoder(args) -> ConvEncoder | CLIPImageEncoder:
    """Whose embeddings are learnt: of a teacher in --out, else of --init, else of --out."""
    own = args.init is None or (args.out / "teacher").is_dir()
    folder = args.out if own else args.init
    if args.stage == "image" and not (folder / "teacher").is_dir():
        raise ValueError(f"--stage image needs a teacher to learn from, and {folder} has none")
    if not image_encoder_of(folder)[1].is_dir():
        raise ValueError(
            f"--stage text needs a teacher or an image tower to learn from, and {folder} has none"
        )
    return load_image_encoder(folder)


def check_width(args, earlier: ConvEncoder | CLIPImageEncoder, dim: int) -> None:
    """dim: of the embeddings of the tower that learns."""
    known = earlier.config.projection_dim
    if known != dim:
        what = f"--stage {args.stage} learns embeddings of {known} numbers, and its tower gives {dim}"
        raise ValueError(f"{what}; choose --dim {known}, or another --init")


def make_teacher(args, config: CLIPImageConfig) -> ConvEncoder:
    if args.init is not None:
        return ConvEncoder.from_pretrained(args.init / "teacher")
    return initialize(ConvEncoder(config), args.seed)


def check_batch(size: int, count: int) -> None:
    """Of a folder with so many pictures. A picture that is twice in a batch is its own negative: in every
    batch that is larger than the folder, in others at most where two rounds meet."""
    most = count // int(os.environ.get("WORLD_SIZE", 1))  # contrast is over all processes' batches
    if size > most:
        raise ValueError(f"--batch-size is {size}; contrast on these {count} pictures allows 1 to {most}")


def make_objective(args):
    data = training_cli.data_of(args)
    if args.data is not None and args.stage in ("both", "text"):
        check_batch(args.batch_size, len(data))
    fresh = training_cli.fresh_data_of(args, data)
    earlier = earlier_encoder(args) if args.stage in ("text", "image") else None
    tokenizer = make_tokenizer(args, data)
    image_encoder, text_encoder = make_towers(args, len(tokenizer))
    if earlier is not None:
        tower = image_encoder if args.stage == "image" else text_encoder
        check_width(args, earlier, tower.config.projection_dim)
    scene = args.scene_weight if args.data is None else 0.0
    if args.stage == "image":
        return TowerObjective(image_encoder, earlier, data, fresh)
    if args.stage == "text":
        weights, image_encoder = LossWeights(1, 0, 0, 0), earlier
    elif args.stage == "teacher":
        weights = LossWeights(0, 0, args.picture_weight, scene)
        image_encoder = make_teacher(args, image_encoder.config)
    else:
        weights = LossWeights(1, args.caption_weight, args.picture_weight, scene)
    frozen = args.stage == "text"
    return CLIPObjective(image_encoder, text_encoder, tokenizer, data, fresh, weights, frozen, args.seed)


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    training_cli.check_training_flags(args)
    for name, value in (("--dim", args.dim), ("--image-width", args.image_width)):
        if value % args.head_dim:
            raise ValueError(f"{name} is {value}; it must divide into heads of --head-dim, {args.head_dim}")
    if args.init is None and args.size % args.patch:
        raise ValueError(f"--size is {args.size}; it must divide into patches of --patch, {args.patch}")
    with_scenes = args.scene_weight > 0 and args.data is None
    if args.stage == "teacher" and not args.picture_weight and not with_scenes:
        what = "--stage teacher learns from --picture-weight, and of shapes from --scene-weight"
        raise ValueError(f"{what}; none of them is above 0")
    objective = make_objective(args)
    training_cli.train(objective, args, EncoderLayer, name=f"training-{args.stage}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
