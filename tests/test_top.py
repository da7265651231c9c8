"""``vllm-spectral top`` shows what the routes say, and says what is wrong in one line."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from tests.server.bodies import Bodies, fidelity, memory, profile, readiness, traffic
from vllm_spectral.cli import top
from vllm_spectral.cli.client import KEY_VARIABLE, Server
from vllm_spectral.cli.frame import Frame, size, spark, widths
from vllm_spectral.errors import ConfigError


class CannedServer(ThreadingHTTPServer):
    """Answers from ``bodies``; a status in ``broken`` is answered instead, with a page as proxies send it."""

    daemon_threads = True

    def __init__(self, bodies: Bodies) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = bodies
        self.broken: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: CannedServer

    def do_GET(self) -> None:
        path = self.path.removeprefix("/behind").lstrip("/")
        status, body = self.server.bodies.answer(path, self.headers.get("Authorization"))
        if path in self.server.broken:
            status, body = self.server.broken[path], b"<html>Bad gateway</html>"
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests have no access log."""


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with CannedServer(Bodies()) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    top.add_parser(parser.add_subparsers())
    args = parser.parse_args(["top", *argv])
    code: int = args.run(args)
    return code


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        run(*argv)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- frames


def test_a_frame_holds_the_figures_of_the_routes(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.url, "--once") == 0
    frame = capsys.readouterr().out
    cost, flow = memory(), traffic()
    for part in ("used", "cached", "free", "exact_tier", "workspace", "profile", "resident"):
        assert size(getattr(cost, f"{part}_bytes")) in frame, part
    for tokens in (
        cost.capacity_tokens, cost.fp8_capacity_tokens, cost.uncompressed_capacity_tokens, cost.used_tokens,
        cost.cached_tokens, cost.capacity_tokens - cost.used_tokens - cost.cached_tokens, cost.bytes_per_token,
    ):  # fmt: skip
        assert f"{tokens:,}" in frame
    assert f"{cost.effective_compression_ratio:.2f} × bf16" in frame
    assert f"running {flow.running}  waiting {flow.waiting}  generated 41.5 tokens/s  prompt 332 tokens/s" in frame
    assert "demo · spectral-3 982b98757de7 · avx512bf16" in frame
    assert "● ready · canary passed" in frame
    assert "KL 0.0116 of at most 0.1" in frame


def test_alarms_and_the_worst_layers_come_first(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    run(server.url, "--once")
    lines = capsys.readouterr().out.splitlines()
    assert "▲ alarm, error in layer 17: keys and values are restored badly" in lines[2]
    header = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    worst = [int(line.split()[0]) for line in lines[header + 1 :]]
    ratios = {layer.layer: layer.error_ratio or 0 for layer in fidelity().layers}
    assert worst == [17, *sorted((n for n in ratios if n != 17), key=lambda n: -ratios[n])[:4]]
    assert "▲ error" in lines[header + 1]
    assert "▲" not in "".join(lines[header + 2 :])


def test_a_frame_follows_the_server(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.bodies.answers |= {
        "ready": readiness("failed"),
        "v1/kv_cache/memory": memory(930, 0),
        "v1/kv_cache/fidelity": fidelity(alarms=False),
    }
    run(server.url, "--once")
    frame = capsys.readouterr().out
    assert "■ not ready: the canary failed · canary failed" in frame
    assert "tokens: 29,760 used, 0 cached, 0 free" in frame
    assert "▲" not in frame


def test_nothing_was_sampled_yet(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.bodies.answers |= {"ready": readiness("pending"), "v1/kv_cache/fidelity": fidelity(0)}
    run(server.url, "--once")
    frame = capsys.readouterr().out
    assert "no step was sampled yet; about one in 64 is" in frame
    assert "canary pending" in frame
    server.bodies.answers["v1/kv_cache/fidelity"] = fidelity(0, sampling=False)
    run(server.url, "--once")
    assert "not sampled by this server" in capsys.readouterr().out


def test_the_stock_cache_and_two_ranks(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.bodies = Bodies(stock=True, ranks=2)
    run(server.url, "--once")
    frame = capsys.readouterr().out
    assert "demo · stock cache" in frame
    assert "no fidelity to measure" in frame
    assert "DP 0, TP 1" in frame
    assert run(server.url, "--once", "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"] is None


def test_json_is_what_the_routes_said(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.url, "--once", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    expected = {
        "memory": memory(), "fidelity": fidelity(), "traffic": traffic(), "ready": readiness(), "profile": profile(),
    }  # fmt: skip
    assert document == {name: body.model_dump(mode="json") for name, body in expected.items()}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_bar_has_the_width_of_the_terminal(width: int, server: CannedServer) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    bodies = Server(server.url).bodies()
    console.print(Frame(server.url, bodies).render(console))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    bar = next(line for line in lines if line.startswith("██"))
    assert len(bar) == width
    assert {"█", "▓", "░", "▚", "▞", "▤"} == set(bar), "each part has a sign of its own, colours or not"
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("full", [100, 7, 3])
def test_no_part_of_a_bar_disappears(full: int) -> None:
    sizes = [full, 1e-9, 0, full / 1000]
    parts = widths(sizes, sum(sizes), 20)
    assert sum(parts) == 20
    assert parts[1] == parts[3] == 1
    assert parts[2] == 0
    assert widths([0, 0], 0, 20) == [0, 0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (150 << 20, "150 MiB"), (3 << 29, "1.50 GiB"), (1 << 60, "1024 PiB")],
)  # fmt: skip
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


def test_series_leave_gaps() -> None:
    assert spark([0, 7, None, 3.5]) == "▁█ ▅"
    assert spark([0, 0]) == "▁▁"
    assert spark([]) == ""


# ------------------------------------------------------------------------------------------------------- while it lives


def test_while_live_a_server_that_is_gone_is_shown_and_asked_again(
    server: CannedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    steps = iter(["gone", "still gone", "back"])
    frames: list[str] = []
    render = Frame.render

    def keep(frame: Frame, console: Console) -> object:
        frames.append(frame.lost or str(frame.bodies["memory"]["used_tokens"]))
        return render(frame, console)

    def step(_seconds: float) -> None:
        match next(steps, None):
            case "gone":
                server.broken = {"v1/kv_cache/traffic": 502}
            case "back":
                server.broken = {}
                server.bodies.answers["v1/kv_cache/memory"] = memory(7)
            case None:
                raise KeyboardInterrupt

    monkeypatch.setattr(Frame, "render", keep)
    monkeypatch.setattr(time, "sleep", step)
    assert top._watch(console, Server(server.url), 2.0) == 0
    assert frames[0] == str(memory().used_tokens)
    assert "answers 502" in frames[1]
    assert frames[2] == frames[1], "it says since when"
    assert frames[3] == str(7 * 32)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.startswith("\x1b[?1049h"), "the alternate screen keeps what was on the terminal"
    assert "trying again" in shown


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_server_that_does_not_answer(server: CannedServer) -> None:
    free = CannedServer(Bodies())
    free.server_close()
    message = refused(free.url, "--once")
    assert f"no answer from {free.url} (Connection refused)" in message
    assert "vllm-spectral serve" in message
    server.broken = {"v1/kv_cache/memory": 500}
    assert "answers 500 for /v1/kv_cache/memory: its log" in refused(server.url, "--once")


def test_the_api_key(server: CannedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server.bodies.key = "secret"
    message = refused(server.url, "--once")
    assert "--api-key" in message and "VLLM_API_KEY" in message
    assert "does not accept" in refused(server.url, "--once", "--api-key", "wrong")
    assert "ASCII" in refused(server.url, "--once", "--api-key", "sécret")
    assert run(server.url, "--once", "--api-key", "secret") == 0
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert run(server.url, "--once") == 0
    assert "secret" not in capsys.readouterr().out


def test_servers_that_are_none_of_ours(server: CannedServer) -> None:
    server.bodies.answers.pop("v1/kv_cache/memory")
    assert "is not a vllm-spectral server" in refused(server.url, "--once")
    server.broken = {"v1/kv_cache/memory": 200}
    assert "is not a vllm-spectral server" in refused(server.url, "--once")
    server.broken = {"v1/kv_cache/memory": 302}
    assert "answers 302" in refused(server.url, "--once"), "the key is not carried elsewhere"
    server.broken = {}
    server.bodies.answers["v1/kv_cache/memory"] = traffic()
    assert "another version" in refused(server.url, "--once")


@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "http://host:port", "http://host:99999", "http://host/?a=b", ""]
)
def test_addresses_that_are_none(url: str) -> None:
    assert "http://localhost:8000" in refused(url, "--once")


def test_addresses_as_people_have_them_at_hand(server: CannedServer) -> None:
    for suffix in ("", "/", "/v1", "/v1/", "/dashboard", "/behind", "/behind/dashboard/"):
        assert run(server.url + suffix, "--once") == 0, suffix
    assert run(server.url.removeprefix("http://"), "--once") == 0


def test_flags_that_make_no_sense(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--once" in refused(server.url, "--json")
    assert "needs a terminal" in refused(server.url)
    for interval in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit) as stop:
            run(server.url, "--interval", interval)
        assert stop.value.code == 2
        assert "--interval" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_spectral.cli.top as top; from rich.console import Console; import rich.live, rich.table; "
        "sys.exit(bool({'torch', 'vllm', 'fastapi', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
