"""From media files to tensors."""
