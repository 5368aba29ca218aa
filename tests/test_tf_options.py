"""The options of SMARTCallback, attach and SMARTModel, and their older names."""

import keras
import pytest
from keras import layers
from paper_settings import papers

from smartreg_tf import SMARTCallback, SMARTConfig, SMARTModel, attach

CONFIG = papers(total_steps=9)
BOTH = [
    ({"site": "embed", "layers": "embed"}, "site= and its older name layers= are both given"),
    ({"precision": "model", "float32": False}, "precision= and its older name float32= are both given"),
]


def network():
    model = keras.Sequential([keras.Input([4]), layers.Embedding(9, 3, name="embed"), layers.Flatten()])
    model.add(layers.Dense(2))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    return model


def made(what, **given):
    if what == "SMARTCallback":
        return SMARTCallback(CONFIG, **given)
    if what == "SMARTModel":
        return SMARTModel(network(), CONFIG, **given)
    with attach(network(), CONFIG, **given) as smart:
        return smart


@pytest.mark.parametrize("what", ["SMARTCallback", "attach", "SMARTModel"])
def test_what_cannot_be_meant_is_refused(what):
    for given, message in BOTH:
        with pytest.raises(TypeError, match=f"{what}: {message}"):
            made(what, **given)
    with pytest.raises(ValueError, match=f"{what}: precision must be 'float32' or 'model', got 'half'"):
        made(what, precision="half")
    with pytest.raises(TypeError, match=f"{what}: on_step must be a function of one StepSeen, got 3"):
        made(what, on_step=3)


@pytest.mark.parametrize("what", ["SMARTCallback", "attach", "SMARTModel"])
def test_an_argument_that_is_none_says_what_may_be_meant(what):
    for name, message in (
        ("divergence", "Say outputs=, from which the divergence follows: outputs='regression'"),
        ("class_axis", "Give the loss its axis"),
        ("mask", "Let the model have Keras' mask"),
        ("lambda_s", r"it is a setting. Give it to the settings, SMARTConfig\(lambda_s=...\)"),
        ("output", "did you mean 'outputs'"),
        ("zzz", "it knows .*site, outputs"),
    ):
        with pytest.raises(TypeError, match=f"{what}: no argument is called '{name}'.*{message}"):
            made(what, **{name: 1})


@pytest.mark.parametrize("what", ["SMARTCallback", "attach", "SMARTModel"])
def test_kinds_are_checked_at_once(what):
    for outputs in ("logit", ["logits", "logit"], {"head": "logit"}):
        with pytest.raises(ValueError, match=f"{what}: outputs= must be of logits, .*, got 'logit'"):
            made(what, outputs=outputs)
    assert made("attach", outputs=["logits", None]).options.outputs == ["logits", None]


def test_a_configuration_is_checked_at_once():
    for config, got in (({"lambda_s": 1}, "dict"), (SMARTConfig, "the class SMARTConfig"), (network(), "Sequential")):
        with pytest.raises(TypeError, match=f"config must be a SMARTConfig, got {got}. Give one, such as SMARTConfig"):
            SMARTCallback(config)


def test_older_names_mean_the_same():
    for old, new in (({"layers": "embed"}, {"site": "embed"}), ({"float32": False}, {"precision": "model"})):
        assert made("attach", **old).options == made("attach", **new).options
        assert made("attach", **old).describe() == made("attach", **new).describe()
    assert made("attach", float32=True).options == made("attach").options


def test_a_model_saved_with_the_older_names_loads():
    model = SMARTModel(network(), CONFIG, "embed", seed=3, precision="model")
    config = model.get_config()
    assert [config.pop(name) for name in ("site", "precision")] == [["embed"], "model"]
    for old in ({"layers": ["embed"], "float32": False}, {"site": ["embed"], "precision": "model"}):
        again = SMARTModel.from_config(config | old)
        assert again.get_config()["site"] == ["embed"]
        assert again.describe()["site"].value == "the layer 'embed'"
        assert again.get_config() | config == again.get_config()
