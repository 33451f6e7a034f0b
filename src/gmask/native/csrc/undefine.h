// After the kernels of one kind of vector; included more than once.
#undef GMASK_NAME
#undef GMASK_TARGET
#undef GMASK_VECTOR
#undef GMASK_SUMS
#undef GMASK_INTEGERS
