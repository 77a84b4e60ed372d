"""What predictions are computed on: device, precision, batches, and the models that are held between suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.errors import SuiteError
from poemerge.numerics.precision import multiplies_bfloat16
from poemerge.quiet import quiet_loading
from poemerge.suites.protocol import Model

__all__ = ["Runtime", "choose_runtime", "private_tensors"]


def _ignore(count: int) -> None:
    """No progress is shown."""


@dataclass
class Runtime:
    """How a model is run; one for all models that are compared.

    Arguments: `device`; `dtype`, the precision of the matrix products (on a CPU by autocast over float32 weights, on a
    GPU the weights are held in it); `batch_size` examples; `workers` that decode images; `tick(n)`, called after each
    `n` examples.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int = 64
    workers: int = 0
    tick: Callable[[int], None] = _ignore
    _held: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What a score depends on, for the key it is kept under."""
        return {"device": self.device.type, "dtype": str(self.dtype), "batch_size": self.batch_size}

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which a forward pass runs."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def module(
        self,
        auto_class: Any,
        model: Model,
        private: Mapping[str, Tensor] | None = None,
        config_class: Any = None,
        **config: Any,
    ) -> Any:
        """`model`'s folder loaded by `auto_class`, ready to predict; the last one is held, so that suites may share it.

        `private` parameters are put in by name; a parameter that the folder lacks is the base's; `config_class` reads
        the architecture's configuration (default: AutoConfig), and `config` changes entries of it.
        Raises SuiteError when a parameter is nowhere.
        """
        key = (auto_class, model.folder, model.config, repr(config), None if private is None else model.head)
        if not self._held or self._held[0] != key:
            self._held = ()  # first let go of the one before
            self._held = (key, self._load(auto_class, model, private or {}, config_class, config))
        return self._held[1]

    def release(self) -> None:
        """Lets go of the model that is held."""
        self._held = ()

    def _load(
        self,
        auto_class: Any,
        model: Model,
        private: Mapping[str, Tensor],
        config_class: Any,
        changes: dict[str, Any],
    ) -> Any:
        from transformers import AutoConfig

        adapter = (model.folder / "adapter_config.json").is_file()
        folder = model.base if adapter else model.folder
        config_folder = model.config or folder
        if not (config_folder / "config.json").is_file():
            config_folder = folder
        config = (config_class or AutoConfig).from_pretrained(config_folder, **changes)
        weights = self.dtype if self.device.type == "cuda" else torch.float32
        with quiet_loading():
            module, loading = auto_class.from_pretrained(folder, config=config, dtype=weights, output_loading_info=True)
        state = module.state_dict()
        unfit = [name for name, tensor in private.items() if name in state and state[name].shape != tensor.shape]
        private = {**_of_base(model.base, set(loading["missing_keys"]) - set(private)), **private}
        absent = sorted(set(loading["missing_keys"]) - set(private))
        # A pooler that the checkpoint never had is drawn at random and read by nothing that we score with.
        absent = [name for name in absent if ".pooler." not in f".{name}"]
        if absent or unfit:
            got = "no such parameter in the checkpoint" if absent else "another shape"
            raise SuiteError(
                f"model {model.name} in {model.folder}\n"
                f"  tensor:   {(absent + unfit)[0]} ({len(absent + unfit)} such)\n"
                f"  got:      {got} (private parameters: {model.head or 'none'})\n"
                f"  expected: a parameter of {type(module).__name__}\n"
                "  next:     check that the suite's expert is of this architecture"
            )
        module.load_state_dict(dict(private), strict=False)
        if adapter:
            _add_adapter(module, model.folder)
        return module.to(self.device).eval()


def _of_base(base: Path, wanted: set[str]) -> dict[str, Tensor]:
    """Those of the parameters `wanted` that the base has."""
    from poemerge.checkpoints import Checkpoint

    if not wanted:
        return {}
    checkpoint = Checkpoint.open(base)
    try:
        return {name: checkpoint.read(name) for name in wanted & set(checkpoint.names())}
    finally:
        checkpoint.close()


def _add_adapter(module: Any, folder: Path) -> None:
    """Adds scaling · B·A of each adapted matrix to the base's weight, and puts in what the adapter stores whole."""
    from poemerge.checkpoints.adapter import Adapter, dense

    parameters = dict(module.named_parameters())
    prefix = module.base_model_prefix + "."

    def find(name: str) -> str | None:
        return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in parameters), None)

    adapter = Adapter.open(folder)
    try:
        for name, factors in adapter.modules.items():
            found = find(name)
            if found is None:
                raise SuiteError(
                    f"adapter {folder}\n  tensor:   {name}\n  got:      no such weight in {type(module).__name__}\n"
                    "  expected: an adapter of this base\n  next:     check the expert's source"
                )
            delta = dense(*adapter.factors(name))
            # Conv1D, GPT-2's own linear layer, stores its weight [in, out].
            conv = type(module.get_submodule(found.rpartition(".")[0])).__name__ == "Conv1D"
            parameters[found].data += (delta.T if conv or factors.transposed else delta).to(parameters[found].dtype)
        for name in adapter.full:
            found = find(name)
            if found is not None and parameters[found].shape == adapter.read_full(name).shape:
                parameters[found].data.copy_(adapter.read_full(name))
    finally:
        adapter.close()


def private_tensors(model: Model) -> dict[str, Tensor]:
    """The task's private parameters, from `model.head`; {} where it has none."""
    from safetensors.torch import load_file

    return load_file(model.head) if model.head is not None else {}


def choose_runtime(device: str, dtype: str, batch_size: int) -> Runtime:
    """The runtime that params.yaml asks for.

    `auto` is a GPU where there is one, and half precision where the device multiplies it natively (bfloat16 on a CPU
    with AMX or AVX512-BF16 and on a GPU that has it, float16 on older GPUs), else float32.
    Raises SuiteError when the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise SuiteError(
            f"params.yaml evaluate.device\n  got:      {device!r}: {str(error).splitlines()[0]}\n"
            "  expected: auto, cpu, cuda or cuda:N\n  next:     choose a device that this machine has"
        ) from error
    if dtype == "auto":
        dtype = _native_half(place) or "float32"
    return Runtime(place, getattr(torch, dtype), batch_size)


def _native_half(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and multiplies_bfloat16():
        return "bfloat16"
    return None
