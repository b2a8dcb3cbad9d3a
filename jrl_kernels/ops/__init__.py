"""One folder an op, or a family of ops that share a kernel."""
