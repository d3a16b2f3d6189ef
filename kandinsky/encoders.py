"""CLIP's two towers (arXiv:2103.00020; 2.2 uses OpenCLIP's ViT-bigG/14) and 2.1's multilingual one.

    prompt ─ PromptTokenizer → ids (b, n) ─ CLIPTextEncoder → text_states (b, n, d), text_embeds (b, d)
    picture ─ images.clip_pixels → (b, 3, 224, 224) ─ CLIPImageEncoder → image_embeds (b, d)

Both are pre-norm transformers; the text tower is causal and read at the prompt's end, the image tower sees a
class token before its patches and is read there. 2.1's decoder reads the prompt itself, through XLM-RoBERTa:

    prompt ─ MultilingualTokenizer → ids (b, 77) ─ MultilingualCLIP → text_states (b, 77, 1024), text_embeds

Why CLIP: trained so that a picture's embedding and its caption's point the same way, it is what lets a
prior go from one to the other, and what lets pictures be mixed as numbers. Only text is encoded to draw
from text: the image tower's one use there is the zero image's constant embedding
(`zero_image.zero_image_embeds`).

A tour: `SelfAttention` and the layers above it serve both of CLIP's towers; `TextTransformer.forward` and
`ImageTransformer.forward` are the two lines of the first diagram; XLM-RoBERTa's blocks follow, post-norm.

What the checkpoints force: the text is read at the largest id, which must be the end token's; the image
tower's first norm is spelt `pre_layrnorm`; XLM-RoBERTa counts positions from 2 and averages over real
tokens.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.checkpoint import Pretrained
from kandinsky.config import CLIPImageConfig, CLIPTextConfig, MultilingualConfig
from kandinsky.layers import attention

PADDING = 1  # the id of XLM-RoBERTa's padding, and its position


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (b, n, c), mask: (n, n) or None -> (b, n, c)"""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.num_heads, mask))


class MLP(nn.Module):
    """With the exact GELU, or the sigmoid approximation that OpenAI's towers were trained with."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPImageConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = SelfAttention(config.width, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width, config.quick_gelu)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (b, n, c) -> (b, n, c)"""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPImageConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (b, n, c) -> (b, n, c)"""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, c)"""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, c); every token sees itself and what stands before"""
        n = ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal))


class CLIPTextEncoder(nn.Module, Pretrained):
    """CLIP's text tower with its projection."""

    config_class = CLIPTextConfig
    weights_name = "model.safetensors"

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes prompts.

        Args:
            ids: (b, n) token ids, n up to 77. Being causal, the tower gives a prompt's tokens the same states
                however much padding follows.

        Returns:
            text_states: (b, n, d) float32, the normalised last hidden states.
            text_embeds: (b, projection_dim) float32, the projected state of the end token.
        """
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.max_positions:
            raise ValueError(
                f"ids is {tuple(ids.shape)}, needs (b, n) with n from 1 to {self.config.max_positions}"
            )
        states = self.text_model(ids)
        # eos_token_id 2 is a mistake of the published files; their end token is the one with the largest id
        ends = ids if self.config.eos_token_id == 2 else (ids == self.config.eos_token_id).int()
        pooled = states[torch.arange(len(ids), device=ids.device), ends.argmax(dim=1)]
        return states.float(), self.text_projection(pooled).float()


class ImageEmbeddings(nn.Module):
    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + num_patches, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, size, size) -> (b, 1 + patches, c), the class token first"""
        patches = rearrange(self.patch_embedding(pixels), "b c h w -> b (h w) c")
        class_token = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class ImageTransformer(nn.Module):
    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # the checkpoint's spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, size, size) -> (b, c), read at the class token"""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(states[:, 0])


class CLIPImageEncoder(nn.Module, Pretrained):
    """CLIP's image tower with its projection."""

    config_class = CLIPImageConfig
    weights_name = "model.safetensors"

    def __init__(self, config: CLIPImageConfig = CLIPImageConfig()):
        super().__init__()
        self.config = config
        self.vision_model = ImageTransformer(config)
        self.visual_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (b, 3, size, size) as `images.clip_pixels` makes them -> (b, projection_dim) float32"""
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels is {tuple(pixels.shape)}, needs (b, 3, {size}, {size})")
        return self.visual_projection(self.vision_model(pixels.to(self.dtype))).float()


class KeysQueriesValues(nn.Module):
    """Named `self` in the checkpoint."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (b, n, c), mask: (b, 1, 1, n) True for real tokens -> (b, n, c)"""
        return attention(self.query(x), self.key(x), self.value(x), self.num_heads, mask)


class AddAndNorm(nn.Module):
    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x: (b, n, in_width), before: (b, n, c) -> (b, n, c)"""
        return self.LayerNorm(before + self.dense(x))


class MultilingualLayer(nn.Module):
    """BERT's: the norms come after the sums (arXiv:1810.04805)."""

    def __init__(self, config: MultilingualConfig):
        super().__init__()
        self.attention = nn.ModuleDict()
        self.attention["self"] = KeysQueriesValues(config.width, config.num_heads)
        self.attention["output"] = AddAndNorm(config.width, config.width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.mlp_width)})
        self.output = AddAndNorm(config.mlp_width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (b, n, c) -> (b, n, c)"""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class MultilingualEmbeddings(nn.Module):
    def __init__(self, config: MultilingualConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, c). Positions count the real tokens from 2; padding, id 1, has position 1."""
        is_real = ids != PADDING
        positions = PADDING + is_real.cumsum(dim=1) * is_real
        words = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        return self.LayerNorm(words + self.position_embeddings(positions))


class MultilingualTransformer(nn.Module):
    """XLM-RoBERTa (arXiv:1911.02116)."""

    def __init__(self, config: MultilingualConfig):
        super().__init__()
        self.embeddings = MultilingualEmbeddings(config)
        layers = nn.ModuleList(MultilingualLayer(config) for _ in range(config.num_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        # in the file, read by nobody
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.width, config.width)})

    def forward(self, ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, c); padding sees the real tokens, and nobody sees padding"""
        x, mask = self.embeddings(ids), (ids != PADDING)[:, None, None]
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return x


class MultilingualCLIP(nn.Module, Pretrained):
    """The text tower of 2.1's decoder, which reads a hundred languages."""

    config_class = MultilingualConfig
    weights_name = "model.safetensors"

    def __init__(self, config: MultilingualConfig = MultilingualConfig()):
        super().__init__()
        self.config = config
        self.transformer = MultilingualTransformer(config)
        self.LinearTransformation = nn.Linear(config.width, config.projection_dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes prompts.

        Args:
            ids: (b, n) token ids, n up to 512, padded with id 1.

        Returns:
            text_states: (b, n, d) float32, the last hidden states; the U-Net reads those of padding too.
            text_embeds: (b, projection_dim) float32, the projected mean over the real tokens.
        """
        longest = self.config.max_positions - PADDING - 1
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= longest:
            raise ValueError(f"ids is {tuple(ids.shape)}, needs (b, n) with n from 1 to {longest}")
        states, is_real = self.transformer(ids), (ids != PADDING)[..., None]
        mean = (states * is_real).sum(dim=1) / is_real.sum(dim=1)
        return states.float(), self.LinearTransformation(mean.to(states.dtype)).float()
