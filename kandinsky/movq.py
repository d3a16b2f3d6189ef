"""MoVQ: the autoencoder between pixels and latents (arXiv:2209.09002).

    pixels (b, 3, h, w) ─ Encoder ─ quant_conv → z (b, 4, h/8, w/8) ─ quantize → zq
    zq ─ post_quant_conv ─ Decoder, every norm modulated by zq → pixels (b, 3, h, w) in [-1, 1]

A VQGAN whose decoder norms are spatial: scale and shift of each normalised map are 1×1 convolutions of the
latent itself. The codebook matters in training only: Kandinsky denoises and decodes latents that were never
quantized, so `encode` stops before the codebook and `decode` starts after it.

Why spatial norms: a group norm washes out where something was, plain scale and shift are the same
everywhere, and the latent knows both. So each norm of the decoder, at every size, reads the latent again at
its place.

A tour: `SpatialNorm` is the paper's eq. 5; blocks take the norm they are to build (`Norm`), so that encoder
and decoder share them; `Encoder.forward` and `Decoder.forward` are mirror images; `MoVQ.encode` and
`decode` are what a run calls, `MoVQ.forward` what training does.

What the checkpoint forces: downsampling pads on the right and at the bottom only, as VQGAN did; attention
has one head, as wide as the map, and comes with every block of the coarsest level; the file's
`scaling_factor` is not used: latents go to the U-Net as they are.
"""

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, cdist, nn
from torch.nn import functional as F

from kandinsky.checkpoint import Pretrained
from kandinsky.config import MoVQConfig
from kandinsky.layers import attention

Norm = Callable[[int], nn.Module]  # channels -> a norm: plain in the encoder, spatial in the decoder


class SpatialNorm(nn.Module):
    """Group norm, then scale and shift read from the latent at every position (arXiv:2209.09002, eq. 5)."""

    def __init__(self, channels: int, latent_channels: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        """x: (b, c, h, w), zq: (b, latent_channels, h/s, w/s) -> (b, c, h, w)"""
        zq = F.interpolate(zq, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(zq) + self.conv_b(zq)


def group_norm(num_groups: int) -> Norm:
    return lambda channels: nn.GroupNorm(num_groups, channels, eps=1e-6)


def spatial_norm(latent_channels: int) -> Norm:
    return lambda channels: SpatialNorm(channels, latent_channels)


class ResnetBlock(nn.Module):
    """Two rounds of norm, SiLU and convolution around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        resized = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if resized else nn.Identity()

    def forward(self, x: Tensor, *zq: Tensor) -> Tensor:
        """(b, c_in, h, w) -> (b, c_out, h, w); the decoder's spatial norms also take zq"""
        out = self.conv1(F.silu(self.norm1(x, *zq)))
        out = self.conv2(F.silu(self.norm2(out, *zq)))
        return self.conv_shortcut(x) + out


class AttentionBlock(nn.Module):
    """Every position attends to every other, with one head as wide as the map."""

    def __init__(self, channels: int):
        super().__init__()
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # Sequential: the checkpoint says to_out.0

    def attend(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = rearrange(x, "b c h w -> b (h w) c")
        x = self.to_out(attention(self.to_q(x), self.to_k(x), self.to_v(x), num_heads=1))
        return rearrange(x, "b (h w) c -> b c h w", h=h, w=w)


class EncoderAttentionBlock(AttentionBlock):
    def __init__(self, channels: int, norm: Norm):
        super().__init__(channels)
        self.group_norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        return x + self.attend(self.group_norm(x))


class DecoderAttentionBlock(AttentionBlock):
    def __init__(self, channels: int, norm: Norm):
        super().__init__(channels)
        self.spatial_norm = norm(channels)

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        """(b, c, h, w), zq as SpatialNorm's -> (b, c, h, w)"""
        return x + self.attend(self.spatial_norm(x, zq))


class MidBlock(nn.Module):
    def __init__(self, channels: int, norm: Norm, attention_block: type[AttentionBlock]):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, norm) for _ in range(2))
        self.attentions = nn.ModuleList([attention_block(channels, norm)])

    def forward(self, x: Tensor, *zq: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        x = self.resnets[0](x, *zq)
        x = self.attentions[0](x, *zq)
        return self.resnets[1](x, *zq)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h/2, w/2); padded on the right and at the bottom only, as VQGAN does"""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w)"""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks at one resolution, with attention at the coarsest; then half the size."""

    def __init__(
        self, in_channels: int, channels: int, num_layers: int, norm: Norm, attends: bool, last: bool
    ):
        super().__init__()
        widths = [in_channels] + [channels] * num_layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, norm) for a, b in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(
            EncoderAttentionBlock(channels, norm) for _ in self.resnets if attends
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, h, w) -> (b, c, h/2, w/2), or (b, c, h, w) at the last"""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpBlock(nn.Module):
    """As DownBlock, on the way back to pixels."""

    def __init__(
        self, in_channels: int, channels: int, num_layers: int, norm: Norm, attends: bool, last: bool
    ):
        super().__init__()
        widths = [in_channels] + [channels] * num_layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, norm) for a, b in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(
            DecoderAttentionBlock(channels, norm) for _ in self.resnets if attends
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels)])

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        """(b, c_in, h, w) -> (b, c, 2h, 2w), or (b, c, h, w) at the last"""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, zq)
            if self.attentions:
                x = self.attentions[i](x, zq)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: MoVQConfig):
        super().__init__()
        channels, norm = config.block_out_channels, group_norm(config.norm_num_groups)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c_in, c) in enumerate(zip(channels[:1] + channels, channels)):
            last = i == len(channels) - 1
            self.down_blocks.append(
                DownBlock(c_in, c, config.layers_per_block, norm, attends=last, last=last)
            )
        self.mid_block = MidBlock(channels[-1], norm, EncoderAttentionBlock)
        self.conv_norm_out = norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, latent_channels, h/f, w/f)"""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: MoVQConfig):
        super().__init__()
        channels = config.block_out_channels[::-1]
        norm = spatial_norm(config.latent_channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], norm, DecoderAttentionBlock)
        self.up_blocks = nn.ModuleList()
        for i, (c_in, c) in enumerate(zip(channels[:1] + channels, channels)):
            num_layers, last = config.layers_per_block + 1, i == len(channels) - 1
            self.up_blocks.append(UpBlock(c_in, c, num_layers, norm, attends=i == 0, last=last))
        self.conv_norm_out = norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        """x, zq: (b, latent_channels, h/f, w/f) -> (b, 3, h, w)"""
        x = self.mid_block(self.conv_in(x), zq)
        for block in self.up_blocks:
            x = block(x, zq)
        return self.read_out(x, zq)

    def read_out(self, x: Tensor, zq: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x, zq)))


class Quantizer(nn.Module):
    """Replaces every latent vector by the nearest of the codebook."""

    def __init__(self, num_embeddings: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, dim)

    def forward(self, z: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, d, h, w)"""
        vectors = rearrange(z, "b d h w -> b (h w) d")
        nearest = cdist(vectors.float(), self.embedding.weight.float()).argmin(dim=-1)
        return rearrange(self.embedding(nearest), "b (h w) d -> b d h w", h=z.shape[2])


TO_ENCODE = ("encoder", "quant_conv", "quantize")  # the attributes of MoVQ that decoding does without


class MoVQ(nn.Module, Pretrained):
    """The whole autoencoder. Called as a whole it goes through the codebook, as in training."""

    config_class = MoVQConfig

    def __init__(self, config: MoVQConfig = MoVQConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.quantize = Quantizer(config.num_vq_embeddings, config.latent_channels)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (b, 3, h, w) in [-1, 1] -> their reconstruction from quantized latents"""
        z = self.encode(pixels)
        return self.decode(self.quantize(z.to(self.dtype)))

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels: (b, 3, h, w) in [-1, 1] -> latents z: (b, 4, h/f, w/f), float32, not quantized.

        f is `config.downscale`; what a size has beyond a multiple of it is left out.
        """
        self._check(pixels, "pixels", 3)
        return self.quant_conv(self.encoder(pixels.to(self.dtype))).float()

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (b, 4, h, w) as sampled -> pixels: (b, 3, f·h, f·w) float32, about [-1, 1], not clamped"""
        self._check(latents, "latents", self.config.latent_channels)
        zq = latents.to(self.dtype)
        return self.decoder(self.post_quant_conv(zq), zq).float()

    @staticmethod
    def _check(x: Tensor, name: str, channels: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{name} is {tuple(x.shape)}, needs (b, {channels}, h, w)")
