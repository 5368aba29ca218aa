import copy
import dataclasses
import inspect
import json
import math
import pickle
import warnings

import numpy as np
import pytest

from smartreg import SMARTConfig, SMARTWarning


def test_paper_has_the_published_values():
    config = SMARTConfig.paper(total_steps=500)
    assert (config.epsilon, config.sigma, config.eta, config.ascent_steps) == (1e-5, 1e-5, 1e-3, 1)
    assert (config.norm, config.start, config.scale, config.granularity) == ("inf", "gaussian", "absolute", "example")
    assert (config.lambda_s, config.mu, config.proximal_steps) == (1, 1, 1)
    assert (config.beta_early, config.beta_late, config.early_fraction) == (0.99, 0.999, 0.1)
    assert config.projection == "ball"
    assert config.total_steps == 500


def test_mtdnn_is_the_released_update():
    config = SMARTConfig.mtdnn()
    assert (config.projection, config.granularity, config.epsilon, config.mu) == ("rescale", "token", 1e-6, 0)
    assert (config.start, config.ascent_steps, config.lambda_s) == ("gaussian", 1, 1)
    assert SMARTConfig.mtdnn(lambda_s=5).lambda_s == 5


def test_default_is_relative_to_the_embeddings():
    assert (SMARTConfig().scale, SMARTConfig().epsilon) == ("rms", 0.03)
    assert (SMARTConfig().lambda_s, SMARTConfig().mu, SMARTConfig().memory) == (1, 0.5, 0.3)


def test_the_weight_that_goes_with_the_task():
    config = SMARTConfig()
    assert (config.lambda_s, config.to_dict()["lambda_s"]) == (1.0, None)
    assert config.regression_share("lambda_s", [True]) == config.regression_share("lambda_s", []) == 1
    assert config.regression_share("lambda_s", [True, False]) == config.regression_share("lambda_s", [False]) == 0.1
    assert config.to_dict()["mu"] is None
    assert config.mu * config.regression_share("mu", [False]) == 0.1
    assert config.replace(mu=1).regression_share("mu", [False]) == 1
    for copied in (config.replace(mu=1), dataclasses.replace(config, mu=1), SMARTConfig.from_json(config.to_json())):
        assert copied.regression_share("lambda_s", [False]) == 0.1
    for given in (SMARTConfig(lambda_s=1.0), config.replace(lambda_s=1.0), SMARTConfig.paper(), SMARTConfig.mtdnn()):
        assert given.regression_share("lambda_s", [False]) == 1
        assert given.to_dict()["lambda_s"] == 1
    assert pickle.loads(pickle.dumps(config)).regression_share("lambda_s", [False]) == 0.1
    assert copy.deepcopy(config).regression_share("lambda_s", [False]) == 0.1


def test_the_ascent_that_goes_with_the_start():
    assert (SMARTConfig().start, SMARTConfig().ascent_steps) == ("margin", 0)
    assert SMARTConfig(start="gaussian").ascent_steps == 1  # with 0 it would be random noise alone
    assert SMARTConfig(start="gaussian", ascent_steps=0).ascent_steps == 0
    assert SMARTConfig(ascent_steps=2).ascent_steps == 2
    assert SMARTConfig.from_dict({"start": "gaussian", "ascent_steps": None}).ascent_steps == 1
    with pytest.raises(TypeError, match="total_steps"):
        SMARTConfig(total_steps="many")


COPIES = {
    "replace": lambda config, start: config.replace(start=start),
    "dataclasses.replace": lambda config, start: dataclasses.replace(config, start=start),
    "replace twice": lambda config, start: config.replace(mu=0).replace(start=start),
    "dict": lambda config, start: SMARTConfig.from_dict({**config.to_dict(), "start": start}),
    "json": lambda config, start: SMARTConfig.from_json(config.to_json()).replace(start=start),
    "edited json": lambda config, start: SMARTConfig.from_json(
        json.dumps(json.loads(config.to_json()) | {"start": start})
    ),
    "pickle": lambda config, start: pickle.loads(pickle.dumps(config)).replace(start=start),
    "copy": lambda config, start: copy.copy(config).replace(start=start),
    "deepcopy": lambda config, start: copy.deepcopy(config).replace(start=start),
}


@pytest.mark.parametrize("how", COPIES)
def test_the_ascent_goes_with_the_start_of_a_copy(how):
    change = COPIES[how]
    for config in (
        SMARTConfig(),
        SMARTConfig(ascent_steps=None, lambda_s=2),
        SMARTConfig.paper().replace(start="margin"),
    ):
        gaussian = change(config, "gaussian")
        assert (gaussian.start, gaussian.ascent_steps) == ("gaussian", 1)
        assert (change(config, "margin").ascent_steps, change(gaussian, "margin").ascent_steps) == (0, 0)
    for steps in (0, 1, 3):  # said, and so kept, whatever the start; 0 is R3F
        for start in ("margin", "gaussian"):
            assert change(SMARTConfig(start=start, ascent_steps=steps), "gaussian").ascent_steps == steps
            assert change(SMARTConfig(start=start, ascent_steps=steps), "margin").ascent_steps == steps
    assert change(SMARTConfig.mtdnn(), "margin").ascent_steps == 0


def test_a_default_that_followed_is_a_number_like_any_other():
    followed, said = SMARTConfig(), SMARTConfig(ascent_steps=0)
    assert followed == said
    assert hash(followed) == hash(said)
    assert repr(followed) == repr(said)
    assert json.dumps(followed.ascent_steps) == "0"
    assert (followed.to_dict()["ascent_steps"], said.to_dict()["ascent_steps"]) == (None, 0)
    assert {type(value) for value in followed.to_dict().values()} <= {float, int, str, type(None)}
    old = json.loads(said.to_json())  # files written before have a number there
    assert SMARTConfig.from_dict(old).replace(start="gaussian").ascent_steps == 0


def test_round_trips():
    config = SMARTConfig(norm="2", lambda_s=3, total_steps=np.int64(10), epsilon=np.float32(0.5))
    assert SMARTConfig.from_dict(config.to_dict()) == config
    assert SMARTConfig.from_json(config.to_json()) == config
    assert type(config.total_steps) is int
    assert json.loads(config.to_json())["norm"] == "2"
    assert hash(config) == hash(SMARTConfig.from_dict(config.to_dict()))


def test_is_frozen_and_replaceable():
    config = SMARTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mu = 2.0
    assert config.replace(mu=2).mu == 2
    assert config.mu == 0.5
    with pytest.raises(ValueError, match="mu must be a finite number"):
        config.replace(mu=-2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lambda_s": -1}, ValueError, r"lambda_s must be a finite number >= 0, got -1"),
        ({"lambda_s": math.nan}, ValueError, r"lambda_s must be a finite number >= 0, got nan"),
        ({"dropout": "fresh"}, ValueError, r"dropout must be one of 'shared', 'independent', got 'fresh'"),
        ({"mu": math.inf}, ValueError, r"mu must be a finite number >= 0, got inf"),
        ({"epsilon": 0}, ValueError, r"epsilon must be a finite number > 0, got 0"),
        ({"eta": 0}, ValueError, r"eta must be a finite number > 0, got 0"),
        ({"sigma": -0.1}, ValueError, r"sigma must be a finite number >= 0"),
        ({"beta_late": 1.5}, ValueError, r"beta_late must be a finite number in \[0, 1\], got 1.5"),
        ({"early_fraction": -0.1}, ValueError, r"early_fraction must be a finite number in \[0, 1\]"),
        ({"mu": "1"}, TypeError, r"mu must be a number, got '1'"),
        ({"mu": True}, TypeError, r"mu must be a number, got True"),
        ({"ascent_steps": -1}, ValueError, r"ascent_steps must be at least 0, got -1"),
        ({"ascent_steps": 1.5}, TypeError, r"ascent_steps must be a whole number, got 1.5"),
        ({"smoothness_steps": 0}, ValueError, r"smoothness_steps must be at least 1, got 0"),
        ({"proximal_steps": 0}, ValueError, r"proximal_steps must be at least 1, got 0"),
        ({"total_steps": 0}, ValueError, r"total_steps must be at least 1, got 0"),
        ({"norm": 2}, ValueError, r"norm must be one of 'inf', '2', '1', got 2"),
        ({"granularity": "word"}, ValueError, r"granularity must be one of 'example', 'token', got 'word'"),
        ({"start": "zero"}, ValueError, r"start must be one of 'gaussian', 'margin'"),
        ({"scale": "std"}, ValueError, r"scale must be one of 'absolute', 'rms'"),
        ({"projection": "none"}, ValueError, r"projection must be one of 'ball', 'rescale'"),
        ({"non_finite": "ignore"}, ValueError, r"non_finite must be one of 'raise', 'skip'"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match="SMARTConfig: " + message):
        SMARTConfig(**settings)


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="no setting is called 'lamda_s'; did you mean 'lambda_s'"):
        SMARTConfig.from_dict({"lamda_s": 1})
    with pytest.raises(ValueError, match="expected a JSON object, got '\\[1\\]'"):
        SMARTConfig.from_json("[1]")


@pytest.mark.parametrize(
    "call",
    [
        SMARTConfig,
        SMARTConfig.paper,
        SMARTConfig.mtdnn,
        SMARTConfig().replace,
        lambda **changes: dataclasses.replace(SMARTConfig(), **changes),
    ],
)
def test_an_unknown_keyword_gets_a_suggestion(call):
    with pytest.raises(TypeError, match="SMARTConfig: no setting is called 'lamda_s'; did you mean 'lambda_s'"):
        call(lamda_s=1)
    with pytest.raises(TypeError, match="no setting is called 'zzz'; it knows lambda_s, mu, epsilon"):
        call(zzz=1)


def test_the_constructor_is_otherwise_pythons():
    with pytest.raises(TypeError, match=r"__init__\(\) takes 1 positional argument but 2 were given"):
        SMARTConfig(1)
    parameters = inspect.signature(SMARTConfig).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(SMARTConfig)]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())


def test_warns_where_a_term_would_do_nothing():
    with pytest.warns(SMARTWarning, match="R_s stays 0 for ever") as caught:
        SMARTConfig(sigma=0, start="gaussian")
    assert caught[0].filename == __file__
    with pytest.warns(SMARTWarning, match="D_Breg and its gradient are exactly 0"):
        SMARTConfig(beta_early=0, beta_late=0)
    with pytest.warns(SMARTWarning, match="exactly 0"):
        SMARTConfig(beta_late=0, early_fraction=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SMARTConfig(sigma=0)
        SMARTConfig(sigma=0, start="gaussian", lambda_s=0)
        SMARTConfig(sigma=0, start="gaussian", dropout="independent")  # R_s at x is that of two masks
        SMARTConfig(beta_early=0, beta_late=0, proximal_steps=3)
        SMARTConfig(beta_early=0, beta_late=0, mu=0)


def test_one_beta_alone_takes_the_published_other_one():
    assert (SMARTConfig().beta_early, SMARTConfig().beta_late) == (None, None)
    config = SMARTConfig(beta_early=0.9)
    assert (config.beta_early, config.beta_late) == (0.9, 0.999)
    assert SMARTConfig(beta_late=0.5).beta_early == 0.99
    assert SMARTConfig.from_dict(config.to_dict()) == config
    back = config.replace(beta_early=None, beta_late=None)
    assert (back.beta_early, back.memory) == (None, 0.3)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, "theta~ remembers 0.3 of the run"),
        ({"beta_early": 0.99}, "beta changes from 0.99 to 0.999 after 0.1 of it"),
        ({"mu": 0}, None),
        ({"beta_early": 0.9, "beta_late": 0.9}, None),
        ({"beta_late": 0.9, "early_fraction": 0}, None),
        ({"beta_late": 0.9, "early_fraction": 1}, None),
    ],
)
def test_total_steps_is_needed_where_beta_is_scheduled(settings, needed):
    config = SMARTConfig(**{"mu": 1, **settings})
    assert config.needs_total_steps == (needed is not None)
    if needed:
        with pytest.raises(ValueError, match=f"caller: mu > 0 and {needed}, so total_steps is needed"):
            config.check_total_steps("caller")
    else:
        config.check_total_steps("caller")


def test_settings_of_before_share_their_dropout_masks():
    """JSON files that were written before there was the setting."""
    old = {name: value for name, value in SMARTConfig().to_dict().items() if name != "dropout"}
    assert SMARTConfig.from_dict(old).dropout == "shared"
    assert {SMARTConfig.paper().dropout, SMARTConfig.mtdnn().dropout} == {"shared"}
    assert SMARTConfig.mtdnn(dropout="independent").dropout == "independent"


def test_evaluate_is_theta_or_the_teacher():
    with pytest.raises(ValueError, match="evaluate must be one of 'theta', 'teacher', got 'theta~'"):
        SMARTConfig(evaluate="theta~")
    assert SMARTConfig.from_json("{}").evaluate == "theta"
    off = {"lambda_s": 0, "mu": 0}
    config = SMARTConfig(**off, evaluate="teacher")
    assert SMARTConfig.from_json(config.to_json()) == config
    found = {
        (mu, evaluate): (c.active, c.has_penalty, c.has_teacher, c.needs_total_steps)
        for mu in (0, 1)
        for evaluate in ("theta", "teacher")
        for c in [SMARTConfig(lambda_s=0, mu=mu, evaluate=evaluate)]
    }
    assert found == {
        (0, "theta"): (False, False, False, False),
        (0, "teacher"): (True, False, True, True),
        (1, "theta"): (True, True, True, True),
        (1, "teacher"): (True, True, True, True),
    }
    with pytest.raises(ValueError, match="caller: evaluate is teacher and theta~ remembers 0.3 of the run"):
        config.check_total_steps("caller")
    config.replace(beta_early=0.9, beta_late=0.9).check_total_steps("caller")
