"""Terms of the grammars' language, for constraints that are put together from parts."""

from __future__ import annotations

import json

from jaxserve.engine.grammar.readable_values import with_readable_values

WHITESPACE = r"( |\n[ ]{0,16})"
"""What may stand between the parts of JSON, at most once: enough to indent, too little to
babble."""


def json_term(schema_source: str) -> str:
    """A JSON schema as a term, with the same rules for whitespace as a schema alone."""
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(options | with_readable_values(json.loads(schema_source)))}"
