"""Rewrites a loaded network in place so that it runs faster; `restore` undoes it to the last bit.

    pipe.optimize()      # each network, now or when it is read
    optimize(unet)       # one network

A layer or block stays the same object at the same path, with the same hooks; only its class changes, to one
whose forward computes the same from another order of the work. Saving, copying and LoRAs go on working. It is
for drawing: only under `torch.no_grad` do the fast forms run, and gradients reach inputs and LoRAs, not the
network's own weights. Each rewrite is exact up to the rounding of sums:

    packed weights      linear and convolution weights in oneDNN's order (`kandinsky.packed`; CPU); a
                        convolution's at its first call, and again for maps that ask for another order; the
                        prior's, which meet few rows at a time, in that of 1×1 convolutions (AVX2, float32)
    merged upsampling   doubling by nearest neighbour and the 3×3 convolution behind it as one
                        (`kandinsky.upsampling`)
    low spatial norm    MoVQ's scale and shift, 1×1 convolutions of the enlarged latent, made at its own size;
                        they overwrite the norm's result
    row bands           MoVQ's maps of more than 64 M numbers, on a GPU 256 M, go through norm and convolution
                        in bands (`kandinsky.bands`): no further map of that size for each norm; for smaller
                        ones SiLU and the skip connection's sum overwrite what they read
                        (`kandinsky.overwriting`)
    chunked attention   MoVQ's head, as wide as the map, is too wide for fast fused kernels; rows in chunks,
                        without `layers.attention`
    winograd            wide 3×3 convolutions with a quarter of the multiplications (`kandinsky.winograd`;
                        float32, CPU), of layers with packed weights; their weights are kept twice, the second
                        time four times as large
    channels last       maps and convolution weights in NHWC order, as tensor cores read them (CUDA)
    fused norms         group norm, scale, shift and SiLU in Triton kernels (`kandinsky.fused`; CUDA)
    compiled blocks     each block under `torch.compile`; the first call waits for the compiler
    cuda graph          a step of U-Net or prior as one launch, and MoVQ's decoding of a picture of 512 px, or
                        of two, from the second time on (`kandinsky.graphs`; CUDA); the memory of a step and
                        of a decoding stays taken

A rewrite marked CPU or CUDA leaves networks on other devices as they are. Compiled blocks are asked for by
name or with `compile=True`, for the compiler's wait. Packed weights and Winograd do not go with them, and
those for CUDA are left to the compiler, which orders and fuses on its own; a step is then not one launch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kandinsky import bands, fused, graphs, movq, overwriting, prior, unet, winograd
from kandinsky.checkpoint import lasting
from kandinsky.packed import Packed, Placeholder, pack
from kandinsky.upsampling import (
    FusedMergedUpResnetBlock,
    Merged,
    MergedUpResnetBlock,
    MergedUpsample,
    MergedUpsampling,
    conv_of,
)

QUERIES = 1024  # rows of the attention matrix at a time


class LowSpatialNorm(movq.SpatialNorm):
    """Scale and shift at the latent's size, spread over the squares of pixels that share them."""

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        h, w = zq.shape[-2:]
        if x.shape[-2] % h or x.shape[-1] % w:
            return super().forward(x, zq)
        normed = self.norm_layer(x)
        squares = rearrange(normed, "b c (h s) (w t) -> b c h s w t", h=h, w=w)
        scale, shift = (y[:, :, :, None, :, None] for y in (self.conv_y(zq), self.conv_b(zq)))
        into = overwriting.memory_for(squares, self.norm_layer)
        return rearrange(torch.addcmul(shift, squares, scale, out=into), "b c h s w t -> b c (h s) (w t)")


class ChunkedAttention:
    def attend(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = self.to_q(x) * x.shape[-1] ** -0.5, self.to_k(x).mT, self.to_v(x)
        chunks = [(rows @ k).softmax(dim=-1) @ v for rows in q.split(QUERIES, dim=1)]
        return rearrange(self.to_out(torch.cat(chunks, dim=1)), "b (h w) c -> b c h w", h=h, w=w)


class ChunkedEncoderAttention(ChunkedAttention, movq.EncoderAttentionBlock):
    pass


class ChunkedDecoderAttention(ChunkedAttention, movq.DecoderAttentionBlock):
    pass


FASTER = {
    unet.UNet: graphs.GraphedUNet,
    prior.Prior: graphs.GraphedPrior,
    movq.MoVQ: graphs.GraphedMoVQ,
    movq.SpatialNorm: LowSpatialNorm,
    movq.ResnetBlock: bands.BandedResnetBlock,
    movq.Decoder: bands.BandedDecoder,
    movq.EncoderAttentionBlock: ChunkedEncoderAttention,
    movq.DecoderAttentionBlock: ChunkedDecoderAttention,
}
MERGED = {unet.ResnetBlock: MergedUpResnetBlock, movq.Upsample: MergedUpsample}
FUSED = {
    nn.GroupNorm: fused.FusedGroupNorm,
    unet.ResnetBlock: fused.FusedResnetBlock,
    MergedUpResnetBlock: FusedMergedUpResnetBlock,
}
BLOCKS = (unet.ResnetBlock, unet.AttentionBlock, prior.Block, movq.ResnetBlock, movq.DecoderAttentionBlock)
COMPILER: dict[str, Any] = {}  # for `nn.Module.compile`
PLAIN = {fast: plain for table in (FASTER, MERGED, FUSED) for plain, fast in table.items()}
PLAIN[FusedMergedUpResnetBlock] = unet.ResnetBlock
Rewrite = Callable[[nn.Module], int]  # -> how many layers it changed


@torch.no_grad()
def merge_upsampling(network: nn.Module) -> int:
    """The convolution's own weight stays: the merged one cannot be split again to the last bit."""
    count = 0
    for block in list(network.modules()):
        doubles = type(block) is movq.Upsample
        doubles |= type(block) is unet.ResnetBlock and isinstance(block.resize, nn.UpsamplingNearest2d)
        if doubles and type(conv := conv_of(block)) is nn.Conv2d:
            block.merged, block.__class__ = MergedUpsampling(conv), MERGED[type(block)]
            count += 1
    return count


def lower_spatial_norms(network: nn.Module) -> int:
    return _swap(network, {movq.SpatialNorm})


def cut_bands(network: nn.Module) -> int:
    return _swap(network, {movq.ResnetBlock, movq.Decoder})


def chunk_attention(network: nn.Module) -> int:
    return _swap(network, {movq.EncoderAttentionBlock, movq.DecoderAttentionBlock})


def use_graph(network: nn.Module) -> int:
    return _swap(network, {unet.UNet, prior.Prior, movq.MoVQ}, on="cuda")


def use_channels_last(network: nn.Module, on: str = "cuda") -> int:
    """The convolutions' weights; maps follow them."""
    merged = merged_convs(network)
    found = [c for c in network.modules() if isinstance(c, nn.Conv2d) and c not in merged]
    count = 0
    for layer in (c for c in found if c.weight.device.type == on):
        reordered = layer.weight.data.to(memory_format=torch.channels_last)
        if reordered.stride() != layer.weight.stride():
            layer.weight.data, layer.was_contiguous = reordered, True
            count += 1
    for block in (b for b in network.modules() if isinstance(b, Merged)):
        if block.merged.weight is not None and block.merged.weight.device.type == on:
            block.merged.weight = block.merged.weight.to(memory_format=torch.channels_last)
    return count


def fuse_norms(network: nn.Module, on: str = "cuda") -> int:
    found = any(type(module) in FUSED for module in network.modules())
    if found and network.device.type == "cuda" and not fused.can_run(network.device, network.dtype):
        return 0
    return _swap(network, set(FUSED), on, FUSED)


def compile_blocks(network: nn.Module) -> int:
    """Blocks that are alike share what is compiled. A copy of the network is not compiled."""
    found = [block for block in network.modules() if isinstance(block, BLOCKS)]
    allow_recompiling(len(found))
    for block in found:
        block.compile(**COMPILER)
    return len(found)


def allow_recompiling(times: int) -> None:
    """Beyond its limit for a function PyTorch runs it uncompiled, and does not say so."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, times)


def pack_weights(network: nn.Module) -> int:
    """All linear and convolution weights but those that a merged upsampling stands for, and LoRA's layers."""
    merged = merged_convs(network)
    sees_few_rows = isinstance(network, prior.Prior)
    count = sum(pack(layer, sees_few_rows) for layer in network.modules() if layer not in merged)
    if count:
        _leave_the_file(network)
    return count


def use_winograd(network: nn.Module) -> int:
    """Of packed layers only."""
    found = [layer for layer in network.modules() if winograd.fits(layer)]
    for layer in found:
        winograd.use(layer)
    return len(found)


def merged_convs(network: nn.Module) -> set[nn.Module]:
    """The convolutions that a merged upsampling stands for: they are not called."""
    return {conv_of(block) for block in network.modules() if isinstance(block, Merged)}


def uncalled(network: nn.Module) -> set[nn.Module]:
    """The layers that others stand for: hooks on them see nothing."""
    blocks = [b for b in network.modules() if isinstance(b, fused.FusedResnetBlock)]
    return merged_convs(network) | {norm for block in blocks for norm in (block.norm1, block.norm2)}


def _leave_the_file(network: nn.Module) -> None:
    """Copies what was not packed: as long as one tensor is mapped from the weights' file, all of it is."""
    for parameter in network.parameters():
        if not parameter.is_meta and not isinstance(parameter, Placeholder):
            parameter.data = parameter.data.clone()


def _swap(network: nn.Module, classes: set[type], on: str | None = None, table: dict = FASTER) -> int:
    found = [block for block in network.modules() if type(block) in classes]
    found = [b for b in found if on is None or next(b.parameters()).device.type == on]
    for block in found:
        block.__class__ = table[type(block)]
    return len(found)


# In the order in which they are done: a packed layer would not be merged; Winograd is of packed layers; fused
# norms are of merged blocks, too.
REWRITES: dict[str, Rewrite] = {
    "merged upsampling": merge_upsampling,
    "low spatial norm": lower_spatial_norms,
    "row bands": cut_bands,
    "chunked attention": chunk_attention,
    "packed weights": pack_weights,
    "winograd": use_winograd,
    "channels last": use_channels_last,
    "fused norms": fuse_norms,
    "compiled blocks": compile_blocks,
    "cuda graph": use_graph,
}

FOR_CUDA = ("channels last", "fused norms", "cuda graph")
UNCOMPILED = ("packed weights", "winograd")  # PyTorch's compiler does not see into oneDNN's order
USUAL = tuple(name for name in REWRITES if name != "compiled blocks")


def named(rewrites: tuple[str, ...] | None, compile: bool) -> tuple[str, ...]:
    """What is meant by `optimize`'s arguments."""
    if rewrites is None:
        rewrites = tuple(name for name in USUAL if not (compile and name in (*UNCOMPILED, *FOR_CUDA)))
    _check(rewrites)
    rewrites = (*rewrites, "compiled blocks") if compile else tuple(rewrites)
    _check(rewrites)
    return rewrites


@lasting()
def optimize(
    network: nn.Module, rewrites: tuple[str, ...] | None = None, compile: bool = False
) -> dict[str, int]:
    """Makes a network faster, in place; what is optimized already stays so.

    Args:
        network: a Prior, UNet, MoVQ or CLIP tower.
        rewrites: which, by the names above; the usual ones, where they are not given.
        compile: under `torch.compile` too.

    Returns:
        how many layers each rewrite changed, those of earlier calls included.

    Raises:
        ValueError: an unknown rewrite, or two that do not go together, with those asked for before.
        TypeError: one name where several are needed.
    """
    rewrites = named(rewrites, compile)
    earlier = getattr(network, "rewrites", ())
    rewrites = tuple(dict.fromkeys((*earlier, *rewrites)))
    _check(rewrites)
    if earlier != rewrites:
        restore(network)  # each rewrite expects those before it
    network.rewrites = rewrites
    return {name: rewrite(network) for name, rewrite in REWRITES.items() if name in rewrites}


def _check(rewrites: tuple[str, ...]) -> None:
    if isinstance(rewrites, str):
        raise TypeError(f"rewrites is {rewrites!r}; names in a tuple or a list are needed")
    unknown = [name for name in rewrites if name not in REWRITES]
    if unknown:
        raise ValueError(f"no rewrite is called {unknown[0]!r}; there are {', '.join(REWRITES)}")
    against = [name for name in UNCOMPILED if name in rewrites]
    if "compiled blocks" in rewrites and against:
        raise ValueError(f"compiled blocks do not go with {against[0]}; kandinsky.optimize.restore first")


@lasting()
def restore(network: nn.Module) -> None:
    """Makes an optimized network plain again, to the last bit."""
    rewrites = vars(network).pop("rewrites", ())
    for layer in network.modules():
        if isinstance(layer, Packed):
            layer.unpack()
        elif type(layer) in PLAIN:
            for made in getattr(layer, "MADE", ()):
                vars(layer).pop(made, None)
            layer.__class__ = PLAIN[type(layer)]
        if vars(layer).pop("was_contiguous", False):
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
        if "compiled blocks" in rewrites and isinstance(layer, BLOCKS):
            layer._compiled_call_impl = None


def is_optimized(network: nn.Module) -> bool:
    """Whether any layer is of a faster class. Weights in another order, and compiling, do not count: such a
    network can be trained."""
    return any(isinstance(layer, (Packed, *PLAIN)) for layer in network.modules())


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """The plain network, for what changes its layers; optimized again in the same way afterwards."""
    rewrites = getattr(network, "rewrites", ())
    restore(network)
    try:
        yield
    finally:
        if rewrites:
            optimize(network, rewrites)


NETWORKS = ("text_encoder", "prior", "unet", "movq")


def optimize_pipeline(
    pipe: Any, rewrites: tuple[str, ...] | None = None, compile: bool = False
) -> dict[str, dict[str, int]]:
    """`Kandinsky.optimize`: all but the image tower, now and each time that they are read."""
    rewrites, changed, changes = named(rewrites, compile), {}, {}
    for name in NETWORKS:
        others = _other_changes(pipe, name)
        earlier = [c.keywords["rewrites"] for c in pipe.changes.get(name, []) if c not in others]
        together = tuple(dict.fromkeys((*chain(*earlier), *rewrites)))
        _check(together)
        changes[name] = [*others, partial(optimize, rewrites=together)]
    pipe.is_optimized = True
    pipe.changes |= changes
    for name in NETWORKS:
        if pipe.loaded(name) is not None:
            changed[name] = changes[name][-1](pipe.loaded(name))
    return changed


def restore_pipeline(pipe: Any) -> None:
    """`Kandinsky.restore`"""
    pipe.is_optimized = False
    for name in NETWORKS:
        pipe.changes[name] = _other_changes(pipe, name)
        if pipe.loaded(name) is not None:
            restore(pipe.loaded(name))


def _other_changes(pipe: Any, name: str) -> list[Callable]:
    """What else is done to a network when it is read."""
    return [c for c in pipe.changes.get(name, []) if not (isinstance(c, partial) and c.func is optimize)]
