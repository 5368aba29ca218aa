"""Fine-tune sentence embeddings on pairs with a score, with sentence-transformers and SMART, in one process.

    python examples/finetune_sentence_transformers.py --train train.tsv --dev dev.tsv --out run

The TSV has a header, two sentence columns and a score column, as finetune_text.py takes it. The last epoch's checkpoint
is in --out. After a crash, the same command with --resume goes on from it and ends at the same weights, bit for bit.
"""

# ruff: noqa: D102 (the frameworks document their methods)
from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from finetune_text import default_model, load
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from smartreg_torch import SMART, SMARTConfig


class SMARTLoss(nn.Module):
    """Adds SMART's penalty of each column's embeddings to any loss that has `compute_loss_from_embeddings`."""

    def __init__(self, loss: nn.Module, smart: SMART) -> None:
        super().__init__()
        self.loss, self.smart = loss, smart

    def forward(self, columns: Iterable[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        outputs, penalties = zip(*map(self.smart, columns), strict=True)
        embeddings = [output["sentence_embedding"] for output in outputs]
        return {"task": self.loss.compute_loss_from_embeddings(embeddings, labels), "smart": sum(penalties)}


class SaveSMART(TrainerCallback):
    """Saves theta~ and the noise generator beside the Trainer's own files."""

    def __init__(self, smart: SMART) -> None:
        self.smart = smart

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.save(self.smart.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/smart.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune sentence embeddings with sentence-transformers and SMART.")
    add = parser.add_argument
    add("--train", type=Path, required=True, help="TSV with a header: two sentence columns and a score column")
    add("--dev", type=Path, required=True, help="the same for evaluation")
    add("--out", type=Path, required=True, help="folder for the checkpoint and the model")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--model", help="name or folder of a pre-trained transformer (default: MiniLM-L6 of the demo extra)")
    add("--examples", type=int, default=200, help="rows of --train that are used (default: %(default)s)")
    add("--epochs", type=int, default=5, help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--learning-rate", type=float, default=2e-5, help="default: %(default)s")
    args = parser.parse_args()

    train, dev, classes = load(args.train, args.dev, None)
    if classes is not None or len(train[0][0]) != 2:
        parser.error(f"{args.train}: expected two sentence columns and scores with fractions; see finetune_text.py")
    rows, scores = train[: args.examples], [value for _, value in train]
    lowest, highest = min(scores), max(scores)

    def columns(rows: list[Any]) -> dict[str, list[Any]]:
        """Scale the scores to 0 to 1, the range of a cosine."""
        (first, second), label = zip(*(texts for texts, _ in rows), strict=True), [value for _, value in rows]
        scaled = [(value - lowest) / (highest - lowest) for value in label]
        return {"sentence1": list(first), "sentence2": list(second), "label": scaled}

    torch.manual_seed(0)
    model = SentenceTransformer(args.model or default_model())
    measure = EmbeddingSimilarityEvaluator(*columns(dev).values())
    before = measure(model)["spearman_cosine"]

    settings = SentenceTransformerTrainingArguments(
        str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to=[],
    )
    steps = args.epochs * math.ceil(len(rows) / args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    what = {"outputs": "sentence_embedding", "divergence": "squared_error", "mask": lambda x: x["attention_mask"]}
    smart = SMART(model, SMARTConfig(start="gaussian", total_steps=steps), **what).attach(optimizer)
    trainer = SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=Dataset.from_dict(columns(rows)),
        loss=SMARTLoss(CosineSimilarityLoss(model), smart),
        optimizers=(optimizer, None),
        callbacks=[SaveSMART(smart)],
    )
    last = get_last_checkpoint(str(args.out)) if args.resume else None
    if last is not None:
        smart.load_state_dict(torch.load(f"{last}/smart.pt"))
    trainer.train(resume_from_checkpoint=last)
    after = measure(model)["spearman_cosine"]
    print(f"Spearman {100 * before:.1f}% before, {100 * after:.1f}% after {smart.step} steps, on {len(dev)} rows")
    model.save_pretrained(str(args.out / "model"))


if __name__ == "__main__":
    main()
