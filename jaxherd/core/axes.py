"""The vocabulary of logical axis names, for parameters and for activations.

A layout's rules say which mesh axes carry each name.  A name that is not listed here is an error
wherever it appears, so that a typing slip cannot turn into silent replication.
"""

PARAMETER_AXES: dict[str, str] = {
    "layers": "stacked layers of one kind (scanned over)",
    "vocab": "vocabulary entries of an embedding table or output projection",
    "embed": "model width D",
    "head_embed": "model width D of an output projection of its own",
    "heads": "query heads times head size, flattened",
    "kv_heads": "key/value heads times head size, flattened",
    "mlp": "hidden width F of a feed-forward block",
    "expert": "routed experts",
    "expert_mlp": "hidden width F of one routed expert",
    "norm": "scale of a normalisation layer",
    "conv": "taps of a convolution kernel",
    "channels": "channels that a convolution writes",
    "input_channels": "channels that a convolution reads, or too few to split (a waveform's)",
}

ACTIVATION_AXES: dict[str, str] = {
    "batch": "examples",
    "length": "positions in time of the sequence being computed",
    "kv_length": "positions in time of keys and values",
    "act_embed": "model width D",
    "act_heads": "query heads",
    "act_kv_heads": "key/value heads",
    "head_dim": "size of one head",
    "act_mlp": "hidden width of a feed-forward block",
    "act_vocab": "logits",
    "act_expert": "routed experts",
    "tokens": "batch and length flattened together",
}

ALL_AXES = PARAMETER_AXES | ACTIVATION_AXES

MESH_AXES: dict[str, str] = {
    "slice": "TPU slices joined by the data-centre network; data parallel only",
    "data": "replicas of the parameters",
    "fsdp": "batch and parameters both split; parameters are gathered when used",
    "expert": "routed experts split; elsewhere it acts as more fsdp",
    "sequence": "positions of one sequence split",
    "tensor": "heads, feed-forward width and vocabulary split",
}
