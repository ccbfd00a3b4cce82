"""Rules that the tests of cleaning go by."""

from __future__ import annotations

from vlm.data_tools.clean_rules import Private, Rules, load_rules

RULES = Rules()
ENGLISH = load_rules(None, ["language.keep=[en]"])
ALL_MASKED = Private(ips="mask")
