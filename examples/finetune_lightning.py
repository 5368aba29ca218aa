"""Fine-tune a transformer on a TSV with Lightning and SMART, in one process.

    python examples/finetune_lightning.py --train train.tsv --dev dev.tsv --out run

The TSV is that of finetune_text.py. The last epoch's checkpoint is in --out. After a crash, the same command
with --resume goes on from it and ends at the same weights, bit for bit.
"""

# ruff: noqa: D102 (Lightning documents its methods)
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from finetune_text import collator, default_model, load
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smartreg_torch import SMART, SMARTConfig


class Classifier(lightning.LightningModule):
    """A Hugging Face model with SMART. SMART is no submodule: the checkpoint has it once, as `smart`."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model.train(), learning_rate  # from_pretrained gives it in eval mode
        self.state: dict[str, Any] | None = None
        self.found: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # here the model is on its device, and the length of the run is known
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        self.smart = SMART(self.model, SMARTConfig(total_steps=steps)).attach(optimizer)
        self.smart.load_state_dict(self.state or self.smart.state_dict())
        return optimizer

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        output, penalty = self.smart(**batch)
        self.log_dict({name: self.smart.metrics[name] for name in ("R_s", "D_Breg")})
        return output.loss + penalty

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["smart"], checkpoint["rng"] = self.smart.state_dict(), torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.state = checkpoint["smart"]
        torch.set_rng_state(checkpoint["rng"])  # dropout and the order of the rows, which Lightning does not keep

    def on_fit_end(self) -> None:
        self.smart.remove()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.found.append((self.model(**batch).logits.cpu(), batch["labels"].cpu()))

    def on_validation_epoch_end(self) -> None:
        z, y = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        self.found.clear()
        if self.model.config.num_labels == 1:
            self.log("Pearson", 100 * float(stats.pearsonr(z.squeeze(-1), y).statistic))
        else:
            self.log("accuracy", 100 * (z.argmax(-1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a transformer with Lightning and SMART.")
    add = parser.add_argument
    add("--train", type=Path, required=True, help="TSV with a header: a label column, one or two sentence columns")
    add("--dev", type=Path, required=True, help="the same for evaluation")
    add("--out", type=Path, required=True, help="folder for the checkpoint and the model")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--model", help="name or folder of a pre-trained transformer (default: MiniLM-L6 of the demo extra)")
    add("--examples", type=int, default=200, help="rows of --train that are used (default: %(default)s)")
    add("--epochs", type=int, default=5, help="default: %(default)s")
    add("--batch-size", type=int, default=4, help="default: %(default)s")
    add("--accumulate", type=int, default=4, help="batches of an optimiser step (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    args = parser.parse_args()

    train, dev, classes = load(args.train, args.dev, None)
    lightning.seed_everything(0)
    name = args.model or default_model()
    head = {"num_labels": 1} if classes is None else {"id2label": dict(enumerate(classes))}
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **head)
    collate = collator(AutoTokenizer.from_pretrained(name), 64, classes is None)
    rows = train[: args.examples]
    loader = DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collate)
    dev_loader = DataLoader(dev, 32, collate_fn=collate)

    checkpoint = ModelCheckpoint(args.out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        devices=1,
        callbacks=[checkpoint],
        logger=False,
    )
    last = args.out / "last.ckpt" if args.resume else None
    trainer.fit(Classifier(model, args.learning_rate), loader, dev_loader, ckpt_path=last, weights_only=True)
    reached = ", ".join(f"{name} {float(value):.3g}" for name, value in trainer.callback_metrics.items())
    print(f"{reached} after {trainer.global_step} steps, on {len(dev)} rows")
    model.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
