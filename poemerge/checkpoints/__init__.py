"""Safetensors in and out: lazy readers, adapters in factored form, sharded atomic writers, digests."""

from poemerge.checkpoints.adapter import Adapter, is_adapter
from poemerge.checkpoints.checkpoint import Checkpoint, model_config
from poemerge.checkpoints.digest import file_digest, folder_digest
from poemerge.checkpoints.expert import Expert
from poemerge.checkpoints.expert_set import ExpertSet, Loaded
from poemerge.checkpoints.names import Rule, layer_group
from poemerge.checkpoints.writer import Shard, ShardFile, plan_shards, save_tensors, weights_digest, write_index

__all__ = [
    "Adapter",
    "Checkpoint",
    "Expert",
    "ExpertSet",
    "Loaded",
    "Rule",
    "Shard",
    "ShardFile",
    "file_digest",
    "folder_digest",
    "is_adapter",
    "layer_group",
    "model_config",
    "plan_shards",
    "save_tensors",
    "weights_digest",
    "write_index",
]
