"""A loop that saves after each step and goes on from there; `python resuming_torch.py FOLDER STEP` dies in that one."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from paper_settings import papers
from torch import nn

from smartreg_torch import SMART

STARTS = ("gaussian", "margin")


def train(folder, start, left=None):
    """Up to the last step, or to the middle of the one in which it is left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 8),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(40, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    smart = SMART(model, papers(total_steps=12, start=start, ascent_steps=1, proximal_steps=2))
    data = [(torch.randint(11, (6, 5)), torch.randint(3, (6,))) for _ in range(12)]
    file, log = folder / "checkpoint.pt", folder / "log.jsonl"
    if file.exists():
        state = torch.load(file, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("smart", smart)):
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
    for step in range(smart.step, len(data)):
        ids, y = data[step]
        output, penalty = smart(ids)
        loss = nn.functional.cross_entropy(output, y) + penalty
        loss.backward()
        if step == left:
            return
        optimizer.step()
        optimizer.zero_grad()
        smart.update()
        with log.open("a") as lines:
            lines.write(json.dumps({"step": smart.step, "loss": loss.item(), **smart.metrics}) + "\n")
        parts = {"model": model, "optimizer": optimizer, "smart": smart}
        saved = {name: part.state_dict() for name, part in parts.items()} | {"random": torch.get_rng_state()}
        torch.save(saved, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)


if __name__ == "__main__":
    for start in STARTS:
        train(Path(sys.argv[1], start), start, int(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)  # both are in the middle of a step
