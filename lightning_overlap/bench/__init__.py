"""What overlap buys, measured on the user's own module."""
