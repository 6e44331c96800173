"""MMaDA in PyTorch: one bidirectional transformer over text and image tokens.

This file travels with exported checkpoints and needs nothing but torch and transformers:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(input_ids, attention_mask).logits   # [B, L, V]; logits at a position predict the
                                                       # token at that position, there is no shift

Generation is iterative unmasking, not next-token prediction: `generate` of transformers doesn't apply.
Shape letters: B rows, L positions, D width, H query heads, G key/value heads, K head width, F MLP width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MMadaConfig(PretrainedConfig):
    """Fields as in the published checkpoints; the defaults are those of MMaDA-8B."""

    model_type = "mmada"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    def __init__(
        self,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=None,
        mlp_hidden_size=None,
        mlp_ratio=4,
        vocab_size=134656,
        embedding_size=None,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        weight_tying=False,
        **kwargs,
    ):
        self.d_model, self.n_layers, self.n_heads = d_model, n_layers, n_heads
        self.n_kv_heads, self.mlp_ratio = n_kv_heads, mlp_ratio
        self.mlp_hidden_size = mlp_hidden_size
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.rope_theta, self.rms_norm_eps = rope_theta, rms_norm_eps
        self.weight_tying = weight_tying
        kwargs.setdefault("tie_word_embeddings", weight_tying)
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then scaled in x's dtype."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        norm = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return norm.to(x.dtype) * self.weight


def rope_tables(length, width, theta, device=None):
    """cos and sin [L, K] of positions 0..L-1; both halves of a head turn by the same angles."""
    freq = theta ** (-torch.arange(0, width, 2, device=device).float() / width)
    angle = torch.outer(torch.arange(length, device=device).float(), freq)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rope(x_BHLK, cos_LK, sin_LK):
    """Rotates the two halves of each head by position, in float32."""
    x = x_BHLK.float()
    a, b = x.chunk(2, dim=-1)
    return (x * cos_LK + torch.cat([-b, a], dim=-1) * sin_LK).to(x_BHLK.dtype)


class Block(nn.Module):
    """Attention and gated SiLU MLP, each behind a norm."""

    def __init__(self, config):
        super().__init__()
        D, H, G = config.d_model, config.n_heads, config.n_kv_heads or config.n_heads
        wide, K = config.mlp_hidden_size or int(config.mlp_ratio * D), D // H
        self.groups = H // G
        self.d_head = K
        self.attn_norm = RMSNorm(D, config.rms_norm_eps)
        self.ff_norm = RMSNorm(D, config.rms_norm_eps)
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.attn_out = nn.Linear(H * K, D, bias=False)
        self.ff_proj = nn.Linear(D, wide, bias=False)
        self.up_proj = nn.Linear(D, wide, bias=False)
        self.ff_out = nn.Linear(wide, D, bias=False)

    def attention(self, h_BLD, cos, sin, mask):
        """Bidirectional attention of a normed input, before the residual is added."""
        B, L, D = h_BLD.shape

        def heads(x_BLD):
            return x_BLD.view(B, L, -1, self.d_head).transpose(1, 2)

        q, k = rope(heads(self.q_proj(h_BLD)), cos, sin), rope(heads(self.k_proj(h_BLD)), cos, sin)
        v = heads(self.v_proj(h_BLD))
        if self.groups > 1:
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.attn_out(out.transpose(1, 2).reshape(B, L, D))

    def forward(self, x, cos, sin, mask):
        x = x + self.attention(self.attn_norm(x), cos, sin, mask)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class MMadaModelLM(PreTrainedModel):
    """The model under the state-dict keys of LLaDA and MMaDA."""

    config_class = MMadaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        rows = config.embedding_size or config.vocab_size
        parts = {
            "wte": nn.Embedding(rows, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, rows, bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.tables = None  # cos and sin, float32 whatever the model's dtype, made when first wanted
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.d_model**-0.5)

    def get_input_embeddings(self):
        """The embedding of tokens."""
        return self.model.transformer.wte

    def get_output_embeddings(self):
        """The head, which is the embedding if the two are tied."""
        net = self.model.transformer
        return net.wte if self.config.weight_tying else net.ff_out

    def rope_tables(self, length, device):
        """The tables of `length` positions on `device`, kept between calls."""
        if self.tables is None or len(self.tables[0]) < length or self.tables[0].device != device:
            width = self.config.d_model // self.config.n_heads
            with torch.inference_mode(False):  # kept for training too
                self.tables = rope_tables(length, width, self.config.rope_theta, device)
        return (table[:length] for table in self.tables)

    def forward(self, input_ids, attention_mask=None, attention_bias=None):
        """Token ids [B, L] -> logits [B, L, V].

        `attention_mask` [B, L] says which positions are valid (all, if not given): nothing attends to
        the others, and their own logits mean nothing. `attention_bias` [B, 1, L, L], as the published
        code takes it, is instead of it: bool or integers, where a query sees a key, or floats to add.
        """
        net = self.model.transformer
        cos, sin = self.rope_tables(input_ids.shape[1], input_ids.device)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        if attention_bias is not None:
            floating = attention_bias.is_floating_point()
            mask = attention_bias.to(net.wte.weight.dtype) if floating else attention_bias.bool()
        x = net.wte(input_ids)
        for block in net.blocks:
            x = block(x, cos, sin, mask)
        return CausalLMOutput(logits=F.linear(net.ln_f(x), self.get_output_embeddings().weight))
