"""Tiny models with random weights: each a maker, its inputs, and what SMART has to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

N, TOKENS, VOCABULARY = 6, 7, 31
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass
class Architecture:
    """A maker, its inputs, and what has to be said to SMART as one writes it: `outputs="score", divergence="..."`."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    said: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return eval(f"dict({self.said})", {"torch": torch})


@contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch's own kernels: oneDNN's LSTM in bfloat16 needs a processor with AVX-512."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])


def text() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (N, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (N, 1))).long()
    return {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}


def labels() -> Tensor:
    return torch.arange(N) % 3


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or else a cross entropy of what it returns."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    return nn.functional.cross_entropy(output if isinstance(output, Tensor) else output[0], labels())


def labelled(labels: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    def inputs() -> dict[str, Tensor]:
        given = text()
        return given | labels(given)

    return inputs


def ended() -> dict[str, Tensor]:
    """Every text has one token 1 at its end, as T5's and BART's classifiers need it."""
    given = text()
    last = given["attention_mask"].sum(1) - 1
    return given | {"input_ids": given["input_ids"].scatter(1, last[:, None], 1), "labels": labels()}


def translated(given: dict[str, Tensor]) -> dict[str, Tensor]:
    lengths = torch.randint(2, 6, (N, 1))
    return {"labels": torch.randint(2, VOCABULARY, (N, 5)).where(torch.arange(5) < lengths, -100)}


classes = labelled(lambda given: {"labels": labels()})
tags = labelled(lambda given: {"labels": (given["input_ids"] % 3).where(given["attention_mask"] == 1, -100)})
tokens = labelled(lambda given: {"labels": given["input_ids"].where(given["attention_mask"] == 1, -100)})
spans = labelled(lambda given: {"start_positions": labels(), "end_positions": labels()})
pairs = labelled(translated)


def images(size: int = 8, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(N, channels, size, size), "labels": labels()}


def maker(name: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    """A model of Hugging Face with the settings of its configuration."""

    def make() -> nn.Module:
        return getattr(transformers, name + head)(getattr(transformers, name + "Config")(**settings))

    return make


def language(name: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "num_labels": 3}
    return maker(name, head, **{**sizes, **SIZE, **settings})


def classifier(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return language(name, "ForSequenceClassification", **settings)


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


class SentenceBERT(nn.Module):
    """One encoder of Hugging Face over two texts, mean pooling, and a classifier of the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = language("Bert", "Model")()
        self.head = nn.Linear(3 * 16, 3)

    def embed(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        u, v = self.embed(first), self.embed(second)
        return self.head(torch.cat([u, v, (u - v).abs()], -1))


def clip() -> nn.Module:
    sizes = {"projection_dim": 8, "attention_dropout": 0.1}
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**SIZE, **sizes, **words}, vision_config={**VISION, **sizes}, projection_dim=8
    )
    return transformers.CLIPModel(config)


def clip_classifier() -> nn.Module:
    vision = {**VISION, "attention_dropout": 0.1}
    return transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=vision, num_labels=3))


def texts_and_images() -> dict[str, Tensor]:
    given = ended()
    del given["labels"]
    return given | {"pixel_values": torch.randn(N, 3, 8, 8)}


def llava() -> nn.Module:
    words = {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_key_value_heads": 2, "attention_dropout": 0.1}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZE, **words),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_id=VOCABULARY - 1,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def image_tokens_and_text() -> dict[str, Tensor]:
    """The four patches of each image, then a text."""
    image, given = VOCABULARY - 1, text()
    ids = torch.cat([torch.full((N, 4), image), given["input_ids"].clamp(max=image - 1)], 1)
    mask = torch.cat([torch.ones(N, 4, dtype=torch.long), given["attention_mask"]], 1)
    labels = ids.where((mask == 1) & (ids != image), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(N, 3, 8, 8)}


VISION = {**SIZE, "image_size": 8, "patch_size": 4}
IMAGES = {**VISION, "num_labels": 3, "hidden_dropout_prob": 0.1}
GROUPED = {"num_key_value_heads": 1, "attention_dropout": 0.1}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "share_att_key": True}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
MODERN = {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 2, "sep_token_id": 1}
MODERN |= {"embedding_dropout": 0.1, "mlp_dropout": 0.1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 16,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
    "max_position_embeddings": 16,
    "init_std": 0.2,
}
BART |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
SEGFORMER = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
SEGFORMER |= {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8, **STAGES}
SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
SOUND = {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4], "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
SOUND |= {"mask_time_prob": 0.3, "mask_time_length": 2}

ARCHITECTURES = {
    "BERT": Architecture(classifier("Bert"), text),
    "RoBERTa": Architecture(classifier("Roberta"), text),
    "XLM-RoBERTa": Architecture(classifier("XLMRoberta"), classes),
    "DistilBERT": Architecture(
        classifier("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, sinusoidal_pos_embds=False), text
    ),
    "ALBERT": Architecture(
        classifier("Albert", embedding_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), text
    ),
    "ELECTRA": Architecture(classifier("Electra", embedding_size=8), classes),
    "DeBERTa-v3": Architecture(classifier("DebertaV2", **DEBERTA), classes),
    "MPNet": Architecture(classifier("MPNet"), classes),
    "ModernBERT": Architecture(classifier("ModernBert", **MODERN), classes),
    "Longformer": Architecture(
        classifier("Longformer", attention_window=4),
        classes,
        "mask=lambda attention_mask, **_: torch.nn.functional.pad(attention_mask, (0, -attention_mask.shape[1] % 4))",
    ),
    "GPT-2": Architecture(classifier("GPT2", n_embd=16, n_layer=2, n_head=2), text),
    "OPT": Architecture(classifier("OPT", ffn_dim=24, word_embed_proj_dim=16), classes),
    "Llama": Architecture(classifier("Llama", num_key_value_heads=2, attention_dropout=0.1), text),
    "Mistral": Architecture(classifier("Mistral", **GROUPED), classes),
    "Qwen3": Architecture(classifier("Qwen3", head_dim=8, **GROUPED), classes),
    "Gemma 3": Architecture(
        lambda: transformers.Gemma3TextForSequenceClassification(
            transformers.Gemma3TextConfig(
                vocab_size=VOCABULARY, pad_token_id=0, num_labels=3, head_dim=8, sliding_window=4, **SIZE, **GROUPED
            )
        ),
        classes,
    ),
    "Phi-3": Architecture(classifier("Phi3", **GROUPED), classes),
    "T5": Architecture(classifier("T5", **T5), ended),
    "BART": Architecture(classifier("Bart", **BART), ended),
    "T5 encoder": Architecture(T5Classifier, text),
    "DeBERTa-v3, tokens": Architecture(language("DebertaV2", "ForTokenClassification", **DEBERTA), tags),
    "RoBERTa, spans": Architecture(language("Roberta", "ForQuestionAnswering", num_labels=2), spans),
    "ModernBERT, masked LM": Architecture(language("ModernBert", "ForMaskedLM", **MODERN), tokens),
    "Qwen2, causal LM": Architecture(language("Qwen2", "ForCausalLM", tie_word_embeddings=True, **GROUPED), tokens),
    "Mixtral, causal LM": Architecture(language("Mixtral", "ForCausalLM", num_local_experts=2, **GROUPED), tokens),
    "T5, generation": Architecture(language("T5", "ForConditionalGeneration", **T5), pairs),
    "BART, generation": Architecture(language("Bart", "ForConditionalGeneration", **BART), pairs),
    "sentence pairs": Architecture(SentenceBERT, two_texts),
    "siamese": Architecture(Siamese, two_texts),
    "LSTM": Architecture(LSTM, lambda: {"ids": text()["input_ids"]}),
    "ViT": Architecture(
        maker("ViT", "ForImageClassification", **IMAGES, num_channels=1),
        lambda: {"pixel_values": torch.randn(N, 1, 8, 8)},
    ),
    "DINOv2": Architecture(maker("Dinov2", "ForImageClassification", **IMAGES), images()),
    "Swin": Architecture(maker("Swin", "ForImageClassification", **SWIN, num_labels=3, drop_path_rate=0.5), images()),
    "ConvNeXt": Architecture(
        maker("ConvNext", "ForImageClassification", **STAGES, num_stages=2, patch_size=2, drop_path_rate=0.5), images()
    ),
    "ResNet": Architecture(
        maker("ResNet", "ForImageClassification", **STAGES, embedding_size=8, layer_type="basic"), images(16)
    ),
    "CNN": Architecture(cnn, lambda: {"input": torch.randn(N, 1, 8, 8)}),
    "SegFormer, segmentation": Architecture(
        maker("Segformer", "ForSemanticSegmentation", **SEGFORMER),
        lambda: {"pixel_values": torch.randn(N, 3, 16, 16), "labels": torch.randint(3, (N, 16, 16))},
    ),
    "CLIP": Architecture(
        clip,
        texts_and_images,
        "site='text_model.embeddings.token_embedding', outputs=['logits_per_image', 'logits_per_text']",
    ),
    "CLIP, images": Architecture(clip_classifier, images()),
    "LLaVA": Architecture(llava, image_tokens_and_text),
    "Whisper": Architecture(
        language(
            "Whisper",
            "ForConditionalGeneration",
            **BART,
            dropout=0.1,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=8,
        ),
        lambda: {"input_features": torch.randn(N, 8, 20), **translated({})},
    ),
    "Wav2Vec2": Architecture(
        language("Wav2Vec2", "ForSequenceClassification", **SOUND),
        lambda: {"input_values": torch.randn(N, 160), "labels": labels()},
        "site='wav2vec2.feature_projection.projection'",
    ),
}
