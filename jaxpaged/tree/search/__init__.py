"""Searches written on `tree()` alone, short enough to be read, copied and changed; docs/search.md explains them.

Each takes an open tree and a node to start from, which it leaves as it is, and frees every node that it made. Random
searches take a seed: an int, or a numpy Generator.
"""

from jaxpaged.tree.search.best_of_n import BestOfN, best_of_n
from jaxpaged.tree.search.mcts import SearchResult, monte_carlo_tree_search
from jaxpaged.tree.search.rollout import Rollout, rollout
from jaxpaged.tree.search.step_beam import StepBeam, step_beam_search
from jaxpaged.tree.search.stochastic_beam import StochasticBeam, inclusion_probability, stochastic_beam_search

__all__ = [
    "BestOfN",
    "Rollout",
    "SearchResult",
    "StepBeam",
    "StochasticBeam",
    "best_of_n",
    "inclusion_probability",
    "monte_carlo_tree_search",
    "rollout",
    "step_beam_search",
    "stochastic_beam_search",
]
