"""Serving: an HTTP API, a page in the browser, and replicas by Ray Serve."""
