import pytest
import torch

from tests.small import write_checkpoints


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory):
    """A small random Kandinsky 2.2, as diffusers writes it; the prior lies beside it. Read only."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def restored_global_random_state():
    """No test depends on what another one drew."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)
