"""The collector: admits signed batches, keeps the ledger, evaluates it and states it."""
