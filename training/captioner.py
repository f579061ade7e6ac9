"""Qwen3-VL as a captioner: a picture and an instruction in, a line of text out."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcore.devices import find_device, find_dtype
from flowcore.errors import CheckpointError
from flowcore.hub import fetch, is_address
from flowcore.text.qwen3_vl import IMAGE, ChatTokenizer, fit_pictures, to_patches

KINDS = ("qwen3_vl", "qwen3_vl_moe")
_THOUGHT = re.compile(r".*</think>", re.DOTALL)
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class Captioner:
    """A Qwen3-VL of any size with its tokenizer, which answers without chance."""

    def __init__(self, source: str, *, device: str = "auto", dtype: str = "auto") -> None:
        """Loads a local folder, or `hub:OWNER/NAME`.

        Raises: CheckpointError, ConfigError if it cannot be used.
        """
        folder = fetch(source) if is_address(source) else Path(source).expanduser()
        _check(folder, source)
        place = find_device(device)
        from transformers import AutoModelForImageTextToText

        self.tokenizer = ChatTokenizer(folder)
        try:
            network = AutoModelForImageTextToText.from_pretrained(
                str(folder), dtype=find_dtype(dtype, place), local_files_only=True
            )
        except _UNREADABLE as err:
            raise CheckpointError(f"--model {source} must load as a Qwen3-VL, got {err}") from err
        self.network: Any = network.to(place).eval()
        self.patch = int(network.config.vision_config.patch_size)

    @torch.inference_mode()
    def caption(self, picture: Tensor, request: str, system: str = "", *, max_tokens: int = 256) -> str:
        """What the model says of a picture `3 y x` in [-1, 1], on one line; empty if it says nothing.

        Args:
            picture: resized to 256 to 1280 visual tokens.
            request: what the user asks.
            system: instruction that goes before it.
            max_tokens: after which the answer is cut off; thoughts before it count, and are left out.
        """
        pixels, grids = to_patches(fit_pictures(picture[None]), self.patch)
        text = self.chat(request, system).replace(IMAGE, IMAGE * (pixels.shape[1] // 4))
        ids = torch.tensor([self.tokenizer.ids(text)], device=self.network.device)
        inputs: dict[str, Tensor] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels[0].to(self.network.device, self.network.dtype),
            "image_grid_thw": grids.to(self.network.device),
        }
        if "mm_token_type_ids" in inspect.signature(self.network.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == self.network.config.image_token_id).int()
        made = self.network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer: str = self.tokenizer.network.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        if answer.lstrip().startswith("<think>") and "</think>" not in answer:
            return ""
        return " ".join(_THOUGHT.sub("", answer).split())

    def chat(self, request: str, system: str) -> str:
        """The chat up to where the answer begins, the picture before the request."""
        turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request}]})
        text: str = self.tokenizer.network.apply_chat_template(
            turns, chat_template=self.tokenizer.template, tokenize=False, add_generation_prompt=True
        )
        return text


def _check(folder: Path, source: str) -> None:
    """Raises: CheckpointError if a folder does not hold a Qwen3-VL."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as err:
        raise CheckpointError(
            f"--model must be the folder of a Qwen3-VL or hub:OWNER/NAME, got {source} ({err})"
        ) from err
    if kind not in KINDS:
        raise CheckpointError(f"--model {source} must be a Qwen3-VL, got model_type {kind}; name another")
