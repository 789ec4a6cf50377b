"""Loading: the catalog of pairs, checkpoints, memory, placement, measured costs, and the embedded pair."""
