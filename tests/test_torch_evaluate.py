"""evaluate="teacher": theta~ beside plain training, evaluated in the Trainer, and in the model at its end."""

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from paper_settings import papers
from small_torch import Model, make_batches, train
from test_torch_transformers import (
    BEST,
    CONFIG,
    arguments,
    assert_same,
    bert,
    logged,
    loss_of,
    make,
    make_rows,
    weights,
)
from torch import nn
from transformers import Trainer, TrainerCallback

from smartreg.proximal import momentum
from smartreg_torch import SMART, SMARTConfig

ALONE = SMARTConfig(lambda_s=0, mu=0, memory=0.5, evaluate="teacher")
WITH_R_S = CONFIG.replace(mu=0, evaluate="teacher")
ALL = CONFIG.replace(evaluate="teacher")


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_plainly(model, batches):
    """The weights after each step, the first ones before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = [parameters(model)]
    for ids, y in batches:
        nn.functional.cross_entropy(model(ids), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(parameters(model))
    return found


def average(thetas, config):
    """Line 14, after each step."""
    averages = dict(thetas[0])
    for step, theta in enumerate(thetas[1:], start=1):
        beta = momentum(step, config)
        averages = {name: (1 - beta) * theta[name] + beta * value for name, value in averages.items()}
    return averages


# a loop of one's own


@pytest.mark.parametrize("called", [True, False], ids=["smart(ids)", "model(ids)"])
def test_theta_tilde_alone_is_beside_plain_training_bit_for_bit(called):
    config, model, batches = ALONE.replace(total_steps=6), Model(), make_batches(6)
    twin, passes = copy.deepcopy(model), []
    model.register_forward_hook(lambda *_: passes.append(None))
    torch.manual_seed(3)
    thetas = train_plainly(twin, batches)
    stream = torch.get_rng_state()
    torch.manual_seed(3)
    smart = SMART(model, config)
    if called:
        assert train(model, smart, batches) == [0] * 6
    else:
        smart.attach(optimizer := torch.optim.AdamW(model.parameters(), lr=1e-2))
        for ids, y in batches:
            nn.functional.cross_entropy(model(ids), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(torch.get_rng_state(), stream)
    assert len(passes) == 6
    assert_same(twin.state_dict(), model.state_dict())
    for name, expected in average(thetas, config).items():
        assert torch.allclose(smart.teacher[name], expected, rtol=0, atol=1e-6), name
        assert not torch.allclose(smart.teacher[name], thetas[-1][name], rtol=0, atol=1e-4) or "embedding" in name
    assert smart.metrics == {"beta": momentum(6, config), "step": 6, "skipped": 0}
    assert smart.measure(batches[0][0]) == {}
    with smart.swap_teacher():
        assert torch.equal(model.head.weight, smart.teacher["head.weight"])
    other = SMART(Model(), config)
    other.load_state_dict(smart.state_dict())
    assert_same(other.teacher, smart.teacher)


def test_theta_tilde_alone_needs_total_steps():
    with pytest.raises(ValueError, match="SMART: evaluate is teacher and theta~ remembers .* total_steps is needed"):
        SMART(Model(), ALONE)


def test_the_penalty_is_the_same_with_theta_tilde_beside_it():
    config, batches = papers(mu=0, total_steps=4), make_batches(4)
    model = Model()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    smart = SMART(model, config.replace(evaluate="teacher"))
    beside = train(model, smart, batches)
    torch.manual_seed(3)
    without = SMART(twin, config)
    assert train(twin, without, batches) == beside
    assert min(beside) > 0
    assert_same(model.state_dict(), twin.state_dict())
    assert sorted(smart.metrics) == ["R_s", "beta", "max_delta", "skipped", "step", "vanished"]
    assert not without.teacher


def test_a_state_without_theta_tilde_is_refused():
    smart = SMART(Model(), papers(mu=0))
    other = SMART(Model(), papers(mu=0, evaluate="teacher", total_steps=4))
    with pytest.raises(ValueError, match="no theta~, since it was saved with mu=0.*evaluate='theta'"):
        other.load_state_dict(smart.state_dict())


# the Trainer


class Evaluated(TrainerCallback):
    """Keep theta and theta~ at each step, and the metrics that were logged."""

    def __init__(self):
        self.theta, self.averages, self.metrics, self.at_end = {}, {}, {}, None

    def on_step_end(self, args, state, control, model, **_):
        self.theta[state.global_step] = parameters(model)
        self.averages[state.global_step] = {k: v.clone() for k, v in self.trainer.smart.teacher.items()}

    def on_evaluate(self, args, state, control, metrics, **_):
        self.metrics[state.global_step] = metrics["eval_loss"]

    def on_train_end(self, args, state, control, model, **_):
        self.at_end = parameters(model)


def trained(folder, smart, resume=None, model=None, **settings):
    seen = Evaluated()
    trainer = make(folder, model, smart=smart, callbacks=[seen], **settings)
    seen.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def loss_with(values):
    model = bert()
    model.load_state_dict(values, strict=False)
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes it
        return loss_of(Trainer(model, arguments(folder), eval_dataset=make_rows(8)))


EVERY_2 = {name: value for name, value in BEST.items() if name != "load_best_model_at_end"}


@pytest.mark.parametrize("smart", [ALONE, WITH_R_S, ALL], ids=["alone", "R_s", "R_s and D_Breg"])
def test_each_evaluation_is_of_theta_tilde_and_the_model_has_it_at_the_end(tmp_path, smart):
    trainer, seen = trained(tmp_path, smart, **EVERY_2)
    assert list(seen.metrics) == [2, 4, 6]
    for step, loss in seen.metrics.items():
        assert loss == pytest.approx(loss_with(seen.averages[step]), rel=1e-6)
        assert abs(loss - loss_with(seen.theta[step])) > 1e-4
        folder = tmp_path / f"checkpoint-{step}"
        assert_same(parameters(bert().from_pretrained(folder)), seen.theta[step])
        state = torch.load(folder / "smart_state.pt", weights_only=True)
        assert_same(state["smart"]["teacher"], seen.averages[step])
    ends = parameters(trainer.model)
    for values in (ends, seen.at_end):
        assert_same(values, seen.averages[6])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen.metrics[6], rel=1e-6)
    trainer.save_model(tmp_path / "final")
    assert_same(parameters(bert().from_pretrained(tmp_path / "final")), ends)
    assert json.loads(Path(tmp_path, "final", "smart_config.json").read_text())["evaluate"] == "teacher"


def test_theta_tilde_alone_is_the_plain_trainer(tmp_path):
    plain = make(tmp_path / "plain", base=Trainer, callbacks=[plainly := Evaluated()], **EVERY_2)
    plainly.on_step_end = lambda *_, **__: None
    plain.train()
    trainer, seen = trained(tmp_path, ALONE, **EVERY_2)
    assert_same(seen.theta[6], plainly.at_end)
    losses = [{"loss": row["loss"]} for row in plain.state.log_history if "loss" in row]
    assert [{"loss": row["loss"]} for row in trainer.state.log_history if "loss" in row] == losses
    row = logged(trainer)[-1]
    assert row["beta"] == momentum(6, trainer.smart.config)
    assert "R_s" not in row


@pytest.mark.parametrize("best_only", [False, True], ids=["all", "save_only_model"])
def test_the_best_model_is_theta_tilde_of_the_best_step(tmp_path, best_only):
    settings = BEST | {"greater_is_better": True, "save_only_model": best_only}
    trainer, seen = trained(tmp_path, ALL, metric_for_best_model="loss", **settings)
    best = max(seen.metrics, key=seen.metrics.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert_same(parameters(trainer.model), seen.averages[best])
    assert loss_of(trainer) == pytest.approx(seen.metrics[best], rel=1e-6)


@pytest.mark.parametrize("smart", [ALONE, ALL], ids=["alone", "R_s and D_Breg"])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path, smart):
    whole, seen = trained(tmp_path, smart, **EVERY_2)
    resumed, again = trained(tmp_path, smart, str(tmp_path / "checkpoint-2"), bert(seed=5), **EVERY_2)
    assert_same(weights(whole), weights(resumed))
    for step in (4, 6):
        assert_same(seen.theta[step], again.theta[step])
        assert_same(seen.averages[step], again.averages[step])
        assert seen.metrics[step] == again.metrics[step]


def test_an_exception_in_an_evaluation_leaves_theta(tmp_path):
    class Breaks(TrainerCallback):
        def on_prediction_step(self, *_, **__):
            raise KeyboardInterrupt

    seen = Evaluated()
    trainer = make(tmp_path, smart=ALL, callbacks=[seen, Breaks()], **EVERY_2)
    seen.trainer = trainer
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same(parameters(trainer.model), seen.theta[2])
    with trainer.swap_teacher():
        assert_same(parameters(trainer.model), seen.averages[2])


def test_predict_during_the_training_is_of_theta_tilde(tmp_path):
    found = []

    class Predicts(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            found.append(trainer.predict(make_rows(8)).metrics["test_loss"])

    settings = {"callbacks": [seen := Evaluated(), Predicts()], "eval_dataset": make_rows(8), "max_steps": 3}
    trainer = make(tmp_path, smart=ALONE, **settings)
    seen.trainer = trainer
    trainer.train()
    assert found == pytest.approx([loss_with(seen.averages[step]) for step in (1, 2, 3)], rel=1e-6)
    assert loss_of(trainer) == pytest.approx(found[-1], rel=1e-6)
