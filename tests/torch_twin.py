"""What MMaDA does with its model, in plain PyTorch: a training step, text and image generation, and text
generation with stored keys and values.

Written from the description of the published system, as one writes PyTorch today (fused attention,
guidance as one batch of twice the rows, inference mode, no compilation). The model is the one that
travels with exported checkpoints, mmada_jax/weights/modeling_mmada.py. The tests compare ours with
these two files, and launch/benchmarks/twin.py times them.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


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
    logits = model(tokens_BL, valid_BL).logits
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
            logits, now = model(tokens, valid_BL).logits[:, span].float(), tokens[:, span]
            noise = -torch.log(torch.empty_like(logits).exponential_()) if temperature else 0.0
            drawn = (logits + temperature * noise).argmax(-1)
            sure = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
            rank = sure.masked_fill(now != mask, -torch.inf).argsort(1, descending=True).argsort(1)
            quota = count // per_block + (step < count % per_block)
            tokens[:, span] = torch.where((now == mask) & (rank < quota), drawn, now)
    return tokens


def rope(x_BHLK, cos_LK, sin_LK):
    """Rotates the two halves of each head by position."""
    a, b = x_BHLK.chunk(2, dim=-1)
    return x_BHLK * cos_LK + torch.cat([-b, a], dim=-1) * sin_LK


def hidden_states(model, tokens_BQ, places, cache):
    """The states [B, Q, D] before the head of the tokens at `places`, a slice of each row.

    Their keys and values replace those in the cache, a pair of tensors [B, H, L, K] for each layer, all of
    which they see.
    """
    net = model.model.transformer
    cos, sin = (x[places] for x in model.rope_tables(cache[0][0].shape[2], tokens_BQ.device))
    x = net.wte(tokens_BQ)
    for layer, (k_BHLK, v_BHLK) in zip(net.blocks, cache, strict=True):
        h = layer.attn_norm(x)
        q, k, v = (
            project(h).unflatten(-1, (-1, layer.d_head)).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        k_BHLK[:, :, places] = rope(k, cos, sin).repeat_interleave(layer.groups, dim=1)
        v_BHLK[:, :, places] = v.repeat_interleave(layer.groups, dim=1)
        out = F.scaled_dot_product_attention(rope(q, cos, sin), k_BHLK, v_BHLK)
        x = x + layer.attn_out(out.transpose(1, 2).flatten(2))
        h = layer.ff_norm(x)
        x = x + layer.ff_out(F.silu(layer.ff_proj(h)) * layer.up_proj(h))
    return x


@torch.inference_mode()
def generate_text_cached(model, tokens_BL, *, start, length, block, mask):
    """Fills [start, start + length) block by block, the most certain token in each step. -> tokens.

    The first step of a block computes the whole row and stores keys and values, the other steps compute the
    block alone. Rows are whole, without padding. The mask isn't drawn.
    """
    tokens, net, (B, L) = tokens_BL.clone(), model.model.transformer, tokens_BL.shape
    heads = model.config.n_heads
    like = {"dtype": net.wte.weight.dtype, "device": tokens.device}
    cache = [torch.empty(2, B, heads, L, model.config.d_model // heads, **like) for _ in net.blocks]
    for first in range(start, start + length, block):
        span = slice(first, min(first + block, start + length))
        for step in range(span.stop - first):
            if step == 0:
                x = hidden_states(model, tokens, slice(0, L), cache)[:, span]
            else:
                x = hidden_states(model, tokens[:, span], span, cache)
            logits, now = net.ff_out(net.ln_f(x)).float(), tokens[:, span]
            drawn = logits.index_fill(-1, torch.tensor(mask, device=logits.device), -torch.inf).argmax(-1)
            sure = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
            best = sure.masked_fill(now != mask, -torch.inf).argmax(1, keepdim=True)
            tokens[:, span] = now.scatter(1, best, drawn.gather(1, best))
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
        logits = model(both, valid).logits[:, span, offset : offset + codes].float()
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
