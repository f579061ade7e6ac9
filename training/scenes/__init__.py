"""Captioned scenes drawn by the computer, and a judge that reads a picture before its caption.

A scene is one or two flat shapes on a flat background. Its caption names shape, colour, size, position,
background and, for two objects, their relation. One meaning in ten is held out from training by a stable
hash. An edit is a source scene, an instruction, and the target scene.
"""

from .captions import Meaning, MeantObject, caption_scene, captions_held_out, parse_caption, plain_caption
from .draw import draw
from .edits import Edit, iterate_edits, random_edit
from .errors import SceneError
from .folder import iterate_scenes, write_edits, write_folder
from .judge import ATTRIBUTES, Verdict, accuracy, judge
from .scene import PALETTE, RELATIONS, SHAPES, Scene, SceneObject, is_held_out, random_scene

__all__ = [
    "ATTRIBUTES",
    "PALETTE",
    "RELATIONS",
    "SHAPES",
    "Edit",
    "Meaning",
    "MeantObject",
    "Scene",
    "SceneError",
    "SceneObject",
    "Verdict",
    "accuracy",
    "caption_scene",
    "captions_held_out",
    "draw",
    "is_held_out",
    "iterate_edits",
    "iterate_scenes",
    "judge",
    "parse_caption",
    "plain_caption",
    "random_edit",
    "random_scene",
    "write_edits",
    "write_folder",
]
