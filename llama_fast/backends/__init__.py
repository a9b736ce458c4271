"""The fast implementations of the ops: importing one registers its rows with the dispatch."""
