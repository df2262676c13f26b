"""Sequences that a user forks, appends to, scores and takes back, on shared pages; docs/search.md explains them.

`llm.tree()` opens a `Tree` on an engine, `ToyLM` one over any function of the prefix, without jax; searches that are
written on trees are in `jaxpaged.tree.search`. Imported by `LLM`.
"""

from jaxpaged.tree.toy import ToyLM
from jaxpaged.tree.tree import Appended, NextTokens, Node, OutOfPagesError, Scores, Tree, TreeStats

__all__ = ["Appended", "NextTokens", "Node", "OutOfPagesError", "Scores", "ToyLM", "Tree", "TreeStats"]
