"""The fuzzer's own promise: what it asks is little work, so that a slow answer is a finding."""

from __future__ import annotations

import json
import random

import pytest

from tests.fuzz.hostile_http import BATCH, GENERATING, MOST_TOKENS, almost_sound, brief


@pytest.mark.parametrize("path", [*GENERATING, BATCH])
@pytest.mark.parametrize("length", [{}, {"max_tokens": None, "max_output_tokens": None}])
def test_no_route_generates_to_the_end_of_the_context(path: str, length: dict[str, None]) -> None:
    bounds = {"max_tokens", "max_output_tokens"} & set(GENERATING.get(path, {"max_tokens": 0}))
    body = brief(path, {"messages": [], **length})
    assert all(body[bound] == MOST_TOKENS for bound in bounds)


def test_sound_requests_with_one_thing_wrong_are_brief() -> None:
    draw = random.Random(0)
    for ask in (almost_sound(draw) for _ in range(300)):
        body = json.loads(ask.body or b"")
        for bound in {"max_tokens", "max_output_tokens"} & set(GENERATING[ask.path]):
            assert body[bound] is not None
            assert not isinstance(body[bound], int) or body[bound] <= MOST_TOKENS
