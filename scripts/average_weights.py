"""Averages the weights of networks that were trained from the same ones (arXiv:2203.05482).

Each FOLDER holds one network: config.json and one safetensors file.
"""

import sys
from pathlib import Path

import torch

from kandinsky import CheckpointError, cli
from kandinsky.checkpoint import open_safetensors, read_json, write_json, write_safetensors


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a network's, as mini-prior/prior; two or more",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in the dtypes of the first")
    parser.add_argument("--overwrite", action="store_true", help="replace the network that --out holds")
    return parser.parse_args(argv)


def read(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The name of the one safetensors file, and its tensors."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.name[0] != ".")  # no killed save's
    if len(files) != 1:
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files; one is needed")
    file = open_safetensors(files[0])
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    whole = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise CheckpointError(f"{files[0]} holds {whole[0]}, whole numbers, which have no mean")
    return files[0].name, tensors


def sizes(config: dict) -> dict:
    """Without what says where a file came from."""
    origin = ("transformers_version", "torch_dtype", "dtype")
    return {name: value for name, value in config.items() if name[0] != "_" and name not in origin}


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    first, *others = args.folders
    if not others:
        raise ValueError(f"only {first} is given; there is nothing to average it with")
    if args.out.resolve() in {folder.resolve() for folder in args.folders}:
        raise ValueError(f"--out {args.out} is one of the folders to average")
    if (args.out / "config.json").exists() and not args.overwrite:
        raise ValueError(f"--out {args.out} holds a network; --overwrite replaces it")
    config, (name, mean) = read_json(first / "config.json"), read(first)
    total = {key: tensor.float() for key, tensor in mean.items()}
    for folder in others:
        if sizes(read_json(folder / "config.json")) != sizes(config):
            raise CheckpointError(f"{folder} has another config.json than {first}")
        _, tensors = read(folder)
        if {key: x.shape for key, x in tensors.items()} != {key: x.shape for key, x in mean.items()}:
            raise CheckpointError(f"{folder} has other tensors than {first}")
        total = {key: x + tensors[key].float() for key, x in total.items()}
    averaged = {key: (x / len(args.folders)).to(mean[key].dtype) for key, x in total.items()}
    write_safetensors(averaged, args.out / name)
    write_json(config, args.out / "config.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
