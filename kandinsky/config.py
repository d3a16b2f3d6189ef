"""The sizes of every network, as frozen dataclasses that read and write the published `config.json`.

The defaults are the released Kandinsky 2.2 values. A field exists where a released checkpoint or a small test
model varies it; everything else is written out in the networks, and `published` says which value of the file
it stands for. A file is accepted when it says what we would write ourselves: `read_config` parses the fields
below, writes the config back and compares. `dataclasses.replace(UNetConfig(), in_channels=9)` makes a
variant.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

# What transformers' configs carry about text generation, training and bookkeeping: nothing here changes a
# tower's output.
_BOOKKEEPING = frozenset(
    """architectures attention_dropout bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty dropout dtype early_stopping encoder_no_repeat_ngram_size
    id2label initializer_factor initializer_range label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences pad_token_id prefix problem_type
    pruned_heads repetition_penalty return_dict return_dict_in_generate temperature tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype transformers_version typical_p""".split()
)


class CheckpointError(ValueError):
    """Files that are not the checkpoint they are read as: what was found, what is needed."""


def _named(default: Any, name: str, values: dict | None = None, optional: bool = False) -> Any:
    """A field that the published file calls `name`.

    values: maps the file's values to ours. optional: absent or null in the file means the default.
    """
    return field(default=default, metadata={"name": name, "values": values, "optional": optional})


def _check_divides(widths: tuple[int, ...], divisor: int, parts: str) -> None:
    odd = [width for width in widths if width % divisor]
    if odd:
        raise ValueError(f"{odd[0]} channels do not divide into {parts}")


def _published_name(f) -> str:
    return f.metadata.get("name", f.name)


def _own_fields(config: Any) -> dict[str, Any]:
    """The config's own fields under the names and with the values of the published file."""
    out = {}
    for f in fields(config):
        value, values = getattr(config, f.name), f.metadata.get("values")
        if values is not None:
            value = next(theirs for theirs, ours in values.items() if ours == value)
        out[_published_name(f)] = list(value) if isinstance(value, tuple) else value
    return out


def _parse(f, value: Any, source: str) -> Any:
    """One value of the file as the dataclass holds it; a wrong type or choice is a CheckpointError."""
    name, values = _published_name(f), f.metadata.get("values")
    if values is not None:
        if isinstance(value, str) and value in values:
            return values[value]
        raise CheckpointError(
            f"{source}: {name} is {value!r}; this network knows {' and '.join(map(repr, values))}"
        )
    if isinstance(f.default, tuple):
        if isinstance(value, list) and value and all(type(v) is int and v > 0 for v in value):
            return tuple(value)
        raise CheckpointError(f"{source}: {name} is {value!r}; a list of positive integers is needed")
    if type(value) is int and value > 0:
        return value
    raise CheckpointError(f"{source}: {name} is {value!r}; a positive integer is needed")


def read_config(config_class: type, published: dict[str, Any], source: str = "config.json") -> Any:
    """Builds a config from the fields of a published `config.json`.

    Args:
        config_class: one of the dataclasses of this file.
        published: the parsed JSON.
        source: what to call the file in an error.

    Raises:
        CheckpointError: another class's file, a missing field, or a value this network does not model. Fields
            unknown here must be null or false; fields that start with `_` are ignored.
    """
    key, *names = config_class.IDENTITY
    if published.get(key) not in names:
        wanted = " or ".join(map(repr, names))
        raise CheckpointError(f"{source}: {key} is {published.get(key)!r}; {wanted} is needed here")
    published = published | {key: names[0]}
    optional = {_published_name(f): f.default for f in fields(config_class) if f.metadata.get("optional")}
    published = published | {n: default for n, default in optional.items() if published.get(n) is None}
    missing = [_published_name(f) for f in fields(config_class) if _published_name(f) not in published]
    if missing:
        raise CheckpointError(f"{source} lacks {', '.join(missing)}")
    values = {f.name: _parse(f, published[_published_name(f)], source) for f in fields(config_class)}
    try:
        config = config_class(**values)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    _check_fixed_fields(config, published, source)
    return config


def _check_fixed_fields(config: Any, published: dict[str, Any], source: str) -> None:
    """Raises a CheckpointError where a field has a value that the network does not model, or is missing and
    would then mean one. LATER_FIELDS are what later versions of diffusers write, with the value modelled;
    NULLABLE, where a class has any, mean the value modelled where they are null or missing."""
    config_class, ours = type(config), config.published()
    needed = {name for name, value in ours.items() if value not in (None, False)}
    nullable = getattr(config_class, "NULLABLE", frozenset())
    needed -= config_class.IGNORED | nullable
    if not needed <= published.keys():
        raise CheckpointError(f"{source} lacks {', '.join(sorted(needed - published.keys()))}")
    later = config_class.LATER_FIELDS
    for name, value in published.items():
        allowed = ours.get(name, later.get(name))
        ignored = name.startswith("_") or name in config_class.IGNORED
        is_default = value is None and name in nullable
        if ignored or is_default or value == allowed or ((value is None or value is False) and not allowed):
            continue
        wanted = "null or false" if allowed in (None, False) else repr(allowed)
        raise CheckpointError(f"{source}: {name} is {value!r}; this implementation models only {wanted}")


@dataclass(frozen=True)
class PriorConfig:
    """The image prior: a causal transformer over 77 text states and four more tokens."""

    IDENTITY: ClassVar = ("_class_name", "PriorTransformer")
    IGNORED: ClassVar = frozenset(("dropout",))
    LATER_FIELDS: ClassVar = {
        "added_emb_type": "prd",
        "encoder_hid_proj_type": "linear",
        "time_embed_act_fn": "silu",
    }

    num_heads: int = _named(32, "num_attention_heads")
    head_dim: int = _named(64, "attention_head_dim")
    num_layers: int = 20
    embedding_dim: int = 1280  # width of the CLIP embeddings and of the text states
    num_embeddings: int = 77  # text tokens

    def published(self) -> dict[str, Any]:
        # text embedding, timestep, noisy image embedding, read-out token
        return {
            "_class_name": "PriorTransformer",
            **_own_fields(self),
            "additional_embeddings": 4,
            "dropout": 0.0,
        }


@dataclass(frozen=True)
class UNetConfig:
    """The decoder's U-Net. Defaults are the released text-to-image checkpoint."""

    IDENTITY: ClassVar = ("_class_name", "UNet2DConditionModel")
    # read by other block types
    IGNORED: ClassVar = frozenset(("addition_embed_type_num_heads", "downsample_padding"))
    LATER_FIELDS: ClassVar = {"attention_type": "default", "transformer_layers_per_block": 1, "dropout": 0.0}

    in_channels: int = 4
    out_channels: int = 8  # predicted noise, then predicted variance
    block_out_channels: tuple[int, ...] = (384, 768, 1152, 1536)  # one per resolution, finest first
    layers_per_block: int = 3
    head_dim: int = _named(64, "attention_head_dim")
    context_dim: int = _named(768, "cross_attention_dim")  # width of the image-prompt tokens
    embedding_dim: int = _named(1280, "encoder_hid_dim")  # of the image embedding; 2.1: of the text states
    norm_num_groups: int = 32
    hint: bool = _named(
        False, "addition_embed_type", {"image": False, "image_hint": True, "text_image": False}
    )
    text: bool = _named(False, "encoder_hid_dim_type", {"image_proj": False, "text_image_proj": True})  # 2.1
    sample_size: int = _named(64, "sample_size", optional=True)  # latent height and width it was made for

    def __post_init__(self) -> None:
        channels, groups = self.block_out_channels, self.norm_num_groups
        _check_divides(channels[1:], self.head_dim, f"heads of {self.head_dim} (attention_head_dim)")
        _check_divides(channels, groups, f"{groups} groups (norm_num_groups)")
        if self.hint and self.text:
            raise ValueError("a hint network and text conditioning do not go together")

    @property
    def image_dim(self) -> int:
        """Width of the CLIP image embedding, in 2.1 also of the pooled text: there the context's own."""
        return self.context_dim if self.text else self.embedding_dim

    @property
    def latent_channels(self) -> int:
        return self.out_channels // 2

    @property
    def inpaints(self) -> bool:
        """Whether it reads the masked picture's latents and the mask beside the sample."""
        return self.in_channels == 2 * self.latent_channels + 1 and not self.hint

    @property
    def downscale(self) -> int:
        """Latents per position of the coarsest map along one side: 8 for the released sizes."""
        return 2 ** (len(self.block_out_channels) - 1)

    def published(self) -> dict[str, Any]:
        attended = len(self.block_out_channels) - 1  # the finest level has no attention
        down = ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * attended
        up = ["SimpleCrossAttnUpBlock2D"] * attended + ["ResnetUpsampleBlock2D"]
        return {
            "_class_name": "UNet2DConditionModel",
            **_own_fields(self),
            **({"addition_embed_type": "text_image"} if self.text else {}),
            "down_block_types": down,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": up,
            "act_fn": "silu",
            "addition_embed_type_num_heads": 64,
            "center_input_sample": False,
            "class_embed_type": None,
            "class_embeddings_concat": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "cross_attention_norm": None,
            "downsample_padding": 1,
            "dual_cross_attention": False,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_only_cross_attention": None,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-5,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "projection_class_embeddings_input_dim": None,
            "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": False,
            "resnet_time_scale_shift": "scale_shift",
            "time_cond_proj_dim": None,
            "time_embedding_act_fn": None,
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "timestep_post_act": None,
            "upcast_attention": False,
            "use_linear_projection": False,
        }


INPAINT_UNET = UNetConfig(in_channels=9)  # + masked image latents (4) and the mask (1)
TEXT_UNET = UNetConfig(embedding_dim=1024, text=True)  # 2.1: the prompt's own features beside the picture's
TEXT_INPAINT_UNET = UNetConfig(in_channels=9, embedding_dim=1024, text=True)
HINT_UNET = UNetConfig(in_channels=8, hint=True)  # + features of the depth map (4)


@dataclass(frozen=True)
class MoVQConfig:
    """The autoencoder between pixels and latents; one file serves every released checkpoint."""

    IDENTITY: ClassVar = ("_class_name", "VQModel")
    IGNORED: ClassVar = frozenset(("sample_size", "scaling_factor"))  # no Kandinsky pipeline reads them
    LATER_FIELDS: ClassVar = {"mid_block_add_attention": True}
    NULLABLE: ClassVar = frozenset(("vq_embed_dim",))  # diffusers then takes latent_channels

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)  # one per resolution, finest first
    layers_per_block: int = 2
    latent_channels: int = 4
    num_vq_embeddings: int = 16384
    norm_num_groups: int = 32  # of the encoder; the decoder's spatial norms always have 32

    def __post_init__(self) -> None:
        channels, groups = self.block_out_channels, self.norm_num_groups
        _check_divides(channels, groups, f"{groups} groups (norm_num_groups)")
        _check_divides(channels, 32, "the 32 groups of the decoder's norms")

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side: 8 for the released sizes."""
        return 2 ** (len(self.block_out_channels) - 1)

    def published(self) -> dict[str, Any]:
        plain = len(self.block_out_channels) - 1  # only the coarsest level has attention
        return {
            "_class_name": "VQModel",
            **_own_fields(self),
            "vq_embed_dim": self.latent_channels,
            "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
            "act_fn": "silu",
            "in_channels": 3,
            "out_channels": 3,
            "norm_type": "spatial",
            "sample_size": 32,
            "scaling_factor": 0.18215,
        }


_ACTIVATION = {"gelu": False, "quick_gelu": True}


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's text tower. Defaults are ViT-bigG/14's, as released with Kandinsky 2.2."""

    IDENTITY: ClassVar = ("model_type", "clip_text_model")
    IGNORED: ClassVar = _BOOKKEEPING
    LATER_FIELDS: ClassVar = {}

    vocab_size: int = 49408
    max_positions: int = _named(77, "max_position_embeddings")
    width: int = _named(1280, "hidden_size")
    num_layers: int = _named(32, "num_hidden_layers")
    num_heads: int = _named(20, "num_attention_heads")
    mlp_width: int = _named(5120, "intermediate_size")
    projection_dim: int = 1280
    quick_gelu: bool = _named(False, "hidden_act", _ACTIVATION)
    eos_token_id: int = 2  # marks the published files, whose pooling takes the largest id

    def __post_init__(self) -> None:
        _check_divides((self.width,), self.num_heads, f"{self.num_heads} heads (num_attention_heads)")

    def published(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            **_own_fields(self),
            "layer_norm_eps": 1e-5,
            "bos_token_id": 0,
            "pad_token_id": 1,
        }


@dataclass(frozen=True)
class CLIPImageConfig:
    """CLIP's image tower. Defaults are ViT-bigG/14's, as released with Kandinsky 2.2."""

    IDENTITY: ClassVar = ("model_type", "clip_vision_model")
    IGNORED: ClassVar = _BOOKKEEPING
    LATER_FIELDS: ClassVar = {}

    image_size: int = 224
    patch_size: int = 14
    width: int = _named(1664, "hidden_size")
    num_layers: int = _named(48, "num_hidden_layers")
    num_heads: int = _named(16, "num_attention_heads")
    mlp_width: int = _named(8192, "intermediate_size")
    projection_dim: int = 1280
    quick_gelu: bool = _named(False, "hidden_act", _ACTIVATION)

    def __post_init__(self) -> None:
        _check_divides((self.width,), self.num_heads, f"{self.num_heads} heads (num_attention_heads)")

    def published(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            **_own_fields(self),
            "layer_norm_eps": 1e-5,
            "num_channels": 3,
        }


@dataclass(frozen=True)
class MultilingualConfig:
    """2.1's second text tower, XLM-RoBERTa with a projection. Defaults are the released values."""

    IDENTITY: ClassVar = (
        "model_type",
        "xlm-roberta",
        "M-CLIP",
    )  # the official file, and what diffusers saves
    IGNORED: ClassVar = (
        _BOOKKEEPING
        | {
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "eos_token_id",
            "hidden_dropout_prob",
            "output_past",
            "use_cache",
        }
    ) - {"pad_token_id"}
    LATER_FIELDS: ClassVar = {"position_embedding_type": "absolute"}

    vocab_size: int = 250002
    max_positions: int = _named(514, "max_position_embeddings")
    num_token_types: int = _named(1, "type_vocab_size")  # of which the first is used
    width: int = _named(1024, "hidden_size")
    num_layers: int = _named(24, "num_hidden_layers")
    num_heads: int = _named(16, "num_attention_heads")
    mlp_width: int = _named(4096, "intermediate_size")
    projection_dim: int = _named(768, "numDims")

    def __post_init__(self) -> None:
        _check_divides((self.width,), self.num_heads, f"{self.num_heads} heads (num_attention_heads)")

    def published(self) -> dict[str, Any]:
        return {
            "architectures": ["MultilingualCLIP"],
            "model_type": "xlm-roberta",
            **_own_fields(self),
            "transformerDimensions": self.width,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
        }
