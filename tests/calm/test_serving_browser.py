"""The playground in headless Chromium, as `make test-browser` runs it."""

import shutil
import time

import pytest
from serving_cases import FIELDS, client_of, running, served, until
from tiny_models import tiny_baseline

from calm.serving.app import Access

pytest.importorskip("selenium", reason="needs selenium: make test-browser")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.browser

PROMPT = "Returns the "
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900")
ASKED = {
    "model": "calm", "prompt": PROMPT, "max_tokens": 22, "seed": 3, "temperature": 0.5,
    "calm": {"method": "batch", "num_samples": 20, "candidates": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs chromium and chromedriver: make test-browser")
    options = ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, ChromeService(driver)) as browser:
        yield browser


@pytest.fixture(scope="module")
def models():
    return [served("base", tiny_baseline(**FIELDS, max_position_embeddings=96)), served()]


@pytest.fixture(scope="module")
def url(models):
    with running(models) as url:
        yield url


@pytest.fixture
def page(browser, url):
    """The page after it has asked for the models; what it shows no error of a policy."""
    browser.get_log("browser")
    page = Page(browser, url)
    page.until(lambda: page.one("#served").text == "served: base, calm")
    yield page
    assert not [line for line in browser.get_log("browser") if "Content Security" in str(line)]


class Page:
    """What a person does with the page."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        browser.get(url)
        self.until(lambda: self.all(".column"))  # the script has run

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        (element,) = self.all(selector)
        return element

    def until(self, condition):
        return WebDriverWait(self.browser, 60, 0.05).until(lambda _: condition())

    def fill(self, name, value):
        """Type into a field, in place of what it holds."""
        self.one(f"#{name}").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, str(value))

    def slide(self, name, steps):
        self.one(f"#{name}").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * steps)

    def keys(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def ask(self, tokens=22):
        """Fill the form as in `ASKED`, and press Ctrl and Enter."""
        self.fill("prompt", PROMPT)
        self.slide("temperature", 10)
        self.slide("samples", 4)
        self.fill("tokens", tokens)
        self.fill("seed", 3)
        self.one("#seed").send_keys(Keys.CONTROL, Keys.ENTER)
        self.until(lambda: self.one("#write").is_enabled() and not self.one("#stop").is_enabled())

    def text(self, column):
        chunks = self.all(f".column:nth-child({column}) .chunk")
        return [chunk.get_attribute("textContent") for chunk in chunks]

    @property
    def focused(self):
        return self.browser.switch_to.active_element


def reply_of(url, **change):
    with client_of(url) as client:
        return client.post("/v1/completions", json={**ASKED, **change}).json()


def test_two_models_write_side_by_side(page):
    page.ask()
    choice = reply_of(page.url)["choices"][0]
    assert "".join(page.text(1)) == choice["text"] and len(page.text(1)) == 6
    other = reply_of(page.url, model="base")["choices"][0]
    assert "".join(page.text(2)) == other["text"]
    assert len(page.text(2)) == other["calm"]["chunks"]
    figures = [element.text for element in page.all(".figures")]
    assert figures[0].endswith("22 tokens · 6 chunks · 120 draws · seed 3 · cut at its length")
    assert all("tokens/s" in line for line in figures) and "draws" not in figures[1]
    given = page.all(".given")
    assert [element.get_attribute("textContent") for element in given] == [PROMPT] * 2


def test_the_candidates_of_a_chunk_stand_beside_it(page):
    page.ask()
    votes = reply_of(page.url)["choices"][0]["calm"]["votes"]
    panel, chunks = page.one("#vote"), page.all(".column:first-child .chunk")
    assert not panel.is_displayed()
    for number in (1, 4):
        ActionChains(page.browser).move_to_element(chunks[number - 1]).perform()
        page.until(panel.is_displayed)
        assert page.one("#vote .title").text.startswith(f"chunk {number} 4 tokens · 20 draws")
        counts = [int(element.text) for element in page.all("#vote .count")]
        vote = votes[number - 1]
        expected = [candidate["count"] for candidate in vote["candidates"]]
        assert counts == [*expected, *filter(None, [vote["others"]])] and sum(counts) == 20
        chosen = [candidate["is_chosen"] for candidate in vote["candidates"]]
        shown = [row.get_attribute("class") == "chosen" for row in page.all("#vote li")]
        assert shown[: len(chosen)] == chosen
    ActionChains(page.browser).move_to_element(page.one("h1")).perform()
    page.until(lambda: not panel.is_displayed())


def test_all_of_it_works_with_the_keyboard(page):
    page.ask()
    page.one(".column:first-child .model").send_keys(Keys.TAB)
    chunks, panel = page.all(".column:first-child .chunk"), page.one("#vote")
    assert page.focused == chunks[0] and panel.is_displayed()
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert page.focused == chunks[1] and page.one("#vote strong").text == "chunk 2"
    page.keys(Keys.ESCAPE)
    assert not panel.is_displayed()
    page.keys(Keys.TAB)
    assert page.focused == page.all(".model")[1]


def test_escape_stops_both_texts(page, models, monkeypatch):
    for model in models:
        step = model.lane.slots.step
        monkeypatch.setattr(model.lane.slots, "step", lambda step=step: time.sleep(0.2) or step())
    page.fill("tokens", 60)
    page.slide("samples", 4)
    page.keys(Keys.TAB, Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text(1) and page.text(2))
    assert not any(element.is_enabled() for element in page.all(".model"))
    page.keys(Keys.NULL, Keys.ESCAPE)
    page.until(lambda: page.one("#write").is_enabled())
    assert all(element.is_enabled() for element in page.all(".model"))
    assert all(element.text.endswith(" · stopped") for element in page.all(".figures"))
    assert not any(element.is_displayed() for element in page.all(".error[role]"))
    until(lambda: not any(model.lane.num_texts for model in models))


def test_errors_are_shown_as_they_are(page):
    page.ask(tokens=120)
    for model, element in zip(("calm", "base"), page.all(".error[role]"), strict=True):
        error = reply_of(page.url, model=model, max_tokens=120)["error"]
        message, details = element.text.split("\n")
        assert message == error["message"] and "the prompt has 12" in message
        assert details == (
            "status 400, type: invalid_request_error, param: prompt, code: context_length_exceeded"
        )
    page.ask()
    assert not any(element.is_displayed() for element in page.all(".error[role]"))


def test_the_key_is_asked_for_and_sent(browser):
    with running([served()], Access(api_key="secret")) as url:
        page = Page(browser, url)
        error = page.one(".column:first-child .error")
        page.until(error.is_displayed)
        assert error.text.startswith("this server needs its API key") and "401" in error.text
        assert page.focused == page.one("#key") and not page.one("#write").is_enabled()
        page.keys("secret", Keys.ENTER)
        page.until(lambda: page.one("#served").text == "served: calm")
        page.ask()
        assert len(page.text(1)) == 6 and page.text(2) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(page, scheme):
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3), on the ground that each text stands on."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    grounds = {"#served": "body", ".figures": ".column", ".prompt label": "#request",
               "#prompt": "#prompt", "#write": "#write", ".error[role]": ".error[role]",
               ".note": "body"}  # fmt: skip
    for selector, ground in grounds.items():
        ink = luminance(page.all(selector)[0].value_of_css_property("color"))
        paper = luminance(page.all(ground)[0].value_of_css_property("background-color"))
        assert (ink > paper) == ((scheme == "dark" and selector != "#write") or
                                 (scheme == "light" and selector == "#write"))  # fmt: skip
        light, dark = max(ink, paper), min(ink, paper)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, scheme)


def luminance(colour):
    """Relative luminance of a colour `rgba(r, g, b, a)` or `rgb(r, g, b)`."""
    numbers = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [n / 12.92 if n <= 0.04045 else ((n + 0.055) / 1.055) ** 2.4 for n in numbers]
    return sum(w * n for w, n in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
