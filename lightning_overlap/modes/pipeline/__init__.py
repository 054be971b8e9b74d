"""Pipeline parallelism: ranks hold consecutive blocks, and a batch passes them in microbatches."""
