"""The package's own C++: products with int8 and int4 weights, and attention of a single query, on the CPU."""
