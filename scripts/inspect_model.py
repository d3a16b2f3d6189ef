"""Shows a network's architecture as a tree: shapes, parameters, operations and outputs. Needs no weights.

NAME is prior, unet, inpaint, hint, movq, text_encoder or image_encoder of the released 2.2, or one of 2.1's:
unet-2.1, inpaint-2.1, decoder_text_encoder-2.1, prior-2.1, text_encoder-2.1, image_encoder-2.1 (its MoVQ is
2.2's); or give a folder: one network's, or a whole repository's.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kandinsky import MoVQ, Prior, UNet, cli, random_weights
from kandinsky.checkpoint import read_json, skeleton
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP

SIZES, SIZES_2_1 = random_weights.SIZES["released"], random_weights.SIZES_2_1["released"]
RELEASED = {  # name: (class, config)
    "prior": (Prior, SIZES.prior),
    "unet": (UNet, SIZES.unet),
    "inpaint": (UNet, SIZES.inpaint),
    "hint": (UNet, SIZES.hint),
    "movq": (MoVQ, SIZES.movq),
    "text_encoder": (CLIPTextEncoder, SIZES.text_encoder),
    "image_encoder": (CLIPImageEncoder, SIZES.image_encoder),
    "unet-2.1": (UNet, SIZES_2_1.unet),
    "inpaint-2.1": (UNet, SIZES_2_1.inpaint),
    "decoder_text_encoder-2.1": (MultilingualCLIP, SIZES_2_1.decoder_text_encoder),
    "prior-2.1": (Prior, SIZES_2_1.prior),
    "text_encoder-2.1": (CLIPTextEncoder, SIZES_2_1.text_encoder),
    "image_encoder-2.1": (CLIPImageEncoder, SIZES_2_1.image_encoder),
}
KINDS = {  # what a config.json calls itself
    "PriorTransformer": Prior,
    "UNet2DConditionModel": UNet,
    "VQModel": MoVQ,
    "clip_text_model": CLIPTextEncoder,
    "clip_vision_model": CLIPImageEncoder,
    "xlm-roberta": MultilingualCLIP,
    "M-CLIP": MultilingualCLIP,
}


@dataclass
class Line:
    """A module: what it holds with all that is in it, and what one call of the network makes of it."""

    name: str
    kind: str
    shapes: dict[str, list[int]] = field(default_factory=dict)  # of its own parameters
    parameters: int = 0
    flops: int = 0  # as torch's counter has them: a multiplication and an addition are two
    output: list[int] | None = None  # the shape of its first result


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("what", metavar="NAME|FOLDER", help="see above")
    parser.add_argument(
        "--pixels",
        type=int,
        default=512,
        help="side of the picture, for the operations and outputs of U-Net and MoVQ",
    )
    parser.add_argument("--depth", type=int, help="levels of the tree; default: all")
    parser.add_argument("--match", default="*", help="only modules whose name matches; * stands for any part")
    parser.add_argument("--json", action="store_true", help="print JSON, a list of modules for each network")
    args = parser.parse_args(argv)
    if args.pixels < 1 or (args.depth is not None and args.depth < 0):
        parser.error("--pixels is at least 1, --depth at least 0")
    return args


def networks_of(what: str) -> dict[str, nn.Module]:
    """On the meta device: shapes without memory."""
    found = {what: RELEASED[what]} if what in RELEASED else read_folder(Path(what))
    with skeleton():
        return {name: network(config) for name, (network, config) in found.items()}


def read_folder(folder: Path) -> dict[str, tuple[type, Any]]:
    """Of one network, or of each in a repository that is known; the others are named on stderr."""
    places = [folder] if (folder / "config.json").exists() else sorted(folder.glob("*/config.json"))
    places = [place if place == folder else place.parent for place in places]
    found, unknown = {}, []
    for place in places:
        config = read_json(place / "config.json")
        kind = config.get("_class_name") or config.get("model_type")
        if kind in KINDS:
            found[place.name] = KINDS[kind], KINDS[kind].read_config(place)
        else:
            unknown.append(f"{place / 'config.json'} is of a {kind}; known are {', '.join(KINDS)}")
    if not places:
        raise ValueError(f"{folder} is neither a folder with a config.json nor one of {', '.join(RELEASED)}")
    if not found:
        raise ValueError(unknown[0])
    for line in unknown:
        print(f"left out: {line}", file=sys.stderr)
    return found


def run(model: nn.Module, pixels: int) -> Any:
    """One call of one row, on meta tensors."""
    config, rand = model.config, lambda *shape: torch.empty(shape, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    if isinstance(model, Prior):
        n, d = config.num_embeddings, config.embedding_dim
        return model(rand(1, d), t, rand(1, d), rand(1, n, d), torch.ones(1, n, device="meta").bool())
    if isinstance(model, UNet):
        f = config.downscale  # MoVQ's, which has as many levels
        side = -(-pixels // f**2) * f
        hint = rand(1, 3, 8 * side, 8 * side) if config.hint else None
        channels = 4 if config.hint else config.in_channels
        texts = {}
        if config.text:
            texts = {
                "text_embeds": rand(1, config.image_dim),
                "text_states": rand(1, 77, config.embedding_dim),
            }
        return model(rand(1, channels, side, side), t, rand(1, config.image_dim), hint, **texts)
    if isinstance(model, MoVQ):
        side = -(-pixels // config.downscale) * config.downscale
        return model.decode(model.encode(rand(1, 3, side, side)))
    if isinstance(model, (CLIPTextEncoder, MultilingualCLIP)):
        return model(torch.zeros(1, 77, dtype=torch.long, device="meta"))
    return model(rand(1, 3, config.image_size, config.image_size))


@torch.no_grad()
def inspect(model: nn.Module, pixels: int) -> list[Line]:
    """Every module, the network itself first, in the order of its tree."""
    lines = {
        name: Line(
            name,
            type(module).__name__,
            {n: list(p.shape) for n, p in module.named_parameters(recurse=False)},
            sum(p.numel() for p in module.parameters()),
        )
        for name, module in model.named_modules()
    }
    counter, running, counted = FlopCounterMode(display=False), [""], 0

    def settle() -> None:
        """Gives what was computed since the last time to the innermost module that runs."""
        nonlocal counted
        lines[running[-1]].flops += counter.get_total_flops() - counted
        counted = counter.get_total_flops()

    def start(name: str) -> None:
        settle()
        running.append(name)

    def end(name: str, out: Any) -> None:
        settle()
        running.pop()
        while isinstance(out, (tuple, list)):
            out = out[0]
        lines[name].output = list(out.shape) if isinstance(out, Tensor) else None

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: start(name)))
        hooks.append(module.register_forward_hook(lambda module, args, out, name=name: end(name, out)))
    with counter:
        run(model, pixels)
        settle()
    for hook in hooks:
        hook.remove()
    for name in reversed(lines):  # whoever calls a module, its work is that of the modules it lies in
        if name:
            lines[name.rpartition(".")[0]].flops += lines[name].flops
    return list(lines.values())


def shown(lines: list[Line], depth: int | None, match: str) -> list[Line]:
    def level(line: Line) -> int:
        return line.name.count(".") + 1 if line.name else 0

    return [
        line
        for line in lines
        if (depth is None or level(line) <= depth) and (fnmatchcase(line.name, match) or match == "*")
    ]


def as_text(line: Line) -> str:
    indent = "  " * (line.name.count(".") + 1 if line.name else 0)
    label = f"{indent}{line.name.rpartition('.')[2]} {line.kind}".rstrip()
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in line.shapes.items())
    output = "" if line.output is None else "→ " + "×".join(map(str, line.output))
    return (
        f"{label:<52} {line.parameters:>14,} {line.flops / 1e9:>10,.2f} GFLOP  {output:<20} {shapes}".rstrip()
    )


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    models = networks_of(args.what)
    results = {
        name: shown(inspect(model, args.pixels), args.depth, args.match) for name, model in models.items()
    }
    if not any(results.values()):
        raise ValueError(f"no module of {args.what} is called {args.match!r} within that depth")
    if args.json:
        print(json.dumps({name: [asdict(line) for line in lines] for name, lines in results.items()}))
        return 0
    for name, lines in results.items():
        at = f" at {args.pixels} px" if isinstance(models[name], (UNet, MoVQ)) else ""
        print(f"{name}: parameters, operations and outputs of one row{at}")
        print("\n".join(map(as_text, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
