"""The configuration that every backend shares (paper: section 3 and Algorithm 1)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, cast, get_args

Norm = Literal["inf", "2", "1"]
Granularity = Literal["example", "token"]
Start = Literal["gaussian", "margin"]
Scale = Literal["absolute", "rms"]
Projection = Literal["ball", "rescale"]
Dropout = Literal["shared", "independent"]
Evaluate = Literal["theta", "teacher"]
NonFinite = Literal["raise", "skip"]
Precision = Literal["float32", "model"]
Function = TypeVar("Function", bound=Callable[..., Any])
Hints = Mapping[str, str] | None


class SMARTWarning(UserWarning):
    """A setting or a precision with which SMART silently does less than it says.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = SMARTConfig(start="gaussian", sigma=0)
        >>> caught[0].category.__name__
        'SMARTWarning'
    """


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "granularity": get_args(Granularity),
    "start": get_args(Start),
    "scale": get_args(Scale),
    "projection": get_args(Projection),
    "dropout": get_args(Dropout),
    "evaluate": get_args(Evaluate),
    "non_finite": get_args(NonFinite),
}
# name: (lowest, highest, whether the lowest itself is allowed)
_REALS: dict[str, tuple[float, float, bool]] = {
    "lambda_s": (0.0, math.inf, True),
    "mu": (0.0, math.inf, True),
    "epsilon": (0.0, math.inf, False),
    "sigma": (0.0, math.inf, True),
    "eta": (0.0, math.inf, False),
    "beta_early": (0.0, 1.0, True),
    "beta_late": (0.0, 1.0, True),
    "early_fraction": (0.0, 1.0, True),
    "memory": (0.0, math.inf, False),
}
_WEIGHTS = {"lambda_s": 1.0, "mu": 0.5}  # if they are not given, for classes (docs/evidence.md)
_INTEGERS = {"ascent_steps": 0, "smoothness_steps": 1, "proximal_steps": 1, "total_steps": 1}


class _Followed(int):
    """An `ascent_steps` that was not given but follows from `start`.

    dataclasses.replace passes it to the copy. By this type the copy knows that it follows its own start.
    """


class _ByTask(float):
    """A `lambda_s` or `mu` that was not given but follows from the task, as `_Followed`."""


def check_names(
    call: str,
    names: Iterable[str],
    known: Sequence[str],
    kind: str = "argument",
    elsewhere: Hints = None,
    error: type[Exception] = TypeError,
) -> None:
    """Raise an error for a name that a call does not know. `elsewhere` says what to do about those of another backend.

    Example:
        >>> check_names("attach", ["output"], ["site", "outputs"])
        Traceback (most recent call last):
        ...
        TypeError: attach: no argument is called 'output'; did you mean 'outputs'?
    """
    for name in (name for name in names if name not in known):
        near = difflib.get_close_matches(name, known, n=1)
        if elsewhere and name in elsewhere:
            hint = f". {elsewhere[name]}"
        elif name in SMARTConfig.__dataclass_fields__:
            hint = f": it is a setting. Give it to the settings, SMARTConfig({name}=...)"
        elif near:
            hint = f"; did you mean {near[0]!r}?"
        else:
            hint = f"; it knows {', '.join(known)}"
        raise error(f"{call}: no {kind} is called {name!r}{hint}")


def suggesting(call: str, kind: str = "argument", elsewhere: Hints = None) -> Callable[[Function], Function]:
    """Let a function that takes no `**kwargs` raise the error of `check_names` instead of Python's."""

    def decorate(function: Function) -> Function:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            check_names(call, given, known, kind, elsewhere)
            return function(*args, **given)

        return cast(Function, checked)

    return decorate


@dataclass(frozen=True, kw_only=True)
class SMARTConfig:
    """Settings of F(theta) = L + lambda_s R_s + mu D_Breg, frozen and validated.

    `SMARTConfig()` is the recommended setting, both terms (docs/evidence.md). Its radius is relative to the embeddings'
    root mean square (`scale="rms"`), so one value serves every model. Its ascent is the margin start alone, which does
    as well as the paper's at a lower cost (docs/performance.md). `SMARTConfig.paper` has the published values.

    Attributes:
        lambda_s: weight of the smoothness term R_s; 0 switches the term and its cost off.
        mu: weight of the proximal term D_Breg; 0 switches the term and its cost off. If it is not given, `lambda_s` is
            1 and `mu` 0.5, and each is 0.1 if an output is a regression's (l_s is the squared error).
        epsilon: radius of the ball ||x~_i - x_i||_p <= epsilon.
        sigma: standard deviation of the Gaussian start nu_i.
        eta: length of one ascent step. epsilon, sigma and eta are in the embeddings' own units
            (`scale="absolute"`) or in multiples of the root mean square of x_i (`scale="rms"`).
        ascent_steps: T_x; 0 keeps the start alone (R3F with the Gaussian start). If it is not given, it is 0 with the
            margin start and 1 with the Gaussian one, also in a copy with another start.
        norm: p of the ball and of g / ||g||: "inf", "2" or "1".
        granularity: what a norm runs over: "example" (all axes but the batch) or "token" (the last axis).
        start: "margin" (towards the nearest decision boundary) or "gaussian" (the paper's nu_i).
        scale: the unit of epsilon, sigma and eta, see above.
        projection: "ball" (the paper's), or "rescale": the released code's
            delta <- (delta + eta g) / (||delta + eta g||_inf + epsilon), in which epsilon is not a radius.
        dropout: "shared": all passes have the clean pass's dropout masks, so R_s is due to delta alone. "independent":
            each pass at x + delta draws masks of its own, as R-Drop, R3F and the released code do. The one at theta~
            still has the clean pass's.
        smoothness_steps: K; R_s is computed in the first of every K optimiser steps, with K times its weight. This
            saves passes (docs/performance.md) and is not in the paper.
        proximal_steps: S; theta~ moves once every S optimiser steps.
        memory: how long theta~ remembers, as a fraction of the run: theta~ is the mean of theta_0, theta_1, ... until
            memory * `total_steps`, then a moving average over so many steps. So a short run and a long one, and a new
            head, need no other value. Not in the paper.
        beta_early, beta_late, early_fraction: the paper's beta instead of `memory`, if one of the first two is given:
            `beta_early` (0.99) for the first `early_fraction` of `total_steps`, then `beta_late` (0.999).
        evaluate: the weights that a Trainer or `fit` evaluates during training, and leaves in the model at its end:
            "theta", or "teacher", theta~, which then moves also if mu is 0. With lambda_s = mu = 0 training is plain
            training, bit for bit, with theta~ beside it (docs/trainer.md, docs/keras.md). Not in the paper.
        total_steps: optimiser steps of the whole training run; needed if there is a theta~ (mu > 0, or
            evaluate="teacher"), unless beta is the same all along.
        non_finite: a NaN or infinite penalty raises ("raise"), or counts as 0 for that step ("skip").

    Raises:
        TypeError, ValueError: an unknown setting, one of the wrong type or out of range; the message names it.

    Source: Jiang et al. 2020 (arXiv 1911.03437), equations 1 to 4 and Algorithm 1.

    Example:
        >>> SMARTConfig(epsilon=0.05, total_steps=1000).epsilon
        0.05
    """

    lambda_s: float = None  # type: ignore[assignment]  # a number as soon as it is made
    mu: float = None  # type: ignore[assignment]  # as lambda_s
    epsilon: float = 0.03
    sigma: float = 0.03
    eta: float = 1.0
    ascent_steps: int = None  # type: ignore[assignment]  # a number as soon as it is made
    norm: Norm = "inf"
    granularity: Granularity = "example"
    start: Start = "margin"
    scale: Scale = "rms"
    projection: Projection = "ball"
    dropout: Dropout = "shared"
    smoothness_steps: int = 1
    proximal_steps: int = 1
    memory: float = 0.3
    beta_early: float | None = None
    beta_late: float | None = None
    early_fraction: float = 0.1
    evaluate: Evaluate = "theta"
    total_steps: int | None = None
    non_finite: NonFinite = "raise"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            got = getattr(self, name)
            if got not in choices:
                raise ValueError(f"SMARTConfig: {name} must be one of {', '.join(map(repr, choices))}, got {got!r}")
        if not self.beta_early is self.beta_late is None:  # one alone: the other is the published one
            for name, published in (("beta_early", 0.99), ("beta_late", 0.999)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, published)
        for name, weight in _WEIGHTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, _ByTask(weight))
        for name, (low, high, closed) in _REALS.items():
            got = getattr(self, name)
            if got is None and name in ("beta_early", "beta_late"):
                continue
            if isinstance(got, bool) or not isinstance(got, Real):
                raise TypeError(f"SMARTConfig: {name} must be a number, got {got!r}")
            value = float(got)
            inside = low <= value <= high if closed else low < value <= high
            if not (inside and math.isfinite(value)):
                bound = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"{'>=' if closed else '>'} {low:g}"
                raise ValueError(f"SMARTConfig: {name} must be a finite number {bound}, got {got!r}")
            if not isinstance(got, _ByTask):
                object.__setattr__(self, name, value)
        if self.ascent_steps is None or isinstance(self.ascent_steps, _Followed):
            object.__setattr__(self, "ascent_steps", _Followed(0 if self.start == "margin" else 1))
        for name, least in _INTEGERS.items():
            got = getattr(self, name)
            if name == "total_steps" and got is None:
                continue
            if isinstance(got, bool) or not isinstance(got, Integral):
                raise TypeError(f"SMARTConfig: {name} must be a whole number, got {got!r}")
            if int(got) < least:
                raise ValueError(f"SMARTConfig: {name} must be at least {least}, got {got!r}")
            if not isinstance(got, _Followed):
                object.__setattr__(self, name, int(got))
        self._warn_of_idle_terms()

    def _warn_of_idle_terms(self) -> None:
        """Warn if R_s or D_Breg stays 0 whatever the model does."""
        if self.lambda_s > 0 and self.start == "gaussian" and self.sigma == 0 and self.dropout == "shared":
            warnings.warn(
                "SMARTConfig: with sigma=0 and start='gaussian' the ascent begins at x itself, where the divergence "
                "is stationary: R_s stays 0 for ever. Give sigma > 0 or start='margin'.",
                SMARTWarning,
                stacklevel=5,
            )
        betas = {self.beta_early if self.early_fraction > 0 else self.beta_late}
        betas |= {self.beta_late} if self.early_fraction < 1 else set()
        if self.mu > 0 and self.proximal_steps == 1 and betas == {0}:
            warnings.warn(
                "SMARTConfig: with beta=0 and proximal_steps=1 theta~ equals theta whenever the gradient is taken, so "
                "D_Breg and its gradient are exactly 0. Give proximal_steps > 1 (VBPP) or beta > 0 (MBPP), or mu=0.",
                SMARTWarning,
                stacklevel=5,
            )

    @property
    def active(self) -> bool:
        """Tell whether there is anything to do beside plain training."""
        return self.has_penalty or self.has_teacher

    @property
    def has_penalty(self) -> bool:
        """Tell whether the loss gets a term: lambda_s > 0 or mu > 0."""
        return self.lambda_s > 0 or self.mu > 0

    @property
    def has_teacher(self) -> bool:
        """Tell whether theta~ is kept: for D_Breg (mu > 0), or to be evaluated (evaluate="teacher").

        Example:
            >>> SMARTConfig(mu=0).has_teacher, SMARTConfig(mu=0, evaluate="teacher").has_teacher
            (False, True)
        """
        return self.mu > 0 or self.evaluate == "teacher"

    @property
    def needs_clean_graph(self) -> bool:
        """Tell whether the start takes its gradient from the graph of the clean pass."""
        return self.start == "margin"

    @property
    def needs_total_steps(self) -> bool:
        """Tell whether beta changes during training, so that `total_steps` must be known."""
        scheduled = self.beta_early != self.beta_late and 0 < self.early_fraction < 1
        return self.has_teacher and (self.beta_early is None or scheduled)

    def smoothness_weight(self, steps: int) -> float:
        """Return the weight of R_s after that many optimiser steps: K lambda_s in the first of every K, else 0.

        Example:
            >>> config = SMARTConfig(lambda_s=1.5, smoothness_steps=2)
            >>> [config.smoothness_weight(steps) for steps in range(4)]
            [3.0, 0.0, 3.0, 0.0]
        """
        return 0.0 if steps % self.smoothness_steps else self.smoothness_steps * self.lambda_s

    def regression_share(self, name: str, logits: Iterable[bool]) -> float:
        """Return what makes a weight 0.1 in regression, if it was not given; else 1.

        A squared error does not saturate as the divergence of two sure predictions does (docs/evidence.md).

        Args:
            name: "lambda_s" or "mu".
            logits: of each output, whether it is logits (`smartreg.divergences.Divergence.of_logits`).

        Example:
            >>> config = SMARTConfig(mu=1.0)
            >>> config.regression_share("lambda_s", [False]), config.regression_share("mu", [False])
            (0.1, 1.0)
        """
        return 0.1 / _WEIGHTS[name] if isinstance(getattr(self, name), _ByTask) and not all(logits) else 1.0

    def check_total_steps(self, call: str) -> None:
        """Raise ValueError, naming `call`, if beta is scheduled and `total_steps` is not known."""
        if self.needs_total_steps and self.total_steps is None:
            follows = f"theta~ remembers {self.memory:g} of the run"
            if self.beta_early is not None:
                follows = (
                    f"beta changes from {self.beta_early:g} to {self.beta_late:g} after {self.early_fraction:g} of it"
                )
            raise ValueError(
                f"{call}: {'mu > 0' if self.mu > 0 else 'evaluate is teacher'} and {follows}, so total_steps is "
                "needed, got None. Give SMARTConfig(total_steps=<optimiser steps of the whole run>), or beta_early == "
                "beta_late, or train without theta~: mu=0 and evaluate='theta'."
            )

    @classmethod
    def paper(cls, total_steps: int | None = None, **changes: Any) -> SMARTConfig:
        """Return the published values, as printed (section 4.1): absolute units, epsilon = sigma = 1e-5, eta = 1e-3.

        Example:
            >>> SMARTConfig.paper(total_steps=1000, lambda_s=3).eta
            0.001
        """
        published: dict[str, Any] = {"scale": "absolute", "epsilon": 1e-5, "sigma": 1e-5, "eta": 1e-3, "mu": 1.0}
        published |= {"start": "gaussian", "lambda_s": 1.0, "beta_early": 0.99, "beta_late": 0.999}
        return cls(**{**published, "total_steps": total_steps, **changes})

    @classmethod
    def mtdnn(cls, **changes: Any) -> SMARTConfig:
        """Return the settings of the released code (mt-dnn): max|delta| rescaled to 1 a token, no ball, no D_Breg.

        delta <- (delta + eta g) / (||delta + eta g||_inf + 1e-6), g being the plain gradient. The released code takes
        g of a one-sided KL, by an approximate formula. This preset takes g of the symmetrised KL, exactly. Its passes
        share their dropout masks; the released code's do not: `mtdnn(dropout="independent")`.

        Example:
            >>> SMARTConfig.mtdnn().projection
            'rescale'
        """
        released: dict[str, Any] = {"scale": "absolute", "epsilon": 1e-6, "sigma": 1e-5, "eta": 1e-3, "mu": 0.0}
        released |= {"start": "gaussian", "lambda_s": 1.0, "granularity": "token", "projection": "rescale"}
        return cls(**{**released, **changes})

    def replace(self, **changes: Any) -> SMARTConfig:
        """Return a copy with some settings changed, validated again.

        An `ascent_steps` that was not given follows the start of the copy.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> SMARTConfig().replace(mu=0).mu
            0.0
        """
        return type(self)(**{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict of plain values; `from_dict` reads it back.

        `ascent_steps`, `lambda_s` and `mu` are None (null in JSON) if they were not given: they still follow the start
        and the task.

        Example:
            >>> SMARTConfig().to_dict()["ascent_steps"], SMARTConfig(ascent_steps=1).to_dict()["ascent_steps"]
            (None, 1)
        """
        return {
            name: None if isinstance(v, (_Followed, _ByTask)) else v for name, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> SMARTConfig:
        """Return the configuration of a dict of settings; an unknown name raises ValueError.

        Example:
            >>> SMARTConfig.from_dict(SMARTConfig().to_dict()) == SMARTConfig()
            True
        """
        check_names("SMARTConfig", settings, list(cls.__dataclass_fields__), "setting", error=ValueError)
        return cls(**settings)

    def to_json(self) -> str:
        """Return the settings as a JSON object; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SMARTConfig:
        """Return the configuration of a JSON object.

        Example:
            >>> SMARTConfig.from_json('{"lambda_s": 3}').lambda_s
            3.0
        """
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"SMARTConfig.from_json: expected a JSON object, got {text[:40]!r}")
        return cls.from_dict(settings)


SMARTConfig.__init__ = suggesting("SMARTConfig", "setting")(SMARTConfig.__init__)  # type: ignore[method-assign]


def check_options(call: str, config: Any, precision: Any = "float32", on_step: Any = None) -> None:
    """Raise TypeError or ValueError, naming `call`, if an option that every backend has is none that it takes.

    Example:
        >>> check_options("SMART", SMARTConfig(), precision="float16")
        Traceback (most recent call last):
        ...
        ValueError: SMART: precision must be 'float32' or 'model', got 'float16'
    """
    if not isinstance(config, SMARTConfig):
        got = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise TypeError(f"{call}: config must be a SMARTConfig, got {got}. Give one, such as SMARTConfig(lambda_s=1)")
    if precision not in get_args(Precision):
        raise ValueError(f"{call}: precision must be 'float32' or 'model', got {precision!r}")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"{call}: on_step must be a function of one StepSeen, got {on_step!r}")


def one_each(argument: str, said: str | Sequence[str | None] | None, n: int) -> list[str | None]:
    """Return what an argument says of each of n outputs: a text is for all of them, a list has one each.

    Raises:
        ValueError: the list has another length.

    Example:
        >>> one_each("outputs", "logits", 2)
        ['logits', 'logits']
    """
    if said is None or isinstance(said, str):
        return [said] * n
    if len(said) != n:
        raise ValueError(
            f"SMART: {argument}= has {len(said)} entries, but the model has {n} outputs. Give one for each output, "
            "or one for all"
        )
    return list(said)
