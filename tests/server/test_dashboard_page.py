"""The page in a real browser: it shows the API's numbers, keeps showing them, and everyone can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm_spectral_server.routes import dashboard

from tests.server.bodies import LAYERS, Bodies, fidelity, memory, profile, readiness, traffic
from tests.server.browser import Browser, browser, needs_browser
from tests.server.pretended import PretendedServer

TAB, SHIFT, ENTER = "\ue004", "\ue008", "\ue007"
LEFT, UP, DOWN, SPACE = "\ue012", "\ue013", "\ue015", " "
PAPER = "return getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def fresh(window: Browser) -> Iterator[Browser]:
    """The shared window, at its usual size and without what an earlier test left in it."""
    yield window
    window.run("sessionStorage.clear()")
    window.size(1280, 900)
    window.prefer(prefers_color_scheme="light")
    window.open("about:blank")
    window.complaints()


@pytest.fixture
def served() -> Iterator[PretendedServer]:
    with PretendedServer(Bodies()) as server:
        yield server


def live(window: Browser) -> bool:
    return bool(window.run("return document.body.dataset.connection") == "live")


# ------------------------------------------------------------------------------------------------- without a browser


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(dashboard.router)
    return TestClient(app, follow_redirects=False)


def test_the_page_and_its_files_are_served_with_types_and_a_strict_policy(client: TestClient) -> None:
    types = {"": "text/html", "/dashboard.css": "text/css", "/dashboard.js": "text/javascript"}
    for path, media_type in types.items():
        answer = client.get("/dashboard" + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in answer.headers["content-security-policy"]
    for path in ("/none.js", "/index.html", "/../routes/dashboard.py", "/%2e%2e%2fschemas.py"):
        assert client.get("/dashboard" + path).status_code == 404
    assert client.get("/openapi.json").json()["paths"] == {}


def test_the_address_with_a_slash_leads_to_the_one_without(client: TestClient) -> None:
    answer = client.get("/dashboard/")
    assert answer.status_code == 308
    assert answer.headers["location"] == "../dashboard", "relative: nobody here knows what a proxy puts before it"


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(client: TestClient) -> None:
    texts = {path: client.get("/dashboard" + path).text for path in ("", "/dashboard.css", "/dashboard.js")}
    for text in texts.values():
        outside = set(re.findall(r"https?://[^\s\"'`)]*", text))
        assert outside <= {"http://www.w3.org/2000/svg"}, "a name space is no address"
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=", texts[""])
    assert all(not address.startswith("/") for address in re.findall(r"(?:src|href)=\"([^\"]*)\"", texts[""]))


# ---------------------------------------------------------------------------------------------------- with a browser


@needs_browser
def test_it_shows_the_figures_of_the_api(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    cost, flow = memory(), traffic()
    shown = {
        "used-bytes": cost.used_bytes,
        "cached-bytes": cost.cached_bytes,
        "free-bytes": cost.free_bytes,
        "exact-bytes": cost.exact_tier_bytes,
        "workspace-bytes": cost.workspace_bytes,
        "profile-bytes": cost.profile_bytes,
        "total-bytes": cost.resident_bytes,
        "resident-bytes": cost.resident_bytes,
        "effective-ratio": cost.effective_compression_ratio,
        "effective-bits": cost.effective_bits_per_element,
        "bytes-per-token": cost.bytes_per_token,
        "used-tokens": cost.used_tokens,
        "cached-tokens": cost.cached_tokens,
        "free-tokens": cost.capacity_tokens - cost.used_tokens - cost.cached_tokens,
        "capacity-tokens": cost.capacity_tokens,
        "fp8-tokens": cost.fp8_capacity_tokens,
        "bf16-tokens": cost.uncompressed_capacity_tokens,
        "running": flow.running,
        "waiting": flow.waiting,
        "generated": flow.generated_tokens_per_second,
        "prompt": flow.prompt_tokens_per_second,
    }
    assert {name: fresh.number(f"#{name}") for name in shown} == shown
    assert fresh.text("#used-bytes") == f"{cost.used_bytes:,}"
    assert fresh.text("#model") == "demo"
    assert "spectral-3" in fresh.text("#identity")
    assert fresh.text("#readiness") == "Ready"
    assert "KL 0.0116 of at most 0.1" in fresh.text("#canary")
    assert not fresh.find("#ranks").is_displayed(), "a single rank is the table above"
    widths = fresh.run(
        "return [...document.querySelectorAll('#memory-bar i')].map(part => parseFloat(part.style.width))"
    )
    assert sum(widths) == pytest.approx(100, abs=0.01)
    assert widths[0] == pytest.approx(100 * cost.used_bytes / cost.resident_bytes, abs=0.01)
    assert fresh.complaints() == []


@needs_browser
def test_it_follows_changes_and_asks_for_the_profile_once(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    served.bodies.answers |= {
        "v1/kv_cache/memory": memory(500, 200),
        "v1/kv_cache/traffic": traffic(9, 4, 120.25),
        "v1/kv_cache/fidelity": fidelity(61, alarms=False),
    }
    fresh.until(lambda: fresh.number("#used-tokens") == 500 * 32)
    assert fresh.number("#running") == 9
    assert fresh.text("#generated-peak") == "peak 120"
    fresh.until(lambda: fresh.text("#alarm-summary") == "No alarms.")
    assert fresh.all("#alarms li") == []
    assert fresh.number("#layer-0 [data-column=samples]") == 61
    assert served.bodies.seen.count("v1/kv_cache/profile") == 1

    other = profile().model_copy(update={"digest": "1" * 64, "name": "other"})
    cost = memory()
    assert cost.profile is not None
    identity = cost.profile.model_copy(update={"digest": other.digest, "name": other.name})
    served.bodies.answers["v1/kv_cache/profile"] = other
    served.bodies.answers["v1/kv_cache/memory"] = cost.model_copy(update={"profile": identity})
    fresh.until(lambda: fresh.text("#profile-note").startswith("other:"))


@needs_browser
def test_a_layer_in_alarm_is_marked_in_words_and_on_the_map(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    assert fresh.text("#alarm-summary") == "1 alarm: error in layer 17."
    assert "keys and values are restored badly" in fresh.text("#alarms")
    assert fresh.text("#layer-17 [data-column=alarm]") == "▲ error"
    assert fresh.text("#layer-16 [data-column=alarm]") == ""
    heat = fresh.find("#heat")
    assert heat.get_attribute("data-alarmed") == "17"
    assert heat.get_attribute("data-layers") == str(LAYERS)
    assert heat.get_attribute("data-columns") == "60"
    fresh.find("#figure [value=error_ratio]").click()
    assert heat.get_attribute("data-figure") == "error_ratio"
    worst = next(layer for layer in fidelity().layers if layer.layer == 17).error_ratio
    assert f"Largest recent error ratio: {worst:.3g}, in layer 17." in fresh.text("#heat-readout")
    assert "Largest recent error ratio" in (heat.get_attribute("aria-label") or "")
    # The colours of layer 17 before and after its step, against those of its neighbour.
    pixel = """
        const heat = document.querySelector("#heat"), [x, y] = arguments;
        const scale = heat.width / heat.clientWidth;
        return [...heat.getContext("2d").getImageData(x * scale, y * scale, 1, 1).data].slice(0, 3);"""
    width = fresh.run("return document.querySelector('#heat').clientWidth")
    row = fresh.run("return (document.querySelector('#heat').clientHeight - 22) / 30")
    early, late = (fresh.run(pixel, x, 17.5 * row) for x in (60, width - 8))
    assert sum(abs(a - b) for a, b in zip(early, late, strict=True)) > 100


@needs_browser
def test_the_table_of_layers_is_sorted_by_its_headings(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    fresh.find("#layers summary").click()
    order = "return [...document.querySelectorAll('#layer-table tbody tr')].map(row => Number(row.dataset.key))"
    assert fresh.run(order) == list(range(LAYERS))
    column = fresh.find("#layer-table thead th:nth-child(3)")
    column.find_element("css selector", "button").click()
    by_error = sorted(fidelity().layers, key=lambda layer: -(layer.output_error or 0))
    assert fresh.run(order) == [layer.layer for layer in by_error]
    assert column.get_attribute("aria-sort") == "descending"
    column.find_element("css selector", "button").click()
    assert fresh.run(order) == [layer.layer for layer in reversed(by_error)]


@needs_browser
def test_the_profile_of_each_layer_can_be_chosen(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: fresh.find("#profile-body").is_displayed())
    paths = "return [...document.querySelectorAll('#spectrum path')].map(path => path.getAttribute('d'))"
    first = fresh.run(paths)
    assert len(first) == 4
    fresh.find("#layer option[value='29']").click()
    assert fresh.run(paths) != first
    layer = profile().layers[29]
    assert f"{layer.key_bits:.2f} bits" in fresh.text("#layer-summary")
    cells = "return [...document.querySelectorAll('#channel-table tbody tr')].map(r => +r.cells[1].dataset.value)"
    assert fresh.run(cells) == layer.key_spectrum


@needs_browser
def test_it_asks_for_the_key_and_keeps_it_in_the_tab_alone(served: PretendedServer, fresh: Browser) -> None:
    served.bodies.key = "secret"
    fresh.open(served.page)
    fresh.until(lambda: fresh.find("#key-form").is_displayed())
    assert fresh.text("#readiness") == "Ready", "readiness needs no key"
    assert fresh.run("return document.activeElement.id") == "key"
    fresh.press("wrong", ENTER)
    fresh.until(lambda: "does not accept" in fresh.text("#key-error"))
    fresh.press("secret", ENTER)
    fresh.until(lambda: live(fresh))
    assert not fresh.find("#key-form").is_displayed()
    assert fresh.number("#used-bytes") == memory().used_bytes
    assert fresh.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    fresh.driver.refresh()
    fresh.until(lambda: live(fresh))
    served.bodies.key = "changed"
    fresh.until(lambda: fresh.find("#key-form").is_displayed())
    fresh.press("changed", ENTER)
    fresh.until(lambda: live(fresh))
    fresh.find("#forget").click()
    fresh.until(lambda: fresh.find("#key-form").is_displayed())
    assert fresh.run("return sessionStorage.length") == 0


@needs_browser
def test_it_says_when_the_server_is_gone_and_recovers_by_itself(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    served.stop()
    fresh.until(lambda: "does not answer" in fresh.text("#connection"))
    assert fresh.find("#connection").is_displayed()
    assert fresh.text("#readiness").startswith("Not known")
    assert fresh.number("#used-bytes") == memory().used_bytes, "the last figures stay"
    served.bodies.answers["v1/kv_cache/memory"] = memory(7)
    served.start()
    fresh.until(lambda: live(fresh))
    assert fresh.number("#used-tokens") == 7 * 32
    assert served.bodies.seen.count("v1/kv_cache/profile") == 2, "a restarted server may have another profile"
    # An error of one route takes nothing from the others.
    del served.bodies.answers["v1/kv_cache/fidelity"]
    served.bodies.answers["v1/kv_cache/memory"] = memory(8)
    fresh.until(lambda: "no v1/kv_cache/fidelity" in fresh.text("#connection"))
    assert fresh.number("#used-tokens") == 8 * 32


@needs_browser
def test_it_says_that_answers_are_not_to_be_trusted(served: PretendedServer, fresh: Browser) -> None:
    served.bodies.answers["ready"] = readiness("failed")
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    assert fresh.text("#readiness") == "Not ready: the canary failed"
    assert fresh.text("#canary").startswith("Canary failed at ")
    live_region = fresh.find("[aria-live=polite]")
    assert "Not ready" in live_region.text and "1 alarm" in live_region.text


@needs_browser
def test_a_server_that_has_sampled_nothing_yet(served: PretendedServer, fresh: Browser) -> None:
    served.bodies.answers |= {
        "v1/kv_cache/fidelity": fidelity(0),
        "ready": readiness("pending"),
        "v1/kv_cache/memory": memory(0, 0),
    }
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    assert fresh.text("#layer-0 [data-column=output_error]") == "–"
    assert fresh.number("#layer-0 [data-column=output_error]") is None
    assert "No sample of the output error yet" in fresh.text("#heat-readout")
    assert "has not run yet" in fresh.text("#canary")
    served.bodies.answers["v1/kv_cache/fidelity"] = fidelity(0, sampling=False)
    fresh.until(lambda: fresh.text("#sampling") == "Sampling is off.")


@needs_browser
def test_a_server_with_the_stock_cache_and_one_with_two_ranks(served: PretendedServer, fresh: Browser) -> None:
    ranks = memory(ranks=2)
    served.bodies.answers["v1/kv_cache/memory"] = ranks
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    assert fresh.find("#ranks").is_displayed()
    sizes = "return [...document.querySelectorAll('#rank-table td:last-child')].map(cell => +cell.dataset.value)"
    assert fresh.run(sizes) == [rank.process_bytes for rank in ranks.ranks]
    served.stop()
    served.bodies = Bodies(stock=True)
    served.start()
    fresh.until(lambda: live(fresh) and "stock cache" in fresh.text("#identity"))
    assert not fresh.find("#fidelity-body").is_displayed()
    assert not fresh.find("#profile-body").is_displayed()
    assert fresh.text("#profile-note") == "No profile is active."
    assert fresh.number("#capacity-tokens") == fresh.number("#bf16-tokens")


@needs_browser
def test_the_keyboard_reaches_everything(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    fresh.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    # A group of radio buttons is one stop.
    expected = fresh.run("""
        return [...document.querySelectorAll("a, button, input, select, summary, [tabindex='0']")]
            .filter(e => e.checkVisibility() && (e.type !== "radio" || e.checked)).length""")
    visited = []
    describe = """
        const e = document.activeElement, seen = e.dataset.visited; e.dataset.visited = 1;
        const name = e.ariaLabel || e.labels?.[0]?.textContent || e.textContent;
        const style = getComputedStyle(e);
        return [e === document.body || Boolean(seen), e.id || e.className || e.tagName, name.trim(), style.outlineStyle]"""
    for _ in range(expected + 5):
        fresh.press(TAB)
        done, place, name, outline = fresh.run(describe)
        if done:
            break
        assert name, f"{place} has no name"
        assert outline != "none", f"{place} does not show that it has the focus"
        visited.append(place)
    assert len(visited) == expected, visited
    assert visited[0] == "skip"
    assert {"heat", "layer"} <= set(visited)

    fresh.run("document.querySelector('#heat').focus()")
    fresh.press(UP)
    assert fresh.text("#heat-readout").startswith("Layer 0 about ")
    fresh.press(DOWN, DOWN, LEFT)
    assert fresh.text("#heat-readout").startswith("Layer 2 about ")
    fresh.run("document.querySelector('#layers summary').focus()")
    fresh.press(SPACE)
    assert not fresh.find("#layer-table").is_displayed()


@needs_browser
def test_what_a_screen_reader_needs(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    assert [len(fresh.all(tag)) for tag in ("html[lang=en]", "main", "header", "footer", "h1")] == [1] * 5
    unlabelled = """
        return [...document.querySelectorAll("section")].filter(section =>
            !document.getElementById(section.getAttribute("aria-labelledby"))?.textContent).length
          + [...document.querySelectorAll("input, select")].filter(e => !e.labels.length).length
          + [...document.querySelectorAll("[role=img]")].filter(e => !e.ariaLabel).length
          + [...document.querySelectorAll("th")].filter(e => !e.scope || !e.textContent.trim()).length"""
    assert fresh.run(unlabelled) == 0
    doubled = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert fresh.run(doubled) == 0
    levels = fresh.run("return [...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


CONTRAST = """
    const luminance = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = e => {
        const colour = getComputedStyle(e).backgroundColor;
        return colour.startsWith("rgba(0, 0, 0, 0") ? behind(e.parentElement) : colour;
    };
    const texts = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && e.tagName !== "CANVAS"
        && [...e.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
    return texts.map(e => {
        const style = getComputedStyle(e);
        const [a, b] = [luminance(e instanceof SVGElement ? style.fill : style.color), luminance(behind(e))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent];
    });"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_legible(scheme: str, served: PretendedServer, fresh: Browser) -> None:
    fresh.prefer(prefers_color_scheme=scheme)
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    fresh.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    red = int(re.findall(r"\d+", fresh.run(PAPER))[0])
    assert red > 220 if scheme == "light" else red < 40
    ratios = fresh.run(CONTRAST)
    assert len(ratios) > 300
    assert min(ratios)[0] >= 4.5, min(ratios)


@needs_browser
def test_a_change_of_scheme_recolours_the_map(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    before = fresh.run("return document.querySelector('#heat').toDataURL()")
    fresh.prefer(prefers_color_scheme="dark")
    fresh.until(lambda: fresh.run("return document.querySelector('#heat').toDataURL()") != before, seconds=1.5)


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 700])
def test_a_narrow_screen_never_scrolls_sideways(width: int, served: PretendedServer, fresh: Browser) -> None:
    served.bodies.answers["v1/kv_cache/memory"] = memory(ranks=2)
    fresh.size(width, 800)
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    fresh.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert fresh.run("return document.documentElement.scrollWidth") <= width


@needs_browser
def test_motion_stops_where_it_is_not_wanted(served: PretendedServer, fresh: Browser) -> None:
    fresh.prefer(prefers_reduced_motion="reduce")
    fresh.open(served.page)
    fresh.until(lambda: live(fresh))
    style = "return getComputedStyle(document.querySelector('#memory-bar i')).transitionDuration"
    assert fresh.run(style) == "0s"


@needs_browser
def test_the_address_with_a_slash_works_behind_a_prefix(served: PretendedServer, fresh: Browser) -> None:
    fresh.open(served.page + "/")
    fresh.until(lambda: live(fresh))
    assert fresh.run("return location.pathname").endswith("/some/prefix/dashboard")
