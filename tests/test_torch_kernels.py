"""The kernel of symmetric_kl in Triton's interpreter: `tox run -e kernels`. On a GPU it is in test_torch_cuda.py."""

import os

import numpy as np
import pytest
import torch
from torch.autograd import grad

from smartreg import divergences as reference
from smartreg_torch import SMARTWarning, divergences
from smartreg_torch.divergences import symmetric_kl

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tox run -e kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
KERNELS = divergences._kernels


@pytest.fixture(scope="module", autouse=True)
def kernels():
    from smartreg_torch import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergences, "_kernels", lambda: kernels)
        patch.setattr(divergences, "_has_kernel", lambda a, b, mask: True)
        yield kernels


def logits(distance, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    b = 3 * torch.randn(shape, generator=generator)
    a = b + distance * torch.randn(shape, generator=generator)
    return a.to(dtype), b.to(dtype)


def assert_as_the_reference(a, b, mask=None, value_bound=1e-5, bound=1e-5):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = symmetric_kl(a, b, mask)
    exact = [z.detach().double().numpy() for z in (a, b)]
    kept = None if mask is None else mask.numpy()
    np.testing.assert_allclose(value.detach().numpy(), reference.symmetric_kl(*exact, kept), rtol=value_bound)
    gradients = grad(value.sum(), (a, b), retain_graph=True)
    for got, want in zip(gradients, reference.symmetric_kl_grad(*exact, kept), strict=True):
        error = np.abs(got.double().numpy() - want).max(-1)
        assert np.all(error <= bound * np.abs(want).max(-1) + 1e-37)
    return value, gradients


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("distance", [1e-6, 1e-3, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("classes", [3, 2500])  # the last in two blocks
def test_values_and_gradients(classes, distance, masked):
    a, b = logits(distance, (2, 3, classes))
    mask = torch.tensor([[1, 0, 1], [0, 2, 1]]) if masked else None
    if masked:
        a[0, 1] = torch.nan  # where the mask is 0
    assert_as_the_reference(a, b, mask)


def test_what_does_not_count_is_left_at_0(kernels):
    a, b = logits(1.0, (2, 2, 5))
    mask = torch.tensor([[1, 0], [0, 1]])
    for found in kernels.symmetric_kl(a, b, mask, (True, True)):
        assert torch.equal((found.reshape(4, -1) != 0).any(-1), mask.flatten() != 0)


@pytest.mark.parametrize("shape", [(3, 1), (1, 4), (2, 2, 3, 5), (0, 4)])
def test_shapes(shape):
    assert_as_the_reference(*logits(0.5, shape))


def test_logits_of_any_strides_are_read_where_they_are():
    a, b = logits(0.5, (2, 5, 6))
    value, _ = assert_as_the_reference(a[:, :-1], b[:, :-1])
    torch.testing.assert_close(value, symmetric_kl(a[:, :-1].contiguous(), b[:, :-1].contiguous()), rtol=0, atol=0)
    assert_as_the_reference(a.transpose(1, 2), b.transpose(1, 2))
    assert_as_the_reference(a[..., ::2], b.flip(-1)[..., ::2])


def test_half_precision_is_computed_in_float32():
    a, b = logits(0.5, (3, 7), torch.bfloat16)
    value, gradients = assert_as_the_reference(a, b, bound=2**-8)
    assert value.dtype == torch.float32
    assert gradients[0].dtype == torch.bfloat16


def test_gradients_that_nobody_asked_for():
    a, b = logits(0.5, (3, 7))
    both = assert_as_the_reference(a, b)[1]
    for k in (0, 1):
        pair = [z.clone().requires_grad_(at == k) for at, z in enumerate((a, b))]
        (alone,) = grad(symmetric_kl(*pair).sum(), pair[k])
        assert torch.equal(alone, both[k])


def test_infinite_logits():
    """A class of -inf in both takes no part; in one of them J is inf; infinite in both or NaN, it is NaN."""
    a, b = logits(0.5, (5, 6))
    a[0, 2] = b[0, 2] = -torch.inf
    a[1, 2] = -torch.inf
    a[2, 3] = torch.nan
    a[3, 0] = b[3, 0] = torch.inf
    value = symmetric_kl(a, b)
    without = symmetric_kl(a[:1, [0, 1, 3, 4, 5]], b[:1, [0, 1, 3, 4, 5]])
    torch.testing.assert_close(value[:1], without, rtol=1e-6, atol=0)
    assert value[1] == torch.inf
    assert value.isnan().tolist() == [False, False, True, True, False]
    c = a[2:3].requires_grad_()
    assert grad(symmetric_kl(c, b[2:3]).sum(), c)[0].isnan().all()  # as a scaler of float16 looks for


def test_a_common_shift_and_huge_logits():
    a, b = logits(1.0, (4, 6))
    assert_as_the_reference(a + 1e6, b)  # a - b is rounded
    for distance in (1.0, 40.0):
        c, d = logits(distance, (60, 6))
        for shift in (1e4, 1e6, 1e8):
            assert_as_the_reference(c + shift, d)
    assert_as_the_reference(a * 1e30, b * 1e30)
    assert symmetric_kl(torch.full((1, 3), 3e38), torch.full((1, 3), -3e38)) == 0


def test_a_kernel_that_cannot_be_compiled_is_said():
    """As on a GPU without a C compiler."""
    with pytest.warns(SMARTWarning, match=r"kernel of symmetric_kl cannot be compiled \(.*Triton finds a C compiler"):
        assert KERNELS.__wrapped__() is None
