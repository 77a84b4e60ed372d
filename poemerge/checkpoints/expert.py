"""One task model: a full checkpoint or an adapter, and what it holds of the base's parameters."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from poemerge.checkpoints.adapter import ADAPTER_WEIGHTS, Adapter, is_adapter
from poemerge.checkpoints.checkpoint import HEAD, Checkpoint
from poemerge.errors import CheckpointError, Problem

__all__ = ["Expert", "open_expert"]


class Expert:
    """One task model beside its base: which of its tensors stand for which of the base's, and which are its own.

    `full`: base name → its own name for a tensor stored whole; `lora`: base name → its own name for a factored delta;
    `private`: its own names of the parameters that the base lacks or has in another shape; `lacks`: base names of
    weights that a full model does not hold (they stay at the base as far as this expert is concerned); `head`:
    head.safetensors, where there is one.
    """

    def __init__(self, name: str, path: Path, source: Checkpoint | Adapter, head: Checkpoint | None) -> None:
        self.name = name
        self.path = path
        self.source = source
        self.full: dict[str, str] = {}
        self.lora: dict[str, str] = {}
        self.private: list[str] = []
        self.lacks: list[str] = []
        self.head = head

    @property
    def kind(self) -> str:
        """`adapter` or `full`."""
        return "adapter" if isinstance(self.source, Adapter) else "full"

    @property
    def weights(self) -> Checkpoint:
        """The checkpoint that its weights or factors lie in."""
        return self.source.checkpoint if isinstance(self.source, Adapter) else self.source

    def stored(self, own: str) -> str:
        """The name in its file of the whole tensor that it calls `own`."""
        return self.source.full[own] if isinstance(self.source, Adapter) else own

    def read_own(self, own: str, rows: slice | None = None, pin: bool = False) -> Tensor:
        """The whole tensor that it calls `own`, in its stored dtype; `own` may be private."""
        if self.head is not None and own in self.head:
            return self.head.read(own, rows, pin)
        return self.weights.read(self.stored(own), rows, pin)

    def rank(self, name: str) -> int:
        """Rank of its factors for the base's weight `name`; 0 where it has none."""
        own = self.lora.get(name)
        return self.source.rank(own) if own is not None and isinstance(self.source, Adapter) else 0

    def factor_bytes(self, name: str) -> int:
        """Stored size of its factors for the base's weight `name`, in bytes."""
        own = self.lora.get(name)
        if own is None or not isinstance(self.source, Adapter):
            return 0
        module = self.source.modules[own]
        return self.source.checkpoint.total_bytes([module.a, module.b])

    def private_names(self) -> list[str]:
        """Names of its private parameters, head.safetensors included."""
        return [*self.private, *(self.head.names() if self.head is not None else ())]

    def read_private(self) -> dict[str, Tensor]:
        """Its private parameters by name, in their stored dtype."""
        return {own: self.read_own(own) for own in self.private_names()}

    def close(self) -> None:
        """Give the file descriptors back."""
        self.source.close()
        if self.head is not None:
            self.head.close()


def open_expert(name: str, path: Path) -> Expert:
    """The expert in the folder `path`: headers are read. Raises CheckpointError with every problem."""
    if path.is_dir() and is_adapter(path):
        adapter = Adapter.open(path, name)
        return Expert(name, path, adapter, adapter.head)
    if path.is_dir() and (path / ADAPTER_WEIGHTS).is_file():
        # PEFT would put the adapter on these weights, and a merged model may have been saved beside its adapter.
        raise CheckpointError(
            Problem(
                str(path),
                f"{ADAPTER_WEIGHTS} beside full weights",
                "one of the two: nothing tells whether the adapter is in the weights already",
                "copy what this expert is into a folder of its own",
                name,
            )
        )
    checkpoint = Checkpoint.open(path, name)
    if not len(checkpoint):
        raise CheckpointError(
            Problem(
                str(path), "no tensors", "the weights of a fine-tuned model", "fetch or save the expert again", name
            )
        )
    head = Checkpoint.open(path / HEAD, name) if path.is_dir() and (path / HEAD).is_file() else None
    return Expert(name, path, checkpoint, head)
