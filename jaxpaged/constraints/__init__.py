"""What limits the tokens of a request: a trie of token sequences, a regular expression, a JSON schema, a grammar.

Given as `SamplingParams(constraint=...)` and `BeamSearchParams(constraint=...)`: no output is ever anything else. The
last three need the extra `guided`.
"""

from jaxpaged.api.constraint import Constraint, Grammar, JsonSchema, Regex, TrieFile
from jaxpaged.api.trie import Trie

__all__ = ["Constraint", "Grammar", "JsonSchema", "Regex", "Trie", "TrieFile"]
