"""Measure whether SMART helps: fine-tune a pre-trained model on TSVs by each method, one JSON line a run.

    python benchmarks/quality.py run --data ../shared/data --task sst2 cr stsb --arm plain "SMARTConfig()" --seeds 0 10
    python benchmarks/quality.py table

A task is a folder with train.tsv and dev.tsv, as examples/finetune_text.py reads them. A run that has its line in
--lines is not run again, so hours of runs add up over days. In every arm a seed has the same training rows, order,
initial head and dropout masks. `--device cuda --jobs 12` has twelve runs at a time on one GPU.

`run --select --tuned` measures on training rows that the seed did not draw, with seeds from 100: what it finds chooses
epochs and learning rate (`run --tuned`), and the final table has neither these seeds nor these rows.

What a line has: `score` (accuracy, or Pearson's r, in %), `nll` (or the mean squared error of standardised scores),
`ece` (calibration error, 15 bins), `corrupted` (the score with typos and dropped words), `other` (the score on the
dev.tsv of --other), `attacked` (the score at the worst point that an attack with the labels finds in a ball of 0.03
rms), `R_s` (of that ball), `train_loss`, `steps`, `seconds` (in all steps; of CPU time on a CPU); and under `averages`
the same of theta~ by its memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import re
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from finetune_text import Row, collator, default_model, interval, length, load, moved

from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.divergences import squared_error, symmetric_kl
from smartreg_torch.perturbation import Ball, climb
from smartreg_torch.site import Site

LINES = Path(__file__).with_suffix(".jsonl")
TRIED = ((3.0, 1e-4), (6.0, 1e-4), (6.0, 5e-5))  # epochs and rate, by --select
RADIUS = 0.03
ATTACK = SMARTConfig(mu=0, epsilon=RADIUS, eta=RADIUS, ascent_steps=3, start="margin")
# SMARTConfig's settings of each arm, in full: a new default of SMARTConfig changes none of them.
PLAIN: dict[str, Any] = {"lambda_s": 0.0, "mu": 0.0}
SMOOTH: dict[str, Any] = {
    "lambda_s": 1.0,
    "mu": 0.0,
    "epsilon": RADIUS,
    "scale": "rms",
    "start": "margin",
    "memory": 0.3,
}
PROXIMAL: dict[str, Any] = {"mu": 1.0, "beta_early": 0.99, "beta_late": 0.99}
ARMS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "plain, longer": PLAIN | {"longer": 2.33},
    "R-Drop's term": PLAIN | {"r_drop": 1.0},
    "random noise": SMOOTH | {"start": "gaussian", "ascent_steps": 0, "sigma": 1e3 * RADIUS},
    "R_s": SMOOTH,
    "R_s, lambda_s 0.1": SMOOTH | {"lambda_s": 0.1},
    "R_s, lambda_s 0.3": SMOOTH | {"lambda_s": 0.3},
    "R_s, lambda_s 3": SMOOTH | {"lambda_s": 3.0},
    "R_s, radius 0.01": SMOOTH | {"epsilon": 0.01},
    "R_s, radius 0.1": SMOOTH | {"epsilon": 0.1},
    "R_s, Gaussian start": SMOOTH | {"start": "gaussian", "sigma": RADIUS, "eta": 1.0},
    "R_s, independent masks": SMOOTH | {"dropout": "independent"},
    "D_Breg": PLAIN | {"mu": 1.0},
    "R_s + D_Breg": SMOOTH | {"mu": 1.0},
    "R_s + D_Breg, mu 0.3": SMOOTH | {"mu": 0.3},
    "R_s + D_Breg, mu 0.5": SMOOTH | {"mu": 0.5},
    "R_s, lambda_s 0.1, + D_Breg": SMOOTH | {"lambda_s": 0.1, "mu": 1.0},
    "R_s, lambda_s 0.1, + D_Breg, mu 0.1": SMOOTH | {"lambda_s": 0.1, "mu": 0.1},
    "D_Breg, beta 0.99": PLAIN | PROXIMAL,
    "R_s + D_Breg, beta 0.99": SMOOTH | PROXIMAL,
    "D_Breg, memory 0.1": PLAIN | {"mu": 1.0, "memory": 0.1},
    "D_Breg, memory 1": PLAIN | {"mu": 1.0, "memory": 1.0},
    "the paper's values": SMARTConfig.paper().to_dict(),
    "smart-pytorch": PLAIN | {"peer": 0.02},
    "R_s, unlabelled too": SMOOTH | {"unlabelled": 2000},
    "R_s, unlabelled too, a tenth": SMOOTH | {"unlabelled": 2000, "share": 0.1},
    "R_s, unlabelled too, a hundredth": SMOOTH | {"unlabelled": 2000, "share": 0.01},
    "SMARTConfig()": SMARTConfig().to_dict(),
}
NOT_SETTINGS = ("longer", "r_drop", "peer", "unlabelled", "share")  # what an arm does beside SMARTConfig


@functools.cache
def settings_of(arm: str, regression: bool) -> dict[str, Any]:
    """The settings of an arm as its line has them: lambda_s as it is for the task, nothing of a term that is off."""
    chosen = dict(ARMS[arm])
    others = {name: chosen.pop(name) for name in NOT_SETTINGS if name in chosen}
    made = SMARTConfig(**chosen)
    config = made.to_dict()
    for name in ("lambda_s", "mu"):
        config[name] = getattr(made, name) * made.regression_share(name, [not regression])
    off, betas = ["total_steps", "evaluate"], ["beta_early", "beta_late", "early_fraction"]
    off += betas if config["beta_early"] is None else ["memory"]
    if not config["mu"]:
        off += ["memory", "proximal_steps", *betas]
    if not config["lambda_s"]:
        off += ["epsilon", "sigma", "eta", "ascent_steps", "norm", "granularity", "start", "scale", "projection"]
        off += ["smoothness_steps", "dropout"]
    elif config["start"] == "margin" and not config["ascent_steps"]:
        off += ["sigma", "eta", "ascent_steps"]
    return {name: value for name, value in config.items() if name not in off} | others


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    if logits.shape[-1] == 1:
        return functional.mse_loss(logits.squeeze(-1), labels, reduction=reduction)
    return functional.cross_entropy(logits, labels, reduction=reduction)


def divergence_of(model: Any) -> Callable[..., Tensor]:
    return squared_error if model.config.num_labels == 1 else symmetric_kl


def smart_pytorch(model: Any, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The penalty of smart-pytorch as its README has it, without its weight."""
    from smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss

    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    evaluate = lambda x: model(inputs_embeds=x, **rest).logits  # noqa: E731
    losses = (functional.mse_loss,) if logits.shape[-1] == 1 else (kl_loss, sym_kl_loss)
    penalty: Tensor = SMARTLoss(evaluate, *losses)(model.get_input_embeddings()(batch["input_ids"]), logits)
    return penalty


def train(
    model: Any, loader: Any, unlabelled: Any, line: dict[str, Any], memories: list[float]
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Train by an arm; returns the loss of the last epoch, the steps, their seconds, and theta~ by its memory."""
    chosen = line["settings"]
    epochs = round(line["epochs"] * chosen.get("longer", 1.0))
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=line["rate"], weight_decay=0.01, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    # theta~ with a memory of that fraction of the run: beta = 1 - 1 / (fraction * steps)
    averages = {
        str(fraction): AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(max(0.0, 1 - 1 / (fraction * steps))))
        for fraction in memories
    }
    config = SMARTConfig(**{k: v for k, v in chosen.items() if k not in NOT_SETTINGS}, total_steps=steps)
    more = cycle(moved(unlabelled, model)) if unlabelled else None
    losses: list[float] = []
    seconds = 0.0
    # on a CPU of all threads: other load on the machine counts less
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    model.train()
    with SMART(model, config) as smart:
        for _ in range(epochs):
            for batch in moved(loader, model):
                started = clock()
                output, penalty = smart(**batch)
                loss = output.loss + penalty
                if more is not None:
                    loss = loss + chosen.get("share", 1.0) * smart(**next(more))[1]
                with torch.random.fork_rng():  # masks of their own; the next step's stay as in the other arms
                    torch.manual_seed(len(losses) + (line["seed"] << 20))
                    if "r_drop" in chosen:
                        again = model(**batch).logits
                        loss = loss + chosen["r_drop"] * divergence_of(model)(again, output.logits).mean()
                    if "peer" in chosen:
                        loss = loss + chosen["peer"] * smart_pytorch(model, batch, output.logits)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                smart.update()
                losses.append(output.loss.item())
                seconds += clock() - started
                for average in averages.values():
                    average.update_parameters(model)
    found = {"train_loss": statistics.fmean(losses[-len(loader) :]), "steps": steps, "seconds": round(seconds, 2)}
    return found, {memory: average.module for memory, average in averages.items()}


def corrupted(rows: list[Row]) -> list[Row]:
    """The rows with a typo in some words and some words dropped, the same at every call."""
    import nlpaug.augmenter.char as char
    import nlpaug.augmenter.word as word

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - nlpaug draws from it
    plain = {"include_special_char": False, "include_numeric": False, "include_upper_case": False}
    noises = char.KeyboardAug(aug_char_max=1, aug_word_p=0.15, **plain), word.RandomWordAug(action="delete", aug_p=0.1)
    texts = [text for sentences, _ in rows for text in sentences]
    for noise in noises:
        texts = [noise.augment(text)[0] if len(text.split()) > 1 else text for text in texts]
    several = len(rows[0][0])
    return [(tuple(texts[several * i : several * (i + 1)]), value) for i, (_, value) in enumerate(rows)]


def worst(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits at the worst point of the ball for the labels, and R_s of each example."""
    site, labels = Site(model), batch["labels"]
    try:
        with site.recording(differentiable=True) as calls:
            clean = model(**batch).logits
        x = calls[0].x.detach()

        def at(delta: Tensor) -> Tensor:
            with site.replaced([x + delta]):
                logits: Tensor = model(**batch).logits
                return logits

        def gradient(deltas: list[Tensor]) -> list[Tensor]:
            point = deltas[0].detach().requires_grad_()
            return list(torch.autograd.grad(loss_of(at(point), labels, "sum"), [point]))

        ball = Ball(x, ATTACK, batch["attention_mask"])
        start = ball.start(torch.autograd.grad(loss_of(clean, labels, "sum"), [calls[0].x])[0])
        with torch.enable_grad():
            delta = climb([ball], [start], gradient)[0]
            logits = at(delta).detach()
        return logits, divergence_of(model)(logits, clean.detach())
    finally:
        site.remove()


def score(logits: Tensor, labels: Tensor) -> float:
    if logits.shape[-1] > 1:
        return 100 * float((logits.argmax(-1) == labels).float().mean())
    return 100 * float(np.corrcoef(logits.squeeze(-1).cpu(), labels.cpu())[0, 1])


def predictions(model: Any, rows: list[Row], collate: Any) -> tuple[Tensor, Tensor]:
    loader: Any = DataLoader(sorted(rows, key=length), 32, collate_fn=collate)  # type: ignore[arg-type]
    with torch.no_grad():
        found = [(model(**batch).logits, batch["labels"]) for batch in moved(loader, model)]
    return torch.cat([z for z, _ in found]), torch.cat([y for _, y in found])


def measure(model: Any, rows: dict[str, list[Row]], collate: Any) -> dict[str, float]:
    """Measure a model on the rows as they are (`score`), and on other rows by name."""
    model.eval()
    z, y = predictions(model, rows["score"], collate)
    found = {"score": score(z, y), "nll": float(loss_of(z, y))}
    if z.shape[-1] > 1:
        found["ece"] = float(multiclass_calibration_error(z.softmax(-1), y, num_classes=z.shape[-1]))
    found |= {name: score(*predictions(model, rows[name], collate)) for name in ("corrupted", "other") if name in rows}
    if "attacked" in rows:
        some: Any = DataLoader(sorted(rows["attacked"], key=length), 32, collate_fn=collate)  # type: ignore[arg-type]
        attacked = [(*worst(model, batch), batch["labels"]) for batch in moved(some, model)]
        found["attacked"] = score(torch.cat([z for z, _, _ in attacked]), torch.cat([y for _, _, y in attacked]))
        found["R_s"] = float(torch.cat([r for _, r, _ in attacked]).mean())
    return {name: round(value, 5) for name, value in found.items()}


@functools.cache
def rows_of(folder: Path) -> tuple[list[Row], list[Row], list[str] | None, list[Row]]:
    """The rows of a task, its classes, and the corrupted dev rows."""
    rows, dev_rows, classes = load(folder / "train.tsv", folder / "dev.tsv", None)
    return rows, dev_rows, classes, corrupted(dev_rows)


def run_once(args: argparse.Namespace, line: dict[str, Any]) -> dict[str, Any]:
    """Train and measure once; returns what was measured."""
    train_rows, dev_rows, classes, noisy = rows_of(args.data / line["task"])
    seed, size, batch_size = line["seed"], line["size"] or len(train_rows), args.batch_size
    shuffled = random.Random(seed).sample(train_rows, len(train_rows))
    rows, rest = shuffled[:size], shuffled[size:]
    if line["select"]:
        measured = {"score": rest[-500:]}
    else:
        measured = {"score": dev_rows, "corrupted": noisy, "attacked": dev_rows[:256]}
        if args.other:
            measured["other"] = rows_of(args.data / args.other)[1]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    head = {"num_labels": 1} if classes is None else {"id2label": dict(enumerate(classes))}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32, **head).to(args.device)
    collate = collator(tokenizer, args.max_length, classes is None)

    def batches(rows: list[Row], collate: Any) -> Any:
        order = torch.Generator().manual_seed(seed)
        sampler = LengthGroupedSampler(batch_size, lengths=[length(row) for row in rows], generator=order)
        own: Any = torch.Generator()  # else each epoch draws from the dropout's stream
        return DataLoader(rows, batch_size, sampler=sampler, collate_fn=collate, generator=own)

    def without_labels(rows: list[Row]) -> dict[str, Tensor]:
        return {name: value for name, value in collate(rows).items() if name != "labels"}

    unlabelled = rest[: line["settings"].get("unlabelled", 0)]
    torch.manual_seed(seed)
    more = batches(unlabelled, without_labels) if unlabelled else None
    found, averages = train(model, batches(rows, collate), more, line, args.memory)
    found |= measure(model, measured, collate)
    measured.pop("attacked", None)
    return found | {"averages": {memory: measure(average, measured, collate) for memory, average in averages.items()}}


def key(line: dict[str, Any]) -> str:
    names = ("task", "size", "seed", "epochs", "rate", "batch", "select", "model", "settings")
    same = line | {"epochs": float(line["epochs"]), "rate": float(line["rate"])}  # 6 is 6.0
    return json.dumps([same[name] for name in names], sort_keys=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_of(line: dict[str, Any], arm: str) -> bool:
    """Whether a line is of an arm, whatever the arm was called when it was run."""
    return line["settings"] == settings_of(arm, is_regression(line))


def is_regression(line: dict[str, Any]) -> bool:
    return "ece" not in line


def chosen_by(lines: list[dict[str, Any]], arm: str, regression: bool, size: int) -> tuple[float, float] | None:
    """The epochs and learning rate of an arm with the best mean score over the tasks and seeds of `--select`.

    Over the tasks of this kind with as many training rows; if that was not tried, with any number of rows.
    """
    tried = [line for line in lines if line["select"] and is_of(line, arm) and is_regression(line) == regression]
    found: dict[tuple[float, float], dict[Any, float]] = defaultdict(dict)
    for line in [line for line in tried if line["size"] == size] or tried:
        found[line["epochs"], line["rate"]][line["task"], line["size"], line["seed"]] = line["score"]
    full = max(map(len, found.values()), default=0)  # what lacks a task cannot be compared
    means = {at: statistics.fmean(scores.values()) for at, scores in found.items() if len(scores) == full}
    return max(means, key=means.__getitem__) if means else None


def results(
    args: argparse.Namespace, wanted: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Yield each line with what its run found, None if it failed, as they end."""
    if args.jobs == 1:
        prepare(args.threads)
        yield from ((line, run_once(args, line)) for line in wanted)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, prepare, (args.threads,)) as pool:
        runs = {pool.submit(run_once, args, line): line for line in wanted}
        for done in as_completed(runs):
            if error := done.exception():
                traceback.print_exception(error)
            yield runs[done], None if error else done.result()


def prepare(threads: int) -> None:
    """Prepare a process for its runs."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def wanted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """List the lines that the runs will have: arms inside seeds, so that a broken-off command has whole pairs."""
    first, end = args.seeds or ((100, 102) if args.select else (0, 10))
    known = [line for path in dict.fromkeys([LINES, args.lines]) for line in lines_of(path)]
    found = []
    for seed, task, size, arm in product(range(first, end), args.task, args.size, args.arm):
        regression = rows_of(args.data / task)[2] is None
        tried = [(args.epochs, args.rate)]
        if args.tuned:
            tried = TRIED if args.select else [chosen_by(known, arm, regression, size) or tried[0]]
        for epochs, rate in tried:
            line = {"task": task, "size": size, "arm": arm, "seed": seed, "epochs": epochs, "rate": rate}
            line |= {"batch": args.batch_size, "select": args.select, "model": "/".join(Path(args.model).parts[-2:])}
            found.append(line | {"settings": settings_of(arm, regression)})
    done = set(map(key, lines_of(args.lines)))
    return [line for name, line in {key(line): line for line in found}.items() if name not in done]


def run(args: argparse.Namespace) -> None:
    """Run what has no line yet."""
    failed = 0
    for line, found in results(args, wanted(args)):
        if found is None:
            failed += 1
            continue
        append(args.lines, line | {"other_task": args.other} | found)
        shown = ", ".join(f"{name} {found[name]:.4g}" for name in (*MEASURES, "seconds") if name in found)
        print(f"{line['task']} {line['size']} seed {line['seed']} {line['arm']}: {shown}", flush=True)
    if failed:
        raise SystemExit(f"{failed} runs failed")


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


MEASURES = ("score", "corrupted", "nll", "ece", "other", "attacked", "R_s")
HIGHER = {"score", "corrupted", "other", "attacked"}
TITLES = {
    "score": "score %",
    "corrupted": "with typos %",
    "nll": "NLL or MSE",
    "ece": "calibration error",
    "other": "other domain %",
    "attacked": "attacked %",
    "R_s": "R_s",
}


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values."""
    order, adjusted, largest = np.argsort(p), [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, p[at] * (len(p) - rank)))
        adjusted[at] = largest
    return adjusted


def name_of(line: dict[str, Any]) -> str:
    names = [arm for arm in ARMS if is_of(line, arm)] or [line["arm"]]
    teacher = f", theta~ of memory {line['theta~']}" if "theta~" in line else ""
    longer = line["settings"].get("longer")
    epochs = round(line["epochs"] * longer) if longer else line["epochs"]
    return f"{' = '.join(names)}{teacher}, {epochs:g} epochs, rate {line['rate']:g}"


Arms = dict[str, dict[int, dict[str, Any]]]  # of each arm the line of each seed; the first is the one to compare with


def grouped(lines: list[dict[str, Any]], select: bool, against: str = "") -> dict[tuple[str, int], Arms]:
    """The lines by task and size: first the arm of that name, or plain as --select chose its epochs and rate."""
    base = {at: chosen_by(lines, "plain", *at) for at in {(is_regression(line), line["size"]) for line in lines}}

    def order(line: dict[str, Any]) -> tuple[int, bool, int, str]:
        chosen = (line["epochs"], line["rate"]) == base[is_regression(line), line["size"]]
        plain = is_of(line, "plain") and "theta~" not in line
        first = name_of(line) == against if against else plain and chosen
        arm = next((at for at, arm in enumerate(ARMS) if is_of(line, arm)), len(ARMS))
        return line["size"], not first, arm, name_of(line)

    found: dict[tuple[str, int], Arms] = defaultdict(lambda: defaultdict(dict))
    for line in sorted(lines if select else with_averages(lines), key=order):
        if line["select"] == select:
            found[line["task"], line["size"]][name_of(line)][line["seed"]] = line
    return found


def with_averages(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, and theta~ of each as a line of its own."""
    found = []
    for line in lines:
        run = {name: value for name, value in line.items() if name not in MEASURES}
        found += [line, *({**run, **measured, "theta~": memory} for memory, measured in line["averages"].items())]
    return found


def differences(arms: Arms, base: str, arm: str, name: str) -> list[float]:
    """The paired differences of a measure to the base, by seed."""
    both = sorted(arms[arm].keys() & arms[base].keys())
    pairs = [(arms[arm][seed].get(name), arms[base][seed].get(name)) for seed in both]
    return [a - b for a, b in pairs if a is not None and b is not None]


def adjusted(groups: dict[tuple[str, int], Arms]) -> dict[tuple[str, int, str, str], float]:
    """The p-value of each arm and measure, by Holm over the tasks of that size."""
    found = {}
    for size in {size for _, size in groups}:
        tasks = [at for at in groups if at[1] == size]
        for arm, name in product(dict.fromkeys(arm for at in tasks for arm in groups[at]), MEASURES):
            apart = {
                at: differences(groups[at], next(iter(groups[at])), arm, name) for at in tasks if arm in groups[at]
            }
            apart = {at: values for at, values in apart.items() if len(set(values)) > 1}
            p = holm([float(stats.ttest_1samp(values, 0).pvalue) for values in apart.values()])
            found |= {(*at, arm, name): value for at, value in zip(apart, p, strict=True)}
    return found


def shown_cell(runs: dict[int, dict[str, Any]], apart: list[float], name: str, p: float) -> str:
    """Mean, standard deviation and difference of a measure; the difference is bold if p < 0.05."""
    values = [line[name] for line in runs.values() if name in line]
    digits = 1 if name in HIGHER else 3
    cell = f"{statistics.fmean(values):.{digits}f}" if values else ""
    if len(values) > 1:
        cell += f" (sd {statistics.stdev(values):.{digits}f})"
    if len(apart) > 1:
        text = f"{statistics.fmean(apart):+.{digits}f} ± {interval(apart)['half']:.{digits}f}"
        cell += f", **{text}**" if p < 0.05 else f", {text}"
    return cell


def tables(lines: list[dict[str, Any]], select: bool, alike: str = "") -> dict[str, str]:
    """A Markdown table of each task and size, by its title: of the results, or of the choice of settings.

    `alike` names a setting of plain training: then only the arms with its epochs and rate are in.
    """
    groups = grouped(lines, select, alike)
    if alike:
        runs = {at: [line for runs in arms.values() for line in runs.values()] for at, arms in groups.items()}
        others = {at for at in groups if not all(is_of(line, "plain") for line in runs[at])}
        groups = {at: arms for at, arms in groups.items() if next(iter(arms)) == alike and at in others}
    p = adjusted(groups)
    shown = {}
    for (task, size), arms in groups.items():
        base = next(iter(arms))
        names = [name for name in MEASURES if any(name in line for runs in arms.values() for line in runs.values())]
        rows = [["arm", "seeds", *[TITLES[name] for name in names], "train loss", "x plain"]]
        for arm, runs in arms.items():
            cells = [arm, str(len(runs))]
            for name in names:
                apart = differences(arms, base, arm, name) if arm != base and base.startswith("plain") else []
                cells.append(shown_cell(runs, apart, name, p.get((task, size, arm, name), 1.0)))
            both = [seed for seed in runs.keys() & arms[base].keys() if "seconds" in runs[seed]]
            cost = [runs[seed]["seconds"] / arms[base][seed]["seconds"] for seed in both]
            losses = [line["train_loss"] for line in runs.values() if "train_loss" in line]
            cells.append(f"{statistics.fmean(losses):.3f}" if losses else "")
            rows.append([*cells, f"{statistics.median(cost):.2f}" if cost else ""])
        rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
        title = f"{task}, {size or 'all'} rows" + ", choice of settings" * select + f", beside {alike}" * bool(alike)
        shown[title] = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return shown


def summary(lines: list[dict[str, Any]], size: int, against: str = "") -> str:
    """A Markdown table of plain training and of SMARTConfig(), each with what --select chose for it.

    `against` names another setting of plain training; then only the tasks are in for which --select did not choose it.
    """
    groups = {at: arms for at, arms in grouped(lines, select=False, against=against).items() if at[1] == size}
    if against:
        own = {at: next(iter(arms)) for at, arms in grouped(lines, select=False).items()}
        groups = {at: arms for at, arms in groups.items() if next(iter(arms)) == against != own[at]}
    there = [line for arms in groups.values() for runs in arms.values() for line in runs.values()]
    names = [name for name in MEASURES if name != "R_s" and any(name in line for line in there)]
    rows = [["", "seeds", *[TITLES[name] for name in names]], ["---", *["---:"] * (len(names) + 1)]]
    p = adjusted(groups)
    for (task, _), arms in groups.items():
        base = next(iter(arms))
        regression = is_regression(next(iter(arms[base].values())))
        at = chosen_by(lines, "SMARTConfig()", regression, size)
        ours = {
            arm
            for arm, runs in arms.items()
            for line in runs.values()
            if "theta~" not in line and (is_of(line, "SMARTConfig()") and (line["epochs"], line["rate"]) == at)
        }
        for arm in [base, *ours]:
            cells = [f"{task}, {'plain' if arm == base else '`SMARTConfig()`'}", str(len(arms[arm]))]
            for name in names:
                apart = differences(arms, base, arm, name)
                cells.append(
                    shown_cell(arms[arm], apart if arm != base else [], name, p.get((task, size, arm, name), 1.0))
                )
            rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(lines: list[dict[str, Any]], path: Path, size: int) -> None:
    """Draw the paired differences to plain with their 95% intervals: a row a task, a column a measure."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    groups = {at: arms for at, arms in grouped(lines, select=False).items() if at[1] == size}
    groups = {at: {arm: runs for arm, runs in arms.items() if len(runs) > 2} for at, arms in groups.items()}
    names = ("score", "corrupted", "nll", "ece")
    height = sum(len(arms) for arms in groups.values())
    figure, axes = pyplot.subplots(
        *(len(groups), len(names)),
        figsize=(14, 1 + 0.28 * height),
        height_ratios=[len(arms) for arms in groups.values()],
        squeeze=False,
        layout="constrained",
    )
    for row, ((task, _), arms) in zip(axes, groups.items(), strict=True):
        base, *others = arms  # plain training as --select chose it
        row[0].set_ylabel(task)
        for ax, name in zip(row, names, strict=True):
            ax.axvline(0, color="0.6", linewidth=1)
            for y, arm in enumerate(others):
                apart = differences(arms, base, arm, name)
                if len(apart) > 1:
                    ax.errorbar(
                        statistics.fmean(apart), y, xerr=interval(apart)["half"], fmt="o", markersize=4, color="C0"
                    )
            ax.set_visible(any(name in run for runs in arms.values() for run in runs.values()))
            ax.set_ylim(len(others) - 0.5, -0.5)
            ax.set_yticks(range(len(others)), others if ax is row[0] else [""] * len(others), fontsize=8)
            ax.set_title(TITLES[name], fontsize=9)
            ax.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"Difference to plain training by seed, 95% interval, {size} training rows", fontsize=10)
    figure.savefig(path, dpi=120)


def filled(page: str, shown: dict[str, str]) -> str:
    """The page with each table between its <!-- TITLE --> and <!-- end -->."""
    for title, text in shown.items():
        block = re.compile(f"(<!-- {re.escape(title)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = block.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


def everything(lines: list[dict[str, Any]]) -> dict[str, str]:
    """Every table by its title."""
    plain = [line for line in lines if is_of(line, "plain") and not line["select"] and line["size"] == 500]
    other = [
        line for line in plain if (line["epochs"], line["rate"]) != chosen_by(lines, "plain", is_regression(line), 500)
    ]
    shown = {"summary": summary(lines, 500)}
    for name, line in sorted({name_of(line): line for line in other}.items()):
        tasks = {each["task"] for each in other if name_of(each) == name}
        same = [each for each in lines if (each["epochs"], each["rate"]) == (line["epochs"], line["rate"])]
        alike = tables([each for each in same if each["task"] in tasks], select=False, alike=name)
        shown |= alike or {f"summary against {name}": summary(lines, 500, name)}
    longer = next((name_of(line) for line in on_a_gpu(lines) if is_of(line, "plain, longer")), "")
    shown[f"summary on a GPU against {longer}"] = summary(on_a_gpu(lines), 500, longer)
    for more in (lines_of(LINES.with_name("quality_tf.jsonl")), on_a_gpu(lines)):
        shown |= tables(more, select=False) | tables([line for line in more if "on a GPU" in line["task"]], select=True)
    return shown | tables(lines, select=False) | tables(lines, select=True)


def on_a_gpu(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of quality_gpu.jsonl, under names of their own, and the choices that were made on a CPU.

    Without their seconds: fourteen runs shared one GPU.
    """
    own = lines_of(LINES.with_name("quality_gpu.jsonl"))
    named = [
        {name: value for name, value in line.items() if name != "seconds"} | {"task": f"{line['task']} on a GPU"}
        for line in own
    ]
    return [*named, *(line for line in [*lines, *own] if line["select"])]


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table of each task and size; with --docs, write them in the pages, and the picture."""
    lines = lines_of(args.lines)
    shown = everything(lines)
    for title, text in shown.items():
        print(f"\n{title}\n\n{text}")
    for page in args.docs:
        page.write_text(filled(page.read_text("utf-8"), shown), "utf-8")
    if args.plot:
        regressions = [line for line in lines if is_regression(line)]
        plot([*on_a_gpu(lines), *(line for line in regressions if not line["select"])], args.plot, 500)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether SMART helps: runs, and their table.")
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="run what has no line yet")
    add = runs.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="the folder of the tasks' folders")
    add("--task", nargs="+", default=["sst2", "cr", "stsb"])
    add("--other", help="another task of the same classes, whose dev.tsv is scored too")
    add("--size", nargs="+", type=int, default=[500], help="training rows; 0 is all")
    add("--arm", nargs="+", choices=ARMS, default=["plain", "SMARTConfig()"])
    add("--seeds", nargs=2, type=int, metavar=("FIRST", "END"), help="default: 0 10, with --select 100 102")
    add("--epochs", type=float, default=6)
    add("--rate", type=float, default=1e-4)
    add("--select", action="store_true", help="measure on training rows that were not drawn")
    add("--tuned", action="store_true", help="epochs and rate as the lines of --select chose; with --select, try each")
    add("--memory", nargs="*", type=float, default=[], help="of theta~, as fractions of the run")
    add("--model", default=None)
    add("--batch-size", type=int, default=16)
    add("--max-length", type=int, default=64)
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--jobs", type=int, default=1, help="runs at a time, each in a process with --threads")
    runs.set_defaults(call=run)
    shown = commands.add_parser("table", help="print the tables of all lines")
    shown.add_argument("--docs", nargs="+", type=Path, default=[], help="pages with <!-- TITLE --> ... <!-- end -->")
    shown.add_argument("--plot", type=Path, help="a picture to write")
    shown.set_defaults(call=table)
    for command in (runs, shown):
        command.add_argument("--lines", type=Path, default=LINES)
    args = parser.parse_args()
    if args.call is run:
        args.model = args.model or default_model()
    args.call(args)


if __name__ == "__main__":
    main()
