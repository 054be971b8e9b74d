"""The user's model: roles of its parts, its stack of blocks, its memory."""
