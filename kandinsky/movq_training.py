"""What trains the MoVQ: reconstruction, through the codebook and past it.

The method (arXiv:2209.09002, after VQ-VAE, arXiv:1711.00937) decodes quantized latents; Kandinsky decodes
latents that were never quantized, so here each picture takes one of the two ways at random. The official
text-to-image scheduler clips clean latents to [-1, 1]: the decoder is given clipped ones, and the encoder is
held to that range. Of each picture the worst patch counts once more: see `spot_loss`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kandinsky.datasets import first
from kandinsky.images import to_unit_range
from kandinsky.movq import MoVQ
from kandinsky.training import Draws, Objective, initialize, save_as

COMMITMENT = 0.25  # arXiv:1711.00937, eq. 3
SQUARE = 8  # side in pixels of the squares that a spot is looked for in
LEAST_SIDE = 8  # in pixels, of what the discriminator reads


class Discriminator(nn.Module):
    """Tells pictures from reconstructions, patch by patch (arXiv:2012.09841, eq. 5), without batch norms."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths, layers = (3, width, 2 * width, 4 * width), []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 1, h/8, w/8), above 0 for pictures"""
        return self.layers(pixels).float()


def adversarial_losses(discriminator: nn.Module, out: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The autoencoder's loss, which does not reach the discriminator, and the discriminator's, a hinge."""
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    fooled = -functional_call(discriminator, frozen, (out,)).mean()
    of_pictures, of_copies = discriminator(pixels), discriminator(out.detach())
    return fooled, F.relu(1 - of_pictures).mean() + F.relu(1 + of_copies).mean()


class MoVQObjective(Objective):
    """Trains the autoencoder; with frozen_encoder only what decodes, so that latents stay as they are.

    Args:
        edges, codebook, bounds, spots, adversarial: weights of the losses beside the mean error: `edge_loss`,
            codebook and commitment, latents beyond ±1, `spot_loss`, and the discriminator's.
        crop: side of the busiest of four random crops, which is trained on; None: whole pictures.
        latent_noise: is added before decoding: a sampler's latents are never exact, and where small steps
            change little they are easier to sample.
    """

    def __init__(
        self,
        movq: MoVQ,
        data: Any,
        fresh: Any,
        edges: float = 0.5,
        codebook: float = 0.1,
        bounds: float = 1.0,
        spots: float = 1.0,
        adversarial: float = 0.0,
        crop: int | None = None,
        frozen_encoder: bool = False,
        latent_noise: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.movq, self.data, self.fresh, self.crop = movq, data, fresh, crop
        self.edges, self.codebook, self.bounds, self.spots = edges, codebook, bounds, spots
        self.adversarial, self.latent_noise, self.dtype = adversarial, latent_noise, dtype
        if adversarial:
            self.discriminator = initialize(Discriminator(), 0)
        if frozen_encoder:
            for part in (movq.encoder, movq.quant_conv, movq.quantize):
                part.requires_grad_(False)

    def batch(self, indices: list[int]) -> dict[str, Any]:
        pixels = self.data.load(indices).pixels
        if self.crop is not None:
            pixels = torch.stack([busy_crop(x, self.crop, index) for x, index in zip(pixels, indices)])
        return {"pixels": pixels}

    def loss(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        z = self.movq.encode(pixels)
        codes = self.movq.quantize(z).float()
        quantized = z + (codes - z).detach()  # straight through: the gradient passes as if z were the code
        plain = z.clamp(-1, 1) + self.latent_noise * draws.randn(*z.shape[1:])
        through_codebook = (draws.rand() < 0.5)[:, None, None, None]
        out = self.movq.decode(torch.where(through_codebook, quantized, plain))
        losses = {
            "absolute": F.l1_loss(out, pixels),
            "squared": F.mse_loss(out, pixels),
            "edges": edge_loss(out, pixels),
            "spot": spot_loss(out, pixels),
            "codebook": F.mse_loss(codes, z.detach()),
            "commitment": F.mse_loss(z, codes.detach()),
            "bounds": F.relu(z.abs() - 1).square().mean(),
        }
        loss = losses["absolute"] + 2 * losses["squared"] + self.edges * losses["edges"]
        loss = loss + self.bounds * losses["bounds"] + self.spots * losses["spot"]
        loss = loss + self.codebook * (losses["codebook"] + COMMITMENT * losses["commitment"])
        if self.adversarial:
            losses["fooled"], losses["discriminator"] = adversarial_losses(self.discriminator, out, pixels)
            loss = loss + self.adversarial * losses["fooled"] + losses["discriminator"]
        numbers = {name: value.detach() for name, value in losses.items()}
        return loss, {**numbers, "std": z.detach().std()}

    def sample(self, draws: Draws) -> tuple[Tensor | None, dict[str, float]]:
        """Fresh pictures, from plain latents and from quantized ones."""
        pixels = first(self.fresh, 64).pixels.to(draws.device)
        z = self.movq.encode(pixels)
        plain, quantized = self.movq.decode(z.clamp(-1, 1)), self.movq(pixels)
        outside = (z.abs() > 1).float().mean().item()
        measured = {
            "psnr": psnr(plain, pixels),
            "quantized psnr": psnr(quantized, pixels),
            "outside": outside,
        }
        rows = [to_unit_range(x[:12]) for x in (pixels, plain, quantized)]
        return torch.stack(rows), {**measured, "latent std": z.std().item()}

    def save(self, folder: Path) -> None:
        save_as(self.movq, folder / "movq", self.dtype)


def busy_crop(pixels: Tensor, size: int, index: int) -> Tensor:
    """Of four random crops the one with most contrast. pixels: (3, h, w) -> (3, size, size)"""
    generator = torch.Generator().manual_seed(index)
    tops = torch.randint(pixels.shape[1] - size + 1, (4,), generator=generator).tolist()
    lefts = torch.randint(pixels.shape[2] - size + 1, (4,), generator=generator).tolist()
    crops = [pixels[:, top : top + size, left : left + size] for top, left in zip(tops, lefts)]
    return max(crops, key=lambda crop: crop.var(dim=(1, 2)).sum().item())


def edge_loss(out: Tensor, pixels: Tensor) -> Tensor:
    """The mean difference of neighbouring pixels' differences: blur costs most where edges are."""
    across = (out - pixels).diff(dim=-1).abs().mean()
    return across + (out - pixels).diff(dim=-2).abs().mean()


def spot_loss(out: Tensor, pixels: Tensor) -> Tensor:
    """Averages the error over squares, squares these averages, and takes each picture's worst: errors that
    cancel out within a square, as at edges, hardly count, a patch of another colour does. Group norms tempt a
    network to such patches in a corner, where a value out of range shifts the statistics of the whole map
    (arXiv:1912.04958 §2). The last squares are narrower where a side is no multiple of 4."""
    side = min(SQUARE, *out.shape[-2:])
    errors = F.avg_pool2d(out - pixels, side, max(side // 2, 1), ceil_mode=True)
    return errors.square().mean(dim=1).flatten(1).amax(dim=1).mean()


def psnr(out: Tensor, pixels: Tensor) -> float:
    """dB, the mean over the pictures; both in [-1, 1]"""
    error = (to_unit_range(out) - to_unit_range(pixels)).square().flatten(1).mean(dim=1)
    return (-10 * error.log10()).mean().item()
