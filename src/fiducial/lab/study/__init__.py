"""One question per file: the derivation of DPO, labels, estimators, credit, over-optimization."""
