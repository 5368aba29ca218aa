"""The settings of most tests: the paper's ascent and weight, with radii relative to the embeddings'."""

from typing import Any

from smartreg import SMARTConfig


def papers(**settings: Any) -> SMARTConfig:
    return SMARTConfig(**{"start": "gaussian", "ascent_steps": 1, "lambda_s": 1.0, **settings})
