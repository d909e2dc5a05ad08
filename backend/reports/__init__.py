"""What was found out about a model, as objects that experiments make and pages read: its parts, graph, weights, and the effect of quantization."""
