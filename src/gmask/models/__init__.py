"""The architectures GLM and ChatGLM, their shared parts, the 2-D layout and the KV caches."""
