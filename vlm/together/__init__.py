"""One model held by several processes together, each with its part of it: the first is asked, the others follow.

The first process starts the others and tells each, through a pipe, what it is about to do: a step of an engine, or a call of
a method. Then all do it, and meet in the collective calls of the layers that are cut up.
"""

from vlm.together.team import TogetherVLM, load_together

__all__ = ["TogetherVLM", "load_together"]
