"""Data parallelism: gradients reduced under backward, parameters gathered under the next forward."""
