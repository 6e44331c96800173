"""MMaDA in plain PyTorch: the model, a training step, text and image generation.

Written from the description of the published system, as one writes PyTorch today (fused attention,
guidance as one batch of twice the rows, inference mode, no compilation). The tests compare ours
with it layer by layer, and launch/benchmark.py times it. It needs nothing but torch; the shape
letters are those of mmada_jax/transformer.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then scaled."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        norm = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return norm.to(x.dtype) * self.weight


def rope_tables(length, width, theta):
    """cos and sin [L, K] of positions 0..L-1; both halves of a head turn by the same angles."""
    freq = theta ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(length).float(), freq)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rope(x_BHLK, cos_LK, sin_LK):
    """Rotates the two halves of each head by position, in float32."""
    x = x_BHLK.float()
    a, b = x.chunk(2, dim=-1)
    return (x * cos_LK + torch.cat([-b, a], dim=-1) * sin_LK).to(x_BHLK.dtype)


class Block(nn.Module):
    """Attention and gated SiLU MLP, each behind a norm."""

    def __init__(self, width, heads, d_mlp, eps):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ff_proj = nn.Linear(width, d_mlp, bias=False)
        self.up_proj = nn.Linear(width, d_mlp, bias=False)
        self.ff_out = nn.Linear(d_mlp, width, bias=False)

    def attention(self, h_BLD, cos, sin, mask):
        """Bidirectional attention of a normed input, before the residual is added."""
        B, L, D = h_BLD.shape

        def heads(x_BLD):
            return x_BLD.view(B, L, self.heads, -1).transpose(1, 2)

        q, k = rope(heads(self.q_proj(h_BLD)), cos, sin), rope(heads(self.k_proj(h_BLD)), cos, sin)
        out = F.scaled_dot_product_attention(q, k, heads(self.v_proj(h_BLD)), attn_mask=mask)
        return self.attn_out(out.transpose(1, 2).reshape(B, L, D))

    def forward(self, x, cos, sin, mask):
        x = x + self.attention(self.attn_norm(x), cos, sin, mask)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Transformer(nn.Module):
    """The transformer under the state-dict keys of LLaDA and MMaDA."""

    def __init__(self, *, width, layers, heads, d_mlp, vocab, max_len, theta, eps):
        super().__init__()
        blocks = (Block(width, heads, d_mlp, eps) for _ in range(layers))
        parts = {
            "wte": nn.Embedding(vocab, width),
            "blocks": nn.ModuleList(blocks),
            "ln_f": RMSNorm(width, eps),
            "ff_out": nn.Linear(width, vocab, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        # Tables are kept (in float32 whatever the model's dtype), not computed in every layer.
        self.tables = rope_tables(max_len, width // heads, theta)

    def _apply(self, fn, recurse=True):
        # Tables follow the model to its device, but not into its dtype.
        out = super()._apply(fn, recurse)
        device = self.model.transformer.wte.weight.device
        self.tables = tuple(table.to(device) for table in self.tables)
        return out

    def forward(self, tokens_BL, valid_BL=None):
        """Token ids -> logits [B, L, V]. Without `valid` every position is (the faster kernel)."""
        net, L = self.model.transformer, tokens_BL.shape[1]
        cos, sin = (table[:L] for table in self.tables)
        mask = None if valid_BL is None else valid_BL[:, None, None, :]
        x = net.wte(tokens_BL)
        for block in net.blocks:
            x = block(x, cos, sin, mask)
        return net.ff_out(net.ln_f(x))


def corrupt(batch, mask, coefficients, t_B=None, noise_BL=None, eps=1e-3):
    """Hides targets: images by exact number (cosine), text by chance. -> tokens, weights [B, L].

    `batch` is a dict of tokens, target, shown [B, L] and task [B]; task 0 is t2i, 1 is lm, the
    others are answers. `coefficients` [tasks]. t and the noise are drawn if not given.
    """
    tokens, target, task = batch["tokens"], batch["target"], batch["task"]
    t = torch.rand_like(task, dtype=torch.float32) if t_B is None else t_B
    noise = torch.rand_like(tokens, dtype=torch.float32) if noise_BL is None else noise_BL
    is_image, n_target = (task == 0)[:, None], target.sum(1)

    n_hidden = (n_target * torch.cos(t * math.pi * 0.5)).round().clamp(min=1)
    rank = noise.masked_fill(~target, 2.0).argsort(1).argsort(1)
    p = (1 - eps) * t + eps
    hidden = target & torch.where(is_image, rank < n_hidden[:, None], noise < p[:, None])

    scored = hidden | (batch["shown"] & is_image)
    labelled = (scored & is_image).sum().clamp(min=1)
    rows = torch.bincount(task, minlength=len(coefficients))[task]
    length = torch.where(task == 1, tokens.shape[1], n_target).clamp(min=1)
    each = torch.where(task == 0, 1 / labelled, 1 / (p * rows * length))
    weights = scored * (coefficients[task] * each)[:, None]
    return tokens.masked_fill(hidden, mask), weights


def loss(model, tokens_BL, valid_BL, targets_BL, weights_BL):
    """sum(weights * cross entropy), over the full vocabulary."""
    logits = model(tokens_BL, valid_BL)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets_BL.flatten(), reduction="none")
    return (nll * weights_BL.flatten()).sum()


def train_step(model, optimizer, batch, mask, coefficients, clip=1.0):
    """One step: corrupt, forward, backward, clip, update. Returns the loss (a tensor)."""
    tokens, weights = corrupt(batch, mask, coefficients)
    value = loss(model, tokens, batch["valid"], batch["tokens"], weights)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return value.detach()


@torch.inference_mode()
def generate_text(model, tokens_BL, valid_BL, *, start, length, steps, block, mask, temperature=0.0):
    """Fills [start, start + length) block by block, the most certain tokens first. -> tokens."""
    tokens, per_block = tokens_BL.clone(), steps // (length // block)
    for first in range(start, start + length, block):
        span = slice(first, first + block)
        count = (tokens[:, span] == mask).sum(1, keepdim=True)
        for step in range(per_block):
            logits, now = model(tokens, valid_BL)[:, span].float(), tokens[:, span]
            noise = -torch.log(torch.empty_like(logits).exponential_()) if temperature else 0.0
            drawn = (logits + temperature * noise).argmax(-1)
            sure = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
            rank = sure.masked_fill(now != mask, -torch.inf).argsort(1, descending=True).argsort(1)
            quota = count // per_block + (step < count % per_block)
            tokens[:, span] = torch.where((now == mask) & (rank < quota), drawn, now)
    return tokens


@torch.inference_mode()
def generate_image(
    model, tokens_BL, valid_BL, uncond_BL, uncond_valid_BL, *,
    start, length, steps, guidance, mask, offset, codes, temperature=1.0, sample=True,
):  # fmt: skip
    """Fills [start, start + length) with image ids: all drawn each step, the unsure hidden again.

    `uncond` are the same rows without their text. Returns the tokens of the last draw.
    """
    tokens, span = tokens_BL.clone(), slice(start, start + length)
    both, valid = torch.cat([tokens, uncond_BL]), torch.cat([valid_BL, uncond_valid_BL])
    for step in range(steps):
        both[:, span] = tokens[:, span].repeat(2, 1)
        logits = model(both, valid)[:, span, offset : offset + codes].float()
        cond, uncond = logits.chunk(2)
        p = ((1 + guidance) * cond - guidance * uncond).softmax(-1)
        drawn = p.flatten(0, 1).multinomial(1).view(p.shape[:2]) if sample else p.argmax(-1)
        now = tokens[:, span]
        unknown = now == mask
        full = torch.where(unknown, drawn + offset, now)

        ratio = (step + 1) / steps
        # In float32, as the published system: at a ratio of 2/3 float64 hides one more.
        n_hidden = (length * torch.cos(torch.tensor(ratio) * math.pi * 0.5)).floor().long().item()
        n_hidden = (unknown.sum(1, keepdim=True) - 1).clamp(max=n_hidden).clamp(min=1)
        temperature *= 1 - ratio
        score = p.gather(-1, drawn[..., None])[..., 0].clamp(min=1e-20).log()
        if temperature:
            score -= temperature * torch.log(torch.empty_like(score).exponential_())
        score = score.masked_fill(~unknown, torch.inf)
        cut = score.sort(1).values.gather(1, n_hidden)
        tokens[:, span] = full.masked_fill(score < cut, mask)
    tokens[:, span] = full
    return tokens
