"""The flags that the training scripts share, and what they stand for."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky import arguments, cli
from kandinsky.datasets import Dataset, Folder, Shapes
from kandinsky.lora import add_lora, train_only_lora
from kandinsky.shapes import OBJECT_WEIGHTS
from kandinsky.training import LEAST, Objective, Settings, Trainer, checkpoint_blocks, own_device, processes


def add_training_flags(parser: ArgumentParser, **defaults: Any) -> None:
    """defaults: of this script, where they differ from those of `Settings`."""
    settings = Settings(**defaults)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; goes on with what is there")
    parser.add_argument("--init", type=Path, help="folder whose weights to start from; default: from nothing")
    parser.add_argument("--data", type=Path, help="folder of captioned pictures; default: kandinsky.shapes")
    parser.add_argument(
        "--size", type=cli.whole(1), default=64, help="side of the training pictures in pixels"
    )
    parser.add_argument(
        "--object-weights",
        nargs=3,
        type=float,
        metavar=("ONE", "TWO", "THREE"),
        help="how often kandinsky.shapes draws one, two and three objects to train on, default: "
        f"{' '.join(map(str, OBJECT_WEIGHTS))}",
    )
    _add_optimizer_flags(parser, settings)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep less for the backward pass: less memory, a third more time",
    )
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="of data order, noise and first weights")
    save = "steps from one saving of the state, which a stopped run goes on from, to the next"
    parser.add_argument("--save-every", type=cli.whole(1), default=settings.save_every, help=save)
    sample = "steps from one measurement to the next; the networks are written then, and samples drawn"
    parser.add_argument("--sample-every", type=cli.whole(1), default=settings.sample_every, help=sample)
    parser.add_argument("--device", default="cpu", help="cpu, cuda …; under torchrun each process its own")


def _add_optimizer_flags(parser: ArgumentParser, settings: Settings) -> None:
    count, share = cli.whole(1), cli.real(0, 1)
    for name, kind, help in (
        ("steps", count, "updates in all"),
        ("batch_size", count, "samples at once, of each process"),
        ("accumulate", count, "batches added up for an update"),
        ("learning_rate", cli.real(0), "learning rate at its highest"),
        ("warmup", cli.whole(0), "steps in which the rate rises to that"),
        ("decay", share, "share of the steps, at the end, in which the rate falls to zero"),
        ("weight_decay", cli.real(0), "of matrices alone"),
        ("max_norm", cli.real(LEAST), "what a longer gradient is cut to"),
        ("ema", share, "share that the average which is written keeps of itself in a step"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=getattr(settings, name), help=help)


def add_cache_flags(parser: ArgumentParser) -> None:
    """How a data set is encoded, before training begins."""
    parser.add_argument(
        "--count",
        type=cli.whole(1),
        default=50_000,
        help="pictures of kandinsky.shapes to encode; of --data all",
    )
    parser.add_argument("--encode-batch", type=cli.whole(1), default=64, help="pictures to encode at once")
    parser.add_argument(
        "--workers", type=cli.whole(0), default=0, help="processes that read or draw what is encoded"
    )


def device_of(args: Namespace) -> torch.device:
    """Where this process computes: under torchrun each has a GPU of its own."""
    return arguments.device(own_device(args.device))


def parse(parser: ArgumentParser, argv: Sequence[str] | None, sizes: Iterable[str]) -> Namespace:
    """The flags, without those that --init, --data or --lora makes idle. sizes: those that shape a new
    network"""
    args = parser.parse_args(argv)
    if args.init is not None:
        cli.refuse(parser, argv, sizes, "a network from nothing; --init's has its own sizes")
    if args.data is not None and hasattr(args, "count"):
        cli.refuse(parser, argv, ("count",), "kandinsky.shapes; of --data all is encoded")
    if getattr(args, "lora", None) is not None:
        cli.refuse(parser, argv, ("save_dtype",), "a whole network; a LoRA is written in float32")
    return args


def check_training_flags(args: Namespace) -> None:
    """Before anything is read or written."""
    device_of(args)
    shapes_of(args)
    writes_over = args.init is not None and args.out.resolve() == args.init.resolve()
    if writes_over and getattr(args, "lora", None) is None:  # a LoRA lies beside what it changes
        what = f"--out {args.out} is --init, whose weights would be written over"
        raise ValueError(f"{what}; choose another --out")
    arguments.writable(args.out)


def check_place(args: Namespace, other: str) -> None:
    """other: the network by which --out is known as a repository of another kind"""
    if args.lora is None and (args.out / other / "config.json").exists():
        what = f"--out {args.out} has a {other}, whose scheduler and index would be written over"
        raise ValueError(f"{what}; choose another --out")


def add_lora_flag(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        type=cli.whole(1),
        metavar="RANK",
        help="train a LoRA of --init's network, which stays as it is (in bfloat16 with --bf16)",
    )


def check_lora_flag(args: Namespace) -> None:
    if args.lora is not None and args.init is None:
        raise ValueError("--lora needs --init, the folder of the network that the LoRA is for")


def lora_dtype(args: Namespace) -> torch.dtype:
    """What the frozen network under a LoRA is kept in."""
    return torch.bfloat16 if args.lora is not None and args.bf16 else torch.float32


def with_lora(network: nn.Module, args: Namespace) -> None:
    """Gives the network the LoRA that --lora asks for, and leaves nothing else to train."""
    if args.lora is not None:
        add_lora(network, args.lora, seed=args.seed)
        train_only_lora(network)


def settings_of(args: Namespace) -> Settings:
    return Settings(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        decay=args.decay,
        weight_decay=args.weight_decay,
        max_norm=args.max_norm,
        ema=args.ema,
        bf16=args.bf16,
        seed=args.seed,
        save_every=args.save_every,
        sample_every=args.sample_every,
    )


def shapes_of(args: Namespace, hints: bool = False) -> Shapes:
    if args.object_weights is not None and args.data is not None:
        raise ValueError("--object-weights is for kandinsky.shapes, and goes without --data")
    weights = tuple(map(float, args.object_weights or OBJECT_WEIGHTS))  # a cache tells 9 from 9.0
    return Shapes(args.seed, args.size, hints=hints, object_weights=weights)


def data_of(args: Namespace, hints: bool = False) -> Dataset:
    shapes = shapes_of(args, hints)
    if args.data is None:
        return shapes
    return Folder(args.data, args.size, hints, args.seed)


def fresh_data_of(args: Namespace, data: Dataset) -> dict[str, Dataset]:
    """What measurements are made on: shapes never trained on, or the folder's own pictures, `data`."""
    if args.data is not None:
        return {"own": data}
    other = args.seed + 1
    return {"seen": Shapes(other, args.size), "held_out": Shapes(other, args.size, "held_out")}


def train(
    objective: Objective,
    args: Namespace,
    *block_kinds: type[nn.Module],
    name: str = "training",
    write_around: Callable[[], None] | None = None,
) -> None:
    """Runs the training that the flags describe, in one process or in those that torchrun started.

    write_around: writes the files around the networks, after a state found in --out was accepted: where it
    is another training's, nothing is written.
    """
    if args.checkpointing:
        checkpoint_blocks(objective, *block_kinds)
    with processes(args.device) as device:
        trainer = Trainer(objective, settings_of(args), args.out, device, name)
        if write_around is not None:
            write_around()
        trainer.run()
