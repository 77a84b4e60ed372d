"""What a weight matrix does in its block, read off its name: the layer groups of the tail fit and of the experts."""

from __future__ import annotations

__all__ = ["ROLES", "block", "role"]

_LEAVES: dict[str, tuple[str, ...]] = {
    "attention query, key, value": (
        "qkv", "qkv_proj", "query_key_value", "c_attn", "in_proj", "in_proj_weight", "wqkv",
    ),
    "attention query": ("q", "query", "q_proj", "q_lin", "query_proj", "wq", "q_a_proj", "q_b_proj"),
    "attention key": ("k", "key", "k_proj", "k_lin", "key_proj", "wk"),
    "attention value": ("v", "value", "v_proj", "v_lin", "value_proj", "wv", "kv_a_proj_with_mqa", "kv_b_proj"),
    "attention output": ("o", "o_proj", "out_proj", "out_lin", "wo_proj"),
    "feed-forward in": (
        "intermediate", "fc1", "c_fc", "lin1", "wi", "wi_0", "wi_1", "w1", "w3", "up_proj", "gate_proj", "gate_up_proj",
        "dense_h_to_4h", "ffn",
    ),
    "feed-forward out": ("fc2", "lin2", "w2", "down_proj", "dense_4h_to_h", "ffn_output"),
}  # fmt: skip
_BY_LEAF = {leaf: name for name, leaves in _LEAVES.items() for leaf in leaves}

OTHER = "other"
ROLES = (*_LEAVES, OTHER)
"""Every group that `role` can name, in the order in which tables and figures show them; cross-attention is with
attention."""


def role(name: str) -> str:
    """The group of the matrix `name`, the same for encoders, decoders and vision transformers of any library.

    Block numbers do not count, so a group pools all depths: within a role the matrices have one shape and one place in
    the computation, and a model of any depth has the same few groups.

    >>> role("encoder.layer.3.attention.self.query.weight")
    'attention query'
    >>> role("h.0.mlp.c_proj.weight")
    'feed-forward out'
    """
    parts = [part for part in name.lower().split(".") if not part.isdigit() and part not in {"weight", "base_layer"}]
    attention = any("attn" in part or "attention" in part for part in parts)
    while parts and parts[-1] in {"dense", "linear"}:  # wrappers: attention.output.dense, intermediate.dense
        parts = parts[:-1]
        if parts and parts[-1] in {"attention", "attn", "self_attention"}:  # GPT-NeoX, BLOOM: attention.dense
            return "attention output"
    leaf = parts[-1] if parts else ""
    if leaf in {"output", "proj", "c_proj", "wo"}:  # one word for both projections back to the residual stream
        if attention:
            return "attention output"
        return "feed-forward out" if any(part.isdigit() for part in name.split(".")) else OTHER
    return _BY_LEAF.get(leaf, OTHER)


def block(name: str) -> int | None:
    """The number of the block that the matrix `name` lies in, None outside every block.

    >>> block("encoder.layer.3.attention.self.query.weight")
    3
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
