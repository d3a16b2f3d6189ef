"""The image prior: text in, CLIP image embedding out (arXiv:2204.06125 §2.2, the diffusion prior).

A causal transformer reads 81 tokens and predicts, at the last one, the clean image embedding:

    text_states (b, 77, d) ─────────── encoder_hidden_states_proj ┐
    text_embeds (b, d) ─────────────── embedding_proj ────────────┤
    t (b,) ─ sinusoids ─────────────── time_embedding ────────────┼→ (b, 81, width) ─ 20 × Block ─ norm_out
    x (b, d), the noisy embedding ──── proj_in ───────────────────┤  └ last ─ proj_to_clip_embeddings → (b, d)
    a learned read-out token ───────── prd_embedding ─────────────┘

Because the mask is causal, the first 78 tokens never see the timestep or the noise: `prefill` computes their
keys and values once for a prompt and `step` runs only the last three.

Why a prior at all: CLIP's text and image embeddings lie apart, and one text fits many pictures. So an image
embedding is drawn, by diffusion under the cosine schedule, and the decoder never sees the text (2.2). Why
it predicts the clean embedding and not the noise: arXiv:2204.06125, eq. 2, found that better.

A tour: `Prior.forward` is the diagram; `Block` and `SelfAttention` are any pre-norm transformer's; then
`prefill` and `step`, which are `forward` cut in two; `sampling.sample_prior` is the loop around them.

What the checkpoint forces: embeddings are normalised by `clip_mean` and `clip_std`, which lie in the file,
so `denormalize` follows the loop; a prompt's padding is masked, and as nothing reads a masked token, it is
cut, but the last four tokens keep their positions; norms are called 1 and 3, feed-forwards `net.0` and
`net.2`, after diffusers' blocks, which have a cross-attention and a dropout between them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.checkpoint import Pretrained
from kandinsky.config import PriorConfig
from kandinsky.layers import TimestepMLP, attention, check_shape

KeysValues = tuple[Tensor, Tensor]  # each (b, n, c)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))  # Sequential: the checkpoint says to_out.0

    def forward(self, x: Tensor, mask: Tensor, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """x: (b, n, c), mask: (b, 1, n, m + n), past: m earlier tokens -> (b, n, c), those of m + n"""
        k, v = self.to_k(x), self.to_v(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        return self.to_out(attention(self.to_q(x), k, v, self.num_heads, mask)), (k, v)


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # Identity: the checkpoint counts a dropout between net.0 and net.2
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = SelfAttention(width, num_heads)
        self.norm3 = nn.LayerNorm(width)  # the checkpoint has no cross-attention, hence no norm2
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """x: (b, n, c) -> (b, n, c), keys and values as SelfAttention's"""
        attended, keys_values = self.attn1(self.norm1(x), mask, past)
        x = x + attended
        return x + self.ff(self.norm3(x)), keys_values


class PriorCache(NamedTuple):
    """What the prior knows of a prompt: the same for every timestep and every noise."""

    keys_values: list[KeysValues]  # one per block, of the real text tokens and the text embedding
    mask: Tensor  # (b, n) True where a cached token is real

    def rows(self, index: Tensor) -> "PriorCache":
        """The cache of a batch whose row i is prompt index[i]; prompts may repeat. index: (b,) integers"""
        return PriorCache([(k[index], v[index]) for k, v in self.keys_values], self.mask[index])


def causal_mask(seen: Tensor, num_queries: int) -> Tensor:
    """seen: (b, m), True for real tokens -> (b, 1, num_queries, m), for the last num_queries tokens"""
    m = seen.shape[1]
    earlier = torch.ones(num_queries, m, dtype=torch.bool, device=seen.device).tril(m - num_queries)
    return (seen[:, None, :] & earlier)[:, None]


class Prior(nn.Module, Pretrained):
    """The diffusion prior of unCLIP; predicts the clean, normalised image embedding."""

    config_class = PriorConfig

    def __init__(self, config: PriorConfig = PriorConfig()):
        super().__init__()
        self.config = config
        width, dim = config.num_heads * config.head_dim, config.embedding_dim
        self.encoder_hidden_states_proj = nn.Linear(dim, width)
        self.embedding_proj = nn.Linear(dim, width)
        self.time_embedding = TimestepMLP(width, width)
        self.proj_in = nn.Linear(dim, width)
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.num_embeddings + 4, width))
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, dim)
        self.clip_mean = nn.Parameter(torch.zeros(1, dim))
        self.clip_std = nn.Parameter(torch.ones(1, dim))

    def text_tokens(self, text_embeds: Tensor, text_states: Tensor) -> Tensor:
        """(b, d), (b, n, d) -> (b, n + 1, width): the text states, then the text embedding"""
        n = text_states.shape[1]
        positions = torch.cat([self.positional_embedding[:, :n], self.positional_embedding[:, -4:-3]], dim=1)
        states = self.encoder_hidden_states_proj(text_states.to(self.dtype))
        embeds = self.embedding_proj(text_embeds.to(self.dtype))
        return torch.cat([states, embeds[:, None]], dim=1) + positions

    def noisy_tokens(self, x: Tensor, t: Tensor) -> Tensor:
        """(b, d), (b,) -> (b, 3, width): timestep, noisy image embedding, read-out"""
        noisy = self.proj_in(x.to(self.dtype))
        tokens = [self.time_embedding(t)[:, None], noisy[:, None], self.prd_embedding.expand(len(x), -1, -1)]
        return torch.cat(tokens, dim=1) + self.positional_embedding[:, -3:]

    def read_out(self, x: Tensor) -> Tensor:
        """(b, n, width) -> (b, d): the predicted clean embedding, read at the last token"""
        return self.proj_to_clip_embeddings(self.norm_out(x)[:, -1]).float()

    def forward(
        self, x: Tensor, t: Tensor, text_embeds: Tensor, text_states: Tensor, text_mask: Tensor
    ) -> Tensor:
        """One prediction over all 81 tokens.

        Args:
            x: (b, d) noisy image embedding.
            t: (b,) timestep, 0 to 999.
            text_embeds: (b, d) the text tower's projected vector.
            text_states: (b, n, d) its last hidden states, n up to 77.
            text_mask: (b, n) True for real tokens.

        Returns:
            (b, d) float32, the predicted clean image embedding.
        """
        self._check(text_embeds, text_states, text_mask)
        self._check_noisy(x, t, len(text_embeds))
        seen = torch.cat([text_mask.bool(), text_mask.new_ones(len(x), 4, dtype=torch.bool)], dim=1)
        mask = causal_mask(seen, seen.shape[1])
        tokens = torch.cat([self.text_tokens(text_embeds, text_states), self.noisy_tokens(x, t)], dim=1)
        for block in self.transformer_blocks:
            tokens, _ = block(tokens, mask)
        return self.read_out(tokens)

    def prefill(self, text_embeds: Tensor, text_states: Tensor, text_mask: Tensor) -> PriorCache:
        """Keys and values of all that does not depend on timestep and noise; arguments as `forward`'s."""
        self._check(text_embeds, text_states, text_mask)
        is_real = text_mask.bool().any(dim=0)
        length = int(is_real.nonzero().max()) + 1 if is_real.any() else 0  # later padding is never seen
        text_mask, text_states = text_mask[:, :length].bool(), text_states[:, :length]
        seen = torch.cat([text_mask, text_mask.new_ones(len(text_mask), 1)], dim=1)
        mask = causal_mask(seen, length + 1)
        tokens = self.text_tokens(text_embeds, text_states)
        cache = []
        for block in self.transformer_blocks:
            tokens, keys_values = block(tokens, mask)
            cache.append(keys_values)
        return PriorCache(cache, seen)

    def step(self, x: Tensor, t: Tensor, cache: PriorCache) -> Tensor:
        """`forward` for the price of three tokens. x: (b, d), t: (b,), a cache of b rows -> (b, d)"""
        self._check_noisy(x, t, len(cache.mask))
        seen = torch.cat([cache.mask, cache.mask.new_ones(len(x), 3)], dim=1)
        mask = causal_mask(seen, 3)
        tokens = self.noisy_tokens(x, t)
        for block, past in zip(self.transformer_blocks, cache.keys_values):
            tokens, _ = block(tokens, mask, past)
        return self.read_out(tokens)

    def denormalize(self, x: Tensor) -> Tensor:
        """From the prior's normalised space to CLIP's. x: (b, d) -> (b, d) float32"""
        return x * self.clip_std.float() + self.clip_mean.float()

    def _check_noisy(self, x: Tensor, t: Tensor, b: int) -> None:
        check_shape("x", x, b, self.config.embedding_dim)
        check_shape("t", t, b)

    def _check(self, text_embeds: Tensor, text_states: Tensor, text_mask: Tensor) -> None:
        d, limit = self.config.embedding_dim, self.config.num_embeddings
        check_shape("text_states", text_states, "b", "n", d)
        b, n = text_states.shape[:2]
        check_shape("text_embeds", text_embeds, b, d)
        check_shape("text_mask", text_mask, b, n)
        if n > limit:
            raise ValueError(f"text_states has {n} tokens, this prior reads at most {limit}")
