"""The least time that a network's work can take on this machine, of which `benchmark.py` states shares.

For each matrix product, convolution and attention: the longer of its operations at the machine's highest
rate, and of moving its weights, inputs and result once. A group norm adds a reading, for its statistics.
It is counted on our plain network, whatever runs: merged upsampling and Winograd may go below.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
NORMS = (aten.native_group_norm,)
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu


class Work(TorchDispatchMode):
    """Notes operations and bytes of each layer that runs in the block."""

    def __init__(self):
        super().__init__()
        self.layers: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is ON_CPU:
            self._note(sdpa_flop_count(*(x.shape for x in args[:3])), args, out)
        elif packet in flop_registry:
            self._note(flop_registry[packet](*args, **(kwargs or {}), out_val=out), args, out)
        elif packet in NORMS:
            self.layers.append((0, args[0].nbytes))
        return out

    def _note(self, flop: int, args: tuple, out: Any) -> None:
        first = out[0] if isinstance(out, (tuple, list)) else out
        self.layers.append((flop, sum(x.nbytes for x in (*args, first) if isinstance(x, Tensor))))

    def seconds(self, peak: float, bandwidth: float) -> float:
        """peak: operations a second; bandwidth: bytes a second"""
        return sum(max(flop / peak, size / bandwidth) for flop, size in self.layers)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The highest rates seen: of a large matrix product, and of copying, reading and writing both counted."""
    n, numbers = (8192, 2**29) if device.type == "cuda" else (1536, 2**26)
    # of ones or zeros a GPU makes a tenth more: they take less power
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x = torch.ones(numbers, device=device)
    y = torch.empty_like(x)
    return {
        "flop_per_second": 2 * n**3 / fastest(lambda: a @ b, device),
        "bytes_per_second": 2 * x.nbytes / fastest(lambda: y.copy_(x), device),
    }


def fastest(call: Callable[[], Any], device: torch.device, runs: int = 7, calls: int = 1) -> float:
    """Seconds of a call. calls: made before the device is waited for, for those as short as a launch."""
    seconds = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
