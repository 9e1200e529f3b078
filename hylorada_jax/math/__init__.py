"""Pure array functions: no Flax, no configuration."""
