"""Checkpoints with code of their own: a network with its config, tokenizer and image processor in Python files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from support.cli import WORDS

CONFIGURATION = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own-architecture"

    def __init__(self, vocab_size=99, hidden_size=32, hidden_act="gelu", num_labels=3, **kwargs):
        self.vocab_size, self.hidden_size, self.hidden_act = vocab_size, hidden_size, hidden_act
        super().__init__(num_labels=num_labels, **kwargs)
"""
LAYERS = """
from torch import nn
from transformers.activations import ACT2FN


class OwnLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return hidden_states + self.down(self.act(self.up(hidden_states)))
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_own import OwnConfig
from .layers_own import OwnLayer

FACTOR = 1.0


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OwnLayer(config) for _ in range(2)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden_states = self.words(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return SequenceClassifierOutput(logits=FACTOR * hidden_states)


class OwnModelForSequenceClassification(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OwnLayer(config) for _ in range(2)])
        self.dense, self.own_act = nn.Linear(config.hidden_size, config.hidden_size), nn.GELU()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden_states = self.words(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        logits = FACTOR * self.classifier(self.own_act(self.dense(hidden_states.mean(1))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
"""
TOKENIZATION = """
from transformers import BertTokenizer


class OwnTokenizer(BertTokenizer):
    def __call__(self, text, *args, **kwargs):
        upper = [one.upper().lower() for one in text] if isinstance(text, list) else text
        return super().__call__(upper, *args, **kwargs)
"""
AUTOS = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForSequenceClassification": "modeling_own.OwnModelForSequenceClassification",
}
CODE = {"configuration_own.py": CONFIGURATION, "layers_own.py": LAYERS, "modeling_own.py": MODELING}


def write_own(folder: Path, tokenizer: bool = True) -> Path:
    """A checkpoint whose model, config and tokenizer are its own classes; `layers_own.py` is imported by another file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    config = {"model_type": "own-architecture", "architectures": ["OwnModelForSequenceClassification"], "auto_map": AUTOS}
    (folder / "config.json").write_text(json.dumps(config))
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=True)
        for parameter in model.parameters():
            parameter.data = 0.4 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "tokenization_own.py").write_text(TOKENIZATION)
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)
    return folder


def trusted(folder: Path, **settings: Any) -> PreTrainedModel:
    """The model as transformers loads it with trust."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, **settings)
    return model


def trap(folder: Path, mark: Path, *names: str) -> None:
    """Lets Python files leave a mark when they are imported."""
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        text = path.read_text() if path.is_file() else ""
        path.write_text(f"open({str(mark)!r}, 'a').write({name!r} + ' ')\n{text}")


Change = Callable[[dict[str, Any]], None]


def rewrite(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file; None takes one out."""
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (settings | changes).items() if value is not None}))
