"""The page of `vpci layout show --html` in a real browser, which lays it out and measures it; no picture is compared.

Where none can be had (tests/browser.py) the test is skipped.
"""

from __future__ import annotations

import itertools
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, find
from tests.check import layouts
from vpci.cli import main
from vpci.guest import ProvisionError

#: In CSS pixels: a desktop and a telephone.
WIDTHS = (1400, 500)
SCHEMES = {"light": 1, "dark": 0}
#: Put behind the page: what a person would see to be wrong, as numbers.
MEASURE = """<pre id="found"></pre><script>
const boxes = [...document.querySelectorAll("svg g")].filter(g => g.querySelector(":scope > rect"));
const over = boxes.flatMap(g => {
  const box = g.querySelector("rect").getBBox();
  return [...g.querySelectorAll("text")].map(t => [t.textContent, t.getBBox()])
    .filter(([words, t]) => words && (t.x + t.width > box.x + box.width + 1 || t.x < box.x - 1)).map(([words]) => words);
});
const outside = [...document.querySelectorAll("svg")].flatMap(svg => [...svg.querySelectorAll("text")]
  .filter(t => { const b = t.getBBox(); return b.x < 0 || b.x + b.width > svg.viewBox.baseVal.width + 1; })
  .map(t => t.textContent));
const heights = boxes.filter(g => /bytes? at \\d+,/.test(g.querySelector("title").textContent))
  .map(g => [g.querySelector("title").textContent, g.querySelector("rect").getBoundingClientRect().height]);
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(v => Math.pow(v / 255, 2.2));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const back = getComputedStyle(document.body).backgroundColor;
const paper = back === "rgba(0, 0, 0, 0)" ? "rgb(255, 255, 255)" : back;
const contrast = Math.min(...[...document.querySelectorAll("p, td, th, h1, h2")].map(e =>
  ratio(light(getComputedStyle(e).color), light(paper))));
document.getElementById("found").textContent = JSON.stringify({over, outside, heights, contrast,
  wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  least: Math.min(...[...document.querySelectorAll("svg text")].filter(t => t.textContent)
    .map(t => t.getBoundingClientRect().height))});
</script>"""


@pytest.fixture(scope="module")
def browser() -> Browser:
    try:
        return find()
    except ProvisionError as error:
        pytest.skip(f"no browser: {error}")


def measured(browser: Browser, page: Path, width: int, scheme: str) -> dict[str, Any]:
    """What the browser makes of the page."""
    probe = page.with_suffix(".probe.html")
    probe.write_text(page.read_text() + MEASURE)
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1000", "--dump-dom"]
    words += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", probe.as_uri()]
    done = browser.run(*words, home=page.parent)
    hit = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert hit, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(hit[1]))
    return found


@pytest.mark.parametrize("layout", ["built-in", "proposal"])
def test_a_browser_shows_every_register_to_scale_and_legibly(
    browser: Browser, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word leaves its box, the page is not wider than the window, letters are large and dark enough, bytes equal."""
    monkeypatch.chdir(tmp_path)
    Path("blk.toml").write_text('[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "8M"\n')
    Path("own.toml").write_text(layouts.conditional(26, "offered"))
    words = [] if layout == "built-in" else ["--layout", "own.toml", "--set", "features.offer=[26]"]
    assert main(["layout", "show", "blk.toml", *words, "--html", "blk.html"]) == 0
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        check(measured(browser, tmp_path / "blk.html", width, scheme))


def check(found: dict[str, Any]) -> None:
    assert (found["over"], found["outside"], found["wider"]) == ([], [], 0)
    assert found["least"] >= 9, "the smallest letters, in pixels"
    assert found["contrast"] >= 4.5, "of text on paper, as WCAG 2 asks for it"
    heights = {(int(hint.split(": ")[1].split()[0]), high) for hint, high in found["heights"]}
    assert len({high / count for count, high in heights}) == 1, heights
    assert {count for count, _ in heights} >= {1, 2, 4}
