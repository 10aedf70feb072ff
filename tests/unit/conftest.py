"""Fixtures of the unit tests: a tokenizer that is built in memory and the inputs of a small training run."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.worlds import CHATML, World, make_tokenizer, make_world


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``tiny_tokenizer(chat_template=CHATML)``: one id a byte and three special tokens; None takes the template off."""

    def build(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
        return make_tokenizer(chat_template=chat_template)

    return build


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Student, general teacher and prompts; no test may change them."""
    return make_world(tmp_path_factory.mktemp("world"))
