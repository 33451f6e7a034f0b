"""Weight-only int8 and int4: formats, matrix products, layers, quantized models."""
