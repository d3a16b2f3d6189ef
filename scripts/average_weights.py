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
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="two or more")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in the dtypes of the first")
    return parser.parse_args(argv)


def read(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The name of the one safetensors file, and its tensors."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files; one is needed")
    file = open_safetensors(files[0])
    return files[0].name, {name: file.get_tensor(name) for name in file.keys()}


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    first, *others = args.folders
    if not others:
        raise ValueError(f"only {first} is given; there is nothing to average it with")
    config, (name, mean) = read_json(first / "config.json"), read(first)
    total = {key: tensor.float() for key, tensor in mean.items()}
    for folder in others:
        if read_json(folder / "config.json") != config:
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
