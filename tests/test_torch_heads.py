"""What is compared: the axis of the classes, l_s, masks and positions, and how SMART says what it chose."""

import copy

import pytest
import torch
from torch import nn

from smartreg_torch import SMART, SMARTConfig, SMARTWarning
from smartreg_torch.outputs import Evidence, find_heads

R_S = SMARTConfig(mu=0, epsilon=0.1)
D_BREG = SMARTConfig(lambda_s=0, beta_early=0.9, beta_late=0.9)


@pytest.fixture
def ids():
    return torch.randint(1, 20, (4, 6))


class Tagger(nn.Module):
    """Token logits, as `convert` arranges them."""

    def __init__(self, convert=lambda z: z, classes=3, embedding=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = embedding or nn.Embedding(20, 8)
        self.head, self.convert = nn.Linear(8, classes), convert

    def forward(self, ids, attention_mask=None):
        return self.convert(self.head(self.embedding(ids).tanh()))


def r_s(model, *inputs, **settings):
    with SMART(model, R_S, **settings) as smart:
        smart(*inputs)
    return smart.metrics["R_s"]


def d_breg(model, *args, settings=None, **kwargs):
    """D_Breg with theta~ = 0.7 theta."""
    with SMART(model, D_BREG, **settings or {}) as smart:
        for average in smart.teacher.values():
            average.mul_(0.7)
        smart(*args, **kwargs)
    return smart.metrics["D_Breg"]


def by_hand(model, l_s, *args, **kwargs):
    """l_s at every position of the model's own outputs, (n, tokens), in float64."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.7)
        a, b = (m(*args, **kwargs).double() for m in (model, twin))
    if l_s == "bernoulli_symmetric_kl":
        return (a.sigmoid() - b.sigmoid()) * (a - b)
    if l_s == "squared_error":
        return (a - b) ** 2
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


# the axis of the classes


def test_a_tagger_with_classes_on_axis_1(ids):
    assert r_s(Tagger(lambda z: z.transpose(1, 2)), ids) == pytest.approx(r_s(Tagger(), ids), rel=1e-6)


@pytest.mark.parametrize("width", [48, 32])
def test_segmentation_by_the_shape_of_the_image(width):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    x = torch.randn(2, 3, 32, width)
    wanted = r_s(net, x, outputs=lambda z: z.movedim(1, -1))
    assert r_s(net, x) == pytest.approx(wanted, rel=1e-6)
    with SMART(net, R_S) as smart:
        smart(x)
        assert smart.describe()["class axis"] == ("1", "the shape of x")


def test_what_no_shape_says_is_asked_for(ids):
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1))
    x = torch.randn(2, 3, 32, 48)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 16, 24\).*Say class_axis=-1 or class_axis=1"):
        r_s(net, x)
    assert r_s(net, x, class_axis=1) == r_s(net, x, outputs=lambda z: z.movedim(1, -1), class_axis=-1)
    with pytest.raises(ValueError, match=r"Say class_axis"):
        r_s(Tagger(lambda z: z.mean(1).reshape(-1, 2, 3), classes=6), ids)  # two heads of three classes each
    assert r_s(Tagger(lambda z: z.mean(1).reshape(-1, 2, 3), classes=6), ids, class_axis=-1) > 0


def test_as_many_classes_as_channels_are_asked_for():
    net = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="Say class_axis"):
        r_s(net, torch.randn(2, 3, 8, 8))


def test_what_was_clear_stays_where_a_batch_fits_both_readings(ids):
    """Six tokens, then as many tokens as classes."""
    smart = SMART(Tagger(lambda z: z.transpose(1, 2)), R_S)
    smart(ids)
    smart(ids[:, :3])
    assert smart.metrics["R_s"] == pytest.approx(r_s(Tagger(), ids[:, :3], class_axis=-1), rel=1e-6)
    with pytest.raises(ValueError, match="Say class_axis"):
        r_s(Tagger(lambda z: z.transpose(1, 2)), ids[:, :3])


@pytest.mark.parametrize(("axis", "error"), [(2, ValueError), (-3, ValueError), (True, TypeError), ("last", TypeError)])
def test_a_bad_class_axis_is_named(axis, error):
    with pytest.raises(error, match="class_axis"):
        r_s(nn.Linear(4, 3), torch.randn(5, 4), class_axis=axis)


@pytest.mark.parametrize(
    ("shape", "config", "labels", "axis"),
    [
        ((4, 5, 16, 16), {"num_labels": 5}, None, 1),
        ((4, 16, 16, 5), {"num_labels": 5}, None, -1),
        ((4, 9, 31), {"vocab_size": 31}, None, -1),
        ((4, 2, 9, 31), {"vocab_size": 31}, None, -1),
        ((4, 5, 16, 16), {}, (4, 16, 16), 1),
        ((4, 16, 16, 5), {}, (4, 16, 16), -1),
        ((4, 5, 9), {"model_type": "bert"}, None, -1),
    ],
)
def test_the_config_or_the_labels_say_where_the_classes_are(shape, config, labels, axis):
    settings = type("Config", (), config)() if config else None
    labels = None if labels is None else torch.zeros(labels, dtype=torch.long)
    head = find_heads({"logits": torch.zeros(shape)}, Evidence(settings, labels, [], [], False))[0]
    assert head.axis == axis
    assert head.arranged(torch.zeros(shape)).shape[-1] == shape[axis]


# one output a position


@pytest.mark.parametrize("l_s", ["bernoulli_symmetric_kl", "squared_error"])
@pytest.mark.parametrize("squeezed", [True, False])
def test_one_output_a_token_is_averaged_over_the_real_tokens(ids, l_s, squeezed):
    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    flat = Tagger(lambda z: z.squeeze(-1), classes=1)
    model = flat if squeezed else Tagger(classes=1)
    wanted = ((by_hand(flat, l_s, ids, mask) * mask).sum(1) / mask.sum(1)).mean()
    assert d_breg(model, ids, mask, settings={"divergence": l_s}) == pytest.approx(wanted.item(), rel=1e-5)


def test_labels_of_the_outputs_shape_say_that_each_is_a_label_of_its_own(ids):
    class Detector(Tagger):
        def forward(self, ids, attention_mask=None, labels=None):
            return super().forward(ids)

    model = Detector(lambda z: z.squeeze(-1), classes=1)
    wanted = by_hand(model, "bernoulli_symmetric_kl", ids).mean()
    got = d_breg(model, ids, attention_mask=torch.ones_like(ids), labels=ids % 2)
    assert got == pytest.approx(wanted.item(), rel=1e-5)


def test_a_depth_map_has_values():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, pixel_values):
            return {"predicted_depth": self.conv(pixel_values)[:, 0]}

    model, x = Depth(), torch.randn(2, 3, 8, 8)
    with SMART(model, R_S) as smart:
        smart(x)
        assert smart.describe()["l_s"].value == "squared_error"
    assert smart.metrics["R_s"] == pytest.approx(r_s(model, x, divergence="squared_error", outputs="predicted_depth"))


# l_s


@pytest.mark.parametrize(
    ("end", "settings", "mend"),
    [
        (nn.Softmax(-1), {}, "outputs=torch.log"),
        (nn.Sigmoid(), {"divergence": "bernoulli_symmetric_kl"}, "outputs=torch.logit"),
        (nn.Sigmoid(), {}, "outputs=torch.logit"),
    ],
)
def test_probabilities_are_not_taken_for_logits(end, settings, mend):
    net = nn.Sequential(nn.Linear(4, 3), end)
    x = torch.randn(16, 4)
    with pytest.raises(ValueError, match=f"are probabilities.*{mend}"):
        r_s(net, x, **settings)
    function = torch.log if isinstance(end, nn.Softmax) else torch.logit
    if settings or isinstance(end, nn.Softmax):
        assert r_s(net, x, outputs=function, **settings) == pytest.approx(r_s(net[:1], x, **settings), rel=1e-3)


class Opaque(torch.autograd.Function):
    """A sigmoid of which the graph says nothing, as in a compiled model."""

    @staticmethod
    def forward(ctx, z):
        return z.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_what_makes_logits_decides_not_their_values():
    """Logits may all be between 0 and 1: at a head that starts at 0, or if the bias is most of them."""
    x, head = torch.randn(40, 4), nn.Linear(4, 2)
    nn.init.zeros_(head.weight)
    for bias in ([0.0, 0.0], [0.6, 0.4], [0.5, 0.1]):  # the second's rows sum to 1, all alike
        with torch.no_grad():
            head.bias.copy_(torch.tensor(bias))
        with pytest.warns(SMARTWarning, match="head that starts at 0"):
            assert r_s(nn.Sequential(nn.Linear(4, 4), head), x) == 0
    nn.init.normal_(head.weight, std=1e-3)
    assert r_s(nn.Sequential(nn.Linear(4, 4), head), x) > 0
    for make in (lambda z: z.sigmoid().unsqueeze(0)[0], lambda z: z.softmax(-1).double()):  # few, and of another type
        with pytest.raises(ValueError, match="are probabilities"):
            r_s(head, x[:2], outputs=make, class_axis=-1)
    with pytest.warns(SMARTWarning, match=r"all 80 outputs .* between 0 and 1"):
        r_s(head, x, outputs=Opaque.apply)


LOSSES = {
    "cross entropy": lambda z, k: nn.functional.cross_entropy(z, k),
    "weighed and smoothed": lambda z, k: nn.functional.cross_entropy(z, k, torch.rand(3), label_smoothing=0.1),
    "focal": lambda z, k: (nn.functional.cross_entropy(z, k, reduction="none") * (1 - z.softmax(-1)[:, 0])).mean(),
    "margin": lambda z, k: nn.functional.multi_margin_loss(z, k),
    "soft labels": lambda z, k: nn.functional.cross_entropy(z, torch.rand(16, 3).softmax(-1)),
    "a sum": lambda z, k: z.sum(),
    "squares": lambda z, k: z.square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_classes_says_nothing(loss):
    net = nn.Sequential(nn.Linear(4, 3))
    z, penalty = SMART(net, R_S.replace(lambda_s=10))(torch.randn(16, 4))
    (LOSSES[loss](z, torch.randint(3, (16,))) + penalty).backward()


OTHERS = {
    "regression": lambda z, y: nn.functional.mse_loss(z, y),
    "several labels": lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, (y > 0).float()),
    "absolute error": lambda z, y: (z - y).abs().mean(),
}


@pytest.mark.parametrize("loss", OTHERS)
def test_a_loss_of_no_classes_warns_once_in_the_first_backward(loss):
    net = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    smart = SMART(net, R_S)
    z, penalty = smart(x)
    with pytest.warns(SMARTWarning, match=r"does not sum to 0 over axis -1.*divergence='bernoulli_symmetric_kl'"):
        (OTHERS[loss](z, y) + penalty).backward()
    z, penalty = smart(x)
    (OTHERS[loss](z, y) + penalty).backward()
    z, penalty = SMART(net, R_S, divergence="squared_error")(x)
    (OTHERS[loss](z, y) + penalty).backward()


def test_a_model_that_returns_its_loss_is_told_what_to_return():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(4, 3)

        def forward(self, x):
            return self.inside(x).mean()

    with pytest.raises(TypeError, match=r"one number, most likely its loss.*\(loss, logits\), and say outputs=1"):
        r_s(Loss(), torch.randn(5, 4))


def test_a_model_without_logits_while_training_is_named():
    net = Tagger(lambda z: {"loss": z.mean(), "logits": None})
    with pytest.raises(ValueError, match=r"logits=None: a fused loss.*use_liger_kernel=False"):
        r_s(net, torch.ones(2, 3, dtype=torch.long))


# masks


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.criterion, self.model = nn.CrossEntropyLoss(), model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Batched(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch)


class Padded(Tagger):
    """PyTorch's own convention: true at padding."""

    def forward(self, ids, src_key_padding_mask=None, padding_mask=None):
        return super().forward(ids)


@pytest.mark.parametrize("config", ["R_s", "D_Breg"])
def test_a_mask_is_found_however_it_is_given(ids, config):
    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    of = (lambda model, *a, **k: d_breg(model, *a, **k)) if config == "D_Breg" else _r_s_of
    wanted = of(Tagger(), ids, attention_mask=mask)
    assert wanted != of(Tagger(), ids)
    additive = (1.0 - mask) * -1e4
    plain = Tagger()
    for model, args, kwargs in (
        (Wrapper(Tagger()), (ids, mask), {}),
        (Wrapper(Wrapper(Tagger())), (ids,), {"attention_mask": mask}),
        (Tagger(), (ids, mask.bool()), {}),
        (Tagger(), (ids, mask.float()), {}),
        (Tagger(), (ids, additive), {}),
        (Tagger(), (ids, additive[:, None, None]), {}),
        (Padded(), (ids, mask == 0), {}),
        (Batched(plain), ({"ids": ids, "attention_mask": mask},), {}),
        (Tagger(embedding=ByKeyword()), (ids * mask,), {}) if config == "R_s" else (Tagger(), (ids, mask), {}),
    ):
        got = of(model, *args, **kwargs)
        if isinstance(model, Tagger) and isinstance(model.embedding, ByKeyword):
            assert got == of(Tagger(embedding=ByPosition()), ids * mask)
        else:
            assert got == pytest.approx(wanted, rel=1e-6), (type(model), args[1:])


def _r_s_of(model, *args, **kwargs):
    with SMART(model, R_S) as smart:
        smart(*args, **kwargs)
    return smart.metrics["R_s"]


class ByPosition(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8, padding_idx=0)

    def forward(self, ids):
        return self.table(ids)


class ByKeyword(ByPosition):
    def forward(self, ids):
        return self.table(input=ids)


def test_a_waveform_has_a_mask_of_its_samples():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, input_values, attention_mask):
            return self.head(input_values * attention_mask)

    model, x, mask = Waves(), torch.randn(4, 6), torch.ones(4, 6, dtype=torch.long)
    mask[1:, 3:] = 0
    seen = []
    with SMART(model, R_S, on_step=seen.append) as smart:
        smart(x, mask)
    (delta,) = seen[0].delta
    assert (delta != 0).equal(mask == 1)
    radius = 0.1 * ((x * mask).square().sum(1) / mask.sum(1)).sqrt()
    assert torch.allclose(delta.abs().amax(1), radius)


def test_a_mask_that_is_true_at_padding_is_noticed(ids):
    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    with pytest.raises(ValueError, match=r"attention_mask leaves a row without a real token.*true at padding"):
        d_breg(Tagger(), ids, attention_mask=mask == 0)
    assert d_breg(
        Tagger(), ids, attention_mask=mask == 0, settings={"mask": lambda ids, attention_mask: ~attention_mask}
    ) == pytest.approx(d_breg(Tagger(), ids, attention_mask=mask), rel=1e-6)
    with pytest.raises(ValueError, match=r"given 'padding_mask'.*Is it true at padding.*mask='padding_mask'"):
        _r_s_of(Padded(), ids, padding_mask=mask)


def test_a_mask_after_which_nothing_is_perturbed_warns(ids):
    class Reads(Tagger):
        def forward(self, ids, attention_mask):
            keep = (attention_mask == 0)[..., None]
            return (super().forward(ids) * keep).sum(1) / keep.sum(1)

    mask = torch.zeros_like(ids)
    mask[:, 3:] = 1  # true at padding, and every row is padded
    with pytest.warns(SMARTWarning, match=r"nothing is perturbed.*true at padding"):
        _r_s_of(Reads(), ids, mask)


def test_two_texts_with_a_mask_each_are_asked_about(ids):
    class Pair(Tagger):
        def forward(self, ids, attention_mask, ids2, attention_mask2):
            return super().forward(ids).mean(1) - super().forward(ids2).mean(1)

    one, two = torch.ones_like(ids), torch.ones_like(ids)
    two[1:, 3:] = 0
    with pytest.raises(ValueError, match=r"ran 2 times, and attention_mask and attention_mask2.*Give mask="):
        _r_s_of(Pair(), ids, one, ids, two)
    for mask in ("valid", "attn_mask", "token_padding"):
        given = type("Given", (Tagger,), {})
        exec(f"def forward(self, ids, {mask}): return Tagger.forward(self, ids)", {"Tagger": Tagger}, found := {})
        given.forward = found["forward"]
        with pytest.raises(ValueError, match=f"given '{mask}'.*Is it true at padding"):
            _r_s_of(given(), ids, two)


def test_the_penaltys_own_backward_does_not_use_the_check_up():
    net, x, y = nn.Linear(4, 3), torch.randn(16, 4), (torch.randn(16, 3) > 0).float()
    z, penalty = SMART(net, R_S)(x)
    penalty.backward(retain_graph=True)
    with pytest.warns(SMARTWarning, match="does not sum to 0"):
        nn.functional.binary_cross_entropy_with_logits(z, y).backward()


def test_a_mask_that_does_not_fit_is_asked_for(ids):
    """Image tokens in front: the outputs have more positions than the mask."""
    in_front = Tagger(lambda z: torch.cat([z[:, :2], z], 1))
    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    with pytest.raises(
        ValueError, match=r"attention_mask has the shape \(4, 6\), and the outputs' positions are \(4, 8\)"
    ):
        d_breg(in_front, ids, mask, settings={"class_axis": -1})
    real = nn.functional.pad(mask, (2, 0)) == 1
    got = d_breg(in_front, ids, mask, settings={"class_axis": -1}, label_mask=real)
    assert got == pytest.approx(d_breg(Tagger(), ids, mask), rel=1e-6)
    with pytest.raises(ValueError, match=r"label_mask has the shape \(4, 5\)"):
        d_breg(Tagger(), ids, mask, label_mask=mask[:, :5])


# several sites, and sites that are odd


def test_two_embeddings_at_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.tags, self.head = nn.Embedding(20, 8), nn.Embedding(5, 8), nn.Linear(16, 3)

        def forward(self, words, tags):
            return self.head(torch.cat([self.words(words), self.tags(tags)], -1).tanh().mean(1))

    model, words, tags = Two(), torch.randint(20, (4, 6)), torch.randint(5, (4, 6))
    with pytest.raises(ValueError, match=r"several embeddings.*site=\['words', 'tags'\]"):
        SMART(model, R_S)
    alone = [r_s(model, words, tags, site=site) for site in ("words", "tags")]
    with SMART(model, R_S, site=["words", "tags"]) as smart:
        smart(words, tags)
        assert smart.metrics["R_s"] > max(alone)
        assert smart.describe()["x"].value == "(4, 6, 8), (4, 6, 8)"
    assert not model.words._forward_hooks
    assert not model.tags._forward_hooks
    with pytest.raises(ValueError, match="no submodule 'tag'"):
        SMART(model, R_S, site=["words", "tag"])
    with pytest.raises(TypeError, match="site must be a dotted name"):
        SMART(model, R_S, site=[model.words])


def test_the_names_of_outer_modules_do_not_hide_an_embedding(ids):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.segmenter = Tagger()

        def forward(self, ids):
            return self.segmenter(ids)

    with SMART(Outer(), R_S) as smart:
        assert smart.describe()["site"].value == "segmenter.embedding"


def test_a_position_table_is_no_site():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.pos_emb, self.head = nn.Linear(12, 8), nn.Embedding(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head((self.patches(x) + self.pos_emb(torch.arange(4))).tanh().mean(1))

    with SMART(Patches(), R_S) as smart:
        smart(torch.randn(4, 4, 12))
        assert smart.describe()["site"].value == "input"


def test_nested_tensors_are_named():
    table = nn.Embedding(20, 8)
    jagged = torch.nested.nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([4])], layout=torch.jagged)

    class Jagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = table

        def forward(self, ids):
            return torch.nested.to_padded_tensor(self.embedding(ids), 0.0).mean(1)

    with pytest.raises(TypeError, match=r"nested \(jagged\) tensor.*to_padded_tensor"):
        SMART(Jagged(), R_S)(jagged)


def test_data_parallel_is_refused_by_name():
    with pytest.raises(ValueError, match=r"nn.DataParallel.*DistributedDataParallel"):
        SMART(nn.DataParallel(Tagger()), R_S)


# what SMART says of itself


def test_describe_says_what_was_chosen_and_why(ids):
    model = Tagger()
    smart = SMART(model, SMARTConfig(beta_early=0.9, beta_late=0.9))
    assert smart.describe()["x"].value == "not known yet"
    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    smart(ids, mask)
    assert list(smart.describe()) == ["site", "x", "outputs", "l_s", "class axis", "mask", "positions", "precision"]
    found = {name: choice.value for name, choice in smart.describe().items()}
    assert found == {
        "site": "embedding",
        "x": "(4, 6, 8)",
        "outputs": "the model's output",
        "l_s": "symmetric_kl",
        "class axis": "-1",
        "mask": "attention_mask",
        "positions": "those of attention_mask",
        "precision": "float32",
    }
    assert repr(smart).startswith("SMART(site='embedding', x='(4, 6, 8)'")
    assert "| class axis | `-1` | the mask's shape |" in smart.describe().markdown()


def test_measure_is_R_s_in_eval_mode_and_changes_nothing(ids):
    class Dropped(Tagger):
        def __init__(self):
            super().__init__(lambda z: z.mean(1))
            self.dropout, self.norm, self.calls = nn.Dropout(0.5), nn.BatchNorm1d(6), 0

        def forward(self, ids):
            self.calls += 1
            x = self.norm(self.dropout(self.embedding(ids)))
            return self.head(x).mean(1)

    model = Dropped().double()
    config = SMARTConfig(start="gaussian", epsilon=0.1, sigma=0.1, beta_early=0.9, beta_late=0.9)
    smart = SMART(model, config)
    for average in smart.teacher.values():
        average.mul_(0.9)
    model.train()
    (smart(ids)[0].square().mean()).backward()
    before = [value.clone() for value in model.state_dict().values()]
    gradients, stream, noise = [p.grad.clone() for p in model.parameters()], torch.get_rng_state(), smart.state_dict()
    with torch.no_grad():
        first, second = smart.measure(ids), smart.measure(ids)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(noise["generator"], smart.state_dict()["generator"])
    assert model.calls == 1
    assert all(module.training for module in model.modules())

    model.eval()
    with torch.no_grad():
        clean = model(ids)
        with smart.swap_teacher():
            taught = model(ids)
    p, q = clean.log_softmax(-1), taught.log_softmax(-1)
    assert first["D_Breg"] == pytest.approx(((p.exp() - q.exp()) * (p - q)).sum(-1).mean().item(), rel=1e-9)
    assert first["R_s"] > 0
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        smart.measure(ids)
    smart.remove()
    with pytest.raises(RuntimeError, match=r"measure\(\) after remove"):
        smart.measure(ids)


def test_measure_by_hand():
    """A linear model and the margin start: delta = epsilon rms(x) sign(w_runner-up - w_top)."""
    model = nn.Linear(4, 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    smart = SMART(model, SMARTConfig(mu=0, epsilon=0.1))
    model.eval()
    z = model(x).detach()
    top = z.argmax(1)
    away = (model.weight[1 - top] - model.weight[top]).detach().sign()
    moved = model(x + 0.1 * x.square().mean(1, keepdim=True).sqrt() * away).detach()
    p, q = moved.log_softmax(-1), z.log_softmax(-1)
    assert smart.measure(x)["R_s"] == pytest.approx(((p.exp() - q.exp()) * (p - q)).sum(-1).mean().item(), rel=1e-9)
