"""Everything done to a model or to its parameter tree."""
