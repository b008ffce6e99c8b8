"""Opens the report in Chromium: no network, no sideways scrolling, readable in both themes.

Run as a script: `python tests/report/browser.py [--keep FOLDER]`. Talks to the browser over its
debugging pipe, so nothing needs to be installed beside it. Where there is no Chromium, the tests
of the page's structure and contrast run alone and the omission is printed.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.report.sample import RECORDS  # noqa: E402

from excise.record.comparison import compare  # noqa: E402
from excise.report import comparison  # noqa: E402
from excise.report.page import render_html  # noqa: E402

COMPARED = {
    "compared": ("many",),
    "compared-apart": ("full", "many", "hostile"),
}
"""Pages of `excise compare`: one ranking, and records that were not measured alike."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
VIEWS = {"phone": (360, 780), "mobile": (390, 844), "desktop": (1280, 900)}

PROBE = """(() => {
  const out = [], wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) out.push(
    'the page scrolls sideways: ' + document.documentElement.scrollWidth + ' > ' + wide);
  for (const e of document.querySelectorAll('main *')) {
    const box = e.getBoundingClientRect();
    const inside = e.closest('.scroll, pre, .hidden, svg, details:not([open])');
    if (box.right > wide + 1 && box.width && !inside)
      out.push('too wide: ' + e.tagName + '.' + e.className);
  }
  for (const e of document.querySelectorAll('.scroll, pre')) {
    if (e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0) out.push('cannot be scrolled by key');
  }
  if (document.querySelector('main img, main script, main iframe')) out.push('injected');
  if (document.querySelectorAll('script').length !== 1) out.push('more than one script');
  JSON.parse(document.getElementById('record').textContent);
  return [...new Set(out)];
})()"""

CONTRAST = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; }
    return [255, 255, 255]; };
  const bad = new Set(); let worst = 99;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; (n = walk.nextNode());) {
    const e = n.parentElement;
    if (!n.data.trim() || e.closest('script, style, title, desc')) continue;
    const style = getComputedStyle(e), svg = e.closest('svg');
    const a = lum(parse(svg ? style.fill : style.color)), b = lum(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    worst = Math.min(worst, ratio);
    const name = e.tagName + '.' + (e.className.baseVal ?? e.className);
    if (ratio < 4.5) bad.add(name + ' ' + ratio.toFixed(2));
  }
  return {worst, bad: [...bad]};
})()"""


class Chrome:
    """One headless browser on its debugging pipe."""

    def __init__(self, binary: str, profile: str) -> None:
        """Start `binary` with a fresh profile; it reads commands from fd 3 and answers on fd 4."""
        down, self.up = os.pipe()
        self.down, up = os.pipe()
        reader, writer = (fcntl.fcntl(f, fcntl.F_DUPFD, 20) for f in (down, up))

        def place() -> None:
            os.dup2(reader, 3)
            os.dup2(writer, 4)

        self.process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (down, up, reader, writer):
            os.close(end)
        self.buffer, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\0" not in self.buffer:
            chunk = os.read(self.down, 1 << 16)
            if not chunk:
                raise RuntimeError("chromium ended")
            self.buffer += chunk
        head, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(head)
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.up, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str, width: int, height: int, scheme: str) -> None:
        """Load a page at a size, in a colour scheme."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="screen", features=features)
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def value(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press one key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9
            )

    def shot(self, path: Path, whole: bool) -> None:
        """Write a screenshot of the window, or of the whole page."""
        extra: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            extra = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        data = self.call("Page.captureScreenshot", format="png", **extra)["data"]
        path.write_bytes(base64.b64decode(data))

    def requests(self) -> list[str]:
        """Return every address the page asked for beside itself and inline data."""
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [u for u in asked[1:] if not u.startswith("data:")]

    def complaints(self) -> list[str]:
        """Return what the browser logged: errors, warnings, exceptions."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [json.dumps(e["params"])[:300] for e in self.events if e.get("method") in kinds]


@contextmanager
def chrome(binary: str) -> Iterator[Chrome]:
    """Yield a browser with a throw-away profile, and end it afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Chrome(binary, profile)
        try:
            yield browser
        finally:
            os.close(browser.up)
            try:
                browser.process.wait(10)
            except subprocess.TimeoutExpired:
                browser.process.kill()
                browser.process.wait()
            os.close(browser.down)


def look(browser: Chrome, name: str, page: Path, keep: Path) -> list[str]:
    """Look at one page in every size and theme; return what is wrong with it."""
    wrong = []
    for view, (width, height) in VIEWS.items():
        for scheme in ("light", "dark"):
            browser.open(page.as_uri(), width, height, scheme)
            where = f"{name} {view} {scheme}"
            wrong += [f"{where}: {w}" for w in browser.value(PROBE)]
            wrong += [f"{where}: asked for {u}" for u in browser.requests()]
            wrong += [f"{where}: {c}" for c in browser.complaints()]
            browser.shot(keep / f"{name}-{view}-{scheme}.png", whole=True)
            browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            wrong += [f"{where}, opened: {w}" for w in browser.value(PROBE)]
            found = browser.value(CONTRAST)
            wrong += [f"{where}: contrast {b}" for b in found["bad"]]
            wrong += [] if found["worst"] < 21.1 else [f"{where}: no text was seen"]
    browser.press("Tab")
    if browser.value("document.activeElement.className") != "skip":
        wrong.append(f"{name}: the first Tab does not reach the skip link")
    browser.call("Emulation.setEmulatedMedia", media="print")
    data = browser.call("Page.printToPDF", printBackground=False)["data"]
    (keep / f"{name}.pdf").write_bytes(base64.b64decode(data))
    return wrong


def main() -> int:
    """Run the browser test and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for pages, screenshots and prints")
    options = parser.parse_args()
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        print("no chromium here: no screenshots; structure and contrast are tested alone")
        tests = str(Path(__file__).with_name("test_page.py"))
        return subprocess.run([sys.executable, "-m", "pytest", "-q", tests], cwd=ROOT).returncode
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, chrome(binary) as browser:
        keep = (options.keep or Path(scratch)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        pages = {name: render_html(make()) for name, make in RECORDS.items()}
        for name, records in COMPARED.items():
            rows = compare({each: RECORDS[each]() for each in records})
            pages[name] = comparison.render_html(rows)
        for name, html in pages.items():
            page = keep / f"{name}.html"
            page.write_text(html, encoding="utf-8")
            wrong += look(browser, name, page, keep)
    print("\n".join(wrong) or f"{len(pages)} pages in {2 * len(VIEWS)} views each: nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
