"""The page at /: what is served, under which policy, and what a browser makes of it."""

import json
import re
import struct

import httpx
import pytest

from llmopt.serve import page
from tests.serve.chromium import Browser, find_browser

FILES = sorted(p for p in page.files(page.__package__).iterdir() if p.name.rpartition(".")[2] in page.TYPES)


def test_the_page_is_served_under_a_strict_policy(api):
    answer = api.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in FILES:
        found = api.get(f"/page/{path.name}")
        assert found.content == path.read_bytes()
        assert found.headers["content-type"].startswith(page.TYPES[path.name.rpartition(".")[2]])
    for name in ("nothing.js", "__init__.py", "..%2f__init__.py"):
        assert api.get(f"/page/{name}").status_code == 404


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_comes_from_elsewhere(path):
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a namespace, never fetched
    assert not re.search(r"""://|["'`(=]//|@import""", text)
    assert "innerHTML" not in text
    assert not re.search(r"\son\w+=|style=|<script>|<style", text)


def test_every_control_is_labelled():
    """Labels by wrapping or by ``for``; buttons say what they do."""
    text = (FILES[0].parent / "index.html").read_text("utf-8")
    for kind, attributes in re.findall(r"<(input|select|textarea)([^>]*)>", text):
        name = re.search(r'id="(\w+)"', attributes)[1]
        wrapped = re.search(rf'<label[^>]*>(?:(?!</label>).)*id="{name}"', text, re.DOTALL)
        assert wrapped or f'for="{name}"' in text, (kind, name)
    assert all(label.strip() for label in re.findall(r"<button[^>]*>([^<]*)</button>", text))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser for the tests of this file; they skip without one."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on this machine (set LLMOPT_BROWSER)")
    found = Browser(path, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


DONE = "document.querySelector('.said.model:last-of-type .counts')?.textContent"


@pytest.mark.slow
def test_a_conversation_streams(browser, start):
    server = start({"sleep": 0.02})
    tab = browser.open(server.url)
    tab.wait("document.querySelector('#model').textContent.startsWith('fake')")
    tab.run("document.querySelector('details').open = true")
    tab.type("#max_tokens", "12")
    tab.type("#seed", "7")
    tab.type("#system", "Be brief.")
    tab.type("#prompt", "Who are <b>you</b>?")
    tab.press_enter()
    first = tab.wait(DONE)
    assert re.fullmatch(r"12 tokens · first after \d\.\d\d s · [\d.]+ tokens/s · length", first)
    assert 2 < float(re.search(r"([\d.]+) tokens/s", first)[1]) < 55  # a step takes 20 ms
    assert tab.run("document.querySelector('.said.user .text').textContent") == "Who are <b>you</b>?"
    assert tab.run("document.querySelector('.said.user b')") is None
    answer = tab.run("document.querySelector('.said.model .text').textContent")
    tab.type("#prompt", "And now?")
    tab.click("#send")
    tab.wait(f"document.querySelectorAll('.said.model').length === 2 && {DONE}")
    bodies = [json.loads(e["request"]["postData"]) for e in tab.mine("Network.requestWillBeSent")
              if e["request"]["method"] == "POST"]  # fmt: skip
    assert [m["content"] for m in bodies[1]["messages"]] == ["Be brief.", "Who are <b>you</b>?", answer, "And now?"]
    assert (bodies[0]["seed"], bodies[0]["max_tokens"]) == (7, 12)
    assert all(url.startswith(server.url) for url in tab.requested())


@pytest.mark.slow
def test_an_answer_can_be_stopped(browser, start):
    server = start({"sleep": 0.05})
    tab = browser.open(server.url)
    tab.type("#prompt", "Go on")
    tab.press_enter()
    tab.wait("document.querySelector('.said.model .text')?.textContent.length > 10")
    tab.click("#stop")
    assert "stopped" in tab.wait(DONE)
    assert tab.run("document.querySelector('#send').disabled") is False
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health").json()["active_requests"] == 0


@pytest.mark.slow
def test_an_error_is_said(browser, start):
    tab = browser.open(start({"chat": False}).url)
    tab.type("#prompt", "Hi")
    tab.press_enter()
    assert "no chat template" in tab.wait("document.querySelector('.said.error .text')?.textContent")
    tab.run("document.querySelector('details').open = true")
    tab.run("document.querySelector('#form').value = 'completion'")
    tab.type("#prompt", "Hi")
    tab.press_enter()
    assert "length" in tab.wait(f"document.querySelectorAll('.said.model').length === 2 && {DONE}")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_the_policy_is_kept(browser, server, dark):
    tab = browser.open(server.url, width=360, height=740, phone=True, dark=dark)
    tab.run("document.querySelector('details').open = true")
    wide = "[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    assert tab.run("document.documentElement.scrollWidth") == 360
    assert tab.run(wide) == 0
    controls = "[...document.querySelectorAll('button, select, input, textarea')]"
    assert tab.run(f"{controls}.filter(e => e.offsetParent && e.offsetHeight < 36).map(e => e.id)") == []
    assert [text for text in tab.complaints() if "Content Security Policy" in text or "Error" in text] == []
    # negative control: what the policy forbids is refused, and the browser says so
    tab.run("(() => { const s = document.createElement('style'); document.head.append(s); s.textContent = 'a {}' })()")
    assert any("Content Security Policy" in text for text in tab.complaints())


def contrast(a, b):
    """Contrast ratio of two ``rgb(...)`` colours, as WCAG 2 defines it."""

    def luminance(text):
        parts = [int(v) / 255 for v in re.findall(r"\d+", text)[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_both_themes(browser, server, dark):
    tab = browser.open(server.url, dark=dark)
    color = "getComputedStyle(document.querySelector({!r})).{}"
    for text, ground in (
        ("body", "body"),
        ("h2", "section"),
        ("dt", "section"),
        ("label", "section"),
        ("#send", "#send"),
    ):
        pair = [tab.run(color.format(text, "color")), tab.run(color.format(ground, "backgroundColor"))]
        assert contrast(*pair) >= 4.5, (text, pair)
    assert contrast("rgb(150, 150, 150)", "rgb(255, 255, 255)") < 4.5  # negative control


BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.5)


def exposition(values, tokens=0):
    """Prometheus' text of a histogram of ``values`` and a counter in two parts."""
    counts = [sum(v <= bound for v in values) for bound in BOUNDS] + [len(values)]
    lines = [f'wait_seconds_bucket{{le="{b}"}} {c}' for b, c in zip((*BOUNDS, "+Inf"), counts)]
    parts = [f'tokens_total{{kind="a"}} {tokens}', f'tokens_total{{kind="say \\"b\\""}} {tokens / 2}']
    return "\n".join(["# HELP wait_seconds of something", *lines, *parts, ""])


@pytest.mark.slow
def test_the_scripts_read_metrics(browser, server):
    """Sums over labels, and quantiles of what came between two readings, within their bucket."""
    tab = browser.open(server.url)
    old, new = [0.4] * 50, [0.011, 0.012, 0.013, 0.03, 0.04, 0.06, 0.07, 0.08, 0.09, 0.3]
    texts = json.dumps([exposition(old), exposition(old + new, tokens=10)])
    script = f"import('/page/metrics.js').then(m => {{const [a, b] = {texts}.map(m.parseMetrics); return %s}})"
    assert tab.run(script % "m.total(b, 'tokens_total')") == 15
    assert tab.run(script % "m.total(b, 'nothing') === undefined")
    assert tab.run(script % "m.quantile(b, b, 'wait_seconds', 0.5) === undefined")
    for share in (0.1, 0.3, 0.5, 0.9, 0.99):
        found = tab.run(script % f"m.quantile(a, b, 'wait_seconds', {share})")
        exact = sorted(new)[min(len(new) - 1, int(share * len(new) - 1e-9))]
        low = max((b for b in BOUNDS if b < exact), default=0)
        high = min(b for b in BOUNDS if b >= exact)
        assert low <= found <= high, share
    # negative control: without the first reading the old values count too
    assert tab.run(script % "m.quantile([], b, 'wait_seconds', 0.5)") > 0.1


TILE = "document.querySelectorAll('#tiles dd span')[{}].textContent"


@pytest.mark.slow
def test_the_live_view_follows_the_server(browser, start):
    server = start({"sleep": 0.05})
    tab = browser.open(server.url)
    tab.wait("document.querySelector('#health').dataset.health === 'ok'")
    tab.wait(f"{TILE.format(0)} === '0'")  # nothing is generated yet
    tab.type("#prompt", "Go on")
    tab.press_enter()
    rate = float(tab.wait(f"{TILE.format(0)} !== '0' && {TILE.format(0)}"))
    assert 2 < rate < 40  # a step takes 50 ms
    tab.wait(f"{TILE.format(2)} === '1'")  # running
    tab.wait(f"parseFloat({TILE.format(4)}) > 0")  # KV blocks in use, percent
    tab.click("#stop")
    tab.wait(f"{TILE.format(2)} === '0' && {TILE.format(0)} === '0'")
    assert "Infinity" not in tab.run("document.querySelector('#tiles').innerText")
    server.process.kill()
    tab.wait("document.querySelector('#health').dataset.health === 'bad'")


@pytest.mark.slow
def test_a_key_is_asked_for_where_one_is_wanted(browser, start):
    tab = browser.open(start(keys={"secret": "team"}).url)
    tab.wait("!document.querySelector('#key-form').hidden")
    tab.type("#key", "wrong")
    tab.click("#key-form button")
    tab.wait("document.querySelector('#model').textContent.includes('not valid')")
    tab.wait("!document.querySelector('#key-form').hidden")
    tab.type("#key", "secret")
    tab.click("#key-form button")
    tab.wait("document.querySelector('#model').textContent.startsWith('fake')")
    tab.type("#prompt", "Hi")
    tab.press_enter()
    assert "length" in tab.wait(DONE)
    assert tab.run("document.querySelector('#key-form').hidden")
    assert "secret" not in tab.run("document.documentElement.outerHTML")


def test_screenshots_in_the_docs(root):
    """PNG files of the sizes ``tests.serve.screenshots`` takes, shown by the guide."""
    guide = (root / "docs" / "serving.md").read_text("utf-8")
    for name, width in (("page-desktop.png", 1280), ("page-phone.png", 585)):
        data = (root / "docs" / "images" / name).read_bytes()
        assert len(data) < 150_000
        assert struct.unpack(">I", data[16:20])[0] == width
        assert f"images/{name}" in guide
