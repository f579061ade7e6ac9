"""ComfyUI's real page in headless Chromium. Runs in an interpreter that has Playwright.

    drop URL WORKFLOW.json SCREENSHOT.png    drop a workflow on the page, queue it, wait for it
    convert URL PROMPT.json WORKFLOW.json    API form to UI form, by the page's own functions

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
DONE = """() => app.graph.nodes.some((node) => node.type === "SaveImage" && node.imgs?.length)
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
LAYOUT = {
    "FlowCoreLoadModel": [40, 80, 340, 102],
    "FlowCoreLoadTextEncoder": [40, 230, 340, 82],
    "FlowCoreLoadVAE": [40, 360, 340, 58],
    "CLIPTextEncode": [440, 80, 400, 150],
    "FlowCoreEmptyLatent": [440, 480, 400, 150],
    "KSampler": [900, 80, 300, 550],
    "VAEDecode": [1260, 80, 300, 46],
    "SaveImage": [1260, 180, 300, 450],
    "MarkdownNote": [40, 700, 800, 330],
}
GROUPS = {"Models": [20, 0, 380, 440], "Prompt and size": [420, 0, 440, 650], "Sampling": [880, 0, 700, 650]}
BUILD = """([prompt, name, layout, groups, note]) => {
    app.loadApiJson(prompt, name);
    const texts = app.graph.nodes.filter((node) => node.type === "CLIPTextEncode");
    texts.forEach((node, i) => { node.title = i ? "Negative prompt" : "Prompt"; });
    const markdown = LiteGraph.createNode("MarkdownNote");
    markdown.widgets[0].value = note;
    markdown.title = "About this workflow";
    app.graph.add(markdown);
    for (const node of app.graph.nodes) {
        const [x, y, width, height] = layout[node.type];
        node.pos = [x, y + (texts.indexOf(node) === 1 ? 200 : 0)];
        node.setSize([width, height]);
    }
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


def drop(page: Page, url: str, workflow: Path, screenshot: Path) -> dict[str, Any]:
    """Drop a workflow on the page, press Run, wait for its picture, and return what the page shows."""
    open_page(page, url)
    templates = page.request.get(f"{url}/api/workflow_templates").json()
    page.evaluate(DROP, [workflow.name, workflow.read_text(encoding="utf-8")])
    page.wait_for_function(
        "() => app.graph.nodes.some((node) => node.type === 'FlowCoreLoadModel')", timeout=60_000
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
    return {"templates": templates, "loaded": loaded, "finished": page.evaluate(STATE)}


def convert(page: Page, url: str, prompt: Path, workflow: Path) -> dict[str, Any]:
    """Write the UI form of a prompt, with the note that lies beside it as Markdown."""
    open_page(page, url)
    note = prompt.with_suffix(".md").read_text(encoding="utf-8")
    nodes = json.loads(prompt.read_text(encoding="utf-8"))
    text = page.evaluate(BUILD, [nodes, workflow.stem, LAYOUT, GROUPS, note])
    workflow.write_text(json.dumps(json.loads(text), indent=1) + "\n", encoding="utf-8")
    return page.evaluate(STATE)


def main() -> int:
    """Run one of the two actions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("drop", "convert"))
    parser.add_argument("url")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print("no Chromium or Chrome is on the PATH", file=sys.stderr)
        return 3
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1600, "height": 900})
        result = {"drop": drop, "convert": convert}[options.action](
            page, options.url, options.first, options.second
        )
        chromium.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
