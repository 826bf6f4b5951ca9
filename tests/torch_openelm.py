"""OpenELM in PyTorch under the names of Apple's Hugging Face code, for PEFT to put adapters on."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.H, self.K, self.D = config.num_query_heads[layer], config.num_kv_heads[layer], config.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, (self.H + 2 * self.K) * self.D, bias=False)
        if config.normalize_qk_projections:
            self.q_norm, self.k_norm = nn.RMSNorm(self.D, eps=1e-6), nn.RMSNorm(self.D, eps=1e-6)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.out_proj = nn.Linear(self.H * self.D, config.model_dim, bias=False)

    def forward(self, x):
        B, L, _ = x.shape
        qkv = self.qkv_proj(x).reshape(B, L, -1, self.D).transpose(1, 2)
        queries, keys, values = qkv.split([self.H, self.K, self.K], dim=1)
        queries, keys = rotate(self.q_norm(queries)), rotate(self.k_norm(keys))
        heads = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return self.out_proj(heads.transpose(1, 2).reshape(B, L, -1))


def rotate(x):
    L, D = x.shape[-2:]
    angles = torch.arange(L)[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class FeedForward(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.is_gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, (1 + self.is_gated) * config.ffn_dims[layer], bias=False)
        self.proj_2 = nn.Linear(config.ffn_dims[layer], config.model_dim, bias=False)

    def forward(self, x):
        if not self.is_gated:
            return self.proj_2(F.silu(self.proj_1(x)))
        gate, hidden = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(F.silu(gate) * hidden)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.ffn = Attention(config, layer), FeedForward(config, layer)
        self.attn_norm, self.ffn_norm = (nn.RMSNorm(config.model_dim, eps=1e-6) for _ in range(2))

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_transformer_layers))
        self.norm = nn.RMSNorm(config.model_dim, eps=1e-6)

    def forward(self, tokens):
        x = self.token_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class OpenELM(nn.Module):
    """As in Apple's code, the output of a tied model reads `token_embeddings.weight`."""

    def __init__(self, config, weights):
        super().__init__()
        is_tied = config.share_input_output_layers
        self.config = PretrainedConfig(model_type="openelm", tie_word_embeddings=is_tied)
        self.transformer = Transformer(config)
        self.lm_head = None if is_tied else nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        self.eval()

    def forward(self, input_ids, **_):
        hidden = self.transformer(input_ids)
        return F.linear(hidden, (self.lm_head or self.transformer.token_embeddings).weight)

    def prepare_inputs_for_generation(self, *_, **__):
        """PEFT looks for it in a causal language model."""
        raise NotImplementedError


def for_transformers(inner, eos_token_id, vocab_size):
    """The model as programs take it that call `generate` of transformers."""
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Wrapped(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(inner.config)
            self.inner = inner

        def forward(self, input_ids, attention_mask=None, **kwargs):  # for rows without padding
            return CausalLMOutput(logits=self.inner(input_ids))

        def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
            return {"input_ids": input_ids}

    inner.config.eos_token_id, inner.config.vocab_size = eos_token_id, vocab_size
    inner.config.num_hidden_layers = len(inner.transformer.layers)  # for a cache, which `forward` does not use
    return Wrapped().eval()
