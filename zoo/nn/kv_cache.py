"""A cache of keys and values that is allocated once, for `transformers` models and answers of known length."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer of full attention in buffers `[B, heads, capacity, d]`; views of them are returned.

    `DynamicLayer` concatenates, and so copies everything that it holds at each token.

    Args:
        capacity: Most tokens that it can hold.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for rows and heads of the first keys and values, `[B, heads, n, d]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = (
            x.new_empty(*x.shape[:2], self.capacity, x.shape[-1]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, heads, n, d]`; returns all `[B, heads, length, d]`.

        Raises:
            ValueError: If they are more than the capacity.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache was made for {self.capacity} tokens, not {end}")
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values


def preallocated_cache(config: Any, capacity: int) -> Cache:
    """The cache that a model makes for itself, its layers of full attention allocated once.

    Args:
        config: Configuration of the model.
        capacity: Most tokens of a row, prompt and answer.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
