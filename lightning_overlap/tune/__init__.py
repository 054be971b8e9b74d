"""Chooses a layout: rehearses ranks of a world that does not exist, simulates their transfers on a link, and compares layouts."""
