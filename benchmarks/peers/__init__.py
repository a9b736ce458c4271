"""Whole models of one shape, ours and the peers', behind one interface: see `Contender`."""
