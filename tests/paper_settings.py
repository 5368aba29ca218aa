"""The settings of most tests: the paper's ascent and weight, with radii relative to the embeddings'."""

from typing import Any

from smartreg import SMARTConfig


def papers(**settings: Any) -> SMARTConfig:
    published = {"lambda_s": 1.0, "mu": 1.0, "beta_early": 0.99, "beta_late": 0.999}
    radii = {"epsilon": 0.01, "sigma": 0.01, "start": "gaussian", "ascent_steps": 1}
    return SMARTConfig(**{**published, **radii, **settings})
