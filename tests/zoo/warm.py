"""Imported by the process that workers are forked from: all that is imported late or made once is there before."""

import gc

from tests.zoo.training import whole

whole("gpt", "plain")
whole("llama", "plain")
whole.cache_clear()
gc.collect()
gc.freeze()  # else each worker copies what its collector touches
