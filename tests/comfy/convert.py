"""Workflows in UI form, like the bundled ones, to API form; some need ComfyUI's own page for that."""

from typing import Any

NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CONTROLS = ("fixed", "increment", "decrement", "randomize")


class ConversionError(Exception):
    """The workflow has something that this converter does not know."""


def is_api(workflow: object) -> bool:
    """Say whether a workflow is in API form."""
    return isinstance(workflow, dict) and all(
        isinstance(node, dict) and "class_type" in node for node in workflow.values()
    )


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Return the API form of a workflow in UI form.

    Raises: ConversionError for nodes that are muted, bypassed, unknown, or made by the page alone.
    """
    if not isinstance(workflow.get("nodes"), list):
        raise ConversionError("it is neither in UI nor in API form")
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): _convert(node, sources, object_info)
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }


def _convert(
    node: dict[str, Any], sources: dict[int, list[Any]], object_info: dict[str, Any]
) -> dict[str, Any]:
    kind = node["type"]
    if kind not in object_info or node.get("mode", 0) != 0:
        raise ConversionError(f"node {node['id']} ({kind}) is not one that runs here")
    described = object_info[kind]["input"]
    values = list(node.get("widgets_values") or [])
    inputs: dict[str, Any] = {}
    for name, (type_, *options) in {**described.get("required", {}), **described.get("optional", {})}.items():
        if not isinstance(type_, list) and type_ not in WIDGETS:
            continue
        if not values:
            break
        inputs[name] = values.pop(0)
        if options and options[0].get("control_after_generate") and values and values[0] in CONTROLS:
            values.pop(0)
    if values:
        raise ConversionError(f"node {node['id']} ({kind}) has more widget values than inputs: {values}")
    links = {entry["name"]: sources[entry["link"]] for entry in node.get("inputs", []) if entry.get("link")}
    return {"class_type": kind, "inputs": {**inputs, **links}}
