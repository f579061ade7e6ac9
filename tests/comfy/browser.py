"""ComfyUI's real page in headless Chromium. Runs in an interpreter that has Playwright.

    drop URL SCREENSHOT.png WORKFLOW.json...  drop workflows on the page, queue each, wait for its picture
    build URL DESCRIPTIONS.json FOLDER        described workflows to their files, by the page's own functions

Prints one JSON object.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from browser_names import BROWSERS
from playwright.sync_api import Page, sync_playwright

READY = """() => window.app?.graph && window.app.extensionManager
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"""
DROP = """([name, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("#graph-canvas");
    for (const type of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}"""
DONE = """() => app.graph.nodes.every((node) => node.type !== "SaveImage" || node.imgs?.length)
    || document.querySelector(".p-dialog, .p-toast-message-error")"""
STATE = """() => ({
    nodes: app.graph.nodes.map((node) => node.type),
    missing: app.graph.nodes.map((node) => node.type)
        .filter((type) => !(type in LiteGraph.registered_node_types)),
    alerts: ["error", "warn"].flatMap((kind) => [...document.querySelectorAll(`.p-toast-message-${kind}`)])
        .map((e) => e.innerText),
    dialogs: [...document.querySelectorAll(".p-dialog")].map((e) => e.innerText.slice(0, 300)),
    images: app.graph.nodes.filter((node) => node.imgs?.length).map((node) => node.type),
})"""
BUILD = """({name, prompt, places, titles, groups, note, note_place}) => {
    app.loadApiJson(prompt, name);
    for (const node of app.graph.nodes) {
        const [x, y, width, height] = places[node.id];
        node.pos = [x, y];
        node.setSize([width, height]);
        node.title = titles[node.id] ?? node.title;
    }
    const markdown = LiteGraph.createNode("MarkdownNote");
    markdown.widgets[0].value = note;
    markdown.title = "About this workflow";
    app.graph.add(markdown);
    markdown.pos = note_place.slice(0, 2);
    markdown.setSize(note_place.slice(2));
    for (const [title, [x, y, width, height]] of Object.entries(groups)) {
        const group = new LiteGraph.LGraphGroup(title);
        group.pos = [x, y];
        group.size = [width, height];
        app.graph.add(group);
    }
    return JSON.stringify(app.graph.serialize());
}"""


def open_page(page: Page, url: str) -> None:
    """Open the page and wait until its node types are there."""
    page.request.post(
        f"{url}/settings/Comfy.TutorialCompleted", data="true", headers={"Content-Type": "application/json"}
    )
    page.goto(url, wait_until="domcontentloaded", timeout=180_000)
    page.wait_for_function(READY, timeout=180_000)
    page.wait_for_timeout(2000)


def drop(page: Page, workflows: list[Path], screenshot: Path) -> dict[str, Any]:
    """Drop workflows on the page, press Run, wait for their pictures, and return what the page shows."""
    return {path.stem: _drop(page, path, screenshot) for path in workflows}


def _drop(page: Page, workflow: Path, screenshot: Path) -> dict[str, Any]:
    text = workflow.read_text(encoding="utf-8")
    page.evaluate("() => { app.clean(); app.graph.clear(); }")  # also what earlier runs left on node numbers
    page.evaluate(DROP, [workflow.name, text])
    page.wait_for_function(
        "(count) => app.graph.nodes.length === count", arg=len(json.loads(text)["nodes"]), timeout=60_000
    )
    page.wait_for_timeout(1000)
    loaded = page.evaluate(STATE)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function(DONE, timeout=600_000)
    page.wait_for_timeout(1500)
    page.evaluate(
        "() => { app.canvas.fitViewToSelectionAnimated?.(); app.graph.setDirtyCanvas(true, true); }"
    )
    page.wait_for_timeout(1500)
    page.screenshot(path=str(screenshot))
    return {"loaded": loaded, "finished": page.evaluate(STATE)}


def build(page: Page, descriptions: Path, folder: Path) -> dict[str, Any]:
    """Write the UI form of described workflows into a folder."""
    for described in json.loads(descriptions.read_text(encoding="utf-8")):
        text = page.evaluate(BUILD, described)
        path = folder / f"{described['name']}.json"
        path.write_text(json.dumps(json.loads(text), indent=1) + "\n", encoding="utf-8")
    return dict(page.evaluate(STATE))


def main() -> int:
    """Run one of the two actions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("drop", "build"))
    parser.add_argument("url")
    parser.add_argument("first", type=Path)
    parser.add_argument("more", type=Path, nargs="+")
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print("no Chromium or Chrome is on the PATH", file=sys.stderr)
        return 3
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1600, "height": 900})
        open_page(page, options.url)
        if options.action == "drop":
            result = drop(page, options.more, options.first)
        else:
            result = build(page, options.first, options.more[0])
        chromium.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
