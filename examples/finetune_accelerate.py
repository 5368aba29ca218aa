"""Fine-tune a transformer on a TSV with Accelerate and SMART, in one process.

    accelerate launch --num_processes 1 examples/finetune_accelerate.py --train train.tsv --dev dev.tsv --out run

The TSV is that of finetune_text.py. The newest checkpoint is in --out. After a crash, the same
command with --resume goes on from it and ends at the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from finetune_text import collator, default_model, load
from scipy import stats
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smartreg_torch import SMART, SMARTConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a transformer with Accelerate and SMART.")
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
    add("--save-every", type=int, default=10, help="optimiser steps between checkpoints (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    return parser.parse_args()


def score(model: torch.nn.Module, loader: DataLoader, classes: list[str] | None) -> str:
    """Evaluate the model: accuracy, or Pearson's correlation."""
    model.eval()
    with torch.no_grad():
        pairs = [(model(**batch).logits.cpu(), batch["labels"].cpu()) for batch in loader]
    z, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if classes is None:
        return f"Pearson {100 * stats.pearsonr(z.squeeze(-1), y).statistic:.1f}%"
    return f"accuracy {100 * float((z.argmax(-1) == y).float().mean()):.1f}%"


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write a checkpoint as a whole or not at all, then remove the older ones."""
    accelerator.save_state(str(folder / "unfinished"))
    (folder / "unfinished").rename(folder / f"step-{step}")
    for old in folder.glob("step-*"):
        if old.name != f"step-{step}":
            shutil.rmtree(old)


def main() -> None:
    args = parse()
    train, dev, classes = load(args.train, args.dev, None)
    set_seed(0)
    # the order of the rows then depends on the seed and the epoch alone, so that a run can go on in mid-epoch
    order = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate, dataloader_config=order)

    name = args.model or default_model()
    head = {"num_labels": 1} if classes is None else {"id2label": dict(enumerate(classes))}
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **head).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    collate = collator(AutoTokenizer.from_pretrained(name), 64, classes is None)
    rows, own = train[: args.examples], torch.Generator()  # a generator of its own takes nothing from dropout's stream
    loader = DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collate, generator=own)
    dev_loader = DataLoader(dev, 32, collate_fn=collate)

    model, prepared, loader, dev_loader = accelerator.prepare(model, optimizer, loader, dev_loader)
    steps_an_epoch = math.ceil(len(loader) / args.accumulate)
    smart = SMART(model, SMARTConfig(total_steps=args.epochs * steps_an_epoch)).attach(optimizer)
    accelerator.register_for_checkpointing(smart)
    if args.resume:
        accelerator.load_state(str(next(args.out.glob("step-*"))))
        accelerator.print(f"going on after step {smart.step}")

    first, done = divmod(smart.step, steps_an_epoch)
    for epoch in range(first, args.epochs):
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, done * args.accumulate if epoch == first else 0):
            with accelerator.accumulate(model):
                output, penalty = smart(**batch)
                accelerator.backward(output.loss + penalty)
                prepared.step()
                prepared.zero_grad()
            if accelerator.sync_gradients and smart.step % args.save_every == 0:
                save(accelerator, args.out, smart.step)
        R_s, D_Breg = smart.metrics["R_s"], smart.metrics["D_Breg"]
        accelerator.print(f"epoch {epoch + 1}: loss {output.loss.item():.3f}, R_s {R_s:.2e}, D_Breg {D_Breg:.2e}")
    accelerator.print(f"{score(model, dev_loader, classes)} on {len(dev)} rows after {smart.step} steps")
    accelerator.unwrap_model(model).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
