"""The page of `rabbit serve`, in a real browser: `make test-browser`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pictures import as_bytes, picture
from pictures import save as save_pictures
from serving import NAME, SECRET, running, serving
from waiting import wait_until

from rabbit_engine import AutoModel, AutoModelForImageTextToText, Session
from rabbit_engine.server.app import create_app
from rabbit_engine.server.hosting import Host
from rabbit_engine.sessions.text import TextFlow

pytestmark = pytest.mark.browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, wherever it is: RABBIT_CHROMIUM, or on the path."""
    from playwright.sync_api import sync_playwright

    names = (os.environ.get("RABBIT_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    assert found, "no Chromium is here: install it (apt-get install chromium), or name it in RABBIT_CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def session(smollm: Path, smollm_shards: Path) -> Iterator[Session]:
    """Of a model that streams nearly all of its weights: the lanes show what is streamed."""
    memory = {"cpu": "150MB"}
    with (
        AutoModel.from_pretrained(smollm, device="cpu", max_memory=memory, layer_shards_saving_path=smollm_shards) as model,
        Session(model, max_new_tokens=64) as session,
    ):
        yield session


class Visit:
    """A page, its requests, and its complaints."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda told: self.complaints.append(told.text) if told.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def ask(self, text: str) -> None:
        self.page.wait_for_selector("#plan tr", state="attached")  # the page ignores questions until it knows the model
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    visits: list[Visit] = []

    def open_page(url: str, **options: Any) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield open_page
    for found in visits:
        found.context.close()


def test_a_question_is_answered_and_nothing_is_loaded_from_other_sites(visit: Any, url: str) -> None:
    here = visit(url)
    here.page.wait_for_selector("#plan tr")
    assert here.page.text_content("#model") == NAME
    here.ask("What is the capital of France?")
    here.page.wait_for_selector(".note")
    assert "Paris" in here.page.text_content(".said.assistant")
    assert "8 tokens, the first after" in here.page.text_content(".note")
    here.ask("And of Italy?")
    here.page.wait_for_function("() => document.querySelectorAll('.note').length === 2")
    assert all(asked.startswith(url) for asked in here.asked)
    assert here.complaints == []


def test_the_plan_and_the_live_lanes_are_shown(visit: Any, url: str) -> None:
    here = visit(url)
    here.ask("Count to a hundred.")
    here.page.wait_for_function("() => /layer \\d+ of \\d+/.test(document.getElementById('pass').textContent)")
    here.page.wait_for_function(
        "() => /disk \\d+%.*compute|compute \\d+%.*disk/.test(document.getElementById('busy').textContent)"
    )
    painted = here.page.evaluate(
        "() => { const c = document.getElementById('lanes');"
        " return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length }"
    )
    assert painted > 500
    here.page.wait_for_timeout(3000)  # of a pass's many spans none is lost: it waits or computes nearly all of the time
    busy = dict(part.rsplit(" ", 1) for part in here.page.text_content("#busy").removeprefix("Busy: ").split(", "))
    assert int(busy["compute"].rstrip("%")) + int(busy["wait"].rstrip("%")) > 20
    here.page.click("#stop")
    assert "a pass" in here.page.text_content("#plan")


def test_stop_frees_the_place_and_keeps_the_text(visit: Any, url: str, session: Session) -> None:
    here = visit(url)
    here.ask("Write a long story about a fox.")
    here.page.wait_for_function("() => (document.querySelector('.said.assistant')?.textContent ?? '').length > 5")
    here.page.keyboard.press("Escape")
    wait_until(lambda: session.running == 0)
    assert "stopped" in here.page.text_content(".note")
    assert here.page.is_visible("#send")
    here.page.click("#new")
    assert here.page.query_selector(".said") is None


def test_markup_is_text(visit: Any, url: str) -> None:
    here = visit(url)
    here.ask("Repeat: <img src=x onerror=alert(1)><b>bold</b>")
    here.page.wait_for_selector(".note")
    assert here.page.query_selector("#talk img, #talk b") is None
    assert "<img src=x" in here.page.text_content(".said.user")
    assert here.complaints == []


def test_a_server_error_is_shown_and_the_question_restored(visit: Any, url: str) -> None:
    here = visit(url)
    here.page.evaluate("document.getElementById('most').value = 10000000")
    here.ask("Hello there")
    here.page.wait_for_selector(".note.bad")
    assert "fit: shorten" in here.page.text_content(".note.bad")
    assert here.page.input_value("#text") == "Hello there"


def test_a_server_with_a_key_is_asked_with_it(visit: Any, session: Session) -> None:
    with serving(session, keys=[SECRET]) as url:
        here = visit(url)
        here.page.wait_for_selector("#lock:not([hidden])")
        here.page.fill("#key", "wrong")
        here.page.press("#key", "Enter")
        assert here.page.query_selector("#plan tr") is None
        here.page.fill("#key", "secret")
        here.page.press("#key", "Enter")
        here.page.wait_for_selector("#plan tr")
        assert here.page.is_hidden("#lock")
        here.ask("What is the capital of France?")
        here.page.wait_for_selector(".note")
        assert "Paris" in here.page.text_content(".said.assistant")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1100, 720), (390, 800)])
def test_it_fits_a_screen_and_a_phone(visit: Any, url: str, size: tuple[int, int], scheme: str, tmp_path: Path) -> None:
    here = visit(url, viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    here.ask("Explain gravity.")
    here.page.wait_for_function("() => /\\d+%/.test(document.getElementById('busy').textContent)")
    width = here.page.evaluate("document.documentElement.scrollWidth")
    shots = Path(os.environ.get("RABBIT_SHOTS", tmp_path))
    here.page.screenshot(path=shots / f"page-{size[0]}-{scheme}.png")
    here.page.keyboard.press("Escape")
    assert width <= size[0]


def test_conversations_are_kept_in_the_browser(visit: Any, url: str) -> None:
    here = visit(url)
    here.ask("What is the capital of France?")
    here.page.wait_for_selector(".note")
    here.page.reload()
    here.page.wait_for_selector("#plan tr", state="attached")
    assert here.page.query_selector(".said") is None
    here.page.click("summary:has-text('Conversations')")
    here.page.click("#chats .open")
    assert "Paris" in here.page.text_content(".said.assistant")
    here.ask("And of Italy?")
    here.page.wait_for_function(
        "() => document.querySelectorAll('.said.assistant').length === 2 && document.querySelector('.note:last-child')"
    )
    assert len(here.page.query_selector_all("#chats li")) == 1
    here.page.click("#chats [aria-label^='Delete']")
    assert here.page.query_selector("#chats li") is None
    assert here.complaints == []


def test_a_model_is_chosen_among_several(visit: Any, session: Session) -> None:
    host = Host(["first", "second"], lambda _: nullcontext(session), default="second")
    with running(uvicorn.Server(uvicorn.Config(create_app(host), port=0, log_level="warning"))) as port:
        here = visit(f"http://127.0.0.1:{port}")
        here.page.wait_for_selector("#pick option", state="attached")
        assert here.page.input_value("#pick") == "second"
        assert "not loaded" in here.page.text_content("#plan")
        here.page.select_option("#pick", "first")
        here.ask("What is the capital of France?")
        here.page.wait_for_selector(".note")
        assert "Paris" in here.page.text_content(".said.assistant")
        assert [served.name for served in host.loaded] == ["first"]
        here.page.wait_for_function("() => /a pass/.test(document.getElementById('plan').textContent)")


def test_reasoning_and_tools_are_shown_and_results_go_back(visit: Any, url: str, session: Session, monkeypatch: Any) -> None:
    """The model says what a script says: its last layer is the model's own, its words are not."""
    script = iter(
        [
            "<think>It is about",
            " the weather.</think>",
            '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>',
        ]
    )
    push = TextFlow.push
    monkeypatch.setattr(TextFlow, "push", lambda self, token: next(script, "") if push(self, token) is not None else "")
    monkeypatch.setattr("rabbit_engine.sessions.thinking.MARKS", (("<think>", "</think>"),))
    monkeypatch.setattr(session.model.tokenizer, "chat_template", "{# </think> #}" + session.model.tokenizer.chat_template)
    here = visit(url)
    here.page.wait_for_selector("#plan tr", state="attached")
    here.page.evaluate("document.getElementById('most').value = 4")
    tools = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]'
    here.page.evaluate("(text) => { document.getElementById('tools').value = text }", tools)
    here.ask("How is the weather in Paris?")
    here.page.wait_for_selector(".call form")
    assert here.page.text_content(".thought div") == "It is about the weather."
    assert here.page.text_content(".call").startswith('weather({"city": "Paris"})')
    monkeypatch.undo()
    here.page.fill(".call input", "sunny")
    here.page.press(".call input", "Enter")
    here.page.wait_for_function("() => document.querySelectorAll('.said.assistant').length === 1")
    assert here.page.text_content(".note:has-text('result')") == "result: sunny"
    assert here.complaints == []


def test_an_image_is_attached_and_sent(visit: Any, tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "model")
    file = tmp_path / "image.png"
    file.write_bytes(as_bytes(picture()))
    with (
        AutoModelForImageTextToText.from_pretrained(folder, device="cpu") as model,
        Session(model) as session,
        serving(session) as url,
    ):
        here = visit(url)
        here.page.set_input_files("#file", file)
        here.page.wait_for_selector("#images img")
        here.page.evaluate("document.getElementById('most').value = 4")
        here.ask("w5 w6")
        here.page.wait_for_selector(".note")
        assert here.page.query_selector(".note.bad") is None
        assert here.page.get_attribute(".said.user img", "src").startswith("data:image/png;base64,")
        assert here.page.is_hidden("#images")
        assert here.complaints == []


def test_it_is_used_with_the_keyboard_alone(visit: Any, url: str) -> None:
    here = visit(url)
    here.page.wait_for_selector("#plan tr", state="attached")
    assert here.page.evaluate("document.activeElement.id") == "text"
    here.page.keyboard.type("What is the capital of France?")
    here.page.keyboard.press("Enter")
    here.page.wait_for_selector(".note")
    for control in here.page.query_selector_all("button:visible, input:visible, textarea:visible, select:visible"):
        named = control.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim()"
        )
        assert named, control.evaluate("e => e.outerHTML")
