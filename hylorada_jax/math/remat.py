"""What the backward pass computes again, whatever a layer's rematerialisation is."""

import functools

import jax

# Where that costs less than to write and read the result: of what is elementwise, of a norm in float32, of a
# kernel in codes. Across the loops over the layers no compiler takes the second time for the first.
computed_again = functools.partial(jax.checkpoint, prevent_cse=False)
