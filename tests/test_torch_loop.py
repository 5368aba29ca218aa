"""What is noticed of the user's loop."""

import pytest
import torch
from paper_settings import papers
from small_torch import BOTH, R_S, Model
from torch import nn

from smartreg_torch import SMART, SMARTWarning


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


def test_forgetting_update_warns(ids):
    model = nn.Sequential(nn.Embedding(11, 2), nn.Flatten(), nn.Linear(10, 2))
    smart = SMART(model, papers(lambda_s=0, total_steps=9))
    for _ in range(256):  # batches that are accumulated: the weights stay
        smart(ids)
    smart.update()
    for _ in range(199):
        smart(ids)
        with torch.no_grad():
            model[2].bias.add_(0.1)
    with pytest.warns(SMARTWarning, match=r"200 batches without smart.update\(\)"):
        smart(ids)


def moved(model, smart, ids, batches):
    """Train as a loop that forgets `smart.update()`."""
    for _ in range(batches):
        smart(ids)
        with torch.no_grad():
            model.head.bias.add_(0.1)


def test_the_end_of_a_run_without_update_warns(ids):
    model = Model()
    smart = SMART(model, BOTH)
    moved(model, smart, ids, 3)
    with pytest.warns(SMARTWarning, match=r"SMART: 3 batches without smart.update\(\)"):
        smart.remove()
    smart.remove()  # once
    with pytest.warns(SMARTWarning, match="2 batches without"), SMART(model, BOTH) as smart:
        moved(model, smart, ids, 2)


def test_an_end_that_is_as_it_should_be_says_nothing(ids):
    model = Model()
    with SMART(model, BOTH) as smart:  # an example
        moved(model, smart, ids, 1)
    with SMART(model, BOTH) as smart:  # a look at some batches
        for _ in range(3):
            smart(ids)
    with SMART(model, R_S) as smart:  # nothing depends on the step
        moved(model, smart, ids, 3)
    with SMART(model, BOTH) as smart:  # counted, and one that was broken off
        smart(ids)
        smart.update()
        moved(model, smart, ids, 2)
    smart = SMART(model, BOTH)
    moved(model, smart, ids, 3)
    with pytest.raises(IndexError), smart:  # broken off: the exception alone is said
        smart(ids + 99)


def test_more_steps_than_total_steps_warn_once(ids):
    model = Model()
    smart = SMART(model, papers(total_steps=2, lambda_s=0))
    for _ in range(2):
        smart.update()
    with pytest.warns(SMARTWarning, match=r"step 3 of a run of total_steps=2: .*total_steps=len\(loader\) \* epochs"):
        smart.update()
    smart.update()
    for config in (papers(total_steps=1, mu=0), papers(beta_late=0.99), papers(beta_late=0.99, total_steps=1)):
        smart = SMART(model, config)  # in which nothing is scheduled
        smart.update()
        smart.update()


def test_a_training_step_inside_swap_teacher_is_refused(ids):
    model = Model()
    smart = SMART(model, BOTH)
    smart(ids)
    with smart.swap_teacher():
        with smart.swap_teacher():
            pass
        with pytest.raises(RuntimeError, match=r"a training step inside swap_teacher\(\)"):
            smart(ids)
        assert smart.measure(ids)["D_Breg"] == 0
        with torch.no_grad():
            smart(ids)
        model.eval()
        smart(ids)
        model.train()
    assert smart(ids)[1] > 0


def test_training_in_eval_mode_warns_once(ids):
    model = Model().eval()
    smart = SMART(model, BOTH)
    smart.update()  # no call: nothing to say
    with torch.no_grad():
        smart(ids)
    smart.update()
    smart(ids)
    with pytest.warns(SMARTWarning, match="trained in eval mode"):
        smart.update()
    smart(ids)
    smart.update()
    model.train()
    fresh = SMART(model, BOTH)
    fresh(ids)
    model.eval()
    fresh(ids)  # a look on the way
    fresh.update()
