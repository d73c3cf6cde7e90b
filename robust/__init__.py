"""A robust image classifier: the library under training and serving."""
