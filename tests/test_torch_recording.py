"""Recording a PyTorch run: it changes nothing, the file passes compare_run, and what is wrong in a run shows."""

import gc
import itertools
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Siamese, classifier, text, two_texts
from notes import Notes
from paper_settings import papers
from torch import nn

from smartreg.checking import compare_run
from smartreg_torch import SMART, SMARTConfig, SMARTWarning
from smartreg_torch.perturbation import ascend
from smartreg_torch.projection import sum_divergence
from smartreg_torch.proximal import bregman_divergence

BOTH = papers(total_steps=20, epsilon=0.1)


def run(model, batches, config=BOTH, lr=1e-2, settings=None, update=True, **called):
    """A few steps of training; the loss is the outputs' size, whatever they are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    torch.manual_seed(1)
    penalties = []
    with SMART(model, config, **(settings or {})) as smart:
        for batch in batches:
            output, penalty = smart(**batch, **called)
            tensors = [output] if isinstance(output, torch.Tensor) else [z for z in output.values() if z.ndim]
            (sum(z.float().square().mean() for z in tensors) + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            if update:
                smart.update()
            penalties.append(penalty.item())
    return penalties


def failed(path):
    return {row.what for row in compare_run(path).rows if not row.ok}


@pytest.mark.parametrize("name", ["BERT", "CNN", "siamese"])
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_recording_changes_nothing(tmp_path, name, start):
    """Dropout and BatchNorm included, the weights are the same bit for bit."""
    architecture = ARCHITECTURES[name]
    batches = [architecture.inputs() for _ in range(4)]
    ends = []
    for record in (None, tmp_path / "run.npz"):
        torch.manual_seed(0)
        model = architecture.make().train()
        config = BOTH.replace(start=start)
        penalties = run(model, batches, config, settings={"record": record, "record_steps": 3})
        ends.append((penalties, list(model.state_dict().values()), torch.get_rng_state()))
    (plain, weights, stream), (recorded, recorded_weights, recorded_stream) = ends
    assert recorded == plain
    assert all(torch.equal(a, b) for a, b in zip(recorded_weights, weights, strict=True))
    assert torch.equal(recorded_stream, stream)
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    assert max(row.step for row in report.rows) == 3


class Tagger(nn.Module):
    """One output a position, and one value an example."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.size = nn.Embedding(31, 8, padding_idx=0), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, input_ids, attention_mask):
        h = self.embedding(input_ids).tanh()
        return {"tags": self.head(h), "size": self.size(h.mean(1)).squeeze(-1)}


TWO = {"outputs": ["tags", "size"], "divergence": ["symmetric_kl", "squared_error"]}
SITUATIONS = {
    "lambda_s = 0": (classifier("Bert"), text, BOTH.replace(lambda_s=0), {}),
    "mu = 0": (classifier("Bert"), text, BOTH.replace(mu=0), {}),
    "l_2, a ball a token": (classifier("Bert"), text, BOTH.replace(norm="2", granularity="token"), {}),
    "l_1, absolute": (classifier("Bert"), text, BOTH.replace(norm="1", scale="absolute"), {}),
    "rescaled": (classifier("Bert"), text, SMARTConfig.mtdnn(), {}),
    "published": (classifier("Bert"), text, SMARTConfig.paper(total_steps=9), {}),
    "several runs of the site": (Siamese, two_texts, BOTH, {}),
    "several outputs, positions": (Tagger, text, BOTH, TWO),
    "margin, several outputs": (Tagger, text, BOTH.replace(start="margin"), TWO),
    "float64": (lambda: Tagger().double(), text, BOTH, TWO),
    "R_s every 2nd step": (classifier("Bert"), text, BOTH.replace(smoothness_steps=2), {}),
    "R_s alone, every 2nd step": (classifier("Bert"), text, BOTH.replace(smoothness_steps=2, mu=0), {}),
    "bfloat16": (lambda: Tagger().bfloat16(), text, BOTH, TWO | {"precision": "model"}),
    "float16": (lambda: Tagger().half(), text, BOTH, TWO | {"precision": "model"}),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_situation_passes(tmp_path, name, weighted):
    make, inputs, config, settings = SITUATIONS[name]
    called = {"sample_weight": torch.tensor([1.0, 0, 2, 0.5, 0, 3])} if weighted else {}
    run(
        make().train(),
        [inputs() for _ in range(3)],
        config,
        settings={**settings, "record": tmp_path / "run.npz"},
        lr=0.1,
        **called,
    )
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    assert ({"R_s"} & {row.what for row in report.rows} == set()) == (config.lambda_s == 0)
    assert ({"D_Breg"} & {row.what for row in report.rows} == set()) == (config.mu == 0)
    with np.load(tmp_path / "run.npz") as file:
        assert all(file[name].dtype != np.float16 for name in file.files)
        assert ("0/sample_weight/0" in file.files) == weighted


@pytest.mark.parametrize("precision", ["float32", "model"])
def test_autocast(tmp_path, precision):
    settings = {"precision": precision, "record": tmp_path / "run.npz"}
    with torch.autocast("cpu", torch.bfloat16):
        run(classifier("Bert")().train(), [text() for _ in range(3)], settings=settings)
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)


def test_what_half_precision_loses_is_recomputed(tmp_path):
    """The rounding to bfloat16 in NumPy is torch's: the lost fraction is the same, and above a half it fails."""
    for epsilon, some in ((0.01, 0.05), (0.0005, 0.5)):
        path = tmp_path / f"{epsilon}.npz"
        config = BOTH.replace(mu=0, epsilon=epsilon, sigma=epsilon, ascent_steps=0)
        with np.errstate(all="raise"):
            if some == 0.5:
                with pytest.warns(SMARTWarning, match="below the precision of torch.bfloat16"):
                    run(Tagger().bfloat16(), [text()], config, settings={**TWO, "precision": "model", "record": path})
            else:
                run(Tagger().bfloat16(), [text()], config, settings={**TWO, "precision": "model", "record": path})
        (row,) = (row for row in compare_run(path).rows if row.what == "vanished")
        assert row.ok
        assert row.recomputed > some
        assert failed(path) == ({"x + delta is not x"} if some == 0.5 else set())


# when it is written


def test_it_is_written_after_the_last_step_and_only_then(tmp_path):
    path = tmp_path / "run.npz"
    model = Tagger()
    smart = SMART(model, BOTH, **TWO, record=path, record_steps=2)
    smart(**text())
    assert not path.exists()
    model.eval()
    smart(**text())
    model.train()
    assert not path.exists()
    smart(**text())
    written = path.read_bytes()
    smart(**text())
    smart.remove()
    assert path.read_bytes() == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.npz"]
    with pytest.raises(FileExistsError, match=r"^SMART: record=.* is there already"):
        SMART(model, BOTH, **TWO, record=path)
    assert not model.embedding._forward_hooks


class Breaks(Tagger):
    def __init__(self):
        super().__init__()
        self.passed = itertools.count(1)

    def forward(self, input_ids, attention_mask):
        if next(self.passed) == 1 + 2 * 4 + 3:  # four passes a step, five in the first: the perturbed one of the third
            raise KeyError("the model's own error")
        return super().forward(input_ids, attention_mask)


def test_a_model_that_raises_leaves_the_complete_steps(tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(KeyError, match="own error"):
        run(Breaks(), [text() for _ in range(4)], settings={**TWO, "precision": "model", "record": path})
    report = compare_run(path)
    assert report.ok, str(report)
    assert max(row.step for row in report.rows) == 2


def test_a_step_that_is_not_finite_is_recorded(tmp_path):
    model = Tagger()
    with torch.no_grad():
        model.head.weight[0, 0] = np.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        run(model, [text()], settings={**TWO, "record": tmp_path / "run.npz"})
    assert "all finite" in failed(tmp_path / "run.npz")


def test_without_remove_it_is_written_when_python_ends(tmp_path):
    code = f"""
import torch
from torch import nn
from smartreg_torch import SMART, SMARTConfig
model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
smart = SMART(model, SMARTConfig(total_steps=9), record={str(tmp_path / "run.npz")!r})
smart(torch.randint(9, (16, 2)))
raise SystemExit("the script breaks off")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "the script breaks off\n"
    assert compare_run(tmp_path / "run.npz").ok


def test_no_step_is_a_warning(tmp_path):
    with (
        pytest.warns(SMARTWarning, match=r"SMART: record=: .*run.npz' is not written: no training step"),
        SMART(Tagger().eval(), BOTH, **TWO, record=tmp_path / "run.npz") as smart,
    ):
        smart(**text())
    with pytest.raises(ValueError, match="SMART: record= has nothing to record"):
        SMART(Tagger(), papers(lambda_s=0, mu=0), record=tmp_path / "run.npz")


def test_no_graph_is_kept(tmp_path):
    model, graphs = Tagger(), Notes()
    smart = SMART(model, BOTH, **TWO, record=tmp_path / "run.npz")
    model.head.register_forward_pre_hook(lambda head, args: graphs.add(weakref.ref(args[0])))  # a graph keeps it
    output, penalty = smart(**text())
    clean = output["tags"].detach().numpy().copy()
    with torch.no_grad():
        output["tags"].zero_()  # what is the user's may be changed
    found = graphs.taken()
    assert len(found) > 3
    assert any(h() is not None for h in found)
    del output, penalty
    gc.collect()
    assert all(h() is None for h in found)
    smart.remove()
    with np.load(tmp_path / "run.npz") as file:
        assert np.array_equal(file["0/outputs/0"], clean)


# what is wrong in a run, or in SMART, shows


def test_update_never_called(tmp_path):
    batches = [text() for _ in range(3)]
    with pytest.warns(SMARTWarning, match=r"3 batches without smart.update\(\)"):
        run(Tagger(), batches, settings={**TWO, "record": tmp_path / "run.npz"}, update=False)
    assert failed(tmp_path / "run.npz") == {"theta~ is counted"}
    assert "smart.update()" in str(compare_run(tmp_path / "run.npz"))


def test_gradient_accumulation_is_no_fault(tmp_path):
    with SMART(Tagger(), BOTH, **TWO, record=tmp_path / "run.npz") as smart:
        for _ in range(3):
            smart(**text())
    assert failed(tmp_path / "run.npz") == set()


def test_an_optimiser_of_other_weights(tmp_path):
    run(Tagger(), [text() for _ in range(3)], lr=0.0, settings={**TWO, "record": tmp_path / "run.npz"})
    assert failed(tmp_path / "run.npz") == {"theta~ is not theta"}


def test_an_ascent_that_never_starts(tmp_path):
    with pytest.warns(SMARTWarning, match="sigma=0"):
        config = BOTH.replace(sigma=0)
    run(Tagger(), [text()], config, settings={**TWO, "record": tmp_path / "run.npz"})
    assert failed(tmp_path / "run.npz") == {"delta not all 0"}
    assert "Is sigma 0" in str(compare_run(tmp_path / "run.npz"))


BROKEN = {
    "sum_divergence": lambda *given: 1.001 * sum_divergence(*given),
    "bregman_divergence": lambda *given: 1.001 * bregman_divergence(*given),
    "momentum": lambda step, config: 0.9,
    "ascend": lambda *given: [1.001 * delta for delta in ascend(*given)],
}
SHOWS = {
    "sum_divergence": {"R_s", "D_Breg", "penalty"},
    "bregman_divergence": {"D_Breg", "penalty"},
    "momentum": {"beta"},
    "ascend": {"delta in the ball"},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_formula_shows(tmp_path, monkeypatch, what):
    for name, module in list(sys.modules.items()):  # whichever of them use it
        if name.startswith("smartreg_torch.") and name != "smartreg_torch.checking" and hasattr(module, what):
            monkeypatch.setattr(module, what, BROKEN[what])
    config = BOTH.replace(start="margin", ascent_steps=0)
    run(Tagger(), [text() for _ in range(3)], config, lr=1.0, settings={**TWO, "record": tmp_path / "run.npz"})
    assert failed(tmp_path / "run.npz") == SHOWS[what]


def test_the_page_prints_its_table(tmp_path, monkeypatch, capsys):
    """In the page as it is printed, but for the digits of the errors and the versions."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "debugging.md").read_text()
    code, shown = (
        re.search(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1] for kind in ("python", "text")
    )
    with pytest.warns(SMARTWarning, match=r"5 batches without smart.update\(\)"):  # the line that it misses
        exec(compile(code, "debugging.md", "exec"), {})

    def wording(text):
        return [re.split(r"  +", line)[:2] for line in text.splitlines()[2:]]

    assert wording(capsys.readouterr().out) == wording(shown)


class Imputes(nn.Module):
    """Features, a missing one replaced by a weight."""

    def __init__(self):
        super().__init__()
        self.fill, self.head = nn.Parameter(torch.zeros(6)), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, features):
        return self.head(torch.where(features.isnan(), self.fill, features))


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_missing_features_that_the_model_imputes(start, tmp_path):
    """Every other entry of a row is perturbed, the recording agrees, and R_s is as by hand."""
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    x[torch.rand(16, 6) < 0.2] = torch.nan
    x[0] = torch.nan
    missing = x.isnan()
    model, config = Imputes(), BOTH.replace(mu=0, start=start, ascent_steps=1)
    smart = SMART(model, config, record=tmp_path / "run.npz")
    logits, penalty = smart(x)
    penalty.backward()
    metrics = smart.metrics
    smart.remove()
    assert torch.isfinite(logits).all()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    with np.load(tmp_path / "run.npz") as file:
        delta = torch.from_numpy(file["0/delta/0"])
    radius = config.epsilon * torch.where(missing, 0, x).square().sum(1).div((~missing).sum(1).clamp(min=1)).sqrt()
    assert torch.all(delta[missing] == 0)
    assert torch.all(delta.abs().amax(1)[1:] > 0)
    assert torch.all(delta.abs().amax(1) <= radius * (1 + 1e-6))
    model.double()
    p, q = (model(z.double()).softmax(-1).detach() for z in (x, x + delta))
    want = float(((p - q) * (p.log() - q.log())).sum(-1).mean())
    assert metrics["R_s"] == pytest.approx(want, rel=1e-4)
    assert metrics["max_delta"] == float(delta.abs().max())
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
