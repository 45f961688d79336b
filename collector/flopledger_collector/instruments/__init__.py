"""Instruments: legal thresholds as versioned data, and the comparison of intervals with them."""
