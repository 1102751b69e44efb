"""Other inference engines beside ours, on the same weights and inputs, each in an environment and a process of its own.

    python -m benchmarks.peers --help        (or ./reproduce.sh peers --help)

`catalogue` says which engines there are, `engines/` holds a file for each, `environment` installs one, `subject` makes
the networks that all of them run, `serve` is an engine's process and `worker` our end of it, `rounds` lets them take
turns, `record` turns that into rows. To add a peer: a file in `engines/` and a line in `catalogue.PEERS`. `in_process`
has two that need neither, for a quick look beside a network in a notebook.
"""
