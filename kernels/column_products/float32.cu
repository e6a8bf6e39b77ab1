// The kernel of column_products.cuh for one dtype: a model uses one, and compiles no other.
#include "column_products/column_products.cuh"

COLUMN_PRODUCTS(float32, Float32)
