"""TinyFlux's own LoRA files: which layers an adapter configuration means, its presets, and the keys of files.

A configuration states defaults, patterns of layer paths that change them, and whole groups of layers.
Source: AbstractEyes/tiny-flux, model/lora.py and model/lora_config.py.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...layers.reading import check_names
from .config import TinyFluxConfig

DOUBLE_ATTENTION = ("attn.txt_qkv", "attn.img_qkv", "attn.txt_out", "attn.img_out")
SINGLE_ATTENTION = ("attn.qkv", "attn.out_proj")
SINGLE_MLP = ("mlp.fc1", "mlp.fc2")

_KEY = re.compile(
    r"(?:(?P<kind>double|single)_blocks|block)_(?P<index>\d+)_(?P<layer>\w+)\.lora_(?P<side>[AB])(?:\.\d+)?"
)
_OWN_LAYERS = {
    "double": {layer.replace(".", "_"): layer for layer in DOUBLE_ATTENTION},
    "single": {layer.replace(".", "_"): layer for layer in (*SINGLE_ATTENTION, *SINGLE_MLP)},
    None: {layer.removeprefix("attn."): layer for layer in DOUBLE_ATTENTION},  # the prototype's names
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The adapter of one layer: `depth` pairs of matrices, added with the factor alpha / rank."""

    rank: int = 16
    alpha: float = 16.0
    lr_scale: float = 1.0
    depth: int = 1
    dropout: float = 0.0
    enabled: bool = True

    def __post_init__(self) -> None:
        """Check ranges. Raises: ConfigError."""
        for name in ("rank", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a LoRA layer must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of a LoRA layer must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTarget:
    """What changes for layers whose whole path fits a pattern; None leaves it as it is.

    In a pattern `*` stands for one name between dots, `**` for any number of them, `[2-4]` for a range and
    `[0,5]` for a list of numbers.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    lr_scale: float | None = None
    depth: int | None = None
    dropout: float | None = None
    enabled: bool | None = None

    def is_match(self, path: str) -> bool:
        """Return whether the whole path fits."""
        return re.fullmatch(_to_regex(self.pattern), path) is not None

    def changes(self) -> dict[str, Any]:
        """Return the values that are set."""
        return {
            name: value for name, value in asdict(self).items() if name != "pattern" and value is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which layers get an adapter, and which. extensions (new blocks) are kept and built by nobody."""

    name: str = "tinyflux_lora"
    version: str = "1.0"
    defaults: LoraSpec = LoraSpec()
    targets: tuple[LoraTarget, ...] = ()
    layer_specs: Mapping[str, LoraSpec] = field(default_factory=dict)
    extensions: Mapping[str, Any] | None = None
    include_double_attn: bool = False
    include_single_attn: bool = True
    include_single_mlp: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraConfig":
        """Return the configuration of the JSON form.

        Raises: ConfigError for an unknown key of the whole or of a part (keys that start with `_` are
            comments), and for a value out of range.
        """
        known = _checked(cls, values)
        known["defaults"] = LoraSpec(**_checked(LoraSpec, values.get("defaults", {})))
        known["targets"] = tuple(LoraTarget(**_checked(LoraTarget, t)) for t in values.get("targets", ()))
        specs = values.get("layer_specs", {})
        known["layer_specs"] = {path: LoraSpec(**_checked(LoraSpec, spec)) for path, spec in specs.items()}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the inverse of `from_dict`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["defaults"] = {k: v for k, v in asdict(self.defaults).items() if k != "enabled"}
        values["targets"] = [{"pattern": t.pattern, **t.changes()} for t in self.targets]
        values["layer_specs"] = {path: asdict(spec) for path, spec in self.layer_specs.items()}
        return values

    def resolve(self, num_double: int, num_single: int) -> dict[str, LoraSpec]:
        """Return the adapter of every layer that gets one, by path, in the order of the blocks."""
        groups = (
            ("double_blocks", num_double, DOUBLE_ATTENTION, self.include_double_attn),
            ("single_blocks", num_single, SINGLE_ATTENTION, self.include_single_attn),
            ("single_blocks", num_single, SINGLE_MLP, self.include_single_mlp),
        )
        paths = (
            (f"{kind}.{index}.{layer}", is_included)
            for kind, count, layers, is_included in groups
            for index in range(count)
            for layer in layers
        )
        found = ((path, self._spec(path, is_included)) for path, is_included in paths)
        return {path: spec for path, spec in found if spec is not None}

    def unmatched(self, num_double: int, num_single: int) -> list[str]:
        """Return patterns and paths that no layer of such a model fits."""
        everything = replace(LoraConfig(), include_double_attn=True).resolve(num_double, num_single)
        patterns = [t.pattern for t in self.targets if not any(t.is_match(path) for path in everything)]
        return patterns + [path for path in self.layer_specs if path not in everything]

    def _spec(self, path: str, is_included: bool) -> LoraSpec | None:
        """Return the adapter of a layer, or None: its own, else the defaults after all matching targets."""
        matching = [target for target in self.targets if target.is_match(path)]
        if not (is_included or path in self.layer_specs or any(t.enabled for t in matching)):
            return None
        spec = self.defaults
        for target in matching:
            spec = replace(spec, **target.changes())
        spec = self.layer_specs.get(path, spec)
        return spec if spec.enabled else None


def _checked(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without comments, whose names must be the class's fields."""
    known = {name: value for name, value in values.items() if not name.startswith("_")}
    check_names(cls, known)
    return known


def _to_regex(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*|\[[\d,\-]+\])", pattern)
    return "".join(_part_to_regex(part) for part in parts)


def _part_to_regex(part: str) -> str:
    if part == "**":
        return ".+"
    if part == "*":
        return r"[^.]+"
    span = re.fullmatch(r"\[(\d+)-(\d+)\]", part)
    if span:
        return f"(?:{'|'.join(str(n) for n in range(int(span[1]), int(span[2]) + 1))})"
    if re.fullmatch(r"\[\d+(,\d+)*\]", part):
        return f"(?:{part[1:-1].replace(',', '|')})"
    return re.escape(part)


def _target(pattern: str, **changes: Any) -> LoraTarget:
    return LoraTarget(pattern=pattern, **changes)


LORA_PRESETS: Mapping[str, LoraConfig] = {
    config.name: config
    for config in (
        LoraConfig(name="minimal", defaults=LoraSpec(rank=8, alpha=8.0), include_single_mlp=False),
        LoraConfig(name="standard"),
        LoraConfig(
            name="character",
            targets=(
                _target("single_blocks.[0-9].*.*", rank=8, lr_scale=0.5),
                _target("single_blocks.[10-19].*.*", rank=16),
                _target("single_blocks.[20-24].*.*", rank=32, lr_scale=1.5),
            ),
        ),
        LoraConfig(
            name="concept",
            targets=(_target("double_blocks.*.attn.*", rank=32),),
            include_double_attn=True,
            include_single_attn=False,
            include_single_mlp=False,
        ),
        LoraConfig(name="full", include_double_attn=True),
        LoraConfig(
            name="progressive",
            targets=(
                *(_target(f"double_blocks.{i}.attn.*", rank=8 + 16 * i // 14) for i in range(15)),
                *(_target(f"single_blocks.{i}.*.*", rank=8 + 24 * i // 24) for i in range(25)),
            ),
            include_double_attn=True,
        ),
    )
}
"""The published presets. A target that changes the rank alone keeps alpha 16, and so changes the factor."""


def learning_rates(specs: Mapping[str, LoraSpec], base: float) -> dict[float, list[str]]:
    """Return the paths of adapters by their learning rate."""
    groups: dict[float, list[str]] = {}
    for path, spec in specs.items():
        groups.setdefault(base * spec.lr_scale, []).append(path)
    return groups


def native_shapes(lora: LoraConfig, model: TinyFluxConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a LoRA file for a model."""
    dim = model.hidden_size
    sizes = {layer: (dim, 3 * dim if layer.endswith("qkv") else dim) for layer in _all_layers()}
    sizes |= {"mlp.fc1": (dim, model.mlp_dim), "mlp.fc2": (model.mlp_dim, dim)}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, spec in lora.resolve(model.num_double_layers, model.num_single_layers).items():
        width, height = sizes[path.split(".", 2)[2]]
        for i in range(spec.depth):
            end = f".{i}" if spec.depth > 1 else ""
            shapes[f"{path.replace('.', '_')}.lora_A{end}"] = (spec.rank, width)
            shapes[f"{path.replace('.', '_')}.lora_B{end}"] = (height, spec.rank)
    return shapes


def _all_layers() -> tuple[str, ...]:
    return (*DOUBLE_ATTENTION, *SINGLE_ATTENTION, *SINGLE_MLP)


def native_to_standard(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a LoRA file's tensors with TinyFlux's own keys under this project's, with an alpha a layer.

    Stacked pairs become one of the summed rank. Keys in other forms stay as they are, among them those of
    extension blocks, which no forward of the original runs.

    Raises: CheckpointError if there are such keys and the metadata does not tell alpha, or half of a pair is
        missing.
    """
    pairs: dict[str, dict[str, list[str]]] = {}
    for key in sorted(tensors):
        path, side = _path_of(key)
        if path is not None:
            pairs.setdefault(path, {}).setdefault(side, []).append(key)
    for path, sides in pairs.items():
        if len(sides.get("A", ())) != len(sides.get("B", ())):
            raise CheckpointError(f"the LoRA of {path} must have as many lora_A as lora_B, got {sides}")
    found = {key: tensor for key, tensor in tensors.items() if _path_of(key)[0] is None}
    scales = _scales(pairs, metadata) if pairs else {}
    for path, sides in pairs.items():
        down = torch.cat([tensors[key] for key in sides["A"]], dim=0)
        name = f"diffusion_model.{path}"
        found[f"{name}.lora_A.weight"] = down
        found[f"{name}.lora_B.weight"] = torch.cat([tensors[key] for key in sides["B"]], dim=1)
        found[f"{name}.alpha"] = torch.tensor(scales[path] * down.shape[0])
    return found


def standard_to_native(
    tensors: Mapping[str, Tensor], name: str = "tinyflux_lora"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a LoRA under this project's keys as TinyFlux's own tensors and metadata.

    Raises: CheckpointError if it changes layers that such files do not know.
    """
    paths = [key[len("diffusion_model.") : -len(".lora_A.weight")] for key in tensors if ".lora_A." in key]
    foreign = [path for path in paths if path.split(".", 2)[-1] not in _all_layers()]
    if foreign or not paths:
        raise CheckpointError(
            f"a TinyFlux LoRA must change attention and single MLPs alone, got {foreign[:5]}"
        )
    found: dict[str, Tensor] = {}
    specs = {}
    for path in paths:
        down = tensors[f"diffusion_model.{path}.lora_A.weight"]
        alpha = tensors.get(f"diffusion_model.{path}.alpha")
        flat = path.replace(".", "_")
        found |= {f"{flat}.lora_A": down, f"{flat}.lora_B": tensors[f"diffusion_model.{path}.lora_B.weight"]}
        specs[path] = LoraSpec(rank=down.shape[0], alpha=down.shape[0] if alpha is None else float(alpha))
    config = LoraConfig(name=name, layer_specs=specs, include_single_attn=False, include_single_mlp=False)
    return found, {"config_json": json.dumps(config.to_dict()), "num_adapters": str(len(specs))}


def _path_of(key: str) -> tuple[str | None, str]:
    """Return path and side of a native key; no path for a key in another form."""
    match = _KEY.fullmatch(key)
    layer = _OWN_LAYERS[match["kind"]].get(match["layer"]) if match else None
    if match is None or layer is None:
        return None, ""
    return f"{match['kind'] or 'double'}_blocks.{match['index']}.{layer}", match["side"]


def _scales(paths: Collection[str], metadata: Mapping[str, str]) -> dict[str, float]:
    """Return the factor of every layer's adapter, as the metadata states it."""
    if "config_json" in metadata:
        config = _stored_config(metadata["config_json"])
        counts = [
            1 + max((int(p.split(".")[1]) for p in paths if p.startswith(kind)), default=-1)
            for kind in ("double", "single")
        ]
        specs = config.resolve(*counts)
        lost = [path for path in paths if path not in specs]
        if lost:
            raise CheckpointError(
                f"config_json of a TinyFlux LoRA must cover its layers, got none for {lost[0]}"
            )
        return {path: specs[path].alpha / specs[path].rank for path in paths}
    if "alpha" in metadata and "rank" in metadata:  # the prototype's metadata
        return dict.fromkeys(paths, float(metadata["alpha"]) / float(metadata["rank"]))
    raise CheckpointError(
        "a TinyFlux LoRA must state alpha in its metadata (config_json), got none; use the original file"
    )


def _stored_config(text: str) -> LoraConfig:
    try:
        return LoraConfig.from_dict(json.loads(text))
    except json.JSONDecodeError as err:
        raise CheckpointError(
            f"config_json of a TinyFlux LoRA must be JSON, got an error at {err.pos}"
        ) from err
