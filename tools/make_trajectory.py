"""Write smartreg/trajectory.npz: weights, batches, noise and dropout masks of 50 steps (`smartreg.checking`).

    python tools/make_trajectory.py

Keep the file, because NumPy's streams may change between versions.
"""

from pathlib import Path

import numpy as np

from smartreg.reference import init_parameters

STEPS, N, TOKENS, D, HIDDEN, OUTPUTS, VOCABULARY, PASSES = 50, 4, 5, 4, 6, 3, 11, 4


def main() -> None:
    """Draw the arrays and write them."""
    rng = np.random.default_rng(0)
    theta = init_parameters(rng, vocabulary=VOCABULARY, d=D, hidden=HIDDEN, outputs=OUTPUTS)
    arrays = {f"theta/{name}": value.astype(np.float32) for name, value in theta.items()}
    arrays |= {
        "ids": rng.integers(VOCABULARY, size=(STEPS, N, TOKENS)),
        "mask": np.arange(TOKENS) < rng.integers(1, TOKENS + 1, size=(STEPS, N, 1)),
        "sample_weight": rng.uniform(0.5, 2, size=(STEPS, N)).astype(np.float32),
        "noise": rng.normal(size=(STEPS, N, TOKENS, D)).astype(np.float32),
        "signs": rng.normal(size=(STEPS, N, OUTPUTS)).astype(np.float32),
        "y/symmetric_kl": rng.integers(OUTPUTS, size=(STEPS, N)),
        "y/symmetric_kl/positions": rng.integers(OUTPUTS, size=(STEPS, N, TOKENS)),
        "y/bernoulli_symmetric_kl": rng.integers(2, size=(STEPS, N, OUTPUTS)).astype(np.float32),
        "y/squared_error": rng.normal(size=(STEPS, N, OUTPUTS)).astype(np.float32),
        "dropout": ((rng.random((STEPS, PASSES, N, TOKENS, HIDDEN)) < 0.8) / 0.8).astype(np.float32),
    }
    np.savez_compressed(Path(__file__).parents[1] / "smartreg" / "trajectory.npz", **arrays)


if __name__ == "__main__":
    main()
