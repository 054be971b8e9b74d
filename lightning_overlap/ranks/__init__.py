"""Ranks: their numbers, the groups that they form, and the transfers of tensors in groups."""
