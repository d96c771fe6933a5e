"""How long a step takes: `table`, `roofline`, or `fitted`."""
