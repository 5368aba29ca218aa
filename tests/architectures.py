"""Tiny models with random weights: each a maker, its inputs, and what SMART has to be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

N, TOKENS, VOCABULARY = 6, 7, 31
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass
class Architecture:
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)


def text() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (N, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (N, 1))).long()
    return {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}


def classifier(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, name + "Config")(
            vocab_size=VOCABULARY, pad_token_id=0, num_labels=3, **{**SIZE, **settings}
        )
        return getattr(transformers, name + "ForSequenceClassification")(config)

    return make


class T5Classifier(nn.Module):
    """A T5 encoder with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            feed_forward_proj="gated-gelu",
        )
        self.encoder = transformers.T5EncoderModel(config)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1))


class Siamese(nn.Module):
    """One encoder run on two inputs: its embedding is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        encoded = [self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0).mean(1) for ids in (first, second)]
        return self.head(torch.cat(encoded, -1))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 12, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0].mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 3),
    )


def two_texts() -> dict[str, Tensor]:
    return {"first": text()["input_ids"], "second": text()["input_ids"][:, : TOKENS - 1]}


ARCHITECTURES = {
    "BERT": Architecture(classifier("Bert"), text),
    "RoBERTa": Architecture(classifier("Roberta"), text),
    "DistilBERT": Architecture(
        classifier("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, sinusoidal_pos_embds=False), text
    ),
    "ALBERT": Architecture(
        classifier("Albert", embedding_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), text
    ),
    "GPT-2": Architecture(classifier("GPT2", n_embd=16, n_layer=2, n_head=2), text),
    "Llama": Architecture(classifier("Llama", num_key_value_heads=2, attention_dropout=0.1), text),
    "T5 encoder": Architecture(T5Classifier, text),
    "ViT": Architecture(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                **SIZE, image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1
            )
        ),
        lambda: {"pixel_values": torch.randn(N, 1, 8, 8)},
    ),
    "siamese": Architecture(Siamese, two_texts),
    "LSTM": Architecture(LSTM, lambda: {"ids": text()["input_ids"]}),
    "CNN": Architecture(cnn, lambda: {"input": torch.randn(N, 1, 8, 8)}),
}
