"""The settings of the paper's released code (arXiv 2607.01689), as `solve` and a merge take them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "solver_settings"]

_RELEASED = {
    "expert": "cauchy",
    "scale": "task-norm",
    "prior": "absolute",
    "prior_precision": 1e-3,
    "side": "output",
    "init": "gaussian",
    "max_steps": 50,
}

# coefficient multiplies theta; `average` are the names of parameters that are averaged instead (besides everything that
# is not a matrix), in the spelling of OpenCLIP and of transformers.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Full fine-tunes of CLIP ViT-B/32.
        "paper-vit": MappingProxyType(
            {
                **_RELEASED,
                "scale_factor": 0.3,
                "row_blocks": "square",
                "coefficient": 1.0,
                "average": ("*c_proj*", "*fc2*", "*conv*", "*patch_embedding*", "*ln_*", "*norm*", "*bias"),
            }
        ),
        # LoRA adapters of Flan-T5.
        "paper-t5": MappingProxyType({**_RELEASED, "scale_factor": 1e-2, "coefficient": 1.0, "average": ()}),
        # LoRA r = 16 adapters of CLIP ViT-B/32; for ViT-L/14 they use scale_factor 1e-2 and coefficient 0.25.
        "paper-lora": MappingProxyType({**_RELEASED, "scale_factor": 2.0, "coefficient": 0.3, "average": ()}),
    }
)


def solver_settings(preset: str) -> dict[str, Any]:
    """The keyword arguments of `solve` in a preset: what is left without the coefficient and the averaged names.

    Raises KeyError for an unknown preset.
    """
    return {key: value for key, value in PRESETS[preset].items() if key not in {"coefficient", "average"}}
