"""Shards in the forms that trainers load.

    shards --packs--> arrays --trl | axolotl | llama_factory | megatron--> rows --stage--> files
    shards --hugging_face--> the same files, with a dataset card

`packs` reads, `tally` counts and says what a target loses, `target` is what a target must be,
`card` writes the README.md. A target module knows one tool: its columns, and the lines that load
them.
"""
