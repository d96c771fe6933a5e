"""The page in a real browser: headless Chromium, driven by its own driver."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from jaxserve.server.tls import TlsFiles
from tests.security.certificates import issue, make_ca
from tests.security.keys import KEYS, keyed_service, write_keys
from tests.server.scripted_service import Service, start_service, text_from

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE_S = 60
NO_VALUE = "\N{EN DASH}"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None,
        reason="needs the commands chromium and chromedriver (Debian: chromium, chromium-driver)",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = Options()
    options.binary_location = str(CHROMIUM)
    options.accept_insecure_certs = True  # The test's own CA.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to have one as root.
    driver = webdriver.Chrome(options=options, service=Driver(CHROMEDRIVER))
    driver.set_page_load_timeout(PATIENCE_S)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def plain() -> Iterator[Service]:
    service = start_service()
    service.make_ready()
    yield service
    service.close()


@pytest.fixture
def page(browser: WebDriver, plain: Service) -> WebDriver:
    plain.executor.step_s, plain.executor.script = 0.0, None
    browser.get(f"{plain.http_url}/")
    return browser


def find(page: WebDriver, name: str):
    return page.find_element(By.ID, name)


def until(page: WebDriver, condition) -> None:
    WebDriverWait(page, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())


def say(page: WebDriver, text: str, *, max_tokens: int = 20) -> None:
    field = find(page, "max-tokens")
    field.clear()
    field.send_keys(str(max_tokens))
    find(page, "prompt").send_keys(text, Keys.ENTER)


def answers(page: WebDriver) -> list[str]:
    return [turn.text for turn in page.find_elements(By.CSS_SELECTOR, ".turn p:first-of-type")]


def figures(page: WebDriver) -> list[str]:
    return [line.text for line in page.find_elements(By.CSS_SELECTOR, ".figures")]


def problems(page: WebDriver) -> list[str]:
    """What the browser's console complains about, refusals of the policy among it."""
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def chart_values(page: WebDriver) -> dict[str, str]:
    rows = page.execute_script(
        "return [...document.querySelectorAll('figure dl div')].map((row) => ["
        "row.closest('figure').querySelector('figcaption').textContent,"
        "row.querySelector('dt').textContent, row.querySelector('dd').textContent])"
    )
    return {f"{title} {name}": value for title, name, value in rows}


def test_a_conversation_streams_and_goes_on(page, plain):
    assert page.title == "jaxserve"
    say(page, "hello", max_tokens=9)
    until(page, lambda: len(figures(page)) == 1)
    prompt = "<user>hello<assistant>"
    first = text_from(len(prompt), 9)
    assert answers(page) == ["hello", first]
    assert re.match(r"9 tokens, first after \d+ ms, [\d.e+]+ tokens a second$", figures(page)[0])
    say(page, "and?", max_tokens=5)
    until(page, lambda: len(figures(page)) == 2)
    prompt = f"<user>hello<assistant>{first}<user>and?<assistant>"
    assert answers(page)[2:] == ["and?", text_from(len(prompt), 5)]
    find(page, "clear").click()
    assert answers(page) == []
    assert problems(page) == []


def test_what_a_model_says_stays_text(page, plain):
    attack = "<img src=x onerror=\"document.title='broken'\"><script>document.title='x'</script>"
    plain.will_say(attack)
    say(page, "<b>bold</b>", max_tokens=200)
    until(page, lambda: len(figures(page)) == 1)
    assert answers(page) == ["<b>bold</b>", attack]
    assert page.find_elements(By.CSS_SELECTOR, "#turns img, #turns script, #turns b") == []
    assert page.title == "jaxserve"
    # And if it were to become markup, the browser would refuse that.
    assert page.execute_script(
        "try { document.body.innerHTML = '<p>x</p>'; return 'taken' } catch { return 'refused' }"
    ) == "refused"  # fmt: skip
    assert "TrustedHTML" in str(problems(page))


def test_stop_ends_the_request_on_the_server(page, plain):
    plain.executor.step_s = 0.1
    for stop in (
        lambda: find(page, "stop").click(),
        lambda: find(page, "prompt").send_keys(Keys.ESCAPE),
    ):
        say(page, "go on", max_tokens=450)
        until(page, lambda: plain.num_streams() == 1 and len(answers(page)[-1]) > 3)
        assert not find(page, "send").is_enabled()
        stop()
        until(page, lambda: figures(page)[-1:] == ["stopped"])
        plain.assert_idle(PATIENCE_S)
        assert find(page, "send").is_enabled()
        find(page, "clear").click()


def test_charts_show_the_load(page, plain):
    plain.executor.step_s = 0.1
    until(page, lambda: chart_values(page).get("Requests running") == "0")
    say(page, "go on", max_tokens=400)
    until(page, lambda: chart_values(page)["Requests running"] == "1")
    until(page, lambda: chart_values(page)["Tokens a second output"] not in ("0", NO_VALUE))
    until(page, lambda: chart_values(page)["Time between tokens P50"].endswith(" ms"))
    until(page, lambda: chart_values(page)["KV cache used"] not in ("0 %", NO_VALUE))
    assert "script (llama), ready" in find(page, "server").text
    inked = page.execute_script(
        "const c = document.querySelectorAll('canvas')[1];"
        "const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(new Uint32Array(data.buffer)).size"
    )
    assert inked > 3, "nothing is drawn but the frame"
    find(page, "stop").click()
    plain.assert_idle(PATIENCE_S)
    assert problems(page) == []


def test_a_refusal_is_told_and_the_question_kept(page):
    page.execute_script("arguments[0].value = 'x'.repeat(600)", find(page, "prompt"))
    find(page, "prompt").send_keys(Keys.ENTER)
    until(page, lambda: find(page, "error").is_displayed())
    assert "tokens" in find(page, "error").text
    assert find(page, "prompt").get_attribute("value") == "x" * 600
    assert answers(page) == []


def test_it_works_by_keyboard_alone_and_in_the_dark(page):
    names = []
    page.execute_script("document.activeElement.blur()")
    for _ in range(9):
        page.switch_to.active_element.send_keys(Keys.TAB)
        names.append(page.switch_to.active_element.get_attribute("id"))
    wanted = ["", "turns", "prompt", "send", "clear", "temperature", "max-tokens", "api-key"]
    assert names[: len(wanted)] == wanted
    grounds = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        script = "return getComputedStyle(document.body).backgroundColor"
        grounds.append(page.execute_script(script))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 22, 28)"]


def test_with_keys_and_tls(browser, tmp_path):
    server = issue("localhost", make_ca("test CA")).write(tmp_path, "server")
    keys = write_keys(tmp_path / "keys.toml", alpha={"roles": ["inference", "metrics"]})
    service = keyed_service(keys, tls=TlsFiles(*server))
    try:
        browser.get(f"https://127.0.0.1:{service.server.http_port}/")
        until(browser, lambda: "an API key is needed" in find(browser, "load-note").text)
        say(browser, "hello")
        until(browser, lambda: "an API key is needed" in find(browser, "error").text)
        find(browser, "api-key").send_keys(KEYS["beta"], Keys.TAB)
        until(browser, lambda: "role metrics" in find(browser, "load-note").text)
        find(browser, "api-key").clear()
        find(browser, "api-key").send_keys(KEYS["alpha"], Keys.TAB)
        until(browser, lambda: chart_values(browser).get("Requests running") == "0")
        find(browser, "prompt").send_keys(Keys.ENTER)
        until(browser, lambda: len(figures(browser)) == 1)
        assert answers(browser)[0] == "hello"
        stored = "return [localStorage.length, sessionStorage.length, document.cookie]"
        assert browser.execute_script(stored) == [0, 0, ""]
        browser.refresh()
        assert find(browser, "api-key").get_attribute("value") == ""
    finally:
        browser.get("about:blank")
        service.close()
