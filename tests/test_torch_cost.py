"""What a step must not do: wait for the device, go down below the site twice, keep two graphs where it is lean."""

import weakref
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES, TOKENS, N, classifier, text
from notes import Notes
from paper_settings import papers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smartreg_torch import SMART, divergences
from smartreg_torch.reach import Attributes
from smartreg_torch.report import Report

STARTS = {"gaussian": {"start": "gaussian", "ascent_steps": 1}, "margin": {"start": "margin", "ascent_steps": 0}}
# what the host waits for: values that it reads, and a list that it copies as a tensor
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "lift_fresh"}


class Operations(TorchDispatchMode):
    """The names of all operations inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@pytest.fixture
def late(monkeypatch):
    """As on a GPU: what a step found is not here yet when the step ends, and no condition is known."""
    monkeypatch.setattr(Report, "is_here", property(lambda self: False))
    monkeypatch.setattr(divergences, "_is_sure", lambda condition: False)


@pytest.fixture(params=STARTS)
def start(request):
    return STARTS[request.param]


def bert():
    torch.manual_seed(0)
    model = classifier("Bert")().train()
    return model, text() | {"labels": torch.randint(3, (N,))}


class Fake(torch.Tensor):
    """Stands for tensors that have no values, as those of FakeTensorMode."""


def test_a_condition_on_a_device_is_not_waited_for():
    assert divergences._is_sure(torch.tensor([True]))
    assert not divergences._is_sure(torch.tensor([True, False]))
    assert not divergences._is_sure(torch.ones(1, dtype=torch.bool, device="meta"))
    assert not divergences._is_sure(torch.tensor([True]).as_subclass(Fake))


def test_nothing_in_a_step_waits_for_the_device(late, start):
    model, inputs = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smart = SMART(model, papers(**start, total_steps=10))
    del inputs["attention_mask"]  # Hugging Face itself looks into it
    smart(**inputs)  # the first step looks whether the passes are alike
    smart.metrics  # noqa: B018
    with Operations() as operations:
        output, penalty = smart(**inputs)
        (output.loss + penalty).backward()
        optimizer.step()
    assert "embedding" in operations.names
    assert not READS & set(operations.names)
    with Operations() as operations:
        smart.metrics  # noqa: B018
        penalty.item()
    assert READS & set(operations.names)  # it would be seen


@pytest.mark.parametrize("attached", [True, False])
def test_a_penalty_that_arrives_late_and_is_not_finite_is_raised_before_harm_is_done(late, attached):
    model, inputs = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    smart = SMART(model, papers(total_steps=10))
    if attached:
        smart.attach(optimizer)
    teacher = {name: average.clone() for name, average in smart.teacher.items()}
    weights = [weight.clone() for weight in model.parameters()]
    output, penalty = smart(**inputs)
    (output.loss + penalty).backward()
    with pytest.raises(FloatingPointError, match="penalty of step 1 is not finite .*in the clean pass"):
        optimizer.step() if attached else smart.update()
    assert all(torch.equal(average, teacher[name]) for name, average in smart.teacher.items())
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert smart.step == 0
    smart(**inputs)
    with pytest.raises(FloatingPointError, match="penalty of step 1"):
        smart(**inputs)


def test_modules_that_do_not_change_are_looked_at_in_one_row(monkeypatch):
    """What was found in them is kept from step to step, and none of them is looked at alone."""
    model, inputs = bert()
    smart = SMART(model, papers(**STARTS["margin"], total_steps=10))
    smart(**inputs)
    alone = []
    own = Attributes.slot
    monkeypatch.setattr(Attributes, "slot", lambda self, i: alone.append(i) or own(self, i))
    smart(**inputs)
    inside = smart._runner.known.inside
    smart(**inputs)
    assert alone == []
    assert smart._runner.known.inside is inside is not None
    handle = model.classifier.register_forward_hook(lambda module, *_: setattr(module, "calls", 1))
    smart(**inputs)
    assert alone  # it would be seen
    handle.remove()
    smart.remove()
    assert smart._runner.known.inside is None  # it holds the modules


def test_a_late_penalty_can_be_skipped(late):
    model, inputs = bert()
    smart = SMART(model, papers(total_steps=10, non_finite="skip"))
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    assert smart(**inputs)[1] == 0
    assert smart.metrics["skipped"] == 1


def test_gradients_go_below_the_site_once(start):
    """One dense gradient of the embedding's weight, as in a plain step; with the site above two of them are added."""
    model, inputs = bert()
    with Operations() as plain:
        model(**inputs).loss.backward()
    smart = SMART(model, papers(**start, total_steps=10))
    output, penalty = smart(**inputs)
    with Operations() as ours:
        (output.loss + penalty).backward()
    below = [operations.names.count("embedding_dense_backward") for operations in (plain, ours)]
    # word, position and token type; the last two are above the site
    assert below == [3, 5]


def penalty_gradient(make, inputs, lean, config, run=lambda smart, inputs: smart(**inputs)[1], settings=None):
    torch.manual_seed(0)
    model = make().train()
    torch.manual_seed(0)
    smart = SMART(model, config, lean=lean, **settings or {})
    with torch.no_grad():
        for average in smart.teacher.values():
            average.add_(0.05 * torch.randn_like(average))
    penalty = run(smart, inputs)
    (3 * penalty).backward()
    return penalty.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["BERT", "Llama", "siamese", "LSTM", "CNN"])
def test_lean_changes_neither_value_nor_gradient(name, start):
    architecture = ARCHITECTURES[name]
    torch.manual_seed(1)
    inputs = architecture.inputs()
    config = papers(**start, total_steps=10, lambda_s=2.0, epsilon=0.1, sigma=0.1)
    found = [
        penalty_gradient(architecture.make, inputs, lean, config, settings=architecture.settings)
        for lean in (False, True)
    ]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert found[0][1].norm() > 0
    assert (found[1][1] - found[0][1]).norm() <= 1e-5 * found[0][1].norm()


@pytest.mark.parametrize("how", ["autocast", "checkpointing", "bf16 weights", "accumulation"])
def test_lean_under(how, start):
    inputs = bert()[1]

    def make():
        model = classifier("Bert")()
        if how == "checkpointing":
            model.activation_checkpointing_enable({"use_reentrant": False})
        return model.to(torch.bfloat16) if how == "bf16 weights" else model

    def run(smart, inputs):
        if how == "accumulation":
            inputs = {name: value[: N // 2] for name, value in inputs.items()}
            smart(**{name: value.flip(0) for name, value in inputs.items()})[1].backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return smart(**inputs)[1]

    config = papers(**start, total_steps=10, epsilon=0.1, sigma=0.1)
    found = [penalty_gradient(make, inputs, lean, config, run) for lean in (False, True)]
    half = how == "bf16 weights"  # the gradients are rounded to it before they meet
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert (found[1][1] - found[0][1]).norm() <= (2e-2 if half else 1e-5) * found[0][1].norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_lean_compiled(start):
    """As neither lean nor compiled; test_torch_compile.py has compiled models that are not lean."""

    def make(compiled):
        model = nn.Sequential(nn.Embedding(31, 8), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * TOKENS, 3))
        if compiled:
            model.compile(backend="eager")
        return model

    inputs, config = {"input": text()["input_ids"]}, papers(**start, total_steps=10, epsilon=0.1, sigma=0.1)
    found = [penalty_gradient(partial(make, lean), inputs, lean, config) for lean in (False, True)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)
    assert found[0][1].norm() > 1e-3


def peak_of_saved(step):
    """The most bytes that graphs keep at one time."""
    live, peak = {}, 0

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal peak
        saved = Saved(tensor)
        live[id(saved)] = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        weakref.finalize(saved, live.pop, id(saved))
        peak = max(peak, sum(dict(live.values()).values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        step()
    return peak


def test_lean_keeps_one_graph_at_a_time():
    """Activations, weighed against the weights that their graphs also keep: about a plain step's, not twice that."""
    model, inputs = bert()
    inputs = {name: torch.cat([value] * 20) for name, value in inputs.items()}

    def plain():
        model(**inputs).loss.backward()

    def ours(lean):
        def step():
            with SMART(model, papers(**STARTS["margin"], total_steps=10), lean=lean) as smart:
                output, penalty = smart(**inputs)
                (output.loss + penalty).backward()

        return step

    base = peak_of_saved(plain)
    assert peak_of_saved(ours(False)) > 1.8 * base
    assert peak_of_saved(ours(True)) < 1.1 * base


def test_lean_keeps_one_set_of_gradients():
    """When the perturbed pass's backward begins, the clean gradients are in .grad, all but the smallest weight's."""
    model, inputs = bert()
    smart = SMART(model, papers(**STARTS["margin"], total_steps=10), lean=True)
    output, penalty = smart(**inputs)
    found = []
    model.classifier.register_forward_hook(
        lambda *_: found.append([name for name, weight in model.named_parameters() if weight.grad is None])
    )
    (output.loss + penalty).backward()
    assert found == [["classifier.bias"]]


def test_lean_counts_a_head_outside_the_model_once():
    """outputs= may compute more from the model's output, with weights that SMART does not know of."""
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        model, head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
        config = papers(**STARTS["margin"], total_steps=10, epsilon=0.5)
        smart = SMART(model, config, outputs=head, lean=lean)
        smart(torch.randn(6, 4))[1].backward()
        found.append(torch.cat([weight.grad.flatten() for weight in [*model.parameters(), *head.parameters()]]))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_lean_is_exact_in_float64_and_with_half_weights_first():
    """The factor before the penalty reaches the put-off side in float32 or wider, whatever the weights are."""
    for first, dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        found = []
        for lean in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 3, dtype=dtype))
            model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=first)))
            smart = SMART(model, papers(mu=0, epsilon=0.5), lean=lean, precision="model")
            (smart(torch.randn(6, 4, dtype=dtype))[1] / 3).backward()
            found.append(model[0].weight.grad)
        tolerance = 1e-12 if dtype is torch.float64 else 1e-5
        assert (found[1] - found[0]).norm() <= tolerance * found[0].norm()


def test_the_graph_of_lean_is_freed_after_one_backward():
    model, inputs = bert()
    smart = SMART(model, papers(total_steps=10), lean=True)
    _, penalty = smart(**inputs)
    penalty.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second time .* lean=True, whose graph is freed"):
        penalty.backward()


def test_lean_refuses_hooks_on_weights():
    model, inputs = bert()
    smart = SMART(model, papers(total_steps=10), lean=True)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        hook = getattr(model.classifier.weight, register)(lambda _: None)
        with pytest.raises(RuntimeError, match=r"lean=True .* its hooks would see each of them alone"):
            smart(**inputs)
        hook.remove()
    smart(**inputs)[1].backward()  # and goes on


def test_lean_is_a_bool():
    with pytest.raises(TypeError, match="lean must be True or False, got 'yes'"):
        SMART(bert()[0], papers(total_steps=10), lean="yes")


def test_lean_asks_for_backward():
    model, inputs = bert()
    smart = SMART(model, papers(total_steps=10), lean=True)
    for asked in (list(model.parameters()), [model.classifier.weight]):
        penalty = smart(**inputs)[1]
        with pytest.raises(RuntimeError, match=r"lean=True .* needs loss.backward"):
            torch.autograd.grad(penalty, asked, allow_unused=True)
        with pytest.raises(RuntimeError, match=r"lean=True .* needs loss.backward"):
            smart(**inputs)[1].backward(inputs=asked)


def test_lean_refuses_arguments_of_another_graph():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    smart = SMART(model, papers(total_steps=10), lean=True)
    with pytest.raises(ValueError, match=r"lean=True .*must not come from a graph.*\(5, 4\)"):
        smart(nn.Linear(4, 4)(x))
    smart(x)[1].backward()  # and goes on


def test_lean_refuses_several_processes():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(bert()[0])
        with pytest.raises(ValueError, match="lean=True with DistributedDataParallel"):
            SMART(model, papers(total_steps=10), lean=True)
    finally:
        torch.distributed.destroy_process_group()


def test_lean_without_r_s_is_the_usual_step():
    model, inputs = bert()
    smart = SMART(model, papers(lambda_s=0, total_steps=10), lean=True)
    torch.autograd.grad(smart(**inputs)[1], list(model.parameters()), allow_unused=True)


def passes(model):
    """Of every pass of the model, whether it builds a graph for the weights."""
    found = Notes()
    model.bert.encoder.register_forward_hook(
        lambda module, args, output: found.add(torch.is_grad_enabled() and next(module.parameters()).requires_grad)
    )
    return found


def drawn(smart):
    """The state of the noise generator."""
    state = smart.state_dict()["generator"]
    return state if state is None else state.tolist()


@pytest.mark.parametrize(("mu", "off"), [(0, [True]), (1, [True, False])])
@pytest.mark.parametrize("lean", [False, True])
def test_a_step_without_R_s_has_none_of_its_passes(mu, off, lean, start):
    model, inputs = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = papers(**start, smoothness_steps=3, mu=mu, lambda_s=0.5, total_steps=10)
    with SMART(model, config, lean=lean) as smart:
        generator, seen, last = None, passes(model), None
        for step in range(5):
            for _ in range(2):  # the batches of one optimiser step are alike
                seen.taken()
                output, penalty = smart(**inputs)
                (output.loss + penalty).backward()
                found = smart.metrics
                if step % 3:
                    assert seen.taken() == off
                    assert penalty.item() == pytest.approx(mu * found.get("D_Breg", 0.0))
                    assert (found["R_s"], found["max_delta"]) == last
                    assert drawn(smart) == generator
                else:
                    assert len(seen.taken()) > len(off)
                    assert penalty.item() == pytest.approx(1.5 * found["R_s"] + mu * found.get("D_Breg", 0.0))
                    last, generator = (found["R_s"], found["max_delta"]), drawn(smart)
                    assert last[0] > 0
            optimizer.step()
            optimizer.zero_grad()
            smart.update()


def test_steps_that_are_not_counted_are_noticed_where_R_s_comes_every_K_steps():
    model = nn.Linear(2, 2)
    smart = SMART(model, papers(smoothness_steps=2, mu=0))
    for _ in range(199):
        smart(torch.ones(1, 2))
    with torch.no_grad():
        model.bias.add_(1)  # an optimiser's step
    with pytest.warns(UserWarning, match="200 batches without smart.update"):
        smart(torch.ones(1, 2))
