"""What the tests share: drawn inputs, and the yardstick they are held to."""
