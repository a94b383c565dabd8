"""The run: rounds, ledger, checkpoints, local cluster and command line."""
