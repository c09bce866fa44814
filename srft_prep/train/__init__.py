"""The training loop: packed, weighted shards into a model, exact for any split."""
