"""What users do to a server: Locust scenarios. By hand, with Locust's own page:

    locust -f tests/load/locustfile.py --host http://localhost:8000

One class per kind of user; name some on the command line to get only these. All stream, and none waits between requests:
the number of users is the number of requests at once. ``LOAD_REPORT=FILE`` writes every request as a line of JSON;
``LOAD_MODEL`` and ``LOAD_API_KEY`` say what is asked and with what.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import gevent
from locust import HttpUser, events, task

from benchmarks.texts import code, prose

MODEL = os.environ.get("LOAD_MODEL", "demo")
HEADERS = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("LOAD_API_KEY")) else {}
TEXT = prose("held-out") + code("held-out")
SYSTEM = "You are a patient teacher of Python. " + prose("tuning")[:2400]
"""A system prompt of about 600 tokens, the same for every chat."""
QUESTIONS = (
    "What is a generator?", "How do I read a file line by line?", "When is a tuple better than a list?",
    "Explain the with statement.", "What does the yield keyword do?", "How are exceptions chained?",
)  # fmt: skip
_RECORDS: list[dict[str, Any]] = []
_COUNT = itertools.count()


class Client(HttpUser):
    """Streams completions, and notes what a user would feel.

    Attributes:
        stop_after: chunks after which the user hangs up; None: never.
        pause_seconds: between two reads.
    """

    abstract = True
    stop_after: int | None = None
    pause_seconds = 0.0

    def stream(self, path: str, body: dict[str, Any]) -> str:
        """One streamed answer; its text."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        body |= {"model": MODEL, "stream": True, "stream_options": options, "temperature": 0, "ignore_eos": True}
        name, text = type(self).__name__, ""
        record = {"scenario": name, "start": time.time(), "status": 0, "progress": [], "cut": False}
        _RECORDS.append(record)
        start = time.monotonic()
        try:
            with self.client.post(
                path, json=body, headers=HEADERS, stream=True, catch_response=True, name=name
            ) as answer:
                if answer.status_code != 200:
                    record["status"] = answer.status_code
                    answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                    return ""
                whole = False
                for chunks, line in enumerate(line for line in answer.iter_lines() if line.startswith(b"data: {")):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        # What breaks after the headers is told in the stream.
                        answer.failure(str(event["error"])[:200])
                        return ""
                    for choice in event.get("choices", ()):
                        text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                    if tokens := (event.get("usage") or {}).get("completion_tokens"):
                        record["progress"].append((time.monotonic() - start, tokens))
                    # The last event has the number of tokens and no choice.
                    whole = not event.get("choices")
                    if self.stop_after and chunks >= self.stop_after:
                        whole = True
                        break
                    if self.pause_seconds:
                        gevent.sleep(self.pause_seconds)
                if not whole:
                    answer.failure("the stream ended before the answer did")
                    return ""
                record["status"] = 200
                answer.success()
        except gevent.GreenletExit:
            # The run is over. What was streamed counts: else a server that serves many at once would seem to do nothing.
            record["cut"] = True
            raise
        finally:
            record["seconds"] = time.monotonic() - start
        return text

    @staticmethod
    def piece(characters: int) -> str:
        """Text that no other request has."""
        start = (next(_COUNT) * 7919) % (len(TEXT) - characters)
        return TEXT[start : start + characters]


class Chat(Client):
    """Three questions in a row under a system prompt that all chats share."""

    weight = 4

    @task
    def talk(self) -> None:
        messages = [{"role": "system", "content": SYSTEM}]
        for question in random.sample(QUESTIONS, 3):
            messages.append({"role": "user", "content": f"{question} ({next(_COUNT)})"})
            answer = self.stream("/v1/chat/completions", {"messages": messages, "max_tokens": 64})
            if not answer:
                return
            messages.append({"role": "assistant", "content": answer})


class Document(Client):
    """A long document and two questions about it."""

    weight = 2

    @task
    def read(self) -> None:
        document = self.piece(5000)
        for question in ("Summarize the text above.", "What is the most surprising statement above?"):
            if not self.stream("/v1/completions", {"prompt": f"{document}\n\n{question}", "max_tokens": 96}):
                return


class Short(Client):
    """Many small requests."""

    weight = 4

    @task
    def ask(self) -> None:
        self.stream("/v1/completions", {"prompt": self.piece(120), "max_tokens": 16})


class HangUp(Client):
    """Reads a few tokens of a long answer, and is gone."""

    weight = 1
    stop_after = 5

    @task
    def leave(self) -> None:
        self.stream("/v1/completions", {"prompt": self.piece(600), "max_tokens": 400})


class SlowReader(Client):
    """Takes its time for every token."""

    weight = 1
    pause_seconds = 0.2

    @task
    def linger(self) -> None:
        self.stream("/v1/completions", {"prompt": self.piece(600), "max_tokens": 48})


@events.quitting.add_listener
def write(**_: Any) -> None:
    """Leave the records where the caller asked for them."""
    if path := os.environ.get("LOAD_REPORT"):
        Path(path).write_text("".join(json.dumps(record) + "\n" for record in _RECORDS))
