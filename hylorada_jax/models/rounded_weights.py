"""A model's tensors as a quantised base has them."""

import jax
import jax.numpy as jnp
import numpy as np

from hylorada_jax.math.quantized import as_array, split_name
from hylorada_jax.models.loading import WeightsLayout
from hylorada_jax.models.quantize import is_kept_in_codes, one_quantized, quantized_shapes
from hylorada_jax.models.weights import Part


class RoundedWeights:
    """The tensors of a model, those of its linear layers rounded to int8 or nf4.

    Args:
        layout: from :func:`hylorada_jax.models.loading.weights_layout`.
        dtype: of the quantised base, as :func:`hylorada_jax.math.quantized.dtype_name` gives it.
    """

    def __init__(self, layout: WeightsLayout, dtype: str) -> None:
        dtype_kept, base_dtype = split_name(dtype)
        assert base_dtype is not None
        leaves, slots, self._weights = layout
        shapes = {
            path: quantized_shapes(path, jax.ShapeDtypeStruct(shape, dtype_kept), base_dtype)
            for path, shape in leaves.items()
            if is_kept_in_codes(path, base_dtype)
        }
        self._kernels = {
            name: (shapes[slot.path], slot) for name, slot in slots.items() if slot.path in shapes
        }
        self.shapes, self.dtypes = self._weights.shapes, self._weights.dtypes
        self.file_of = self._weights.file_of

    def read(self, name: str, part: Part = ()) -> np.ndarray:
        """One tensor, or a part of it."""
        if name not in self._kernels:
            return self._weights.read(name, part)
        shape, slot = self._kernels[name]
        codes = jax.tree.map(jnp.asarray, one_quantized(name, self._weights, shape, slot))
        values = np.asarray(as_array(codes))
        return slot.turned(values)[part]
