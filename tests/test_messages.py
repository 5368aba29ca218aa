"""docs/messages.md is what the code says, and every message says what to do."""

# ruff: noqa: RUF001 - the marks of what is computed

import ast
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from smartreg import SMARTConfig, SMARTWarning
from smartreg.checking import check_backend, compare_steps
from smartreg.divergences import symmetric_kl
from smartreg.perturbation import normalize

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "messages.md").read_text("utf-8")
tool = runpy.run_path(str(ROOT / "tools" / "make_messages.py"))


@pytest.fixture(scope="module")
def messages():
    return tool["read"]()


def test_the_page_is_that_of_the_code(messages):
    """If not: python tools/make_messages.py."""
    assert tool["page"](messages) == PAGE


def test_every_message_says_what_to_do_or_what_was_expected_and_got(messages):
    mute = [message for message in messages if message.text not in tool["SKIPPED"] and not message.helps]
    assert not mute


def test_a_text_that_is_warned_of_elsewhere_is_on_the_page(messages):
    texts = {message.text: message.kind for message in messages}
    assert texts[next(text for text in texts if text.startswith("SMART: ‹batches› batches without smart."))] == ""
    assert "trained in eval mode" in PAGE
    assert "does not sum to 0 over axis" in PAGE


def test_what_is_skipped_is_there(messages):
    assert set(tool["SKIPPED"]) <= {message.text for message in messages}


def test_every_exception_that_is_raised_is_read():
    """One of another class than these has no message, and is caught in the package."""
    own = {"_TooManyError", "_BuiltError"}
    for package in tool["PACKAGES"]:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    name = ast.unparse(node.exc.func)
                    made_here = name.startswith("self.") or name in ("error", "Problem")
                    assert made_here or tool["is_error"](name), f"{file}: {name}"
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id[0].isupper():
                    assert node.exc.id in own, f"{file}: {node.exc.id}"


def patterns(messages):
    """Each message as a regular expression, what is computed being anything."""
    for message in messages:
        if message.text not in tool["SKIPPED"]:
            text = re.sub(r"\[[^|]*\|.*\]", "‹›", message.text)  # a choice of texts
            yield "^" + "(.*)".join(map(re.escape, re.split("‹[^›]*›", text))) + "$"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: SMARTConfig(epsilon=-1), ValueError),
        (lambda: SMARTConfig(lamda_s=1), TypeError),
        (lambda: SMARTConfig(mu=1.0).check_total_steps("SMART"), ValueError),
        (lambda: symmetric_kl(np.ones((2, 3)), np.ones((2, 4))), ValueError),
        (lambda: normalize(np.ones(3)), ValueError),
        (lambda: check_backend("nope"), ImportError),
        (lambda: compare_steps([{}], "paper"), ValueError),
        (lambda: SMARTConfig(start="gaussian", sigma=0), SMARTWarning),
    ],
)
def test_a_message_that_a_user_meets_is_on_the_page(call, error, messages):
    with pytest.raises(error) as caught:  # warnings are errors
        call()
    text = " ".join(str(caught.value).split())
    assert any(re.match(pattern, text) for pattern in patterns(messages)), text


def test_a_message_without_help_is_seen():
    message = tool["Message"]
    for text in ("SMART: the site has no tensor.", "SMART: epsilon must be a number"):
        assert not message(text, "ValueError", "smartreg/config.py").helps
    wrong = message("SMART: it is gone. Make a new one.", "ValueError", "smartreg/config.py")
    assert wrong.helps
    assert wrong.parts == ("SMART: it is gone.", "Make a new one.")
    with pytest.raises(LookupError, match=r"smartreg/new.py has a message and is in no group"):
        tool["group_of"](message("no.", "ValueError", "smartreg/new.py"))
