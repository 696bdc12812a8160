"""What needs no run, one question per file: the derivation of DPO, labels, estimators, credit."""
