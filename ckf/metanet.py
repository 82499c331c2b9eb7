"""The meta-network: CF vectors into the language model's space, by a map made for each user.

    p   = attention-pooled vectors of the user's last liked items (a learned default without any)
    W_u = I + reshape(MLP(p))                     (d, d), the user's own map
    u   = Linear(e_u W_u)                         (width of the language model)
    v_i = Linear(e_i)
    m   = Linear(CF score of user and item)       (optional, see ckf.match)

Who has no CF vector (all zeros) gets a learned embedding instead of u or v_i. A zero embedding
would go through norms whose gradient there is 1 / sqrt(eps): 1e5 together in models that normalise
queries and keys too (Gemma 3, Qwen3), and clipping would then take the step from all else.

Embeddings have a deviation of 0.14 in SmolLM2-135M and of 1.03 in Gemma 3 270M. The parameters have
SmolLM2's size whatever the model, and ``gain`` takes their output to the model's scale: a step of
Adam moves a vector by the same share everywhere, and clipping sees gradients of one size.

Source: Zhao et al., "Collaborative Knowledge Fusion", TKDE 2025. Simpler maps stand beside it for
comparison: one W for all users, an MLP, or the linear layer alone.
"""

import torch
from torch import Tensor, nn

from ckf.config import VECTOR_MAPS

# Deviation of SmolLM2-135M's embeddings, for which learning rates were chosen; in full, so that its
# gain is 1.
UNIT = 0.1355782151222229


class MetaNetwork(nn.Module):
    """Maps user and item CF vectors (.., d) to vectors (.., width) like token embeddings.

    Args:
        dim: d, the length of a standardised CF vector.
        width: the language model's embedding width.
        scale: standard deviation of its token embeddings; mapped vectors start at this scale.
        kind: "meta", "constant" (one W for all), "mlp" or "linear".
        hidden: width of the MLP.
        matches: whether there is a place for the CF score of user and item.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        scale: float,
        kind: str = "meta",
        hidden: int = 64,
        matches: bool = False,
    ) -> None:
        super().__init__()
        if kind not in VECTOR_MAPS or kind == "none":
            raise ValueError(f"kind is {kind!r}; expected meta, constant, mlp or linear")
        self.dim, self.width, self.kind = dim, width, kind
        self.user_out, self.item_out = nn.Linear(dim, width), nn.Linear(dim, width)
        for out in (self.user_out, self.item_out):
            nn.init.normal_(out.weight, std=UNIT / dim**0.5)  # unit vectors land at the scale
            nn.init.zeros_(out.bias)
        if kind == "meta":
            self.query = nn.Parameter(torch.zeros(dim))
            self.no_history = nn.Parameter(torch.zeros(dim))
            self.make_map = _mlp(dim, hidden, dim * dim)
        elif kind == "constant":
            self.map = nn.Parameter(torch.eye(dim))
        elif kind == "mlp":
            self.user_mlp, self.item_mlp = _mlp(dim, hidden, dim), _mlp(dim, hidden, dim)
        if matches:
            self.match_out = nn.Linear(1, width)
            nn.init.normal_(self.match_out.weight, std=UNIT)
            nn.init.normal_(self.match_out.bias, std=UNIT)
        for who in ("user", "item"):
            start = torch.randn(width) * UNIT
            self.register_parameter(f"no_{who}", nn.Parameter(start))
            self.register_buffer(f"start_{who}", start.clone(), persistent=False)
        self.register_buffer("gain", torch.tensor(scale / UNIT))

    @torch.no_grad()
    def start_matches_at(self, yes: Tensor, no: Tensor) -> None:
        """Let the CF score begin as a blend of two words' embeddings, yes and no (width,).

        At score 0 the placeholder is their mean, one deviation up it is ``yes``, one down ``no``.
        So the model reads the score from the first step on, and a norm over the width cannot take
        its size away.
        """
        self.match_out.weight[:, 0] = (yes - no) / (2 * self.gain)
        self.match_out.bias.copy_((yes + no) / (2 * self.gain))

    @torch.no_grad()
    def settle(self) -> None:
        """After training: where no row lacked a vector, the bias, which all vectors have in common.

        It has learned something; the random start of ``no_user`` or ``no_item`` would still be one.
        """
        for who in ("user", "item"):
            own = getattr(self, f"no_{who}")
            if torch.equal(own, getattr(self, f"start_{who}")):
                own.copy_(getattr(self, f"{who}_out").bias)

    def user_maps(self, history: Tensor, mask: Tensor) -> Tensor:
        """W_u (b, d, d) from history vectors (b, h, d) and their mask (b, h), True where real."""
        scores = (history @ self.query) / self.dim**0.5  # (b, h)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=1)
        weights = torch.where(mask, weights, 0)  # rows without history: softmax gave NaN
        pooled = (weights.unsqueeze(2) * history).sum(1)  # (b, d)
        pooled = torch.where(mask.any(1, keepdim=True), pooled, self.no_history)
        flat = self.make_map(pooled)  # (b, d * d)
        eye = torch.eye(self.dim, device=flat.device, dtype=flat.dtype)
        return eye + flat.view(-1, self.dim, self.dim)

    def forward(self, users: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """Users (b, d) with histories (b, h, d) and mask (b, h) to (b, width)."""
        known = users.any(1, keepdim=True)
        if self.kind == "meta":
            users = torch.bmm(users.unsqueeze(1), self.user_maps(history, mask)).squeeze(1)
        elif self.kind == "constant":
            users = users @ self.map
        elif self.kind == "mlp":
            users = users + self.user_mlp(users)
        return self.gain * torch.where(known, self.user_out(users), self.no_user)

    def items(self, vectors: Tensor) -> Tensor:
        """Items (.., d) to (.., width)."""
        known = vectors.any(-1, keepdim=True)
        if self.kind == "mlp":
            vectors = vectors + self.item_mlp(vectors)
        return self.gain * torch.where(known, self.item_out(vectors), self.no_item)

    def matches(self, scores: Tensor) -> Tensor:
        """Standardised CF scores (.., 1) to (.., width)."""
        return self.gain * self.match_out(scores)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two layers whose output starts near zero, so that maps start near the identity."""
    last = nn.Linear(hidden, outputs)
    nn.init.normal_(last.weight, std=1e-2 / hidden**0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), last)
