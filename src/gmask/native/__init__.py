"""The package's own C++ for the CPU: products with int8 and int4 weights, attention of one query, GELU, rotation."""
