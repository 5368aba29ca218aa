"""What is noticed of the user's loop."""

import pytest
import torch
from paper_settings import papers
from small_torch import BOTH, Model
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
