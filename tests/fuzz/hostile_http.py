"""Hostile HTTP requests: from the server's own schema, from sound requests with one thing wrong, and from no rules at all."""

# ruff: noqa: E501 - tables of hostile values

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MARK = "canary"
"""Prompts hold this word and a number, so that they are found again where they do not belong."""
TRAP = "http://trap.invalid/"
"""Stands for the address where whoever asks listens: a server that goes there fetches what clients name."""
MOST_TOKENS = 2
GENERATING = {
    "/v1/completions": {"prompt": "", "max_tokens": MOST_TOKENS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": ""}], "max_tokens": MOST_TOKENS},
    "/v1/responses": {"input": "", "max_output_tokens": MOST_TOKENS},
    "/v1/messages": {"messages": [{"role": "user", "content": ""}], "max_tokens": MOST_TOKENS},
    "/invocations": {"prompt": "", "max_tokens": MOST_TOKENS},
    "/tokenize": {"prompt": ""},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": ""}]},
    "/generative_scoring": {"query": "", "items": ["a", "b"], "label_token_ids": [1, 2]},
}
BATCH = "/v1/chat/completions/batch"
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
COUNTS = ("n", "best_of")

FIELDS = (
    "model", "messages", "prompt", "input", "n", "best_of", "echo", "stream", "stream_options", "stop", "stop_token_ids",
    "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "top_logprobs", "prompt_logprobs", "logit_bias",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty", "use_beam_search", "ignore_eos",
    "min_tokens", "max_tokens", "skip_special_tokens", "truncate_prompt_tokens", "allowed_token_ids", "bad_words",
    "response_format", "structured_outputs", "tools", "tool_choice", "chat_template", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "documents", "mm_processor_kwargs", "cache_salt", "priority",
    "kv_transfer_params", "vllm_xargs", "request_id", "user", "suffix", "return_token_ids", "return_tokens_as_token_ids",
    "reasoning_effort", "include_reasoning", "prompt_embeds", "data_parallel_rank", "tokens", "system", "metadata",
    "previous_response_id", "background", "store", "instructions", "label_token_ids", "query", "items", "logits_processors",
)  # fmt: skip


def _values(draw: random.Random) -> Any:
    big = draw.choice(
        [2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 1e308, -1, 0, 1, 2, 0.5, -0.0, 128, 49152]
    )
    text = draw.choice(
        ["", " ", "x" * 3000, "\0", "\ud800", "\u202e", "🙂" * 300, "../../etc/passwd", "/root/.ssh/id_rsa", "file:///etc/passwd",
         "{{ 7*7 }}", "{% for x in range(10**9) %}{% endfor %}", "${jndi:ldap://x}", "'; DROP TABLE", "<|im_end|>", "[" * 500,
         "demo", "no-such-model", "none", "required", "auto", "json_object", TRAP + "x.png", TRAP + "x.json", "data:image/png;base64,AAAA"]
    )  # fmt: skip
    deep: Any = 0
    for _ in range(draw.choice([5, 60])):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return draw.choice([
        None, True, False, big, -big, text, [], {}, [big], [text], {text: big}, {text: text}, [[text]], [[1, 2], [3]], [None], deep,
        [text] * 200, list(range(300)), {str(i): i for i in range(200)}, [{"type": "text", "text": text}],
        [{"role": text, "content": text}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": draw.choice([text, TRAP + "x.png"])}}]}],
        [{"role": "user", "content": [{"type": kind, kind: {"url": TRAP + kind}} for kind in ("audio_url", "video_url")]}],
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": text}}}, {"type": "json_object"},
        {"regex": draw.choice(["(", "a{1,3}", "(a*)*b", "[" * 50, "\\p{Foo}", "(?=x)", ""])}, {"json": {"$ref": draw.choice(["#", TRAP + "schema.json"])}},
        {"choice": [text]}, {"grammar": draw.choice(["root ::= root", "x", "root ::= 'a'", "start: /a/"])},
        {"structural_tag": text}, {"type": "function", "function": {"name": text, "parameters": {"type": "object"}}},
        [{"type": "function", "function": {"name": text, "parameters": {"properties": {text: {"$ref": "#/nowhere"}}}}}],
        {"include_usage": True}, {"kv_cache_usage": 1}, {"do_remote_prefill": True, "remote_block_ids": [1]}, {"effort": text},
    ])  # fmt: skip


def tamed(body: Any) -> Any:
    """A body that asks for little work if it is served at all: what is generated is not what is tested here."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    for name in LENGTHS:
        if isinstance(value := body.get(name), int) and value > MOST_TOKENS:
            body[name] = MOST_TOKENS
    for name in COUNTS:
        if isinstance(value := body.get(name), int) and 3 < value <= 16384:
            body[name] = 3
    if isinstance(body.get("prompt"), list):
        body["prompt"] = body["prompt"][:400]
    return body


def brief(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A body that says how much may be generated, for a route that would otherwise go on to the end of the context."""
    if path == BATCH or "max_tokens" in GENERATING.get(path, {}):
        length = "max_tokens"
    elif "max_output_tokens" in GENERATING.get(path, {}):
        length = "max_output_tokens"
    else:
        return body
    return body | ({length: MOST_TOKENS} if body.get(length) is None else {})


@dataclass
class Ask:
    """One request.

    Attributes:
        method, path: of the request line.
        body: its bytes.
        headers: beside the key.
        mark: the number of its canary, if its prompt holds one.
        kind: for counting.
    """

    method: str
    path: str
    body: bytes | None
    headers: dict[str, str] = field(default_factory=dict)
    mark: str = ""
    kind: str = "one field wrong"


def almost_sound(draw: random.Random) -> Ask:
    """A request for a known path with one to three fields that make no sense."""
    path = draw.choice(list(GENERATING))
    mark = f"{MARK}{draw.randrange(10**12)}"
    body: dict[str, Any] = json.loads(json.dumps(GENERATING[path]).replace('""', f'"{mark} says"'))
    body["model"] = "demo"
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        body[draw.choice(FIELDS)] = _values(draw)
    if draw.random() < 0.05:
        body.pop(draw.choice(list(body)))
    return Ask("POST", path, json.dumps(brief(path, tamed(body))).encode(), {"content-type": "application/json"}, mark)


def odd_body(draw: random.Random) -> Ask:
    """A body that is no JSON, or not of its type, or large, or deep."""
    path = draw.choice([*GENERATING, BATCH, "/v1/kv_cache/memory", "/v1/nothing", "/metrics"])
    small = draw.random() < 0.9
    body = draw.choice([
        b"", b"{", b"null", b"[]", b'"x"', b"0", b"\xff\xfe\xfd", b"\0" * 100, b'{"prompt": "\xff\xfe"}', b"NaN",
        b'{"prompt": NaN}', b'{"max_tokens": 1e999}', b'{"a":1' + b',"a":1' * 1000 + b"}", b"\xef\xbb\xbf{}",
        '{"prompt": "x"}'.encode("utf-16"), b"[" * 5000, b"[" * (2000 if small else 900_000), b'{"a":' * 3000,
        b'{"vllm_xargs": {"kv_cache_usage": ' + b"[" * 3000, b"9" * 5000, b'{"prompt": "' + b"x" * (100 if small else 900_000) + b'"}',
        b"x" * (10 if small else 1_100_000), b'{"prompt": [' + b"1," * (50 if small else 200_000) + b"1]}",
        b"\x1f\x8b\x08" + draw.randbytes(50), b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--",
        draw.randbytes(draw.randrange(200)),
    ])  # fmt: skip
    headers = {
        "content-type": draw.choice(
            ["application/json", "application/json; charset=utf-7", "text/plain", "application/x-www-form-urlencoded", "x",
             "multipart/form-data; boundary=x", "multipart/form-data", "application/octet-stream", "", "application/json" * 50]
        )
    }  # fmt: skip
    if draw.random() < 0.3:
        name = draw.choice(["content-encoding", "accept", "x-request-id", "origin", "host", "x-data-parallel-rank", "range",
                            "x-amzn-sagemaker-session-id", "x-amzn-sagemaker-adapter-identifier", "traceparent", "cookie"])  # fmt: skip
        headers[name] = draw.choice(
            ["gzip", "x" * 5000, "http://evil.example", "-1", "bytes=0-", "new_session", "%00", "../x"]
        )
    return Ask(draw.choice(["POST"] * 6 + ["PUT", "GET", "DELETE", "PATCH"]), path, body, headers, kind="odd body")


def junk(draw: random.Random) -> bytes:
    """Bytes that are hardly HTTP, to be written to a socket."""
    key = b"Authorization: Bearer secret\r\n"
    path = draw.choice([
        b"/health", b"/v1/models", b"/", b"*", b"//", b"/..%2f..%2fetc/passwd", b"/%00", b"/%ff%fe", b"/%", b"/\xff\xfe",
        b"/dashboard/..%2f..%2fapp.py", b"/dashboard/../../etc/passwd", b"/v1/../metrics", b"/metrics/../v1/models", b"http://evil/v1/models",
        b"/v1/models?" + b"a=b&" * 500, b"/" + b"x" * draw.choice([10, 5000, 70_000]), b"/v1/kv_cache/profile#x", b"/v1/responses/../../x",
        b"/docs?x=<script>", b"/v1/kv_cache/memory;x", b"/%2e%2e/%2e%2e/etc/passwd", b"/dashboard/%2e%2e/limits.py",
    ])  # fmt: skip
    method = draw.choice(
        [b"GET", b"POST", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"get", b"X" * 300, b"", b"G\0T", b"PRI"]
    )
    version = draw.choice([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"", b"HTTP/1.1\r", b"XTTP/1.1"])
    line = method + b" " + path + b" " + version + b"\r\n"
    headers = b"".join(
        draw.choice([
            key, b"Host: x\r\n", b"Host: x\r\nHost: y\r\n", b"A: " + b"x" * draw.choice([1, 9000, 70_000]) + b"\r\n",
            b"B: c\r\n" * draw.choice([1, 200, 20_000]), b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 5, 6\r\n",
            b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
            b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b" folded: x\r\n", b"no colon\r\n",
            b": empty\r\n", b"A\0B: c\r\n", b"A: \r\x0bb\r\n", b"Authorization: Bearer \xff\r\n", b"Authorization: Basic ////\r\n",
            b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
            b"Connection: close\r\n", b"Origin: http://evil.example\r\n", b"Access-Control-Request-Method: POST\r\n",
        ])
        for _ in range(draw.randrange(6))
    )  # fmt: skip
    body = draw.choice([
        b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"FFFFFFFFFFFFFFFFF\r\nx", b"-1\r\n", b"5;x=" + b"y" * 70_000 + b"\r\nhello", b"\0" * 50,
        b"5\r\nhello\r\n" * 200 + b"0\r\n" + b"A: b\r\n" * 50 + b"\r\n",
    ])  # fmt: skip
    whole = line + headers + b"\r\n" + body
    choice = draw.random()
    if choice < 0.1:
        return draw.randbytes(draw.choice([1, 50, 3000]))
    if choice < 0.15:
        return draw.choice(
            [b"\x16\x03\x01\x02\0\x01\0" * 40, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 3000, b"\0" * 70_000]
        )
    if choice < 0.2:
        return (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 50) + whole
    if choice < 0.3:
        return whole[: draw.randrange(len(whole))]
    return whole


def without_key(paths: dict[str, Any]) -> Iterator[Ask]:
    """Every route of the schema, under names of its own and others, asked for with no key or a wrong one."""
    wrong = (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "secret"},
        {"authorization": "Basic c2VjcmV0"},
        {"x-api-key": "secret"},
    )
    for path, operations in paths.items():
        for method in operations:
            for headers in wrong:
                for name in (path, path.replace("/v1", "/%76%31"), path + "/", path + "?api_key=secret"):
                    yield Ask(method.upper(), name.replace("{response_id}", "x"), None, dict(headers), kind="no key")
