"""Which tokens make sample i: orders, packing, blending, balancing. Numbers only; C++ where it is built, else numpy."""
