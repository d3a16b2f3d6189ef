"""Small models made by diffusers and transformers, every tensor random, and ours with the same weights.

No norm group has a single channel, sizes differ along every axis, and attention has several heads.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky import MoVQ, Prior, UNet
from kandinsky.checkpoint import skeleton
from kandinsky.config import read_config
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.random_weights import write_multilingual_tokenizer, write_tokenizer
from tests.helpers import randn, randomize

EMBEDDING_DIM = 32
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": True, "steps_offset": 1}


def made_once(make: Callable) -> Callable:
    """Makes and randomises a model once for what is asked; whoever asks gets a copy."""

    @functools.cache
    def made(*args, **kwargs) -> torch.nn.Module:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            return make(*args, **kwargs)

    return functools.wraps(make)(lambda *args, **kwargs: copy.deepcopy(made(*args, **kwargs)))


@made_once
def reference_unet(in_channels: int = 4, hint: bool = False, seed: int = 0, **sizes) -> UNet2DConditionModel:
    settings = {"block_out_channels": (32, 48, 64), "layers_per_block": 2, "attention_head_dim": 8}
    settings |= {"cross_attention_dim": 24, "norm_num_groups": 8, "sample_size": 8, **sizes}
    settings = {"encoder_hid_dim": EMBEDDING_DIM, "encoder_hid_dim_type": "image_proj", **settings}
    settings = {"addition_embed_type": "image_hint" if hint else "image", **settings}
    attended = len(settings["block_out_channels"]) - 1
    model = UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=8,
        down_block_types=["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * attended,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D"] * attended + ["ResnetUpsampleBlock2D"],
        resnet_time_scale_shift="scale_shift",
        **settings,
    )
    return randomize(model, seed)


@made_once
def reference_prior(seed: int = 0) -> PriorTransformer:
    sizes = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 3}
    return randomize(PriorTransformer(**sizes, embedding_dim=EMBEDDING_DIM), seed)


@made_once
def reference_movq(levels: int = 3, seed: int = 0) -> VQModel:
    model = VQModel(
        block_out_channels=(64, 64, 96, 128)[:levels],
        down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1),
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=20,
        norm_num_groups=16,
        norm_type="spatial",
    )
    return randomize(model, seed)


@made_once
def reference_text_encoder(seed: int = 0, **changes) -> CLIPTextModelWithProjection:
    sizes = {"hidden_size": EMBEDDING_DIM, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 3, "projection_dim": EMBEDDING_DIM, "vocab_size": 519}
    settings = {"hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 0, **sizes, **changes}
    return randomize(CLIPTextModelWithProjection(CLIPTextConfig(**settings)), seed)


@made_once
def reference_multilingual(seed: int = 0, **changes) -> MultilingualCLIP:
    sizes = {"hidden_size": 48, "transformerDimensions": 48, "numDims": EMBEDDING_DIM}
    sizes |= {"intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 300}
    sizes |= {"max_position_embeddings": 130, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return randomize(MultilingualCLIP(MCLIPConfig(**sizes | changes)).eval(), seed)


@made_once
def reference_image_encoder(seed: int = 0, **changes) -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": 40, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"projection_dim": EMBEDDING_DIM, "image_size": 24, "patch_size": 8}
    config = CLIPVisionConfig(**{"hidden_act": "gelu", **sizes, **changes})
    return randomize(CLIPVisionModelWithProjection(config), seed)


def ours(network: type, reference: torch.nn.Module) -> torch.nn.Module:
    """Our network with the reference's config and weights; every name and shape must fit."""
    holder = reference if hasattr(reference, "to_json_string") else reference.config
    config = read_config(network.config_class, json.loads(holder.to_json_string()))
    with skeleton():
        model = network(config)
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def write_checkpoints(
    folder: Path, seed: int = 0, in_channels: int = 4, hint: bool = False, **scheduler
) -> Path:
    """A prior and a decoder repository as diffusers saves them; returns the decoder's folder.

    Three levels in both networks, so f = 4 and pictures are made at multiples of 16.
    """
    decoder = folder / "kandinsky-2-2-decoder"
    write_prior(folder / "kandinsky-2-2-prior", seed)
    reference_unet(in_channels, hint, seed).save_pretrained(decoder / "unet")
    reference_movq(3, seed).save_pretrained(decoder / "movq")
    DDPMScheduler(**{**SCHEDULER, **scheduler}).save_pretrained(decoder / "scheduler")
    return decoder


def write_prior(prior: Path, seed: int = 0) -> None:
    reference_prior(seed).save_pretrained(prior / "prior")
    reference_text_encoder(seed).save_pretrained(prior / "text_encoder")
    reference_image_encoder(seed).save_pretrained(prior / "image_encoder")
    write_tokenizer(prior / "tokenizer")
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24).save_pretrained(prior / "image_processor")
    unclip = {"prediction_type": "sample", "variance_type": "fixed_small_log", "clip_sample_range": 10.0}
    UnCLIPScheduler(**unclip).save_pretrained(prior / "scheduler")


def write_checkpoints_2_1(folder: Path, seed: int = 0, inpaint: bool = False) -> Path:
    """The same of 2.1, with both of its schedulers; returns the decoder's folder."""
    decoder = folder / f"kandinsky-2-1{'-inpaint' * inpaint}"
    write_prior(folder / "kandinsky-2-1-prior", seed)
    form = {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_image_proj"}
    form |= {"addition_embed_type": "text_image", "cross_attention_dim": EMBEDDING_DIM}
    reference_unet(9 if inpaint else 4, seed=seed, **form).save_pretrained(decoder / "unet")
    reference_movq(3, seed).save_pretrained(decoder / "movq")
    reference_multilingual(seed).save_pretrained(decoder / "text_encoder")
    write_multilingual_tokenizer(decoder / "tokenizer")
    fixed = {"set_alpha_to_one": False, "prediction_type": "epsilon"}
    DDIMScheduler(**SCHEDULER, **fixed).save_pretrained(decoder / "scheduler")
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "variance_type": "learned_range"}
    settings |= {"thresholding": True, "sample_max_value": 2.0}
    DDPMScheduler(**settings).save_pretrained(decoder / "ddpm_scheduler")
    return decoder


def unet_output(unet: UNet, h: int = 8, w: int = 12) -> Tensor:
    t = torch.tensor([999, 20])
    return unet(randn(2, 4, h, w), t, randn(2, EMBEDDING_DIM, seed=1))


def prior_output(prior: Prior) -> Tensor:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    text = (randn(2, EMBEDDING_DIM, seed=1), randn(2, 5, EMBEDDING_DIM, seed=2), mask)
    return prior(randn(2, EMBEDDING_DIM), torch.tensor([999, 20]), *text)


def movq_output(movq: MoVQ) -> Tensor:
    return torch.cat([movq.decode(randn(2, 4, 6, 5)), movq.decode(movq.encode(randn(2, 3, 24, 20, seed=3)))])


def text_output(encoder: CLIPTextEncoder) -> Tensor:
    return torch.cat([x.flatten() for x in encoder(torch.tensor([[0, 7, 300, 2], [0, 9, 2, 2]]))])


# by kind: ours from a seed, and what it gives for certain inputs, in one tensor
NETWORKS = {
    "unet": (lambda seed: ours(UNet, reference_unet(seed=seed)), unet_output),
    "prior": (lambda seed: ours(Prior, reference_prior(seed)), prior_output),
    "movq": (lambda seed: ours(MoVQ, reference_movq(3, seed)), movq_output),
    "text encoder": (lambda seed: ours(CLIPTextEncoder, reference_text_encoder(seed)), text_output),
}
