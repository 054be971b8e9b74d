"""Ranks: who they are, the groups that they form, and how groups transfer tensors."""
