"""The published checkpoint layout: strict reading, atomic writing, and the mixin that every network inherits.

A network's folder holds `config.json` and one safetensors file, or several with an index. Parameter paths in
the file are the attribute paths of our modules, so nothing is renamed: a missing, extra or misshapen tensor
is an error that lists them. Models are built on the meta device and handed the file's tensors, so weights
exist once in memory.
"""

import glob
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kandinsky import arguments
from kandinsky.config import CheckpointError, read_config

# what weights may be, and how a safetensors file names it
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Model = TypeVar("Model", bound="Pretrained")


@contextmanager
def atomic_file(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`: synced and renamed at the end, removed when the block fails. Without
    overwrite a FileExistsError, also where another process has written `path` in the meantime."""
    path = Path(path)
    if not overwrite:
        _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    around = _around(path)
    with NamedTemporaryFile(dir=path.parent, prefix=around[0], suffix=around[1], delete=False) as file:
        temporary = Path(file.name)
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a temporary file starts private to its owner
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_to_free(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_free(temporary: Path, path: Path) -> None:
    """Renames where no other process has taken the name: a FileExistsError there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        _check_free(path)
        os.replace(temporary, path)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another name or allow overwriting")


def _around(path: Path) -> tuple[str, str]:
    """How the names of a path's temporaries begin and end; a file's name has 255 bytes at most."""
    return f".{path.stem[:20]}.", path.suffix


def temporaries(path: Path) -> list[Path]:
    """What writers of `path` that were killed have left beside it, or are about to rename."""
    start, end = map(glob.escape, _around(Path(path)))
    return list(Path(path).parent.glob(f"{start}*{end}"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a missing file or anything but an object is a CheckpointError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; a file is needed") from None
    except (ValueError, RecursionError) as error:  # also numbers too long, or lists too deep, to be read
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def write_json(fields: dict[str, Any], path: Path) -> None:
    """Writes a JSON object atomically, keys sorted as in the published files."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors atomically, with the header metadata of the published files. Tensors may share memory;
    in the file each has its own. Raises an OSError."""
    with atomic_file(path) as temporary:
        tensors, seen = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, set()
        for name, tensor in tensors.items():
            memory = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if memory in seen else tensor
            seen.add(memory)
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # the disk is full, the folder is not to be written to …
            raise OSError(f"{path} was not written: {error}") from error


def open_safetensors(path: Path, device: str | torch.device = "cpu", if_torn: str = "fetch it again") -> Any:
    """Opens a safetensors file to be read tensor by tensor; memory stays the file's own until written to.

    if_torn: what to do about one that is cut short or garbage, for the error.

    Raises:
        CheckpointError: a missing, truncated or garbage file, or a pickle under a wrong name.
    """
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no such file: {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    except SafetensorError as error:
        if is_pickle(path):
            message = f"{path} is a pickle, which is never loaded here; {_how_to_convert(path)}"
            raise CheckpointError(message) from None
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); {if_torn}") from None


def is_pickle(path: Path) -> bool:
    """torch's zip archive, or a bare pickle. A pickle begins with 0x80; the length in front of a safetensors
    header may too, but then `{` is the ninth byte."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head.startswith(b"PK\x03\x04") or (head.startswith(b"\x80") and head[8:] != b"{")


def _how_to_convert(path: Path, out: Path | None = None) -> str:
    given = shlex.quote(str(path)) + ("" if out is None else f" --out {shlex.quote(str(out))}")
    return f"`scripts/download_weights.py --convert {given}` makes a safetensors file of it"


def _shards(index: Path) -> list[Path]:
    """The files that a network's index names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) for f in shards.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    outside = sorted(f for f in set(shards.values()) if Path(f).name != f)
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {', '.join(outside)}")
    return [index.parent / shard for shard in sorted(set(shards.values()))]


def remove_pieces(folder: Path, name: str) -> None:
    """Of a network that was saved there in several files, which diffusers would go on to read."""
    index = folder / f"{name}.index.json"
    if not index.exists():
        return
    try:
        shards = [path for path in _shards(index) if path.suffix == ".safetensors" and path.name != name]
    except CheckpointError:
        shards = []  # an index that names nothing
    for path in (index, *shards):
        path.unlink(missing_ok=True)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a network: `name`, or the shards that `name`.index.json lists. Both are an
    error: libraries differ in which they read."""
    single, index = folder / name, folder / f"{name}.index.json"
    if single.exists() and index.exists():
        both = f"{folder} holds {name} and {index.name}: two sets of weights"
        raise CheckpointError(f"{both}; remove the one that is not meant")
    if single.exists():
        return [single]
    if index.exists():
        return _shards(index)
    raise CheckpointError(f"no such file: {single}{_in_its_place(folder, name)}")


def _in_its_place(folder: Path, name: str) -> str:
    """What lies in a folder without the weights `name`, and what makes them of it."""

    def there(*endings: str) -> list[str]:
        return sorted(path.name for ending in endings for path in folder.glob(f"*{ending}"))

    indices, others = there(".safetensors.index*.json"), there(".safetensors")
    pickles = there(".bin", ".ckpt", ".pt", ".pth")
    if pickles:  # a file of another name beside them is of something else, as a LoRA
        others = [other for other in others if other.split(".")[0] == pickles[0].split(".")[0]]
    first = (others or pickles or [""])[0]
    is_piece = re.search(r"-\d+-of-\d+\.", first) is not None
    if indices:  # a variant's, .fp16
        return f"; there is {indices[0]}: give it the name {name}.index.json"
    if others and is_piece:
        return f"; there are pieces, as {first}: fetch {name}.index.json, which lists them"
    if others:
        return f"; there is {', '.join(others)}: give it that name"
    if pickles and is_piece:
        return f"; there are pickled pieces, as {first}: diffusers or transformers can read and save them"
    return f"; there is only the pickle {first}; {_how_to_convert(folder / first, folder)}" if pickles else ""


def check_tensors(
    expected: dict[str, Tensor], found: dict[str, tuple[tuple[int, ...], str]], message: str
) -> None:
    """found: shape and kind, as FLOATS names it, by name. A tensor that is missing, extra, misshapen or of
    another kind is a CheckpointError that begins with `message` and lists them."""
    problems = [f"missing {name} {tuple(t.shape)}" for name, t in expected.items() if name not in found]
    problems += [f"extra {name} {shape}" for name, (shape, _) in found.items() if name not in expected]
    for name, (shape, kind) in found.items():
        if name in expected and shape != tuple(expected[name].shape):
            problems.append(f"{name} is {shape}, needs {tuple(expected[name].shape)}")
        elif name in expected and kind not in FLOATS.values():
            problems.append(f"{name} holds {kind}, needs one of {', '.join(FLOATS.values())}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{message}: {shown}")


def find_tensors(
    files: list[Path], expected: dict[str, Tensor], device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The open file that holds each of the expected tensors; reads headers only.

    Args:
        files: the shards.
        expected: names and shapes, for example a state dict on the meta device.

    Raises:
        CheckpointError: lists every tensor that is missing, extra, misshapen or not floating point. Only the
            stale integer `position_ids` of old transformers files are dropped.
    """
    found, places = {}, {}
    for path, handle in [(path, open_safetensors(path, device)) for path in files]:
        for name in handle.keys():
            piece = handle.get_slice(name)
            if name.endswith(".position_ids") and piece.get_dtype() not in FLOATS.values():
                continue
            if name in found:
                raise CheckpointError(f"{name} is in two files, {path} and another")
            found[name], places[name] = (tuple(piece.get_shape()), piece.get_dtype()), handle
    check_tensors(expected, found, f"{files[0]} does not fit its config")
    return places


def check_finite(model: nn.Module) -> None:
    """Raises a CheckpointError that lists the parameters with NaN or infinite values."""
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"non-finite weights in {', '.join(bad[:8])}" + (" and more" if len(bad) > 8 else "")
        )


class _WithoutValues(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def skeleton() -> Iterator[None]:
    """Networks made in it have shapes but no memory, and are not filled with first values. To fill an
    embedding that has no memory, PyTorch would first import its compiler: two seconds."""
    with torch.device("meta"), _WithoutValues():
        yield


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made in it are ordinary ones, also under `torch.inference_mode`, whose own cannot be changed or
    trained outside of it."""
    with torch.inference_mode(False), torch.no_grad():  # the first alone would switch gradients on
        yield


class LeftOut(nn.Module):
    """In place of what a network was read without."""

    def forward(self, *given: Any, **more: Any) -> None:
        raise RuntimeError("this network was read without what is called here; read the whole, then call it")


def _leave_out(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Takes attributes off a network, and says which."""
    if not isinstance(names, (str, tuple, list)):
        raise TypeError(f"without is {names!r}; names of attributes are needed")
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in names:
        arguments.choice(name, "without", tuple(model._modules))
        setattr(model, name, LeftOut())
    return names


# networks without memory that a check has made, one of a class and config, for the reading that follows: to
# make one takes some 50 ms
_checked: dict[tuple[type, str], nn.Module] = {}


class Pretrained:
    """`from_pretrained` and `save_pretrained`; a subclass names its config class and weights file."""

    config_class: type
    weights_name = "diffusion_pytorch_model.safetensors"
    left_out: tuple[str, ...] = ()  # attributes that this network was read without

    @classmethod
    def read_config(cls, folder: str | Path) -> Any:
        """The config of a folder in the published layout, without its weights."""
        path = Path(folder) / "config.json"
        if arguments.is_hub_id(folder):
            arguments.folder(folder, cls.__name__)  # which says so
        if not path.exists():
            raise CheckpointError(
                f"{folder} is not a checkpoint folder of {cls.__name__}: no config.json in it"
            )
        return read_config(cls.config_class, read_json(path), str(path))

    @classmethod
    @arguments.with_argument_help
    @lasting()
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        finite: bool = False,
        without: tuple[str, ...] = (),
    ) -> Model:
        """Reads a network in the published layout, in eval mode.

        Args:
            folder: holds `config.json` and the safetensors weights.
            dtype: of the weights in memory.
            finite: also check that no weight is NaN or infinite (reads every byte).
            without: attributes that are left out, for a network that is called in part; their weights are
                not read. `MoVQ.from_pretrained(folder, without=movq.TO_ENCODE)` only decodes.

        Raises:
            CheckpointError: the folder is not such a checkpoint, or its tensors do not fit its config.
            ValueError: a dtype or device that cannot be used, or no such attribute.
        """
        device, dtype = arguments.device(device), arguments.dtype(dtype)
        model, places = cls._find(folder, device)
        model.left_out = _leave_out(model, without)
        # cast one by one: the file's and the wanted dtype are never both in memory as a whole
        tensors = {name: places[name].get_tensor(name).to(dtype) for name in model.state_dict()}
        model.load_state_dict(tensors, strict=True, assign=True)
        if finite:
            check_finite(model)
        return model.eval()

    @classmethod
    def check_pretrained(cls, folder: str | Path) -> None:
        """Raises what `from_pretrained` would of files that do not fit; reads headers only."""
        model, _ = cls._find(folder)
        _checked[cls, repr(model.config)] = model

    @classmethod
    def _find(cls: type[Model], folder: str | Path, device: str | torch.device = "cpu") -> tuple[Model, dict]:
        """The network without memory, and where each of its tensors lies."""
        config = cls.read_config(folder)
        model = _checked.pop((cls, repr(config)), None)
        if model is None:
            with skeleton():
                model = cls(config)
        return model, find_tensors(weight_files(Path(folder), cls.weights_name), model.state_dict(), device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the published layout, which diffusers and transformers load; never half a file.

        Raises:
            CheckpointError: something was added to the network, taken from it or left out of it, or has
                another shape or no floating-point dtype, so that the file could not be read again.
        """
        if self.left_out:
            what = f"{type(self).__name__} was read without {', '.join(self.left_out)}"
            raise CheckpointError(f"this {what}; read the whole network, then save")
        with skeleton():
            own = type(self)(self.config).state_dict()
        tensors = self.state_dict()
        found = {name: (tuple(t.shape), FLOATS.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
        what = f"this {type(self).__name__} does not fit its config"
        check_tensors(own, found, f"{what}; merge or undo what was changed, then save")
        write_safetensors(tensors, Path(folder) / self.weights_name)
        write_json(self.config.published(), Path(folder) / "config.json")
        remove_pieces(Path(folder), self.weights_name)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
