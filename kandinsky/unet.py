"""The decoder's U-Net: predicts the noise in a latent from the picture's CLIP embedding.

    image_embeds (b, d) ─ encoder_hid_proj → 32 image-prompt tokens (b, 32, 768) ─ add_k_proj, add_v_proj ─┐
    image_embeds, t ─ add_embedding, time_embedding → temb (b, 1536) ─ time_emb_proj of each block ────┐   │
    x (b, 4, h, w) ─ conv_in ─ 4 down blocks ─ mid block ─ 4 up blocks ─ conv_out → (b, 8, h, w)       │   │
                     each ResnetBlock: scale and shift ←───────────────────────────────────────────────┘   │
                     each AttentionBlock: further keys and values ←────────────────────────────────────────┘

The network of ADM (arXiv:2105.05233) with text replaced by a picture. The first four output channels are the
noise, the last four its variance. The variants differ at the entrance only: inpainting reads 9 channels
(noisy latents, masked picture's latents, mask); the hint form adds the features of a depth map, made by
`add_embedding.input_hint_block`; in 2.1 attention reads 10 tokens of the image embedding and then one for
each token of the prompt, and temb takes in the whole prompt's embedding.

What the timestep and the image embedding give to each block does not depend on the noise. `Conditioning`
holds it by module, so the walk through the blocks (`denoise`) is written once: `forward` makes it for one
call, `prepare` for a whole loop. It is made for `ResnetBlock`s and `AttentionBlock`s: a block of your own in
the place of one is a subclass of it.

Why two ways in for the image embedding: in temb it sets scale and shift of whole maps, what the picture is
of; as 32 tokens beside the positions it can be read at one place and not at another. Attention is one
softmax over both (arXiv:2105.05233's blocks with GLIDE's joined keys, arXiv:2112.10741), and absent at the
finest of the levels, where its n² would cost most. Guidance leads away from the zero image's embedding
(`sampling.guide`).

A tour: `ResnetBlock` and `AttentionBlock`; `DownBlock`, `MidBlock`, `UpBlock` string them together and keep
the skips; `UNet.denoise` is the diagram's last line; `_conditioned` and `_modulations` are what enters it
from above; `forward` is all of it once, `prepare` and `step` the same for a loop.

What the checkpoint forces: scale is read as 1 + scale, and norm 2 alone is modulated; going down and up are
residual blocks too, resizing between norm and convolution; `encoder_hid_proj` and `add_embedding` are the
names of image projections; the variance's four channels are there though the official scheduler ignores
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.checkpoint import Pretrained
from kandinsky.config import UNetConfig
from kandinsky.layers import TimestepMLP, attention, check_shape

NUM_IMAGE_TOKENS, NUM_IMAGE_TOKENS_BESIDE_TEXT = 32, 10
STEPS_AT_ONCE = 64  # whose scale and shift a plan holds: 0.27 MiB a step and row at the released size

# scale and shift of a ResnetBlock; keys and values of an AttentionBlock
Conditioning = dict[nn.Module, tuple[Tensor, Tensor]]


class ResnetBlock(nn.Module):
    """Two rounds of norm, SiLU and convolution; scale and shift from the timestep embedding between them.

    `resize`, where given, halves or doubles the map and its skip connection before the first convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_dim: int,
        num_groups: int,
        resize: nn.Module | None = None,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.resize = resize or nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        widens = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if widens else nn.Identity()

    def modulation(self, temb: Tensor) -> tuple[Tensor, Tensor]:
        """(b, d) -> scale and shift, (b, c_out) each"""
        return self.time_emb_proj(F.silu(temb)).chunk(2, dim=-1)

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """x: (b, c_in, h, w) -> (b, c_out, h, w), or of half or double height and width"""
        scale, shift = (m[:, :, None, None] for m in modulation)
        out = self.conv1(self.resize(F.silu(self.norm1(x))))
        out = self.norm2(out) * (1 + scale) + shift
        return self.conv_shortcut(self.resize(x)) + self.conv2(F.silu(out))


class AttentionBlock(nn.Module):
    """Pixels attend to the image-prompt tokens and to each other under one softmax."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, num_groups: int):
        super().__init__()
        self.num_heads = channels // head_dim
        self.group_norm = nn.GroupNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(context_dim, channels)
        self.add_v_proj = nn.Linear(context_dim, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # Sequential: the checkpoint says to_out.0

    def added_keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, d) -> keys and values, (b, n, c) each"""
        return self.add_k_proj(context), self.add_v_proj(context)

    def forward(self, x: Tensor, added: tuple[Tensor, Tensor]) -> Tensor:
        """x: (b, c, h, w) -> (b, c, h, w)"""
        h, w = x.shape[-2:]
        pixels = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        k = torch.cat([added[0], self.to_k(pixels)], dim=1)  # (b, n + h*w, c)
        v = torch.cat([added[1], self.to_v(pixels)], dim=1)
        out = self.to_out(attention(self.to_q(pixels), k, v, self.num_heads))
        return x + rearrange(out, "b (h w) c -> b c h w", h=h, w=w)


class DownBlock(nn.Module):
    """Residual blocks at one resolution, each followed by attention but at the finest; then half the size."""

    def __init__(self, in_channels: int, channels: int, config: UNetConfig, attends: bool, last: bool):
        super().__init__()
        num_groups, temb_dim = config.norm_num_groups, 4 * config.block_out_channels[0]
        widths = [in_channels] + [channels] * config.layers_per_block
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b, temb_dim, num_groups) for a, b in zip(widths, widths[1:])
        )
        sizes = (channels, config.context_dim, config.head_dim, num_groups)
        self.attentions = nn.ModuleList(AttentionBlock(*sizes) for _ in self.resnets if attends)
        self.downsamplers = nn.ModuleList()
        if not last:
            self.downsamplers.append(ResnetBlock(channels, channels, temb_dim, num_groups, nn.AvgPool2d(2)))

    def forward(self, x: Tensor, skips: list[Tensor], given: Conditioning) -> Tensor:
        """(b, c_in, h, w) -> (b, c, h/2, w/2), or (b, c, h, w) at the last; appends every map to the skips"""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, given[resnet])
            if self.attentions:
                x = self.attentions[i](x, given[self.attentions[i]])
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, given[downsample])
            skips.append(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        num_groups, temb_dim = config.norm_num_groups, 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, temb_dim, num_groups) for _ in range(2))
        self.attentions = nn.ModuleList(
            [AttentionBlock(channels, config.context_dim, config.head_dim, num_groups)]
        )

    def forward(self, x: Tensor, given: Conditioning) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        x = self.resnets[0](x, given[self.resnets[0]])
        x = self.attentions[0](x, given[self.attentions[0]])
        return self.resnets[1](x, given[self.resnets[1]])


class UpBlock(nn.Module):
    """As DownBlock, on the way up: each residual block also reads the last map of the skips."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        skip_channels: list[int],
        config: UNetConfig,
        attends: bool,
        last: bool,
    ):
        super().__init__()
        num_groups, temb_dim = config.norm_num_groups, 4 * config.block_out_channels[0]
        widths = [in_channels] + [channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(width + skip, channels, temb_dim, num_groups)
            for width, skip in zip(widths, skip_channels)
        )
        sizes = (channels, config.context_dim, config.head_dim, num_groups)
        self.attentions = nn.ModuleList(AttentionBlock(*sizes) for _ in self.resnets if attends)
        self.upsamplers = nn.ModuleList()
        if not last:
            double = nn.UpsamplingNearest2d(scale_factor=2)
            self.upsamplers.append(ResnetBlock(channels, channels, temb_dim, num_groups, double))

    def forward(self, x: Tensor, skips: list[Tensor], given: Conditioning) -> Tensor:
        """(b, c_in, h, w) -> (b, c, 2h, 2w), or (b, c, h, w) at the last; takes its maps off the skips"""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), given[resnet])
            if self.attentions:
                x = self.attentions[i](x, given[self.attentions[i]])
        for upsample in self.upsamplers:
            x = upsample(x, given[upsample])
        return x


class ImageTokens(nn.Module):
    """The image embedding as a prompt of 32 tokens."""

    def __init__(self, embedding_dim: int, context_dim: int):
        super().__init__()
        self.image_embeds = nn.Linear(embedding_dim, NUM_IMAGE_TOKENS * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(b, d) -> (b, 32, context_dim)"""
        return self.norm(rearrange(self.image_embeds(image_embeds), "b (n d) -> b n d", n=NUM_IMAGE_TOKENS))


class ImageTimeEmbedding(nn.Module):
    """What the image embedding adds to the timestep embedding; the hint form also reads the hint here."""

    def __init__(self, embedding_dim: int, temb_dim: int, hint: bool):
        super().__init__()
        self.image_proj = nn.Linear(embedding_dim, temb_dim)
        self.image_norm = nn.LayerNorm(temb_dim)
        if hint:
            self.input_hint_block = hint_network()

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(b, d) -> (b, temb_dim)"""
        return self.image_norm(self.image_proj(image_embeds))


class TextImageTokens(nn.Module):
    """2.1: the image embedding as 10 tokens, without a norm, then the text states."""

    def __init__(self, text_dim: int, context_dim: int):
        super().__init__()
        self.image_embeds = nn.Linear(context_dim, NUM_IMAGE_TOKENS_BESIDE_TEXT * context_dim)
        self.text_proj = nn.Linear(text_dim, context_dim)

    def forward(self, image_embeds: Tensor, text_states: Tensor) -> Tensor:
        """(b, d) and (b, n, text_dim) -> (b, 10 + n, context_dim)"""
        tokens = self.image_embeds(image_embeds)
        tokens = rearrange(tokens, "b (n d) -> b n d", n=NUM_IMAGE_TOKENS_BESIDE_TEXT)
        return torch.cat([tokens, self.text_proj(text_states)], dim=1)


class TextImageTimeEmbedding(nn.Module):
    """2.1: what the image embedding and the pooled text add to the timestep embedding."""

    def __init__(self, embedding_dim: int, temb_dim: int):
        super().__init__()
        self.text_proj = nn.Linear(embedding_dim, temb_dim)
        self.text_norm = nn.LayerNorm(temb_dim)
        self.image_proj = nn.Linear(embedding_dim, temb_dim)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """(b, d) twice -> (b, temb_dim)"""
        return self.image_proj(image_embeds) + self.text_norm(self.text_proj(text_embeds))


def hint_network() -> nn.Sequential:
    """(b, 3, 8h, 8w) -> (b, 4, h, w): eight convolutions with SiLU between them, as in ControlNet."""
    channels, strides = (3, 16, 16, 32, 32, 96, 96, 256, 4), (1, 1, 2, 1, 2, 1, 2, 1)
    layers = []
    for c_in, c_out, stride in zip(channels, channels[1:], strides):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@dataclass
class Plan:
    """What a whole loop gives to the blocks, made by `UNet.prepare`.

    Scale and shift of every block are made for STEPS_AT_ONCE steps, when the first of them is reached.
    """

    temb: Tensor  # (steps, b, d)
    added: Conditioning  # of the attention blocks, the same for every step
    hint_features: Tensor | None  # (b, 4, h, w)
    chunk: int = -1  # which STEPS_AT_ONCE steps `modulations` is of
    # of the residual blocks, (STEPS_AT_ONCE, b, c) each
    modulations: Conditioning = field(default_factory=dict)


class UNet(nn.Module, Pretrained):
    """The decoder network of unCLIP, Kandinsky's form: text-to-image, inpainting (9 channels) or hint."""

    config_class = UNetConfig

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        channels, temb_dim = config.block_out_channels, 4 * config.block_out_channels[0]
        self.time_embedding = TimestepMLP(channels[0], temb_dim)
        if config.text:
            self.add_embedding = TextImageTimeEmbedding(config.image_dim, temb_dim)
            self.encoder_hid_proj = TextImageTokens(config.embedding_dim, config.context_dim)
        else:
            self.add_embedding = ImageTimeEmbedding(config.image_dim, temb_dim, config.hint)
            self.encoder_hid_proj = ImageTokens(config.image_dim, config.context_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)

        skip_channels = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for i, (c_in, c) in enumerate(zip(channels[:1] + channels, channels)):
            last = i == len(channels) - 1
            self.down_blocks.append(DownBlock(c_in, c, config, attends=i > 0, last=last))
            skip_channels += [c] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock(channels[-1], config)

        self.up_blocks = nn.ModuleList()
        for i, (c_in, c) in enumerate(zip(channels[-1:] + channels[::-1], channels[::-1])):
            last = i == len(channels) - 1
            taken = [skip_channels.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(c_in, c, taken, config, attends=not last, last=last))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        image_embeds: Tensor,
        hint: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_states: Tensor | None = None,
    ) -> Tensor:
        """One prediction.

        Args:
            x: (b, 4, h, w) noisy latents, (b, 9, h, w) for inpainting; h and w multiples of
                `config.downscale`.
            t: (b,) timestep, 0 to 999.
            image_embeds: (b, d) CLIP image embeddings.
            hint: (b, 3, 8h, 8w) in [0, 1], for the hint form only.
            text_embeds, text_states: (b, d) and (b, n, text_dim), for 2.1 only.

        Returns:
            (b, 8, h, w) float32: predicted noise, then the predicted variance in [-1, 1].
        """
        self._check_condition(image_embeds, hint, text_embeds, text_states)
        check_shape("t", t, len(image_embeds))
        condition, added = self._conditioned(image_embeds, text_embeds, text_states)
        given = added | self._modulations(self.time_embedding(t) + condition)
        return self.denoise(x, given, self._hint_features(hint))

    def denoise(self, x: Tensor, given: Conditioning, hint_features: Tensor | None = None) -> Tensor:
        """The walk through the blocks. x: as `forward`'s -> (b, 8, h, w) float32"""
        self._check_sample(x, given, hint_features)
        x = self.enter(x, hint_features)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, skips, given)
        x = self.mid_block(x, given)
        for block in self.up_blocks:
            x = block(x, skips, given)
        return self.leave(x)

    def enter(self, x: Tensor, hint_features: Tensor | None) -> Tensor:
        """(b, 4, h, w) or with more channels -> (b, c, h, w), in the weights' dtype"""
        x = x.to(self.dtype)
        return self.conv_in(x if hint_features is None else torch.cat([x, hint_features], dim=1))

    def leave(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 8, h, w) float32"""
        return self.conv_out(F.silu(self.conv_norm_out(x))).float()

    def prepare(
        self,
        image_embeds: Tensor,
        timesteps: Sequence[int] | Tensor,
        hint: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_states: Tensor | None = None,
    ) -> Plan:
        """All that does not depend on the noise, for every step of a loop; other arguments as `forward`'s.

        timesteps: ints or a 1-D tensor, in the order in which `step` will name them by index.
        """
        self._check_condition(image_embeds, hint, text_embeds, text_states)
        timesteps = torch.as_tensor(timesteps, device=self.device)
        if timesteps.ndim != 1 or not len(timesteps):
            raise ValueError(
                f"timesteps is {tuple(timesteps.shape)}, needs one dimension and at least one timestep"
            )
        condition, added = self._conditioned(image_embeds, text_embeds, text_states)
        temb = self.time_embedding(timesteps)[:, None] + condition  # (steps, b, d)
        return Plan(temb, added, self._hint_features(hint))

    def step(self, x: Tensor, plan: Plan, index: int) -> Tensor:
        """`forward` at the plan's index-th timestep, without what the plan holds. x: as `forward`'s"""
        return self.denoise(x, self.conditioning(plan, index), plan.hint_features)

    def conditioning(self, plan: Plan, index: int) -> Conditioning:
        """What a plan gives to the blocks at its index-th timestep."""
        if not 0 <= index < len(plan.temb):
            raise IndexError(f"index is {index}; this plan has {len(plan.temb)} timesteps")
        chunk, row = divmod(index, STEPS_AT_ONCE)
        if chunk != plan.chunk:
            plan.modulations = self._modulations(plan.temb[index - row :][:STEPS_AT_ONCE])
            plan.chunk = chunk
        modulations = {block: (scale[row], shift[row]) for block, (scale, shift) in plan.modulations.items()}
        return plan.added | modulations

    def _modulations(self, temb: Tensor) -> Conditioning:
        return {block: block.modulation(temb) for block in self.modules() if isinstance(block, ResnetBlock)}

    def _conditioned(
        self, image_embeds: Tensor, text_embeds: Tensor | None, text_states: Tensor | None
    ) -> tuple[Tensor, Conditioning]:
        """What the embeddings add to the timestep embedding, (b, temb_dim), and to attention."""
        image_embeds = image_embeds.to(self.dtype)
        pooled, states = ([] if t is None else [t.to(self.dtype)] for t in (text_embeds, text_states))
        context = self.encoder_hid_proj(image_embeds, *states)
        blocks = (block for block in self.modules() if isinstance(block, AttentionBlock))
        added = {block: block.added_keys_values(context) for block in blocks}
        return self.add_embedding(image_embeds, *pooled), added

    def _hint_features(self, hint: Tensor | None) -> Tensor | None:
        return None if hint is None else self.add_embedding.input_hint_block(hint.to(self.dtype))

    def _check_condition(
        self,
        image_embeds: Tensor,
        hint: Tensor | None,
        text_embeds: Tensor | None,
        text_states: Tensor | None,
    ) -> None:
        dim = self.config.image_dim
        check_shape("image_embeds", image_embeds, "b", dim)
        b = len(image_embeds)
        if {text_embeds is not None, text_states is not None} != {self.config.text}:
            needs = "needs text_embeds and text_states" if self.config.text else "takes no texts"
            raise ValueError(f"this UNet {needs}")
        if text_embeds is not None:
            check_shape("text_embeds", text_embeds, b, dim)
        if text_states is not None:
            check_shape("text_states", text_states, b, "n", self.config.embedding_dim)
        if (hint is not None) != self.config.hint:
            raise ValueError("this UNet needs a hint" if self.config.hint else "this UNet takes no hint")
        if hint is not None:
            check_shape("hint", hint, b, 3, "8h", "8w")

    def _check_sample(self, x: Tensor, given: Conditioning, hint_features: Tensor | None) -> None:
        rows = len(given[self.mid_block.attentions[0]][0])
        factor = self.config.downscale
        channels = self.config.in_channels - (0 if hint_features is None else hint_features.shape[1])
        if x.ndim != 4 or x.shape[:2] != (rows, channels) or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x is {tuple(x.shape)}, needs ({rows}, {channels}, h, w), h and w multiples of {factor}"
            )
        if hint_features is not None and hint_features.shape[-2:] != x.shape[-2:]:
            h, w = x.shape[-2:]
            raise ValueError(f"the hint does not belong to {h}×{w} latents; it needs {8 * h}×{8 * w} pixels")
