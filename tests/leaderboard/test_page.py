"""The web page in a browser (Debian's chromium and chromium-driver): sorting, filters, tooltips, themes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_reports import CLIP_TASKS, accuracies, write_run
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from fusion_bench_smile.leaderboard import Skipped, leaderboard, page
from fusion_bench_smile.leaderboard.boards import ASCENDING

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tmp_path) -> webdriver.Chrome:
    """The page of two boards, one of them with published rows."""
    write_run(tmp_path, "individual", 90, 70, 800, kind="individual")
    write_run(tmp_path, "TIES <b>λ</b>", 60, 40)
    for k in (8, 32):
        write_run(tmp_path, f"SMILE (gate_k=4, k={k})", 60 + k, 50, 100 + k)
    scores = accuracies(**dict.fromkeys(CLIP_TASKS, 80.0))
    pool = "CLIPVisionModelPool/clip-vit-base-patch32_TA8"
    write_run(tmp_path, "ours", 0, 0, 150, tasks=scores, modelpool=pool, benchmark="CLIP", retention=88.0)
    boards, _ = leaderboard([tmp_path])
    skipped = [Skipped(Path("broken"), "it can't be read: </script><script>alert(1)</script>")]
    file = tmp_path / "page.html"
    file.write_text(page(boards, skipped, "Title & more"))
    browser.set_window_size(1200, 900)
    browser.get(file.as_uri())
    yield browser
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def board(browser: webdriver.Chrome, number: int) -> WebElement:
    return browser.find_elements(By.TAG_NAME, "section")[number]


def methods(section: WebElement) -> list[str]:
    return [cell.text for cell in section.find_elements(By.CSS_SELECTOR, "tbody tr td:first-child")]


def header(section: WebElement, key: str) -> WebElement:
    return section.find_element(By.CSS_SELECTOR, f'th[data-key="{key}"]')


@needs_browser
def test_sorting(opened):
    small = board(opened, 1)
    assert methods(small) == ["individual", "SMILE (gate_k=4, k=32)", "SMILE (gate_k=4, k=8)", "TIES <b>λ</b>"]
    assert header(small, "average").get_attribute("aria-sort") == "descending"
    header(small, "parameters").find_element(By.TAG_NAME, "button").click()
    assert methods(small) == ["TIES <b>λ</b>", "SMILE (gate_k=4, k=8)", "SMILE (gate_k=4, k=32)", "individual"]
    assert header(small, "parameters").get_attribute("aria-sort") == "ascending"
    assert header(small, "average").get_attribute("aria-sort") == "none"
    header(small, "parameters").find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)  # by keyboard, the other way
    assert methods(small)[0] == "individual"
    header(small, "method").find_element(By.TAG_NAME, "button").click()
    assert methods(small)[0] == "individual"


@needs_browser
def test_bytes_are_sorted_ascending_without_a_best_cell(browser, tmp_path):
    write_run(tmp_path, "large", 60, 40, 150, bytes=600, pretrained_bytes=400)
    write_run(tmp_path, "small", 50, 30, 150, bytes=500, pretrained_bytes=400)
    file = tmp_path / "page.html"
    file.write_text(page(*leaderboard([tmp_path])))
    browser.get(file.as_uri())
    (section,) = browser.find_elements(By.TAG_NAME, "section")
    assert methods(section) == ["large", "small"]
    header(section, "bytes").find_element(By.TAG_NAME, "button").click()
    assert header(section, "bytes").get_attribute("aria-sort") == "ascending"
    assert methods(section) == ["small", "large"]
    best = {cell.text for cell in section.find_elements(By.CSS_SELECTOR, ".best")}
    assert best == {"60.0", "40.0", "50.0"}  # the tasks and the average


@needs_browser
def test_enormous_scores_leave_room_for_the_others(browser, tmp_path):
    write_run(tmp_path, "usual", 60, 40, 150)
    write_run(tmp_path, "enormous", 0, 0, 150, tasks=accuracies(a=1e300, b=1.0))
    file = tmp_path / "page.html"
    file.write_text(page(*leaderboard([tmp_path])))
    browser.get(file.as_uri())
    (section,) = browser.find_elements(By.TAG_NAME, "section")
    assert "1.00e+300" in [cell.text for cell in section.find_elements(By.CSS_SELECTOR, "tbody td")]
    assert len(section.find_elements(By.CSS_SELECTOR, ".point")) == 1


@needs_browser
def test_filtering(opened):
    count = opened.find_element(By.ID, "count")
    assert count.text == "27 of 27 rows"
    box = opened.find_element(By.ID, "filter")
    box.send_keys("smile K=8")
    assert methods(board(opened, 1)) == ["SMILE (gate_k=4, k=8)"]
    assert len(board(opened, 1).find_elements(By.CSS_SELECTOR, ".point")) == 1
    assert count.text == "1 of 27 rows"
    box.clear()
    box.send_keys("x", Keys.BACKSPACE)
    opened.find_element(By.ID, "published").click()
    assert methods(board(opened, 0)) == ["ours"]
    assert count.text == "5 of 27 rows"


@needs_browser
def test_published_rows_are_marked(opened):
    rows = board(opened, 0).find_elements(By.CSS_SELECTOR, "tr.published")
    assert len(rows) == 22
    assert all("†" in row.text for row in rows)
    assert not any(row.find_elements(By.CSS_SELECTOR, ".best") for row in rows)
    header(board(opened, 0), "method").find_element(By.TAG_NAME, "button").click()
    assert methods(board(opened, 0))[0] == "ours"  # however the table is sorted
    assert len(board(opened, 0).find_elements(By.CSS_SELECTOR, ".point")) == 1


@needs_browser
def test_hover_and_focus_show_the_run(opened):
    tip = opened.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    point = next(
        p for p in board(opened, 1).find_elements(By.CSS_SELECTOR, ".point") if "k=32" in p.get_attribute("aria-label")
    )
    ActionChains(opened).move_to_element(point).perform()
    assert tip.is_displayed()
    assert "SMILE (gate_k=4, k=32)" in tip.text
    assert "average 71.0, retention 88.8, parameters 1.32×" in tip.text
    highlighted = board(opened, 1).find_elements(By.CSS_SELECTOR, "tr.highlighted td:first-child")
    assert [cell.text for cell in highlighted] == ["SMILE (gate_k=4, k=32)"]
    ActionChains(opened).move_to_element(opened.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    first = board(opened, 1).find_element(By.CSS_SELECTOR, ".point")
    opened.execute_script("arguments[0].focus()", first)
    assert tip.is_displayed()
    opened.switch_to.active_element.send_keys(Keys.TAB)
    assert opened.switch_to.active_element.get_attribute("aria-label") != first.get_attribute("aria-label")
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


@needs_browser
def test_light_and_dark(opened):
    def background() -> str:
        return opened.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    light = background()
    opened.find_element(By.ID, "theme").click()
    assert background() != light
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    opened.refresh()
    dark = background()
    assert dark != light
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_a_phone_scrolls_the_table_not_the_page(opened):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    opened.refresh()
    page_width = opened.execute_script("return document.documentElement.scrollWidth")
    table = board(opened, 0).find_element(By.CSS_SELECTOR, ".scroll")
    assert page_width <= 360
    assert table.get_property("scrollWidth") > table.get_property("clientWidth")
    opened.execute_script("arguments[0].scrollLeft = 200", table)
    first = board(opened, 0).find_element(By.CSS_SELECTOR, "tbody td")
    assert first.rect["x"] < 30  # the names stay in sight
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_texts_are_texts(opened):
    assert opened.title == "Title & more"
    assert not opened.find_elements(By.CSS_SELECTOR, "td b")
    opened.find_element(By.TAG_NAME, "summary").click()
    assert "</script><script>alert(1)" in opened.find_element(By.TAG_NAME, "details").text


@needs_browser
def test_a_screenshot(opened, tmp_path):
    assert opened.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_the_page_loads_nothing(tmp_path):
    write_run(tmp_path, "one", 1, 2)
    text = page(*leaderboard([tmp_path]))
    ascending = re.search(r"ASCENDING = new Set\((\[.*\])\)", text)
    assert json.loads(ascending[1]) == list(ASCENDING)  # the page sorts as the tables do
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "src=" not in text
