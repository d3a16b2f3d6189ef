import sys
from pathlib import Path

import pytest
import torch

from kandinsky import Kandinsky, random_weights
from tests.small import write_checkpoints

sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # where a script finds what scripts share


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """Every repository of 2.2 and 2.1 with small random weights. Read only."""
    out = tmp_path_factory.mktemp("random")
    for model, (repositories, _) in random_weights.MODELS.items():
        random_weights.make(out, "small", tuple(repositories), say=lambda line: None, model=model)
    return out


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory):
    """A small random Kandinsky 2.2, as diffusers writes it; the prior lies beside it. Read only."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def inpaint_folder(tmp_path_factory):
    """As `decoder_folder`, with the nine channels of inpainting."""
    return write_checkpoints(tmp_path_factory.mktemp("inpaint"), in_channels=9)


@pytest.fixture(scope="session")
def hint_folder(tmp_path_factory):
    """As `decoder_folder`, with a hint network."""
    return write_checkpoints(tmp_path_factory.mktemp("hint"), in_channels=8, hint=True)


@pytest.fixture
def pipe(decoder_folder) -> Kandinsky:
    return Kandinsky.from_pretrained(decoder_folder)


@pytest.fixture
def inpainter(inpaint_folder) -> Kandinsky:
    return Kandinsky.from_pretrained(inpaint_folder)


@pytest.fixture
def hinted(hint_folder) -> Kandinsky:
    return Kandinsky.from_pretrained(hint_folder)


@pytest.fixture(autouse=True)
def restored_global_random_state():
    """No test depends on what another one drew."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
