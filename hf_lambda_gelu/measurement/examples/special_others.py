"""Inputs of the other models of which the signature of forward does not tell them."""

from __future__ import annotations

from typing import Any

import torch

from .maker import TEXT, Maker


def decision(x: Maker) -> dict[str, Any]:
    b, t, c = x.batch, TEXT, x.config
    made = {"states": x.normal(b, t, c.state_dim), "actions": x.normal(b, t, c.act_dim), "rewards": x.normal(b, t, 1)}
    steps = torch.arange(t).expand(b, -1)
    return {**made, "returns_to_go": x.normal(b, t, 1), "timesteps": steps, "attention_mask": torch.ones(b, t)}


def perceiver(x: Maker) -> dict[str, Any]:
    return {"inputs": x.normal(x.batch, TEXT, x.config.d_model)}


def embeddings(x: Maker) -> dict[str, Any]:
    return {"inputs_embeds": x.normal(x.batch, TEXT, x.config.hidden_size)}


def timesfm(x: Maker) -> dict[str, Any]:
    length = x.config.context_length
    made = {"past_values": x.normal(x.batch, length), "past_values_padding": torch.zeros(x.batch, length)}
    return {**made, "freq": torch.zeros(x.batch, 1, dtype=torch.long)} if "freq" in x.names else made


def drafts(x: Maker) -> dict[str, Any]:
    width = x.config.hidden_size
    context = x.normal(x.batch, TEXT, width * len(x.config.target_layer_ids))
    return {"noise_embeds": x.normal(x.batch, x.config.block_size, width), "context_hidden_states": context}


def conditioned(x: Maker) -> dict[str, Any]:
    return {**embeddings(x), "t_cond": x.normal(1, x.config.hidden_size)}


def jev(x: Maker) -> dict[str, Any]:
    made = {"input_ids": x.text()[:1], "marks": torch.tensor([[4, 8]]), "num_options": torch.tensor([[2, 2]])}
    return {**made, "question_type_ids": torch.tensor([[0, 0]])}


def words(x: Maker) -> dict[str, Any]:
    return x.words()


def qformer(x: Maker) -> dict[str, Any]:
    hidden = x.normal(x.batch, 16, x.config.encoder_hidden_size)
    return {"query_embeds": x.normal(x.batch, 8, x.config.hidden_size), "encoder_hidden_states": hidden}
