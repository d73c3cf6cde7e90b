"""The device: one thread that computes, its queue, and the model it serves."""
