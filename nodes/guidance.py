"""Guidance rules as patches of a MODEL, by the published formulas for flow matching."""

from collections.abc import Callable

from comfy_api.latest import io

from .schema import schema

CATEGORY = "FlowCore/guidance"
_LAST_WINS = "CFG-Zero*, APG and Rescale replace each other: the last one counts. The interval goes with all."


def _model_input() -> io.Input:
    return io.Model.Input(
        "model", tooltip="Any flow-matching model; its sampler's cfg is the guidance scale."
    )


def _model_output() -> list[io.Output]:
    return [io.Model.Output(display_name="guided_model", tooltip="Copy of the model with this guidance.")]


class GuidanceCFGZero(io.ComfyNode):
    """Classifier-free guidance with the unconditional velocity scaled to the conditional one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreGuidanceCFGZero",
            display_name="Guidance: CFG-Zero*",
            category=CATEGORY,
            description=f"CFG-Zero* on the velocity, with zero-init of the first steps. {_LAST_WINS}",
            search_aliases=["cfg zero star", "guidance", "zero init"],
            inputs=[
                _model_input(),
                io.Int.Input(
                    "zero_init_steps",
                    default=1,
                    min=0,
                    max=100,
                    tooltip="Steps at the start that leave the noise as it is; 0 switches this off, 1 is "
                    "usual.",
                ),
            ],
            outputs=_model_output(),
        )

    @classmethod
    def execute(cls, *, model: io.Model.Type, zero_init_steps: int) -> io.NodeOutput:
        from ..flowcore.flow.guidance import cfg_zero_star
        from .host.guidance import patched

        return io.NodeOutput(patched(model, make_rule=lambda: cfg_zero_star, zero_init=zero_init_steps))


class GuidanceAPG(io.ComfyNode):
    """Adaptive projected guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreGuidanceAPG",
            display_name="Guidance: APG",
            category=CATEGORY,
            description="Adaptive projected guidance: high guidance scales without burnt colours. The "
            "stock APG node at "
            f"a scale equals this one at that scale plus 1. {_LAST_WINS}",
            search_aliases=["adaptive projected guidance", "apg", "guidance", "saturation"],
            inputs=[
                _model_input(),
                io.Float.Input(
                    "parallel",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share kept of the change along the picture itself, which saturates colours; 1 "
                    "keeps all.",
                ),
                io.Float.Input(
                    "norm_limit",
                    default=15.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Largest length of the change per picture; smaller is tamer, 0 sets no limit.",
                ),
                io.Float.Input(
                    "momentum",
                    default=-0.5,
                    min=-0.95,
                    max=0.95,
                    step=0.01,
                    tooltip="Weight of earlier steps' changes; negative pushes away from them, 0 forgets "
                    "them.",
                ),
            ],
            outputs=_model_output(),
        )

    @classmethod
    def execute(
        cls, *, model: io.Model.Type, parallel: float, norm_limit: float, momentum: float
    ) -> io.NodeOutput:
        from ..flowcore.flow.guidance import ApgMomentum, Combine, apg
        from .host.guidance import patched

        def make_rule() -> Combine:
            return apg(ApgMomentum(), parallel=parallel, norm_limit=norm_limit, momentum_factor=momentum)

        return io.NodeOutput(patched(model, make_rule=make_rule, zero_init=0))


class GuidanceRescale(io.ComfyNode):
    """Guidance brought back to the spread of the conditional velocity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreGuidanceRescale",
            display_name="Guidance: Rescale",
            category=CATEGORY,
            description="Brings the guided velocity back to the spread of the unguided one. The stock "
            "RescaleCFG node "
            f"is made for another kind of model. {_LAST_WINS}",
            search_aliases=["rescale cfg", "guidance rescale", "contrast"],
            inputs=[
                _model_input(),
                io.Float.Input(
                    "amount",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is plain guidance, 1 the full correction: less contrast, fewer burnt colours.",
                ),
            ],
            outputs=_model_output(),
        )

    @classmethod
    def execute(cls, *, model: io.Model.Type, amount: float) -> io.NodeOutput:
        from ..flowcore.flow.guidance import cfg_rescale
        from .host.guidance import patched

        rule = cfg_rescale(amount)
        make_rule: Callable = lambda: rule  # noqa: E731 - the rule has no state to make anew
        return io.NodeOutput(patched(model, make_rule=make_rule, zero_init=0))


class GuidanceInterval(io.ComfyNode):
    """Guidance between two noise levels only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreGuidanceInterval",
            display_name="Guidance: Interval",
            category=CATEGORY,
            description="Guides between two noise levels only; outside of them the negative prompt is not "
            "computed, which "
            "saves time.",
            search_aliases=["guidance interval", "limited interval", "cfg schedule", "skip cfg"],
            inputs=[
                _model_input(),
                io.Float.Input(
                    "highest_sigma",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Guidance starts at this noise level, 0 to 1; 1 is pure noise, the start of "
                    "sampling.",
                ),
                io.Float.Input(
                    "lowest_sigma",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Guidance ends below this noise level, 0 to 1; 0 is the finished picture.",
                ),
            ],
            outputs=_model_output(),
        )

    @classmethod
    def execute(cls, *, model: io.Model.Type, highest_sigma: float, lowest_sigma: float) -> io.NodeOutput:
        from ..flowcore.errors import ConfigError
        from .host.guidance import patched

        if lowest_sigma > highest_sigma:
            raise ConfigError(
                f"lowest_sigma must be at most highest_sigma {highest_sigma}, got {lowest_sigma}; swap the "
                "two"
            )
        return io.NodeOutput(patched(model, interval=(lowest_sigma, highest_sigma)))
