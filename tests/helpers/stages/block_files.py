"""A block drafter's forward from nothing but a folder's files, with Transformers' own Qwen3 parts, so that it shares no line with ours.

Shape legend: S slots of a block, K draft steps, D hidden, H heads, G key/value heads, Vd draft vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from draftsmith.models import Target


class BlockFiles:
    """A folder in z-lab's layout or that of the speculators package.

    DFlash (arXiv:2602.06036): context vectors are norm(fc(states)); slots hold the root and masks; slot k of a block is at the root's
    position + k, and sees the context and its block. DSpark (arXiv:2607.05147) adds a matrix of the token before a slot to its logits.
    DFlash 2 mixes each slot with the one before it, on both sides of attention and MLP, and scores the likeliest tokens of a slot again.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.target, self.tensors = target, load_file(folder / "model.safetensors")
        self.config = Qwen3Config.from_dict(fields.get("transformer_layer_config", fields))
        self.fields = {**fields, **fields.get("dflash_config", {})}
        counts = self.fields.get("aux_hidden_state_layer_ids")
        self.states = [i + 1 for i in self.fields["target_layer_ids"]] if counts is None else counts
        self.from_root = self.fields.get("sample_from_anchor", self.fields.get("shift_label", False))

    def loaded(self, module: nn.Module, prefix: str) -> nn.Module:
        """A module of Transformers with the folder's tensors."""
        own = {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}
        module.load_state_dict(own, strict=True)
        return module

    def normed(self, name: str, x: Tensor) -> Tensor:
        """An RMS norm whose weight is a tensor of the folder."""
        norm = Qwen3RMSNorm(len(self.tensors[f"{name}.weight"]), eps=self.config.rms_norm_eps)
        return self.loaded(norm, f"{name}.")(x)

    def slots(self, text: list[int]) -> Tensor:
        """[S, D] behind the last layer, of the block whose root is the last token of a text."""
        hidden = self.target.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        context = torch.cat([hidden[k][0] for k in self.states], dim=-1) @ self.tensors["fc.weight"].T
        context, size = self.normed("hidden_norm", context), self.fields["block_size"]
        tokens = [text[-1]] + [self.fields["mask_token_id"]] * (size - 1)
        x = self.target.model.get_input_embeddings()(torch.tensor(tokens))
        for number in range(self.config.num_hidden_layers):
            x = self.layer(f"layers.{number}.", x, context)
        return self.normed("norm", x)

    def layer(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        """One decoder layer over the slots [S, D]."""
        normed, groups = self.normed(f"{name}input_layernorm", x), self.config.num_key_value_heads
        inputs = self.mixed(f"{name}attention_conv", 0, normed, normed)
        sources = torch.cat([context, inputs])

        def heads(part: str, of: Tensor, count: int) -> Tensor:
            return self.projected(f"{name}self_attn.{part}_proj", of).unflatten(-1, (count, -1))

        queries = self.normed(f"{name}self_attn.q_norm", heads("q", inputs, self.config.num_attention_heads))
        keys = self.normed(f"{name}self_attn.k_norm", heads("k", sources, groups))
        places = torch.arange(len(sources))[None]
        cosines, sines = Qwen3RotaryEmbedding(self.config)(x, places)
        keys, _ = apply_rotary_pos_emb(keys.transpose(0, 1)[None], keys.transpose(0, 1)[None], cosines, sines)
        own = slice(len(context), None)
        turned, _ = apply_rotary_pos_emb(
            queries.transpose(0, 1)[None], queries.transpose(0, 1)[None], cosines[:, own], sines[:, own]
        )
        seen = torch.ones(len(x), len(sources), dtype=torch.bool)
        slides = self.config.layer_types[int(name.split(".")[1])] == "sliding_attention"
        if self.fields.get("is_causal", slides and not self.fields.get("sliding_window_non_causal", False)):
            seen[:, own] = seen[:, own].tril()
        if slides:
            # The speculators package counts from the root, z-lab's layout from each slot.
            of_package = "speculators_model_type" in self.fields
            last = len(context) - 1 if of_package else len(context) + torch.arange(len(x))[:, None]
            seen &= places > last - self.config.sliding_window
        values = heads("v", sources, groups).transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(turned, keys, values, seen, enable_gqa=True)
        outputs = self.projected(f"{name}self_attn.o_proj", attended[0].transpose(0, 1).flatten(1))
        x = x + self.mixed(f"{name}attention_conv", 1, normed, outputs)
        mlp, normed = (
            self.loaded(Qwen3MLP(self.config), f"{name}mlp."),
            self.normed(f"{name}post_attention_layernorm", x),
        )
        conv = f"{name}mlp_conv"
        return x + self.mixed(conv, 1, normed, mlp(self.mixed(conv, 0, normed, normed)))

    def projected(self, name: str, x: Tensor) -> Tensor:
        """A linear layer, with a bias where the folder has one."""
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", torch.zeros(()))

    def mixed(self, name: str, side: int, normed: Tensor, x: Tensor) -> Tensor:
        """[S, D]: a DFlash 2's convolution, slot by slot and channel by channel; without one, x."""
        if f"{name}.base_kernel" not in self.tensors:
            return x
        base, projection = self.tensors[f"{name}.base_kernel"][side], self.tensors[f"{name}.kernel_projection.weight"]
        group, mixed = self.fields["conv_group_size"], torch.zeros_like(x)
        num_groups = x.shape[1] // group
        for slot in range(len(x)):
            kernel = (projection @ normed[slot]).view(2, 2, num_groups)[side]
            for channel in range(x.shape[1]):
                taps = base[:, channel] + kernel[:, channel // group]
                before = x[slot - 1, channel] if slot else 0.0
                mixed[slot, channel] = taps[0] * x[slot, channel] + taps[1] * before
        return mixed

    @torch.no_grad()
    def logits(self, text: list[int], drafted: list[int]) -> Tensor:
        """[K, Vd]: behind a text and the tokens drafted so far, K - 1 of them."""
        slots = self.slots(text)[0 if self.from_root else 1 :]
        head = self.tensors.get("lm_head.weight", self.target.model.get_output_embeddings().weight)
        logits, mask = slots @ head.T, self.fields["mask_token_id"]
        kept = torch.arange(len(head)) + self.tensors.get("d2t", 0)
        logits[:, kept == mask] = -torch.inf  # ours never drafts it
        return self.selected(logits) + self.added(slots, [text[-1], *drafted])

    def selected(self, logits: Tensor) -> Tensor:
        """[K, Vd]: a DFlash 2's candidates alone."""
        count = self.fields.get("selector_top_k", logits.shape[1])
        for row in logits:
            row[row.argsort(descending=True)[count:]] = -torch.inf
        return logits

    def added(self, slots: Tensor, before: list[int]) -> Tensor:
        """[K, Vd]: what a Markov or a recurrent head adds, by the tokens before the slots."""
        w = self.tensors
        if "prefix_gru.weight_ih_l0" in w:
            gru = nn.GRU(slots.shape[1], self.fields["gru_hidden_dim"], bias=False)
            states, _ = self.loaded(gru, "prefix_gru.")(self.target.model.get_input_embeddings()(torch.tensor(before)))
            inner = F.silu(torch.cat([slots, states], dim=-1) @ w["embed_proj.0.weight"].T)
            return (inner @ w["embed_proj.2.weight"].T) * (torch.arange(len(slots)) > 0)[:, None]
        if "candidate_selector.predecessor_codebook" in w:
            context = slots @ w["candidate_selector.hidden_projection.weight"].T
            context = context * w["candidate_selector.predecessor_codebook"][before]
            return context @ w["candidate_selector.successor_codebook"].T
        if "markov_head.markov_w1.weight" not in w:
            return torch.zeros(())
        of_tokens, kind = w["markov_head.markov_w1.weight"][before], self.fields["markov_head_type"]
        if kind == "gated":
            gate, bias = w["markov_head.gate_proj.weight"], w["markov_head.gate_proj.bias"]
            of_tokens = torch.sigmoid(torch.cat([slots, of_tokens], dim=-1) @ gate.T + bias) * of_tokens
        elif kind == "rnn":
            of_tokens = self.recurrent(slots, of_tokens)
        return of_tokens @ w["markov_head.markov_w2.weight"].T

    def recurrent(self, slots: Tensor, of_tokens: Tensor) -> Tensor:
        """[K, r]: tanh(o) of every slot."""
        state, outputs = torch.zeros(of_tokens.shape[1]), []
        for slot, of_token in zip(slots, of_tokens, strict=True):
            joined = torch.cat([state, of_token, slot]) @ self.tensors["markov_head.joint_proj.weight"].T
            gate, candidate, output = (joined + self.tensors["markov_head.joint_proj.bias"]).chunk(3)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            outputs.append(torch.tanh(output))
        return torch.stack(outputs)
