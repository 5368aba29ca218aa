"""Every pass over a batch is the same one: what a forward changes is put back, or SMART says that it cannot be."""

import collections
import copy
import dataclasses
import functools
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
import transformers
from paper_settings import papers
from torch import nn

from smartreg_torch import SMART, SMARTConfig, SMARTWarning

BOTH = SMARTConfig(lambda_s=1.0, beta_early=0.9, beta_late=0.9)
GLOBAL: list[torch.Tensor] = []


@pytest.fixture
def ids():
    return torch.randint(20, (6, 5))


class Plain(nn.Module):
    """Mean of embeddings and a head; what the subclasses add is of no account for R_s."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def features(self, ids):
        return self.embedding(ids).tanh().mean(1)

    def forward(self, ids):
        return self.head(self.features(ids))


def expected(ids, scale=1.0):
    """R_s and the penalty's gradient of the model that keeps nothing, its logits times `scale`."""

    class Scaled(Plain):
        def forward(self, ids):
            return super().forward(ids) * scale

    return found(Scaled(), ids)


def found(model, *inputs, steps=1, **settings):
    smart = SMART(model, BOTH, **settings)
    for _ in range(steps):
        _, penalty = smart(*inputs)
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-13)
    weights = [model.get_parameter(name) for name in ("embedding.weight", "head.weight")]
    return smart.metrics["R_s"], torch.autograd.grad(penalty, weights, retain_graph=True)


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


# what a module keeps


class Counter(Plain):
    calls = 0

    def forward(self, ids):
        self.calls += 1
        return super().forward(ids) * self.calls


class ClassCounter(Plain):
    calls = 0

    def forward(self, ids):
        type(self).calls += 1
        return super().forward(ids) * type(self).calls


class InAList(Plain):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, ids):
        self.kept.append(ids)
        return super().forward(ids) * len(self.kept)


class InADict(Plain):
    def __init__(self):
        super().__init__()
        self.kept = collections.Counter()

    def forward(self, ids):
        self.kept["calls"] += 1
        return super().forward(ids) * self.kept["calls"]


class InAnObject(Plain):
    def __init__(self):
        super().__init__()
        self.kept = dataclasses.make_dataclass("Kept", [("calls", int), ("ids", collections.deque)], slots=True)(
            0, collections.deque(maxlen=3)
        )

    def forward(self, ids):
        self.kept.calls += 1
        self.kept.ids.append(ids)
        return super().forward(ids) * self.kept.calls * len(self.kept.ids)


class InPlace(Plain):
    """A tensor that is no buffer, written into."""

    def __init__(self):
        super().__init__()
        self.kept = torch.zeros(())

    def forward(self, ids):
        self.kept += 1
        return super().forward(ids) * self.kept


class InATuple(Plain):
    def __init__(self):
        super().__init__()
        self.kept = (torch.zeros(()), np.zeros(()))

    def forward(self, ids):
        self.kept[0].add_(1)
        self.kept[1][()] += 1
        return super().forward(ids) * self.kept[0] * float(self.kept[1])


class InADefault(Plain):
    def forward(self, ids, calls=[]):  # noqa: B006
        calls.append(1)
        return super().forward(ids) * len(calls)


class Hidden(Plain):
    """A module that model.modules() does not see, with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.BatchNorm1d(8)]

    def forward(self, ids):
        x = self.features(ids)
        self.hidden[0](x)
        return self.head(x) * self.hidden[0].num_batches_tracked


@pytest.mark.parametrize(
    "make", [Counter, ClassCounter, InAList, InADict, InAnObject, InPlace, InATuple, InADefault, Hidden]
)
def test_what_a_module_keeps_is_the_same_in_every_pass(ids, make):
    model, plain = make(), make()
    if make is not ClassCounter and make is not InADefault:  # which share what they keep
        logits = plain(ids)
        assert torch.equal(SMART(model, BOTH)(ids)[0], logits)
        model = make()
    assert same(found(model, ids), expected(ids))
    assert SMART(model, BOTH)(ids)[0].shape == (6, 3)  # and the second batch is the second


def test_a_counter_counts_the_batches(ids):
    for make in (Counter, InPlace):
        model = make()
        smart = SMART(model, BOTH)
        for _ in range(3):
            smart(ids)
        assert model.calls == 3 if make is Counter else model.kept == 3


def test_a_hidden_state_is_carried_once_a_batch(ids):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.rnn, self.head = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)
            self.hidden = None

        def forward(self, ids):
            h, hidden = self.rnn(self.embedding(ids), self.hidden)
            self.hidden = hidden.detach()
            return self.head(h[:, -1])

    model, plain = Stateful(), Stateful()
    smart = SMART(model, BOTH)
    for _ in range(3):
        assert torch.equal(smart(ids)[0], plain(ids))
        assert torch.equal(model.hidden, plain.hidden)
        assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-13)


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(0), lambda g: float(torch.rand((), generator=g))),
    "NumPy": (lambda: np.random.default_rng(0), lambda g: g.random()),
    "NumPy's old": (lambda: np.random.RandomState(0), lambda g: g.rand()),
    "Python": (lambda: random.Random(0), lambda g: g.random()),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_ones_own_is_replayed(ids, kind, given):
    make, draw = GENERATORS[kind]

    class Draws(Plain):
        generator = None if given else make()

        def __init__(self):
            super().__init__()
            self.generator = make()

        def forward(self, ids, generator=None):
            return super().forward(ids) * draw(generator or self.generator)

    model, twin = Draws(), make()
    arguments = (ids, make()) if given else (ids,)
    assert same(found(model, *arguments), expected(ids, draw(twin)))
    assert draw(arguments[1] if given else model.generator) == draw(twin)  # it has moved once


# what comes between two steps: how the model is looked into is kept from the step before


class Twice(nn.Linear):
    """A head that counts its calls in a number, a list or a buffer, if it has one."""

    calls: object = None

    def forward(self, x):
        if "total" in dict(self.named_buffers()):
            self.total += 1
            return super().forward(x) * self.total
        if isinstance(self.calls, list):
            self.calls.append(1)
        elif self.calls is not None:
            self.calls = self.calls + 1
        return super().forward(x) * self.count()

    def count(self):
        return 1 if self.calls is None else len(self.calls) if isinstance(self.calls, list) else int(self.calls)


class WithHead(Plain):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(Twice(8, 3), Twice(3, 3))


def becomes_a_counter(model):
    model.head[1].calls = 0


def becomes_a_list(model):
    model.head[1].calls = [1]


def becomes_another_list(model):
    model.head[1].calls = [1, 1]


def becomes_a_buffer(model):
    model.head[1].register_buffer("total", torch.zeros(()))


def becomes_another_module(model):
    old, model.head[1] = model.head[1], Twice(3, 3)
    model.head[1].load_state_dict(old.state_dict())
    model.head[1].calls = []


def becomes_a_copy(model):
    """They share parameters, buffers and hooks."""
    model.head[1] = copy.copy(model.head[1])


def becomes_another_class(model):
    class Thrice(Twice):
        kept: list[int] = []  # noqa: RUF012

        def count(self):
            self.kept.append(1)
            return len(self.kept)

    model.head[1].__class__ = Thrice


def gets_a_hook(model):
    kept = []
    model.head[1].register_forward_hook(lambda module, args, output: kept.append(1) or output * len(kept))


def has_a_class_of_its_own(model):
    model.head[1].__class__ = type("Own", (Twice,), {})


def gets_another_forward(model):
    kept = []
    type(model.head[1]).forward = lambda self, x: kept.append(1) or nn.Linear.forward(self, x) * len(kept)


class Holder:
    kept = None


def holds_an_object(model):
    def counted(module, args, output):
        if held.kept is not None:
            held.kept.append(1)
        return output * len(held.kept or [1])

    model.head[1].held = held = Holder()
    model.head[1].register_forward_hook(counted)


def holds_a_list_in_it(model):
    model.head[1].held.kept = [1]


@dataclasses.dataclass
class Equal:
    """A hook that equals every other one, and counts its calls if it has a list."""

    scale: torch.Tensor
    kept: list[int] | None = dataclasses.field(default=None, compare=False)

    def __call__(self, module, args, output):
        if self.kept is not None:
            self.kept.append(1)
        return output * self.scale * len(self.kept or [1])


def has_a_hook(model):
    model.head[1].register_forward_hook(Equal(torch.ones(2)[:1]))


def gets_an_equal_hook(model):
    hooks = model.head[1]._forward_hooks
    hooks[next(reversed(hooks))] = Equal(torch.ones(2)[:1], [1, 1])


def has_a_hook_with_defaults(model):
    def counted(module, args, output, kept=None):
        if kept is not None:
            kept.append(1)
        return output * len(kept or [1])

    model.head[1].register_forward_hook(counted)


def gets_other_defaults(model):
    hooks = model.head[1]._forward_hooks
    hooks[next(reversed(hooks))].__defaults__ = ([1],)


def gets_another_dictionary(model):
    model.head[1].held.__dict__ = {"kept": [1]}


def gets_another_dictionary_itself(model):
    model.head[1].__dict__ = vars(model.head[1]) | {"calls": [1]}


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def holds_a_hidden_module(model):
    model.head[1].held = [nn.Sequential(nn.Identity())]  # model.modules() does not have it
    model.head[1].register_forward_hook(lambda module, args, output: module.held[0](output))


def holds_another_hidden_module(model):
    model.head[1].held[0][0] = Times()


def holds_a_stream(model):
    model.head[1].stream = np.random.default_rng(0)
    model.head[1].register_forward_hook(lambda module, args, output: output * module.stream.random())


def holds_a_tensor(model):
    model.head[1].total = torch.ones(())
    model.head[1].register_forward_hook(lambda module, args, output: output * module.total)


def is_written_into(model):
    model.head[1].total.mul_(3)


def stays(model):
    pass


CHANGES = {
    becomes_a_counter: None,
    becomes_a_list: None,
    becomes_another_list: becomes_a_list,
    becomes_a_buffer: None,
    becomes_another_module: None,
    becomes_a_copy: becomes_a_counter,
    becomes_another_class: None,
    gets_a_hook: None,
    gets_another_forward: has_a_class_of_its_own,
    holds_a_list_in_it: holds_an_object,
    gets_an_equal_hook: has_a_hook,
    gets_other_defaults: has_a_hook_with_defaults,
    gets_another_dictionary: holds_an_object,
    gets_another_dictionary_itself: None,
    holds_another_hidden_module: holds_a_hidden_module,
    is_written_into: holds_a_tensor,
    stays: holds_a_stream,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_on_a_module_between_two_steps(ids, change):
    """`change` comes before the third step, what it changes before the first."""
    model, plain = WithHead(), WithHead()
    for each in (model, plain):
        if CHANGES[change]:
            CHANGES[change](each)
    smart = SMART(model, BOTH)
    for step in range(4):
        if step == 2:
            change(model), change(plain)
        assert torch.equal(smart(ids)[0], plain(ids))
        assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-13)


def test_what_a_module_has_replaced_is_freed(ids):
    model = WithHead()
    model.head[1].register_forward_hook(lambda module, args, output: setattr(module, "last", output.detach()))
    smart = SMART(model, BOTH)
    for _ in range(3):
        smart(ids)
        last = weakref.ref(model.head[1].last)
    smart(ids)
    assert last() is None


def test_what_is_taken_off_a_module_is_freed(ids):
    model = WithHead()
    model.head[1].large = torch.zeros(2**19)
    smart = SMART(model, BOTH)
    for _ in range(3):
        smart(ids)
    large = weakref.ref(model.head[1].large)
    del model.head[1].large
    assert large() is None


@pytest.mark.parametrize("drawn", [0, 1])
def test_a_normal_number_that_numpy_has_drawn_before(ids, drawn):
    """It draws two at once, and keeps one beside the words of its generator."""

    class Noisy(Plain):
        def forward(self, ids):
            return super().forward(ids) * (2 + np.random.standard_normal())

    np.random.seed(3)
    for _ in range(drawn):
        np.random.standard_normal()
    smart = SMART(Noisy(), BOTH)
    for _ in range(3):
        smart(ids)
        assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-13)
    found = np.random.standard_normal()
    np.random.seed(3)
    assert found == [np.random.standard_normal() for _ in range(drawn + 4)][-1]


# what the forward is given


class Batch:
    def __init__(self, ids, x):
        self.ids, self.x = ids, x


def normalised(x):
    return x.sub_(5).div_(3)


def give_tensor(model, ids, x):
    return model.both(ids, normalised(x))


def give_dict(model, ids, batch):
    batch["x"] = normalised(batch["x"])
    batch["seen"] = True
    return model.both(ids, batch.pop("x"))


def give_list(model, ids, x):
    x.append(normalised(x.pop()))
    return model.both(ids, x[0])


def give_object(model, ids, batch):
    batch.x = normalised(batch.x)
    batch.done = True
    return model.both(ids, batch.x)


def give_array(model, ids, x):
    x -= 5
    x /= 3
    return model.both(ids, torch.from_numpy(x.copy()))


WAYS = {
    "a tensor": (give_tensor, lambda x: x),
    "a dict": (give_dict, lambda x: {"x": x}),
    "a list": (give_list, lambda x: [x]),
    "an object": (give_object, lambda x: Batch(None, x)),
    "an array": (give_array, lambda x: x.numpy()),
}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_input_that_is_written_into(ids, way, lean):
    forward, wrap = WAYS[way]

    class Tabular(Plain):
        def __init__(self, forward):
            super().__init__()
            self.way, self.columns = forward, nn.Linear(4, 8)

        def both(self, ids, x):
            return self.head(self.features(ids) + self.columns(x))

        def forward(self, ids, x):
            return self.way(self, ids, x)

    x = 5 + 3 * torch.randn(6, 4)
    pure = Tabular(lambda model, ids, x: model.both(ids, (x - 5) / 3))
    model = Tabular(forward)
    model.load_state_dict(pure.state_dict())
    wanted = found(pure, ids, x.clone())
    given, plain = wrap(x.clone()), wrap(x.clone())
    got = SMART(model, BOTH.replace(mu=0), lean=lean) if lean else None
    if got is None:
        assert same(found(model, ids, given), wanted)
    else:
        got(ids, given)[1].backward()
        for gradient, name in zip(wanted[1], ("embedding.weight", "head.weight"), strict=True):
            assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-9)
    forward(model, ids, plain)  # what the user holds afterwards is what plain training leaves
    seen = [
        value if isinstance(value, (dict, list)) else vars(value) if way == "an object" else [value]
        for value in (given, plain)
    ]
    for a, b in zip(*(value.values() if isinstance(value, dict) else value for value in seen), strict=True):
        assert a is b or np.array_equal(a, b)


def test_an_input_that_needs_a_gradient_gets_that_of_every_pass(ids):
    """A prompt that is learned outside of the model, and written into."""

    class Added(Plain):
        def forward(self, ids, prompt, inplace):
            prompt = prompt.mul_(2) if inplace else prompt * 2
            return self.head(self.features(ids) * prompt)

    gradients = []
    for inplace in (False, True):
        prompt = torch.linspace(0.5, 1, 8, requires_grad=True)
        _, penalty = SMART(Added(), BOTH.replace(mu=0))(ids, prompt * 1, inplace)
        penalty.backward()
        gradients.append(prompt.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("precision", ["float32", "model"])
def test_a_cache_of_keys_and_values(precision):
    """past_key_values: R_s and D_Breg as with a fresh copy of the prefix in each pass, and the user's own as plain."""
    config = transformers.Qwen2Config(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).train()
    ids = torch.randint(31, (3, 9))

    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model

        def forward(self, input_ids, past):
            return self.inside(input_ids=input_ids, past_key_values=copy.deepcopy(past), use_cache=True)

    def prefix():
        with torch.no_grad():
            return model(ids[:, :4], use_cache=True).past_key_values

    with SMART(Fresh(), BOTH, precision=precision) as smart:
        smart(ids[:, 4:], prefix())
        wanted = smart.metrics
    cache = prefix()
    with SMART(model, BOTH, precision=precision) as smart:
        smart(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
    assert smart.metrics == wanted
    assert wanted["R_s"] > 0
    assert cache.get_seq_length() == 9


# weights that a forward writes into, and state in odd places


class Momentum(Plain):
    """A frozen twin that follows the trained weights once a batch, and takes part in the output (MoCo, BYOL)."""

    def __init__(self, way):
        super().__init__()
        self.follower, self.way = copy.deepcopy(self.head).requires_grad_(False), way

    def forward(self, ids):
        for k, q in zip(self.follower.parameters(), self.head.parameters(), strict=True):
            if self.way == "in place":
                with torch.no_grad():
                    k.mul_(0.5).add_(q, alpha=0.5)
            elif self.way == "data":
                k.data = 0.5 * k.data + 0.5 * q.data
            else:
                k.data.mul_(0.5).add_(q.data, alpha=0.5)
        x = self.features(ids)
        return self.head(x) * (1 + self.follower(x.detach()).square())


class MomentumOnce(Momentum):
    """The same, moved by the test: what every pass should see."""

    def forward(self, ids):
        x = self.features(ids)
        return self.head(x) * (1 + self.follower(x.detach()).square())


@pytest.mark.parametrize("way", ["in place", "data", "past the version"])
def test_a_momentum_encoder_moves_once_a_batch(ids, way):
    model, once = Momentum(way), MomentumOnce("")
    smart, wanted = SMART(model, BOTH), SMART(once, BOTH)
    for _ in range(3):
        for k, q in zip(once.follower.parameters(), once.head.parameters(), strict=True):
            k.data.mul_(0.5).add_(q.data, alpha=0.5)
        smart(ids), wanted(ids)
        with torch.no_grad():  # a step of training: the follower was equal before it
            for one in (model, once):
                one.head.weight.mul_(1.5)
        assert smart.metrics["R_s"] == pytest.approx(wanted.metrics["R_s"], rel=1e-4)
        assert torch.equal(model.follower.weight, once.follower.weight)
    before = model.follower.weight.clone()
    smart.measure(ids)
    assert torch.equal(model.follower.weight, before)


class SharedBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.head.register_buffer("count", self.count)

    def forward(self, ids):
        self.count += 1
        return super().forward(ids) * self.head.count


class OnTorchsOwn(Plain):
    """A dropout rate that the forward moves, and a counter on a Linear."""

    def __init__(self):
        super().__init__()
        self.dropout, self.head.calls = nn.Dropout(0.0), 0

    def forward(self, ids):
        self.head.calls += 1
        self.dropout.p = self.head.calls - 1.0
        return super().forward(ids) * self.head.calls if self.dropout.p == 0 else super().forward(ids) * 9


class LastBatch(Plain):
    """Keeps what is the same for the same batch: it is not set up once and for all."""

    def __init__(self):
        super().__init__()
        self.last = 0

    def forward(self, ids):
        z = super().forward(ids) * (1 + self.last)
        self.last = ids.shape[1]
        return z


@pytest.mark.parametrize("make", [SharedBuffer, OnTorchsOwn, LastBatch])
def test_state_in_odd_places(ids, make):
    assert same(found(make(), ids), expected(ids))
    if make is SharedBuffer:
        assert same(found(make(), ids, steps=2), expected(ids, 2.0))


@pytest.mark.parametrize("through", ["data", "NumPy"])
def test_an_input_that_is_written_into_past_its_version(ids, through):
    class Through(Plain):
        def forward(self, ids, x):
            (x.data if through == "data" else x.numpy()).__imul__(2)
            return super().forward(ids) * x.mean()

    smart = SMART(Through(), BOTH)
    for _ in range(2):
        x = torch.ones(3)
        smart(ids, x)
        assert x.tolist() == [2.0, 2.0, 2.0]
        assert smart.metrics["R_s"] == expected(ids, 2.0)[0]


def test_a_forward_that_needs_a_graph(ids):
    """A hook on an activation, and a gradient taken in the forward."""

    class Needs(Plain):
        def forward(self, ids):
            x = self.features(ids)
            x.register_hook(lambda g: g)
            (force,) = torch.autograd.grad(self.head(x).square().sum(), x, create_graph=True)
            return self.head(x + force)

    class Derived(Plain):
        def forward(self, ids):
            x = self.features(ids)
            return self.head(x + 2 * self.head(x) @ self.head.weight)

    want, gradients = found(Derived().double(), ids)
    for steps in (1, 2):
        got, ours = found(Needs().double(), ids, steps=steps)
        assert got == pytest.approx(want, rel=1e-9)
        torch.testing.assert_close(ours, gradients)


class Overwrites(torch.autograd.Function):
    """As a fused kernel that stores its gradient where its input was."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().clone()
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        ctx.x.mul_(2 * gradient)
        return ctx.x.clone()


class Frees(Overwrites):
    @staticmethod
    def backward(ctx, gradient):
        x = ctx.__dict__.pop("x")
        return 2 * x * gradient


@pytest.mark.parametrize("function", [Overwrites, Frees])
def test_a_backward_that_runs_only_once_is_named(ids, function):
    class Fused(Plain):
        def forward(self, ids):
            return self.head(function.apply(self.features(ids)))

    with pytest.raises(RuntimeError, match=r"frees or overwrites what it needs.*start='gaussian'"):
        SMART(Fused(), SMARTConfig(mu=0))(ids)
    SMART(Fused(), papers(mu=0))(ids)


def test_a_backward_that_draws_leaves_the_random_stream_alone(ids):
    class Noisy(Plain):
        def forward(self, ids):
            x = self.features(ids)
            if x.requires_grad:
                x.register_hook(lambda g: g + 0 * torch.randn_like(g))
            return self.head(x)

    smart, stream = SMART(Noisy(), SMARTConfig(mu=0)), torch.get_rng_state()
    smart(ids)
    assert torch.equal(stream, torch.get_rng_state())


def test_what_is_below_the_site_is_checked_as_well(ids):
    """theta~'s pass runs it anew."""

    class Below(Plain):
        def __init__(self):
            super().__init__()
            self.passed = itertools.count()

        def forward(self, ids):
            return super().forward((ids + next(self.passed)) % 20)

    with pytest.raises(RuntimeError, match="does not repeat itself"):
        SMART(Below(), BOTH)(ids)
    SMART(Below(), papers(mu=0, start="margin", ascent_steps=0))(ids)  # R_s has the clean pass's x


def test_an_attribute_that_grows_too_large_is_named(ids):
    class Grows(Plain):
        def __init__(self):
            super().__init__()
            self.kept = []

        def forward(self, ids):
            self.kept += [ids.clone() for _ in range(1500)]
            return super().forward(ids)

    smart = SMART(Grows(), BOTH)
    smart(ids)
    smart(ids)
    with pytest.warns(SMARTWarning, match=r"Grows.kept"):
        smart(ids)


# what is left when the user looks


def reads_attribute(model):
    return model.aux


def reads_hook(model):
    return model.features_seen["h"]


@pytest.mark.parametrize("read", [reads_attribute, reads_hook])
@pytest.mark.parametrize(
    ("settings", "lean"), [({}, False), ({"lambda_s": 0}, False), ({}, True), ({"smoothness_steps": 2}, False)]
)
def test_a_side_result_is_the_clean_passs(ids, read, settings, lean):
    """A balance loss in an attribute, and features that a hook kept, with the gradient of the clean pass alone."""

    class Balanced(Plain):
        def forward(self, ids):
            x = self.features(ids)
            self.aux = x.softmax(-1).mean(0).square().sum()
            return self.head(x)

    def hooked():
        model = Balanced()
        seen = {}
        object.__setattr__(model, "features_seen", seen)
        model.head.register_forward_hook(lambda _module, args, _output: seen.update(h=args[0].square().sum()))
        return model

    plain, model = hooked(), hooked()
    smart = SMART(model, BOTH.replace(**settings), lean=lean)
    for _ in range(3):
        plain(ids)
        _, penalty = smart(ids)
        assert torch.equal(read(model), read(plain))
        gradients = [torch.autograd.grad(read(m), m.embedding.weight, retain_graph=True)[0] for m in (model, plain)]
        assert torch.equal(*gradients)
        if penalty.requires_grad:
            penalty.backward()
        assert torch.equal(read(model), read(plain))
        smart.update()


def test_what_a_hook_keeps_elsewhere(ids):
    """By a global name, in the object that it is a method of, in a partial."""

    class Extractor:
        def __init__(self):
            self.features = []

        def hook(self, module, args, output):
            self.features.append(output)

    def by_partial(kept, module, args, output):
        kept.append(output)

    model, extractor, kept, defaults = Plain(), Extractor(), [], []
    GLOBAL.clear()
    model.head.register_forward_hook(lambda module, args, output: GLOBAL.append(output))
    model.head.register_forward_hook(extractor.hook)
    model.head.register_forward_hook(functools.partial(by_partial, kept))
    model.head.register_forward_hook(lambda _module, _args, output, *, kept=defaults: kept.append(output))
    logits, _ = SMART(model, BOTH)(ids)
    for found in (GLOBAL, extractor.features, kept, defaults):
        assert len(found) == 1
        assert found[0] is logits


# what cannot be repeated


class Unseen(Plain):
    """Another output in every call, by something that SMART cannot see."""

    def __init__(self):
        super().__init__()
        self.passed = itertools.count(1)
        self.odd = nn.Identity()
        self.odd.register_forward_hook(lambda _module, _args, output: output * next(self.passed))

    def forward(self, ids):
        return self.head(self.odd(self.features(ids)))


@pytest.mark.parametrize("config", [BOTH, papers(mu=0), papers(lambda_s=0, total_steps=9)])
def test_a_model_that_does_not_repeat_itself_is_named(ids, config):
    model = Unseen()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"does not repeat itself.*output 0 differs by.*odd \(Identity\)"):
        SMART(model, config)(ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_check_is_paid_once(ids):
    model, passed = Plain(), itertools.count()
    model.register_forward_hook(lambda *_: (next(passed), None)[1])
    smart = SMART(model, BOTH)
    counts = []
    for _ in range(3):
        before = next(passed)
        smart(ids)
        counts.append(next(passed) - before - 1)
    assert counts == [4, 3, 3]


def test_rounding_and_masked_positions_are_no_difference(ids):
    class Rounds(Plain):
        def __init__(self, size):
            super().__init__()
            self.sizes = itertools.chain([0.0], itertools.repeat(size))

        def forward(self, ids):
            z = super().forward(ids)
            return z * (1 + next(self.sizes))

    SMART(Rounds(1e-6), BOTH)(ids)
    with pytest.raises(RuntimeError, match="does not repeat itself"):
        SMART(Rounds(1e-3), BOTH)(ids)

    class Tagger(Plain):
        def __init__(self):
            super().__init__()
            self.passed = itertools.count()

        def forward(self, ids, attention_mask):
            z = self.head(self.embedding(ids))
            return torch.where(attention_mask[..., None] == 1, z, float(next(self.passed)))

    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    SMART(Tagger(), BOTH)(ids, mask)


def test_a_value_that_is_too_large_to_copy_every_step_is_noticed_when_it_changes(ids):
    class Bank(Plain):
        def __init__(self):
            super().__init__()
            self.bank, self.passed = torch.zeros(2**19), 0

        def forward(self, ids):
            self.passed += 1
            if self.passed > 1:
                self.bank[0] += 1
            return super().forward(ids) + self.bank[0]

    smart = SMART(Bank(), BOTH)
    smart(ids)
    with pytest.warns(SMARTWarning, match=r"wrote into Bank.bank for the first time"):
        smart(ids)
    smart(ids)
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-13)


# layers with a backward of their own


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.x = layer, x.detach()
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.layer(x), gradient)
        gradient, x.grad = x.grad, None
        return gradient, None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return Reversible.apply(x, self.layer)


@pytest.mark.parametrize("config", [SMARTConfig(mu=0), papers(mu=0), SMARTConfig(mu=0, ascent_steps=2)])
def test_no_gradient_is_touched_by_a_layer_that_fills_grad_itself(ids, config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), Block(), nn.Flatten(), nn.Linear(40, 3))
    y = torch.randint(3, (6,))
    nn.functional.cross_entropy(model(ids), y).backward()
    task = [parameter.grad.clone() for parameter in model.parameters()]
    kept = [parameter.grad for parameter in model.parameters()]
    smart = SMART(model, config)
    logits, _ = smart(ids)
    assert all(parameter.grad is own for parameter, own in zip(model.parameters(), kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, task, strict=True))
    model.zero_grad()
    nn.functional.cross_entropy(logits, y).backward()
    assert all(torch.equal(parameter.grad, own) for parameter, own in zip(model.parameters(), task, strict=True))


def test_hooks_that_would_see_a_gradient_of_the_ascent_are_named(ids):
    model = nn.Sequential(nn.Embedding(20, 8), Block(), nn.Flatten(), nn.Linear(40, 3))
    model[1].layer[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(RuntimeError, match=r"fills the .grad of its weights.*Take the hooks off"):
        SMART(model, SMARTConfig(mu=0))(ids)
    assert all(parameter.grad is None for parameter in model.parameters())


# weights that a forward writes into


@pytest.mark.parametrize("kind", ["max_norm", "clamped"])
def test_theta_tilde_is_not_written_into(ids, kind):
    """D_Breg is of f(x; theta~), which normalises a copy of theta~ as f does; theta~ itself stays the average."""

    class Clamped(Plain):
        def forward(self, ids):
            self.head.weight.data.clamp_(-0.2, 0.2)
            return super().forward(ids)

    model = Plain() if kind == "max_norm" else Clamped()
    if kind == "max_norm":
        model.embedding = nn.Embedding(20, 8, max_norm=1.0)
    smart = SMART(model, BOTH)
    with torch.no_grad():
        for average in smart.teacher.values():
            average.mul_(3)
    before = {name: average.clone() for name, average in smart.teacher.items()}
    twin = copy.deepcopy(model)
    smart(ids)
    smart(ids)
    with smart.swap_teacher():
        model.eval()(ids)
    assert all(torch.equal(average, before[name]) for name, average in smart.teacher.items())
    twin.load_state_dict(before)
    p, q = model(ids).detach().double().log_softmax(-1), twin(ids).detach().double().log_softmax(-1)
    by_hand = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    assert smart.metrics["D_Breg"] == pytest.approx(by_hand.item(), rel=1e-4)


def test_lean_runs_its_last_pass_in_the_mode_of_the_clean_one():
    gradients = []
    for switch in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        smart = SMART(model, SMARTConfig(mu=0, epsilon=0.5), lean=True)
        for _ in range(2):  # the first step puts back all attributes, and with them the mode
            model.zero_grad()
            penalty = smart(torch.randn(6, 4))[1]
            if switch and smart.step:
                model.eval()
            penalty.backward()
            smart.update()
        assert model[1].training is not switch
        gradients.append(model[0].weight.grad)
    assert torch.equal(*gradients)
