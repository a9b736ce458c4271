"""Whole models with one set of weights, ours and the peers', behind one interface: `Baseline`."""
