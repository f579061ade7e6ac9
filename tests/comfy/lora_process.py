"""LoRA files in ComfyUI's stock loader: `python lora_process.py COMFYUI FOLDER`, in ComfyUI's interpreter.

FOLDER holds `<name>.base.safetensors`, weights under a model's own names, and LoRA files `<name>.<layout>...`
for them. Prints for each LoRA file the keys that the loader leaves, and writes the patched weights beside it.
"""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace


class Left(logging.Handler):
    """Collects the keys that ComfyUI says it has not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the key of a warning."""
        self.keys.append(record.getMessage().removeprefix("lora key not loaded: "))


def main() -> int:
    """Load every LoRA file of the folder."""
    comfyui, folder = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, comfyui)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils
    from safetensors.torch import save_file

    handler = Left()
    logging.getLogger().addHandler(handler)
    result = {}
    for base in sorted(folder.glob("*.base.safetensors")):
        state = {f"diffusion_model.{key}": t for key, t in comfy.utils.load_torch_file(str(base)).items()}
        # The loader asks a model for its tensors' names and for its UNet settings, and for its class.
        model = SimpleNamespace(
            state_dict=lambda state=state: state, model_config=SimpleNamespace(unet_config={})
        )
        names = comfy.lora.model_lora_keys_unet(model, {})
        for file in sorted(folder.glob(f"{base.name.split('.')[0]}.lora.*")):
            handler.keys.clear()
            tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(file), safe_load=True))
            patches = comfy.lora.load_lora(tensors, names)
            merged = {
                key.removeprefix("diffusion_model."): comfy.lora.calculate_weight(
                    [(1.0, patch, 1.0, None, None)], state[key].clone(), key
                )
                for key, patch in patches.items()
            }
            save_file(merged, file.with_name(f"merged.{file.name}"))
            result[file.name] = list(handler.keys)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
